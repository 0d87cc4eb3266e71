"""Discretised logistics and their mixtures: probabilities that sum to one, draws that follow them, tails that stay finite."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from energy_prior import ArgumentError, ShapeError
from energy_prior.generators.likelihoods import DiscretizedLogistic, DiscretizedLogisticMixture, InModelUnits
from energy_prior.generators.pixels import Likelihood, PixelLikelihood

LEVELS = 5


def mixture(
    colours: int, n: int = 1, bottom: float | None = None, top: float | None = None, spread: float = 1.0
) -> DiscretizedLogisticMixture:
    channels = 2 * (10 if colours == 3 else 3)
    g = torch.Generator().manual_seed(4)
    parameters = spread * torch.randn(1, channels, 1, 1, generator=g, dtype=torch.float64).expand(n, -1, -1, -1)
    return DiscretizedLogisticMixture.from_channels(parameters, colours=colours, levels=LEVELS, bottom=bottom, top=top)


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


@pytest.mark.parametrize("size", [30.0, 300.0, 1e4])
def test_gradients_are_finite_whatever_a_network_gives(size: float) -> None:
    """Scales beyond what float32 holds are infinitely wide logistics, not NaN in every gradient of the batch."""
    parameters = (size * torch.randn(4, 50, 3, 3, generator=torch.Generator().manual_seed(0))).requires_grad_()
    x = torch.randint(0, 256, (4, 3, 3, 3), generator=torch.Generator().manual_seed(1)) / 127.5 - 1
    log_p = DiscretizedLogisticMixture.from_channels(parameters).log_prob(x)
    assert bool(log_p.isfinite().all())
    assert bool(torch.autograd.grad(log_p.sum(), parameters)[0].isfinite().all())


def test_narrow_bins_are_exact() -> None:
    """log(1 − e^{−w}) on both sides of where its series takes over, against float64."""
    log_scale = torch.linspace(-1, 12, 200, dtype=torch.float64)[:, None, None, None, None]
    x, zero = torch.full((200, 1, 1, 1), 0.3, dtype=torch.float64), torch.zeros(200, 1, 1, 1, 1, dtype=torch.float64)
    log_p = DiscretizedLogisticMixture(zero[:, :, 0], zero, log_scale).log_prob(x)
    low, high = ((0.3 + sign / 255) * torch.exp(-log_scale.flatten()) for sign in (-1, 1))
    width = high - low
    exact = torch.special.expit(high).log() + torch.special.expit(-low).log() + torch.log(-torch.expm1(-width))
    torch.testing.assert_close(log_p, exact, rtol=1e-12, atol=1e-12)


def test_top_takes_the_tail_from_where_it_is_told() -> None:
    """A model that counts the last two levels as the highest gives both the mass above the lower one's bin."""
    below = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
    plain, told = mixture(1).log_prob(below), mixture(1, top=0.4).log_prob(below)
    both = plain.exp() + mixture(1).log_prob(torch.ones_like(below)).exp()
    torch.testing.assert_close(told.exp(), both)


def test_bottom_takes_the_tail_from_where_it_is_told() -> None:
    above = torch.full((1, 1, 1, 1), -0.5, dtype=torch.float64)
    plain, told = mixture(1).log_prob(above), mixture(1, bottom=-0.4).log_prob(above)
    both = plain.exp() + mixture(1).log_prob(-torch.ones_like(above)).exp()
    torch.testing.assert_close(told.exp(), both)


def published(x: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor, bottom: float, top: float) -> Tensor:
    """log Σ_m π_m (F((x + 1/255 − μ)/s) − F((x − 1/255 − μ)/s)) of one channel, its tails open below bottom and above top."""
    upper = torch.sigmoid((x[:, None] + 1 / 255 - loc) / log_scale.exp())
    lower = torch.sigmoid((x[:, None] - 1 / 255 - loc) / log_scale.exp())
    upper = torch.where(x[:, None] > top, torch.ones_like(upper), upper)
    lower = torch.where(x[:, None] < bottom, torch.zeros_like(lower), lower)
    return torch.log((logits.softmax(0) * (upper - lower)).sum(1))


@pytest.mark.parametrize(("bottom", "top"), [(-0.999, 0.999), (-0.999, 0.99), (None, None)])
@pytest.mark.parametrize("kind", ["8 bits", "dequantised"])
def test_published_formula(kind: str, bottom: float | None, top: float | None) -> None:
    """Around both ends of [−1, 1], where the edges decide, and in the middle."""
    levels = torch.tensor([0, 0, 0, 1, 2, 100, 200, 253, 254, 255, 255, 255], dtype=torch.float64)
    u = torch.tensor([0.05, 0.3, 0.7, 0.6, 0.9, 0.1, 0.4, 0.2, 0.95, 0.1, 0.6, 0.97], dtype=torch.float64)
    x = 2 * (levels / 255 if kind == "8 bits" else (levels + u) / 256) - 1
    logits = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    loc = torch.tensor([-1.0, 0.1, 1.02], dtype=torch.float64)
    log_scale = torch.tensor([-4.0, -1.0, -3.5], dtype=torch.float64)
    n = len(x)
    ours = DiscretizedLogisticMixture(
        logits.view(1, 3, 1, 1).expand(n, 3, 1, 1),
        loc.view(1, 3, 1, 1, 1).expand(n, 3, 1, 1, 1),
        log_scale.view(1, 3, 1, 1, 1).expand(n, 3, 1, 1, 1),
        bottom=bottom,
        top=top,
    ).log_prob(x.view(n, 1, 1, 1))
    edges = (-1 + 1 / 255 if bottom is None else bottom), (1 - 1 / 255 if top is None else top)
    torch.testing.assert_close(ours, published(x, logits, loc, log_scale, *edges), rtol=1e-10, atol=1e-10)


