"""Anomaly detection on MNIST: every digit held out in turn, under two protocols, by one recipe and one score.

    python benchmarks/anomaly_mnist.py --data path/to/mnist                 # 40 runs of some minutes; goes on where it stopped
    python benchmarks/anomaly_mnist.py --data path/to/mnist --development   # the digits that settings are chosen on
    python benchmarks/anomaly_mnist.py --table                              # only the table, of the runs that are there
    python benchmarks/anomaly_mnist.py --quick                              # two short runs on made-up images

The recipe is `examples/anomaly_mnist.py`. Protocol "zenati": three seeds; "test_split": one. Of MNIST, settings and the default
score were chosen on the training split alone, with digits 0, 2, 3, 6 and 8 held out of it (cases "development, digit D"), the
score also on corrupted CIFAR-10; "zenati" pools the splits, so for those digits it is not independent of that. Every run is a
line of docs/results/anomaly_mnist.partial.jsonl as it ends. Writes docs/results/anomaly_mnist.json, .md and .png.
"""

from __future__ import annotations

import argparse
import runpy
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from results import ROOT, Row, code_key, commits, logged_runs, mean_row, run_missing, write_results

sys.path.insert(0, str(ROOT / "examples"))  # for what the example imports
example: Any = runpy.run_path(str(ROOT / "examples" / "anomaly_mnist.py"))  # by its path: it has the name of this file

PAPER = {1: 0.470, 4: 0.941, 5: 0.964, 7: 0.815, 9: 0.796}
"""Joint EBM prior of Cui, Wu and Han (CVPR 2023): AUPRC, protocol "zenati"."""
BEST = {1: 0.722, 4: 0.949, 5: 0.980, 7: 0.941, 9: 0.935}
"""Hierarchical EBM features of the same authors (ICCV 2023)."""
DEVELOPMENT = (0, 2, 3, 6, 8)
SHOWN = (
    "auprc",
    "auroc",
    "auprc_log_joint",
    "auprc_gaussian_log_joint",
    "auprc_negative_energy",
    "auprc_reconstruction",
    "auprc_lebm",
    "auprc_knn",
)


class Job(NamedTuple):
    """One run."""

    data: str
    digit: int
    protocol: str
    seed: int
    quick: bool = False
    device: str = "cpu"

    @property
    def name(self) -> str:
        """Of its line in the log."""
        return f"{self.protocol}, digit {self.digit}, seed {self.seed}"


