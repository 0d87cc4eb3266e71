"""Energy networks: any latent shape, f = 0 at the start, smooth, standardised once, and a gradient to every parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from energy_prior import ArgumentError, ConvEnergy, Energy, MLPEnergy, ShapeError, default_energies


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (MLPEnergy, (5,)),
        (MLPEnergy, (2, 3, 4)),
        (ConvEnergy, (3, 8, 8)),
        (ConvEnergy, (2, 1, 1)),
        (ConvEnergy, (4, 5, 3)),
        (ConvEnergy, (1, 17, 2)),
    ],
)
@pytest.mark.parametrize("spectral_norm", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "softplus", "tanh"])
def test_shapes_zero_start_and_gradients(make: Any, shape: tuple[int, ...], spectral_norm: bool, activation: str) -> None:
    f: Energy = make(shape, activation=activation, spectral_norm=spectral_norm)
    z = torch.randn(6, *shape, requires_grad=True)
    assert torch.equal(f(z), torch.zeros(6))
    f.train()
    (f(z) - torch.arange(6.0)).square().sum().backward()  # moves the head off zero
    with torch.no_grad():
        for p in f.parameters():
            p -= 0.1 * p.grad if p.grad is not None else 0.0
    f.zero_grad()
    z.grad = None
    f(z).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in f.parameters())
    assert z.grad is not None
    assert z.grad.abs().sum() > 0


def test_gradient_is_smooth() -> None:
    """∇f is Lipschitz: a finer grid has proportionally smaller jumps of the drift, which a ReLU net's kinks do not."""

    def worst_jump(f: nn.Module, points: int) -> float:
        z = torch.linspace(-2, 2, points, dtype=torch.float64).reshape(-1, 1).requires_grad_()
        (g,) = torch.autograd.grad(f(z).sum(), z)
        return float(g.diff(dim=0).abs().max())

    f = MLPEnergy((1,), hidden=(16, 16)).double()
    nn.init.normal_(f.net[-1].weight)  # type: ignore[arg-type]
    assert worst_jump(f, 8001) < 0.2 * worst_jump(f, 801)
    kinked = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 1)).double()
    assert worst_jump(kinked, 8001) > 0.5 * worst_jump(kinked, 801)


@pytest.mark.parametrize("make", [MLPEnergy, lambda shape, **options: ConvEnergy((*shape, 1, 1), **options)])
def test_energies_saturate_smoothly_and_keep_their_order(make: Any) -> None:
    f, g = make((3,), saturation=4.0).double(), make((3,), saturation=None).double()
    nn.init.normal_(g.net[-1].weight)
    f.net.load_state_dict(g.net.state_dict())
    z = torch.randn(200, *f.latent_shape, dtype=torch.float64) * torch.logspace(-3, 4, 200, dtype=torch.float64).view(
        -1, *[1] * len(f.latent_shape)
    )
    with torch.no_grad():
        free, bounded = g(z), f(z)
    assert float(free.abs().max()) > 1000
    assert float(bounded.abs().max()) < 4.0
    assert torch.equal(free.argsort(), bounded.argsort())
    near = free.abs() < 0.1
    assert near.any()
    torch.testing.assert_close(bounded[near], free[near], rtol=1e-3, atol=0)
    z.requires_grad_()
    torch.testing.assert_close(f(z), 4.0 * torch.sin(torch.atan(free / 4.0)))
    (slope,) = torch.autograd.grad(f(z).sum(), z)
    (free_slope,) = torch.autograd.grad(g(z).sum(), z)
    cut = (1 + (free / 4.0) ** 2) ** -1.5
    torch.testing.assert_close(slope, cut.view(-1, *[1] * len(f.latent_shape)) * free_slope)


def test_default_energies_stay_below_100_nats() -> None:
    for f in default_energies([(5,), (2, 4, 4)]):
        with torch.no_grad():
            f.net[-1].bias.fill_(1e4)  # type: ignore[union-attr, index]
            assert float(f(torch.zeros(1, *f.latent_shape))) == pytest.approx(100.0, rel=1e-3)  # type: ignore[misc]


