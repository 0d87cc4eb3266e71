"""How a step is made, by the reference or by a faster form of the same step, and what decides between them."""

from __future__ import annotations

__all__ = ["STEPPERS", "Backend", "ChosenBackend", "Stepper", "chosen_backend", "pays_to_compile"]

import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from typing_extensions import ParamSpec

from energy_prior.cost import Cost, evaluation_cost
from energy_prior.errors import BackendWarning
from energy_prior.langevin.density import JointDensity
from energy_prior.langevin.noise import Counter, CounterNoise, NoiseSource, RandomNoise
from energy_prior.langevin.step import Carry, Draw, End, Rules, advance, begin, finish

_P = ParamSpec("_P")
_R = TypeVar("_R")

ChosenBackend = Literal["eager", "compiled"]
Backend = Literal["auto", "eager", "compiled"]
"""How steps are made; `ChainSettings` says what each is."""

_COMPILE_SECONDS, _COMPILE_SECONDS_PER_OPERATION = 20.0, 0.05
_SAVED_SECONDS_PER_OPERATION = 4e-6
_SAVED_SHARE, _FLOPS_PER_THREAD = 0.2, 5e10

_KEPT = 64
_kinds: OrderedDict[Hashable, _Kind] = OrderedDict()


def chosen_backend(backend: Backend, density: JointDensity, rows: int, evaluations: int) -> ChosenBackend:
    """What "auto" stands for: "compiled" where that takes less time than it saves, as far as counting can tell.

    The choice depends on counts alone, never on a clock: a call that is repeated makes the same steps again.

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
    speed = _FLOPS_PER_THREAD * torch.get_num_threads()
    saved = evaluations * (cost.operations * _SAVED_SECONDS_PER_OPERATION + _SAVED_SHARE * rows * cost.flops / speed)
    return saved > 1.5 * (_COMPILE_SECONDS + _COMPILE_SECONDS_PER_OPERATION * cost.operations)


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
            # torch.compile keeps what it compiled with the code object, a few variants each: a kind has its own code object
            code = function.__code__.replace()
            own = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
            self._compiled[function] = torch.compile(own, fullgraph=True, dynamic=False)
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


def _compiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`function` of the reference through `torch.compile`; its first argument is the density."""

    def call(*arguments: _P.args, **keywords: _P.kwargs) -> _R:
        density: Any = arguments[0]
        kind = density.kind, density.topdown.batch_size
        if kind not in _kinds:
            _kinds[kind] = _Kind(f"{type(density.topdown.generator).__name__}, batch of {density.topdown.batch_size}")
            if len(_kinds) > _KEPT:
                _kinds.popitem(last=False)
        _kinds.move_to_end(kind)
        return _kinds[kind].call(function, *arguments, **keywords)

    return call


class Stepper(NamedTuple):
    """How a backend makes a chain: `energy_prior.langevin.step` or a faster form of it.

    Attributes:
        begin: evaluates the start.
        advance: the steps.
        finish: where they have arrived.
        span: how many steps are made in one call where nothing has to be looked at in between: what a call costs beside its
            steps is paid once for all of them.
        counts: it is fastest with `CounterNoise`, which it makes itself.
    """

    begin: Callable[[JointDensity, Rules, Sequence[Tensor], Tensor, Counter | None], tuple[Carry, Tensor]]
    advance: Callable[[JointDensity, Rules, Carry, Sequence[Draw]], tuple[Carry, Tensor]]
    finish: Callable[[JointDensity, Rules, Carry, Draw | None], End]
    span: int
    counts: bool

    def noise(self, shapes: Sequence[tuple[int, ...]], reference: Tensor) -> NoiseSource:
        """Fresh random numbers for a chain; from a counter where that is made for these numbers."""
        counted = self.counts and reference.dtype == torch.float32
        return CounterNoise(shapes, reference) if counted else RandomNoise(shapes, reference)


STEPPERS: Mapping[ChosenBackend, Stepper] = {
    "eager": Stepper(begin, advance, finish, span=1, counts=False),
    "compiled": Stepper(_compiled(begin), _compiled(advance), _compiled(finish), span=4, counts=True),
}
"""How chains are made, by backend."""
