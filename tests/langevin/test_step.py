"""The reference step: the drift cut, the adaptation of the step size, and what a call reports."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import agrees, moment_table
from ladders import LinearLadder
from small_priors import N, injected, lively, mlp, target_of
from torch import Tensor, nn

from energy_prior import JointEBMPrior
from energy_prior._util import not_none
from energy_prior.langevin import RandomNoise, backends, coefficients, cut_drift, log_acceptance, propose
from energy_prior.langevin import step as reference
from energy_prior.langevin.chain import run_chain


def test_a_long_drift_is_cut_to_the_length_of_the_noise() -> None:
    c = coefficients(torch.tensor(0.4).double(), "crank_nicolson", "noise")
    short, long = torch.full((2, 9), 0.1).double(), torch.full((2, 4), 100.0).double()
    long[1] = 0.5
    cut_ones, cut = cut_drift([short, long], c, 0.7)
    assert torch.equal(cut_ones[0], short)
    assert torch.equal(cut_ones[1][1], long[1])
    assert cut.tolist() == [True, False]
    length = float((c.c1 * cut_ones[1][0]).norm())
    assert length == pytest.approx(0.7 * float(c.tau) * math.sqrt(4))
    assert bool((cut_ones[1][0] > 0).all()), "the direction stays"


def test_what_is_not_finite_stays_so() -> None:
    c = coefficients(torch.tensor(0.4).double(), "euler", "latent")
    bad = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0]]).double()
    cut_ones, _ = cut_drift([bad], c, 1.0)
    assert not bool(torch.isfinite(cut_ones[0]).all(1).any())


@pytest.mark.slow
def test_mala_with_a_cut_drift_has_the_exact_moments() -> None:
    """With a cut that acts in most steps, in latent space with Euler steps."""
    ladder = LinearLadder((2, 1), seed=2)
    prior = JointEBMPrior(ladder, ladder.energies, space="latent")
    rng = torch.Generator().manual_seed(0)
    draws = prior.sample_latents(20_000, steps=150, step_size=0.8, adjust=True, max_drift=0.2, rng=rng)
    plain = prior.sample_latents(2000, steps=150, step_size=0.8, max_drift=0.2, rng=rng)
    mean, covariance = ladder.tilted()
    assert agrees(moment_table(torch.cat(draws, 1), mean, covariance))
    assert not agrees(moment_table(torch.cat(plain, 1), mean, covariance)), "unadjusted it is biased: the cut does act"


def test_an_unadjusted_chain_survives_a_cliff() -> None:
    class Cliff(nn.Module):
        """f(z) = −10⁴ Σ z⁴: Euler steps of 0.3 blow up at once."""

        def forward(self, z: Tensor) -> Tensor:
            return -1e4 * z.pow(4).sum(1)

    ladder = LinearLadder((2, 1), seed=2)
    prior = JointEBMPrior(ladder, [Cliff(), Cliff()])
    with pytest.raises(ArithmeticError):
        prior.sample_latents(50, steps=100, step_size=0.3)
    assert all(bool(torch.isfinite(z).all()) for z in prior.sample_latents(50, steps=100, step_size=0.3, max_drift=1.0))


def test_init_step_and_finalize_make_the_steps_that_are_written_out() -> None:
    """y' = c₀ y + c₁ g + τ n, three times, the last one in `finalize`; with what each call reports of its steps."""
    prior = lively(mlp())
    noise = injected(prior)
    draws = [reference.Draw(noise.normal(t), noise.uniform(t)) for t in range(4)]
    with torch.no_grad():
        density = target_of(prior).density()
        for config in (
            reference.StepConfig("euler"),
            reference.StepConfig("euler", max_drift=0.05, measured=True, traced=True),
        ):
            c = coefficients(torch.full((N,), 0.3).double(), "euler", "noise")
            state, info = reference.init(density, config, noise.normal(0), torch.full((N,), 0.3).double())
            assert not_none(info.finite_check).shape == (1, 4 + config.measured)
            position, cut = noise.normal(0), torch.zeros(N).double()
            energies, accepted = [], torch.zeros(N).double()
            for t in (1, 2, 3):
                here = density.evaluate(position)
                gradient = here.gradient
                if config.max_drift:
                    gradient, was_cut = cut_drift(gradient, c, config.max_drift)
                    cut = cut + was_cut
                position = propose(position, gradient, c, noise.normal(t))
                if t < 3:
                    there = density.evaluate(position)
                    energies.append(there.negative_energy.sum(1))
                    back = cut_drift(there.gradient, c, config.max_drift)[0] if config.max_drift else there.gradient
                    accepted += log_acceptance(here, there, back, c, noise.normal(t)).exp().clamp(max=1)
            state, info = reference.step(density, config, state, draws[1:3])
            end, last = reference.finalize(density, config, state, draws[3:])
            torch.testing.assert_close(end.position, position)
            torch.testing.assert_close(end.latents, density.topdown.descend(position, "noise").latents)
            assert not_none(info.finite_check).shape == (2, 4 + config.measured)
            if config.measured:
                torch.testing.assert_close(info.negative_energy, torch.stack(energies))
                torch.testing.assert_close(info.accepted, accepted)
                torch.testing.assert_close(not_none(info.cut) + not_none(last.cut), cut)
                assert 0 < float(cut.mean()) <= 3
            else:
                assert (info.negative_energy, info.accepted, info.cut, last.cut) == (None, None, None, None)


def test_a_rejected_step_leaves_the_state_as_it_was() -> None:
    prior = lively(mlp())
    noise = injected(prior)
    config = reference.StepConfig("euler", adjust=True, measured=True)
    with torch.no_grad():
        density = target_of(prior).density()
        before, _ = reference.init(density, config, noise.normal(0), torch.full((N,), 2.5).double())
        never = torch.full((N,), 1.0).double()
        never[0] = 0.0
        after, info = reference.step(density, config, before, [reference.Draw(noise.normal(1), never)])
    rejected = not_none(info.accepted) < 1
    rejected[0] = False
    assert rejected.any()
    for a, b in zip((*after.position, *after.gradient), (*before.position, *before.gradient), strict=True):
        assert torch.equal(a[rejected], b[rejected])
        assert not torch.equal(a[0], b[0])
    assert torch.equal(not_none(after.log_density)[rejected], not_none(before.log_density)[rejected])


def test_the_adaptation_of_the_step_size_dies_away() -> None:
    """With f = 0 Crank–Nicolson is always accepted: log s grows by 0.3 t^(−0.6) in each of the first steps, then rests."""
    prior = JointEBMPrior(mlp().double())
    config = reference.StepConfig("crank_nicolson", adapt=True, measured=True)
    target = target_of(prior)
    with torch.no_grad():
        density = target.density()
        noise = RandomNoise(target.shapes, density.topdown.reference)
        options: dict[str, Any] = {"step_size": 0.1, "noise": noise, "backend": backends.get("eager")}
        result = run_chain(density, noise.normal(0), config, steps=9, adapt_steps=5, **options)
    expected = 0.1 * math.exp(0.3 * sum(t**-0.6 for t in range(1, 6)))
    torch.testing.assert_close(result.step_size, torch.full((N,), expected).double())
