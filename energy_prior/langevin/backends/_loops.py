"""Compiled chains on a CPU: many steps in one call, random numbers included.

The step of a small model is bound by what is between its operations: the interpreter's work for each call, and cores that
share every product and wait for each other after it. Here the steps are a loop inside what is compiled; with every core at
rows of its own, cores meet only where the chains end.
"""

from __future__ import annotations

__all__ = ["LONGEST", "Ahead", "Stacked", "ahead", "each", "finalize", "init", "longest", "prepare", "step", "workers_for"]

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops import while_loop

from energy_prior._util import not_none
from energy_prior.langevin import step as reference
from energy_prior.langevin.density import JointDensity
from energy_prior.langevin.noise import CounterNoise, Counters, NoiseSource, counted_normal, counted_uniform
from energy_prior.langevin.proposal import coefficients
from energy_prior.langevin.step import Draw, Draws, End, Info, State, StepConfig

LONGEST = 64
"""Most steps of one call."""
_STACKED = 8


class Stacked(NamedTuple):
    """Random numbers that were drawn before: `normals`, (8, batch, *shape) per free layer, and `uniforms`, (8, batch)."""

    normals: tuple[Tensor, ...]
    uniforms: Tensor | None


class Ahead(NamedTuple):
    """`Draws` as tensors: what is new in the steps of one call.

    Attributes:
        noise: where their random numbers come from.
        gains: of the step size's adaptation, (64,), from the first step on; None without `adapt`.
        first: number of the first step, int32.
        steps: how many, int32, at most 64, or 8 of `Stacked` noise.
    """

    noise: Counters | Stacked
    gains: Tensor | None
    first: Tensor
    steps: Tensor


def ahead(config: StepConfig, draws: Draws) -> Ahead:
    """What is new in these steps."""
    if isinstance(draws.noise, CounterNoise):
        source: Counters | Stacked = draws.noise.counters()
    else:
        drawn = draws.each(config)
        eight = [*drawn, *[drawn[-1]] * (_STACKED - len(drawn))]  # what is compiled takes eight, however many are used
        normals = tuple(torch.stack(layer) for layer in zip(*[d.noise for d in eight], strict=True))
        source = Stacked(normals, torch.stack([not_none(d.uniform) for d in eight]) if config.adjust else None)
    table = None
    if config.adapt:
        table = torch.zeros(LONGEST, dtype=draws.gains.dtype, device=draws.gains.device)
        table[: draws.steps] = draws.gains[draws.first - 1 : draws.first - 1 + draws.steps]
    numbers = draws.first, draws.steps
    first, steps = (torch.tensor(number, dtype=torch.int32, device=draws.gains.device) for number in numbers)
    return Ahead(source, table, first, steps)


def longest(noise: NoiseSource) -> int:
    """Most steps of one call with this source of random numbers."""
    return LONGEST if isinstance(noise, CounterNoise) else _STACKED


