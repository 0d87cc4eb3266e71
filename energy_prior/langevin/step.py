"""The pure Langevin step, y' = c₀ y + c₁ g(y) + τ n with n ~ N(0, I), and its Metropolis–Hastings acceptance."""

from __future__ import annotations

__all__ = ["Scheme", "StepCoefficients", "coefficients", "log_acceptance", "propose", "tame"]

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from energy_prior._util import sum_event
from energy_prior.langevin.density import ChainState
from energy_prior.topdown import Space

Scheme = Literal["crank_nicolson", "euler"]
"""How the Gaussian part of a noise-space density is discretised: half implicitly, or explicitly (Euler–Maruyama)."""


class StepCoefficients(NamedTuple):
    """c₀, c₁ and τ of y' = c₀ y + c₁ g + τ n; each broadcasts against (batch,)."""

    keep: Tensor
    drift: Tensor
    noise: Tensor


def coefficients(step_size: Tensor, scheme: Scheme, space: Space, temperature: float = 1.0) -> StepCoefficients:
    """Coefficients of one step of size s on p̃^{1/T}, with g as in `ChainState.gradient`.

    From ε' = ε + ½ s² ∇log p̃(ε)/T + s n, with a = s²/(4T):

        euler, latent space:   c₀ = 1,                c₁ = 2a,          τ = s
        euler, noise space:    c₀ = 1 − 2a,           c₁ = 2a,          τ = s
        Crank–Nicolson:        c₀ = (1 − a)/(1 + a),  c₁ = 2a/(1 + a),  τ = s/(1 + a)

    Crank–Nicolson puts (ε + ε')/2 for ε in the Gaussian drift −½s²ε/T (Cotter, Roberts, Stuart and White, Statistical
    Science 2013, the pCNL proposal with δ = s²/2): N(0, T·I) is exactly invariant for f = 0 at every s, where Euler's
    stationary variance is T/(1 − s²/(4T)).

    Args:
        step_size: s > 0, a scalar or one per chain, (batch,).
        scheme: "crank_nicolson" (noise space only) or "euler".
        space: coordinates of the chain.
        temperature: T > 0 of the chain; the target is p̃^{1/T}.
    """
    a = step_size**2 / (4 * temperature)
    if scheme == "crank_nicolson":
        return StepCoefficients((1 - a) / (1 + a), 2 * a / (1 + a), step_size / (1 + a))
    return StepCoefficients(1 - 2 * a if space == "noise" else torch.ones_like(a), 2 * a, step_size)


def tame(state: ChainState, c: StepCoefficients, taming: float) -> tuple[ChainState, Tensor]:
    """The state with each layer's drift cut to `taming` times the length of the noise, ‖c₁ g_i‖ ≤ taming · τ √d_i.

    A truncated drift (MALTA of Roberts and Tweedie, Bernoulli 1996): a chain cannot be thrown off by a steep spot, and as
    the cut depends on the position alone, Metropolis–Hastings with it at both ends stays exact.

    Args:
        state: where the chain is.
        c: coefficients of the step.
        taming: > 0; at 1 a cut drift is as long as the noise that comes with it.

    Returns:
        The state, and whether each chain's drift was cut in any layer, (batch,).
    """
    gradients, cut = [], torch.zeros_like(state.log_density, dtype=torch.bool)
    for g in state.gradient:
        limit = taming * c.noise * math.sqrt(g[0].numel()) / c.drift
        length = sum_event(g**2).sqrt()
        over = length > limit  # False where the length is not finite: that is for the chain's watch to report
        gradients.append(g * _match(torch.where(over, limit / length, 1.0), g))
        cut = cut | over
    return dataclasses.replace(state, gradient=tuple(gradients)), cut


def propose(state: ChainState, c: StepCoefficients, noise: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One unadjusted step from `state` with the injected standard normal `noise`, one tensor per free layer."""
    return tuple(
        _match(c.keep, y) * y + _match(c.drift, y) * g + _match(c.noise, y) * n
        for y, g, n in zip(state.position, state.gradient, noise, strict=True)
    )


def log_acceptance(
    old: ChainState, new: ChainState, c: StepCoefficients, noise: Sequence[Tensor], temperature: float = 1.0
) -> Tensor:
    """log of the Metropolis–Hastings ratio of the step old -> new made with `noise`, (batch,).

    log α = [log p̃(y') − log p̃(y)]/T + ½‖n‖² − ½‖n'‖², where n' = (y − c₀ y' − c₁ g(y'))/τ would lead back. A proposal
    of density zero has log α = −∞.
    """
    ratio = (new.log_density - old.log_density) / temperature
    for y, y_new, g_new, n in zip(old.position, new.position, new.gradient, noise, strict=True):
        back = (y - _match(c.keep, y) * y_new - _match(c.drift, y) * g_new) / _match(c.noise, y)
        ratio = ratio + 0.5 * (sum_event(n**2) - sum_event(back**2))
    return torch.where(torch.isneginf(new.log_density), new.log_density, ratio)


def _match(coefficient: Tensor, y: Tensor) -> Tensor:
    """A scalar or (batch,) coefficient, shaped to multiply y of shape (batch, …)."""
    return coefficient.reshape(-1, *([1] * (y.ndim - 1))) if coefficient.ndim else coefficient
