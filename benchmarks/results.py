"""Results files: `docs/results/NAME.json` with the command, commit, machine and versions that made its rows."""

from __future__ import annotations

__all__ = ["Row", "mean_row", "provenance", "write_results"]

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from typing_extensions import NotRequired

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "numpy", "scikit-learn")


class Row(TypedDict):
    """One figure: `goal` is None where there is none; `value` is None, with a `why`, where it was not measured."""

    case: str
    metric: str
    value: float | None
    sd: float | None
    n: int
    goal: float | None
    better: str
    why: NotRequired[str]


def mean_row(case: str, metric: str, values: Sequence[float], goal: float | None, better: str) -> Row:
    """The mean of some values, with their standard deviation."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Row(case=case, metric=metric, value=statistics.fmean(values), sd=sd, n=len(values), goal=goal, better=better)


def provenance() -> dict[str, Any]:
    """Where and with what the figures were made."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603
    return {
        "command": "python " + " ".join([os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "commit": commit or None,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {platform.system()}",
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in _PACKAGES},
    }


def write_results(path: Path, rows: Sequence[Row]) -> None:
    """Writes the rows with their provenance, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(provenance() | {"rows": list(rows)}, indent=1) + "\n")
    temporary.replace(path)