def main() -> None:
    """Runs what is missing, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="MNIST, as `energy_prior.data.load_images` reads it; needed but for --quick and --table")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--development", action="store_true", help="the runs that settings are chosen by, one seed")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--table", action="store_true", help="run nothing, write the table of the runs that are there")
    parser.add_argument("--quick", action="store_true", help="see that it runs; writes nothing into docs/results")
    options = parser.parse_args()
    if not (options.data or options.quick or options.table):
        parser.error("--data: MNIST is needed")
    out = ROOT / "docs" / "results"
    jobs = [Job(options.data, d, "zenati", seed) for seed in range(3) for d in range(10)]
    jobs += [Job(options.data, d, "test_split", 0) for d in range(10)]
    if options.development:
        jobs = [Job(options.data, d, "development", 0) for d in DEVELOPMENT]
    if options.quick:
        out = Path(tempfile.mkdtemp())
        data = made_up(out / "data")
        jobs = [Job(data, d, p, 0, quick=True) for d, p in ((1, "zenati"), (4, "test_split"))]
    jobs = [job._replace(device=options.device) for job in jobs]
    log = out / "anomaly_mnist.partial.jsonl"
    if not options.table:
        key = code_key(*(ROOT / "examples" / name for name in ("anomaly_mnist.py", "detecting.py")))
        for name, result in run_missing({job.name: job for job in jobs}, run, log, key, options.workers):
            print(f"{name}: auprc {result['auprc']:.3f}, log joint {result['auprc_log_joint']:.3f}", flush=True)
    rows = rows_of(logged_runs(log))
    write_results(out / "anomaly_mnist.json", rows)
    (out / "anomaly_mnist.md").write_text(table(rows, lambda case: commits(log, f"{case}, ")))
    picture(out / "anomaly_mnist.png", rows)
    print((out / "anomaly_mnist.md").read_text())


def run(job: Job) -> dict[str, Any]:
    """Figures of one run."""
    torch.set_num_threads(1)
    found = example["run"](job.data, job.digit, job.protocol, job.seed, quick=job.quick, device=job.device, progress=False)
    return found | {"on_gpu": float(job.device != "cpu")}


def made_up(folder: Path) -> str:
    """Folders of blots in ten classes, where there are no images."""
    from PIL import Image  # the extra "examples"

    rng = torch.Generator().manual_seed(0)
    for split, n in (("train", 150), ("test", 12)):
        for digit in range(10):
            place = folder / split / str(digit)
            place.mkdir(parents=True)
            for i in range(n):
                x = 60 * torch.rand(28, 28, generator=rng)
                x[2 * digit : 2 * digit + 8, 8:20] += 180
                Image.fromarray(x.to(torch.uint8).numpy()).save(place / f"{i}.png")
    return str(folder)


def rows_of(done: dict[str, dict[str, float]]) -> list[Row]:
    """Means over seeds of every case; goals where there are any."""
    cases: dict[str, list[dict[str, float]]] = {}
    for name, figures in done.items():
        cases.setdefault(name.rsplit(", ", 1)[0], []).append(figures)
    rows: list[Row] = []
    for case, runs in sorted(cases.items()):
        protocol, digit = case.split(", digit ")
        for metric in runs[0]:
            goal = PAPER.get(int(digit)) if protocol == "zenati" and metric == "auprc" else None
            better = "lower" if metric.startswith("fpr") else "higher"
            rows.append(mean_row(case, metric, [r[metric] for r in runs if metric in r], goal, better))
    return rows


def table(rows: Sequence[Row], ran: Callable[[str], str]) -> str:
    """The figures in Markdown, a table per protocol; `ran`: a case -> the commits of its runs."""
    found = {(row["case"], row["metric"]): row for row in rows}
    lines = [
        "# Anomaly detection on MNIST, one digit held out",
        "",
        "`python benchmarks/anomaly_mnist.py`, means over seeds (± standard deviation). `auprc` and `auroc` are of the default "
        'score, "tails"; AUPRC by the trapezoid rule, higher is better. Settings were chosen in the cases "development", on '
        'the training split. "zenati" pools both splits, so it tests on images of that split too: for the digits marked * the '
        "unknown ones among them were looked at when settings were chosen; those of 1, 4, 5, 7 and 9 never were. The last "
        "column is the commit of the recipe.",
    ]
    for protocol in ("zenati", "test_split", "development"):
        cases = [case for case in dict.fromkeys(row["case"] for row in rows) if case.startswith(protocol)]
        if not cases:
            continue
        share = statistics.fmean(found[case, "positives"]["value"] or 0 for case in cases)
        published = ["paper", "ICCV 2023"] if protocol == "zenati" else []
        lines += ["", f"## {protocol}: {share:.0%} positives on average", ""]
        lines += [
            "| digit | seeds | " + " | ".join([*SHOWN, *published, "commit"]) + " |",
            "|---" * (3 + len(SHOWN + tuple(published))) + "|",
        ]
        for case in cases:
            digit = int(case.rsplit(" ", 1)[1])
            cells = []
            for metric in SHOWN:
                row = found[case, metric]
                cells.append(f"{row['value']:.3f}" + ("" if row["sd"] is None else f" ± {row['sd']:.3f}"))
            cells += [f"{values[digit]:.3f}" if digit in values else "" for values in (PAPER, BEST)[: len(published)]]
            cells.append(ran(case))
            mark = "*" if protocol == "zenati" and digit in DEVELOPMENT else ""
            lines.append(f"| {digit}{mark} | {found[case, 'auprc']['n']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def picture(path: Path, rows: Sequence[Row]) -> None:
    """AUPRC of the scores by digit, with what was published."""
    value = {(row["case"], row["metric"]): row["value"] for row in rows}
    protocols = [p for p in ("zenati", "test_split", "development") if any(case.startswith(p) for case, _ in value)]
    figure = Figure(figsize=(9, 3.2 * len(protocols)), layout="constrained")
    drawn = {
        "auprc": "default score",
        "auprc_log_joint": "log joint",
        "auprc_gaussian_log_joint": "no energies",
        "auprc_knn": "kNN",
    }
    for axes, protocol in zip(figure.subplots(len(protocols), squeeze=False)[:, 0], protocols):
        digits = [d for d in range(10) if (f"{protocol}, digit {d}", "auprc") in value]
        for (metric, label), marker in zip(drawn.items(), "os^x"):
            axes.plot(digits, [value[f"{protocol}, digit {d}", metric] for d in digits], marker, label=label)
        if protocol == "zenati":
            for published, label in ((PAPER, "CVPR 2023"), (BEST, "ICCV 2023")):
                axes.plot(list(published), list(published.values()), "_", markersize=18, label=label)
        axes.set(xlabel="digit held out", ylabel="AUPRC", ylim=(0, 1.02), xticks=range(10), title=protocol)
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower right")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
