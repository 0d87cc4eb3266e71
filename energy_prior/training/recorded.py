"""A loss and its gradient launched together: on a GPU a run of small networks is bound by its thousands of launches."""

from __future__ import annotations

__all__ = ["RecordedLoss"]

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from energy_prior._util import first_line
from energy_prior.errors import BackendWarning, warn
from energy_prior.recording import DEVICES, Recording, record

Loss = Callable[[Sequence[Tensor]], tuple[Tensor, dict[str, Tensor]]]
"""Of some tensors: a loss, and figures, all of them scalars."""


class RecordedLoss:
    """A loss with its gradient, recorded as a CUDA graph at its first call and launched from then on.

    Its kernels, random numbers among them, have to depend on nothing but its inputs and the weights: no Python of it runs
    again. Where there is no CUDA device, under autocast, and for inputs of other shapes than the first, it is called as it is.

    Args:
        loss: what is recorded.
        weights: what the gradient is taken of; updated in place.
    """

    def __init__(self, loss: Loss, weights: Sequence[nn.Parameter]) -> None:
        self._loss, self._weights = loss, list(weights)
        self._record: _Record | None = None
        self._failed = self._weights[0].device.type not in DEVICES

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and figures; the loss has its gradient with respect to the weights, and to nothing else."""
        device = self._weights[0].device
        if self._failed or torch.is_autocast_enabled(device.type):
            return self._loss(inputs)
        if self._record is None or not self._record.recording.valid:
            self._make(inputs, device)
        if self._record is None or self._record.key != self._key(inputs):
            return self._loss(inputs)
        for kept, new in zip(self._record.inputs, inputs, strict=True):
            kept.copy_(new)
        outputs = self._record.recording.launch()
        figures = outputs.figures.clone().unbind()
        loss: Any = _Replayed.apply(figures[0], outputs.gradient, *self._weights)
        return loss, dict(zip(self._record.names, figures[1:], strict=True))

    def _key(self, inputs: Sequence[Tensor]) -> Hashable:
        """What a recording is of: inputs of these shapes, and weights in this place."""
        return tuple((t.shape, t.dtype) for t in inputs), tuple(w.data_ptr() for w in self._weights)

    def _make(self, inputs: Sequence[Tensor], device: torch.device) -> None:
        kept, names = [t.clone() for t in inputs], []

        def run() -> _Outputs:
            loss, figures = self._loss(kept)
            gradient = torch.autograd.grad(loss, self._weights, allow_unused=True, materialize_grads=True)
            names[:] = figures
            return _Outputs(torch.stack([loss.detach(), *(value.detach() for value in figures.values())]), gradient)

        try:
            recording = record(run, run, device)
        except Exception as error:
            self._record, self._failed = None, True
            warn(
                "Updates cannot be recorded as a CUDA graph and run kernel by kernel, which takes longer: "
                f"{type(error).__name__}: {first_line(error)}",
                BackendWarning,
            )
        else:
            self._record = _Record(recording, kept, self._key(inputs), tuple(names))


class _Outputs(NamedTuple):
    """The loss and the figures, (1 + figures,), and the gradient of every weight."""

    figures: Tensor
    gradient: tuple[Tensor, ...]


class _Record(NamedTuple):
    recording: Recording[_Outputs]
    inputs: list[Tensor]
    key: Hashable
    names: tuple[str, ...]


class _Replayed(torch.autograd.Function):
    """A loss whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradient: Sequence[Tensor], *weights: Tensor) -> Tensor:
        ctx.gradient = gradient
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor) -> Any:  # type: ignore[override]
        return None, None, *torch._foreach_mul(list(ctx.gradient), of_loss)  # type: ignore[attr-defined]
