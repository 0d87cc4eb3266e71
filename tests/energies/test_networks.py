"""Energy networks: any latent shape, f = 0 at the start, smooth, standardised once, and a gradient to every parameter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from energy_prior import (
    ArgumentError,
    ConvEnergy,
    Energy,
    JointEBMPrior,
    LadderVAE,
    MLPEnergy,
    ShapeError,
)
from energy_prior.energies import build_energies, describe_energies
from energy_prior.energies.networks import LatentEnergy


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


def test_energies_stay_below_100_nats() -> None:
    for f in (MLPEnergy((5,)), ConvEnergy((2, 4, 4))):
        with torch.no_grad():
            f.net[-1].bias.fill_(1e4)  # type: ignore[index]
            assert float(f(torch.zeros(1, *f.latent_shape))) == pytest.approx(100.0, rel=1e-3)


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
def test_the_scale_is_set_once(f: LatentEnergy, shape: tuple[int, ...]) -> None:
    z = 5 + 3 * torch.randn(4000, *f.latent_shape)
    f.set_from([z[::2]], [z[1::2]])
    assert f.shift.shape == f.scale.shape == shape
    torch.testing.assert_close(f.shift, torch.full(shape, 5.0), atol=0.3, rtol=0)
    torch.testing.assert_close(f.scale, torch.full(shape, 3.0), atol=0.3, rtol=0)
    kept = f.shift.clone()
    f.set_from([100 * z], [100 * z])
    assert torch.equal(f.shift, kept)


def test_spectral_norm_bounds_the_hidden_layers() -> None:
    f = MLPEnergy((8,), hidden=(32,), spectral_norm=True)
    linear = f.net[1]  # type: ignore[index]
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        linear.parametrizations.weight.original.mul_(50)  # type: ignore[union-attr]
    f.train()
    for _ in range(50):
        f(torch.randn(2, 8))
    assert float(torch.linalg.matrix_norm(linear.weight.detach(), 2)) == pytest.approx(1.0, abs=0.02)


def kinds_of_numbers() -> list[Energy]:
    """Energies with every setting as a number, or a sequence, of another kind."""
    mlps: list[tuple[Any, ...]] = [
        (np.array([4]), np.array([6, 5]), np.str_("silu"), np.bool_(True), np.float32(3)),
        (iter([np.int64(4)]), iter([6, 5]), "silu", True, torch.tensor(3.0)),
        (torch.tensor([4]), torch.tensor([6, 5]), "silu", True, 3),
    ]
    convs: list[tuple[Any, ...]] = [
        (np.array([2, 4, 4]), (np.int32(n) for n in (3, 4)), "silu", np.bool_(False), None),
        ((n for n in (2, 4, 4)), torch.tensor([3, 4]), "silu", False, None),
    ]
    return [*(MLPEnergy(*settings) for settings in mlps), *(ConvEnergy(*settings) for settings in convs)]


def test_settings_of_any_kind_of_number() -> None:
    """A checkpoint gets plain values, of which the same energy is built again."""
    built = kinds_of_numbers()
    described = json.loads(json.dumps(describe_energies(built)))
    mlp = {"kind": "MLPEnergy", "latent_shape": [4], "saturation": 3.0, "hidden": [6, 5], "spectral_norm": True}
    conv = {"kind": "ConvEnergy", "latent_shape": [2, 4, 4], "saturation": None, "channels": [3, 4], "spectral_norm": False}
    assert described == [entry | {"activation": "silu"} for entry in [mlp] * 3 + [conv] * 2]
    assert {type(value) for f in built for value in f.config.values()} == {list, str, bool, float, type(None)}
    weights = {f"energies.{name}": value.shape for name, value in nn.ModuleList(built).state_dict().items()}
    for energy, again in zip(built, build_energies(described, [f.latent_shape for f in built], weights), strict=True):
        assert repr(again) == repr(energy)
        again.load_state_dict(energy.state_dict())


def test_a_prior_of_such_energies_is_saved_after_the_fit(tmp_path: Path) -> None:
    vae = LadderVAE((5,), (4, 4), hidden=8)
    prior = JointEBMPrior(vae, kinds_of_numbers()[:2])
    prior.fit(torch.rand(16, 5), iterations=2, batch_size=8, progress=False)
    prior.save(tmp_path / "prior.safetensors")
    again = JointEBMPrior.load(tmp_path / "prior.safetensors", vae)
    z = prior.sample_latents(2, steps=0)
    assert torch.equal(again.negative_energy(z), prior.negative_energy(z))


def test_another_default_device_changes_nothing() -> None:
    f, z = MLPEnergy((4,)), torch.randn(3, 4)
    torch.set_default_device("meta")
    try:
        f.set_from([z[::2]], [z[1::2]])
        assert f(z).device.type == "cpu"
    finally:
        torch.set_default_device(None)
    assert float(f.shift[0]) == pytest.approx(float(z[:, 0].mean()))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: MLPEnergy((4,), activation="relu"), ArgumentError, "activation: expected one of .*'silu'.* got 'relu'"),
        (lambda: MLPEnergy((4,), hidden=(0,)), ArgumentError, "hidden: expected a whole number of at least 1, got 0"),
        (lambda: MLPEnergy((4,), activation=3), ArgumentError, "activation: expected one of"),  # type: ignore[arg-type]
        (lambda: MLPEnergy((4,), hidden=16), ArgumentError, "hidden: expected a sequence"),  # type: ignore[arg-type]
        (lambda: MLPEnergy((4,), hidden="16"), ArgumentError, "hidden: expected a sequence"),  # type: ignore[arg-type]
        (lambda: MLPEnergy((4,), hidden=(16.5,)), ArgumentError, "hidden: expected a whole number"),  # type: ignore[arg-type]
        (lambda: MLPEnergy((4,), spectral_norm="no"), ArgumentError, "spectral_norm: expected True or False"),  # type: ignore[arg-type]
        (lambda: MLPEnergy(()), ShapeError, "latent_shape: expected one or more positive sizes"),
        (lambda: MLPEnergy("44"), ShapeError, "latent_shape: expected one or more positive sizes"),  # type: ignore[arg-type]
        (lambda: ConvEnergy((2, 4, 4), channels="44"), ArgumentError, "channels: expected a sequence"),  # type: ignore[arg-type]
        (lambda: ConvEnergy((4,)), ShapeError, r"latent_shape: ConvEnergy needs \(channels, height, width\), got \(4,\)"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
