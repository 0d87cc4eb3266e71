"""How a step is made, by the reference or by a faster form of the same step, and what decides between them."""

from __future__ import annotations

__all__ = [
    "STEPPERS",
    "UNROLLED",
    "Advance",
    "Backend",
    "ChosenBackend",
    "advance_compiled",
    "chosen_backend",
    "pays_to_compile",
]

import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from energy_prior.cost import Cost, evaluation_cost
from energy_prior.errors import BackendWarning
from energy_prior.langevin.density import JointDensity
from energy_prior.langevin.step import Carry, Rules, advance, advance_several

Advance = Callable[[JointDensity, Rules, Carry, Sequence[Tensor], Tensor | None, Tensor | None], Carry]
"""One step of every chain of the batch, as `energy_prior.langevin.step.advance` makes it."""

ChosenBackend = Literal["eager", "compiled"]
AdvanceSeveral = Callable[[JointDensity, Rules, Carry, Sequence[Sequence[Tensor]]], tuple[Carry, Tensor]]
"""Several unadjusted steps, as `energy_prior.langevin.step.advance_several` makes them."""

UNROLLED = 4

Backend = Literal["auto", "eager", "compiled"]
"""How steps are made; `ChainSettings` says what each is."""

_COMPILE_SECONDS, _COMPILE_SECONDS_PER_OPERATION = 20.0, 0.05
_SAVED_SECONDS_PER_OPERATION = 4e-6
_SAVED_SHARE, _FLOPS_PER_THREAD = 0.2, 5e10
_WORTH_A_LOOK = 5000

_KEPT = 64
_compiled: OrderedDict[Hashable, _Compiled] = OrderedDict()


def chosen_backend(backend: Backend, parts: Sequence[JointDensity], evaluations: int) -> ChosenBackend:
    """What "auto" stands for: "compiled" where that takes less time than it saves, as far as counting can tell.

    The choice depends on counts alone, never on a clock: a call that is repeated makes the same steps again.

    Args:
        backend: what was asked for; other than "auto" it is what comes back.
        parts: of the batch.
        evaluations: gradient evaluations of each part that are to come.
    """
    if backend != "auto":
        return backend
    rows = sum(part.topdown.batch_size for part in parts)
    worth_a_look = evaluations * max(1, rows // 256) > _WORTH_A_LOOK
    pays = worth_a_look and pays_to_compile(evaluation_cost(parts[0]), rows, len(parts), evaluations)
    return "compiled" if pays else "eager"


def pays_to_compile(cost: Cost, rows: int, parts: int, evaluations: int) -> bool:
    """Whether compiling takes less time than it saves, by rough figures of small machines (`benchmarks/langevin.py`)."""
    speed = _FLOPS_PER_THREAD * torch.get_num_threads()
    saved = evaluations * (parts * cost.operations * _SAVED_SECONDS_PER_OPERATION + _SAVED_SHARE * rows * cost.flops / speed)
    return saved > 1.5 * (_COMPILE_SECONDS + _COMPILE_SECONDS_PER_OPERATION * cost.operations)


def advance_compiled(
    density: JointDensity, rules: Rules, carry: Carry, noise: Sequence[Tensor], uniform: Tensor | None, gain: Tensor | None
) -> Carry:
    """`advance` through `torch.compile`, without graph breaks.

    It is compiled when a step of its kind (the same modules, layers and shapes) is first made, and used again by every further
    chain of that kind in this process. Where that is not possible (no C++ compiler, or code of the generator that
    cannot be compiled), a `BackendWarning` says so once, and the reference is used.
    """
    return _compiled_for(density).call(advance, density, rules, carry, noise, uniform, gain)


def several_compiled(
    density: JointDensity, rules: Rules, carry: Carry, noises: Sequence[Sequence[Tensor]]
) -> tuple[Carry, Tensor]:
    """`advance_several`, compiled as one piece: what a call costs beside the step is paid once for all of them."""
    return _compiled_for(density).call(advance_several, density, rules, carry, noises)


def _compiled_for(density: JointDensity) -> _Compiled:
    topdown = density.topdown
    like = topdown.reference
    kind = (
        id(topdown.generator),
        tuple(map(id, density.energies)),
        topdown.free,
        tuple(topdown.held),
        topdown.batch_size,
        (density.space, density.x is not None, like.dtype, like.device),
    )
    compiled = _compiled.get(kind)
    if compiled is None:
        compiled = _compiled[kind] = _Compiled(f"{type(topdown.generator).__name__}, batch of {topdown.batch_size}")
        if len(_compiled) > _KEPT:
            _compiled.popitem(last=False)
    _compiled.move_to_end(kind)
    return compiled


class _Compiled:
    """Functions of the reference, compiled for one kind of chain; as they are from the first failure on."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._works = True
        self._functions: dict[Any, Any] = {}

    def call(self, function: Any, *arguments: Any) -> Any:
        """`function(*arguments)`, compiled if possible."""
        if not self._works:
            return function(*arguments)
        if function not in self._functions:
            # torch.compile keeps what it compiled with the code object, a few variants each: a kind has its own code object
            own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
            self._functions[function] = torch.compile(own, fullgraph=True, dynamic=False)
        try:
            return self._functions[function](*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler, or code of the user's under it, raises
            self._works = False
            reason = next((line for line in str(error).splitlines() if line.strip()), "")
            warnings.warn(
                f"Langevin steps of {self._name}, cannot be compiled and run in eager mode: {type(error).__name__}: "
                f'{reason} (backend="eager" never tries)',
                BackendWarning,
                stacklevel=2,
            )
        return function(*arguments)


class Stepper(NamedTuple):
    """How a backend makes steps: one of any kind, or `UNROLLED` unadjusted ones in one call, where that is faster."""

    one: Advance
    several: AdvanceSeveral | None


STEPPERS: Mapping[ChosenBackend, Stepper] = {
    "eager": Stepper(advance, None),
    "compiled": Stepper(advance_compiled, several_compiled),
}
"""How steps are made, by backend."""