def test_saturation_is_kept_with_the_weights() -> None:
    f, other = MLPEnergy((2,), (4,), saturation=3.0), MLPEnergy((2,), (4,), saturation=None)
    nn.init.normal_(f.net[-1].weight, std=5.0)  # type: ignore[arg-type]
    z = 10 * torch.randn(20, 2)
    other.load_state_dict(f.state_dict())
    assert torch.equal(f(z), other(z))
    assert float(f(z).detach().abs().max()) > 2.5


def test_saturation_in_half_precision_is_that_of_full_precision() -> None:
    """Its slope is a difference, of which bfloat16 would leave nothing."""
    f = MLPEnergy((2,), (4,), saturation=4.0)
    nn.init.normal_(f.net[-1].weight, std=20.0)  # type: ignore[arg-type]
    z = 10 * torch.randn(200, 2)
    slopes = []
    for enabled in (False, True):
        leaf = z.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = f(leaf)
        slopes.append(torch.autograd.grad(value.sum(), leaf)[0].norm(dim=1))
    assert torch.quantile((slopes[1] / slopes[0] - 1).abs(), 0.9) < 0.2


def test_energies_that_are_not_finite_do_not_saturate() -> None:
    f = MLPEnergy((2,), (4,))
    with torch.no_grad():
        f.net[-1].bias.fill_(1e30)  # type: ignore[union-attr]
        assert float(f(torch.zeros(1, 2))) == pytest.approx(100.0)
        f.net[-1].bias.fill_(float("inf"))  # type: ignore[union-attr]
        assert not torch.isfinite(f(torch.zeros(1, 2)))


@pytest.mark.parametrize("saturation", [0.0, -1.0, float("inf"), "much"])
def test_saturation_has_to_be_a_positive_number(saturation: Any) -> None:
    with pytest.raises(ArgumentError, match="saturation: expected a finite number above 0"):
        MLPEnergy((2,), saturation=saturation)


@pytest.mark.parametrize(("f", "shape"), [(MLPEnergy((4,)), (4,)), (ConvEnergy((2, 6, 6)), (2, 1, 1))])
def test_standardize_sets_the_scale_once(f: Energy, shape: tuple[int, ...]) -> None:
    z = 5 + 3 * torch.randn(4000, *f.latent_shape)
    f.standardize(z)
    assert f.shift.shape == f.scale.shape == shape
    torch.testing.assert_close(f.shift, torch.full(shape, 5.0), atol=0.3, rtol=0)
    torch.testing.assert_close(f.scale, torch.full(shape, 3.0), atol=0.3, rtol=0)
    kept = f.shift.clone()
    f.standardize(100 * z)
    assert torch.equal(f.shift, kept)


def test_spectral_norm_bounds_the_hidden_layers() -> None:
    f = MLPEnergy((8,), hidden=(32,), spectral_norm=True)
    linear = f.net[1]
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        linear.parametrizations.weight.original.mul_(50)  # type: ignore[union-attr]
    f.train()
    for _ in range(50):
        f(torch.randn(2, 8))
    assert float(torch.linalg.matrix_norm(linear.weight.detach(), 2)) == pytest.approx(1.0, abs=0.02)


def test_default_energies_fit_the_shapes() -> None:
    kinds = [type(f) for f in default_energies([(16,), (4, 8, 8), (20, 1, 1), (3, 5)])]
    assert kinds == [MLPEnergy, ConvEnergy, MLPEnergy, MLPEnergy]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: MLPEnergy((4,), activation="relu"), ArgumentError, "activation: expected one of .*'silu'.* got 'relu'"),
        (lambda: MLPEnergy((4,), hidden=(0,)), ArgumentError, "hidden: expected a whole number of at least 1, got 0"),
        (lambda: MLPEnergy(()), ShapeError, "latent_shape: expected one or more positive sizes"),
        (lambda: ConvEnergy((4,)), ShapeError, r"latent_shape: ConvEnergy needs \(channels, height, width\), got \(4,\)"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
