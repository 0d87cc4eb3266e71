"""Whole chains as CUDA graphs: the kernels of all steps are recorded once and then launched together.

A chain of short steps is bound by the launches of its hundred kernels per step, not by their work. Recorded, they cost one
launch. Any generator and energies will do whose kernels depend on nothing but their weights and inputs; steps are recorded in
their compiled form, and their noise is Philox noise, whose seed and offset torch's generator gives to every launch.
"""

from __future__ import annotations

__all__ = ["graphed", "why_not_graphed"]

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from energy_prior._util import first_line, not_none
from energy_prior.errors import BackendWarning
from energy_prior.langevin.backends.compiled import Stepper
from energy_prior.langevin.density import JointDensity
from energy_prior.langevin.noise import InjectedNoise, RandomNoise
from energy_prior.langevin.step import Draw, End, Rules
from energy_prior.topdown import TopDown

_DEVICES = ("cuda",)
_LONGEST = 100
_WARM_UP = 3
_KEPT = 8

_records: WeakKeyDictionary[nn.Module, OrderedDict[Hashable, _Record | None]] = WeakKeyDictionary()


class _Graph(Protocol):
    def replay(self) -> None:
        """Launches everything that was recorded, on the tensors that it was recorded with."""
        ...


class _Inputs(NamedTuple):
    """What a recorded chain reads; `noise` is empty where it draws its own, else (steps, batch, *shape) per free layer."""

    position: tuple[Tensor, ...]
    held: Mapping[int, Tensor]
    step_size: Tensor
    noise: tuple[Tensor, ...]

    def tensors(self) -> tuple[Tensor, ...]:
        return *self.position, *self.held.values(), self.step_size, *self.noise


class _Outputs(NamedTuple):
    """What it writes: the end, and the health of the state before every step, (steps, …)."""

    end: End
    health: Tensor

    def clone(self) -> _Outputs:
        """A copy that the next launch does not write over."""
        end = self.end
        copy = End(
            tuple(t.clone() for t in end.position),
            tuple(t.clone() for t in end.latents),
            None if end.cut is None else end.cut.clone(),
            end.health.clone(),
        )
        return _Outputs(copy, self.health.clone())


class _Record(NamedTuple):
    graph: _Graph
    inputs: _Inputs
    outputs: _Outputs


def why_not_graphed(density: JointDensity) -> str | None:
    """In words, why chains on this density cannot be recorded; None if they can."""
    device = density.topdown.reference.device.type
    if device not in _DEVICES:
        return f"it needs a CUDA device, and the generator is on {device}"
    if density.x is not None:
        return "it is for chains of the prior"
    if not isinstance(density.topdown.generator, nn.Module):
        return "the generator is not an nn.Module, so a change of its weights would not be noticed"
    return None


def graphed(
    density: JointDensity,
    rules: Rules,
    start: Sequence[Tensor],
    step_size: Tensor,
    steps: int,
    noise: InjectedNoise | None,
    stepper: Stepper,
) -> tuple[End, Tensor] | None:
    """The end of unadjusted, unmeasured chains, and the health of their states; None, with a warning, if recording fails.

    Chains of more than 100 steps are several launches. A recording is used again by chains of the same kind, number of rows,
    rules and steps, until a tensor of the modules is replaced or one of their plain attributes changes.

    Args:
        density: one that `why_not_graphed` has nothing against.
        rules: of the steps.
        start: the free layers, ascending, in the density's coordinates.
        step_size: s, (batch,).
        steps: ≥ 1.
        noise: injected noise of these rows; None: the chain's own.
        stepper: how steps are made while they are recorded.
    """
    position, contents = tuple(start), _contents(density)
    made: list[_Outputs] = []
    for first in range(0, steps, _LONGEST):
        count = min(_LONGEST, steps - first)
        injected: tuple[Tensor, ...] = ()
        if noise is not None:
            each = [noise.normal(step) for step in range(first + 1, first + count + 1)]
            injected = tuple(torch.stack(layer) for layer in zip(*each, strict=True))
        inputs = _Inputs(position, density.topdown.held, step_size, injected)
        record = _recorded(density, contents, rules, inputs, count, stepper)
        if record is None:
            return None
        for kept, new in zip(record.inputs.tensors(), inputs.tensors(), strict=True):
            kept.copy_(new)
        record.graph.replay()
        made.append(record.outputs.clone())
        position = made[-1].end.position
    cuts = [not_none(block.end.cut) for block in made if block.end.cut is not None]
    end = made[-1].end._replace(cut=torch.stack(cuts).sum(0) if cuts else None)
    return end, torch.cat([block.health for block in made])


