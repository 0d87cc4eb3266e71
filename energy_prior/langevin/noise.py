"""Where a chain's random numbers come from: n ~ N(0, I) for its moves and u ~ U(0, 1) for its accept tests."""

from __future__ import annotations

__all__ = ["InjectedNoise", "NoiseSource", "RandomNoise"]

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from energy_prior._util import normal_like
from energy_prior.errors import ArgumentError, ShapeError


class NoiseSource(Protocol):
    """Random numbers of a chain by step. Step 0 draws its ancestral start, steps 1, 2, … its moves."""

    def normal(self, step: int) -> tuple[Tensor, ...]:
        """Standard normal noise, one tensor (batch, *shape) per free layer, in ascending order of layer."""
        ...

    def uniform(self, step: int) -> Tensor:
        """Uniform numbers in [0, 1) for the accept test of this step, (batch,)."""
        ...


class RandomNoise:
    """Fresh random numbers from torch's global stream.

    Args:
        shapes: shape (batch, *shape) of each free layer, ascending.
        reference: a tensor with the dtype and device that the noise is to have.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], reference: Tensor) -> None:
        self._shapes, self._reference = shapes, reference

    def normal(self, step: int) -> tuple[Tensor, ...]:
        return tuple(normal_like(shape, self._reference) for shape in self._shapes)

    def uniform(self, step: int) -> Tensor:
        return torch.rand(self._shapes[0][0], dtype=self._reference.dtype, device=self._reference.device)


class InjectedNoise:
    """Random numbers given beforehand: with them a chain does not depend on the rest of its batch, nor on chunking.

    Args:
        normals: one tensor (steps + 1, batch, *shape) per free layer, ascending; row 0 is the ancestral start.
        uniforms: (steps + 1, batch) in [0, 1), needed only with Metropolis adjustment; row 0 is not read.

    Raises:
        ShapeError: if the tensors disagree on the number of steps or on the batch.
    """

    def __init__(self, normals: Sequence[Tensor], uniforms: Tensor | None = None) -> None:
        leading = {tuple(t.shape[:2]) for t in (*normals, *([] if uniforms is None else [uniforms]))}
        if len(normals) == 0:
            raise ShapeError("noise: expected one tensor per free layer, got none.")
        if len(leading) != 1:
            raise ShapeError(f"noise: expected the same (steps + 1, batch) on every tensor, got {sorted(leading)}.")
        self._normals, self._uniforms = tuple(normals), uniforms

    def normal(self, step: int) -> tuple[Tensor, ...]:
        return tuple(n[step] for n in self._normals)

    def uniform(self, step: int) -> Tensor:
        if self._uniforms is None:
            raise ArgumentError("noise: Metropolis adjustment needs `uniforms` as well; give InjectedNoise both.")
        return self._uniforms[step]

    def check(self, shapes: Sequence[tuple[int, ...]], reference: Tensor, steps: int, adjust: bool) -> None:
        """Raises `ShapeError` or `ArgumentError` if it does not fit a chain of free layers with these shapes."""
        got = [tuple(n.shape[1:]) for n in self._normals]
        if got != list(shapes):
            raise ShapeError(
                f"noise: expected one tensor (steps + 1, *shape) per free layer, shapes {list(shapes)}, got {got}."
            )
        if len(self._normals[0]) < steps + 1:
            raise ArgumentError(
                f"noise: expected {steps + 1} rows or more (the start and one per step), got {len(self._normals[0])}."
            )
        if adjust and self._uniforms is None:
            self.uniform(0)
        for tensor in (*self._normals, *([] if self._uniforms is None else [self._uniforms])):
            if (tensor.dtype, tensor.device) != (reference.dtype, reference.device):
                raise ArgumentError(
                    f"noise: expected {reference.dtype} on {reference.device}, like the latents, got {tensor.dtype} on "
                    f"{tensor.device}."
                )
