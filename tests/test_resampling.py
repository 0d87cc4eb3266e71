"""Draws of the joint prior by importance resampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ladders import LinearLadder
from torch import nn

from energy_prior import ArgumentError, ChainWarning, DivergenceError, JointEBMPrior
from energy_prior.resampling import resampled


def prior() -> tuple[LinearLadder, JointEBMPrior]:
    ladder = LinearLadder((3, 2))
    return ladder, JointEBMPrior(ladder, ladder.energies)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("max_memory", [2.0**30, 2.0**16])
def test_moments_are_those_of_the_joint_prior(max_memory: float) -> None:
    """Also where the proposals go by in parts, of draws and of proposals."""
    ladder, joint = prior()
    z = torch.cat(joint.sample_latents(4000, method="resample", proposals=200, max_memory=max_memory, rng=seeded()), 1)
    mean, covariance = ladder.tilted()
    error = covariance.diag().div(len(z)).sqrt()
    assert bool(((z.mean(0) - mean).abs() < 4.5 * error + 0.01).all())
    torch.testing.assert_close(torch.cov(z.T), covariance, rtol=0, atol=0.1)


def test_effective_sample_size() -> None:
    """All of the proposals where f = 0; of a known ladder what independent weights give."""
    ladder, joint = prior()
    with joint._computing(seeded()) as model:
        found = resampled(model, 64, 3000, 2.0**18)
        latents = joint.sample_latents(200_000, prior="generator", rng=seeded())
        weights = model.negative_energy(latents).sum(1).exp()
    expected = float(3000 * weights.mean() ** 2 / weights.square().mean())
    assert float(found.effective_sample_size.mean()) == pytest.approx(expected, rel=0.03)
    plain = JointEBMPrior(ladder)
    with plain._computing(seeded()) as model:
        assert torch.allclose(resampled(model, 8, 50, 2.0**30).effective_sample_size, torch.tensor(50.0).double())


def test_images_of_them() -> None:
    _, joint = prior()
    images = joint.sample(5, method="resample", proposals=30, rng=seeded())
    z = joint.sample_latents(5, method="resample", proposals=30, rng=seeded())
    torch.testing.assert_close(images, joint.decode(z))


def test_few_that_count_are_said() -> None:
    ladder, _ = prior()

    class Far(nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return 30 * z.sum(1)

    joint = JointEBMPrior(ladder, [Far(), Far()])
    with pytest.warns(ChainWarning, match="of 100 proposals of the generator's prior 1.* count on average"):
        joint.sample(4, method="resample", proposals=100)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "rejection"}, "method: expected one of .*'langevin', 'resample'.* got 'rejection'"),
        ({"method": "resample", "proposals": 0}, "proposals: expected a whole number of at least 1, got 0"),
        ({"proposals": 50}, 'proposals: method="langevin" has none, got 50'),
        ({"method": "resample", "steps": 5}, "runs no chain: it takes max_memory of the options"),
        ({"method": "resample", "given": {2: torch.zeros(4, 2).double()}}, "neither `given`, `start` nor `noise`"),
        ({"method": "resample", "prior": "generator"}, 'prior="generator" is ancestral: it takes max_memory'),
    ],
)
def test_what_it_does_not_take(options: dict[str, Any], words: str) -> None:
    _, joint = prior()
    for draw in (joint.sample, joint.sample_latents):
        with pytest.raises(ArgumentError, match=words):
            draw(4, **options)


def test_energies_that_are_not_finite() -> None:
    ladder, joint = prior()
    ladder.energies[0].c.data.fill_(torch.nan)
    with pytest.raises(DivergenceError, match="values of Σ f_i at draws of the generator's prior are NaN or infinite"):
        joint.sample(4, method="resample", proposals=10)
