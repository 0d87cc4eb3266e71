"""Results files: `docs/results/NAME.json` with the command, commit, machine and versions that made its rows."""

from __future__ import annotations

__all__ = [
    "ROOT",
    "Row",
    "code_key",
    "commit",
    "commits",
    "logged_runs",
    "machine",
    "mean_row",
    "provenance",
    "run_missing",
    "write_results",
]

import ast
import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
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
    return {
        "command": " ".join(["python", *(_as_seen_from_root(a) for a in sys.argv)]),
        "commit": commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in _PACKAGES},
    }


def commit() -> str | None:
    """That of the code here; None where there is no repository."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None  # noqa: S603


def machine() -> str:
    """The processor with its units for bf16, the number of cores, the system, and the GPU if there is one."""
    from energy_prior.cli.info import bf16_units  # here: a process that measures an older commit has none

    name = platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = f"{value.strip()} ({platform.machine()})"
    found = bf16_units()
    bf16 = f"with {' and '.join(found)}" if found else "without units for bf16" if found == [] else "units for bf16 not known"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {bf16}, {os.cpu_count()} CPU cores, {platform.system()}{gpu}"


def _as_seen_from_root(argument: str) -> str:
    """Paths of one machine do not belong into results."""
    return os.path.relpath(argument, ROOT) if argument == sys.argv[0] or os.path.isabs(argument) else argument


def write_results(path: Path, rows: Sequence[Row]) -> None:
    """Writes the rows with their provenance, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(provenance() | {"rows": list(rows)}, indent=1) + "\n")
    temporary.replace(path)


_WITHOUT_FIGURES = ("__init__.py", "cli", "data", "plots.py", "checks", "detectors.py", "hub.py", "page", "evaluate/samples.py")


def code_key(*files: Path, also: str = "") -> str:
    """Hash of the package's code that figures depend on and of `files`, docstrings, comments and layout aside.

    Results with another key were made by other code.
    """
    package = ROOT / "energy_prior"
    named = {file: file.relative_to(package) for file in sorted(package.rglob("*.py"))}
    own = [f for f, name in named.items() if name.parts[0] not in _WITHOUT_FIGURES and name.as_posix() not in _WITHOUT_FIGURES]
    total = hashlib.sha256(also.encode())
    for path in (*own, *files):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                node.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
        total.update(_dumped(tree).encode())
    return total.hexdigest()[:16]


def _dumped(node: object) -> str:
    """Like `ast.dump`, the same by every Python: without fields that are empty, which newer ones have more of."""
    if isinstance(node, list):
        return f"[{', '.join(map(_dumped, node))}]"
    if isinstance(node, ast.JoinedStr):  # some Pythons end it with an empty piece
        return f"JoinedStr({_dumped([v for v in node.values if not (isinstance(v, ast.Constant) and v.value == '')])})"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = ((name, value) for name, value in ast.iter_fields(node) if value is not None and value != [])
    return f"{type(node).__name__}({', '.join(f'{name}={_dumped(value)}' for name, value in fields)})"


def run_missing(
    jobs: Mapping[str, Any], run: Callable[[Any], dict[str, Any]], log: Path, key: str, workers: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """`run(job)` for every job, in worker processes of one thread each; a line in `log` as each ends, which is not run again.

    Args:
        jobs: name -> what `run` gets; both picklable.
        run: a function at the top level of a module.
        log: file of the lines so far; those with another `key` do not count.
        key: of the code and settings.
        workers: runs at a time.

    Yields:
        Name and result, first of those that were there, then of the others as they end.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {line["job"]: line["result"] for line in lines if line["key"] == key and line["job"] in jobs}
    print(f"{len(done)} runs are there, {len(jobs) - len(done)} to do", flush=True)
    here = commit()  # now: what runs is the code of this moment
    yield from done.items()
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # of the workers: more threads than cores only stall
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(run, job): name for name, job in jobs.items() if name not in done}
        for future in concurrent.futures.as_completed(futures):
            name, result = futures[future], future.result()
            with log.open("a") as file:
                file.write(json.dumps({"key": key, "commit": here, "job": name, "result": result}) + "\n")
            yield name, result


def logged_runs(log: Path) -> dict[str, dict[str, Any]]:
    """Name -> result of the lines of `run_missing`, as each was last made, whatever the code.

    Raises:
        SystemExit: if there are none: a table of nothing would replace the one that is there.
    """
    return {name: line["result"] for name, line in _logged(log).items()}


def commits(log: Path, start: str = "") -> str:
    """Of the code that these were made by, for a table: all, or those whose name starts so."""
    lines = (line for name, line in _logged(log).items() if name.startswith(start))
    return ", ".join(sorted({(line.get("commit") or "unknown")[:7] for line in lines}))


def _logged(log: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if not lines:
        raise SystemExit(f"There are no runs in {log}.")
    return {line["job"]: line for line in lines}
