"""Does training diverge, and does it learn? Five learning rules on four problems, five seeds, default settings.

    python benchmarks/stability.py --data DATA     # hours on two cores; again: goes on where it stopped
    python benchmarks/stability.py --quick         # a few iterations of every rule, on the small problems

DATA: a folder with `mnist` and `cifar10`. Problems: scikit-learn's 8x8 digits, MNIST, CIFAR-10 (tiny conv nets, 500
iterations), and a linear-Gaussian ladder whose optimum is known. On images a pretrained ladder VAE is the start, and the
Fréchet distance of its own samples what is to be beaten. Beside every rule a plain loop (fixed step, Adam 2e-4, no
safeguards) on the first seed; where it fails, the runs are 1.5 times as long as its life, else 3,000 iterations. Posteriors
are near here, so that "denoising", the rule for those that are far, is left to deep_latents.py. Writes
docs/results/stability.json, .md and .png.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from results import ROOT, Row, code_key, mean_row, run_missing, write_results
from stability_problems import PROBLEMS, Trained, plain_loop

from energy_prior import DivergenceError, JointEBMPrior, TrainingWarning
from energy_prior.training import Method
from energy_prior.training.config import LANGEVIN_METHODS

SEEDS = range(5)
PLAIN_SEEDS = range(1)
RULES: tuple[Method, ...] = ("nce", "multi_stage_nce", "two_stage", "variational", "joint")
LONGEST = {"digits": 3000, "mnist": 3000, "cifar10": 500, "ladder": 3000}
LEARNED = {"digits": 0.7, "mnist": 0.7, "cifar10": 0.7, "ladder": 0.1}
"""Largest ratio to the start (Fréchet excess; KL to the optimum on the ladder) that counts as having learned."""
LARGEST_ENERGY = 1e3
FILES = (
    Path(__file__),
    Path(__file__).parent / "stability_problems.py",
    ROOT / "tests" / "ladders.py",
    ROOT / "examples" / "cifar10.py",
)
"""What figures of a run depend on, beside the package."""
LEAST_ACCEPTANCE = 0.2


@dataclasses.dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        problem: key of `PROBLEMS`.
        method: the learning rule.
        seed: of the data split, the nets and everything random.
        iterations: length of the run.
        plain: the plain loop instead of `JointEBMPrior.fit`.
        data: folder with the folders mnist and cifar10.
        quick: tiny nets and sets.
    """

    problem: str
    method: Method
    seed: int
    iterations: int
    plain: bool
    data: str
    quick: bool = False


