"""The page around its parts."""

from __future__ import annotations

__all__ = ["page"]

import base64
import hashlib
import importlib.resources
import re
from collections.abc import Iterable, Mapping

from energy_prior.page.parts import escaped

_NARROW, _WIDE = 56, 96
_SMALL = 64  # images of so many pixels are shown with their pixels visible


def page(
    title: str, facts: Mapping[str, str], sections: Mapping[str, tuple[str, Iterable[str], str]], size: tuple[int, int]
) -> str:
    """The page.

    Args:
        title: its title, plain text.
        facts: name -> value, plain text.
        sections: key -> title, paragraphs (both plain text) and content (HTML).
        size: height and width of the images on it.
    """
    links = "".join(f'<li><a href="#{key}">{escaped(name)}</a></li>' for key, (name, _, _) in sections.items())
    known = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in facts.items())
    small = " data-small" if max(size) <= _SMALL else ""
    parts = [
        f'<header><h1>{escaped(title)}</h1><dl>{known}</dl><nav aria-label="Parts"><ul>{links}</ul></nav></header>',
        f'<main style="--cell:{max(_NARROW, min(_WIDE, size[1]))}px"{small}>',
    ]
    for key, (name, paragraphs, content) in sections.items():
        said = "".join(f"<p>{escaped(text)}</p>" for text in paragraphs)
        heading = f'<h2 id="{key}-title">{escaped(name)}</h2>'
        parts.append(f'<section id="{key}" aria-labelledby="{key}-title">{heading}{said}{content}</section>')
    parts.append("</main><footer><p>Made by energy-prior view. This file needs no network and no other file.</p></footer>")
    template = importlib.resources.files("energy_prior.page").joinpath("page.html").read_text(encoding="utf-8")
    script = template.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    filled = {"hash": digest, "title": escaped(title), "body": "\n".join(parts)}
    return re.sub(r"\{\{(hash|title|body)\}\}", lambda found: filled[found[1]], template)
