"""How a step is made, by the reference or by a faster form of the same step, and what decides between them."""

from __future__ import annotations

__all__ = [
    "STEPPERS",
    "Backend",
    "ChosenBackend",
    "StepBackend",
    "Stepper",
    "chosen_backend",
    "pays_to_compile",
    "stepper_for",
]

import contextlib
import functools
import threading
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from energy_prior._util import first_line, not_none
from energy_prior.errors import BackendWarning
from energy_prior.langevin.backends import _loops as loops
from energy_prior.langevin.cost import Cost, evaluation_cost
from energy_prior.langevin.density import JointDensity
from energy_prior.langevin.noise import CounterNoise, Counters, NoiseSource, RandomNoise, counted_normal
from energy_prior.langevin.step import Carry, Draw, End, Rules, Trace, advance, begin, draws, finish

_R = TypeVar("_R")

ChosenBackend = Literal["eager", "compiled"]
StepBackend = Literal["auto", "eager", "compiled"]
"""How chains that something watches on the way are made, as in training."""
Backend = Literal["auto", "eager", "compiled", "graph", "triton"]
"""How chains are made; `ChainSettings` says what each is."""

_COMPILE_SECONDS, _COMPILE_SECONDS_PER_OPERATION = 20.0, 0.05
_SAVED_SECONDS_PER_OPERATION = 4e-6
_SAVED_SHARE, _FLOPS = 0.2, 1e11
_MANY_OPERATIONS = 200

_KEPT = 64
_kinds: OrderedDict[Hashable, _Kind] = OrderedDict()
_choosing, _compiling = threading.Lock(), threading.RLock()


def chosen_backend(backend: StepBackend, density: JointDensity, rows: int, evaluations: int) -> ChosenBackend:
    """What "auto" stands for: "compiled" where that takes less time than it saves, as far as counting can tell.

    The choice depends on counts alone, never on a clock or on the machine: a call that is repeated makes the same steps again.

    Args:
        backend: what was asked for; other than "auto" it is what comes back.
        density: of the kind that is to be evaluated, with any number of rows.
        rows: of the batch.
        evaluations: gradient evaluations of the batch that are to come.
    """
    if backend != "auto":
        return backend
    return "compiled" if pays_to_compile(evaluation_cost(density), rows, evaluations) else "eager"


def pays_to_compile(cost: Cost, rows: int, evaluations: int) -> bool:
    """Whether compiling takes less time than it saves, by rough figures that lean towards waiting for no compiler."""
    saved = evaluations * (cost.operations * _SAVED_SECONDS_PER_OPERATION + _SAVED_SHARE * rows * cost.flops / _FLOPS)
    return saved > 1.5 * (_COMPILE_SECONDS + _COMPILE_SECONDS_PER_OPERATION * cost.operations)


class _Kind:
    """What is compiled for one kind of chain (the same modules, layers and shapes), each when it is first needed.

    It is compiled without graph breaks, and used again by every further chain of that kind in this process. Where that is not
    possible (no C++ compiler, or code of the generator that cannot be compiled), a `BackendWarning` says so once, and
    from then on the reference is used.

    Args:
        name: for people, what is compiled.
        options: of torch.compile.
    """

    def __init__(self, name: str, options: dict[str, Any] | None) -> None:
        self.failed = False
        self._name, self._options = name, options
        self._compiled: dict[Hashable, Callable[..., Any]] = {}
        self._ready: set[Hashable] = set()

    def call(
        self, function: Callable[..., _R], variant: Hashable, *arguments: Any, otherwise: Callable[..., _R] | None = None
    ) -> _R:
        """`function` of these arguments.

        Args:
            function: what is compiled.
            variant: what in the arguments it is compiled for anew, beside their shapes.
            arguments: of the function.
            otherwise: does the same, and is called with them, without a warning, where this kind cannot be compiled.
        """
        if not self.failed:
            key = function, variant
            with contextlib.nullcontext() if key in self._ready else _compiling:  # one thread compiles, others wait for it
                if not self.failed:
                    try:
                        result = self._compiled_for(function, key)(*arguments)
                    except torch.OutOfMemoryError:
                        raise
                    except Exception as error:  # whatever a compiler, or code of the user's under it, raises
                        self._fail(error, quietly=otherwise is not None)
                    else:
                        self._ready.add(key)
                        return result
        return (otherwise or function)(*arguments)

    def _compiled_for(self, function: Callable[..., Any], key: Hashable) -> Callable[..., Any]:
        if key not in self._compiled:
            # torch.compile keeps what it compiled with the code object, a few variants each: this gets a code object of its own
            own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
            self._compiled[key] = torch.compile(own, fullgraph=True, dynamic=False, options=self._options)
        return self._compiled[key]

    def _fail(self, error: Exception, *, quietly: bool) -> None:
        self.failed = True
        internals: Any = torch._C
        internals._autograd._saved_tensors_hooks_enable()  # a compiler that stops in torch.func leaves them disabled
        if not quietly:
            warnings.warn(
                f"Langevin steps of {self._name}, cannot be compiled and run in eager mode: {type(error).__name__}: "
                f'{first_line(error)} (backend="eager" never tries)',
                BackendWarning,
                stacklevel=2,
            )


