"""The fenced blocks of code in README and the docs, and how tests run them."""

from __future__ import annotations

__all__ = ["CODE", "ROOT", "Block", "all_blocks", "blocks", "run_python", "run_shell"]

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
CODE = {"python": "python", "py": "python", "pycon": "python", "sh": "shell", "bash": "shell", "shell": "shell"}
CODE |= {"console": "shell", "yaml": "yaml", "yml": "yaml"}
"""What stands behind a fence -> the language that it is."""

Record = Callable[[str, object], None]
"""pytest's `record_property`: with it a test says which blocks it has run; `benchmarks/docs.py` counts those that passed."""


class Block(NamedTuple):
    """A block: `kind` is what stands behind its fence, `line` where it begins."""

    file: str
    line: int
    kind: str
    code: str

    @property
    def name(self) -> str:
        """What identifies it."""
        return f"{self.file}:{self.line}"


def blocks(file: str, language: str | None = None) -> list[Block]:
    """The blocks of a file in a language; None: all, whatever they are."""
    text = (ROOT / file).read_text(encoding="utf-8")
    found = []
    for fence in re.finditer(r"^( *)(```+|~~~+) *(\S*)[^\n]*\n(.*?)^\1\2", text, re.DOTALL | re.MULTILINE):
        block = Block(file, text[: fence.start()].count("\n") + 1, fence[3], fence[4])
        if language in (None, CODE.get(block.kind)):
            found.append(block)
    return found


def all_blocks() -> list[Block]:
    """Those of README, the other pages of the top level, and docs, in every language."""
    files = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    return [block for file in files for block in blocks(file.relative_to(ROOT).as_posix())]


def shortened(chosen: Sequence[Block], replace: Mapping[str, str]) -> list[str]:
    """Their code with these texts replaced, each of which must be there."""
    codes = [block.code for block in chosen]
    for old, new in replace.items():
        assert any(old in code for code in codes), f"not in these blocks: {old}"
        codes = [code.replace(old, new) for code in codes]
    return codes


def run_python(
    chosen: Sequence[Block], names: dict[str, Any], record: Record, replace: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Runs blocks one after the other, with these names at hand.

    Args:
        chosen: the blocks.
        names: what they may use; holds what they define when they are through.
        record: pytest's `record_property`.
        replace: texts of theirs -> what is run instead, so that a test has time for it.
    """
    for block, code in zip(chosen, shortened(chosen, replace or {}), strict=True):
        exec(compile("\n" * block.line + code, block.file, "exec"), names)  # noqa: S102
        record("block", block.name)
    return names


def run_shell(
    chosen: Sequence[Block], place: Path, record: Record, replace: Mapping[str, str] | None = None, *, cache: Path | None = None
) -> str:
    """Runs blocks, each in a shell that stops at the first error; what they print.

    pip only looks whether what is installed would do, and asks no network: `pip install` has these options besides.

    Args:
        chosen: the blocks.
        place: folder to run them in.
        record: pytest's `record_property`.
        replace: as for `run_python`.
        cache: folder for copies of data sets; None: one in `place`.
    """
    printed = ""
    paths = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    others = {"HF_DATASETS_CACHE": str(cache or place / "cache"), "OMP_NUM_THREADS": "1", "NO_MKDOCS_2_WARNING": "1"}
    for block, code in zip(chosen, shortened(chosen, replace or {}), strict=True):
        done = subprocess.run(  # noqa: S603
            ["/bin/sh", "-ec", code.replace("pip install", "pip install --dry-run --no-index --no-build-isolation")],
            cwd=place,
            env=os.environ | paths | others,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, f"{block.name}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        printed += done.stdout
        record("block", block.name)
    return printed
