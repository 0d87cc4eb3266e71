"""Mixed precision, several processes (gloo, under `accelerate launch`), and large sets in batches."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import X, make
from torch import Tensor, nn

from energy_prior import (
    ArgumentError,
    JointEBMPrior,
    LadderVAE,
    fit_elbo,
)
from energy_prior.langevin import JointDensity
from energy_prior.training import (
    METHODS,
    Method,
)
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


@pytest.mark.parametrize("method", METHODS)
def test_mixed_precision_leaves_the_chains_alone(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 in the networks of the learning step, float32 in chains, latents and densities."""
    accelerator: Any = types.SimpleNamespace(
        num_processes=1, process_index=0, mixed_precision="bf16", autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    )
    seen: list[bool] = []
    original = JointDensity.evaluate

    def spy(self: JointDensity, position: Any, **how: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return original(self, position, **how)

    monkeypatch.setattr(JointDensity, "evaluate", spy)
    prior = make()
    settings: dict[str, Any] = {"iterations": 4, "steps": 4, "posterior_steps": 4, "stages": 2, "progress": False}
    result = prior.fit(X, method, accelerator=accelerator, **settings)
    assert not any(seen)
    assert all(math.isfinite(value) for value in result.history[-1].values())
    assert all(p.dtype == torch.float32 for p in prior.parameters())
    vae = prior.generator
    assert isinstance(vae, LadderVAE)
    fit_elbo(vae, X, iterations=3, accelerator=accelerator, progress=False)


def test_fp16_is_refused() -> None:
    accelerator: Any = types.SimpleNamespace(num_processes=1, process_index=0, mixed_precision="fp16")
    with pytest.raises(ArgumentError, match='accelerator: expected mixed_precision "no" or "bf16", got \'fp16\''):
        make().fit(X, accelerator=accelerator)
    with pytest.raises(ArgumentError, match="accelerator: expected an accelerate.Accelerator or None, got str"):
        make().fit(X, accelerator="cpu")  # type: ignore[arg-type]


class TwoProcesses(Engine):
    """An engine that believes in another process, whose tensors are all 3."""

    def __init__(self) -> None:
        super().__init__()
        self.world = 2

    def mean(self, tensors: Any) -> list[Tensor]:
        return [(t + 3) / 2 for t in tensors]


def test_running_statistics_are_shared() -> None:
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(1.0)  # type: ignore[union-attr]
    TwoProcesses().share(list(norm.buffers()))
    assert norm.running_mean.tolist() == [2.0, 2.0]  # type: ignore[union-attr]
    assert int(norm.num_batches_tracked) == 0  # type: ignore[arg-type]


class WithNorm(LadderVAE):
    """Keeps running statistics of what it sees."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.norm = nn.BatchNorm2d(1)

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Any:
        return super().infer(self.norm(x), rng=rng)


@pytest.mark.parametrize("what", ["elbo", "variational"])
def test_looks_share_running_statistics(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[int] = []
    monkeypatch.setattr(Engine, "share", lambda self, buffers: shared.append(len(buffers)))
    vae = WithNorm((1, 4, 4), latent_dims=(3, 2), hidden=8)
    if what == "elbo":
        fit_elbo(vae, X, iterations=4, log_every=2, batch_size=16, progress=False)
        assert shared == [3, 3]
    else:
        JointEBMPrior(vae).fit(X, "variational", iterations=4, log_every=2, batch_size=16, steps=2, progress=False)
        assert shared == [11, 11]