def workers_for(rows: int, cores: int) -> tuple[int, int]:
    """Into how many equal parts a batch goes, side by side, and the cores of each: the most that use over half of them."""
    counts = [p for p in range(1, min(rows, cores) + 1) if rows % p == 0]
    workers = max(p for p in counts if 2 * p * (cores // p) > cores)
    return workers, cores // workers


def prepare(density: JointDensity) -> JointDensity:
    """The same density with no two tensors of its pass in one memory, as a loop needs."""
    known: set[int] = set()

    def own(value: Tensor) -> Tensor:
        place = value.untyped_storage().data_ptr()
        value = value.clone() if place in known else value
        known.add(place)
        return value

    return JointDensity(density.topdown.mapped(own), density.energies, density.space, density.x)


def each(density: JointDensity, config: StepConfig, new: Ahead) -> list[Draw]:
    """What is new in each of the steps."""
    return [_draw(density, config, new, new.steps.new_full((), t)) for t in range(int(new.steps))]


def _draw(density: JointDensity, config: StepConfig, new: Ahead, t: Tensor) -> Draw:
    """What is new in the step that comes `t` steps after the first."""
    gain = None if new.gains is None else _at(new.gains, t)
    if isinstance(new.noise, Stacked):
        uniform = None if new.noise.uniforms is None else _at(new.noise.uniforms, t)
        return Draw(tuple(_at(n, t) for n in new.noise.normals), uniform, gain)
    shapes, number = density.topdown.shapes, new.first + t
    uniform = counted_uniform(new.noise, number, shapes[0][0]) if config.adjust else None
    return Draw(counted_normal(new.noise, number, shapes), uniform, gain)


# ----------------------------------------------------------------------------------------------------------- to be compiled


def init(density: JointDensity, config: StepConfig, position: Sequence[Tensor], step_size: Tensor) -> tuple[State, Info]:
    """`energy_prior.langevin.step.init`, in the memory layout that `step` gives: that is then compiled for one layout alone."""
    state, info = reference.init(density, config, position, step_size)
    return _with_changing(state, config, density, [_own(value) for value in _changing(state, config)]), info


def step(density: JointDensity, config: StepConfig, state: State, new: Ahead) -> tuple[State, Info]:
    """`energy_prior.langevin.step.step` as a loop; its info always has 64 rows."""
    like = state.step_size
    width = 2 * len(state.position) + config.measured
    numbers = torch.arange(LONGEST, device=like.device)[:, None]
    tables = [like.new_zeros(LONGEST, width, dtype=state.position[0].dtype)]
    if config.traced:
        tables.append(like.new_zeros(LONGEST, len(like), dtype=not_none(state.negative_energy).dtype))
    sums = [torch.zeros_like(like) for _ in range(config.measured + (config.max_drift is not None))]
    rows_end, sums_end = len(tables), len(tables) + len(sums)

    def unfinished(t: Tensor, *values: Tensor) -> Tensor:
        return t < new.steps

    def once(t: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        before = _with_changing(state, config, density, values[sums_end:])
        after, check, acceptance = reference.one_step(density, config, before, _draw(density, config, new, t))
        rows = [check, not_none(after.negative_energy).sum(1)] if config.traced else [check]
        written = [torch.where(numbers == t, row, table) for row, table in zip(rows, values[:rows_end], strict=True)]
        counted = [] if before.was_cut is None else [before.was_cut.to(like.dtype)]
        added = [*([] if acceptance is None else [acceptance]), *counted]
        totals = [total + more for total, more in zip(values[rows_end:sums_end], added, strict=True)]
        return t + 1, *written, *totals, *(_own(value) for value in _changing(after, config))

    start = (torch.zeros_like(new.steps), *tables, *sums, *(_own(value) for value in _changing(state, config)))
    values = while_loop(unfinished, once, start)[1:]
    totals = iter(values[rows_end:sums_end])
    info = Info(
        finite_check=values[0],
        negative_energy=values[1] if config.traced else None,
        accepted=next(totals) if config.measured else None,
        cut=next(totals) if config.max_drift is not None else None,
    )
    return _with_changing(state, config, density, values[sums_end:]), info


def finalize(density: JointDensity, config: StepConfig, state: State, last: Ahead | None) -> tuple[End, Info]:
    """`energy_prior.langevin.step.finalize`; `last`: of one step, or None."""
    drawn = [] if last is None else [_draw(density, config, last, torch.zeros_like(last.steps))]
    return reference.finalize(density, config, state, drawn)


def _changing(state: State, config: StepConfig) -> list[Tensor]:
    """What of a state changes from step to step."""
    values = [*state.position, *state.gradient, not_none(state.negative_energy)]
    if config.measured:
        values.append(not_none(state.log_density))
    if config.max_drift is not None:
        values += [*state.drift, not_none(state.was_cut)]
    return [*values, state.step_size] if config.adapt else values


def _with_changing(state: State, config: StepConfig, density: JointDensity, values: Sequence[Tensor]) -> State:
    """The state with what `_changing` took out of it."""
    rest = iter(values)

    def layers() -> tuple[Tensor, ...]:
        return tuple(next(rest) for _ in state.position)

    position, gradient, energy = layers(), layers(), next(rest)
    log_density = next(rest) if config.measured else None
    drift, was_cut = (layers(), next(rest)) if config.max_drift is not None else (gradient, None)
    s = next(rest) if config.adapt else state.step_size
    c = coefficients(s, config.scheme, density.space, config.temperature) if config.adapt else state.coefficients
    return State(position, energy, log_density, gradient, drift, was_cut, c, s)


def _own(value: Tensor) -> Tensor:
    """A copy in memory of its own, in the usual order, as a loop needs; the compiler makes it where the value is computed."""
    return value.clone(memory_format=torch.contiguous_format)


def _at(table: Tensor, t: Tensor) -> Tensor:
    return table.index_select(0, t[None])[0]
