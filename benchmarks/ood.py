"""Out-of-distribution detection between image sets, by one recipe per kind of image and one score.

    python benchmarks/ood.py --data DATA                     # hours; goes on where it stopped
    python benchmarks/ood.py --data DATA --known mnist       # one known set
    python benchmarks/ood.py --table                         # only the table, of the runs that are there

DATA: a folder with mnist, fashion_mnist, omniglot28 (white on black), cifar10, svhn and celeba_half. The recipe is
`examples/ood.py`. CIFAR-10 is there as JPEG of quality 75 and SVHN as PNG; in "cifar10/svhn_jpeg" SVHN is compressed in the
same way first. celeba32: aligned CelebA images at 32 × 32. A run is a known set and a seed; each is a line of
docs/results/ood.partial.jsonl as it ends. Writes docs/results/ood.json, .md and .png.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from results import ROOT, Row, code_key, commits, logged_runs, mean_row, run_missing, write_results

sys.path.insert(0, str(ROOT / "examples"))  # for what the example imports
example: Any = runpy.run_path(str(ROOT / "examples" / "ood.py"))  # by its path: it has the name of this file

_JPEG = 75


class Known(NamedTuple):
    """A set to train on: its folder, the size of its images, seeds, and the other sets with their JPEG quality."""

    folder: str
    size: int | None
    seeds: int
    unknown: tuple[tuple[str, str, int | None], ...]


KNOWN = {
    "mnist": Known("mnist", None, 3, (("omniglot", "omniglot28", None), ("fashion_mnist", "fashion_mnist", None))),
    "fashion_mnist": Known("fashion_mnist", None, 3, (("mnist", "mnist", None),)),
    "cifar10": Known("cifar10", None, 2, (("svhn", "svhn", None), ("svhn_jpeg", "svhn", _JPEG))),
    "celeba32": Known("celeba_half", 32, 2, (("cifar10", "cifar10", None),)),
}
GOALS: dict[tuple[str, str], float] = {
    ("mnist/omniglot", "auroc"): 0.99,
    ("fashion_mnist/mnist", "auroc"): 0.995,
    ("fashion_mnist/mnist", "auroc_llr"): 0.98,
    ("cifar10/svhn_jpeg", "auroc"): 0.97,
    ("cifar10/svhn_jpeg", "auroc_llr"): 0.85,
}
SHOWN = (
    "auroc",
    "fpr80",
    "auroc_llr",
    "auroc_llr_gaussian",
    "auroc_llr_gaussian_mean",
    "auroc_log_likelihood",
    "auroc_joint_elbo",
    "auroc_importance",
    "auroc_knn",
)


class Job(NamedTuple):
    """One run."""

    data: str
    known: str
    seed: int
    device: str


def main() -> None:
    """Runs what is missing, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the image sets; needed but for --table")
    parser.add_argument("--known", choices=tuple(KNOWN), action="append", help="only this one; may be given several times")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--table", action="store_true", help="run nothing, write the table of the runs that are there")
    options = parser.parse_args()
    if not (options.data or options.table):
        parser.error("--data: the folder with the image sets is needed")
    out = ROOT / "docs" / "results"
    log = out / "ood.partial.jsonl"
    if not options.table:
        asked = [(name, seed) for seed in range(3) for name in options.known or KNOWN if seed < KNOWN[name].seeds]
        jobs = [Job(options.data, name, seed, options.device) for name, seed in asked]
        named = {f"{job.known}, seed {job.seed}": job for job in jobs}
        key = code_key(*(ROOT / "examples" / name for name in ("ood.py", "detecting.py")))
        for name, result in run_missing(named, run, log, key, options.workers):
            print(name, {case: round(figures["auroc"], 3) for case, figures in result.items()}, flush=True)
    rows = rows_of(list(logged_runs(log).values()))
    write_results(out / "ood.json", rows)
    (out / "ood.md").write_text(table(rows, commits(log)))
    picture(out / "ood.png", rows)
    print((out / "ood.md").read_text())


def run(job: Job) -> dict[str, Any]:
    """Figures of one run."""
    torch.set_num_threads(1)
    known, data = KNOWN[job.known], Path(job.data)
    unknown = [(name, str(data / folder), quality) for name, folder, quality in known.unknown]
    shared: dict[str, Any] = {"size": known.size, "name": job.known, "device": job.device, "progress": False}
    found = example["run"](str(data / known.folder), unknown, job.seed, **shared)
    return {case: figures | {"on_gpu": float(job.device != "cpu")} for case, figures in found.items()}


def rows_of(runs: Sequence[dict[str, dict[str, float]]]) -> list[Row]:
    """Means over seeds of every case; goals where there are any."""
    rows: list[Row] = []
    for case in dict.fromkeys(case for found in runs for case in found):
        several = [found[case] for found in runs if case in found]
        for metric in [m for m in several[0] if all(m in r for r in several)]:
            better = "lower" if metric.startswith("fpr") else "higher"
            rows.append(mean_row(case, metric, [r[metric] for r in several], GOALS.get((case, metric)), better))
        if case.endswith("_train"):
            away = [abs(r["auroc"] - 0.5) for r in several]
            rows.append(mean_row(case, "auroc_from_half", away, 0.05, "lower"))
    return rows


def table(rows: Sequence[Row], ran: str) -> str:
    """The figures in Markdown; `ran`: the commits."""
    lines = [
        "# Out-of-distribution detection",
        "",
        "`python benchmarks/ood.py`: known/unknown, means over seeds (± standard deviation). `auroc` and `fpr80` are of the "
        'default score, "tails". LLR, `joint_elbo` and `importance` are of at most 1,000 images a side. `llr_gaussian` is of '
        "the same VAE without energies, `…_mean` with skipped layers at their means. `log_likelihood`: its ELBO, 8 draws; "
        "`joint_elbo` the joint prior's, `importance` its bound, 16 draws. Against `_train`, training images, 0.5 is right. "
        f"Run at {ran}.",
        "",
        "| case | seeds | " + " | ".join(SHOWN) + " |",
        "|---" * (2 + len(SHOWN)) + "|",
    ]
    found = {(row["case"], row["metric"]): row for row in rows}
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = []
        for metric in SHOWN:
            row = found[case, metric]
            goal = "" if row["goal"] is None else f" (≥ {row['goal']:g})"
            cells.append(f"{row['value']:.3f}" + ("" if row["sd"] is None else f" ± {row['sd']:.3f}") + goal)
        lines.append(f"| {case} | {found[case, 'auroc']['n']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def picture(path: Path, rows: Sequence[Row]) -> None:
    """AUROC of the scores, a group per case."""
    value = {(row["case"], row["metric"]): float(row["value"] or 0) for row in rows}
    cases = list(dict.fromkeys(case for case, _ in value))
    figure = Figure(figsize=(8, 0.6 * len(cases) + 1.6), layout="constrained")
    axes = figure.subplots()
    labels = {"auroc": "default score", "auroc_llr": "LLR", "auroc_log_likelihood": "log likelihood", "auroc_knn": "kNN"}
    for (metric, label), marker in zip(labels.items(), "os^x"):
        axes.plot([value[case, metric] for case in cases], range(len(cases)), marker, label=label)
    axes.axvline(0.5, color="0.8", linewidth=0.8, zorder=0)
    axes.set(xlabel="AUROC", xlim=(-0.02, 1.02), yticks=range(len(cases)), yticklabels=cases)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.4, 1.15))
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