def read_options(description: str | None) -> tuple[argparse.Namespace, Path]:
    """The command line, and the folder that results go to."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="folder with mnist/ and cifar10/; needed but for --quick")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time, one thread each")
    parser.add_argument("--quick", action="store_true", help="see that it runs; writes nothing into docs/results")
    options = parser.parse_args()
    if not (options.data or options.quick):
        parser.error("--data: the folder with mnist and cifar10 is needed")
    return options, Path(tempfile.mkdtemp()) if options.quick else ROOT / "docs" / "results"


def main() -> None:
    """Runs what is missing, then writes the results."""
    options, out = read_options(__doc__)
    problems = ["digits", "ladder"] if options.quick else list(PROBLEMS)
    seeds, plain_seeds = (range(1), range(1)) if options.quick else (SEEDS, PLAIN_SEEDS)
    log = out / "stability.partial.jsonl"
    key = code_key(*FILES)

    def longest(problem: str) -> int:
        return 12 if options.quick else LONGEST[problem]

    grid: list[tuple[str, Method]] = [(p, m) for p in problems for m in RULES]
    plain = {
        f"plain {p} {m} {s}": Job(p, m, s, longest(p), True, options.data, options.quick) for p, m in grid for s in plain_seeds
    }
    lives = _run_all(plain, log, key, options.workers)
    jobs: dict[str, Job] = {}
    for seed in seeds:
        for p, m in grid:
            died = [lives[f"plain {p} {m} {s}"]["failed_at"] for s in plain_seeds]
            median = statistics.median([longest(p) * 2 if d is None else d for d in died])
            length = longest(p) if p == "cifar10" or median >= longest(p) * 2 / 1.5 else min(longest(p) * 2, int(1.5 * median))
            jobs[f"{p} {m} {seed}"] = Job(
                p, m, seed, max(length, 300) if not options.quick else 12, False, options.data, options.quick
            )
    results = _run_all(jobs, log, key, options.workers)
    rows = _rows([results[name] for name in jobs], [lives[name] for name in plain])
    write_results(out / "stability.json", rows)
    (out / "stability.md").write_text(_markdown(rows, grid))
    _picture(out / "stability.png", [results[name] for name in jobs])
    print((out / "stability.md").read_text())
    log.unlink()


def _run_all(jobs: dict[str, Job], log: Path, key: str, workers: int) -> dict[str, dict[str, Any]]:
    done: dict[str, dict[str, Any]] = {}
    for name, result in run_missing(jobs, run, log, key, workers):
        done[name] = result
        print(
            f"{name:<34}" + "  ".join(f"{k} {_short(v)}" for k, v in result.items() if k not in ("problem", "method", "seed")),
            flush=True,
        )
    return done


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def run(job: Job, prepare: Callable[[JointEBMPrior], object] | None = None, **settings: Any) -> dict[str, Any]:
    """One run, and what became of it; `prepare` gets the prior before it, and `settings` are those of `fit`."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    problem = PROBLEMS[job.problem](job.method, job.seed, job.data, job.quick)
    torch.manual_seed(job.seed)  # again: the VAE may have come from the cache
    head = {"problem": job.problem, "method": job.method, "seed": job.seed, "iterations": job.iterations}
    if job.plain:
        return head | {"failed_at": plain_loop(problem, job.method, job.iterations, LARGEST_ENERGY, LEAST_ACCEPTANCE)}
    prior = JointEBMPrior(problem.generator, problem.energies())
    if prepare is not None:
        prepare(prior)
    said = ""
    result = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainingWarning)
        try:
            size = {"iterations": job.iterations, "batch_size": problem.batch_size}
            result = prior.fit(problem.data, job.method, **size, progress=False, **settings)
        except DivergenceError as error:
            said = str(error)
    trained = Trained(prior, problem)
    acceptance = trained.acceptance() if job.method in LANGEVIN_METHODS else None
    ratio = trained.ratio()
    energy = max((h["max_energy"] for h in result.history), default=0.0) if result else float("inf")
    diverged = bool(
        said
        or energy > LARGEST_ENERGY
        or not ratio < float("inf")
        or (acceptance is not None and acceptance < LEAST_ACCEPTANCE)
    )
    return head | {
        "diverged": diverged,
        "said": said,
        "learned": bool(ratio <= LEARNED[job.problem]),
        "ratio": ratio,
        **trained.details(),
        "max_energy": energy,
        "acceptance": acceptance,
        "warnings": len(result.warnings) if result else None,
    }