def _recorded(
    density: JointDensity, contents: Hashable, rules: Rules, like: _Inputs, steps: int, stepper: Stepper
) -> _Record | None:
    """The recording of such a chain, made if there is none; None if it cannot be made."""
    topdown = density.topdown
    known = _records.setdefault(density.energies[0], OrderedDict())
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    key = density.kind, topdown.batch_size, rules, steps, bool(like.noise), flags, contents
    if key not in known:
        known[key] = _record(density, rules, like, steps, stepper)
        if len(known) > _KEPT:
            known.popitem(last=False)
    known.move_to_end(key)
    return known[key]


def _record(density: JointDensity, rules: Rules, like: _Inputs, steps: int, stepper: Stepper) -> _Record | None:
    generator, energies, space = density.topdown.generator, density.energies, density.space
    batch = density.topdown.batch_size
    held = {layer: z.clone() for layer, z in like.held.items()}
    position, noise = (tuple(t.clone() for t in layers) for layers in (like.position, like.noise))
    inputs = _Inputs(position, held, like.step_size.clone(), noise)

    def chain(steps: int) -> _Outputs:
        """As `run_chain` makes it where nothing is measured."""
        fresh = JointDensity(TopDown(generator, batch, held), energies, space)
        source = RandomNoise(fresh.topdown.shapes, fresh.topdown.reference)

        def draw(step: int) -> Draw:
            return Draw(tuple(n[step] for n in inputs.noise) if inputs.noise else source.normal(step + 1))

        carry, trace = stepper.begin(fresh, rules, inputs.position, inputs.step_size)
        health = [trace.health]
        for step in range(steps - 1):
            carry, trace = stepper.advance(fresh, rules, carry, [draw(step)])
            health.append(trace.health)
        return _Outputs(stepper.finish(fresh, rules, carry, [draw(steps - 1)]), torch.cat(health))

    try:
        graph, outputs = _captured(lambda: chain(min(steps, _WARM_UP)), lambda: chain(steps), like.step_size.device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever code of the user's does that cannot be recorded
        warnings.warn(
            f"Langevin steps of {type(generator).__name__}, batch of {batch}, cannot be recorded as a CUDA graph and run one "
            f"after another: {type(error).__name__}: {first_line(error)}",
            BackendWarning,
            stacklevel=2,
        )
        return None
    return _Record(graph, inputs, outputs)


def _captured(
    warm_up: Callable[[], object], run: Callable[[], _Outputs], device: torch.device
) -> tuple[_Graph, _Outputs]:  # pragma: no cover (needs a GPU; tests have one of their own)
    """`run` as a graph. What libraries and compilers do in a first call, they do before; no random number is used up."""
    with torch.cuda.device(device), torch.random.fork_rng(devices=[device]):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                warm_up()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
    return graph, outputs


def _contents(density: JointDensity) -> Hashable:
    """Changes where a recording would go on with what is no longer there: tensors by their place, plain attributes by value."""
    found: list[Hashable] = []
    for module in (density.topdown.generator, *density.energies):
        assert isinstance(module, nn.Module)  # noqa: S101 (why_not_graphed has seen to it)
        for part in module.modules():
            found.append(type(part))
            for name, value in {**part._parameters, **part._buffers, **vars(part)}.items():
                if isinstance(value, Tensor):
                    found.append((name, value.data_ptr()))
                elif _plain(value):
                    found.append((name, repr(value)))
    return tuple(found)


def _plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str) or (isinstance(value, tuple | list) and all(map(_plain, value)))
