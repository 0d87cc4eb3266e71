"""The rows and the table of synthesis.py, from its units."""

from __future__ import annotations

__all__ = ["LAST_UNIT", "TOY", "rows_of", "table", "toy_rows", "units_of"]

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from case_runs import whole
from results import Row, mean_row

from energy_prior.evaluate import excess_ratio, gap_closed

LAST_UNIT, TOY = "seconds", "example"
_SPREADS = 10  # a gap of fewer standard deviations is none
FIGURES = ("kernel", "precision", "recall", "inception_score_lite0")
"""Beside the Fréchet distance and the shares of it."""
GOALS: dict[tuple[str, str], tuple[float, str]] = {
    ("mnist (classifier), joint", "gap_closed"): (0.93, "higher"),
    ("fashion_mnist, joint", "gap_closed"): (0.80, "higher"),
    ("cifar10, joint", "gap_closed"): (0.60, "higher"),
    ("celeba64, joint", "gap_closed"): (0.60, "higher"),
    ("cifar10_joint, joint", "frechet_excess_ratio"): (0.5, "lower"),
    ("mnist, long chains", "long_over_short"): (1.1, "lower"),
    ("cifar10, long chains", "long_over_short"): (1.1, "lower"),
    ("mnist, long chains", "drift"): (1.0, "lower"),
    ("mnist, long chains", "lost"): (0.0, "lower"),
    ("mnist_toy", "mmd_ratio_worst_layer"): (0.2, "lower"),
}


def units_of(log: Path, name: str, seeds: int) -> list[dict[str, dict[str, Any]]]:
    """The units of every seed of a set that is done."""
    return [units for seed in range(seeds) if (units := whole(log, f"{name} {seed}", LAST_UNIT))]


def toy_rows(log: Path) -> list[Row]:
    """The row of the toy, if it was run and its Gaussian prior is at a distance."""
    ratio = whole(log, "mnist_toy", TOY).get(TOY, {}).get("mmd_ratio_worst_layer")
    return [] if ratio is None else [_row("mnist_toy", "mmd_ratio_worst_layer", [ratio], None, "lower")]


def rows_of(name: str, runs: Sequence[dict[str, dict[str, Any]]]) -> list[Row]:
    """The rows of a set: means over seeds of means over draws; the spread is that of seeds, or of draws where there is one."""
    if not runs:
        return []
    rows = [mean_row(name, "validation_elbo", [units["backbone"]["validation_elbo"] for units in runs], None, "higher")]
    rows += [
        mean_row(f"{name}, {kind}", "frechet", _drawn(runs, kind, "frechet")[0], None, "lower")
        for kind in ("real", "reconstructions")
    ]
    rows += _of_features(name, runs, "frechet")
    if "few long" in runs[0]:
        floors, short, long = ([units[f"few {kind}"]["kernel"] for units in runs] for kind in ("real", "short", "long"))
        ratios = [excess_ratio(b, a, floor) for floor, a, b in zip(floors, short, long, strict=True)]
        rows.append(_row(f"{name}, long chains", "long_over_short", ratios, None, "lower"))
    for metric in ("lost", "drift") if "endless" in runs[0] else ():
        values = [units["endless"][metric] for units in runs if units["endless"][metric] is not None]
        rows += [_row(f"{name}, long chains", metric, values, None, "lower")] if values else []
    if "frechet (classifier)" in runs[0]["real 0"]:
        rows += _of_features(f"{name} (classifier)", runs, "frechet (classifier)")
    return rows


def _of_features(name: str, runs: Sequence[dict[str, dict[str, Any]]], metric: str) -> list[Row]:
    """The rows of every prior by one net's features."""
    rows: list[Row] = []
    for prior in [unit.removesuffix(" 0") for unit in runs[0] if unit.endswith(" 0")]:
        if prior in ("real", "reconstructions"):
            continue
        case = f"{name}, {prior}"
        rows.append(_row(case, "frechet", *_drawn(runs, prior, metric), "lower"))
        rows += [_share(case, share, runs, prior, metric) for share in ("gap_closed", "frechet_excess_ratio")]
        if metric == "frechet":
            rows += [_row(case, m, *_drawn(runs, prior, m), "lower" if m == "kernel" else "higher") for m in FIGURES]
            slower = [units[LAST_UNIT][prior] for units in runs]
            rows.append(mean_row(case, "seconds_per_1000_over_gaussian", slower, None, "lower"))
    return rows