@functools.cache
def _cpu_options() -> dict[str, Any]:
    # the compiler's own layouts cost more than they bring: groups of channels are copied to and fro
    options: dict[str, Any] = {"layout_optimization": False}
    try:
        from energy_prior.langevin.backends._passes import BiasesApart

        more: dict[str, Any] = {**options, "post_grad_custom_post_pass": BiasesApart()}
        torch.compile(_random_noise, options=more)  # looks at the options alone
    except (ImportError, RuntimeError):  # an older torch has no such passes, or not as an option
        return options
    return more


def _kind(density: JointDensity, threads: int | None = None) -> _Kind:
    """What is compiled for densities like this one; the longest unused kind is dropped where there are many.

    Args:
        density: with the layers and the number of rows.
        threads: that each loop has (`energy_prior.langevin.backends._loops`); None: what is compiled is no loop.
    """
    topdown = density.topdown
    key = density.kind, topdown.batch_size, threads
    with _choosing:
        if key not in _kinds:
            options = _cpu_options() if topdown.reference.device.type == "cpu" else None
            if threads is not None:  # C++ around the operations, too: the interpreter would let one thread at a time through
                options = {**(options or {}), "cpp_wrapper": True, "cpp.threads": threads}
            _kinds[key] = _Kind(f"{type(topdown.generator).__name__}, batch of {topdown.batch_size}", options)
            if len(_kinds) > _KEPT:
                _kinds.popitem(last=False)
        _kinds.move_to_end(key)
        return _kinds[key]


def _compiled(
    function: Callable[..., _R], threads: int | None = None, otherwise: Callable[..., _R] | None = None
) -> Callable[..., _R]:
    """A function of (density, rules, …) through `torch.compile`; for loops: with their `threads`, and what does the same."""

    def call(density: JointDensity, rules: Rules, *arguments: Any) -> _R:
        noise = tuple(type(a.noise) for a in arguments if isinstance(a, loops.Ahead))
        return _kind(density, threads).call(function, (rules, noise), density, rules, *arguments, otherwise=otherwise)

    return call


def _random_noise(density: JointDensity, shapes: Sequence[tuple[int, ...]]) -> NoiseSource:
    return RandomNoise(shapes, density.topdown.reference)


