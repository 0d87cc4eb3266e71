"""Langevin chains: y_{t+1} = c₀ y_t + c₁ ∇ + τ n_t, unadjusted or MALA, in memory that does not grow with the steps."""

from __future__ import annotations

__all__ = ["ChainResult", "StepCallback", "run_chain", "run_fused", "run_graphed"]

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from energy_prior._util import not_none
from energy_prior.errors import DivergenceError
from energy_prior.langevin.backends.compiled import STEPPERS, Stepper
from energy_prior.langevin.backends.graph import graphed
from energy_prior.langevin.backends.triton import fused_position
from energy_prior.langevin.density import ChainState, JointDensity, Precision, by_parts, matrix_products, whole
from energy_prior.langevin.noise import InjectedNoise, NoiseSource
from energy_prior.langevin.step import Carry, End, Rules, Scheme, Trace, coefficients, end_at

StepCallback = Callable[[int, ChainState, Tensor], None]
"""Called with (step, state, mean acceptance probability since the call before, (batch,)), and at step 0 with ones."""

_BLOCK = 64


@dataclass(frozen=True)
class ChainResult:
    """The end of a chain.

    Attributes:
        position: the free layers at the end, ascending, in the density's coordinates.
        latents: (z_1, …, z_L) at the end, the held layers included.
        step_size: the step size at the end, one per chain, (batch,).
        state: density and gradient at the end; None if nothing asked for the acceptance, which needs them.
        acceptance: mean over the steps of the acceptance probability, (batch,); None as for `state`.
        tamed: share of the steps whose drift was cut, (batch,); None without `taming`.
        energy: Σ_i f_i of the free layers at the start and after every step, (steps + 1, batch), nats; None if not traced.
    """

    position: tuple[Tensor, ...]
    latents: tuple[Tensor, ...]
    step_size: Tensor
    state: ChainState | None = None
    acceptance: Tensor | None = None
    tamed: Tensor | None = None
    energy: Tensor | None = None


def run_chain(
    density: JointDensity | Sequence[JointDensity],
    start: Sequence[Tensor],
    *,
    steps: int,
    step_size: float | Tensor,
    noise: NoiseSource,
    scheme: Scheme,
    adjust: bool = False,
    temperature: float = 1.0,
    adapt_steps: int = 0,
    target_acceptance: float = 0.7,
    taming: float | None = None,
    precision: Precision = "full",
    measure: bool = False,
    trace: bool = False,
    on_step: StepCallback | None = None,
    every: int = 1,
    stepper: Stepper = STEPPERS["eager"],
) -> ChainResult:
    """Runs one Langevin chain per row of the batch.

    An unadjusted step costs one gradient evaluation. The acceptance probability of every step is free except for one
    evaluation at the end, so it is there (`on_step`) for unadjusted chains too.

    During the first `adapt_steps` steps each chain adapts its own step size, log s += t^(−0.6) (min(1, α) −
    `target_acceptance`) (Robbins–Monro; Andrieu and Thoms, Statistics and Computing 2008), then keeps it: chains stay
    independent of the rest of the batch.

    Args:
        density: the log density and its coordinates; several: of consecutive parts of the batch. Every step goes through all
            parts with one draw of noise for the whole batch, so parts change a chain by no more than rounding.
        start: the free layers at the start, ascending, in the density's coordinates; (batch, *shape) each.
        steps: number of steps, ≥ 0.
        step_size: s > 0, a number or one per chain, (batch,).
        noise: the chain's random numbers.
        scheme: "crank_nicolson" or "euler".
        adjust: Metropolis–Hastings accept/reject after every step (MALA; Roberts and Tweedie, Bernoulli 1996).
        temperature: T > 0; the chain targets p̃^{1/T}.
        adapt_steps: number of first steps that adapt the step size.
        target_acceptance: acceptance that the adaptation aims at, in (0, 1).
        taming: longest drift, as a multiple of the noise's length, > 0 (`tame`); None: the drift as it is.
        precision: of the matrix products in the gradients.
        measure: report `state` and `acceptance` of an unadjusted chain too.
        trace: report `energy`, and all that `measure` does; its memory grows with the steps.
        on_step: called at the start, and after every `every` steps.
        every: ≥ 1.
        stepper: how steps are made: by the reference, or by a faster form of it (`energy_prior.langevin.backends`).

    Raises:
        DivergenceError: if a density or gradient stops being finite; it names the layer and the step. Noted on the device in
            every step; on a CPU it is raised within 127 steps, elsewhere at the end, as the host never waits for a chain
            under way. A proposal of density zero (log density −∞) is not an error under `adjust`: it is rejected.
    """
    parts = [density] if isinstance(density, JointDensity) else list(density)
    s = torch.as_tensor(step_size, dtype=start[0].dtype, device=start[0].device).expand(len(start[0])).clone()
    rules = Rules(
        scheme,
        temperature,
        adjust,
        adapt=adapt_steps > 0,
        target_acceptance=target_acceptance,
        taming=taming,
        measured=measure or trace or adjust or adapt_steps > 0 or on_step is not None,
        traced=trace,
        precision=precision,
    )
    gains = torch.tensor([float(t) ** -0.6 for t in range(1, adapt_steps + 1)], dtype=s.dtype, device=s.device)
    # what the last step of all arrives at is evaluated only to be measured
    last = steps if rules.measured else max(steps - 1, 0)
    with matrix_products(precision):
        starts = zip(*[(own[:-1], own[-1]) for own in by_parts(parts, (*start, s))], strict=True)
        begun = stepper.each(stepper.begin, parts, repeat(rules), *starts)
        carries, traces = [list(parts_of) for parts_of in zip(*begun, strict=True)]
        watch = _FiniteWatch(parts[0])
        watch.note(traces)
        watch.fold(s)
        paths = [_energy(traces)] if trace else []
        accepted = torch.zeros_like(s)
        if on_step is not None:
            on_step(0, _whole_state(carries), torch.ones_like(s))
        t = 0
        while t < last:
            rules = rules._replace(adapt=t < adapt_steps)
            ahead = [last - t, *([adapt_steps - t] if rules.adapt else []), *([every - t % every] if on_step else [])]
            span = stepper.span(noise, min(ahead), adjust)
            draws = stepper.draws(parts, rules, noise, t + 1, span, gains)
            made = stepper.each(stepper.advance, parts, repeat(rules), carries, draws)
            t += span
            carries, traces = [list(parts_of) for parts_of in zip(*made, strict=True)]
            watch.note(traces)
            if trace:
                paths.append(_energy(traces))
            if watch.full:
                watch.fold(_step_size(carries))
            if on_step is not None and t % every == 0:
                since = _accepted(carries)
                on_step(t, _whole_state(carries), since / every)
                accepted = accepted + since
                carries = [c._replace(accepted=torch.zeros_like(not_none(c.accepted))) for c in carries]
    final = stepper.draws(parts, rules, noise, steps, 1, gains) if last < steps else [()] * len(parts)
    ends = stepper.each(stepper.finish, parts, repeat(rules), carries, final)
    watch.finish(steps, ends, _step_size(carries))
    share = max(steps, 1)
    return ChainResult(
        position=whole([end.position for end in ends]),
        latents=whole([end.latents for end in ends]),
        step_size=_step_size(carries),
        state=_whole_state(carries) if rules.measured else None,
        acceptance=(accepted + _accepted(carries)) / share if rules.measured else None,
        tamed=None if taming is None else whole([(not_none(end.cut) / share,) for end in ends])[0],
        energy=torch.cat(paths) if trace else None,
    )


