"""The demo over five seeds and all ten unknown digits: 50 runs of its default settings, a row as each ends, resumable.

    python benchmarks/demo_seeds.py               # about half an hour on two cores; again: goes on where it stopped
    python benchmarks/demo_seeds.py --quick       # two short runs, written to a temporary folder

Writes docs/results/demo_seeds.json, .md and .png.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from results import ROOT, Row, code_key, commit, mean_row, run_missing, write_results

from energy_prior.cli.demo import SCORES, DemoSettings, run_demo

GOALS: dict[str, tuple[float, str]] = {
    "frechet_excess_ratio": (1 / 3, "lower"),
    "c2st_ratio": (1 / 3, "lower"),
    "auroc_default_score": (0.98, "higher"),
}
DETAILS = {
    "validation_elbo": lambda r: r["vae"]["validation_elbo"],
    "frechet_generator": lambda r: r["samples"]["frechet_generator"],
    "frechet_joint": lambda r: r["samples"]["frechet_joint"],
    "frechet_floor": lambda r: r["samples"]["frechet_floor"],
    "c2st_generator": lambda r: r["latents"]["c2st_generator"],
    "c2st_joint": lambda r: r["latents"]["c2st_joint"],
    "largest_energy": lambda r: r["fit"]["largest_energy"],
    **{f"auroc_{name}": (lambda r, name=name: r["scores"][name]["auroc"]) for name in SCORES},
    **{f"auprc_{name}": (lambda r, name=name: r["scores"][name]["auprc"]) for name in SCORES},
}


def main() -> None:
    """Runs what is missing, then writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time, one thread each")
    parser.add_argument("--quick", action="store_true", help="see that it runs; writes nothing into docs/results")
    options = parser.parse_args()
    grid = [(seed, digit) for seed in range(5) for digit in range(10)]
    settings = [DemoSettings(unknown=digit, seed=seed, progress=False) for seed, digit in grid]
    out = ROOT / "docs" / "results"
    if options.quick:
        settings, out = [s.quick() for s in settings[:2]], Path(tempfile.mkdtemp())
    log = out / "demo_seeds.partial.jsonl"
    jobs = {f"seed {s.seed} digit {s.unknown}": s for s in settings}
    done: dict[str, dict[str, Any]] = {}
    for name, report in run_missing(jobs, _run, log, code_key(ROOT / "energy_prior" / "cli" / "demo.py"), options.workers):
        done[name] = report
        print(_line(report), flush=True)
    reports = [done[name] for name in jobs]
    rows = _rows(reports)
    write_results(out / "demo_seeds.json", rows)
    (out / "demo_seeds.md").write_text(_markdown(reports, rows))
    _picture(out / "demo_seeds.png", reports)
    print((out / "demo_seeds.md").read_text())
    log.unlink()


def _run(settings: DemoSettings) -> dict[str, Any]:
    torch.set_num_threads(1)
    return run_demo(settings, out=None)


def _figures(report: dict[str, Any]) -> dict[str, float]:
    return {
        "frechet_excess_ratio": report["samples"]["frechet_excess_ratio"],
        "c2st_ratio": report["latents"]["c2st_ratio"],
        "auroc_default_score": report["scores"][SCORES[0]]["auroc"],
    }


def _line(report: dict[str, Any]) -> str:
    figures = "  ".join(f"{name} {value:.3f}" for name, value in _figures(report).items())
    return f"seed {report['seed']} digit {report['unknown_digit']}  {figures}  {report['seconds']['all']:.0f} s"


def _rows(reports: Sequence[dict[str, Any]]) -> list[Row]:
    rows = [mean_row("mean", m, [_figures(r)[m] for r in reports], goal, better) for m, (goal, better) in GOALS.items()]
    rows += [mean_row("mean", m, [get(r) for r in reports], None, _better(m)) for m, get in DETAILS.items()]
    for digit in sorted({r["unknown_digit"] for r in reports}):
        own = [r for r in reports if r["unknown_digit"] == digit]
        case = f"digit {digit}"
        rows += [mean_row(case, m, [_figures(r)[m] for r in own], None, GOALS[m][1]) for m in GOALS]
        rows += [mean_row(case, f"auroc_{n}", [r["scores"][n]["auroc"] for r in own], None, "higher") for n in SCORES]
    for report in reports:
        case = f"seed {report['seed']} digit {report['unknown_digit']}"
        rows += [mean_row(case, m, [value], None, GOALS[m][1]) for m, value in _figures(report).items()]
        rows += [mean_row(case, m, [get(report)], None, _better(m)) for m, get in DETAILS.items()]
    return rows


def _better(metric: str) -> str:
    return "higher" if metric.startswith(("auroc", "auprc", "validation")) else "lower"


def _markdown(reports: Sequence[dict[str, Any]], rows: Sequence[Row]) -> str:
    lines = [
        "# The demo over seeds and digits",
        "",
        f"`python benchmarks/demo_seeds.py`: {len(reports)} runs of `energy-prior demo`, default settings, seeds "
        f"{sorted({r['seed'] for r in reports})}. Settings were chosen with digits 0, 2 and 6 unknown on seeds 100–104, the "
        f"default score on other images. Run at {(commit() or 'unknown')[:7]}.",
        "",
        "| figure (mean over all runs) | value | sd | goal |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if row["case"] == "mean":
            goal = "" if row["goal"] is None else f"{'≤' if row['better'] == 'lower' else '≥'} {row['goal']:.3g}"
            lines.append(f"| {row['metric']} | {row['value']:.4g} | {row['sd'] or 0:.2g} | {goal} |")
    names = list(SCORES)
    lines += ["", "AUROC by unknown digit (mean over seeds):", "", "| digit | " + " | ".join(names) + " |"]
    lines += ["|---|" + "---|" * len(names)]
    table = {(row["case"], row["metric"]): row["value"] for row in rows}
    for digit in sorted({r["unknown_digit"] for r in reports}):
        cells = [f"{table[f'digit {digit}', f'auroc_{n}']:.3f}" for n in names]
        lines.append(f"| {digit} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _picture(path: Path, reports: Sequence[dict[str, Any]]) -> None:
    """The three figures, one dot per run, by unknown digit."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    titles = ("Fréchet excess ratio", "two-sample |accuracy − ½| ratio", f"AUROC of {SCORES[0]!r}")
    for axes, (metric, (goal, _)), title in zip(figure.subplots(1, 3), GOALS.items(), titles, strict=True):
        axes.scatter([r["unknown_digit"] for r in reports], [_figures(r)[metric] for r in reports], s=18, alpha=0.7)
        axes.axhline(goal, color="tab:red", linewidth=1, label="goal for the mean")
        mean = sum(_figures(r)[metric] for r in reports) / len(reports)
        axes.axhline(mean, color="tab:blue", linewidth=1, linestyle="--", label=f"mean {mean:.3f}")
        axes.set_xticks(range(10))
        axes.set_xlabel("unknown digit (one dot per seed)")
        axes.set_title(title)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