def test_settings_of_a_mixture_of_any_kind_of_number() -> None:
    logits, loc = torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1, 1)
    given: dict[str, Any] = {"levels": np.int64(16), "low": np.float32(0), "high": torch.tensor(1)}
    found = DiscretizedLogisticMixture(logits, loc, loc, **given, bottom=np.float64(0.25), top=0.5)
    settings = found.levels, found.low, found.high, found.bottom, found.top
    assert settings == (16, 0.0, 1.0, 0.25, 0.5)
    assert [type(value) for value in settings] == [int, float, float, float, float]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda z, m: DiscretizedLogisticMixture(z, m, m, levels=1), ArgumentError, "levels: expected a whole number"),
        (lambda z, m: DiscretizedLogisticMixture(z, m, m, low=1.0), ArgumentError, "low, high: expected .lowest, highest."),
        (
            lambda z, m: DiscretizedLogisticMixture(z, m, m, bottom=cast(Any, "-1")),
            ArgumentError,
            "bottom: expected a finite number",
        ),
        (lambda z, m: DiscretizedLogisticMixture(z, m, m, top=float("inf")), ArgumentError, "top: expected a finite number"),
        (lambda z, m: DiscretizedLogisticMixture(m, m, m), ShapeError, "expected logits of shape .batch, M, height, width."),
        (lambda z, m: DiscretizedLogisticMixture(z, m, m[:, :1]), ShapeError, "expected logits of shape"),
        (lambda z, m: DiscretizedLogisticMixture(z, m, m, m), ShapeError, "coefficients: expected 3 channels.*got 1"),
        (lambda z, m: DiscretizedLogisticMixture.from_channels(z), ShapeError, "parameters: expected 10·M channels"),
        (
            lambda z, m: DiscretizedLogisticMixture.from_channels(torch.zeros(1, 20, 1, 1), colours=2),
            ShapeError,
            "parameters: .* 20 for 2 colours",
        ),
    ],
)
def test_impossible_mixtures(call: Callable[[Tensor, Tensor], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1, 1))


def test_a_likelihood_is_in_the_dtype_of_its_weights() -> None:
    """Whatever autocast has made of the decoder's output."""
    for name in get_args(Likelihood):
        pixels = PixelLikelihood((1, 4, 4), name)
        found = pixels(torch.zeros(2, pixels.channels, 4, 4, dtype=torch.bfloat16))
        assert found.log_prob(torch.zeros(2, 1, 4, 4)).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("name", get_args(Likelihood))
def test_likelihoods_are_traced_in_one_piece(name: Likelihood) -> None:
    """Compiled posterior chains run them in every step: no check of arguments may stop the compiler."""
    pixels, x = PixelLikelihood((3, 2, 2), name), torch.randint(0, 2, (2, 3, 2, 2)).float()
    parameters = torch.randn(2, pixels.channels, 2, 2)

    def log_prob(parameters: Tensor) -> Tensor:
        return pixels(parameters).log_prob(x)

    torch._dynamo.reset()
    for dynamic in (False, True):
        traced = torch.compile(log_prob, fullgraph=True, backend="eager", dynamic=dynamic)
        torch.testing.assert_close(traced(parameters), log_prob(parameters))


def test_sample_shape_and_other_units() -> None:
    base = mixture(3, 2)
    assert base.sample((4, 3)).shape == (4, 3, 2, 3, 1, 1)
    seen = InModelUnits(base, lambda x: 2 * x - 1, lambda y: (y + 1) / 2)
    x = seen.sample()
    torch.testing.assert_close(seen.log_prob(x), base.log_prob(2 * x - 1))
    torch.testing.assert_close(2 * seen.mean - 1, base.mean)
    assert seen.event_shape == (3, 1, 1)


def test_floor_is_added_to_every_probability() -> None:
    x = torch.linspace(0, 1, 256, dtype=torch.float64)
    loc, scale = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.001, dtype=torch.float64)
    plain, raised = DiscretizedLogistic(loc, scale), DiscretizedLogistic(loc, scale, floor=1e-7)
    torch.testing.assert_close(raised.log_prob(x).exp(), plain.log_prob(x).exp() + 1e-7)


@pytest.mark.parametrize("scale", [0.02, 0.3, 5.0])
@pytest.mark.parametrize("loc", [-1.4, -0.1, 0.6, 2.0])
def test_discretized_logistic_sums_to_one_and_stays_finite(loc: float, scale: float) -> None:
    grid = torch.linspace(-1, 1, 17, dtype=torch.float64)
    d = DiscretizedLogistic(torch.tensor(loc).double(), torch.tensor(scale).double(), 17, -1.0, 1.0)
    log_p = d.log_prob(grid)
    assert torch.isfinite(log_p).all()
    assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=1e-12)
    draws = d.sample((20_000,))
    assert torch.isin(draws.mul(8).round(), grid.mul(8).round()).all()
    frequency = torch.stack([(draws - g).abs().lt(1e-6).double().mean() for g in grid])
    assert float((frequency - log_p.exp()).abs().max()) < 0.02


def test_discretized_logistic_far_from_its_centre_in_float32() -> None:
    d = DiscretizedLogistic(torch.tensor(0.9), torch.tensor(1e-3), 256)
    log_p = d.log_prob(torch.tensor([0.0, 0.1, 0.5, 1.0]))
    assert torch.isfinite(log_p).all()
    assert float(log_p.min()) < -500
