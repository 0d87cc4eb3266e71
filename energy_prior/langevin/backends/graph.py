"""Whole chains as CUDA graphs: the kernels of all steps are recorded once and then launched together.

A chain of short steps is bound by the launches of its hundred kernels per step, not by their work. Recorded, they cost one
launch. Any generator and energies will do whose kernels depend on nothing but their weights and inputs. What is recorded is
the reference's steps: nothing is compiled, so a first call takes little longer than in eager mode. Their noise is Philox
noise, whose seed and offset torch's generator gives to every launch.
"""

from __future__ import annotations

__all__ = ["BACKEND", "Graph"]

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from energy_prior._util import first_line, not_none
from energy_prior.errors import BackendWarning, warn
from energy_prior.langevin import step as reference
from energy_prior.langevin.backends import Backend
from energy_prior.langevin.density import JointDensity, matrix_products
from energy_prior.langevin.noise import InjectedNoise, NoiseSource, RandomNoise
from energy_prior.langevin.proposal import coefficients
from energy_prior.langevin.step import Draws, End, Info, State, StepConfig, end_at, per_chain
from energy_prior.recording import DEVICES, Recording, record
from energy_prior.topdown import TopDown

_LONGEST = 100
_WARM_UP = 3
_KEPT = 8

_records: WeakKeyDictionary[nn.Module, OrderedDict[Hashable, _Record | None]] = WeakKeyDictionary()


class Graph(Backend):
    """Up to 100 steps in one launch, each launch from the positions that the one before has reached.

    A recording is used again by chains of the same kind, number of rows, configuration and steps, until a tensor of the modules
    is replaced or one of their plain attributes changes.
    """

    name: str = "graph"
    fallback: str | None = "compiled"

    def init(
        self, density: JointDensity, config: StepConfig, position: Sequence[Tensor], step_size: float | Tensor
    ) -> tuple[State, Info]:
        s = step_size if isinstance(step_size, Tensor) else torch.tensor(step_size, dtype=torch.float64, device="cpu")
        c = coefficients(s, config.scheme, density.space, config.temperature)
        return State(tuple(position), None, None, (), (), None, c, per_chain(step_size, position)), Info()

    def step(self, density: JointDensity, config: StepConfig, state: State, draws: Draws) -> tuple[State, Info]:
        end, info = _launch(density, config, state, draws)
        return state._replace(position=end.position), info

    def finalize(self, density: JointDensity, config: StepConfig, state: State, draws: Draws) -> tuple[End, Info]:
        return _launch(density, config, state, draws) if draws.steps else (end_at(density, state.position), Info())

    def span(self, density: JointDensity, config: StepConfig, noise: NoiseSource, left: int) -> int:
        return min(left, _LONGEST)

    def tail(self, steps: int) -> int:
        return (steps - 1) % _LONGEST + 1

    def refusal(self, density: JointDensity, config: StepConfig, noise: NoiseSource | None) -> str | None:
        device = density.topdown.reference.device.type
        if config.adjust or config.adapt:
            return "it is for unadjusted chains of a fixed step size"
        if config.measured:
            return "it shows nothing of a chain but its end"
        if config.precision == "bf16":
            return "it has no bf16"
        if device not in DEVICES:
            return f"it needs a CUDA device, and the generator is on {device}"
        if density.x is not None:
            return "it is for chains of the prior"
        if not isinstance(density.topdown.generator, nn.Module):
            return "the generator is not an nn.Module, so a change of its weights would not be noticed"
        return None


BACKEND = Graph()


class _Inputs(NamedTuple):
    """What recorded steps read; `noise` is empty where they draw their own, else (steps, batch, *shape) per free layer."""

    position: tuple[Tensor, ...]
    held: Mapping[int, Tensor]
    step_size: Tensor
    noise: tuple[Tensor, ...]

    def tensors(self) -> tuple[Tensor, ...]:
        return *self.position, *self.held.values(), self.step_size, *self.noise


class _Outputs(NamedTuple):
    """What they write; the finite check is of the state before every step, (steps, …)."""

    end: End
    info: Info

    def clone(self) -> _Outputs:
        """A copy that the next launch does not write over."""
        position, latents = (tuple(t.clone() for t in layers) for layers in (self.end.position, self.end.latents))
        cut = None if self.info.cut is None else self.info.cut.clone()
        info = Info(finite_check=not_none(self.info.finite_check).clone(), cut=cut)
        return _Outputs(End(position, latents, self.end.finite_check.clone()), info)


