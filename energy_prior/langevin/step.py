"""The pure Langevin step, y' = c₀ y + c₁ g(y) + τ n with n ~ N(0, I), and its Metropolis–Hastings acceptance.

`begin`, `advance` and `finish` are the reference: every faster backend does the same with the same noise.
"""

from __future__ import annotations

__all__ = [
    "Carry",
    "Draw",
    "End",
    "Rules",
    "Scheme",
    "StepCoefficients",
    "Trace",
    "advance",
    "begin",
    "coefficients",
    "draws",
    "end_at",
    "finish",
    "health",
    "log_acceptance",
    "propose",
    "step",
    "tame",
]

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from energy_prior._util import not_none, sum_event
from energy_prior.langevin.density import ChainState, JointDensity, Precision, by_parts
from energy_prior.langevin.noise import NoiseSource
from energy_prior.topdown import Space

Scheme = Literal["crank_nicolson", "euler"]
"""How the Gaussian part of a noise-space density is discretised: half implicitly, or explicitly (Euler–Maruyama)."""


class StepCoefficients(NamedTuple):
    """c₀, c₁ and τ of y' = c₀ y + c₁ g + τ n; each broadcasts against (batch,)."""

    keep: Tensor
    drift: Tensor
    noise: Tensor


class Rules(NamedTuple):
    """What does not change from step to step.

    Attributes:
        scheme: "crank_nicolson" or "euler".
        temperature: T > 0; the chain targets p̃^{1/T}.
        adjust: accept or reject (MALA).
        adapt: each chain adapts its step size.
        target_acceptance: what the adaptation aims at.
        taming: longest drift as a multiple of the noise's length; None: the drift as it is.
        measured: densities and acceptances are computed.
        traced: f after every step is kept.
        precision: of the matrix products in the gradients.
    """

    scheme: Scheme
    temperature: float = 1.0
    adjust: bool = False
    adapt: bool = False
    target_acceptance: float = 0.7
    taming: float | None = None
    measured: bool = False
    traced: bool = False
    precision: Precision = "full"


class Carry(NamedTuple):
    """What a chain takes from step to step.

    Attributes:
        state: where it is.
        drift: ∇ as the next step uses it: that of `state`, or its tamed form.
        was_cut: whether `drift` was cut in any layer, (batch,), bool; None without taming.
        coefficients: of the step.
        step_size: s, (batch,).
        acceptance: probability of the last step, (batch,); None if not measured.
        accepted: sum of the acceptance probabilities so far, (batch,); None if not measured.
        cut: number of cut drifts that steps were made with so far, (batch,); None without taming.
    """

    state: ChainState
    drift: tuple[Tensor, ...]
    was_cut: Tensor | None
    coefficients: StepCoefficients
    step_size: Tensor
    acceptance: Tensor | None
    accepted: Tensor | None
    cut: Tensor | None


class Draw(NamedTuple):
    """What is new in a step.

    Attributes:
        noise: standard normal, one tensor per free layer.
        uniform: in [0, 1), (batch,); None without `adjust`.
        gain: of the step size's adaptation, a scalar; None without `adapt`.
    """

    noise: Sequence[Tensor]
    uniform: Tensor | None = None
    gain: Tensor | None = None


class Trace(NamedTuple):
    """What steps leave behind.

    Attributes:
        health: of every state that was proposed, (steps, …).
        energy: Σ_i f_i over the free layers after every step, (steps, batch), nats; None if not traced.
    """

    health: Tensor
    energy: Tensor | None


class End(NamedTuple):
    """Where a chain has arrived.

    Attributes:
        position: the free layers, ascending, in the density's coordinates.
        latents: (z_1, …, z_L), the held layers included.
        cut: as in `Carry`.
        health: finite where the position and its energies are: max |f_i| of each free layer, then ∑ of each.
    """

    position: tuple[Tensor, ...]
    latents: tuple[Tensor, ...]
    cut: Tensor | None
    health: Tensor


def draws(
    parts: Sequence[JointDensity], rules: Rules, noise: NoiseSource, first: int, count: int, gains: Tensor
) -> list[Sequence[Draw]]:
    """What is new in `count` steps from number `first` on, for each part: one draw for the whole batch, taken apart."""
    steps = []
    for number in range(first, first + count):
        normals = by_parts(parts, noise.normal(number))
        uniforms = by_parts(parts, (noise.uniform(number),)) if rules.adjust else [(None,)] * len(parts)
        gain = gains[number - 1] if rules.adapt else None
        steps.append([Draw(n, u, gain) for n, (u,) in zip(normals, uniforms, strict=True)])
    return list(zip(*steps, strict=True))


