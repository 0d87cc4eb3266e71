"""A target whose σ_1 depends on z_2, with wild energies: reference moments by quadrature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import agrees
from ladders import ScaleLadder
from torch import Tensor

from energy_prior import JointEBMPrior
from energy_prior.langevin import ChainSettings, Evaluation, JointDensity, Target, sample_target
from energy_prior.process import frozen
from energy_prior.topdown import TopDown

CHAINS = 20_000
STEPS = 150


def z_scores(latents: Sequence[Tensor], reference: Tensor) -> Tensor:
    z1, z2 = (z[:, 0] for z in latents)
    values = torch.stack([z1, z2, z1**2, z2**2, z1 * z2], 1)
    spread = values.std(0)
    moving = spread > 1e-9
    return ((values.mean(0) - reference) / (spread / len(values) ** 0.5))[moving]


@pytest.mark.parametrize(("space", "step_size"), [("noise", 0.9), ("latent", 0.5)])
@pytest.mark.parametrize("held", [{}, {1: 0.7}, {2: -0.4}])
def test_moments(space: str, step_size: float | None, held: dict[int, float]) -> None:
    if 1 in held:
        step_size = None  # log p(z_1 | z_2) is steep far out: no one step fits all chains, the default adapts each one's own
    ladder = ScaleLadder()
    prior = JointEBMPrior(ladder, ladder.energies, space=space)  # type: ignore[arg-type]
    given = {layer: torch.full((CHAINS, 1), value, dtype=torch.float64) for layer, value in held.items()}
    rng = torch.Generator().manual_seed(3)
    z = prior.sample_latents(CHAINS, given=given, steps=STEPS, step_size=step_size, adjust=True, rng=rng)
    assert agrees(z_scores(z, ladder.moments(held)))


def test_posterior() -> None:
    ladder = ScaleLadder()
    prior = JointEBMPrior(ladder, ladder.energies)
    x = torch.full((CHAINS, 1), 1.3, dtype=torch.float64)
    z = prior.sample_posterior(x, steps=300, rng=torch.Generator().manual_seed(4))
    assert agrees(z_scores(z, ladder.moments(x=1.3)))


class WithoutJacobian(JointDensity):
    """The noise-space density of public reference code: Σ f_i + log p_β(T_β(ε)), the Jacobian of T_β left out."""

    def evaluate(self, position: Sequence[Tensor], **_: Any) -> Evaluation:
        with torch.enable_grad():
            leaves = tuple(p.detach().requires_grad_() for p in position)
            descent = self.topdown.descend(leaves, "noise")
            energy = torch.stack([f(z) for f, z in zip(self.energies, descent.latents, strict=True)], 1)
            log_density = energy.sum(1) + descent.log_priors().sum(1)
            gradient = torch.autograd.grad(log_density.sum(), leaves)
        gradient = tuple(g + p.detach() for g, p in zip(gradient, leaves, strict=True))
        return Evaluation(tuple(p.detach() for p in leaves), energy.detach(), log_density.detach(), gradient)


class TargetWithoutJacobian(Target):
    def density(self) -> JointDensity:
        return WithoutJacobian(TopDown(self.generator, self.batch_size, self.held), self.energies, self.space, self.x)


@pytest.mark.parametrize(("target", "right"), [(Target, True), (TargetWithoutJacobian, False)])
def test_the_density_without_the_jacobian_fails(target: type[Target], right: bool) -> None:
    ladder = ScaleLadder()
    torch.manual_seed(5)
    with torch.no_grad(), frozen(ladder):
        settings = ChainSettings(steps=STEPS, step_size=0.8, adjust=True)
        z = sample_target(target(ladder, ladder.energies, "noise", CHAINS), settings, default_step_size=0.8).latents
    assert agrees(z_scores(z, ladder.moments())) is right
