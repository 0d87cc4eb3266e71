"""Discretised logistics and their mixtures: probabilities that sum to one, draws that follow them, tails that stay finite."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from energy_prior.generators.likelihoods import DiscretizedLogistic, DiscretizedLogisticMixture, Observed

LEVELS = 5


def mixture(colours: int, n: int = 1, top: float | None = None, spread: float = 1.0) -> DiscretizedLogisticMixture:
    channels = 2 * (10 if colours == 3 else 3)
    g = torch.Generator().manual_seed(4)
    parameters = spread * torch.randn(1, channels, 1, 1, generator=g, dtype=torch.float64).expand(n, -1, -1, -1)
    return DiscretizedLogisticMixture.from_channels(parameters, colours=colours, levels=LEVELS, top=top)


def grid(colours: int) -> Tensor:
    values = torch.linspace(-1, 1, LEVELS, dtype=torch.float64).tolist()
    return torch.tensor(list(itertools.product(values, repeat=colours)), dtype=torch.float64)[..., None, None]


@pytest.mark.parametrize("colours", [1, 3])
def test_probabilities_sum_to_one(colours: int) -> None:
    x = grid(colours)
    total = mixture(colours, len(x)).log_prob(x).exp().sum()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-12, atol=0)


@pytest.mark.parametrize("colours", [1, 3])
def test_draws_follow_the_probabilities(colours: int) -> None:
    """Every cell of the grid within 4.5 standard errors."""
    torch.manual_seed(1)
    n, x = 100_000, grid(colours)
    expected = mixture(colours, len(x)).log_prob(x).exp()
    drawn = mixture(colours, n).sample()
    assert drawn.shape == (n, colours, 1, 1)
    levels = ((drawn + 1) / 2 * (LEVELS - 1)).round().long().flatten(1)
    assert torch.allclose(drawn.flatten(1), levels.double() / (LEVELS - 1) * 2 - 1)
    cell = (levels * torch.tensor([LEVELS**c for c in reversed(range(colours))])).sum(1)
    counts = torch.bincount(cell, minlength=LEVELS**colours)
    error = (expected * (1 - expected) * n).sqrt()
    assert bool(((counts - expected * n).abs() <= 4.5 * error + 1).all())


def test_green_and_blue_follow_the_colours_before() -> None:
    """With scales near 0 the draw is μ, then μ + c x: the chain of locations, and that of the mean."""
    loc = torch.tensor([0.5, 0.0, -0.25], dtype=torch.float64).view(1, 1, 3, 1, 1)
    c = torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64).view(1, 1, 3, 1, 1)
    sharp = DiscretizedLogisticMixture(torch.zeros(1, 1, 1, 1), loc, torch.full_like(loc, -7), c, levels=9)
    expected = torch.tensor([0.5, 0.25, -0.25 + 0.5 + 0.25], dtype=torch.float64).view(1, 3, 1, 1)
    torch.testing.assert_close(sharp.mean, expected)
    torch.testing.assert_close(sharp.sample(), expected)
    torch.testing.assert_close(sharp.log_prob(expected), torch.zeros(1, dtype=torch.float64), rtol=0, atol=1e-12)


def test_mean_is_weighted_over_components() -> None:
    logits = torch.tensor([0.0, 1.0]).log().add(1e-9).view(1, 2, 1, 1)
    loc = torch.tensor([-0.5, 7.0]).view(1, 2, 1, 1, 1)
    found = DiscretizedLogisticMixture(logits, loc, torch.zeros_like(loc)).mean
    torch.testing.assert_close(found, torch.ones(1, 1, 1, 1))  # the second alone, clamped to the range


def test_far_tails_stay_finite_with_gradients() -> None:
    loc = torch.full((1, 1, 3, 1, 1), 40.0, requires_grad=True)
    far = DiscretizedLogisticMixture(torch.zeros(1, 1, 1, 1), loc, torch.full((1, 1, 3, 1, 1), -7.0))
    log_p = far.log_prob(torch.zeros(1, 3, 1, 1))
    (gradient,) = torch.autograd.grad(log_p.sum(), loc)
    assert torch.isfinite(log_p).all()
    assert float(log_p.detach()) < -1e4
    assert torch.isfinite(gradient).all()


def test_top_takes_the_tail_from_where_it_is_told() -> None:
    """A model that counts the last two levels as the highest gives both the mass above the lower one's bin."""
    below = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
    plain, told = mixture(1).log_prob(below), mixture(1, top=0.4).log_prob(below)
    both = plain.exp() + mixture(1).log_prob(torch.ones_like(below)).exp()
    torch.testing.assert_close(told.exp(), both)


def test_sample_shape_and_observed() -> None:
    base = mixture(3, 2)
    assert base.sample((4, 3)).shape == (4, 3, 2, 3, 1, 1)
    seen = Observed(base, lambda x: 2 * x - 1, lambda y: (y + 1) / 2)
    x = seen.sample()
    torch.testing.assert_close(seen.log_prob(x), base.log_prob(2 * x - 1))
    torch.testing.assert_close(2 * seen.mean - 1, base.mean)
    assert seen.event_shape == (3, 1, 1)


def test_floor_is_added_to_every_probability() -> None:
    x = torch.linspace(0, 1, 256, dtype=torch.float64)
    loc, scale = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.001, dtype=torch.float64)
    plain, raised = DiscretizedLogistic(loc, scale), DiscretizedLogistic(loc, scale, floor=1e-7)
    torch.testing.assert_close(raised.log_prob(x).exp(), plain.log_prob(x).exp() + 1e-7)