def begin(density: JointDensity, rules: Rules, position: Sequence[Tensor], step_size: Tensor) -> tuple[Carry, Trace]:
    """The chain before its first step, and its start as the trace of one step."""
    state = density.evaluate(position, with_density=rules.measured, precision=rules.precision)
    c = coefficients(step_size, rules.scheme, density.space, rules.temperature)
    drift, was_cut = _drift(state, c, rules)
    measured = (torch.ones_like(step_size), torch.zeros_like(step_size)) if rules.measured else (None, None)
    cut = None if rules.taming is None else torch.zeros_like(step_size)
    carry = Carry(state, drift, was_cut, c, step_size, *measured, cut)
    return carry, _trace(rules, [health(state, density_of_zero_is_bad=True)], [state])


def advance(density: JointDensity, rules: Rules, carry: Carry, new: Sequence[Draw]) -> tuple[Carry, Trace]:
    """Steps of every chain of the batch, one for each of `new`: propose, evaluate, accept or reject, adapt."""
    rows, states = [], []
    for draw in new:
        carry, sound = step(density, rules, carry, draw)
        rows.append(sound)
        states.append(carry.state)
    return carry, _trace(rules, rows, states)


def _trace(rules: Rules, rows: Sequence[Tensor], states: Sequence[ChainState]) -> Trace:
    energy = torch.stack([state.negative_energy.sum(1) for state in states]) if rules.traced else None
    return Trace(torch.stack(list(rows)), energy)


def finish(density: JointDensity, rules: Rules, carry: Carry, last: Sequence[Draw]) -> End:
    """The end of a chain, after one more step if `last` has a draw: without the evaluation that only a further step needs."""
    position, energy, cut = carry.state.position, carry.state.negative_energy, carry.cut
    for draw in last:
        position = propose(position, carry.drift, carry.coefficients, draw.noise)
        cut = None if cut is None else cut + not_none(carry.was_cut)
    end = end_at(density, position, None if last else energy)
    return End(end.position, end.latents, cut, end.health)  # torch 2.5 cannot compile `_replace`


def end_at(density: JointDensity, position: tuple[Tensor, ...], energy: Tensor | None) -> End:
    """The end of a chain at this position, with f_i of the free layers there, (batch, free layers), if they are known."""
    latents = density.topdown.descend(position, density.space).latents
    energy = density.negative_energy(latents) if energy is None else energy
    sums = torch.stack([p.sum() for p in position])
    return End(position, latents, None, torch.cat([energy.abs().amax(0).to(sums.dtype), sums]))


def step(density: JointDensity, rules: Rules, carry: Carry, draw: Draw) -> tuple[Carry, Tensor]:
    """One step of every chain of the batch, and the health of the state that it proposed."""
    c, s, old = carry.coefficients, carry.step_size, carry.state
    proposal = propose(old.position, carry.drift, c, draw.noise)
    new = density.evaluate(proposal, with_density=rules.measured, precision=rules.precision)
    drift, was_cut = _drift(new, c, rules)
    cut = None if rules.taming is None else not_none(carry.cut) + not_none(carry.was_cut)
    sound = health(new, density_of_zero_is_bad=not rules.adjust)
    if not rules.measured:
        return Carry(new, drift, was_cut, c, s, None, None, cut), sound
    log_alpha = log_acceptance(old, new, drift, c, draw.noise, rules.temperature)
    acceptance = log_alpha.exp().clamp(max=1.0)
    if rules.adjust:
        accept = not_none(draw.uniform).log() < log_alpha
        new = _select(accept, new, old)
        drift = tuple(_pick(accept, a, b) for a, b in zip(drift, carry.drift))
        was_cut = None if was_cut is None else _pick(accept, was_cut, not_none(carry.was_cut))
    if rules.adapt:
        s = s * torch.exp(not_none(draw.gain) * (acceptance - rules.target_acceptance))
        s = s.clamp(max=2 * math.sqrt(rules.temperature)) if rules.scheme == "crank_nicolson" else s
        c = coefficients(s, rules.scheme, density.space, rules.temperature)
        drift, was_cut = _drift(new, c, rules)
    return Carry(new, drift, was_cut, c, s, acceptance, not_none(carry.accepted) + acceptance, cut), sound


def _drift(state: ChainState, c: StepCoefficients, rules: Rules) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """∇ as the next step uses it, and whether each chain's was cut."""
    return (state.gradient, None) if rules.taming is None else tame(state.gradient, c, rules.taming)


