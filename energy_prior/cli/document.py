"""YAML as recipes use it: sections, lists, text, numbers. Whatever a file asks for, no code is run and little memory taken."""

from __future__ import annotations

__all__ = ["read_document", "text_of"]

import codecs
import re
from pathlib import Path
from typing import Any

from energy_prior._util import first_line, shown
from energy_prior.checks.settings import require_extra
from energy_prior.errors import ArgumentError

_MOST_BYTES = 2**17
_MOST_ENTRIES = 20_000  # with what aliases stand for
_BITS = 63  # of whole numbers


def text_of(file: Path) -> str:
    """The text of a file: UTF-8, with or without a mark of the byte order, or UTF-16 with one.

    Raises:
        ArgumentError: if it is neither, or larger than 128 KiB.
    """
    with file.open("rb") as opened:
        content = opened.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ArgumentError(
            f"{str(file)!r}: expected a recipe of at most {_MOST_BYTES} bytes, got {file.stat().st_size}. Is it another file?"
        )
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"{str(file)!r}: expected text in UTF-8, and byte {error.start} is none. Save the file as UTF-8."
        ) from error


def read_document(text: str, where: str) -> Any:
    """What a YAML text says, in dicts with text as keys, lists, text, bools, None, and numbers, 1e-3 among them.

    Args:
        text: YAML of the safe kind: a tag that asks for an object of Python's is an error.
        where: what errors call it.

    Raises:
        ArgumentError: if it is not valid YAML, holds other values (dates, bytes, sets), itself, more than 20,000 entries with
            those that aliases stand for, or whole numbers of more than 64 bits.
    """
    yaml: Any = require_extra("yaml", "train")
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            if _entries(root, {}) > _MOST_ENTRIES:
                raise ArgumentError(
                    f"{where}: expected at most {_MOST_ENTRIES} entries, with those that aliases stand for, and none "
                    "inside of itself. Write it without aliases."
                )
            return _plain(loader.construct_document(root), where)
        finally:
            loader.dispose()
    except ArgumentError:
        raise
    except RecursionError:
        raise ArgumentError(f"{where}: not valid YAML: its sections are nested too deep, or one is inside of itself.") from None
    except yaml.YAMLError as error:
        raise ArgumentError(f"{where}: not valid YAML: {shown(' '.join(str(error).split()), 400)[1:-1]}") from error
    except Exception as error:  # a tag or a date whose text is none: whatever Python says of it
        raise ArgumentError(f"{where}: not valid YAML: {type(error).__name__}: {first_line(error)}") from error


def _entries(node: Any, known: dict[int, int]) -> int:
    """Nodes in a part of the document, each as often as aliases repeat it; endless where it holds itself."""
    if id(node) not in known:
        known[id(node)] = _MOST_ENTRIES + 1  # until its own parts are counted
        content = node.value if isinstance(node.value, list) else []
        parts = [part for item in content for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_entries(part, known) for part in parts)
    return known[id(node)]


def _plain(value: Any, where: str) -> Any:
    """The values, where all are of the kinds that a recipe has. YAML 1.1 reads 1e-3 as text; here it is a number."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ArgumentError(f"{where}: expected text as the name of an entry, got {shown(key)}. Put it in quotes.")
        return {_plain_text(key, where): _plain(item, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, where) for item in value]
    if isinstance(value, str):
        return float(value) if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value) else _plain_text(value, where)
    if isinstance(value, int) and value.bit_length() > _BITS:
        raise ArgumentError(f"{where}: expected whole numbers of at most {_BITS + 1} bits, got {shown(value)}.")
    if value is not None and not isinstance(value, bool | int | float):
        raise ArgumentError(
            f"{where}: expected text, numbers, lists and sections, got {shown(value)}, a {type(value).__name__}. If it is "
            "text, put it in quotes."
        )
    return value


def _plain_text(value: str, where: str) -> str:
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ArgumentError(f"{where}: expected text that can be written to a file, got {shown(value)}.")
    return value
