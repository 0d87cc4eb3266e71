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

import functools
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from energy_prior._util import first_line
from energy_prior.cost import Cost, evaluation_cost
from energy_prior.errors import BackendWarning
from energy_prior.langevin.density import JointDensity
from energy_prior.langevin.noise import CounterNoise, NoiseSource, RandomNoise, counted
from energy_prior.langevin.step import Carry, Draw, End, Rules, Trace, advance, begin, finish

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
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._name = name
        self._options = _cpu_options() if device.type == "cpu" else None
        self._failed = False
        self._compiled: dict[Hashable, Callable[..., Any]] = {}

    def call(self, function: Callable[..., _R], variant: Hashable, *arguments: Any) -> _R:
        """`function` of these arguments; `variant`: what in them it is compiled for anew, beside their shapes."""
        if (function, variant) not in self._compiled:
            # torch.compile keeps what it compiled with the code object, a few variants each: this gets a code object of its own
            own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
            self._compiled[function, variant] = torch.compile(own, fullgraph=True, dynamic=False, options=self._options)
        if not self._failed:
            try:
                return self._compiled[function, variant](*arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler, or code of the user's under it, raises
                self._failed = True
                internals: Any = torch._C
                internals._autograd._saved_tensors_hooks_enable()  # a compiler that stops in torch.func leaves them disabled
                warnings.warn(
                    f"Langevin steps of {self._name}, cannot be compiled and run in eager mode: {type(error).__name__}: "
                    f'{first_line(error)} (backend="eager" never tries)',
                    BackendWarning,
                    stacklevel=2,
                )
        return function(*arguments)


@functools.cache
def _cpu_options() -> dict[str, Any]:
    # the compiler's own layouts cost more than they bring: groups of channels are copied to and fro
    options: dict[str, Any] = {"layout_optimization": False}
    try:
        from energy_prior.langevin.passes import BiasesApart

        more: dict[str, Any] = {**options, "post_grad_custom_post_pass": BiasesApart()}
        torch.compile(_random_noise, options=more)  # looks at the options alone
    except (ImportError, RuntimeError):  # an older torch has no such passes, or not as an option
        return options
    return more


def _kind(density: JointDensity) -> _Kind:
    """What is compiled for densities like this one; the longest unused kind is dropped where there are many."""
    topdown = density.topdown
    key = density.kind, topdown.batch_size
    if key not in _kinds:
        _kinds[key] = _Kind(f"{type(topdown.generator).__name__}, batch of {topdown.batch_size}", topdown.reference.device)
        if len(_kinds) > _KEPT:
            _kinds.popitem(last=False)
    _kinds.move_to_end(key)
    return _kinds[key]


def _compiled(function: Callable[..., _R]) -> Callable[..., _R]:
    """`begin`, `advance` or `finish` through `torch.compile`."""

    def call(density: JointDensity, rules: Rules, *arguments: Any) -> _R:
        return _kind(density).call(function, rules, density, rules, *arguments)

    return call


def _random_noise(density: JointDensity, shapes: Sequence[tuple[int, ...]]) -> NoiseSource:
    return RandomNoise(shapes, density.topdown.reference)


def _counted_noise(density: JointDensity, shapes: Sequence[tuple[int, ...]]) -> NoiseSource:
    """`CounterNoise`, compiled with the rest of the kind, where torch's own generator is slow and the dtype is float32."""
    like = density.topdown.reference
    if (like.dtype, like.device.type) != (torch.float32, "cpu"):
        return RandomNoise(shapes, like)

    def make(key: Tensor, step: Tensor, pairs: int) -> Tensor:
        return _kind(density).call(counted, pairs, key, step, pairs)

    return CounterNoise(shapes, like, make)


class Stepper(NamedTuple):
    """How a backend makes a chain: `energy_prior.langevin.step` or a faster form of it.

    Attributes:
        begin: evaluates the start.
        advance: the steps.
        finish: where they have arrived.
        noise: fresh random numbers for a chain of such a density, from the shapes (batch, *shape) of its free layers.
        span: how many unadjusted steps are made in one call where nothing has to be looked at in between: what a call costs
            beside its steps is paid once for all of them.
    """

    begin: Callable[[JointDensity, Rules, Sequence[Tensor], Tensor], tuple[Carry, Trace]]
    advance: Callable[[JointDensity, Rules, Carry, Sequence[Draw]], tuple[Carry, Trace]]
    finish: Callable[[JointDensity, Rules, Carry, Draw | None], End]
    noise: Callable[[JointDensity, Sequence[tuple[int, ...]]], NoiseSource]
    span: int


STEPPERS: Mapping[ChosenBackend | Literal["compiled_steps"], Stepper] = {
    "eager": Stepper(begin, advance, finish, _random_noise, span=1),
    "compiled": Stepper(_compiled(begin), _compiled(advance), _compiled(finish), _counted_noise, span=4),
    "compiled_steps": Stepper(begin, _compiled(advance), finish, _counted_noise, span=1),
}
"""How chains are made step by step; "graph" and "triton" run whole chains at once (`energy_prior.langevin.graphs`, `fused`)."""


def stepper_for(backend: ChosenBackend, density: JointDensity) -> Stepper:
    """How a chain on `density` is made: "compiled" compiles all of it, but of deep models a single step.

    Compiling takes as long as there are operations: four steps in one call, the start and the end are seven times those of a
    step. They save what a call costs, which is much beside the step of a small model and nothing beside that of a deep one.
    """
    if backend == "compiled" and evaluation_cost(density).operations > _MANY_OPERATIONS:
        return STEPPERS["compiled_steps"]
    return STEPPERS[backend]
