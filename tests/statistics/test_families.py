"""Conditionals of other families than the normal one: chains and scores against quadrature over z."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, FamilyLadder
from helpers import agrees, limit
from test_scale_ladder import z_scores

from energy_prior import JointEBMPrior

CHAINS = 4000
CASES = [(family, held) for family in FAMILIES for held in ({}, {2: 0.4})] + [("laplace", {1: 0.7}), ("sinh", {1: 0.7})]


@pytest.mark.parametrize(("family", "held"), CASES)
def test_chains_have_the_moments(family: str, held: dict[int, float]) -> None:
    ladder = FamilyLadder(family)
    prior = JointEBMPrior(ladder, ladder.energies)
    given = {layer: torch.full((CHAINS, 1), value, dtype=torch.float64) for layer, value in held.items()}
    step_size = None if 1 in held else 0.7
    rng = torch.Generator().manual_seed(3)
    z = prior.sample_latents(CHAINS, given=given, steps=100, step_size=step_size, adjust=True, rng=rng)
    assert agrees(z_scores([torch.asinh(t) for t in z], ladder.moments(held)))


@pytest.mark.parametrize("family", FAMILIES)
def test_posterior_chains_have_the_moments(family: str) -> None:
    ladder = FamilyLadder(family)
    prior = JointEBMPrior(ladder, ladder.energies)
    x = torch.full((CHAINS, 1), 1.3, dtype=torch.float64)
    z = prior.sample_posterior(x, steps=200, rng=torch.Generator().manual_seed(4))
    assert agrees(z_scores([torch.asinh(t) for t in z], ladder.moments(x=1.3)))


@pytest.mark.parametrize(
    ("family", "k"),
    [*((family, 1) for family in FAMILIES), *((family, k) for family in ("laplace", "uniform") for k in (0, 2))],
)
def test_log_joint(family: str, k: int) -> None:
    """L^{>k} against quadrature: draws of z_{>k} from q, and E over p(z_{<=k} | z_{>k})."""
    ladder = FamilyLadder(family)
    prior = JointEBMPrior(ladder, ladder.energies)
    x = torch.full((CHAINS, 1), 0.6, dtype=torch.float64)
    draws = prior.log_joint(x, k, steps=80, step_size=0.7, adjust=True, rng=torch.Generator().manual_seed(k))
    expected = ladder.log_joint(0.6, k)
    assert abs(float((draws.mean() - expected) / (draws.std() / CHAINS**0.5))) < limit(1)
