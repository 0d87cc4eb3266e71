"""MALA against closed forms on the linear-Gaussian ladder: every chain ends in one independent draw, n of them per test."""

from __future__ import annotations

import pytest
import torch
from helpers import agrees, moment_table
from ladders import LinearLadder
from torch import Tensor

from energy_prior import JointEBMPrior

CHAINS = 6000
DIMS = {1: (3,), 2: (3, 2), 3: (2, 2, 2), 4: (2, 2, 1, 2)}


def run(prior: JointEBMPrior, **keywords: object) -> tuple[Tensor, ...]:
    options = {"steps": 120, "step_size": 0.9 if prior.space == "noise" else 0.55, "adjust": True} | keywords
    return prior.sample_latents(CHAINS, rng=torch.Generator().manual_seed(1), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("space", ["noise", "latent"])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_joint_prior(layers: int, space: str) -> None:
    ladder = LinearLadder(DIMS[layers], seed=layers)
    z = run(JointEBMPrior(ladder, ladder.energies, space=space))  # type: ignore[arg-type]
    assert agrees(moment_table(torch.cat(z, 1), *ladder.tilted()))


@pytest.mark.parametrize("space", ["noise", "latent"])
@pytest.mark.parametrize("held", [{2}, {1}, {3}, {1, 3}, {2, 3}, {1, 2}])
def test_conditionals_given_held_layers(held: set[int], space: str) -> None:
    """Also the middle layer held, where log p(c_2 | z_3) pulls on z_3, with its log σ."""
    ladder = LinearLadder(DIMS[3], seed=3)
    values = {layer: torch.tensor([0.8, -0.5], dtype=torch.float64) * layer for layer in sorted(held)}
    prior = JointEBMPrior(ladder, ladder.energies, space=space)  # type: ignore[arg-type]
    z = run(prior, given={layer: v.expand(CHAINS, -1) for layer, v in values.items()})
    offset, gain, covariance = ladder.conditional_moments(values)
    free = torch.cat([z[i] for i in range(3) if i + 1 not in held], 1)
    assert agrees(moment_table(free, offset + gain @ torch.cat(list(values.values())), covariance))
    for layer, value in values.items():
        assert torch.equal(z[layer - 1], value.expand(CHAINS, -1))


@pytest.mark.parametrize("space", ["noise", "latent"])
def test_posterior(space: str) -> None:
    """The default posterior chain: adjusted, every chain tuning its own step over the first half."""
    ladder = LinearLadder(DIMS[2], seed=2)
    x = torch.tensor([1.0, -0.7, 0.4], dtype=torch.float64)
    prior = JointEBMPrior(ladder, ladder.energies, space=space)  # type: ignore[arg-type]
    z = prior.sample_posterior(x.expand(CHAINS, -1), steps=300, rng=torch.Generator().manual_seed(2))
    assert agrees(moment_table(torch.cat(z, 1), *ladder.tilted(x)))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_scales_the_covariance(temperature: float) -> None:
    """In latent space p̃^{1/T} of a Gaussian has covariance T·Σ."""
    ladder = LinearLadder(DIMS[2], seed=2)
    mean, covariance = ladder.tilted()
    z = run(JointEBMPrior(ladder, ladder.energies, space="latent"), temperature=temperature)
    assert agrees(moment_table(torch.cat(z, 1), mean, temperature * covariance))


def test_log_density_minus_log_z_integrates_to_one() -> None:
    """E over the exact joint prior of [log p_β + Σ f − log Z] is minus the entropy of that Gaussian."""
    ladder = LinearLadder(DIMS[2], seed=2)
    mean, covariance = ladder.tilted()
    exact = torch.distributions.MultivariateNormal(mean, covariance)
    z = exact.sample((5,))
    prior = JointEBMPrior(ladder, ladder.energies)
    log_density = prior.log_density((z[:, :3], z[:, 3:]))
    torch.testing.assert_close(log_density - ladder.log_z(), exact.log_prob(z), rtol=1e-10, atol=1e-10)
