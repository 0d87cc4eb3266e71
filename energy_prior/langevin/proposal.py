"""The maths of a step's proposal, y' = c₀ y + c₁ g + τ n: its coefficients, the cut of its drift, and the move itself."""

from __future__ import annotations

__all__ = ["Scheme", "StepCoefficients", "coefficients", "cut_drift", "propose"]

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from energy_prior._util import per_row, sum_event
from energy_prior.topdown import Space

Scheme = Literal["crank_nicolson", "euler"]
"""How the Gaussian part of a noise-space density is discretised: half implicitly, or explicitly (Euler–Maruyama)."""


class StepCoefficients(NamedTuple):
    """The coefficients of y' = c₀ y + c₁ g + τ n; each broadcasts against (batch,).

    Attributes:
        c0: c₀, () or (batch,), no unit.
        c1: c₁, () or (batch,), the square of the position's unit, as g is in nats per unit of the position.
        tau: τ, () or (batch,), in units of the position: of ε_i, or of z_i.
    """

    c0: Tensor
    c1: Tensor
    tau: Tensor


def coefficients(step_size: Tensor, scheme: Scheme, space: Space, temperature: float = 1.0) -> StepCoefficients:
    """Coefficients of one step of size s on p̃^{1/T}, with g as in `Evaluation.gradient`.

    From ε' = ε + ½ s² ∇log p̃(ε)/T + s n, with a = s²/(4T):

        euler, latent space:   c₀ = 1,                c₁ = 2a,          τ = s
        euler, noise space:    c₀ = 1 − 2a,           c₁ = 2a,          τ = s
        Crank–Nicolson:        c₀ = (1 − a)/(1 + a),  c₁ = 2a/(1 + a),  τ = s/(1 + a)

    Crank–Nicolson puts (ε + ε')/2 for ε in the Gaussian drift −½s²ε/T (Cotter, Roberts, Stuart and White, Statistical
    Science 2013, the pCNL proposal with δ = s²/2): N(0, T·I) is exactly invariant for f = 0 at every s, where Euler's
    stationary variance is T/(1 − s²/(4T)).

    Args:
        step_size: s > 0, () or one per chain, (batch,), in units of the position: of ε_i, or of z_i.
        scheme: "crank_nicolson" (noise space only) or "euler".
        space: coordinates of the chain.
        temperature: T > 0 of the chain; the target is p̃^{1/T}.

    Examples:
        >>> c = coefficients(torch.tensor(0.5), "crank_nicolson", "noise")
        >>> [round(float(value), 3) for value in c]
        [0.882, 0.118, 0.471]
    """
    a = step_size**2 / (4 * temperature)
    if scheme == "crank_nicolson":
        return StepCoefficients((1 - a) / (1 + a), 2 * a / (1 + a), step_size / (1 + a))
    return StepCoefficients(1 - 2 * a if space == "noise" else torch.ones_like(a), 2 * a, step_size)


def cut_drift(gradient: Sequence[Tensor], c: StepCoefficients, max_drift: float) -> tuple[tuple[Tensor, ...], Tensor]:
    """Each layer's g cut so that ‖c₁ g_i‖ ≤ max_drift · τ √d_i, `max_drift` times the length of the noise.

    A truncated drift (MALTA of Roberts and Tweedie, Bernoulli 1996): a chain cannot be thrown off by a steep spot, and as
    the cut depends on the position alone, Metropolis–Hastings with it at both ends stays exact.

    Args:
        gradient: g of each free layer, (batch, *shape), nats per unit of the position.
        c: coefficients of the step.
        max_drift: > 0; at 1 a cut drift is as long as the noise that comes with it.

    Returns:
        g of each layer as the step uses it, (batch, *shape), nats per unit of the position, and whether each chain's was cut in
        any layer, (batch,), bool.

    Examples:
        >>> from energy_prior.langevin import coefficients
        >>> c = coefficients(torch.tensor(1.0), "euler", "latent")
        >>> (g,), was_cut = cut_drift([torch.tensor([[3.0, 4.0], [0.3, 0.4]])], c, max_drift=1.0)
        >>> g.norm(dim=1), was_cut
        (tensor([2.8284, 0.5000]), tensor([ True, False]))
    """
    gradients, cut = [], torch.zeros_like(gradient[0].flatten(1)[:, 0], dtype=torch.bool)
    for g in gradient:
        limit = max_drift * c.tau * math.sqrt(g[0].numel()) / c.c1
        length = sum_event(g**2).sqrt()
        over = length > limit  # False where the length is not finite: that is for the chain's watch to report
        gradients.append(g * per_row(torch.where(over, limit / length, 1.0), g))
        cut = cut | over
    return tuple(gradients), cut


def propose(
    position: Sequence[Tensor], drift: Sequence[Tensor], c: StepCoefficients, noise: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The Langevin step y' = c₀ y + c₁ g + τ n of every free layer.

    Args:
        position: y, (batch, *shape) each: ε_i in noise space, z_i in latent space.
        drift: g, as `cut_drift` leaves it, (batch, *shape) each, nats per unit of the position.
        c: coefficients of the step.
        noise: n, noise of N(0, 1), (batch, *shape) each.

    Returns:
        y', (batch, *shape) each: ε_i in noise space, z_i in latent space.

    Examples:
        >>> from energy_prior.langevin import coefficients
        >>> c = coefficients(torch.tensor(1.0), "euler", "latent")  # c₀ = 1, c₁ = ½, τ = 1
        >>> propose([torch.tensor([[1.0]])], [torch.tensor([[2.0]])], c, [torch.tensor([[-0.5]])])
        (tensor([[1.5000]]),)
    """
    return tuple(
        per_row(c.c0, y) * y + per_row(c.c1, y) * g + per_row(c.tau, y) * n
        for y, g, n in zip(position, drift, noise, strict=True)
    )
