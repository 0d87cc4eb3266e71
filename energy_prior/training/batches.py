"""An endless stream of batches from a data set or a data loader, checked on the way in, that can go on where it stood."""

from __future__ import annotations

__all__ = ["Batches", "observations_of"]

import contextlib
import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from energy_prior.checkpoint import digest
from energy_prior.checks.arguments import as_observations, is_array
from energy_prior.errors import ArgumentError
from energy_prior.training.config import RunConfig
from energy_prior.training.state import random_stream, whole

_KEYS = ("x", "image", "images", "pixel_values", "img", "data", "input", "inputs")
_BATCH = "data (a batch of it)"


class Batches:
    """Batches of observations, pass after pass over the data, on the device of `reference`.

    A tensor or array is checked whole, shuffled anew for every pass and cut into batches; a last smaller batch is left out,
    and so is what does not fill a batch of every process. An iterable is run through again and again; each of its batches
    is checked as it comes: a tensor or array, a tuple whose first entry is one, or a dict with one (`observations_of`).
    With several processes, give each its own share (`accelerator.prepare` does that for a `DataLoader`).

    The order has a random stream of its own, on the CPU: a stream at the same `state()` goes on with the same batches (for a
    loader whose order and transforms depend on nothing but torch's global stream).

    Args:
        data: observations, (n, *x_shape), a tensor or an array; or an iterable of batches.
        config: its `batch_size` is the rows per batch of a tensor or array.
        generator: the generator, for the range of its observations.
        x_shape: shape of an observation.
        reference: a tensor with the dtype and device that the model needs.
        rank: number of this process.
        world: number of processes.
        seed: of the order; the same in every process.

    Attributes:
        x_shape: shape of an observation.
        whole: all observations, where they are one tensor or array; None for an iterable of batches.

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
        self.x_shape: torch.Size = torch.Size(x_shape)
        self.whole: Tensor | None = None
        self._data, self._generator, self._reference = data, generator, reference
        self._size, self._rank, self._world = config.batch_size or config.usual_batch, rank, world
        if isinstance(data, Tensor) or is_array(data):
            place = reference.to(data.device if isinstance(data, Tensor) else "cpu")
            self.whole = as_observations("data", data, x_shape, place, generator)
            rows = len(self.whole)
            if config.batch_size is None:
                self._size = max(1, min(self._size, rows // world))
            if self._size * world > rows:
                raise ArgumentError(
                    f"batch_size: expected at most the {rows} observations in data"
                    + (f" over {world} processes" if world > 1 else "")
                    + f", got {self._size}. Pass a smaller batch_size."
                )
        elif not isinstance(data, Iterable) or isinstance(data, str | bytes | Mapping):
            raise ArgumentError(f"data: expected a tensor, an array or an iterable of batches, got {type(data).__name__}.")
        self._stream = torch.Generator(device="cpu").manual_seed(seed).get_state()
        self._begin()

    @property
    def device(self) -> torch.device:
        """Where the batches are."""
        return self._reference.device

    def fingerprint(self) -> str:
        """What tells one set of observations from another: a tensor's shape and contents, a loader's kind and sizes."""
        if self.whole is not None:
            return digest({"data": self.whole})
        inside = getattr(self._data, "dataset", None)
        sizes = [len(d) for d in (self._data, inside) if isinstance(d, Sized)]
        return " ".join([type(self._data).__name__, *map(str, sizes)])

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

    def state_like(self) -> dict[str, Any]:
        """The pattern of such a state."""
        return {"pass_start": random_stream, "taken": whole(math.inf if self._in_a_pass is None else 1 + self._in_a_pass)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises:
            ArgumentError: if an iterable has fewer batches now than had been taken from it then.
        """
        self._stream = state["pass_start"].cpu()
        self._begin()
        for done in range(state["taken"]):
            with self._own_stream():
                batch = next(self._pass, None)
            if batch is None:
                raise ArgumentError(
                    f"data: the run had taken {state['taken']} batches from it when it was stopped, and the iterable now gives "
                    f"{done}. Pass the same data, or name another run_dir to begin anew."
                )
        self._taken = state["taken"]

    @property
    def _in_a_pass(self) -> int | None:
        """Batches of a pass over the data; None where that is not known."""
        if self.whole is not None:
            return len(self.whole) // (self._size * self._world)
        return len(self._data) if isinstance(self._data, Sized) else None

    def _begin(self) -> None:
        self._pass_start, self._taken = self._stream, 0
        self._pass = self._one_pass()

    @contextlib.contextmanager
    def _own_stream(self) -> Generator[None]:
        """Torch's global CPU stream is that of the data while a batch is made, and is put back."""
        outer = torch.get_rng_state()
        torch.set_rng_state(self._stream)
        try:
            yield
        finally:
            self._stream = torch.get_rng_state()
            torch.set_rng_state(outer)

    def _one_pass(self) -> Iterator[Tensor]:
        if self.whole is not None:
            order = torch.randperm(len(self.whole), device="cpu")
            step = self._size * self._world
            for i in range(0, len(order) - step + 1, step):
                rows = order[i + self._rank : i + step : self._world]
                yield self.whole[rows.to(self.whole.device)].to(self._reference.device)
            return
        for item in self._data:
            name, batch = observations_of(item, self.x_shape)
            if isinstance(batch, Tensor):
                batch = batch.to(self._reference.device)
            yield as_observations(name, batch, self.x_shape, self._reference, self._generator)


def observations_of(item: Any, x_shape: Sequence[int] | None = None) -> tuple[str, Any]:
    """The observations in what a loader gives, and what messages call them.

    Of a tuple or list that is its first entry; of a dict the entry under the first of "x", "image", "images", "pixel_values",
    "img", "data", "input" and "inputs" that is there, else the only one that is a tensor or array of the right shape.

    Args:
        item: one batch of a loader.
        x_shape: shape of an observation; None: any.

    Raises:
        ArgumentError: if a dict has no entry that is meant for sure, or if a tuple is empty.
    """
    if isinstance(item, tuple | list):
        if not item:
            raise ArgumentError(f"{_BATCH}: expected a tuple whose first entry is the observations, got an empty one.")
        item = item[0]
    if not isinstance(item, Mapping):
        return _BATCH, item
    key = next((key for key in _KEYS if key in item), None)
    if key is None:
        fitting = [key for key, value in item.items() if _fits(value, x_shape)]
        if len(fitting) != 1:
            shape = "" if x_shape is None else f" of shape (batch, {', '.join(map(str, x_shape))})"
            raise ArgumentError(
                f"{_BATCH}: expected a dict with the observations under one of {', '.join(map(repr, _KEYS))}, or with one "
                f"tensor or array{shape}, got the keys {', '.join(map(repr, item)) or '(none)'}."
            )
        key = fitting[0]
    return f"{_BATCH}[{key!r}]", item[key]


def _fits(value: Any, x_shape: Sequence[int] | None) -> bool:
    if not isinstance(value, Tensor) and not is_array(value):
        return False
    shape = tuple(value.shape)
    return len(shape) > 0 and (x_shape is None or shape[1:] == tuple(x_shape))
