"""An endless stream of batches from a tensor or a data loader, checked on the way in, that can go on where it stood."""

from __future__ import annotations

__all__ = ["Batches"]

from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from energy_prior.checkpoint import digest
from energy_prior.checks import arguments as validate
from energy_prior.errors import ArgumentError
from energy_prior.training.config import RunConfig


class Batches:
    """Batches of observations, pass after pass over the data, on the device of `reference`.

    A tensor is checked whole, shuffled anew for every pass and cut into batches; a last smaller batch is left out, and so
    is what does not fill a batch of every process. An iterable is run through again and again; each of its batches, a
    tensor or a tuple whose first entry is one, is checked as it comes. With several processes, give each its own share
    (`accelerator.prepare` does that for a `DataLoader`).

    The order has a random stream of its own, seeded from torch's global one: a stream at the same `state()` goes on with
    the same batches (for a loader whose order and transforms depend on nothing but torch's global stream).

    Args:
        data: observations, (n, *x_shape), or an iterable of batches.
        config: its `batch_size` is the rows per batch of a tensor.
        generator: the generator, for the range of its observations.
        x_shape: shape of an observation.
        reference: a tensor with the dtype and device that the model needs.
        rank: number of this process.
        world: number of processes.
        seed: of the order; the same in every process.

    Raises:
        ArgumentError, ShapeError: if the data are empty, not finite, of the wrong shape or dtype, or fewer than a batch.
    """

    def __init__(
        self,
        data: Tensor | Iterable[Any],
        config: RunConfig,
        generator: Any,
        x_shape: Sequence[int],
        reference: Tensor,
        *,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
    ) -> None:
        self._data, self._generator, self._x_shape, self._reference = data, generator, x_shape, reference
        self._size, self._rank, self._world = config.batch_size or config.usual_batch, rank, world
        if isinstance(data, Tensor):
            validate.check_observations("data", data, x_shape, reference.to(data.device), generator)
            if config.batch_size is None:
                self._size = max(1, min(self._size, len(data) // world))
            if self._size * world > len(data):
                raise ArgumentError(
                    f"batch_size: expected at most the {len(data)} observations in data"
                    + (f" over {world} processes" if world > 1 else "")
                    + f", got {self._size}. Pass a smaller batch_size."
                )
        elif not isinstance(data, Iterable) or hasattr(data, "__array__"):
            hint = " Convert it with torch.from_numpy." if hasattr(data, "__array__") else ""
            raise ArgumentError(f"data: expected a tensor or an iterable of batches, got {type(data).__name__}.{hint}")
        self._stream = torch.Generator().manual_seed(seed).get_state()
        self._begin()

    def fingerprint(self) -> str:
        """What tells one set of observations from another: a tensor's shape and contents, a loader's kind and sizes."""
        if not isinstance(self._data, Tensor):
            inside = getattr(self._data, "dataset", None)
            sizes = [len(d) for d in (self._data, inside) if isinstance(d, Sized)]
            return " ".join([type(self._data).__name__, *map(str, sizes)])
        return digest({"data": self._data})

    def __next__(self) -> Tensor:
        """The next batch, (batch, *x_shape)."""
        for _ in range(2):
            with self._own_stream():
                batch = next(self._pass, None)
            if batch is not None:
                self._taken += 1
                return batch
            if self._taken == 0:
                break
            self._begin()
        raise ArgumentError(
            "data: the iterable gave no batch. Expected one that can be run through again and again (a DataLoader or a "
            "list of batches, not a generator expression)."
        )

    def state(self) -> dict[str, Any]:
        """Where the stream stands: the random state at the start of this pass, and the batches taken from it."""
        return {"pass_start": self._pass_start, "taken": self._taken}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""
        self._stream = state["pass_start"]
        self._begin()
        for _ in range(state["taken"]):
            with self._own_stream():
                next(self._pass)
        self._taken = state["taken"]

    def _begin(self) -> None:
        self._pass_start, self._taken = self._stream, 0
        self._pass = self._one_pass()

    def _own_stream(self) -> _Stream:
        return _Stream(self)

    def _one_pass(self) -> Iterator[Tensor]:
        if isinstance(self._data, Tensor):
            order = torch.randperm(len(self._data))
            whole = self._size * self._world
            for i in range(0, len(order) - whole + 1, whole):
                rows = order[i + self._rank : i + whole : self._world]
                yield self._data[rows.to(self._data.device)].to(self._reference.device)
            return
        for item in self._data:
            batch = item[0] if isinstance(item, tuple | list) else item
            if isinstance(batch, Tensor):
                batch = batch.to(self._reference.device)
            validate.check_observations("data (a batch of it)", batch, self._x_shape, self._reference, self._generator)
            yield batch


class _Stream:
    """Torch's global CPU stream set to the data's own while a batch is made, and put back."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __enter__(self) -> None:
        self._outer = torch.get_rng_state()
        torch.set_rng_state(self._batches._stream)

    def __exit__(self, *_: object) -> None:
        self._batches._stream = torch.get_rng_state()
        torch.set_rng_state(self._outer)