class _Record(NamedTuple):
    recording: Recording[_Outputs]
    inputs: _Inputs


def _launch(density: JointDensity, config: StepConfig, state: State, draws: Draws) -> tuple[End, Info]:
    """These steps in one launch; step by step, after a warning, if they cannot be recorded."""
    injected: tuple[Tensor, ...] = ()
    if not isinstance(draws.noise, RandomNoise):
        injected = tuple(torch.stack(layer) for layer in zip(*(d.noise for d in draws.each(config)), strict=True))
    inputs = _Inputs(state.position, density.topdown.held, state.step_size, injected)
    with matrix_products(config.precision):
        found = _recorded(density, config, inputs, draws.steps)
        if found is None:
            return _steps(density, config, inputs, draws.steps)
    for kept, new in zip(found.inputs.tensors(), inputs.tensors(), strict=True):
        kept.copy_(new)
    return found.recording.launch().clone()


def _steps(density: JointDensity, config: StepConfig, inputs: _Inputs, count: int) -> _Outputs:
    """What is recorded: `count` steps from the position of the inputs on, one by one."""
    own = RandomNoise(density.topdown.shapes, density.topdown.reference)
    one = Draws(InjectedNoise(inputs.noise) if inputs.noise else own, first=0, steps=1, gains=inputs.step_size)
    state, info = reference.init(density, config, inputs.position, inputs.step_size)
    rows, cuts = [not_none(info.finite_check)], []
    for number in range(count - 1):
        state, info = reference.step(density, config, state, one._replace(first=number).each(config))
        rows.append(not_none(info.finite_check))
        cuts.append(info.cut)
    end, info = reference.finalize(density, config, state, one._replace(first=count - 1).each(config))
    cut = None if info.cut is None else torch.stack([not_none(c) for c in (*cuts, info.cut)]).sum(0)
    return _Outputs(end, Info(finite_check=torch.cat(rows), cut=cut))


def _recorded(density: JointDensity, config: StepConfig, like: _Inputs, count: int) -> _Record | None:
    """The recording of such steps, made if there is none; None if it cannot be made."""
    known = _records.setdefault(density.energies[0], OrderedDict())
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    key = density.cache_key, density.topdown.batch_size, config, count, bool(like.noise), flags, _contents(density)
    found = known.get(key)
    if key not in known or (found is not None and not found.recording.valid):
        known[key] = _record(density, config, like, count)
        if len(known) > _KEPT:
            known.popitem(last=False)
    known.move_to_end(key)
    return known[key]


def _record(density: JointDensity, config: StepConfig, like: _Inputs, count: int) -> _Record | None:
    generator, batch = density.topdown.generator, density.topdown.batch_size
    held = {layer: z.clone() for layer, z in like.held.items()}
    position, noise = (tuple(t.clone() for t in layers) for layers in (like.position, like.noise))
    inputs = _Inputs(position, held, like.step_size.clone(), noise)

    def steps(count: int) -> _Outputs:
        fresh = JointDensity(TopDown(generator, batch, held), density.energies, density.space)  # reads `held` at every launch
        return _steps(fresh, config, inputs, count)

    try:
        recording = record(lambda: steps(min(count, _WARM_UP)), lambda: steps(count), like.step_size.device)
    except Exception as error:  # whatever code of the user's does that cannot be recorded
        if isinstance(error, torch.OutOfMemoryError):
            raise
        warn(
            f"Langevin steps of {type(generator).__name__}, batch of {batch}, cannot be recorded as a CUDA graph and run one "
            f"after another: {type(error).__name__}: {first_line(error)}",
            BackendWarning,
        )
        return None
    return _Record(recording, inputs)


def _contents(density: JointDensity) -> Hashable:
    """Changes where a recording would go on with what is no longer there: tensors by their place, plain attributes by value."""
    found: list[Hashable] = []
    for module in (density.topdown.generator, *density.energies):
        assert isinstance(module, nn.Module)  # noqa: S101 (`refusal` has seen to it)
        for part in module.modules():
            found.append(type(part))
            for name, value in {**part._parameters, **part._buffers, **vars(part)}.items():  # pyright: ignore[reportPrivateUsage]
                if isinstance(value, Tensor):
                    found.append((name, value.data_ptr()))
                elif _plain(value):
                    found.append((name, repr(value)))
    return tuple(found)


def _plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str) or (isinstance(value, tuple | list) and all(map(_plain, value)))
