"""Where a chain's random numbers come from: n ~ N(0, I) for its moves and u ~ U(0, 1) for its accept tests."""

from __future__ import annotations

__all__ = [
    "CounterNoise",
    "Counters",
    "InjectedNoise",
    "NoiseSource",
    "RandomNoise",
    "counted_normal",
    "counted_uniform",
    "threefry",
]

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from energy_prior._util import normal_like
from energy_prior.errors import ArgumentError, ShapeError


class NoiseSource(Protocol):
    """Random numbers of a chain by step. Step 0 draws its ancestral start, steps 1, 2, … its moves.

    Examples:
        Chains without noise climb to a mode:

        >>> from energy_prior import load_example
        >>> class Still:
        ...     def __init__(self, n):
        ...         self.n = n
        ...     def normal(self, step):
        ...         return torch.zeros(self.n, 16), torch.zeros(self.n, 8)
        ...     def uniform(self, step):
        ...         return torch.zeros(self.n)
        ...     def rows(self, rows):
        ...         return Still(len(range(*rows.indices(self.n))))
        >>> z_1, z_2 = load_example().sample_latents(2, noise=Still(2), steps=5)
        >>> (z_1[0] - z_1[1]).abs().max().round(decimals=3)  # both end at the same place
        tensor(0.)
    """

    def normal(self, step: int) -> tuple[Tensor, ...]:
        """Noise of N(0, 1), one tensor (batch, *shape) per free layer, in ascending order of layer.

        Args:
            step: number of the step, ≥ 0.
        """
        ...

    def uniform(self, step: int) -> Tensor:
        """Uniform numbers in [0, 1) for the accept test of a step, (batch,).

        Args:
            step: number of the step, ≥ 1.
        """
        ...

    def rows(self, rows: slice) -> NoiseSource:
        """The random numbers of some chains of the batch, where it is run in parts; its steps are asked for from 1 on.

        Args:
            rows: which chains.
        """
        ...


class RandomNoise:
    """Fresh random numbers from torch's global stream, in the order in which they are asked for.

    Args:
        shapes: shape (batch, *shape) of each free layer, ascending.
        reference: a tensor of any shape, (…), and any unit, whose dtype and device the noise gets.

    Examples:
        >>> noise = RandomNoise([(4, 3), (4, 2)], torch.zeros((), dtype=torch.float64))
        >>> [(tuple(n.shape), n.dtype) for n in noise.normal(1)]
        [((4, 3), torch.float64), ((4, 2), torch.float64)]
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], reference: Tensor) -> None:
        self._shapes, self._reference = shapes, reference

    def normal(self, step: int) -> tuple[Tensor, ...]:
        """New noise of N(0, 1) at every call, one tensor (batch, *shape) per free layer, whatever the step."""
        return tuple(normal_like(shape, self._reference) for shape in self._shapes)

    def uniform(self, step: int) -> Tensor:
        """New numbers in [0, 1) at every call, (batch,), whatever the step."""
        return torch.rand(self._shapes[0][0], dtype=self._reference.dtype, device=self._reference.device)

    def rows(self, rows: slice) -> RandomNoise:
        """The same stream, for some chains of the batch."""
        return RandomNoise(_rows_of(self._shapes, rows), self._reference)


_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_MOST = 2**31


class Counters(NamedTuple):
    """Where the counter-based random numbers of consecutive chains of a batch come from.

    Attributes:
        key: two int32.
        row: of the whole batch, that the chains begin with, int32.
    """

    key: Tensor
    row: Tensor


def counted_normal(counters: Counters, step: Tensor, shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    """Standard normal numbers, float32, one tensor of each of `shapes`: a function of (key, step, row, place in the row) alone.

    Two uniform numbers of 24 bits become two normal ones (Box and Muller, Annals of Mathematical Statistics 1958), below 5.9
    in absolute value, as those of torch's CPU generator are.

    Args:
        counters: of the chains.
        step: number of the step, int32.
        shapes: (chains, *shape) of each free layer.
    """
    rows, sizes = shapes[0][0], [math.prod(shape[1:]) for shape in shapes]
    pairs = _pairs(sizes)
    place = torch.arange(rows * pairs, dtype=torch.int32, device=step.device) + counters.row * pairs
    first, second = threefry(counters.key, place, step)
    radius = _stored((-2 * (_unit(first) + 2.0**-25).log()).sqrt()).view(rows, pairs)
    angle = _stored(2 * math.pi * _unit(second)).view(rows, pairs)
    layers = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, : sum(sizes)].split(sizes, 1)
    return tuple(layer.reshape(shape) for layer, shape in zip(layers, shapes, strict=True))


def counted_uniform(counters: Counters, step: Tensor, rows: int) -> Tensor:
    """Uniform numbers in [0, 1), (rows,), float32, of counters that `counted_normal` does not reach: from the last one down."""
    row = torch.arange(rows, dtype=torch.int32, device=step.device) + counters.row
    return _unit(threefry(counters.key, -1 - row, step)[0])


def _pairs(sizes: Sequence[int]) -> int:
    """Pairs of normal numbers that a chain needs in a step."""
    return (sum(sizes) + 1) // 2


def threefry(key: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Threefry-2×32 with 20 rounds: two int32 of random bits for each counter (Salmon, Moraes, Dror and Shaw, SC 2011).

    Args:
        key: two int32.
        first: first words of the counters, int32.
        second: their second words, int32; broadcast.
    """
    k0, k1 = key[0], key[1]
    schedule = (k0, k1, k0 ^ k1 ^ 0x1BD11BDA)
    a, b = torch.broadcast_tensors(first + k0, second + k1)
    for turn in range(20):
        r = _ROTATIONS[turn % 8]
        a = a + b
        b = ((b << r) | ((b >> (32 - r)) & ((1 << r) - 1))) ^ a
        if turn % 4 == 3:
            n = turn // 4 + 1
            a, b = a + schedule[n % 3], b + (schedule[(n + 1) % 3] + n)
        if turn % 2:
            a, b = _stored(a), _stored(b)
    return a, b


