"""An endless stream of batches from a tensor or a data loader, checked on the way in."""

from __future__ import annotations

__all__ = ["endless_batches"]

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from energy_prior import validate
from energy_prior.errors import ArgumentError


def endless_batches(
    data: Tensor | Iterable[Any], batch_size: int, x_shape: Sequence[int], reference: Tensor
) -> Iterator[Tensor]:
    """Batches of observations, pass after pass over the data, on the device of `reference`.

    A tensor is checked whole, shuffled anew for every pass and cut into batches of `batch_size` (all of it, if it is
    smaller; a last smaller batch is left out). An iterable is run through again and again; each of its batches, a tensor
    or a tuple whose first entry is one, is checked as it comes.

    Raises:
        ArgumentError, ShapeError: if the data are empty, not finite, or of the wrong shape or dtype.
    """
    if isinstance(data, Tensor):
        validate.check_observations("data", data, x_shape, reference.to(data.device))
        size = min(batch_size, len(data))
        while True:
            order = torch.randperm(len(data), device="cpu").to(data.device)
            for i in range(0, len(data) - size + 1, size):
                yield data[order[i : i + size]].to(reference.device)
    if not isinstance(data, Iterable) or hasattr(data, "__array__"):
        hint = " Convert it with torch.from_numpy." if hasattr(data, "__array__") else ""
        raise ArgumentError(f"data: expected a tensor or an iterable of batches, got {type(data).__name__}.{hint}")
    while True:
        empty = True
        for item in data:
            batch = item[0] if isinstance(item, tuple | list) else item
            if isinstance(batch, Tensor):
                batch = batch.to(reference.device)
            validate.check_observations("data (a batch of it)", batch, x_shape, reference)
            empty = False
            yield batch
        if empty:
            raise ArgumentError(
                "data: the iterable gave no batch. Expected one that can be run through again and again (a DataLoader or a "
                "list of batches, not a generator expression)."
            )
