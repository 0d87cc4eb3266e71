"""The Langevin step, y' = c₀ y + c₁ g(y) + τ n with n ~ N(0, I), and its Metropolis–Hastings acceptance.

`init`, `step` and `finalize` are the reference: every backend does the same with the same noise.
"""

from __future__ import annotations

__all__ = [
    "Draw",
    "Draws",
    "End",
    "Info",
    "State",
    "StepConfig",
    "end_at",
    "finalize",
    "init",
    "log_acceptance",
    "one_step",
    "per_chain",
    "step",
]

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from energy_prior._util import not_none, per_row, sum_event
from energy_prior.langevin.density import Evaluation, JointDensity, Precision
from energy_prior.langevin.noise import NoiseSource
from energy_prior.langevin.proposal import Scheme, StepCoefficients, coefficients, cut_drift, propose


class StepConfig(NamedTuple):
    """Static configuration of the steps that one call makes; part of the compile key.

    Attributes:
        scheme: "crank_nicolson" or "euler".
        temperature: T > 0; the chain targets p̃^{1/T}.
        adjust: accept or reject (MALA).
        adapt: each chain adapts its step size.
        target_acceptance: what the adaptation aims at, in (0, 1).
        max_drift: longest drift as a multiple of the noise's length (`cut_drift`); None: the drift as it is.
        measured: densities and acceptance probabilities are computed.
        traced: f after every step is reported.
        precision: of the matrix products in the gradients.
    """

    scheme: Scheme
    temperature: float = 1.0
    adjust: bool = False
    adapt: bool = False
    target_acceptance: float = 0.7
    max_drift: float | None = None
    measured: bool = False
    traced: bool = False
    precision: Precision = "full"


class State(NamedTuple):
    """What the next step needs.

    Of a backend that evaluates nothing between its calls, `negative_energy` is None, and `gradient` and `drift` are empty.

    Attributes:
        position: the free layers, ascending, in the density's coordinates.
        negative_energy: f_i of the free layers, (batch, free layers), nats.
        log_density: log p̃ up to its constant, (batch,), nats; None if not measured.
        gradient: g, as in `Evaluation`.
        drift: g as the next step uses it: `gradient`, or what `cut_drift` makes of it.
        was_cut: whether `drift` was cut in any layer, (batch,), bool; None without `max_drift`.
        coefficients: of the next step.
        step_size: s, (batch,).
    """

    position: tuple[Tensor, ...]
    negative_energy: Tensor | None
    log_density: Tensor | None
    gradient: tuple[Tensor, ...]
    drift: tuple[Tensor, ...]
    was_cut: Tensor | None
    coefficients: StepCoefficients
    step_size: Tensor


class Info(NamedTuple):
    """Diagnostics of the steps that one call made.

    Attributes:
        finite_check: one row per proposed state, finite where all of it is, (steps, …); None: nothing was looked at.
        negative_energy: Σ_i f_i over the free layers after every step, (steps, batch), nats; None if not traced.
        accepted: sum of the acceptance probabilities, (batch,); None if not measured.
        cut: number of steps made with a cut drift, (batch,); None without `max_drift`.
    """

    finite_check: Tensor | None = None
    negative_energy: Tensor | None = None
    accepted: Tensor | None = None
    cut: Tensor | None = None


class End(NamedTuple):
    """Where a chain has arrived.

    Attributes:
        position: the free layers, ascending, in the density's coordinates.
        latents: (z_1, …, z_L), the held layers included.
        finite_check: max |f_i| of each free layer, then the sum of each position.
    """

    position: tuple[Tensor, ...]
    latents: tuple[Tensor, ...]
    finite_check: Tensor


class Draw(NamedTuple):
    """What is new in one step.

    Attributes:
        noise: standard normal, one tensor per free layer.
        uniform: in [0, 1), (batch,); None without `adjust`.
        gain: of the step size's adaptation, a scalar; None without `adapt`.
    """

    noise: Sequence[Tensor]
    uniform: Tensor | None = None
    gain: Tensor | None = None


class Draws(NamedTuple):
    """Where consecutive steps take from what is new in them.

    Attributes:
        noise: the chain's random numbers.
        first: number of the first of these steps; a chain's first step is number 1.
        steps: how many.
        gains: of the step size's adaptation, for every step of the chain that adapts it, (adapt_steps,).
    """

    noise: NoiseSource
    first: int
    steps: int
    gains: Tensor

    def each(self, config: StepConfig) -> list[Draw]:
        """What is new in each of these steps."""

        def draw(number: int) -> Draw:
            normals = tuple(self.noise.normal(number))  # before the uniform numbers: both may come from one stream
            uniform = self.noise.uniform(number) if config.adjust else None
            return Draw(normals, uniform, self.gains[number - 1] if config.adapt else None)

        return [draw(number) for number in range(self.first, self.first + self.steps)]


