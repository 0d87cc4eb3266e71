"""Times as ratios within one run, peaks of memory in processes of their own, and the table and picture of such figures."""

from __future__ import annotations

__all__ = ["added_memory", "alternate", "apart", "goal_rows", "ratio_picture", "ratio_table"]

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from results import Row


def alternate(runs: Mapping[str, Callable[[], object]], repeats: int) -> Callable[[str, str], float]:
    """Runs all in turn, `repeats` times after two that do not count; gives the median over the rounds of a ratio of two."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for name in list(runs) * 2:
        runs[name]()
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return lambda a, b: statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))


def apart(
    file: str, *arguments: str, give_back: bool = False, package: str | None = None, settings: Mapping[str, str] | None = None
) -> Any:
    """The JSON that `python file arguments` prints as its last line.

    Args:
        file: a script.
        arguments: of its command line.
        package: folder that `energy_prior` is imported from; None: as it is here.
        give_back: with a C library that gives back what is freed; by default it keeps some, more the longer a process runs.
        settings: more of the process's environment.
    """
    returning = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
    environment = os.environ | (returning if give_back else {}) | ({"PYTHONPATH": package} if package else {})
    environment |= settings or {}
    command = [sys.executable, file, *arguments]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
    return json.loads(run.stdout.splitlines()[-1])


def added_memory(run: Callable[[], object]) -> int:
    """kB that a call adds to the peak of this process's resident memory."""
    level = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    run()
    return _status("VmHWM") - level


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def goal_rows(
    goals: Mapping[tuple[str, str], float | None],
    figures: Mapping[tuple[str, str], float],
    why: Callable[[str, str], str] = lambda case, metric: "not measured",
    higher: Collection[tuple[str, str]] = (),
) -> list[Row]:
    """A row per goal, with its figure, or why there is none; a goal is the most, or of those in `higher` the least."""
    rows: list[Row] = []
    for (case, metric), goal in goals.items():
        better = "higher" if (case, metric) in higher else "lower"
        row = Row(case=case, metric=metric, value=figures.get((case, metric)), sd=None, n=1, goal=goal, better=better)
        if row["value"] is None:
            row["why"] = why(case, metric)
        rows.append(row)
    return rows


def ratio_table(title: str, text: str, rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = [f"# {title}", "", text, "", "| case | metric | value | at most |", "|---|---|---|---|"]
    for row in rows:
        value = row.get("why", "") if row["value"] is None else f"{row['value']:.3g}"
        goal = "" if row["goal"] is None else f"{'at least ' if row['better'] == 'higher' else ''}{row['goal']}"
        lines.append(f"| {row['case']} | {row['metric']} | {value} | {goal} |")
    return "\n".join(lines) + "\n"


def ratio_picture(path: Path, rows: Sequence[Row]) -> None:
    """Every measured ratio that has a goal, as a share of it."""
    shown = [(row, row["value"] / row["goal"]) for row in rows if row["value"] is not None and row["goal"]]
    figure = Figure(figsize=(7, 0.32 * len(shown) + 0.9), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['case']}  {row['metric']}" for row, _ in shown]
    axes.barh(names, [share for _, share in shown], color=["tab:blue" if share <= 1 else "tab:red" for _, share in shown])
    for position, (row, share) in enumerate(shown):
        axes.text(share + 0.01, position, f"{row['value']:.3g}", va="center", fontsize=8)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.set_xlabel("share of the goal (1: just met)")
    figure.savefig(path, dpi=130)
