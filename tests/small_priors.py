"""Small priors whose energies are not 0, for tests of chains."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from energy_prior import ConvEnergy, DenoisingEnergy, JointEBMPrior, LadderVAE
from energy_prior.langevin import InjectedNoise, Target
from energy_prior.topdown import Space

N, STEPS = 6, 8
"""Chains of a batch, and steps of a chain."""


def lively(generator: Any, space: Any = "noise") -> JointEBMPrior:
    """A prior in float64 around a generator, with its own energies if it has some."""
    energies = getattr(generator, "energies", None)
    prior = JointEBMPrior(generator, energies, space=space).double()
    for f in prior.energies if energies is None else ():
        enliven(f)
    return prior


def enliven(energy: Any, std: float = 0.5) -> None:
    """Draws the weights that start at 0, so that a built-in energy is not 0."""
    if isinstance(energy, DenoisingEnergy):
        for parameter in energy.net.parameters():
            if not bool(parameter.any()):
                nn.init.normal_(parameter, std=std / 10)
    else:
        nn.init.normal_(energy.net[-1].weight, std=std)


def mlp() -> LadderVAE:
    """Two layers of 4 and 3 units."""
    return LadderVAE((6,), latent_dims=(4, 3), hidden=16)


def conv() -> LadderVAE:
    """Two layers of feature maps."""
    return LadderVAE((1, 8, 8), latent_dims=(2, 3), hidden=4, depth=1, nets="conv")


def conv_of_few_operations(space: Space = "noise") -> JointEBMPrior:
    """The same with an energy of z_i alone per layer, whose step a compiled backend makes as a loop."""
    generator = conv()
    prior = JointEBMPrior(generator, [ConvEnergy(shape) for shape in generator.latent_shapes], space=space).double()
    for f in prior.energies:
        enliven(f)
    return prior


def target_of(prior: JointEBMPrior, n: int = N, held: Any = None, x: Any = None) -> Target:
    """What the prior's chains draw from."""
    return Target(prior.generator, list(prior.energies), prior.space, n, held or {}, x)


def injected(prior: JointEBMPrior, free: tuple[int, ...] = (1, 2), n: int = N, steps: int = STEPS) -> InjectedNoise:
    """Noise in float64 for the free layers, with numbers for accept tests."""
    shapes = [prior.generator.latent_shapes[i - 1] for i in free]
    normals = [torch.randn(steps + 1, n, *s).double() for s in shapes]
    return InjectedNoise(normals, torch.rand(steps + 1, n).double())