def _counted_noise(density: JointDensity, shapes: Sequence[tuple[int, ...]], *, compiled: bool = True) -> NoiseSource:
    """`CounterNoise`, compiled with the rest of the kind, where torch's own generator is slow and the dtype is float32."""
    like = density.topdown.reference
    if (like.dtype, like.device.type) != (torch.float32, "cpu") or not CounterNoise.reaches(shapes):
        return RandomNoise(shapes, like)

    def normal(counters: Counters, step: Tensor, shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
        return _kind(density).call(counted_normal, shapes, counters, step, shapes)

    return CounterNoise(shapes, like, normal if compiled else counted_normal)


def _whole_calls(span: int) -> Callable[[NoiseSource, int, bool], int]:
    """`span` steps at a time, or one where fewer are left or something is accepted or rejected."""
    return lambda noise, left, adjust: span if span <= left and not adjust else 1


class Stepper(NamedTuple):
    """How a backend makes a chain: `energy_prior.langevin.step` or a faster form of it.

    Attributes:
        begin: evaluates the start.
        advance: the steps; of (density, rules, carry, what `draws` gave for that part).
        finish: where they have arrived; of (density, rules, carry, what `draws` gave for a last step, or an empty sequence).
        noise: fresh random numbers for a chain of such a density, from the shapes (batch, *shape) of its free layers.
        draws: what is new in `count` steps from number `first` on, for each part of the batch, of (parts, rules, noise, first,
            count, gains).
        span: how many of the steps that are left are made in one call, of (noise, left, adjust): what a call costs beside its
            steps is paid once for all of them.
        parts: the parts of a batch as this backend takes them: the same rows, perhaps in more parts.
        workers: how many parts of the batch run side by side.
        threads: of each of them; 0: as many as torch has.
    """

    begin: Callable[[JointDensity, Rules, Sequence[Tensor], Tensor], tuple[Carry, Trace]]
    advance: Callable[[JointDensity, Rules, Carry, Any], tuple[Carry, Trace]]
    finish: Callable[[JointDensity, Rules, Carry, Any], End]
    noise: Callable[[JointDensity, Sequence[tuple[int, ...]]], NoiseSource]
    draws: Callable[[Sequence[JointDensity], Rules, NoiseSource, int, int, Tensor], Sequence[Any]]
    span: Callable[[NoiseSource, int, bool], int]
    parts: Callable[[Sequence[JointDensity]], Sequence[JointDensity]] = list
    workers: int = 1
    threads: int = 0

    def each(self, function: Callable[..., _R], *arguments: Iterable[Any]) -> list[_R]:
        """`function` of the arguments of each part."""
        if self.workers == 1:
            return list(map(function, *arguments))
        return loops.side_by_side(self.workers, self.threads, function, *arguments)


STEPPERS: Mapping[ChosenBackend | Literal["compiled_steps"], Stepper] = {
    "eager": Stepper(begin, advance, finish, _random_noise, draws, _whole_calls(1)),
    "compiled": Stepper(_compiled(begin), _compiled(advance), _compiled(finish), _counted_noise, draws, _whole_calls(4)),
    "compiled_steps": Stepper(begin, _compiled(advance), finish, _counted_noise, draws, _whole_calls(1)),
}
"""How chains are made step by step; "graph" and "triton" run whole chains at once (`energy_prior.langevin.backends.graph`, `fused`)."""


@functools.cache
def _loops(workers: int, threads: int) -> Stepper:
    """Loops of compiled steps on a CPU (`energy_prior.langevin.backends._loops`); what cannot be a loop is compiled step by step."""
    single, one_draw = STEPPERS["compiled"], _compiled(loops.draw)

    def draws_of(density: JointDensity, rules: Rules, new: loops.Ahead) -> Iterator[Draw]:
        for t in range(int(new.steps)):
            yield one_draw(density, rules, new, new.steps.new_full((), t))

    def one_by_one(density: JointDensity, rules: Rules, carry: Carry, new: loops.Ahead) -> tuple[Carry, Trace]:
        traces = []
        for draw in draws_of(density, rules, new):
            carry, trace = single.advance(density, rules, carry, [draw])
            traces.append(trace)
        energy = torch.cat([not_none(t.energy) for t in traces]) if rules.traced else None
        return carry, Trace(torch.cat([t.health for t in traces]), energy)

    def single_finish(density: JointDensity, rules: Rules, carry: Carry, last: loops.Ahead | Sequence[Draw]) -> End:
        return single.finish(
            density, rules, carry, list(draws_of(density, rules, last)) if isinstance(last, loops.Ahead) else last
        )

    walk = _compiled(loops.walk, threads, one_by_one)

    def advance(density: JointDensity, rules: Rules, carry: Carry, new: loops.Ahead) -> tuple[Carry, Trace]:
        carry, trace = walk(density, rules, carry, new)
        made = int(new.steps)
        return carry, Trace(trace.health[:made], None if trace.energy is None else trace.energy[:made])

    return Stepper(
        begin=_compiled(loops.begin, threads, single.begin),
        advance=advance,
        finish=_compiled(loops.finish, threads, single_finish),
        noise=_counted_noise,
        draws=loops.ahead,
        span=lambda noise, left, adjust: min(left, loops.longest(noise)),
        parts=lambda parts: loops.parts_for(parts, workers),
        workers=workers,
        threads=threads,
    )


def stepper_for(backend: ChosenBackend, density: JointDensity, *, at_once: bool = False) -> Stepper:
    """How a chain on `density` is made: "compiled" compiles all of it, but of deep models a single step.

    Compiling takes as long as there are operations: with the start and the end they are three times those of a step. That, and
    loops, save what a call costs, which is much beside the step of a small model and nothing beside that of a deep one. What
    was found to be no loop, or not to be compiled at all, is made in single calls, or by the reference.

    Args:
        backend: as it was chosen.
        density: of the batch, or of the first of its parts.
        at_once: something records the steps of whole chains, so there can be no loop in them.
    """
    if backend == "compiled" and evaluation_cost(density).operations > _MANY_OPERATIONS:
        return STEPPERS["compiled_steps"]
    topdown = density.topdown
    if backend == "compiled" and not at_once and topdown.reference.device.type == "cpu":
        workers, threads = loops.workers_for(topdown.batch_size, torch.get_num_threads())
        rows = topdown.batch_size // workers
        loop, single = (_kinds.get((density.kind, rows, each)) for each in (threads, None))
        if loop is None or not loop.failed:
            return _loops(workers, threads)
        if single is not None and single.failed:  # the same noise as in the chain that found out
            return STEPPERS["eager"]._replace(noise=functools.partial(_counted_noise, compiled=False))
    return STEPPERS[backend]
