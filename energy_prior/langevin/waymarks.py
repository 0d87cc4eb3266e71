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

    With θ the angle of a waymark, α = cos θ, σ = sin θ, the mean of ε_q given ε is e(ε; θ) = α ε + (σ²/α) ∇ Σ f(·; t), that of
    n is (ε − α e)/σ, and the flow moves ε along the arc between the two. A step from θ to θ' < θ takes both as constant (DDIM:
    Song, Meng and Ermon, ICLR 2021), with e extrapolated to the middle of the step from this waymark and the one before (in the
    first step e of this one), so that the error falls with the square of the number of steps (a multistep solver, as
    DPM-Solver++ of Lu et al., 2022, is in log α/σ). It draws no random numbers, and each step costs one gradient. A layer that
    no energy depends on stays where it is, as N(0, I) does.

    Args:
        density: the target, of which `can_cross`.
        noise: ε of the free layers, ascending, (batch, *shape) each.
        levels: number of steps, ≥ 1.
    """
    position, before = tuple(noise), None
    levels_down = [LAST_LEVEL * n / levels for n in range(levels, -1, -1)]
    for here, following in zip(levels_down, levels_down[1:], strict=False):
        theta, to = angle(here), angle(following)
        alpha, sigma = math.cos(theta), math.sin(theta)
        gradient = density.gradient_at(position, position[0].new_full((len(position[0]),), here))
        expected = tuple(e if g is None else alpha * e + sigma**2 / alpha * g for e, g in zip(position, gradient, strict=True))
        middle = expected if before is None else tuple(1.5 * e - 0.5 * b for e, b in zip(expected, before, strict=True))
        position = tuple(
            e if g is None else math.cos(to) * m + math.sin(to) / sigma * (e - alpha * m)
            for e, m, g in zip(position, middle, gradient, strict=True)
        )
        before = expected
    return position
