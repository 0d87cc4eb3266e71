"""Where a chain's random numbers come from: n ~ N(0, I) for its moves and u ~ U(0, 1) for its accept tests."""

from __future__ import annotations

__all__ = ["Counter", "CounterNoise", "InjectedNoise", "NoiseSource", "RandomNoise", "counted", "threefry"]

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

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


class Counter(NamedTuple):
    """Where in its random numbers a chain is: they are a function of this, not of a stream that has a state.

    Attributes:
        key: of the chain, two int32.
        step: of the next step, int32, below 2³⁰.
        first_row: of the whole batch, that this part begins with, int32.
    """

    key: Tensor
    step: Tensor
    first_row: Tensor


class CounterNoise:
    """Random numbers that are computed where they are used, from a key, the number of the step and the row.

    What compiled steps draw from: the numbers are made inside the compiled code, on all threads, and in nothing but int32
    and float32 arithmetic, so that one key gives one chain on every backend (to rounding) and however a batch is split. The key
    comes from torch's global stream, and the ancestral start (step 0) too.

    Args:
        shapes: shape (batch, *shape) of each free layer, ascending.
        reference: a tensor with the dtype, float32, and device that the noise is to have.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], reference: Tensor) -> None:
        self._shapes, self._reference = shapes, reference
        self.key = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32, device=reference.device)

    def normal(self, step: int) -> tuple[Tensor, ...]:
        if step == 0:
            return tuple(normal_like(shape, self._reference) for shape in self._shapes)
        return counted(self.counter(step), self._shapes, uniform=False)[0]

    def uniform(self, step: int) -> Tensor:
        return _there(counted(self.counter(step), self._shapes, uniform=True)[1])

    def counter(self, step: int, first_row: int = 0) -> Counter:
        """The counter of a step, for the rows of the batch from `first_row` on."""
        return Counter(self.key, self.key.new_full((), step), self.key.new_full((), first_row))


def counted(counter: Counter, shapes: Sequence[tuple[int, ...]], *, uniform: bool) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Standard normal noise of these shapes (batch, *shape), and (batch,) uniform numbers in [0, 1) if asked for.

    Two uniform numbers of 24 bits become two normal ones (Box and Muller, Annals of Mathematical Statistics 1958), below 5.9 in
    absolute value, as those of torch's CPU generator are.
    """
    sizes = [math.prod(shape[1:]) for shape in shapes]
    pairs = -(-sum(sizes) // 2)
    rows = torch.arange(shapes[0][0], dtype=torch.int32, device=counter.key.device) + counter.first_row
    place = rows[:, None] * pairs + torch.arange(pairs, dtype=torch.int32, device=counter.key.device)
    first, second = threefry(counter.key, place, counter.step)
    radius = (-2 * (_unit(first) + 2.0**-25).log()).sqrt()
    angle = 2 * math.pi * _unit(second)
    normal = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
    layers = normal[:, : sum(sizes)].split(sizes, 1)
    noise = tuple(layer.reshape(shape) for layer, shape in zip(layers, shapes, strict=True))
    return noise, _unit(threefry(counter.key, rows, counter.step + _OF_UNIFORMS)[0]) if uniform else None


_OF_UNIFORMS = 2**30
_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)


def threefry(key: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Threefry-2×32 with 20 rounds: two int32 of random bits for each counter (Salmon, Moraes, Dror and Shaw, SC 2011).

    Args:
        key: two int32.
        first: first words of the counters, int32.
        second: their second words, int32; broadcast.
    """
    k0, k1 = key[0], key[1]
    schedule = (k0, k1, k0 ^ k1 ^ 0x1BD11BDA)
    a, b = first + k0, second + k1
    for turn in range(20):
        r = _ROTATIONS[turn % 8]
        a = a + b
        b = ((b << r) | ((b >> (32 - r)) & ((1 << r) - 1))) ^ a
        if turn % 4 == 3:
            n = turn // 4 + 1
            a, b = a + schedule[n % 3], b + (schedule[(n + 1) % 3] + n)
    return a, b


def _unit(bits: Tensor) -> Tensor:
    """The upper 24 of 32 random bits, as a number in [0, 1)."""
    return ((bits >> 8) & 0xFFFFFF).float() * 2.0**-24


def _there(value: Tensor | None) -> Tensor:
    assert value is not None  # noqa: S101
    return value


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
