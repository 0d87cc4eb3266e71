"""How a step is made, by the reference or by a faster form of the same step, and what decides between them."""

from __future__ import annotations

__all__ = ["STEPPERS", "Advance", "Backend", "ChosenBackend", "Stepper", "chosen_backend", "pays_to_compile"]

import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from energy_prior.cost import Cost, evaluation_cost
from energy_prior.errors import BackendWarning
from energy_prior.langevin.density import JointDensity
from energy_prior.langevin.step import Carry, Draw, Rules, advance

Advance = Callable[[JointDensity, Rules, Carry, Sequence[Draw]], tuple[Carry, Tensor]]
"""Steps of every chain of the batch, as `energy_prior.langevin.step.advance` makes them."""

ChosenBackend = Literal["eager", "compiled"]
Backend = Literal["auto", "eager", "compiled"]
"""How steps are made; `ChainSettings` says what each is."""

_COMPILE_SECONDS, _COMPILE_SECONDS_PER_OPERATION = 20.0, 0.05
_SAVED_SECONDS_PER_OPERATION = 4e-6
_SAVED_SHARE, _FLOPS_PER_THREAD = 0.2, 5e10

_KEPT = 64
_compiled: OrderedDict[Hashable, _Compiled] = OrderedDict()


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


def _advance_compiled(density: JointDensity, rules: Rules, carry: Carry, draws: Sequence[Draw]) -> tuple[Carry, Tensor]:
    """`advance` through `torch.compile`, without graph breaks.

    It is compiled when steps of their kind (the same modules, layers, shapes and rules) are first made, and used again by every
    further chain of that kind in this process. Where that is not possible (no C++ compiler, or code of the generator
    that cannot be compiled), a `BackendWarning` says so once, and the reference is used.
    """
    kind = density.kind, density.topdown.batch_size
    if kind not in _compiled:
        _compiled[kind] = _Compiled(f"{type(density.topdown.generator).__name__}, batch of {density.topdown.batch_size}")
        if len(_compiled) > _KEPT:
            _compiled.popitem(last=False)
    _compiled.move_to_end(kind)
    return _compiled[kind](density, rules, carry, draws)


class _Compiled:
    """`advance`, compiled for one kind of chain; the reference from the first failure on."""

    def __init__(self, name: str) -> None:
        # torch.compile keeps what it compiled with the code object, a few variants each: a kind has its own code object
        own = types.FunctionType(advance.__code__.replace(), advance.__globals__, advance.__name__)
        self._advance: Advance | None = torch.compile(own, fullgraph=True, dynamic=False)
        self._name = name

    def __call__(self, density: JointDensity, rules: Rules, carry: Carry, draws: Sequence[Draw]) -> tuple[Carry, Tensor]:
        if self._advance is not None:
            try:
                return self._advance(density, rules, carry, draws)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler, or code of the user's under it, raises
                self._advance = None
                reason = next((line for line in str(error).splitlines() if line.strip()), "")
                warnings.warn(
                    f"Langevin steps of {self._name}, cannot be compiled and run in eager mode: {type(error).__name__}: "
                    f'{reason} (backend="eager" never tries)',
                    BackendWarning,
                    stacklevel=2,
                )
        return advance(density, rules, carry, draws)


class Stepper(NamedTuple):
    """How a backend makes steps.

    Attributes:
        advance: the steps.
        span: how many of them it makes in one call where nothing has to be looked at in between: what a call costs beside its
            steps is paid once for all of them.
    """

    advance: Advance
    span: int


STEPPERS: Mapping[ChosenBackend, Stepper] = {"eager": Stepper(advance, 1), "compiled": Stepper(_advance_compiled, 4)}
"""How steps are made, by backend."""
