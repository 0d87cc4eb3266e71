"""Energies with waymarks: shapes, f = 0 at the start, the ratio between waymarks, and what a checkpoint keeps of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from small_priors import enliven
from torch import Tensor

from energy_prior import (
    ArgumentError,
    DenoisingEnergy,
    JointEBMPrior,
    LadderVAE,
    MLPEnergy,
    default_energies,
    denoising_energies,
)
from energy_prior.energies import LAST_LEVEL, waymark

SHAPES = [
    ((2, 8, 8), (3, 4, 4), (5,)),
    ((2, 14, 14), (2, 7, 7), (2, 7, 7)),
    ((3, 5, 4), (2, 9, 2)),
    ((4, 2, 2), (3, 1, 1)),
    ((6,), (2, 3), (4,)),
]


def noise_of(shapes: Sequence[Sequence[int]], n: int = 5) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(n, *shape, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize("shapes", SHAPES)
def test_shapes_zero_start_and_gradients(shapes: Sequence[Sequence[int]]) -> None:
    noise = tuple(e.requires_grad_() for e in noise_of(shapes))
    for layer, f in enumerate(denoising_energies(shapes, channels=4).double()):
        read = noise[layer:]
        assert torch.equal(f(read), torch.zeros(5, dtype=torch.float64))
        enliven(f)
        for level in (None, torch.tensor(0.4).double(), torch.linspace(0, LAST_LEVEL, 5).double()):
            value = f(read, level)
            assert value.shape == (5,)
            assert value.abs().sum() > 0
            gradients = torch.autograd.grad(value.sum(), read, create_graph=True)
            assert all(g.abs().sum() > 0 for g in gradients), "it depends on every layer that it reads"
        sum(g.square().sum() for g in gradients).backward()  # type: ignore[union-attr]
        assert all(p.grad is not None for name, p in f.named_parameters() if name == "net.out.weight")
        torch.testing.assert_close(f(read, torch.zeros(5).double()), f(read))


def test_rows_are_independent_and_nothing_is_left_at_the_prior() -> None:
    shapes = SHAPES[0]
    noise = noise_of(shapes)
    f = denoising_energies(shapes, channels=4)[0].double()
    enliven(f, 5.0)
    levels = torch.linspace(0, 1, 5).double()
    values = f(noise, levels).detach()
    for row in range(5):
        torch.testing.assert_close(f([e[row : row + 1] for e in noise], levels[row : row + 1]), values[row : row + 1])
    assert abs(float(values[-1])) < 1e-10 * abs(float(values[0]))


def test_is_bounded_in_proportion_to_the_layer() -> None:
    f = DenoisingEnergy((2, 8, 8), channels=4, saturation=0.5)
    enliven(f, 1e3)
    assert float(f.saturation) == 64
    assert float(f([noise_of([(2, 8, 8)], 3)[0].float()]).detach().abs().max()) <= 64


def test_latents_in_place_of_noise_are_refused() -> None:
    f = denoising_energies([(2, 8, 8), (3,)], channels=4)[0]
    with pytest.raises(ArgumentError, match=r"noise: expected the noise of 2 layers, \(ε_i, …, ε_L\), got one tensor"):
        f(torch.randn(3, 2, 8, 8))
    with pytest.raises(ArgumentError, match="got 1"):
        f([torch.randn(3, 2, 8, 8)])


def test_waymarks_go_from_little_noise_to_nothing_else() -> None:
    alpha, sigma = waymark(torch.tensor([0.0, 0.5, 1.0]).double())
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(3).double())
    assert float(sigma[0]) == pytest.approx(0.15)
    assert float(alpha[2]) == pytest.approx(0.0, abs=1e-12)


def test_maps_get_them_by_default_and_vectors_do_not() -> None:
    assert [type(f) for f in default_energies([(16,), (8,)])] == [MLPEnergy, MLPEnergy]
    assert [type(f) for f in default_energies([(2, 8, 8), (8,)])] == [DenoisingEnergy, DenoisingEnergy]


def test_checkpoint_keeps_all_of_them(tmp_path: Path) -> None:
    vae = LadderVAE((1, 8, 8), latent_dims=(2, 3), hidden=4, depth=1, nets="conv")
    prior = JointEBMPrior(vae, denoising_energies(vae.latent_shapes, channels=4))
    for f, shape in zip(prior.energies, vae.latent_shapes, strict=True):
        enliven(f)
        f.set_from([torch.randn(50, *shape) * 2], [])  # type: ignore[operator]
    prior.save(tmp_path / "prior.safetensors")
    again = JointEBMPrior.load(tmp_path / "prior.safetensors", vae)
    z = prior.sample_latents(3, prior="generator")
    assert torch.equal(again.negative_energy(z), prior.negative_energy(z))
    assert prior.negative_energy(z).abs().min() > 0