def run_fused(
    parts: Sequence[JointDensity],
    start: Sequence[Tensor],
    rules: Rules,
    *,
    steps: int,
    step_size: float,
    noise: InjectedNoise | None,
    max_memory: float,
) -> ChainResult:
    """`run_chain` for plain chains, each part in one launch of the kernel of `energy_prior.langevin.backends.triton`, or in a few.

    Raises:
        DivergenceError: if the end of the chain is not finite; the step is that of the end.
    """
    s = torch.full_like(start[0].flatten(1)[:, 0], step_size)
    c = coefficients(torch.tensor(step_size, dtype=torch.float64), rules.scheme, parts[0].space, rules.temperature)
    seed = int(torch.randint(2**62, ())) if noise is None else 0
    first, ends = 0, []
    for part, own in zip(parts, by_parts(parts, start), strict=True):
        n = part.topdown.batch_size
        position = fused_position(
            part,
            own,
            steps=steps,
            coefficients=c,
            noise=seed if noise is None else noise.rows(slice(first, first + n)),
            precision=rules.precision,
            first_row=first,
            max_memory=max_memory,
        )
        ends.append(end_at(part, position, None))
        first += n
    _FiniteWatch(parts[0]).finish(steps, ends, s)
    return ChainResult(whole([end.position for end in ends]), whole([end.latents for end in ends]), s)


def run_graphed(
    parts: Sequence[JointDensity],
    start: Sequence[Tensor],
    rules: Rules,
    *,
    steps: int,
    step_size: float,
    noise: InjectedNoise | None,
    stepper: Stepper,
) -> ChainResult | None:
    """`run_chain` for plain chains, each part recorded as a CUDA graph (`energy_prior.langevin.backends.graph`).

    Returns:
        None, with a warning, if they cannot be recorded.

    Raises:
        DivergenceError: as `run_chain`, at the end.
    """
    s = torch.full_like(start[0].flatten(1)[:, 0], step_size)
    first, ends, traces = 0, [], []
    with matrix_products(rules.precision):
        for part, own in zip(parts, by_parts(parts, start), strict=True):
            rows = slice(first, first + part.topdown.batch_size)
            made = graphed(part, rules, own, s[rows], steps, None if noise is None else noise.rows(rows), stepper)
            if made is None:
                return None
            ends.append(made[0])
            traces.append(Trace(made[1], None))
            first = rows.stop
    watch = _FiniteWatch(parts[0])
    watch.note(traces)
    watch.finish(steps, ends, s)
    return ChainResult(
        position=whole([end.position for end in ends]),
        latents=whole([end.latents for end in ends]),
        step_size=s,
        tamed=None if rules.taming is None else whole([(not_none(end.cut) / steps,) for end in ends])[0],
    )


