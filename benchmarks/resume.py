"""Two dozen runs killed with SIGKILL at random moments, then started again: are their weights those of an unkilled run?

    python benchmarks/resume.py            # about ten minutes on two cores
    python benchmarks/resume.py --quick    # one rule

Each run trains a ladder VAE by its ELBO and then its joint prior, by each learning rule in turn, on scikit-learn's digits,
with a run_dir. It is killed once or more, each time after a random part of an unkilled run's time, and started again by the
same command until it ends. Every tensor that it leaves behind is compared bit by bit. Writes docs/results/resume.json.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from results import ROOT, Row, write_results
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from energy_prior import JointEBMPrior, LadderVAE, denoising_energies, fit_elbo
from energy_prior.training import METHODS

RUNS_PER_RULE = 4
MOST_KILLS = 2


def main() -> None:
    """Kills, resumes, compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one rule, one run; writes nothing into docs/results")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--child", nargs=2, metavar=("METHOD", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        train(options.child[0], Path(options.child[1]))
        return
    moments = random.Random(options.seed)  # noqa: S311
    methods = METHODS[:1] if options.quick else METHODS
    equal, kills, resumed, total = 0, 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for method in methods:
            begin = time.perf_counter()
            reference = Path(folder) / f"{method}-reference"
            _start(method, reference).wait()
            life = time.perf_counter() - begin
            for number in range(1 if options.quick else RUNS_PER_RULE):
                run = Path(folder) / f"{method}-{number}"
                killed, patience = 0, life
                while killed < 1 + number % MOST_KILLS:
                    process = _start(method, run)
                    time.sleep(moments.uniform(0.3, 0.95) * patience)
                    if process.poll() is None:
                        os.kill(process.pid, signal.SIGKILL)
                        killed += 1
                    elif process.wait() == 0:  # it was faster than the unkilled one: once more, with less patience
                        shutil.rmtree(run)
                        killed, patience = 0, 0.7 * patience
                    process.wait()
                left = list(run.glob("*/checkpoint-*"))
                while not (run / "weights.safetensors").exists():
                    if _start(method, run).wait():
                        raise SystemExit(f"{method} run {number}: the resumed run failed")
                same = _same(run, reference)
                total, equal, kills, resumed = total + 1, equal + same, kills + killed, resumed + bool(killed and left)
                print(f"{method:<16} run {number}: killed {killed} times, {'equal' if same else 'DIFFERENT'}", flush=True)

    def row(metric: str, value: int, goal: float | None) -> Row:
        return Row(case="sigkill", metric=metric, value=float(value), sd=None, n=total, goal=goal, better="higher")

    rows = [row("bitwise_equal", equal, float(total)), row("runs", total, None), row("kills", kills, None)]
    rows.append(row("resumed_from_a_checkpoint", resumed, None))
    out = Path(tempfile.mkdtemp()) if options.quick else ROOT / "docs" / "results"
    write_results(out / "resume.json", rows)
    print(
        f"{equal} of {total} runs bitwise equal, {kills} kills, {resumed} runs went on from a checkpoint; {out / 'resume.json'}"
    )
    if equal < total:
        raise SystemExit(1)


def train(method: str, folder: Path) -> None:
    """The run itself: the same command starts it and goes on with it."""
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    pixels: Any = load_digits(return_X_y=True)[0]
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
    vae = LadderVAE((1, 8, 8), latent_dims=(8, 4), hidden=64)
    common = {"progress": False, "checkpoint_every": 20}
    fit_elbo(vae, images[200:], validation=images[:200], iterations=400, log_every=100, run_dir=folder / "elbo", **common)
    prior = JointEBMPrior(vae, denoising_energies(vae.latent_shapes, channels=8) if method == "denoising" else None)
    lengths = {"iterations": 60 if method == "joint" else 120, "steps": 10, "posterior_steps": 10, "persistent": 256}
    prior.fit(images[200:], method, batch_size=128, run_dir=folder / "fit", **lengths, **common)
    tensors = {f"prior.{name}": value for name, value in prior.state_dict().items()}
    tensors |= {f"generator.{name}": value for name, value in vae.state_dict().items()}
    save_file({name: value.clone() for name, value in tensors.items()}, folder / "weights.tmp")
    (folder / "weights.tmp").rename(folder / "weights.safetensors")


def _start(method: str, folder: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, __file__, "--child", method, str(folder)], env=environment)  # noqa: S603


def _same(run: Path, reference: Path) -> bool:
    a, b = (load_file(folder / "weights.safetensors") for folder in (run, reference))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


if __name__ == "__main__":
    main()
