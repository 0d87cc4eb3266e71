"""What a computation costs in memory and operations: counted on a few rows, never timed, so that decisions repeat."""

from __future__ import annotations

__all__ = ["Cost", "equal_parts", "evaluation_cost", "forward_memory"]

import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from energy_prior.langevin.density import JointDensity

_costs: WeakKeyDictionary[nn.Module, dict[Hashable, Cost]] = WeakKeyDictionary()
_forward_memory: WeakKeyDictionary[nn.Module, dict[torch.dtype | None, float]] = WeakKeyDictionary()


class Cost(NamedTuple):
    """Of one gradient evaluation.

    Attributes:
        memory: bytes that the forward pass keeps for the gradient, per row.
        flops: floating-point operations of the matrix products, per row.
        operations: tensor operations, each of them a kernel in eager mode.
    """

    memory: float
    flops: float
    operations: int


def evaluation_cost(density: JointDensity) -> Cost:
    """Counts one evaluation of `density`, once for all densities with its `cache_key`; fastest on one of few rows."""
    known = _costs.setdefault(density.energies[0], {})
    if density.cache_key not in known:
        known[density.cache_key] = _counted(density)
    return known[density.cache_key]


def _counted(density: JointDensity) -> Cost:
    topdown = density.topdown
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.shape[:1] == (topdown.batch_size,):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    counted = _Operations()
    position = [topdown.reference.new_zeros(shape) for shape in topdown.shapes]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), counted:
        density.evaluate(position)
    return Cost(sum(kept.values()) / topdown.batch_size, counted.flops / topdown.batch_size, counted.operations)


def forward_memory(run: Callable[[], object], rows: int, generator: object) -> float:
    """Bytes per row that a pass without gradients needs: three times its largest tensor, for input, output and workspace.

    Args:
        run: the pass, on a batch of `rows`; run once for a generator.
        rows: its number of rows.
        generator: whose pass it is.
    """
    known = _forward_memory.setdefault(generator, {}) if isinstance(generator, nn.Module) else {}
    dtype = next((p.dtype for p in generator.parameters()), None) if isinstance(generator, nn.Module) else None
    if dtype not in known:
        counted = _Operations()
        with torch.no_grad(), counted:
            run()
        known[dtype] = 3.0 * counted.largest / rows
    return known[dtype]


def equal_parts(rows: int, memory_per_row: float, memory: float) -> list[slice]:
    """The fewest equal parts (the last may be smaller) of a batch that need at most `memory` bytes each, or one row each."""
    most = max(1, math.floor(memory / max(memory_per_row, 1.0)))
    size = math.ceil(rows / math.ceil(rows / most))
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


class _Operations(TorchDispatchMode):
    """Counts tensor operations (views aside), the floating-point operations of products, and the largest result's bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.flops, self.largest = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += not func.is_view
        count = flop_registry.get(func.overloadpacket)
        self.flops += count(*args, **(kwargs or {}), out_val=out) if count else 0
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel() * out.element_size())
        return out
