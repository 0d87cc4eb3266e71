"""Two CPU processes (gloo) under `accelerate launch`: one process's gradients on the joined batch; a rank that dies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from energy_prior.training.distributed import Engine

HERE = Path(__file__).parent


def launch(mode: str, out: Path) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    start += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*(start if mode != "one" else [sys.executable]), str(HERE / "two_processes.py"), mode, str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)  # noqa: S603


def test_two_processes_learn_what_one_learns_from_the_joined_batch(tmp_path: Path) -> None:
    for mode in ("one", "two"):
        done = launch(mode, tmp_path)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:6000]
    one = torch.load(tmp_path / "weights-1-0.pt", weights_only=True)
    assert any(bool((p != 0).any()) for p in one)
    for rank in range(2):
        two = torch.load(tmp_path / f"weights-2-{rank}.pt", weights_only=True)
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for rank in range(2):
        assert "energies: expected the same in every process" in (tmp_path / f"stray-{rank}.txt").read_text()
        assert "generator: expected the same in every process" in (tmp_path / f"disagree-{rank}.txt").read_text()


def test_a_process_that_dies_is_named_and_the_checkpoint_is_whole(tmp_path: Path) -> None:
    done = launch("dies", tmp_path)
    assert done.returncode != 0
    kept = sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*"))
    assert "checkpoint-00000004" in kept
    for checkpoint in kept:
        assert sorted(p.name for p in (tmp_path / "run" / checkpoint).iterdir()) == ["rank0.safetensors", "rank1.safetensors"]
    if (tmp_path / "died.txt").exists():  # the launcher may end the other process before it notices
        assert "lost the others" in (tmp_path / "died.txt").read_text()


def test_alone_nothing_is_sent() -> None:
    engine = Engine()
    t = torch.ones(2)
    assert engine.mean([t])[0] is t
    assert engine.objects(3) == [3]
    assert engine.stacked(t).shape == (1, 2)
    assert engine.main