def per_chain(step_size: float | Tensor, position: Sequence[Tensor]) -> Tensor:
    """The step size of every chain at this position, (batch,), from one for all or one for each."""
    like = position[0]
    return step_size.to(like) if isinstance(step_size, Tensor) else like.new_full(like.shape[:1], step_size)


# ---------------------------------------------------------------------------------------------------------------- the chain


def init(density: JointDensity, config: StepConfig, position: Sequence[Tensor], step_size: Tensor) -> tuple[State, Info]:
    """The chain at its start. Its info is that of one step, the start.

    Args:
        density: the target.
        config: static configuration.
        position: the free layers, ascending, in the density's coordinates.
        step_size: s, (batch,).
    """
    at = density.evaluate(position, with_density=config.measured, precision=config.precision)
    c = coefficients(step_size, config.scheme, density.space, config.temperature)
    state = _state(at, c, step_size, config)
    check = _finite_check(at, density_of_zero_is_bad=True)
    return state, Info(check[None], _traced([state], config))


def step(density: JointDensity, config: StepConfig, state: State, draws: Sequence[Draw]) -> tuple[State, Info]:
    """Steps of every chain of the batch, one for each of `draws`, at least one: propose, evaluate, accept or reject, adapt."""
    rows, states = [], []
    accepted = cut = torch.zeros_like(state.step_size)
    for draw in draws:
        cut = cut if state.was_cut is None else cut + state.was_cut
        state, check, acceptance = one_step(density, config, state, draw)
        accepted = accepted if acceptance is None else accepted + acceptance
        rows.append(check)
        states.append(state)
    return state, Info(
        finite_check=torch.stack(rows),
        negative_energy=_traced(states, config),
        accepted=accepted if config.measured else None,
        cut=None if config.max_drift is None else cut,
    )


def finalize(density: JointDensity, config: StepConfig, state: State, draws: Sequence[Draw]) -> tuple[End, Info]:
    """The end of a chain, after one more step if `draws` has one: without the evaluation that only a further step needs."""
    position, f, cut = state.position, state.negative_energy, None
    for draw in draws:
        position, f = propose(position, state.drift, state.coefficients, draw.noise), None
        cut = None if state.was_cut is None else state.was_cut.to(state.step_size.dtype)
    return end_at(density, position, f), Info(cut=cut)


def end_at(density: JointDensity, position: tuple[Tensor, ...], f: Tensor | None = None) -> End:
    """The end of a chain at this position, with f_i of the free layers there, (batch, free layers), if they are known."""
    descent = density.topdown.descend(position, density.space)
    f = density.energies_of(density.topdown.free, position, descent) if f is None else f
    sums = torch.stack([p.sum() for p in position])
    return End(position, descent.latents, torch.cat([f.abs().amax(0).to(sums.dtype), sums]))


def one_step(density: JointDensity, config: StepConfig, state: State, draw: Draw) -> tuple[State, Tensor, Tensor | None]:
    """One step of every chain of the batch.

    Returns:
        The state after it, the finite check of the state that it proposed, and the acceptance probability, (batch,), or None
        if not measured.
    """
    c, s = state.coefficients, state.step_size
    proposal = propose(state.position, state.drift, c, draw.noise)
    at = density.evaluate(proposal, with_density=config.measured, precision=config.precision)
    new = _state(at, c, s, config)
    check = _finite_check(at, density_of_zero_is_bad=not config.adjust)
    if not config.measured:
        return new, check, None
    log_alpha = log_acceptance(state, new, new.drift, c, draw.noise, config.temperature)
    acceptance = log_alpha.exp().clamp(max=1.0)
    if config.adjust:
        new = _select(not_none(draw.uniform).log() < log_alpha, new, state)
    if config.adapt:
        s = s * torch.exp(not_none(draw.gain) * (acceptance - config.target_acceptance))
        s = s.clamp(max=2 * math.sqrt(config.temperature)) if config.scheme == "crank_nicolson" else s
        c = coefficients(s, config.scheme, density.space, config.temperature)
        # the limit of `cut_drift` depends on the coefficients
        at = Evaluation(new.position, not_none(new.negative_energy), new.log_density, new.gradient)
        new = _state(at, c, s, config)
    return new, check, acceptance


