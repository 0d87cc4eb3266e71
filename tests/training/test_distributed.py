"""Mixed precision, several processes (gloo, under `accelerate launch`), and large sets in batches."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from runs import TwoLayers, X, make, make_for, recorded, seeded, weights
from torch import Tensor, nn

from energy_prior import ArgumentError, JointEBMPrior, LadderVAE, fit_elbo
from energy_prior.langevin import JointDensity
from energy_prior.model import JointModel
from energy_prior.training import METHODS, Method, launched_accelerator, map_batches
from energy_prior.training.distributed import Engine

HERE = Path(__file__).parent


def launch(mode: str, out: Path) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    start += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*(start if mode != "one" else [sys.executable]), str(HERE / "two_processes.py"), mode, str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)  # noqa: S603


@pytest.mark.slow
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


@pytest.mark.slow
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

    def spied(original: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*args: Any, **how: Any) -> Any:
            seen.append(torch.is_autocast_enabled("cpu"))
            return original(*args, **how)

        return spy

    monkeypatch.setattr(JointDensity, "evaluate", spied(JointDensity.evaluate))
    monkeypatch.setattr(JointModel, "noise", spied(JointModel.noise))  # by which the support of p is looked at, too
    prior = make_for(method)
    settings: dict[str, Any] = {"iterations": 4, "steps": 4, "posterior_steps": 2, "stages": 2, "progress": False}
    result = prior.fit(X, method, accelerator=accelerator, **settings)
    assert seen
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


# -------------------------------------------------------------------------------------------------------- mixed precision


@pytest.fixture
def bf16() -> Iterator[Any]:
    """An accelerator with mixed precision; what it leaves in the process is taken away."""
    before = dict(os.environ)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.clear()
    os.environ.update(before)


POINTS = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", ["nce", "two_stage", "variational", "joint"])
def test_a_generator_that_knows_nothing_of_autocast_is_trained_in_full_precision(method: Method, bf16: Any) -> None:
    options: dict[str, Any] = {"iterations": 4, "steps": 3, "posterior_steps": 2, "step_size": 0.3, "progress": False}
    found = []
    for accelerator in (None, bf16):
        torch.manual_seed(0)
        prior = JointEBMPrior(TwoLayers())
        with recorded() as said:
            prior.fit(POINTS, method, **options, accelerator=accelerator, rng=seeded())
        found.append(weights(prior))
        assert len(said) == (accelerator is not None)
        assert all("accelerator: TwoLayers is trained in full precision" in message for message in said)
    assert torch.equal(*found)


def test_the_elbo_of_a_generator_that_knows_nothing_of_autocast(bf16: Any) -> None:
    found = []
    for accelerator in (None, bf16):
        torch.manual_seed(0)
        model = TwoLayers()
        with recorded() as said:
            fit_elbo(model, POINTS, iterations=4, batch_size=16, progress=False, accelerator=accelerator, rng=seeded())
        found.append(weights(model))
        assert len(said) == (accelerator is not None)
    assert torch.equal(*found)


def test_a_generator_that_takes_autocast_gets_it(bf16: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    original = LadderVAE.likelihood
    monkeypatch.setattr(
        LadderVAE, "likelihood", lambda self, state: (seen.append(torch.is_autocast_enabled("cpu")), original(self, state))[1]
    )
    vae = make().generator
    with recorded() as said:
        fit_elbo(vae, X, iterations=3, batch_size=16, progress=False, accelerator=bf16)
    assert said == []
    assert seen.count(True) == 3, "one for each update; the looks are in full precision"


@pytest.mark.parametrize("outside", [contextlib.nullcontext, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_an_update_does_not_see_the_weights_before_it(outside: Callable[[], Any]) -> None:
    """Autocast keeps bf16 copies of the weights until the outermost one ends, and the caller may have opened one."""
    found = []
    for keeps in (False, True):
        accelerator: Any = types.SimpleNamespace(num_processes=1, process_index=0, mixed_precision="bf16")
        accelerator.autocast = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16, cache_enabled=keeps)
        vae = make().generator
        with outside():
            options: dict[str, Any] = {"iterations": 5, "batch_size": 16, "learning_rate": 0.05, "progress": False}
            fit_elbo(vae, X, **options, accelerator=accelerator, rng=seeded())
        found.append(weights(vae))  # type: ignore[arg-type]
    assert torch.equal(*found)


def test_posterior_draws_leave_mixed_precision(bf16: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    original = LadderVAE.infer
    monkeypatch.setattr(
        LadderVAE, "infer", lambda self, x, rng=None: (seen.append(torch.is_autocast_enabled("cpu")), original(self, x))[1]
    )
    make().fit(X, iterations=3, step_size=0.3, progress=False, accelerator=bf16)
    assert len(seen) > 3
    assert not any(seen)


# ------------------------------------------------------------------------------------------------------------ map_batches


def doubled(batch: Any, *, rng: torch.Generator) -> Tensor:
    return 2 * torch.as_tensor(batch)


def noisy(batch: Any, *, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    rows = torch.as_tensor(batch)
    return rows + torch.rand(rows.shape, generator=rng), torch.rand(len(rows), generator=rng)


def test_sets_of_every_kind_give_the_same() -> None:
    rows = torch.arange(20.0).reshape(10, 2)
    expected = map_batches(noisy, rows, batch_size=4, seed=3)
    assert isinstance(expected, tuple)
    assert [t.shape for t in expected] == [(10, 2), (10,)]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows, torch.zeros(10)), batch_size=4)
    sets = [rows.numpy(), loader, list(rows.split(4)), [{"x": r, "label": 1} for r in rows.numpy()[:8].reshape(2, 4, 2)]]
    for kind in sets[:3]:
        for a, b in zip(expected, map_batches(noisy, kind, batch_size=4, seed=3), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(map_batches(doubled, sets[3]), 2 * rows[:8])
    other = map_batches(noisy, rows, batch_size=4, seed=4)
    assert not torch.equal(other[0], expected[0])


def test_a_number_of_observations_of_any_kind() -> None:
    sizes: list[Any] = []
    sizes_of_numpy: Any = np.array([7])

    def call(n: int, *, rng: torch.Generator) -> Tensor:
        sizes.append(n)
        return torch.rand(n, generator=rng)

    first = map_batches(call, 7, batch_size=3)
    assert torch.equal(map_batches(call, sizes_of_numpy[0], batch_size=3), first)
    assert torch.equal(map_batches(call, torch.tensor(7), batch_size=3), first)
    assert sizes == 3 * [3, 3, 1]


def test_latents_of_a_prior_in_batches() -> None:
    prior = make()
    latents = map_batches(prior.sample_latents, 10, batch_size=4, steps=2)
    assert [tuple(z.shape) for z in latents] == [(10, 3), (10, 2)]
    assert torch.equal(latents[0][:4], map_batches(prior.sample_latents, 4, batch_size=4, steps=2)[0])


def test_map_batches_does_not_depend_on_the_default_device() -> None:
    rows = torch.zeros(4, 2)
    expected = map_batches(noisy, rows, batch_size=3)
    torch.set_default_device("meta")
    try:
        found = map_batches(lambda b, rng: b + torch.rand(b.shape, generator=rng, device="cpu"), rows, batch_size=3)
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected[0])


@dataclasses.dataclass
class Terms:
    a: Tensor


@pytest.mark.parametrize(
    ("call", "data", "words"),
    [
        (lambda b, rng: Terms(b), X, "call: expected .*lambda.* to give a tensor or a tuple of tensors, got a Terms"),
        (lambda b, rng: [b], X, "got a list"),
        (lambda b, rng: (b, 3), X, "got a tuple with a int in it"),
        (lambda b, rng: (), X, "got an empty tuple"),
        (lambda b, rng: b.sum(), X, r"one row for each of 64 observations, got shape \(\)"),
        (lambda b, rng: b[:3], X, r"one row for each of 64 observations, got shape \(3, 1, 4, 4\)"),
        (doubled, X[:0], "data: expected at least one observation, got none"),
        (doubled, [], "data: expected at least one observation, got none"),
        (doubled, 0, "data: expected a whole number of at least 1, got 0"),
        (doubled, 2.5, "data: expected a whole number of at least 1, got 2.5"),
        (doubled, {"x": X}, "data: expected a tensor, an array, an iterable of batches or a number of observations, got dict"),
        (doubled, ["a"], r"data \(a batch of it\): expected a tensor or an array, got str"),
        (doubled, torch.tensor(0.5), r"data: expected observations, \(n, …\), or a number of them"),
    ],
)
def test_what_map_batches_cannot_do(call: Any, data: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        map_batches(call, data)


def test_no_accelerator_where_nothing_launched_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    with launched_accelerator() as accelerator:
        assert accelerator is None
