"""Layers without an energy: f = 0 beside energies of z_i and beside those that read noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from energy_prior import ArgumentError, FlatEnergy, JointEBMPrior, LadderVAE, ResidualVAE, default_energies
from energy_prior.langevin.waymarks import cross


def ladder() -> Any:
    torch.manual_seed(0)
    return LadderVAE((1, 6, 6), latent_dims=(4, 3, 2), hidden=8).eval()


def maps() -> Any:
    torch.manual_seed(0)
    return ResidualVAE((1, 8, 8), groups=(1, 1), channels=8, latent_channels=2).eval()


@pytest.mark.parametrize("make", [ladder, maps])
def test_the_top_alone_learns(make: Any, tmp_path: Path) -> None:
    """By the rule that is chosen for the layers; the other layers keep the generator's own conditional."""
    vae = make()
    top = len(vae.latent_shapes)
    prior = JointEBMPrior(vae, default_energies(vae.latent_shapes, layers=[top]))
    assert {name.split(".")[0] for name, _ in prior.energies.named_parameters()} == {str(top - 1)}
    prior.fit(torch.rand(64, *vae.x_shape), iterations=4, batch_size=16, progress=False)
    z = prior.sample_latents(8, steps=3)
    f = prior.negative_energy(z)
    assert bool((f[:, :-1] == 0).all())
    assert bool((f[:, -1] != 0).all())
    assert prior.llr_scores(torch.rand(3, *vae.x_shape), steps=2).shape == (3, top)
    prior.save(tmp_path / "prior.safetensors")
    again = JointEBMPrior.load(tmp_path / "prior.safetensors", vae)
    assert [type(f) for f in again.energies[:-1]] == [FlatEnergy] * (top - 1)
    assert torch.equal(again.negative_energy(z), f)


def test_waymarks_leave_layers_alone_that_no_energy_reads() -> None:
    vae = maps()
    for layers, moved in (([2], [False, True]), ([1], [True, True])):  # f_1 reads ε_2 too
        prior = JointEBMPrior(vae, default_energies(vae.latent_shapes, layers=layers))
        for p in prior.parameters():
            p.data.add_(0.1)
        noise = [torch.randn(2, *shape) for shape in vae.latent_shapes]
        ends = cross(prior.model.target(2).density(), noise, levels=4)
        assert [not torch.equal(a, b) for a, b in zip(noise, ends, strict=True)] == moved


@pytest.mark.parametrize("layers", [[], [0], [4], [1, 1], 2, "1", [1.5]])
def test_layers_have_to_be_numbers_of_layers(layers: Any) -> None:
    with pytest.raises(ArgumentError, match=r"layers: expected one or more different layers, .* to 3, got"):
        default_energies([(4,), (3,), (2,)], layers=layers)
