"""The chains of a run: persistent ones, restarts, cut drifts, and the backend that makes their steps."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from runs import TwoLayers, X, make, task_of
from torch import Tensor

from energy_prior import ArgumentError, JointEBMPrior, LadderVAE, denoising_energies
from energy_prior.langevin import ChainSettings, JointDensity, Target, crossed, sample
from energy_prior.training import FitConfig, chains
from energy_prior.training.chains import TrainingChains, tuned_step_size


def test_persistent_chains_grow_after_a_small_first_batch() -> None:
    """A loader's first training batch may be its small last one."""
    batches = [X.repeat(8, 1, 1, 1)[:256] for _ in range(4)] + [X[:6]]
    prior = make()
    prior.fit(batches, "two_stage", iterations=3, steps=2, progress=False)
    assert bool(prior.energies[0].is_set)  # type: ignore[arg-type]


def test_stages_without_persistent_chains_run_them_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    original = TrainingChains.run
    monkeypatch.setattr(TrainingChains, "run", lambda self, start, n: (steps.append(n), original(self, start, n))[1])
    make().fit(X, "multi_stage_nce", iterations=6, stages=2, steps=7, persistent=0, progress=False)
    assert steps == [7, 7, 7]


def test_the_backend_is_chosen_once_and_kept_in_checkpoints() -> None:
    model = make().model
    long = TrainingChains(model, FitConfig(iterations=10_000_000), X)
    long._choose_backend(8, 20)
    assert long.backend == "compiled"
    resumed = TrainingChains(model, FitConfig(), X)
    resumed.load_state(long.state())
    resumed._choose_backend(8, 20)
    assert resumed.backend == "compiled", "a resumed run does not switch"
    short = TrainingChains(model, FitConfig(), X)
    short.prior(8, 2)
    assert short.backend == "eager", "a short run does not wait for a compiler"
    with pytest.raises(ArgumentError, match="backend: expected one of"):
        FitConfig(backend="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("restart", [0.0, 1.0])
def test_restarted_chains_begin_at_ancestral_draws(restart: float, monkeypatch: pytest.MonkeyPatch) -> None:
    chains = TrainingChains(make().model, FitConfig(batch_size=8, persistent=8, restart_probability=restart), X)
    monkeypatch.setattr(TrainingChains, "run", lambda self, start, steps: tuple(z.clone() for z in start))
    first = chains.prior(8, 1)[0].sort(0).values
    second = chains.prior(8, 1)[0].sort(0).values
    assert torch.equal(first, second) == (restart == 0.0)


@pytest.mark.parametrize("persistent", [0, 64])
def test_chains_of_energies_with_waymarks_start_across_them(persistent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, also those that start again: the posterior's noise is N(3, I), far from N(0, I)."""
    torch.manual_seed(0)
    prior = JointEBMPrior(LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8), denoising_energies([(3,), (2,)], channels=8))
    for energy, units in zip(prior.energies, (3, 2), strict=True):
        energy.set_from([torch.randn(256, units) + 3], [])  # type: ignore[operator]
    began: list[Tensor] = []

    def noted(self: TrainingChains, start: Sequence[Tensor], steps: int) -> tuple[Tensor, ...]:
        began.append(torch.cat(prior.model.noise(start), 1).detach())
        return tuple(start)

    monkeypatch.setattr(TrainingChains, "run", noted)
    chains = TrainingChains(prior.model, FitConfig(persistent=persistent, restart_probability=0.5), X)
    for _ in range(3):
        chains.prior(64, 5)
    assert all(float((noise.mean(0) - 3).abs().max()) < 0.7 for noise in began)
    assert len({float(noise.sum()) for noise in began}) == len(began), "some start anew each time"


def test_many_chains_cross_the_waymarks_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = JointEBMPrior(LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8), denoising_energies([(3,), (2,)], channels=8))
    rows: list[int] = []
    original = sample.cross

    def noted(density: JointDensity, noise: Sequence[Tensor], levels: int) -> tuple[Tensor, ...]:
        rows.append(len(noise[0]))
        return original(density, noise, levels)

    monkeypatch.setattr(sample, "cross", noted)
    torch.manual_seed(0)
    whole = crossed(prior.model.target(7), ChainSettings())
    torch.manual_seed(0)
    parts = crossed(prior.model.target(7), ChainSettings(max_memory=1.0))
    assert rows == [7] + [1] * 7
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)


def test_posterior_chains_find_the_step_of_a_narrow_likelihood() -> None:
    torch.manual_seed(0)
    prior = JointEBMPrior(LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8, sigma=1e-4))
    prior.train_jointly()
    chains = task_of(prior, "joint", posterior_steps=20).chains
    for _ in range(20):
        chains.posterior(X[:16])
    assert chains.posterior_step_size < 1e-4
    assert float(chains.figures()["posterior_acceptance"]) > 0.4


def test_posterior_draws_and_tuning_leave_autocast() -> None:
    """For a generator whose distributions take the dtype of autocast."""
    model, x = JointEBMPrior(TwoLayers()).model, torch.randn(8, 8)

    def numbers() -> list[Tensor]:
        torch.manual_seed(1)
        chains = TrainingChains(model, FitConfig(posterior_steps=2), x)
        chains.tune()
        draws = [*chains.posterior(x), *chains.prior(8, 2), *chains.ancestral(8)]
        return [*draws, torch.tensor(chains.step_size), *chains.figures().values()]

    plain = numbers()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = numbers()
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


@pytest.mark.parametrize(
    ("iterations", "batch_size", "expected"), [(2000, None, 64), (400, 64, 12), (5, 32, 8), (20_000, 16, 16), (5, 2, 8)]
)
def test_the_step_size_is_tuned_by_few_chains_in_short_runs(
    iterations: int, batch_size: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def tune(target: Target, **_: object) -> float:
        asked.append(target.batch_size)
        return 0.5

    monkeypatch.setattr(chains, "tune_step_size", tune)
    config = FitConfig(iterations=iterations, batch_size=batch_size)
    assert tuned_step_size(make().model, 0.1, config, torch.device("cpu")) == 0.5
    assert asked == [expected]
