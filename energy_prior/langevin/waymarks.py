"""The way from N(0, I) to the joint prior's noise, along the waymarks of its energies: where chains start."""

from __future__ import annotations

__all__ = ["can_cross", "cross"]

import math
from collections.abc import Sequence

from torch import Tensor

from energy_prior.energies import LAST_LEVEL, angle
from energy_prior.langevin.density import JointDensity
from energy_prior.protocol import have_waymarks


def can_cross(density: JointDensity) -> bool:
    """Whether the energies of all free layers have waymarks, and nothing below pulls at the free layers."""
    topdown = density.topdown
    free = [density.energies[i - 1] for i in topdown.free]
    return density.x is None and not topdown.held_below and have_waymarks(free)


def cross(density: JointDensity, noise: Sequence[Tensor], levels: int) -> tuple[Tensor, ...]:
    """Takes ε ~ N(0, I) of the free layers to noise of the joint prior, by the probability flow of its waymarks.

    With θ the angle of a waymark, α = cos θ, σ = sin θ, and v = (σ/α) ∇ Σ f(·; t), whose mean is σ ε_q − α n, the flow is
    dε/dθ = −v; a step from θ to θ' < θ is the rotation ε cos(θ − θ') + v sin(θ − θ') (DDIM: Song, Meng and Ermon, ICLR 2021,
    in the form of Salimans and Ho, ICLR 2022). It draws no random numbers, and each step costs one gradient.

    Args:
        density: the target, of which `can_cross`.
        noise: ε of the free layers, ascending, (batch, *shape) each.
        levels: number of steps, ≥ 1.
    """
    position = tuple(noise)
    angles = [angle(LAST_LEVEL * n / levels) for n in range(levels, -1, -1)]
    for n, (theta, following) in enumerate(zip(angles, angles[1:], strict=False)):
        level = position[0].new_full((len(position[0]),), LAST_LEVEL * (levels - n) / levels)
        gradient = density.gradient_at(position, level)
        keep, turn = math.cos(theta - following), math.sin(theta - following) * math.tan(theta)
        position = tuple(keep * e + turn * g for e, g in zip(position, gradient, strict=True))
    return position
