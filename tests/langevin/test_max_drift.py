"""Drift taming: it cuts what is longer than the noise, layer by layer, and MALA with it stays exact."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import agrees, moment_table
from ladders import LinearLadder
from torch import Tensor, nn

from energy_prior import ArgumentError, JointEBMPrior
from energy_prior.langevin import ChainSettings, coefficients, tame


def test_a_long_drift_is_cut_to_the_length_of_the_noise() -> None:
    c = coefficients(torch.tensor(0.4).double(), "crank_nicolson", "noise")
    short, long = torch.full((2, 9), 0.1).double(), torch.full((2, 4), 100.0).double()
    long[1] = 0.5
    tamed, cut = tame([short, long], c, 0.7)
    assert torch.equal(tamed[0], short)
    assert torch.equal(tamed[1][1], long[1])
    assert cut.tolist() == [True, False]
    length = float((c.drift * tamed[1][0]).norm())
    assert length == pytest.approx(0.7 * float(c.noise) * math.sqrt(4))
    assert bool((tamed[1][0] > 0).all()), "the direction stays"


def test_what_is_not_finite_stays_so() -> None:
    c = coefficients(torch.tensor(0.4).double(), "euler", "latent")
    bad = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0]]).double()
    tamed, _ = tame([bad], c, 1.0)
    assert not bool(torch.isfinite(tamed[0]).all(1).any())


def test_tamed_mala_has_the_exact_moments() -> None:
    """With a cut that acts in most steps, in latent space with Euler steps."""
    ladder = LinearLadder((2, 1), seed=2)
    prior = JointEBMPrior(ladder, ladder.energies, space="latent")
    rng = torch.Generator().manual_seed(0)
    draws = prior.sample_latents(20_000, steps=150, step_size=0.8, adjust=True, taming=0.2, rng=rng)
    plain = prior.sample_latents(2000, steps=150, step_size=0.8, taming=0.2, rng=rng)
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
    assert all(bool(torch.isfinite(z).all()) for z in prior.sample_latents(50, steps=100, step_size=0.3, taming=1.0))


def test_taming_is_checked() -> None:
    with pytest.raises(ArgumentError, match="taming: expected a finite number above 0"):
        ChainSettings(taming=0.0)
