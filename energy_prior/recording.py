"""Computations recorded as CUDA graphs: their kernels are recorded once and then launched together."""

from __future__ import annotations

__all__ = ["DEVICES", "Recording", "record"]

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakSet

import torch

DEVICES = ("cuda",)
"""Types of the devices that have graphs."""

T = TypeVar("T")


class _Graph(Protocol):
    def replay(self) -> None:
        """Launches everything that was recorded, on the tensors that it was recorded with."""
        ...


class Recording(Generic[T]):
    """What a call did, to be launched again on the tensors that it was recorded with."""

    def __init__(self, graph: _Graph, outputs: T) -> None:
        self._held: tuple[_Graph, T] | None = (graph, outputs)
        _made.add(self)

    @property
    def valid(self) -> bool:
        """Whether it can be launched; not after another recording has failed, which replaces torch's random stream."""
        return self._held is not None

    def launch(self) -> T:
        """Runs the kernels again; what the call gave, which the next launch writes over."""
        if self._held is None:
            raise RuntimeError("a recording is launched that is void")
        graph, outputs = self._held
        graph.replay()
        return outputs

    def drop(self) -> None:
        """Makes it void, and gives its memory back."""
        self._held = None


_made: WeakSet[Recording[Any]] = WeakSet()


def record(warm_up: Callable[[], object], run: Callable[[], T], device: torch.device) -> Recording[T]:
    """Records `run`, after two calls of `warm_up`; no random number is used up.

    Raises:
        Exception: whatever `run` raises, or the device where something in it cannot be recorded. All recordings are void then.
    """
    try:
        return Recording(*_captured(warm_up, run, device))
    except Exception:
        for recording in list(_made):
            recording.drop()
        raise


def _captured(
    warm_up: Callable[[], object], run: Callable[[], T], device: torch.device
) -> tuple[_Graph, T]:  # pragma: no cover (needs a GPU; tests have one of their own)
    """`run` as a graph. What libraries and compilers do in a first call, they do before.

    A recording that fails leaves torch's generator waiting for its end, and every later draw would be an error: its state is
    replaced by a copy of what it was. Recordings that were made before read the old one.
    """
    with torch.cuda.device(device), torch.random.fork_rng(devices=[device]):
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        before = generator.clone_state()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                warm_up()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                outputs = run()
        except BaseException:
            generator.graphsafe_set_state(before)
            raise
    return graph, outputs