def health(state: ChainState, *, density_of_zero_is_bad: bool) -> Tensor:
    """Finite where the state is: max |f_i| of each free layer, ∑ ∇_i of each, and the sum of the log density if it is there.

    Args:
        state: what to look at.
        density_of_zero_is_bad: False: rows of density zero (log p̃ = −∞), which Metropolis–Hastings rejects, do not count.

    Returns:
        (2 · free layers [+ 1],), in the dtype of the positions.
    """
    energy, gradient, log_density = state.negative_energy, state.gradient, state.log_density
    if log_density is not None and not density_of_zero_is_bad:
        zero = torch.isneginf(log_density)
        energy = energy.masked_fill(zero[:, None], 0.0)
        gradient = tuple(g.masked_fill(_match(zero, g), 0.0) for g in gradient)
        log_density = log_density.masked_fill(zero, 0.0)
    parts = [energy.abs().amax(0), torch.stack([g.sum() for g in gradient])]
    return torch.cat(parts if log_density is None else [*parts, log_density.sum()[None]])


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


def tame(gradient: Sequence[Tensor], c: StepCoefficients, taming: float) -> tuple[tuple[Tensor, ...], Tensor]:
    """Each layer's drift cut to `taming` times the length of the noise, ‖c₁ g_i‖ ≤ taming · τ √d_i.

    A truncated drift (MALTA of Roberts and Tweedie, Bernoulli 1996): a chain cannot be thrown off by a steep spot, and as
    the cut depends on the position alone, Metropolis–Hastings with it at both ends stays exact.

    Args:
        gradient: g of each free layer, (batch, *shape).
        c: coefficients of the step.
        taming: > 0; at 1 a cut drift is as long as the noise that comes with it.

    Returns:
        The gradients, and whether each chain's was cut in any layer, (batch,).
    """
    gradients, cut = [], torch.zeros_like(gradient[0].flatten(1)[:, 0], dtype=torch.bool)
    for g in gradient:
        limit = taming * c.noise * math.sqrt(g[0].numel()) / c.drift
        length = sum_event(g**2).sqrt()
        over = length > limit  # False where the length is not finite: that is for the chain's watch to report
        gradients.append(g * _match(torch.where(over, limit / length, 1.0), g))
        cut = cut | over
    return tuple(gradients), cut


def propose(
    position: Sequence[Tensor], gradient: Sequence[Tensor], c: StepCoefficients, noise: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """One unadjusted step from `position` with the injected standard normal `noise`; one tensor per free layer each."""
    return tuple(
        _match(c.keep, y) * y + _match(c.drift, y) * g + _match(c.noise, y) * n
        for y, g, n in zip(position, gradient, noise, strict=True)
    )


def log_acceptance(
    old: ChainState,
    new: ChainState,
    new_gradient: Sequence[Tensor],
    c: StepCoefficients,
    noise: Sequence[Tensor],
    temperature: float = 1.0,
) -> Tensor:
    """log of the Metropolis–Hastings ratio of the step old -> new made with `noise`, (batch,).

    log α = [log p̃(y') − log p̃(y)]/T + ½‖n‖² − ½‖n'‖², where n' = (y − c₀ y' − c₁ g(y'))/τ would lead back, with
    `new_gradient` as g(y'). A proposal of density zero has log α = −∞.
    """
    ratio = (not_none(new.log_density) - not_none(old.log_density)) / temperature
    for y, y_new, g_new, n in zip(old.position, new.position, new_gradient, noise, strict=True):
        back = (y - _match(c.keep, y) * y_new - _match(c.drift, y) * g_new) / _match(c.noise, y)
        ratio = ratio + 0.5 * (sum_event(n**2) - sum_event(back**2))
    return torch.where(torch.isneginf(not_none(new.log_density)), not_none(new.log_density), ratio)


def _select(accept: Tensor, new: ChainState, old: ChainState) -> ChainState:
    """Row by row the new state where accepted, the old one elsewhere."""
    return ChainState(
        position=tuple(_pick(accept, a, b) for a, b in zip(new.position, old.position)),
        negative_energy=_pick(accept, new.negative_energy, old.negative_energy),
        log_density=_pick(accept, not_none(new.log_density), not_none(old.log_density)),
        gradient=tuple(_pick(accept, a, b) for a, b in zip(new.gradient, old.gradient)),
    )


def _pick(accept: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(_match(accept, a), a, b)


def _match(coefficient: Tensor, y: Tensor) -> Tensor:
    """A scalar or (batch,) coefficient, shaped to multiply y of shape (batch, …)."""
    return coefficient.reshape(-1, *([1] * (y.ndim - 1))) if coefficient.ndim else coefficient
