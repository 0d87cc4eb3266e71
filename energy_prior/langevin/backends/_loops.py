"""Compiled chains on a CPU: many steps in one call, and every core with rows of its own.

The step of a small model is bound by what is between its operations: the interpreter's work for each call, and cores that
share every product and wait for each other after it. Here the steps are a loop inside what is compiled, random numbers
included, and the cores meet only where the loop ends.
"""

from __future__ import annotations

__all__ = [
    "LONGEST",
    "Ahead",
    "Stacked",
    "ahead",
    "begin",
    "draw",
    "finish",
    "longest",
    "parts_for",
    "side_by_side",
    "walk",
    "workers_for",
]

import contextvars
import functools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._higher_order_ops import while_loop

from energy_prior._util import not_none
from energy_prior.langevin import step as reference
from energy_prior.langevin.density import ChainState, JointDensity
from energy_prior.langevin.noise import CounterNoise, Counters, NoiseSource, counted_normal, counted_uniform
from energy_prior.langevin.step import Carry, Draw, End, Rules, Trace, coefficients
from energy_prior.topdown import TopDown

_R = TypeVar("_R")

LONGEST = 64
"""Most steps of one call."""
_STACKED = 8
_starting = threading.Lock()


class Stacked(NamedTuple):
    """Random numbers that were drawn before: `normals`, (8, batch, *shape) per free layer, and `uniforms`, (8, batch)."""

    normals: tuple[Tensor, ...]
    uniforms: Tensor | None


