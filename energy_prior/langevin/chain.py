"""Langevin chains: y_{t+1} = c₀ y_t + c₁ ∇ + τ n_t, unadjusted or MALA, in memory that does not grow with the steps."""

from __future__ import annotations

__all__ = ["ChainResult", "StepCallback", "run_chain"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from energy_prior.errors import DivergenceError
from energy_prior.langevin.backends import STEPPERS, UNROLLED, Stepper
from energy_prior.langevin.density import ChainState, JointDensity, Precision, matrix_products
from energy_prior.langevin.noise import NoiseSource
from energy_prior.langevin.step import Carry, Rules, Scheme, begin, propose

StepCallback = Callable[[int, ChainState, Tensor], None]
"""Called with (step, state, acceptance probability of that step, (batch,)) after every step, and at step 0 with ones."""

_BLOCK = 64


@dataclass(frozen=True)
class ChainResult:
    """The end of a chain.

    Attributes:
        position: the free layers at the end, ascending, in the density's coordinates.
        step_size: the step size at the end, one per chain, (batch,).
        state: density and gradient at the end; None if nothing asked for the acceptance, which needs them.
        acceptance: mean over the steps of the acceptance probability, (batch,); None as for `state`.
        tamed: share of the steps whose drift was cut, (batch,); None without `taming`.
    """

    position: tuple[Tensor, ...]
    step_size: Tensor
    state: ChainState | None = None
    acceptance: Tensor | None = None
    tamed: Tensor | None = None


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
    on_step: StepCallback | None = None,
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
        on_step: called after every step.
        stepper: how steps are made: by the reference, or by a faster form of it (`energy_prior.langevin.backends`).

    Raises:
        DivergenceError: if a density or gradient stops being finite; it names the layer and the step. Noted on the device in
            every step; on a CPU it is raised within 64 steps, elsewhere at the end, as the host never waits for a chain
            under way. A proposal of density zero (log density −∞) is not an error under `adjust`: it is rejected.
    """
    parts = [density] if isinstance(density, JointDensity) else list(density)
    sizes = [part.topdown.batch_size for part in parts]
    batch = start[0].shape[0]
    s = torch.as_tensor(step_size, dtype=start[0].dtype, device=start[0].device).expand(batch).clone()
    rules = Rules(
        scheme,
        temperature,
        adjust,
        adapt=adapt_steps > 0,
        target_acceptance=target_acceptance,
        taming=taming,
        measured=measure or adjust or adapt_steps > 0 or on_step is not None,
        precision=precision,
    )
    with matrix_products(precision):
        split = [list(t.split(sizes)) for t in (*start, s)]
        carries = [begin(d, rules, own[:-1], own[-1]) for d, *own in zip(parts, *split, strict=True)]
        watch = _FiniteWatch(parts[0], adjust)
        watch.note(0, [c.health for c in carries], s)
        if on_step is not None:
            on_step(0, _whole_state(carries), torch.ones_like(s))
        gains = [float(t) ** -0.6 for t in range(1, adapt_steps + 1)]
        gain = torch.tensor(gains, dtype=s.dtype).to(s.device)
        t = 0
        while t < steps:
            if stepper.several is not None and not rules.measured and t + UNROLLED < steps:
                blocks = [[list(layer.split(sizes)) for layer in noise.normal(t + i)] for i in range(1, UNROLLED + 1)]
                ends = [
                    stepper.several(d, rules, carry, [[layer[part] for layer in n] for n in blocks])
                    for part, (d, carry) in enumerate(zip(parts, carries, strict=True))
                ]
                carries = [carry for carry, _ in ends]
                for i in range(UNROLLED):
                    watch.note(t + i + 1, [rows[i] for _, rows in ends], s)
                t += UNROLLED
                continue
            t += 1
            n = noise.normal(t)
            if t == steps and not rules.measured:
                pairs = zip(carries, *(layer.split(sizes) for layer in n), strict=True)
                moved = [propose(c.state.position, c.drift, c.coefficients, own) for c, *own in pairs]
                watch.finish(t, parts, moved, s)
                cut = None if taming is None else _share(carries, lambda c: c.cut, lambda c: c.was_cut, steps)
                return ChainResult(tuple(map(_joined, zip(*moved, strict=True))), s, tamed=cut)
            if rules.adapt and t > adapt_steps:
                rules = rules._replace(adapt=False)
            u = noise.uniform(t) if adjust else None
            if len(parts) == 1:
                carries = [stepper.one(parts[0], rules, carries[0], n, u, gain[t - 1] if rules.adapt else None)]
            else:
                pairs = zip(parts, carries, _rows(u, sizes), *(layer.split(sizes) for layer in n), strict=True)
                g = gain[t - 1] if rules.adapt else None
                carries = [stepper.one(d, rules, carry, own, mine, g) for d, carry, mine, *own in pairs]
            if rules.adapt:
                s = _joined([c.step_size for c in carries])
            watch.note(t, [c.health for c in carries], s)
            if on_step is not None:
                on_step(t, _whole_state(carries), _joined([_there(c.acceptance) for c in carries]))
        watch.finish(steps, parts, [c.state.position for c in carries], s)
        state = _whole_state(carries)
        return ChainResult(
            position=state.position,
            step_size=s,
            state=state if rules.measured else None,
            acceptance=_share(carries, lambda c: c.accepted, None, steps) if rules.measured else None,
            tamed=None if taming is None else _share(carries, lambda c: c.cut, None, steps),
        )


def _share(
    carries: Sequence[Carry], total: Callable[[Carry], Tensor | None], last: Callable[[Carry], Tensor | None] | None, steps: int
) -> Tensor:
    """A sum over the steps, and what the last step adds to it, as a share of the steps, (batch,)."""
    sums = [_there(total(c)) if last is None else _there(total(c)) + _there(last(c)) for c in carries]
    return _joined(sums) / max(steps, 1)


_T = TypeVar("_T")


def _there(value: _T | None) -> _T:
    assert value is not None  # noqa: S101
    return value


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _rows(u: Tensor | None, sizes: Sequence[int]) -> Sequence[Tensor | None]:
    return [None] * len(sizes) if u is None else u.split(list(sizes))


def _whole_state(carries: Sequence[Carry]) -> ChainState:
    """The state of the whole batch."""
    if len(carries) == 1:
        return carries[0].state
    states = [c.state for c in carries]
    return ChainState(
        position=tuple(map(_joined, zip(*(s.position for s in states), strict=True))),
        negative_energy=_joined([s.negative_energy for s in states]),
        log_density=None if states[0].log_density is None else _joined([_there(s.log_density) for s in states]),
        gradient=tuple(map(_joined, zip(*(s.gradient for s in states), strict=True))),
    )


class _FiniteWatch:
    """Remembers on the device the first step where something was not finite, and the one before, in constant memory."""

    def __init__(self, density: JointDensity, adjust: bool) -> None:
        self._free = density.topdown.free
        self._adjust = adjust
        self._early = density.topdown.reference.device.type == "cpu"  # where reading waits for nothing
        self._rows: list[Tensor] = []
        self._first = 0
        self._record: Tensor | None = None  # step (−1: none yet), health there, health before, latest health
        self._step_size = torch.zeros(())

    def note(self, step: int, health: Sequence[Tensor], step_size: Tensor) -> None:
        """Takes the health of one step in, part by part."""
        self._step_size = step_size
        row = health[0] if len(health) == 1 else torch.stack(list(health)).abs().amax(0)  # NaN wins, as does infinity
        self._rows.append(row)
        if step == 0 or len(self._rows) >= _BLOCK:
            self._fold(step + 1)
            if self._early:
                self._read()

    def finish(
        self, step: int, parts: Sequence[JointDensity], positions: Sequence[Sequence[Tensor]], step_size: Tensor
    ) -> None:
        """Reads what is left, and looks at the last position of all, whose density was not needed."""
        energies = [part.negative_energy(position).abs().amax(0) for part, position in zip(parts, positions, strict=True)]
        sums = [torch.stack([p.sum() for p in position]) for position in positions]
        self._step_size = step_size
        self._fold(step)
        self._read()
        worst = torch.stack([torch.cat([e.to(p.dtype), p]) for e, p in zip(energies, sums, strict=True)]).abs().amax(0)
        bad = [not (abs(value) < float("inf")) for value in worst.tolist()]
        layers = len(self._free)
        if any(bad):
            layer = self._worst([bad[i] or bad[layers + i] for i in range(layers)], self._largest())
            self._fail(step, layer, f"z_{layer} or its energy f_{layer} at the end of layer {layer} is not finite")

    def _fold(self, next_step: int) -> None:
        """Takes the rows since the last time into the record; a few operations on the device, none waits."""
        if not self._rows:
            return
        rows = torch.stack(self._rows)
        before = rows.new_zeros(1, rows.shape[1]) if self._record is None else self._record[None, -rows.shape[1] :]
        bad = ~torch.isfinite(rows).all(1)
        at = bad.to(torch.int64).argmax()
        step = torch.where(bad.any(), (at + self._first).to(rows.dtype), -1.0)
        row, previous = (table.index_select(0, at[None])[0] for table in (rows, torch.cat([before, rows])))
        found = torch.cat([step[None], row, previous, rows[-1]])
        self._record = found if self._record is None else torch.where(self._record[0] >= 0, self._record, found)
        self._rows, self._first = [], next_step

    def _read(self) -> None:
        if self._record is None:
            return
        step, *values = self._record.tolist()
        if step < 0:
            return
        width, layers = len(values) // 3, len(self._free)
        row, before = values[:width], values[width : 2 * width]
        broken = [not (abs(value) < float("inf")) for value in row]
        for flags, what in ((broken[:layers], "the energy f_{0}(z_{0})"), (broken[layers : 2 * layers], "the gradient")):
            if any(flags):
                layer = self._worst(flags, before)
                self._fail(int(step), layer, f"{what.format(layer)} of layer {layer} is not finite")
        self._fail(int(step), None, "the log density (log p_β or the likelihood) is not finite")

    def _largest(self) -> list[float]:
        return [0.0] if self._record is None else self._record[1:].reshape(3, -1)[2].tolist()

    def _worst(self, bad: Sequence[bool], before: Sequence[float]) -> int:
        """Of the layers that are bad, the one whose |f| was largest just before: one explosion drags the others along."""
        candidates = [i for i, is_bad in enumerate(bad) if is_bad]
        return self._free[max(candidates, key=lambda i: before[i])]

    def _fail(self, step: int, layer: int | None, what: str) -> None:
        raise DivergenceError(
            f"The Langevin chain diverged at step {step}: {what}. Use a smaller step_size (it was "
            f"{float(self._step_size.median()):.3g}; prior.tune_step_size() finds one) or adjust=True; if it is not finite at "
            "step 0 already, the energy or "
            "the generator itself is at fault.",
            layer=layer,
            step=step,
        )
