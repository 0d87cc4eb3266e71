"""How much better MNIST samples get by the joint prior on a frozen VAE, and whether long chains hold: three seeds.

    python benchmarks/mnist_two_stage.py --data DATA     # half an hour a seed and core; resumable
    python benchmarks/mnist_two_stage.py --data DATA --quick

Runs examples/mnist.py. Its settings were chosen on other seeds with 9,000 held-out training images in place of the test
images. Writes docs/results/mnist_two_stage.json and .md, and the pictures of the first seed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from results import ROOT, code_key, mean_row, run_missing, write_results

sys.path.insert(0, str(ROOT / "examples"))

import mnist

GOALS = {
    "frechet_excess_ratio": (0.1, "lower"),
    "long_over_short": (1.1, "lower"),
    "effective_samples_energy": (5.0, "higher"),
}
DETAILS = {
    "validation_elbo": "higher",
    "frechet_floor": "lower",
    "frechet_generator": "lower",
    "frechet_joint": "lower",
    "frechet_joint_1000_steps": "lower",
    "step_size": "higher",
    "acceptance": "higher",
    "effective_samples_mean": "higher",
    "effective_samples_least": "higher",
    "largest_energy": "lower",
}


def main() -> None:
    """Runs what is missing, then writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="as examples/mnist.py has it")
    parser.add_argument("--runs", default=str(ROOT / "runs"), help="folder for the runs, their checkpoints and pictures")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time, one thread each")
    parser.add_argument("--quick", action="store_true", help="see that it runs; writes nothing into docs/results")
    options = parser.parse_args()
    out = Path(tempfile.mkdtemp()) if options.quick else ROOT / "docs" / "results"
    runs = out if options.quick else Path(options.runs)
    key = code_key(*(ROOT / "examples" / name for name in ("mnist.py", "features.py")))
    seeds = range(1) if options.quick else range(3)
    jobs = {f"seed {s}": (options.data, runs / f"mnist-{key}-{s}", s, options.quick) for s in seeds}
    done: dict[str, dict[str, Any]] = {}
    for name, result in run_missing(jobs, _run, out / "mnist_two_stage.partial.jsonl", key, options.workers):
        done[name] = result
        print(name, {m: round(result[m], 4) for m in GOALS}, flush=True)
    results = [done[name] for name in jobs]
    metrics = {m: (None, better) for m, better in DETAILS.items()} | GOALS
    rows = [mean_row("mean", m, [r[m] for r in results], *metrics[m]) for m in (*GOALS, *DETAILS)]
    rows += [mean_row(name, m, [done[name][m]], None, metrics[m][1]) for name in jobs for m in (*GOALS, *DETAILS)]
    write_results(out / "mnist_two_stage.json", rows)
    lines = [
        "# MNIST, two layers, two stages",
        "",
        f"`python benchmarks/mnist_two_stage.py`: {len(results)} seeds of `examples/mnist.py`. Fréchet distances to 9,000 test "
        "images in the 64 features of a small classifier, means over six draws of 9,000 (long chains: three); the excess is "
        "over the floor, that of training images. Short chains have 60 steps, long ones 1,000 of the same size. Effective "
        "samples: per chain of 1,000 steps, of Σf (energy), and over Σf and every latent coordinate (mean and least).",
        "",
        "| figure | " + " | ".join(jobs) + " | mean | goal |",
        "|---|" + "---|" * (len(jobs) + 2),
    ]
    for metric in (*GOALS, *DETAILS):
        values = [r[metric] for r in results]
        goal = f"{'≤' if GOALS[metric][1] == 'lower' else '≥'} {GOALS[metric][0]:g}" if metric in GOALS else ""
        cells = " | ".join(f"{v:.4g}" for v in (*values, sum(values) / len(values)))
        lines.append(f"| {metric} | {cells} | {goal} |")
    (out / "mnist_two_stage.md").write_text("\n".join(lines) + "\n")
    for picture in ("samples", "long_chain"):
        if not options.quick:
            shutil.copy(runs / f"mnist-{key}-0" / f"{picture}.png", out / f"mnist_{picture}.png")
    print("\n".join(lines))
    (out / "mnist_two_stage.partial.jsonl").unlink()


def _run(job: tuple[str, Path, int, bool]) -> dict[str, Any]:
    torch.set_num_threads(1)
    data, folder, seed, quick = job
    return mnist.run(data, folder, seed, "cpu", quick, progress=False)


if __name__ == "__main__":
    main()
