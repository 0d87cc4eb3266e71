"""YAML of recipes: plain values, and errors for whatever else a file may ask for."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from energy_prior import ArgumentError
from energy_prior.cli.document import read_document, text_of

LAUGHS = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]\n" for i in range(30))
MERGES = "".join(f"m{i}: &m{i} {{{f'<<: [*m{i - 1}, *m{i - 1}]' if i else 'k: v'}}}\n" for i in range(60))


def test_plain_values() -> None:
    text = """
    a: {b: [1, 2.5, 1e-3, +2E5, -1., true, null, "1", 'x y'], "1": 0x10, empty: {}, none: }
    usual: &usual {x: 1, y: [2]}
    more: {<<: *usual, x: 3}
    same: *usual
    """
    assert read_document(text, "here") == {
        "a": {"b": [1, 2.5, 1e-3, 2e5, -1.0, True, None, "1", "x y"], "1": 16, "empty": {}, "none": None},
        "usual": {"x": 1, "y": [2]},
        "more": {"x": 3, "y": [2]},
        "same": {"x": 1, "y": [2]},
    }
    assert read_document("", "here") is None
    assert read_document("# nothing", "here") is None
    assert read_document("9223372036854775807", "here") == 2**63 - 1


BAD: list[tuple[str, str]] = [
    ("a: [", "not valid YAML: while parsing"),
    ("a: 1\n---\nb: 2", "not valid YAML: expected a single document"),
    ("a: \x01", "not valid YAML: unacceptable character"),
    ("a: !!python/object/apply:os.mkdir [made]", "not valid YAML: could not determine a constructor"),
    ("a: !!python/name:os.mkdir", "not valid YAML: could not determine a constructor"),
    ("a: *b", "not valid YAML: found undefined alias"),
    ("? [1]\n: 2", "not valid YAML: while constructing a mapping"),
    ("a: 2024-99-99", "not valid YAML: ValueError"),
    ("a: !!int x", "not valid YAML: ValueError"),
    ("a: !!int ''", "not valid YAML: IndexError"),
    ("a: !!bool x", "not valid YAML: KeyError"),
    ("a: !!timestamp x", "not valid YAML: AttributeError"),
    ("a: " + "9" * 5000, "not valid YAML: ValueError"),
    (
        "a: 2024-01-01",
        r"expected text, numbers, lists and sections, got datetime.date.*a date. If it is text, put it in quotes",
    ),
    ("a: 2001-12-14t21:59:43.10-05:00", "got datetime.datetime"),
    ("a: !!binary AAAA", "got b.*a bytes"),
    ("a: !!set {x}", "got {'x'}, a set"),
    ("a: !!omap [x: 1]", r"got \('x', 1\), a tuple"),
    ("1: a", "expected text as the name of an entry, got 1. Put it in quotes"),
    ("a: {on: 1}", "expected text as the name of an entry, got True"),
    ("null: a", "expected text as the name of an entry, got None"),
    ("a: 9223372036854775808", "expected whole numbers of at most 64 bits, got 9223372036854775808"),
    ("a: -9999999999999999999", "expected whole numbers of at most 64 bits"),
    ("a: 0x" + "f" * 5000, "expected whole numbers of at most 64 bits, got a int"),
    ("a: 1" + ":1" * 5000, "expected whole numbers of at most 64 bits"),
    ('a: "\\0"', r"expected text that can be written to a file, got '\\x00'"),
    ('a: "\\ud800"', r"expected text that can be written to a file, got '\\ud800'"),
    ('"\\0": a', r"expected text that can be written to a file, got '\\x00'"),
    ("&a [*a]", "expected at most 20000 entries, .* and none inside of itself"),
    ("a: &a {b: {c: *a}}", "expected at most 20000 entries"),
    (LAUGHS, "expected at most 20000 entries"),
    (MERGES, "expected at most 20000 entries"),
    ("[" + "1, " * 20_000 + "]", "expected at most 20000 entries"),
    ("[" * 5000, "not valid YAML: its sections are nested too deep"),
    ("[" * 800 + "]" * 800, "not valid YAML: its sections are nested too deep"),
    ("{a: " * 5000, "not valid YAML: its sections are nested too deep"),
    ("!" + "x" * 5000 + " 3", "not valid YAML: could not determine a constructor"),
]


@pytest.mark.parametrize(("text", "words"), BAD, ids=range(len(BAD)))
def test_what_is_refused(text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = time.process_time()
    with pytest.raises(ArgumentError, match=f"^here: .*{words}") as error:
        read_document(text, "here")
    assert len(str(error.value)) < 600
    assert time.process_time() - before < 4
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a: \xc3\xa9", "a: é"),
        (b"\xef\xbb\xbfa: 1", "a: 1"),
        ("a: é".encode("utf-16"), "a: é"),
        (b"\xfe\xff" + "a: é".encode("utf-16-be"), "a: é"),
        (b"x" * 2**17, "x" * 2**17),
    ],
    ids=range(5),
)
def test_text_of_a_file(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    assert text_of(tmp_path / "file") == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: \xff", "file': expected text in UTF-8, and byte 3 is none"),
        (b"\xff\xfe\x00\xd8", "file': expected text in UTF-8"),
        (b"x" * (2**17 + 1), "file': expected a recipe of at most 131072 bytes, got 131073. Is it another file"),
    ],
    ids=range(3),
)
def test_what_is_no_text_of_a_recipe(content: bytes, words: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ArgumentError, match=words):
        text_of(tmp_path / "file")