class Ahead(NamedTuple):
    """What is new in the steps of one call.

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


def ahead(
    parts: Sequence[JointDensity], rules: Rules, noise: NoiseSource, first: int, count: int, gains: Tensor
) -> list[Ahead]:
    """What is new in `count` steps from number `first` on, for each part of the batch."""
    sources: list[Counters | Stacked] = []
    if isinstance(noise, CounterNoise):
        row = 0
        for part in parts:
            sources.append(noise.counters(row))
            row += part.topdown.batch_size
    else:
        for own in reference.draws(parts, rules, noise, first, count, gains):
            eight = [*own, *[own[-1]] * (_STACKED - count)]  # what is compiled takes eight, however many are used
            normals = tuple(torch.stack(layer) for layer in zip(*[d.noise for d in eight], strict=True))
            sources.append(Stacked(normals, torch.stack([not_none(d.uniform) for d in eight]) if rules.adjust else None))
    table = None
    if rules.adapt:
        table = torch.zeros(LONGEST, dtype=gains.dtype)
        table[:count] = gains[first - 1 : first - 1 + count]
    number = torch.tensor(first, dtype=torch.int32)
    steps = torch.tensor(count, dtype=torch.int32)
    return [Ahead(source, table, number, steps) for source in sources]


def parts_for(parts: Sequence[JointDensity], workers: int) -> list[JointDensity]:
    """Each of these parts of the batch in equal parts of consecutive rows, at most `workers`, as loops can take them."""
    pieces = []
    for part in parts:
        topdown, batch = part.topdown, part.topdown.batch_size
        n = batch // max(p for p in range(1, workers + 1) if batch % p == 0)
        for rows in [slice(first, first + n) for first in range(0, batch, n)]:
            held = {layer: z[rows] for layer, z in topdown.held.items()}
            own = topdown if n == batch else TopDown(topdown.generator, n, held)
            pieces.append(JointDensity(_apart(own), part.energies, part.space, None if part.x is None else part.x[rows]))
    return pieces


def _apart(topdown: TopDown) -> TopDown:
    """The same pass with no two of its tensors in one memory."""
    known: set[int] = set()

    def own(value: Tensor) -> Tensor:
        place = value.untyped_storage().data_ptr()
        value = value.clone() if place in known else value
        known.add(place)
        return value

    return topdown.mapped(own)


def longest(noise: NoiseSource) -> int:
    """Most steps of one call with this source of random numbers."""
    return LONGEST if isinstance(noise, CounterNoise) else _STACKED


def draw(density: JointDensity, rules: Rules, new: Ahead, t: Tensor) -> Draw:
    """What is new in the step that comes `t` steps after the first."""
    gain = None if new.gains is None else _at(new.gains, t)
    if isinstance(new.noise, Stacked):
        uniform = None if new.noise.uniforms is None else _at(new.noise.uniforms, t)
        return Draw(tuple(_at(n, t) for n in new.noise.normals), uniform, gain)
    shapes, number = density.topdown.shapes, new.first + t
    uniform = counted_uniform(new.noise, number, shapes[0][0]) if rules.adjust else None
    return Draw(counted_normal(new.noise, number, shapes), uniform, gain)


def begin(density: JointDensity, rules: Rules, position: Sequence[Tensor], step_size: Tensor) -> tuple[Carry, Trace]:
    """`energy_prior.langevin.step.begin`, in the memory layout that `walk` gives: it is then compiled for one layout alone."""
    carry, trace = reference.begin(density, rules, position, step_size)
    return _with_changing(carry, rules, density, [_own(value) for value in _changing(carry, rules)]), trace


def walk(density: JointDensity, rules: Rules, carry: Carry, new: Ahead) -> tuple[Carry, Trace]:
    """`energy_prior.langevin.step.advance` as a loop, to be compiled; the trace always has 64 rows."""
    like = carry.step_size
    width = 2 * len(carry.state.position) + rules.measured
    numbers = torch.arange(LONGEST, device=like.device)[:, None]
    tables = [like.new_zeros(LONGEST, width, dtype=carry.state.position[0].dtype)]
    if rules.traced:
        tables.append(like.new_zeros(LONGEST, len(like), dtype=carry.state.negative_energy.dtype))

    def more(t: Tensor, *values: Tensor) -> Tensor:
        return t < new.steps

    def once(t: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        before = _with_changing(carry, rules, density, values[len(tables) :])
        after, sound = reference.step(density, rules, before, draw(density, rules, new, t))
        rows = [sound, after.state.negative_energy.sum(1)] if rules.traced else [sound]
        written = [torch.where(numbers == t, row, table) for row, table in zip(rows, values, strict=False)]
        return t + 1, *written, *(_own(value) for value in _changing(after, rules))

    start = (torch.zeros_like(new.steps), *tables, *(_own(value) for value in _changing(carry, rules)))
    values = while_loop(more, once, start)
    end = _with_changing(carry, rules, density, values[1 + len(tables) :])
    return end, Trace(values[1], values[2] if rules.traced else None)


def finish(density: JointDensity, rules: Rules, carry: Carry, last: Ahead | Sequence[Draw]) -> End:
    """`energy_prior.langevin.step.finish`; `last`: empty, or of one step."""
    draws = last if not isinstance(last, Ahead) else [draw(density, rules, last, torch.zeros_like(last.steps))]
    return reference.finish(density, rules, carry, draws)


def _changing(carry: Carry, rules: Rules) -> list[Tensor]:
    """What of a chain changes from step to step."""
    state = carry.state
    values = [*state.position, *state.gradient, state.negative_energy]
    if rules.measured:
        values += [not_none(state.log_density), not_none(carry.acceptance), not_none(carry.accepted)]
    if rules.taming is not None:
        values += [*carry.drift, not_none(carry.was_cut), not_none(carry.cut)]
    return [*values, carry.step_size] if rules.adapt else values


def _with_changing(carry: Carry, rules: Rules, density: JointDensity, values: Sequence[Tensor]) -> Carry:
    """The chain with what `_changing` took out of it."""
    rest = iter(values)

    def layers() -> tuple[Tensor, ...]:
        return tuple(next(rest) for _ in carry.state.position)

    position, gradient, energy = layers(), layers(), next(rest)
    log_density, acceptance, accepted = (next(rest), next(rest), next(rest)) if rules.measured else (None, None, None)
    drift, was_cut, cut = (layers(), next(rest), next(rest)) if rules.taming is not None else (gradient, None, None)
    s = next(rest) if rules.adapt else carry.step_size
    c = coefficients(s, rules.scheme, density.space, rules.temperature) if rules.adapt else carry.coefficients
    return Carry(ChainState(position, energy, log_density, gradient), drift, was_cut, c, s, acceptance, accepted, cut)


def _own(value: Tensor) -> Tensor:
    """A copy in memory of its own, in the usual order, as a loop needs; the compiler makes it where the value is computed."""
    return value.clone(memory_format=torch.contiguous_format)


def _at(table: Tensor, t: Tensor) -> Tensor:
    return table.index_select(0, t[None])[0]


# ------------------------------------------------------------------------------------------------------- every core its rows


def workers_for(rows: int, cores: int) -> tuple[int, int]:
    """Into how many equal parts a batch goes, side by side, and the cores of each: the most that use over half of them."""
    counts = [p for p in range(1, min(rows, cores) + 1) if rows % p == 0]
    workers = max(p for p in counts if 2 * p * (cores // p) > cores)
    return workers, cores // workers


def side_by_side(workers: int, threads: int, function: Callable[..., _R], *arguments: Iterable[Any]) -> list[_R]:
    """`function` of each of these arguments, without gradients, `workers` at a time with `threads` cores each.

    Whatever is raised, here or there: nothing of it still runs afterwards.
    """

    def call(*own: Any) -> _R:
        with torch.no_grad():
            return function(*own)

    with _starting:
        pool = _pool(workers, threads)
    # torch keeps the settings of its compiler in contexts
    parts = [pool.submit(contextvars.copy_context().run, call, *own) for own in zip(*arguments, strict=False)]
    try:
        return [part.result() for part in parts]
    finally:
        for part in parts:
            part.cancel()
        wait(parts)


@functools.cache
def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """Kept for the process; threads that come later have as many cores as before."""
    cores, all_there = torch.get_num_threads(), threading.Barrier(workers + 1)

    def settle() -> None:
        torch.set_num_threads(threads)
        torch.get_num_threads()  # a thread takes the newest setting of any thread when it is first asked
        all_there.wait()

    pool = ThreadPoolExecutor(workers, "energy-prior", initializer=settle)
    try:
        for _ in range(workers):
            pool.submit(torch.get_num_threads)
        all_there.wait()
    except BaseException:
        all_there.abort()
        raise
    finally:
        torch.set_num_threads(cores)
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of the threads
