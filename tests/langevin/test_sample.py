"""Chains for a whole batch: parts, the choice of a backend, and what precision they have."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from small_priors import STEPS, N, injected, lively, mlp, target_of
from torch import Tensor, nn

from energy_prior import ArgumentError, BackendWarning, JointEBMPrior, LadderVAE
from energy_prior.errors import ChainWarning
from energy_prior.langevin import ChainSettings, InjectedNoise, backends, choose_backend, sample_target, tune_step_size
from energy_prior.langevin import sample as sampling
from energy_prior.langevin.backends.compiled import BACKEND as COMPILED
from energy_prior.langevin.backends.eager import Eager
from energy_prior.langevin.chain import ChainResult, run_chain
from energy_prior.langevin.cost import Cost, evaluation_cost
from energy_prior.langevin.density import JointDensity
from energy_prior.langevin.sample import split_batch
from energy_prior.process import frozen
from energy_prior.topdown import TopDown

MANY = 25


def memory_of(prior: JointEBMPrior, rows: float, **of: Any) -> float:
    """Bytes that an evaluation of so many rows keeps."""
    with torch.no_grad(), frozen(prior, prior.generator):
        return rows * evaluation_cost(target_of(prior, 2, **of).density()).memory


@pytest.mark.parametrize(
    ("space", "options", "held"),
    [
        ("noise", {}, ()),
        ("latent", {"step_size": 0.05}, ()),
        ("noise", {"adjust": True, "max_drift": 0.1}, ()),
        ("noise", {"step_size": None}, (1,)),
        ("noise", {}, (2,)),
        ("noise", {"steps": 0}, ()),
    ],
    ids=["plain", "latent space", "adjusted", "layer 1 held, adaptive", "layer 2 held", "no steps"],
)
def test_parts_change_nothing_where_noise_is_injected(space: str, options: dict[str, Any], held: tuple[int, ...]) -> None:
    prior = lively(mlp(), space)
    given = {i: torch.randn(MANY, *prior.generator.latent_shapes[i - 1]).double() for i in held}
    noise = injected(prior, tuple(i for i in (1, 2) if i not in held), n=MANY)
    start = [torch.randn(MANY, d).double() for d in (4, 3)]
    memory = memory_of(prior, 10.5, held={i: z[:2] for i, z in given.items()})
    for begin in (None, start):
        chain: dict[str, Any] = {"steps": STEPS, "step_size": 0.3, "noise": noise, "given": given, "start": begin} | options
        whole = prior.sample_latents(MANY, **chain)
        parts = prior.sample_latents(MANY, max_memory=memory, **chain)
        for a, b in zip(parts, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_part_runs_from_start_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, as few as fit, in the order of the rows."""
    prior = lively(mlp())
    calls: list[tuple[int, int]] = []

    class Spy(Eager):
        def step(self, density: Any, config: Any, state: Any, draws: Any) -> Any:
            calls.append((density.topdown.batch_size, draws.first))
            return super().step(density, config, state, draws)

    monkeypatch.setattr(backends, "get", lambda _: Spy())
    prior.sample_latents(MANY, steps=4, max_memory=memory_of(prior, 10.5), backend="eager")
    assert calls == [(9, 1), (9, 2), (9, 3), (9, 1), (9, 2), (9, 3), (7, 1), (7, 2), (7, 3)]