def _rows(results: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]]) -> list[Row]:
    def count(case: str, metric: str, runs: Sequence[dict[str, Any]], hits: int, goal: float | None) -> Row:
        return Row(case=case, metric=metric, value=float(hits), sd=None, n=len(runs), goal=goal, better="lower")

    runs = Row(case="default", metric="runs", value=float(len(results)), sd=None, n=len(results), goal=100.0, better="higher")
    rows = [
        runs,
        count("default", "diverged", results, sum(r["diverged"] for r in results), 0.0),
        count("default", "not_learned", results, sum(not r["learned"] for r in results), 0.0),
        count("plain", "runs", plain, len(plain), None),
        count("plain", "diverged", plain, sum(r["failed_at"] is not None for r in plain), None),
    ]
    for problem, method in dict.fromkeys((r["problem"], r["method"]) for r in results):
        own = [r for r in results if (r["problem"], r["method"]) == (problem, method)]
        other = [r for r in plain if (r["problem"], r["method"]) == (problem, method)]
        case = f"{problem} {method}"
        rows.append(count(case, "diverged", own, sum(r["diverged"] for r in own), 0.0))
        rows.append(count(case, "not_learned", own, sum(not r["learned"] for r in own), 0.0))
        rows.append(mean_row(case, "iterations", [r["iterations"] for r in own], None, "higher"))
        rows.append(mean_row(case, "ratio", [r["ratio"] for r in own], LEARNED[problem], "lower"))
        rows.append(mean_row(case, "worst_ratio", [max(r["ratio"] for r in own)], LEARNED[problem], "lower"))
        rows.append(mean_row(case, "worst_max_energy", [max(r["max_energy"] for r in own)], LARGEST_ENERGY, "lower"))
        for metric in ("max_energy", "acceptance", "warnings", "start", "floor"):
            values = [r[metric] for r in own if r.get(metric) is not None]
            if values:
                rows.append(mean_row(case, metric, values, None, "higher" if metric == "acceptance" else "lower"))
        failed = [r["failed_at"] for r in other if r["failed_at"] is not None]
        rows.append(count(case, "plain_diverged", other, len(failed), None))
        if failed:
            rows.append(mean_row(case, "plain_failed_at", [float(f) for f in failed], None, "higher"))
    return rows


def _markdown(rows: Sequence[Row], grid: Sequence[tuple[str, Method]]) -> str:
    table = {(row["case"], row["metric"]): row for row in rows}

    def cell(case: str, metric: str, digits: str = ".2g") -> str:
        row = table.get((case, metric))
        return "" if row is None or row["value"] is None else format(row["value"], digits)

    total = int(table["default", "runs"]["value"] or 0)
    lines = [
        "# Stability",
        "",
        f"`python benchmarks/stability.py`: {total} runs with default settings, {cell('default', 'diverged', '.0f')} diverged, "
        f"{cell('default', 'not_learned', '.0f')} did not learn. Of {cell('plain', 'runs', '.0f')} runs of the plain loop "
        f"{cell('plain', 'diverged', '.0f')} diverged.",
        "",
        "Ratio: the joint prior's Fréchet excess over that of the ELBO-trained VAE that it started from, in the features of a "
        "small classifier; on the ladder, the KL divergence to the known optimum over that at the start.",
        "",
        "| problem | rule | runs | diverged | iterations | ratio, mean | worst | goal | largest abs f | acceptance | "
        "plain loop: failed, at iteration |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for problem, method in grid:
        case = f"{problem} {method}"
        of = table[case, "plain_diverged"]["n"]
        plain = f"{cell(case, 'plain_diverged', '.0f')} of {of}, {cell(case, 'plain_failed_at', '.0f')}"
        lines.append(
            f"| {problem} | {method} | {table[case, 'diverged']['n']} | {cell(case, 'diverged', '.0f')} | "
            f"{cell(case, 'iterations', '.0f')} | {cell(case, 'ratio')} | {cell(case, 'worst_ratio')} | {LEARNED[problem]} | "
            f"{cell(case, 'worst_max_energy', '.3g')} | {cell(case, 'acceptance')} | {plain.removesuffix(', ')} |"
        )
    return "\n".join(lines) + "\n"


def _picture(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """The ratio of every run, by problem and rule."""
    problems = list(dict.fromkeys(r["problem"] for r in results))
    figure = Figure(figsize=(3.1 * len(problems), 3.4), layout="constrained")
    for axes, problem in zip(figure.subplots(1, len(problems), squeeze=False)[0], problems, strict=True):
        own = [r for r in results if r["problem"] == problem]
        axes.scatter([RULES.index(r["method"]) for r in own], [r["ratio"] for r in own], s=18, alpha=0.7)
        axes.axhline(LEARNED[problem], color="tab:red", linewidth=1, label="goal")
        axes.set_xticks(range(len(RULES)), [m.replace("_", "\n") for m in RULES], fontsize=7)
        axes.set_ylim(min(0.0, *(r["ratio"] for r in own)) - 0.02 * LEARNED[problem], None)
        axes.set_title(problem)
        axes.legend(frameon=False, fontsize=8)
    figure.supylabel("ratio to the start", fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
