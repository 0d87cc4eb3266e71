"""What a computation costs in memory and operations: counted on a few rows, never timed, so that decisions repeat."""

from __future__ import annotations

__all__ = ["Cost", "equal_parts", "evaluation_cost", "forward_memory"]

import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from energy_prior.langevin.density import JointDensity
from energy_prior.process import reproducible

_costs: WeakKeyDictionary[nn.Module, dict[Hashable, Cost]] = WeakKeyDictionary()
_forward_memory: WeakKeyDictionary[nn.Module, dict[Hashable, float]] = WeakKeyDictionary()


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


def forward_memory(run: Callable[[int], object], module: nn.Module, what: Hashable, device: torch.device) -> float:
    """Bytes per row that a pass without gradients needs: of the tensors that live at once, and of the largest again.

    Operations need room of their own; that of the largest tensor stands for it. What does not grow with the rows, such as
    weights that a pass normalises, does not count. What the pass draws comes from a stream of its own.

    Args:
        run: the pass, on a batch of so many rows; run twice, on few, for each `what` of a module.
        module: whose pass it is.
        what: all that the pass depends on beside the module and the rows.
        device: where it computes.
    """
    known = _forward_memory.setdefault(module, {})
    if what not in known:
        fewer, more = _Memory(), _Memory()
        with torch.no_grad(), reproducible(torch.Generator(device="cpu").manual_seed(0), device):
            for rows, counted in ((2, fewer), (4, more)):
                with counted:
                    run(rows)
        alive = max((b - a for a, b in zip(fewer.alive, more.alive, strict=False)), default=0)
        largest = max((b - a for a, b in zip(fewer.results, more.results, strict=False)), default=0)
        known[what] = (alive + largest) / 2
        if len(fewer.alive) != len(more.alive):  # one operation for so many rows: the most that live, whatever it is
            known[what] = max(more.alive) / 4
    return known[what]


def equal_parts(rows: int, memory_per_row: float, memory: float) -> list[slice]:
    """The fewest equal parts (the last may be smaller) of a batch that need at most `memory` bytes each, or one row each."""
    most = max(1, math.floor(memory / max(memory_per_row, 1.0)))
    size = math.ceil(rows / math.ceil(rows / most))
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


class _Operations(TorchDispatchMode):
    """Counts tensor operations (views aside), and the floating-point operations of products."""

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # not before it is needed: it imports triton

        self.operations, self.flops, self._formulas = 0, 0, flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += not func.is_view
        count = self._formulas.get(func.overloadpacket)
        self.flops += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out


class _Memory(TorchDispatchMode):
    """Bytes of the results of every operation, and of all results that live after it."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[int] = []
        self.alive: list[int] = []
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.layout == torch.strided]
        storages = [tensor.untyped_storage() for tensor in tensors]
        for storage in storages:
            self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()  # pyright: ignore[reportPrivateUsage]
        self.results.append(max((storage.nbytes() for storage in storages), default=0))
        self.alive.append(sum(size for _, size in self._alive.values()))
        return out