def test_a_seed_gives_the_same_draws_in_the_same_parts() -> None:
    prior = lively(mlp())
    memory = memory_of(prior, 10.5)

    def draw(seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        return torch.cat(prior.sample_latents(MANY, steps=STEPS, max_memory=memory, adjust=True, rng=rng), 1)

    first = draw(1)
    assert torch.equal(first, draw(1))
    assert not torch.equal(first, draw(2))
    assert len(first.unique(dim=0)) == MANY, "no part has the random numbers of another"
    assert len(first[:, 0].unique()) == MANY


class Shifted:
    """A NoiseSource of a user's."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self.shapes = shapes

    def normal(self, step: int) -> tuple[Tensor, ...]:
        return tuple(torch.full(shape, 0.1 * step).double() for shape in self.shapes)

    def uniform(self, step: int) -> Tensor:
        return torch.full((self.shapes[0][0],), 0.5).double()


class ShiftedRows(Shifted):
    """One that can be taken apart."""

    def rows(self, rows: slice) -> ShiftedRows:
        return ShiftedRows([(rows.stop - rows.start, *shape[1:]) for shape in self.shapes])


def test_a_noise_source_of_the_users_in_parts() -> None:
    prior = lively(mlp())
    shapes, memory = [(MANY, 4), (MANY, 3)], memory_of(prior, 10.5)
    whole = prior.sample_latents(MANY, steps=STEPS, step_size=0.3, noise=Shifted(shapes), adjust=True)  # type: ignore[arg-type]
    parts = prior.sample_latents(MANY, steps=STEPS, step_size=0.3, noise=ShiftedRows(shapes), adjust=True, max_memory=memory)
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    with pytest.raises(ArgumentError, match=r"run in 3 parts, and Shifted has no rows\(slice\)"):
        prior.sample_latents(MANY, steps=STEPS, noise=Shifted(shapes), max_memory=memory)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="expected an InjectedNoise or another NoiseSource, got list"):
        prior.sample_latents(MANY, steps=STEPS, noise=[torch.zeros(3)])  # type: ignore[arg-type]


def test_what_is_reported_is_of_the_whole_batch() -> None:
    prior = lively(mlp())
    noise = injected(prior, n=MANY)
    results = []
    for rows in (100.5, 10.5):
        settings = ChainSettings(steps=STEPS, max_drift=0.2, max_memory=memory_of(prior, rows))
        with torch.no_grad(), frozen(prior, prior.generator):
            result = sample_target(target_of(prior, MANY), settings, default_step_size=0.4, noise=noise, trace=True).result
        assert result is not None
        assert result.trajectory is None
        results.append(result)
    for field in ("acceptance", "drift_norm", "cut_share", "negative_energy", "step_size", "position"):
        torch.testing.assert_close(getattr(results[1], field), getattr(results[0], field), rtol=1e-10, atol=1e-10)
    assert results[1].negative_energy.shape == (STEPS + 1, MANY)
    assert torch.equal(results[0].step_size, torch.full((MANY,), 0.4, dtype=torch.float64))


def test_where_every_layer_is_held_there_is_no_chain() -> None:
    prior = lively(mlp())
    held = {2: torch.randn(N, 3).double(), 1: torch.randn(N, 4).double()}
    draw = sample_target(target_of(prior, held=held), ChainSettings(), default_step_size=0.3)
    assert draw.result is None
    assert torch.equal(draw.latents[0], held[1])
    assert torch.equal(draw.latents[1], held[2])


@pytest.mark.parametrize("method", ["sample", "trajectory", "sample_posterior", "held layers"])
def test_topdown_of_the_whole_batch_is_never_built(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = TopDown.__init__

    def spy(self: TopDown, generator: Any, batch_size: int, *more: Any) -> None:
        sizes.append(batch_size)
        original(self, generator, batch_size, *more)

    prior, n = lively(mlp()), 1000
    chain: dict[str, Any] = {"steps": 2, "max_memory": 4e4}
    monkeypatch.setattr(TopDown, "__init__", spy)
    if method == "sample":
        prior.sample(n, **chain)
    elif method == "trajectory":
        prior.trajectory(n, every=1, **chain)
    elif method == "sample_posterior":
        prior.sample_posterior(torch.rand(n, 6).double(), **chain)
    else:
        prior.sample_latents(n, given={1: torch.randn(n, 4).double()}, **chain)
    assert sizes
    assert max(sizes) < 100


def test_parts_are_as_few_as_fit() -> None:
    prior = lively(mlp())
    with torch.no_grad(), frozen(prior, prior.generator):
        probe = target_of(prior, 2).density()
    for rows, sizes in ((100.5, [25]), (10.5, [9, 9, 7]), (0.1, [1] * 25)):
        parts = split_batch(target_of(prior, MANY), probe, memory_of(prior, rows))
        assert [part.stop - part.start for part in parts] == sizes


# --------------------------------------------------------------------------------------------------------------- backends


def test_auto_compiles_where_it_pays_and_depends_on_counts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = Cost(1e4, 5e5, 60), Cost(1e6, 1e9, 80)
    assert not COMPILED.pays(small, 64, 2500)
    assert COMPILED.pays(small, 64, 1_000_000)
    assert COMPILED.pays(large, 256, 2000)
    prior = lively(mlp())
    with torch.no_grad(), frozen(prior, prior.generator):
        assert choose_backend("auto", target_of(prior, 64), 2500) == "eager"
        assert choose_backend("auto", target_of(prior, 64), 10_000_000) == "compiled"
        assert choose_backend("compiled", target_of(prior, 64), 1) == "compiled"
    with pytest.raises(ArgumentError, match="backend: expected one of"):
        choose_backend("fast", target_of(prior), 1)
    asked: list[Any] = []

    def pays(self: Any, cost: Cost, rows: int, evaluations: int) -> bool:
        asked.append((cost.operations > 20, rows, evaluations))
        return True

    def init(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(type(COMPILED), "init", init)
    prior.sample(64)
    monkeypatch.setattr(type(COMPILED), "pays", pays)
    with pytest.raises(ZeroDivisionError):
        prior.sample_latents(7, steps=60)
    assert asked == [(True, 7, 60)]


def test_a_backend_that_refuses_is_replaced_with_a_warning_at_the_users_line() -> None:
    prior = lively(mlp())
    noise = injected(prior)
    words = 'backend="graph" cannot run this chain, and "compiled" takes it: it needs a CUDA device'

    class Refuses(Eager):
        name, fallback = "graph", "compiled"

        def refusal(self, density: Any, config: Any, noise: Any) -> str:
            return "it needs a CUDA device"

    class Takes(Eager):
        name, fallback = "compiled", "eager"

    there = {"graph": Refuses(), "compiled": Takes(), "eager": Eager()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "get", there.__getitem__)
        patch.setattr(backends, "available", lambda: tuple(there))
        with pytest.warns(BackendWarning, match=words) as caught:
            z = prior.sample_latents(N, steps=STEPS, noise=noise, step_size=0.3, backend="graph")
        assert caught[0].filename == __file__
        del there["compiled"]
        with pytest.warns(BackendWarning, match='and "eager" takes it'):
            again = prior.sample_latents(N, steps=STEPS, noise=noise, step_size=0.3, backend="graph")
        for name in ("compiled", "eager"):
            there.pop(name, None)
        with pytest.raises(ArgumentError, match='none can run this chain \\("graph": it needs a CUDA device\\)'):
            prior.sample_latents(N, steps=STEPS, noise=noise, step_size=0.3, backend="graph")
    reference = prior.sample_latents(N, steps=STEPS, noise=noise, step_size=0.3, backend="eager")
    assert torch.equal(z[0], reference[0])
    assert torch.equal(again[0], reference[0])


# ------------------------------------------------------------------------------------------------- precision, step sizes


def test_bf16_is_near_the_full_precision_and_refuses_to_accept_or_reject() -> None:
    prior = JointEBMPrior(LadderVAE((6,), latent_dims=(4, 3), hidden=16))
    for f in prior.energies:
        nn.init.normal_(f.net[-1].weight, std=0.5)  # type: ignore[union-attr]
    full, coarse = (
        prior.sample_latents(200, steps=20, rng=torch.Generator().manual_seed(0), precision=p) for p in ("full", "bf16")
    )
    difference = float((full[0] - coarse[0]).abs().mean())
    assert 0 < difference < 0.02
    assert coarse[0].dtype == torch.float32
    with pytest.raises(ArgumentError, match='precision: "bf16" is for unadjusted chains'):
        prior.sample_latents(4, steps=2, adjust=True, precision="bf16")
    with pytest.raises(ArgumentError, match='precision: "bf16" is for unadjusted chains'):
        prior.sample_posterior(torch.rand(4, 6), steps=2, precision="bf16")
    with pytest.raises(ArgumentError, match='precision: "tf32" needs a CUDA device'):
        prior.sample_latents(4, steps=2, precision="tf32")


@pytest.mark.parametrize("held", [(), (2,)])
def test_chains_are_as_exact_inside_the_users_own_autocast(held: tuple[int, ...]) -> None:
    """Bit for bit what they are outside, the layers above the chain included."""
    prior = lively(mlp()).float()
    given = {i: torch.randn(N, 3) for i in held}
    target, settings = target_of(prior, held=given), ChainSettings(steps=4, step_size=0.3)

    def draw() -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        with torch.no_grad(), frozen(prior, prior.generator):
            return sample_target(target, settings, default_step_size=0.3).latents

    outside = draw()
    with torch.autocast("cpu", torch.bfloat16):
        inside = draw()
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_chains_that_hardly_move_are_told() -> None:
    prior = lively(mlp())
    with pytest.warns(ChainWarning, match=r"accepted 0\.\d% of the chains' steps") as caught:
        prior.sample_latents(50, steps=30, step_size=1.9, adjust=True, scheme="euler", temperature=0.02)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior.sample_latents(50, steps=30, step_size=0.3, adjust=True)
        sampling.warn_if_stuck(None)


@pytest.mark.slow
def test_the_step_size_that_is_tuned() -> None:
    """With f = 0 every step is accepted; with energies MALA accepts the share that was asked for, and the seed decides."""
    flat = JointEBMPrior(mlp().double())
    with torch.no_grad(), frozen(flat, flat.generator):
        assert tune_step_size(target_of(flat, 16), start_step_size=0.9) == sampling.LARGEST_STEP
    prior = lively(mlp())
    with torch.no_grad():
        for f in prior.energies:
            f.net[-1].weight.mul_(4)  # type: ignore[union-attr, operator]
    target = target_of(prior, 64)
    found = []
    for _ in range(2):
        torch.manual_seed(2)
        with torch.no_grad(), frozen(prior, prior.generator):
            found.append(tune_step_size(target, start_step_size=0.3, target_acceptance=0.7))
    assert found[0] == found[1] < sampling.LARGEST_STEP
    settings = ChainSettings(steps=100, step_size=found[0], adjust=True)
    with torch.no_grad(), frozen(prior, prior.generator):
        result = sample_target(target, settings, default_step_size=0.3).result
    assert result is not None
    assert result.acceptance is not None
    assert 0.6 < float(result.acceptance.mean()) < 0.8


def test_tuning_stops_when_it_knows_and_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty steps where all are accepted, 60 and no more than 150 elsewhere; as many chains as fit."""
    runs: list[tuple[int, int]] = []

    def spy(density: JointDensity, *arguments: Any, steps: int, **keywords: Any) -> ChainResult:
        runs.append((density.topdown.batch_size, steps))
        return run_chain(density, *arguments, steps=steps, **keywords)

    monkeypatch.setattr(sampling, "run_chain", spy)
    steep = lively(mlp())
    for prior, least, most in ((JointEBMPrior(mlp().double()), 30, 30), (steep, 60, 150)):
        runs.clear()
        with torch.no_grad(), frozen(prior, prior.generator):
            tune_step_size(target_of(prior, MANY), start_step_size=0.5, max_memory=memory_of(prior, 10.5))
        assert {rows for rows, _ in runs} == {9}
        assert least <= sum(steps for _, steps in runs) <= most


def test_tuning_ends_at_the_same_step_wherever_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Soon, and where the share that was asked for is accepted."""
    prior, made = lively(mlp()), list[int]()
    with torch.no_grad():
        for f in prior.energies:
            f.net[-1].weight.mul_(4)  # type: ignore[union-attr, operator]

    def spy(*arguments: Any, steps: int, **keywords: Any) -> ChainResult:
        made.append(steps)
        return run_chain(*arguments, steps=steps, **keywords)

    monkeypatch.setattr(sampling, "run_chain", spy)
    found = []
    with torch.no_grad(), frozen(prior, prior.generator):
        for start in (0.02, 0.2, 1.0):
            made.clear()
            torch.manual_seed(0)
            found.append(tune_step_size(target_of(prior, 64), start_step_size=start))
            assert sum(made) <= 90
        result = sample_target(
            target_of(prior, 256), ChainSettings(step_size=found[0]), default_step_size=1.0, measure=True
        ).result
    assert max(found) < 1.2 * min(found)
    assert result is not None
    assert result.acceptance is not None
    assert 0.93 < float(result.acceptance.mean()) < 0.97


def test_noise_that_does_not_fit_is_refused() -> None:
    prior = lively(mlp())
    with pytest.raises(ArgumentError, match="needs `uniforms`"):
        prior.sample_latents(N, steps=2, noise=InjectedNoise(injected(prior)._normals), adjust=True)
    with pytest.raises(ValueError, match="one tensor"):
        prior.sample_latents(N + 1, steps=2, noise=injected(prior))