def _step_size(carries: Sequence[Carry]) -> Tensor:
    """Of the whole batch, (batch,)."""
    return whole([(c.step_size,) for c in carries])[0]


def _accepted(carries: Sequence[Carry]) -> Tensor:
    """Sum of the acceptance probabilities that the carries hold, (batch,)."""
    return whole([(not_none(c.accepted),) for c in carries])[0]


def _energy(traces: Sequence[Trace]) -> Tensor:
    """Of the whole batch, (steps, batch)."""
    return torch.cat([not_none(trace.energy) for trace in traces], 1)


def _whole_state(carries: Sequence[Carry]) -> ChainState:
    """The state of the whole batch."""
    states = [c.state for c in carries]
    if len(states) == 1:
        return states[0]
    return ChainState(
        position=whole([s.position for s in states]),
        negative_energy=torch.cat([s.negative_energy for s in states]),
        log_density=torch.cat([not_none(s.log_density) for s in states]),
        gradient=whole([s.gradient for s in states]),
    )


class _FiniteWatch:
    """Remembers on the device the first step where something was not finite, and the one before, in constant memory."""

    def __init__(self, density: JointDensity) -> None:
        self._free = density.topdown.free
        self._early = density.topdown.reference.device.type == "cpu"  # where reading waits for nothing
        self._rows: list[Tensor] = []
        self._folded = 0  # number of rows in the record; the first row is step 0
        self._record: Tensor | None = None  # step (−1: none yet), health there, health before, latest health

    @property
    def full(self) -> bool:
        """Whether it is time to `fold`."""
        return sum(map(len, self._rows)) >= _BLOCK

    def note(self, traces: Sequence[Trace]) -> None:
        """Takes the health of consecutive steps in, part by part."""
        health = [trace.health for trace in traces]
        self._rows.append(health[0] if len(health) == 1 else torch.stack(list(health)).abs().amax(0))  # NaN and infinity win

    def fold(self, step_size: Tensor) -> None:
        """Takes the rows since the last time into the record; no host waits, on a CPU it is read."""
        self._fold()
        if self._early:
            self._read(step_size)

    def finish(self, steps: int, ends: Sequence[End], step_size: Tensor) -> None:
        """Reads what is left, and looks at the last position of all, whose density may not have been needed."""
        self._fold()
        self._read(step_size)
        bad = [not math.isfinite(value) for value in torch.stack([end.health for end in ends]).abs().amax(0).tolist()]
        if any(bad):
            layers = len(self._free)
            latest = [0.0] * layers if self._record is None else self._record[1:].reshape(3, -1)[2].tolist()
            layer = self._worst([bad[i] or bad[layers + i] for i in range(layers)], latest)
            self._fail(steps, layer, f"z_{layer} or its energy f_{layer} at the end of layer {layer} is not finite", step_size)

    def _fold(self) -> None:
        if not self._rows:
            return
        rows = torch.cat(self._rows)
        before = rows.new_zeros(1, rows.shape[1]) if self._record is None else self._record[None, -rows.shape[1] :]
        bad = ~torch.isfinite(rows).all(1)
        at = bad.to(torch.int64).argmax()
        step = torch.where(bad.any(), (at + self._folded).to(rows.dtype), -1.0)
        row, previous = (table.index_select(0, at[None])[0] for table in (rows, torch.cat([before, rows])))
        found = torch.cat([step[None], row, previous, rows[-1]])
        self._record = found if self._record is None else torch.where(self._record[0] >= 0, self._record, found)
        self._rows, self._folded = [], self._folded + len(rows)

    def _read(self, step_size: Tensor) -> None:
        if self._record is None:
            return
        step, *values = self._record.tolist()
        if step < 0:
            return
        width, layers = len(values) // 3, len(self._free)
        broken, before = [not math.isfinite(value) for value in values[:width]], values[width : 2 * width]
        for flags, what in ((broken[:layers], "the energy f_{0}(z_{0})"), (broken[layers : 2 * layers], "the gradient")):
            if any(flags):
                layer = self._worst(flags, before)
                self._fail(int(step), layer, f"{what.format(layer)} of layer {layer} is not finite", step_size)
        self._fail(int(step), None, "the log density (log p_β or the likelihood) is not finite", step_size)

    def _worst(self, bad: Sequence[bool], before: Sequence[float]) -> int:
        """Of the layers that are bad, the one whose |f| was largest just before: one explosion drags the others along."""
        candidates = [i for i, is_bad in enumerate(bad) if is_bad]
        return self._free[max(candidates, key=lambda i: before[i])]

    def _fail(self, step: int, layer: int | None, what: str, step_size: Tensor) -> None:
        raise DivergenceError(
            f"The Langevin chain diverged at step {step}: {what}. Use a smaller step_size (it was "
            f"{float(step_size.median()):.3g}; prior.tune_step_size() finds one) or adjust=True; if it is not finite at step 0 "
            "already, the energy or the generator itself is at fault.",
            layer=layer,
            step=step,
        )
