"""How a step is made, by the reference or by a faster form of the same step, and what decides between them."""

from __future__ import annotations

__all__ = ["STEPPERS", "Backend", "ChosenBackend", "StepBackend", "Stepper", "chosen_backend", "pays_to_compile"]

import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from energy_prior.cost import Cost, evaluation_cost
from energy_prior.errors import BackendWarning
from energy_prior.langevin.density import JointDensity
from energy_prior.langevin.noise import CounterNoise, NoiseSource, RandomNoise, counted
from energy_prior.langevin.step import Carry, Draw, End, Rules, Trace, advance, begin, finish

_R = TypeVar("_R")

ChosenBackend = Literal["eager", "compiled"]
StepBackend = Literal["auto", "eager", "compiled"]
Backend = Literal["auto", "eager", "compiled", "triton"]
"""How steps are made; `ChainSettings` says what each is."""

_COMPILE_SECONDS, _COMPILE_SECONDS_PER_OPERATION = 20.0, 0.05
_SAVED_SECONDS_PER_OPERATION = 4e-6
_SAVED_SHARE, _FLOPS = 0.2, 1e11

_KEPT = 64
_kinds: OrderedDict[Hashable, _Kind] = OrderedDict()
_numbers: OrderedDict[Hashable, Callable[[Tensor, Tensor, int], Tensor]] = OrderedDict()


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


def _compile(function: Callable[..., _R]) -> Callable[..., _R]:
    # torch.compile keeps what it compiled with the code object, a few variants each: this gets a code object of its own
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(own, fullgraph=True, dynamic=False)


def _kept(store: OrderedDict[Hashable, _R], key: Hashable, make: Callable[[], _R]) -> _R:
    """What `store` has under `key`, made if it is new; the longest unused one is dropped where there are many."""
    if key not in store:
        store[key] = make()
        if len(store) > _KEPT:
            store.popitem(last=False)
    store.move_to_end(key)
    return store[key]


class _Kind:
    """What is compiled for one kind of chain: `begin`, `advance` and `finish`, each when it is first needed.

    Compiled without graph breaks when steps of their kind (the same modules, layers, shapes and rules) are first made, and used
    again by every further chain of that kind in this process. Where that is not possible (no C++ compiler, or code of the
    generator that cannot be compiled), a `BackendWarning` says so once, and the reference is used from then on.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._failed = False
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}

    def call(self, function: Callable[..., _R], *arguments: Any) -> _R:
        if function not in self._compiled:
            self._compiled[function] = _compile(function)
        if not self._failed:
            try:
                return self._compiled[function](*arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler, or code of the user's under it, raises
                self._failed = True
                reason = next((line for line in str(error).splitlines() if line.strip()), "")
                warnings.warn(
                    f"Langevin steps of {self._name}, cannot be compiled and run in eager mode: {type(error).__name__}: "
                    f'{reason} (backend="eager" never tries)',
                    BackendWarning,
                    stacklevel=2,
                )
        return function(*arguments)


def _compiled(function: Callable[..., _R]) -> Callable[..., _R]:
    """`function` of the reference through `torch.compile`; its first argument is the density."""

    def call(*arguments: Any) -> _R:
        density: JointDensity = arguments[0]
        name = f"{type(density.topdown.generator).__name__}, batch of {density.topdown.batch_size}"
        kind = _kept(_kinds, (density.kind, density.topdown.batch_size), lambda: _Kind(name))
        return kind.call(function, *arguments)

    return call


def _counted_compiled(key: Tensor, step: Tensor, pairs: int) -> Tensor:
    """`counted` through `torch.compile`; where that fails, `counted` itself: the steps will fail too, and say so."""
    try:
        return _kept(_numbers, pairs, lambda: _compile(counted))(key, step, pairs)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        _numbers[pairs] = counted
        return counted(key, step, pairs)


def _fast_noise(shapes: Sequence[tuple[int, ...]], reference: Tensor) -> NoiseSource:
    if (reference.dtype, reference.device.type) == (torch.float32, "cpu"):
        return CounterNoise(shapes, reference, _counted_compiled)
    return RandomNoise(shapes, reference)


class Stepper(NamedTuple):
    """How a backend makes a chain: `energy_prior.langevin.step` or a faster form of it.

    Attributes:
        begin: evaluates the start.
        advance: the steps.
        finish: where they have arrived.
        noise: fresh random numbers for a chain, from the shapes (batch, *shape) of its free layers and a tensor of their kind.
        span: how many unadjusted steps are made in one call where nothing has to be looked at in between: what a call costs
            beside its steps is paid once for all of them.
    """

    begin: Callable[[JointDensity, Rules, Sequence[Tensor], Tensor], tuple[Carry, Trace]]
    advance: Callable[[JointDensity, Rules, Carry, Sequence[Draw]], tuple[Carry, Trace]]
    finish: Callable[[JointDensity, Rules, Carry, Draw | None], End]
    noise: Callable[[Sequence[tuple[int, ...]], Tensor], NoiseSource]
    span: int


STEPPERS: Mapping[ChosenBackend, Stepper] = {
    "eager": Stepper(begin, advance, finish, RandomNoise, span=1),
    "compiled": Stepper(_compiled(begin), _compiled(advance), _compiled(finish), _fast_noise, span=4),
}
"""How chains are made step by step, by backend; "triton" runs a whole chain at once (`energy_prior.langevin.fused`)."""
