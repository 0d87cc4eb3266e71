"""Stands in for CUDA graphs where there is no GPU."""

from __future__ import annotations

__all__ = ["Tape", "record_on_tapes"]

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from energy_prior import recording
from energy_prior.langevin.backends import graph
from energy_prior.training import recorded


class Tape(TorchDispatchMode):
    """A CUDA graph on a CPU: replays every kernel on the tensors that it was recorded with, and runs no Python of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        shapes = [t.shape for t in args if isinstance(t, Tensor)]
        out = func(*args, **(kwargs or {}))
        reshapes = shapes != [t.shape for t in args if isinstance(t, Tensor)]  # as unsqueeze_ does
        if not func.is_view and not reshapes:
            self.kernels.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.kernels:
            new = func(*args, **kwargs)
            for old, value in zip(_tensors(out), _tensors(new), strict=True):
                if old is not value:
                    old.copy_(value.reshape(old.shape))


def _tensors(out: Any) -> list[Tensor]:
    return [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)]


def record_on_tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """From now on recordings are made on the CPU, on tapes; all that were made."""
    made: list[Tape] = []

    def captured(warm_up: Callable[[], object], run: Callable[[], Any], device: torch.device) -> tuple[Tape, Any]:
        with torch.random.fork_rng(devices=[]):
            warm_up()
            made.append(Tape())
            with made[-1]:
                return made[-1], run()

    monkeypatch.setattr(recording, "_captured", captured)
    for module in (graph, recorded):
        monkeypatch.setattr(module, "DEVICES", ("cpu",))
    return made
