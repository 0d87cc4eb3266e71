"""The reference's steps through `torch.compile`; on a CPU as loops of many steps, with every core at rows of its own.

Compiling takes as long as there are operations: with the start and the end they are three times those of a step. That, and
loops, save what a call costs, which is much beside the step of a small model and nothing beside that of a deep one. So of
deep models a single step is compiled, on a CPU layer by layer. What was found to be no loop, or not to be compiled at all, is
made in single calls, or by the reference.
"""

from __future__ import annotations

__all__ = ["BACKEND", "Compiled"]

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from energy_prior.langevin import step as reference
from energy_prior.langevin.backends import Backend
from energy_prior.langevin.backends import _loops as loops
from energy_prior.langevin.backends._compiler import cache_for, failed
from energy_prior.langevin.backends._regions import Regional
from energy_prior.langevin.cost import Cost, evaluation_cost
from energy_prior.langevin.density import JointDensity
from energy_prior.langevin.noise import CounterNoise, NoiseSource, RandomNoise, counted_normal
from energy_prior.langevin.step import Draw, Draws, End, Info, State, StepConfig, per_chain

_R = TypeVar("_R")

_COMPILE_SECONDS, _COMPILE_SECONDS_PER_OPERATION = 20.0, 0.05
_SAVED_SECONDS_PER_OPERATION = 4e-6
_SAVED_SHARE, _FLOPS = 0.2, 1e11
_MANY_OPERATIONS = 200
_TOGETHER = 4  # steps in one call that is no loop


class Compiled(Backend):
    """One compiled form per kind of chain: the same modules, layers held, number of rows and static configuration."""

    name: str = "compiled"
    fallback: str | None = "eager"

    def init(
        self, density: JointDensity, config: StepConfig, position: Sequence[Tensor], step_size: float | Tensor
    ) -> tuple[State, Info]:
        s = per_chain(step_size, position)
        if _deep(density):
            return reference.init(density, config, position, s)
        if _looped(density):
            return _call(loops.init, density, config, position, s, loop=True, fallback=_single(reference.init))
        return _single(reference.init)(density, config, position, s)

    def step(self, density: JointDensity, config: StepConfig, state: State, draws: Draws) -> tuple[State, Info]:
        if isinstance(density, Regional):
            return reference.step(density, config, state, _drawn(density.plain, config, draws))
        if not _looped(density):
            return _single(reference.step)(density, config, state, _drawn(density, config, draws))
        new = loops.ahead(config, draws)

        def one_by_one(*arguments: Any) -> tuple[State, Info]:
            return _single(reference.step)(density, config, state, loops.each(density, config, new))

        state, info = _call(loops.step, density, config, state, new, loop=True, fallback=one_by_one)
        n = draws.steps
        check, f = (None if table is None else table[:n] for table in (info.finite_check, info.negative_energy))
        return state, info._replace(finite_check=check, negative_energy=f)

    def finalize(self, density: JointDensity, config: StepConfig, state: State, draws: Draws) -> tuple[End, Info]:
        if _deep(density):
            return reference.finalize(density, config, state, _drawn(density, config, draws))
        if not _looped(density):
            return _single(reference.finalize)(density, config, state, _drawn(density, config, draws))
        last = loops.ahead(config, draws) if draws.steps else None

        def single(*arguments: Any) -> tuple[End, Info]:
            each = [] if last is None else loops.each(density, config, last)
            return _single(reference.finalize)(density, config, state, each)

        return _call(loops.finalize, density, config, state, last, loop=True, fallback=single)

    def span(self, density: JointDensity, config: StepConfig, noise: NoiseSource, left: int) -> int:
        if _looped(density):
            return min(left, loops.longest(noise))
        return 1 if _deep(density) or config.adjust or left < _TOGETHER else _TOGETHER

    def pays(self, cost: Cost, rows: int, evaluations: int) -> bool:
        """By rough figures of what compiling takes and saves, which lean towards waiting for no compiler."""
        saved = evaluations * (cost.operations * _SAVED_SECONDS_PER_OPERATION + _SAVED_SHARE * rows * cost.flops / _FLOPS)
        return saved > 1.5 * (_COMPILE_SECONDS + _COMPILE_SECONDS_PER_OPERATION * cost.operations)

    def workers(self, density: JointDensity, rows: int) -> tuple[int, int]:
        return loops.workers_for(rows, torch.get_num_threads()) if _looped(density) else (1, 0)

    def noise(self, shapes: Sequence[tuple[int, ...]], like: Tensor) -> NoiseSource:
        """Counter-based where torch's own generator is slow, and where it can be computed inside the steps."""
        if (like.dtype, like.device.type) == (torch.float32, "cpu") and CounterNoise.reaches(shapes):
            return CounterNoise(shapes, like)
        return RandomNoise(shapes, like)

    def prepare(self, density: JointDensity) -> JointDensity:
        if _on_cpu(density) and (_deep(density) or failed(density, "call")):
            return Regional(density)
        return loops.prepare(density) if _looped(density) else density


BACKEND = Compiled()


def _deep(density: JointDensity) -> bool:
    return isinstance(density, Regional) or evaluation_cost(density).operations > _MANY_OPERATIONS


def _on_cpu(density: JointDensity) -> bool:
    return density.topdown.reference.device.type == "cpu"


def _looped(density: JointDensity) -> bool:
    return _on_cpu(density) and not _deep(density) and not failed(density, "loop")


def _call(
    function: Callable[..., _R],
    density: JointDensity,
    config: StepConfig,
    *arguments: Any,
    loop: bool = False,
    fallback: Callable[..., _R] | None = None,
) -> _R:
    """A function of (density, config, …), compiled."""
    noise = tuple(type(a.noise) for a in arguments if isinstance(a, loops.Ahead))
    cache = cache_for(density, "loop", torch.get_num_threads()) if loop else cache_for(density)
    return cache.call(function, (config, noise), density, config, *arguments, fallback=fallback)


def _single(function: Callable[..., _R]) -> Callable[..., _R]:
    """A function of (density, config, …), compiled as it is; what is not possible so, on a CPU as the reference by regions."""

    def by_regions(density: JointDensity, *arguments: Any) -> _R:
        return function(Regional(density), *arguments)

    def single(density: JointDensity, *arguments: Any) -> _R:
        return _call(function, density, *arguments, fallback=by_regions if _on_cpu(density) else None)

    return single


def _drawn(density: JointDensity, config: StepConfig, draws: Draws) -> list[Draw]:
    """What is new in each of these steps; numbers that are computed from counters are, too, by what is compiled."""
    if not isinstance(draws.noise, CounterNoise):
        return draws.each(config)
    counters, shapes = draws.noise.counters(), density.topdown.shapes
    drawn = []
    for number in range(draws.first, draws.first + draws.steps):
        at = counters.row.new_full((), number)
        normals = cache_for(density).call(counted_normal, shapes, counters, at, shapes)
        uniform = draws.noise.uniform(number) if config.adjust else None
        drawn.append(Draw(normals, uniform, draws.gains[number - 1] if config.adapt else None))
    return drawn
