"""A backend of torch.compile's that compiles graphs once that are alike: the same operations on inputs of the same layout.

Layers of a deep model differ in nothing but their parameters, which are inputs of what is compiled. torch's own caches tell
them apart by their names, and begin to share only after the gradient has been traced.
"""

from __future__ import annotations

__all__ = ["Sharing"]

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate, map_arg


class Sharing:
    """Compiles as "inductor" does; a graph that is like one before gets what that one has been compiled to.

    Args:
        options: of the compiler.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._compiled: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """What the graph is compiled to."""
        from torch._inductor.compile_fx import compile_fx  # not before it is needed

        key = _signature(graph, inputs)
        made: Any = None if key is None else self._compiled.get(key)
        if made is None:
            made = compile_fx(graph, list(inputs), config_patches=self._options)
            if key is not None:
                self._compiled[key] = made
        return made


class _Number(str):
    """How a node is written in the arguments of another."""

    def __repr__(self) -> str:
        return str(self)


_PLAIN = {
    *(_Number, bool, int, float, complex, str, type(None), type(...)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
}
"""Kinds of arguments that are all that they show."""


def _signature(graph: fx.GraphModule, inputs: Sequence[Any]) -> Hashable | None:
    """Equal for graphs that are compiled to the same; None where that cannot be told.

    That is where the graph has parts of its own, or arguments that may be more than they show.
    """
    nodes = list(graph.graph.nodes)
    if any(node.op in ("get_attr", "call_module") for node in nodes):
        return None
    numbers = {node: _Number(f"%{number}") for number, node in enumerate(nodes)}
    operations, leaves = [], list[Any]()
    for node in nodes:
        arguments = map_arg((node.args, node.kwargs), numbers.__getitem__)
        map_aggregate(arguments, leaves.append)
        operations.append((node.op, None if node.op == "placeholder" else node.target, repr(arguments)))
    if not {type(leaf) for leaf in leaves} <= _PLAIN:
        return None
    storages: dict[int, int] = {}
    return tuple(operations), tuple(_layout(value, storages) for value in inputs), _surroundings()


def _layout(value: Any, storages: dict[int, int]) -> Hashable:
    """What the compiler looks at in an input; inputs that share memory have the same last entry."""
    if not isinstance(value, Tensor):
        return type(value), repr(value)
    storage = value.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]
    shared = storages.setdefault(storage, len(storages))
    whole = value.shape, value.stride(), value.storage_offset(), value.dtype, value.device, value.requires_grad
    return *whole, value.is_leaf, value.is_conj(), value.is_neg(), shared


def _surroundings() -> Hashable:
    """Settings of torch's that what is compiled depends on."""
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
    )