def _drawn(runs: Sequence[dict[str, dict[str, Any]]], kind: str, metric: str) -> tuple[list[float], float | None]:
    """The mean over draws of every seed, and the standard deviation of draws of one seed."""
    draws = [[units[f"{kind} {i}"][metric] for i in range(len(units)) if f"{kind} {i}" in units] for units in runs]
    spreads = [statistics.stdev(values) for values in draws if len(values) > 1]
    return [statistics.fmean(values) for values in draws], statistics.fmean(spreads) if spreads else None


def _row(case: str, metric: str, values: list[float], spread: float | None, better: str) -> Row:
    goal, better = GOALS.get((case, metric), (None, better))
    row = mean_row(case, metric, values, goal, better)
    return row if len(values) > 1 else Row(**{**row, "sd": spread})


def _share(case: str, share: str, runs: Sequence[dict[str, dict[str, Any]]], prior: str, metric: str) -> Row:
    """What a prior closes, or leaves, of a distance; none where the gap is within the spread."""
    if metric == "frechet" and runs[0]["real 0"]["few"]:
        metric = "kernel"
    mends, better = (gap_closed, "higher") if share == "gap_closed" else (excess_ratio, "lower")
    floor = "reconstructions" if share == "gap_closed" else "real"
    own, spread = _drawn(runs, prior, metric)
    start, wide = _drawn(runs, "gaussian", metric)
    end, _ = _drawn(runs, floor, metric)
    gaps = [a - b for a, b in zip(start, end, strict=True)]
    if min(gaps) <= _SPREADS * (wide or 0.0):
        return Row(case=case, metric=share, value=None, sd=None, n=0, goal=None, better=better, why="no gap beyond the spread")
    values = [mends(x, a, b) for x, a, b in zip(own, start, end, strict=True)]
    return _row(case, share, values, None if spread is None else spread / statistics.fmean(gaps), better)


def table(rows: Sequence[Row], sets: Sequence[Sequence[dict[str, dict[str, Any]]]]) -> str:
    """A table per set in Markdown."""
    metrics = ("frechet", "gap_closed", "frechet_excess_ratio", *FIGURES, "seconds_per_1000_over_gaussian")
    found = {(row["case"], row["metric"]): row for row in rows}
    names = list(dict.fromkeys(row["case"].split(", ")[0] for row in rows if row["metric"] == "frechet"))
    results = [result for runs in sets for units in runs for result in units.values()]
    ran = {(result["commit"] or "unknown")[:7] + ", " + result["device"] for result in results}
    lines = [
        "# Image synthesis",
        "",
        "`python benchmarks/synthesis.py`: one backbone per set and seed, its prior swapped; the docstring says what the "
        "priors, the distances and the shares are. Means ± standard deviation over seeds, or over draws where there is one "
        f"seed. Kernel distances times 1,000. Run at {'; '.join(sorted(ran)) or 'no commit yet'}.",
    ]
    for name in names:
        priors = [
            row["case"].split(", ", 1)[1] for row in rows if row["case"].startswith(f"{name}, ") and row["metric"] == "frechet"
        ]
        shown = [metric for metric in metrics if any((f"{name}, {prior}", metric) in found for prior in priors)]
        elbo = found.get((name, "validation_elbo"))
        of = "" if elbo is None else f", validation ELBO {elbo['value']:.5g} nats, {elbo['n']} seeds"
        lines += ["", f"## {name}{of}", "", "| prior | " + " | ".join(m.replace("_", " ") for m in shown) + " |"]
        lines.append("|---|" + "---|" * len(shown))
        for prior in priors:
            lines.append(
                f"| {prior} | " + " | ".join(_cell(found.get((f"{name}, {prior}", metric))) for metric in shown) + " |"
            )
        lines += [""] * any(row["case"] == f"{name}, long chains" for row in rows)
        lines += [f"- long chains, {row['metric']}: {_cell(row)}" for row in rows if row["case"] == f"{name}, long chains"]
    lines += ["", *(f"{row['case']}, {row['metric']}: {_cell(row)}" for row in rows if row["case"] == "mnist_toy")]
    return "\n".join(lines) + "\n"


def _cell(row: Row | None) -> str:
    if row is None or row["value"] is None:
        return "" if row is None else row.get("why", "")
    scale = 1000 if row["metric"] == "kernel" else 1
    text = f"{scale * row['value']:.3g}" + ("" if row["sd"] is None else f" ± {scale * row['sd']:.1g}")
    if row["goal"] is not None:
        text += f" (goal {'≥' if row['better'] == 'higher' else '≤'} {row['goal']:g})"
    return text
