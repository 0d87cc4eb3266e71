"""What `mkdocs build` adds to the Markdown of this folder: formulas as plain text, pages of the top level, tables, links."""

from __future__ import annotations

__all__ = [
    "PlainFormulas",
    "api_names",
    "linked",
    "on_config",
    "on_files",
    "on_page_content",
    "on_page_markdown",
    "top_level_page",
    "with_tables",
]

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markdown.extensions import Extension
from markdown.inlinepatterns import SimpleTagInlineProcessor

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
TOP_LEVEL = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
_GUIDE = re.compile(r"docs/(\w+)\.md")
_CODE = re.compile(r"<code>([^<]+)</code>")
_APART = re.compile(r"(<pre.*?</pre>|<a\b.*?</a>|<h\d.*?</h\d>)", re.DOTALL)


class PlainFormulas(Extension):
    """Leaves ∇_z, (n, *x_shape) and ∏_{i<L} p(z_i | z_{>i}) as they are: no emphasis by underscores, no HTML in a line."""

    def extendMarkdown(self, md: Any) -> None:  # noqa: N802  (Markdown calls it so)
        """Replaces the patterns of emphasis, and takes that of HTML out."""
        for name in ("not_strong", "em_strong", "em_strong2", "html"):
            md.inlinePatterns.deregister(name, strict=False)
        strong, emphasis = r"(\*\*)(?=\S)(.+?)(?<=\S)\*\*", r"(?<![\w*])(\*)(?=[^\s*])([^*]+?)(?<=\S)\*(?!\w)"
        md.inlinePatterns.register(SimpleTagInlineProcessor(strong, "strong"), "strong", 61)
        md.inlinePatterns.register(SimpleTagInlineProcessor(emphasis, "em"), "emphasis", 60)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds `PlainFormulas`, for pages and docstrings."""
    extensions: list[Any] = config.markdown_extensions
    extensions.append(PlainFormulas())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages whose text is a file of the top level."""
    from mkdocs.structure.files import File

    for page, file in TOP_LEVEL.items():
        text = (DOCS.parent / file).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=top_level_page(text)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts the tables into the gallery."""
    return with_tables(markdown) if page.file.src_uri == "gallery.md" else markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes links of names that the API reference has, and of guides, where they stand in code; the search leaves code out."""
    for repeated in ('<details class="mkdocstrings-source"', '<details class="info"'):
        html = html.replace(repeated, f"{repeated} data-search-exclude")
    return linked(html, page.file.src_uri, api_names())


def top_level_page(text: str) -> str:
    """The text of a file of the top level, its links as they are from here."""
    for page, file in TOP_LEVEL.items():
        text = text.replace(f"]({file})", f"]({page})")
    return text.replace("](docs/", "](")


def with_tables(markdown: str) -> str:
    """Below every line that is a link to a file of results, what is in that file."""

    def table(found: re.Match[str]) -> str:
        title, _, body = (DOCS / found[2]).read_text(encoding="utf-8").partition("\n")
        body = re.sub(r"^#+ (.*)$", r"**\1**", body.strip(), flags=re.MULTILINE)
        inside = "\n".join(f"    {line}".rstrip() for line in body.splitlines())
        return f'{found[0]}\n\n??? info "{title.lstrip("# ").replace("`", "")}"\n\n{inside}'

    return re.sub(r"^\[([^\]]+)\]\((results/\w+\.md)\)$", table, markdown, flags=re.MULTILINE)


def api_names() -> dict[str, str]:
    """Every name that the API reference has -> its page."""
    pages = {page: page.read_text(encoding="utf-8") for page in sorted((DOCS / "api").glob("*.md"))}
    return {name: page.name for page, text in pages.items() for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}


def linked(html: str, page: str, names: Collection[str]) -> str:
    """The page with links around code that is a name of the API, a call of one, or a guide.

    Args:
        html: content of the page.
        page: its file, as seen from this folder.
        names: those of the API, in full.
    """
    short = {name.rpartition(".")[2]: name for name in names}

    def link(found: re.Match[str]) -> str:
        code = found[1]
        if (guide := _GUIDE.fullmatch(code)) and (DOCS / f"{guide[1]}.md").exists():
            target = os.path.relpath(f"{guide[1]}.html", os.path.dirname(page) or ".")
            return f'<a href="{target}">{found[0]}</a>'
        name, call, _ = code.partition("(")
        last = name.rpartition(".")[2]
        if call and not code.endswith(")"):
            return found[0]
        if name.startswith("prior."):
            target = f"energy_prior.JointEBMPrior.{name.removeprefix('prior.')}"
        elif f"energy_prior.{name}" in names:
            target = f"energy_prior.{name}"
        elif last in short and (call or "." in name or not name.islower()):  # a word alone may be an argument's name
            target = short[last]
        else:
            return found[0]
        return f'<autoref optional identifier="{target}">{found[0]}</autoref>'

    parts = _APART.split(html)
    return "".join(part if i % 2 else _CODE.sub(link, part) for i, part in enumerate(parts))
