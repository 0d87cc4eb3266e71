"""Batches of a split, read as they are needed."""

from __future__ import annotations

__all__ = ["ImageStream"]

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from energy_prior.checks.settings import check_count
from energy_prior.data.source import find_columns, open_split, read_rows, to_tensor
from energy_prior.errors import ArgumentError


class ImageStream:
    """Batches of a split, read anew in every pass and shuffled through a buffer: for sets that do not fit into memory.

    Every pass gives each image once, but for a last smaller batch and the images that are skipped. The order is drawn from
    torch's global stream at the start of a pass, so a run with `run_dir` goes on with the same batches after a kill.

    Args:
        source: as for `load_images`.
        split: as for `load_images`.
        size: height and width to scale to, after a central square crop.
        batch_size: images per batch, ≥ 1.
        channels: 1 (gray) or 3 (RGB).
        skip: the first images, which are left out (to be held out elsewhere), ≥ 0.
        buffer: images that the shuffling draws from, ≥ 1.
        rank: number of this process.
        world: number of processes, ≥ 1; each takes every world-th image, from the rank-th on.

    Raises:
        ArgumentError: as `load_images`; or if a pass has not one whole batch.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        split: str = "train",
        *,
        size: int,
        batch_size: int,
        channels: int = 3,
        skip: int = 0,
        buffer: int = 4096,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if channels not in (1, 3):
            raise ArgumentError(f"channels: expected 1 or 3, got {channels!r}.")
        self.source, self.channels = source, int(channels)
        self.size, self.batch_size = check_count("size", size), check_count("batch_size", batch_size)
        self.buffer, self._skip = check_count("buffer", buffer), check_count("skip", skip, least=0)
        processes, own = check_count("world", world), check_count("rank", rank, least=0)
        if own >= processes:
            raise ArgumentError(f"rank: expected a whole number below world = {world}, got {rank!r}.")
        rows, self._image, _ = find_columns(open_split(source, split, streaming=True), source)
        self._rows = rows.skip(self._skip)
        if processes > 1:  # by image and after the skip, whatever the files: datasets' own split may skip less in each process
            self._rows = self._rows.filter(lambda _, i: i % processes == own, with_indices=True)

    def __iter__(self) -> Iterator[Tensor]:
        """One pass: float32 images in [0, 1], (batch_size, channels, size, size)."""
        seed = int(torch.randint(2**31, (), device="cpu"))
        batch: list[Tensor] = []
        complete = False
        for row in read_rows(self._rows.shuffle(seed=seed, buffer_size=self.buffer), self.source):
            batch.append(to_tensor(row[self._image], self.size, self.channels))
            if len(batch) == self.batch_size:
                yield torch.stack(batch).to(torch.float32) / 255
                batch, complete = [], True
        if not complete:
            raise ArgumentError(
                f"batch_size: expected at most {len(batch)}, the images of {os.fspath(self.source)!r} that are left for this "
                f"process (after skip = {self._skip}), got {self.batch_size}."
            )