def _state(at: Evaluation, c: StepCoefficients, step_size: Tensor, config: StepConfig) -> State:
    """The state at an evaluated position."""
    drift, was_cut = at.gradient, None
    if config.max_drift is not None:
        drift, was_cut = cut_drift(at.gradient, c, config.max_drift)
    return State(at.position, at.negative_energy, at.log_density, at.gradient, drift, was_cut, c, step_size)


def _select(accept: Tensor, new: State, old: State) -> State:
    """Row by row the new state where accepted, the old one elsewhere."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(per_row(accept, a), a, b)

    def pick_each(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(pick(x, y) for x, y in zip(a, b))

    return State(
        position=pick_each(new.position, old.position),
        negative_energy=pick(not_none(new.negative_energy), not_none(old.negative_energy)),
        log_density=pick(not_none(new.log_density), not_none(old.log_density)),
        gradient=pick_each(new.gradient, old.gradient),
        drift=pick_each(new.drift, old.drift),
        was_cut=None if new.was_cut is None else pick(new.was_cut, not_none(old.was_cut)),
        coefficients=new.coefficients,
        step_size=new.step_size,
    )


def _traced(states: Sequence[State], config: StepConfig) -> Tensor | None:
    """Σ_i f_i after every step, (steps, batch), if it is asked for."""
    return torch.stack([not_none(state.negative_energy).sum(1) for state in states]) if config.traced else None


def _finite_check(at: Evaluation, *, density_of_zero_is_bad: bool) -> Tensor:
    """Finite where the evaluation is: max |f_i| of each free layer, ∑ ∇_i of each, and the sum of the log density if there.

    Args:
        at: what to look at.
        density_of_zero_is_bad: False: rows of density zero (log p̃ = −∞), which Metropolis–Hastings rejects, do not count.

    Returns:
        (2 · free layers [+ 1],), in the dtype of the positions.
    """
    f, gradient, log_density = at.negative_energy, at.gradient, at.log_density
    if log_density is not None and not density_of_zero_is_bad:
        zero = torch.isneginf(log_density)
        f = f.masked_fill(zero[:, None], 0.0)
        gradient = tuple(g.masked_fill(per_row(zero, g), 0.0) for g in gradient)
        log_density = log_density.masked_fill(zero, 0.0)
    parts = [f.abs().amax(0), torch.stack([g.sum() for g in gradient])]
    return torch.cat(parts if log_density is None else [*parts, log_density.sum()[None]])


def log_acceptance(
    old: State | Evaluation,
    new: State | Evaluation,
    new_drift: Sequence[Tensor],
    c: StepCoefficients,
    noise: Sequence[Tensor],
    temperature: float = 1.0,
) -> Tensor:
    """log of the Metropolis–Hastings ratio of the step old -> new made with `noise`, (batch,), nats.

    log α = [log p̃(y') − log p̃(y)]/T + ½‖n‖² − ½‖n'‖², where n' = (y − c₀ y' − c₁ g(y'))/τ would lead back, with
    `new_drift` as g(y'). A proposal of density zero has log α = −∞.

    Args:
        old: where the step began, y, measured.
        new: what it proposed, y', measured.
        new_drift: g(y'), as the next step would use it, (batch, *shape) each, nats per unit of the position.
        c: coefficients of the step.
        noise: n, noise of N(0, 1), (batch, *shape) each.
        temperature: T > 0 of the chain.

    Examples:
        >>> from energy_prior import LadderVAE, default_energies
        >>> from energy_prior.langevin import Target, coefficients, propose
        >>> vae = LadderVAE((4,), latent_dims=(3,), hidden=8)
        >>> density = Target(vae, list(default_energies(vae.latent_shapes)), "noise", batch_size=2).density()
        >>> c, n = coefficients(torch.tensor(0.5), "crank_nicolson", "noise"), [torch.ones(2, 3)]
        >>> old = density.evaluate([torch.zeros(2, 3)])
        >>> new = density.evaluate(propose(old.position, old.gradient, c, n))
        >>> log_acceptance(old, new, new.gradient, c, n).exp().round(decimals=3)  # of f = 0 every step is accepted
        tensor([1., 1.])
    """
    ratio = (not_none(new.log_density) - not_none(old.log_density)) / temperature
    for y, y_new, g_new, n in zip(old.position, new.position, new_drift, noise, strict=True):
        back = (y - per_row(c.c0, y) * y_new - per_row(c.c1, y) * g_new) / per_row(c.tau, y)
        ratio = ratio + 0.5 * (sum_event(n**2) - sum_event(back**2))
    return torch.where(torch.isneginf(not_none(new.log_density)), not_none(new.log_density), ratio)