def _stored(values: Tensor) -> Tensor:
    """The same values. A compiler computes them once: it would else do so for every use, twice as often from round to round."""
    return values.as_strided(values.shape, values.stride())


def _unit(bits: Tensor) -> Tensor:
    """The upper 24 of 32 random bits, as a number in [0, 1)."""
    return ((bits >> 8) & 0xFFFFFF).float() * 2.0**-24


class CounterNoise:
    """Random numbers that are computed from a key, the number of the step, and the row of the batch.

    What compiled chains on a CPU draw from: torch's own generator makes one number after the other on one thread; these can be
    computed inside what is compiled, and for some chains of the batch without the others. The key and the ancestral start
    (step 0, of the whole batch) come from torch's global stream.

    Args:
        shapes: shape (batch, *shape) of each free layer, ascending.
        reference: a tensor with the dtype, float32, and device that the noise is to have.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], reference: Tensor) -> None:
        self._shapes, self._reference, self._first_row = tuple(shapes), reference, 0
        self._key = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32, device=reference.device)

    @staticmethod
    def reaches(shapes: Sequence[tuple[int, ...]]) -> bool:
        """Whether there are counters enough for a step of free layers of these shapes (batch, *shape)."""
        return shapes[0][0] * (_pairs([math.prod(shape[1:]) for shape in shapes]) + 1) <= _MOST

    def counters(self) -> Counters:
        """Where the numbers of these chains come from."""
        return Counters(self._key, self._key.new_full((), self._first_row))

    def normal(self, step: int) -> tuple[Tensor, ...]:
        """Noise of N(0, 1), one tensor (batch, *shape) per free layer: of the step's number and the key, but for the start."""
        if step == 0:
            return tuple(normal_like(shape, self._reference) for shape in self._shapes)
        return counted_normal(self.counters(), self._key.new_full((), step), self._shapes)

    def uniform(self, step: int) -> Tensor:
        """Numbers in [0, 1), (batch,), of the step's number and the key."""
        return counted_uniform(self.counters(), self._key.new_full((), step), self._shapes[0][0])

    def rows(self, rows: slice) -> CounterNoise:
        """Those that these chains have in the whole batch."""
        own = copy.copy(self)
        own._shapes, own._first_row = _rows_of(self._shapes, rows), self._first_row + rows.indices(self._shapes[0][0])[0]
        return own


def _rows_of(shapes: Sequence[tuple[int, ...]], rows: slice) -> tuple[tuple[int, ...], ...]:
    """Shapes of some rows of tensors of these shapes."""
    return tuple((len(range(*rows.indices(shape[0]))), *shape[1:]) for shape in shapes)


class InjectedNoise:
    """Random numbers given beforehand: with them a chain does not depend on the rest of its batch, nor on chunking.

    Args:
        normals: noise of N(0, 1), one tensor (steps + 1, batch, *shape) per free layer, ascending; row 0 is the ancestral
            start.
        uniforms: in [0, 1), (steps + 1, batch), needed only with Metropolis adjustment; row 0 is not read.

    Raises:
        ShapeError: if the tensors disagree on the number of steps or on the batch.

    Examples:
        >>> from energy_prior import load_example
        >>> noise = InjectedNoise([torch.randn(6, 2, 16), torch.randn(6, 2, 8)])  # the start and five steps of two chains
        >>> z_1, z_2 = load_example().sample_latents(2, noise=noise, steps=5)
        >>> z_1.shape
        torch.Size([2, 16])
    """

    def __init__(self, normals: Sequence[Tensor], uniforms: Tensor | None = None) -> None:
        leading = {tuple(t.shape[:2]) for t in (*normals, *([] if uniforms is None else [uniforms]))}
        if len(normals) == 0:
            raise ShapeError("noise: expected one tensor per free layer, got none.")
        if len(leading) != 1:
            raise ShapeError(f"noise: expected the same (steps + 1, batch) on every tensor, got {sorted(leading)}.")
        self._normals, self._uniforms = tuple(normals), uniforms

    def normal(self, step: int) -> tuple[Tensor, ...]:
        """Row `step` of `normals`, noise of N(0, 1), one tensor (batch, *shape) per free layer."""
        return tuple(n[step] for n in self._normals)

    def uniform(self, step: int) -> Tensor:
        """Row `step` of `uniforms`, in [0, 1), (batch,).

        Raises:
            ArgumentError: if there are none.
        """
        if self._uniforms is None:
            raise ArgumentError("noise: Metropolis adjustment needs `uniforms` as well; give InjectedNoise both.")
        return self._uniforms[step]

    def rows(self, rows: slice) -> InjectedNoise:
        """The numbers of these chains."""
        return InjectedNoise([n[:, rows] for n in self._normals], None if self._uniforms is None else self._uniforms[:, rows])

    def check(self, shapes: Sequence[tuple[int, ...]], reference: Tensor, steps: int, adjust: bool) -> None:
        """Looks whether it fits a chain.

        Args:
            shapes: shape (batch, *shape) of each free layer, ascending.
            reference: a tensor of any shape, (…), and any unit, whose dtype and device the noise has to have.
            steps: number of steps, ≥ 0.
            adjust: whether there are accept tests, which need `uniforms`.

        Raises:
            ShapeError: if it is for free layers of other shapes.
            ArgumentError: if it has too few steps, lacks `uniforms`, or is of another dtype or device.
        """
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
