"""Batches of a split, read as they are needed."""

from __future__ import annotations

__all__ = ["ImageStream"]

import itertools
import os
import sys
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from energy_prior.checks.settings import check_count, whole_number
from energy_prior.data.pixels import ChannelOrder
from energy_prior.data.reader import Reader, ReadSettings, Unscaled, spread_of
from energy_prior.data.rows import Row
from energy_prior.data.source import open_split
from energy_prior.errors import ArgumentError, DataWarning, warn

_FOLLOWING = 1024  # rows whose places are drawn at once


class ImageStream:
    """Batches of a split, read anew in every pass and shuffled through a buffer: for sets that do not fit into memory.

    Every pass gives each image once, but for a last smaller batch and the images that are skipped. The order is drawn from
    torch's global stream at the start of a pass, so a run with `run_dir` goes on with the same batches after a kill.

    What the numbers of a set mean that has no pictures (`docs/data.md`) is found from its first file, or first thousand images,
    before the first batch, and said once; a later value outside of that range is an error.

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
        column: as for `load_images`.
        value_range: as for `load_images`.
        channel_order: as for `load_images`.
        background: as for `load_images`.
        on_error: as for `load_images`; what was left out is said at the end of the first pass.

    Raises:
        ArgumentError: as `load_images`; or if a pass has not one whole batch.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, "train").mkdir()
        ...     for i in range(6):
        ...         Image.new("RGB", (8, 8)).save(Path(folder, "train", f"{i}.png"))
        ...     stream = ImageStream(folder, size=8, batch_size=4)
        ...     print([tuple(batch.shape) for batch in stream])
        [(4, 3, 8, 8)]
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
        column: str | None = None,
        value_range: tuple[float, float] | None = None,
        channel_order: ChannelOrder | None = None,
        background: float = 1.0,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        if whole_number(channels) not in (1, 3):
            raise ArgumentError(f"channels: expected 1 or 3, got {channels!r}.")
        self.source = source
        self.batch_size: int = check_count("batch_size", batch_size)
        self._settings = ReadSettings(check_count("size", size), channels, value_range, channel_order, background, on_error)
        self.size: int | None = self._settings.size
        self.channels: int | None = self._settings.channels
        self.buffer: int = check_count("buffer", buffer)
        self._skip = check_count("skip", skip, least=0)
        self._world, self._rank = check_count("world", world), check_count("rank", rank, least=0)
        if self._rank >= self._world:
            raise ArgumentError(f"rank: expected a whole number below world = {world}, got {rank!r}.")
        self._rows = open_split(source, split, streaming=True, column=column, label_column=False)
        self._meant = self._settings.value_range
        self._order: ChannelOrder | None = self._settings.channel_order
        self._looked = self._order is not None
        self._said = False

    def __iter__(self) -> Iterator[Tensor]:
        """One pass: float32 images in [0, 1], (batch_size, channels, size, size)."""
        rng = torch.Generator("cpu").manual_seed(int(torch.randint(2**31, (), device="cpu")))
        # by image and after the skip, whatever the files: each process has its share of every one
        first, step = min(self._skip + self._rank, sys.maxsize), min(self._world, sys.maxsize)
        rows = itertools.islice(self._rows, first, None, step)
        reader = self._reader()
        batch: list[Tensor] = []
        complete = False
        for row, image in reader.read(_shuffled(rows, min(self.buffer, sys.maxsize), rng)):
            batch.append(self._unit(reader, row, image))
            if len(batch) == self.batch_size:
                yield torch.stack(batch)
                batch, complete = [], True
        if not self._said:
            self._said = True
            reader.report(self._rows.left_out)
        if not complete:
            raise ArgumentError(
                f"batch_size: expected at most {len(batch)}, the images of {os.fspath(self.source)!r} that are left for this "
                f"process (after skip = {self._skip}), got {self.batch_size}."
            )

    def _reader(self) -> Reader:
        """One with the rules of this stream. Where the channels of arrays are, the first image says."""
        if not self._looked:
            first = Reader(os.fspath(self.source), self._settings)
            next(first.read(self._rows.first_part()), None)
            self._order, self._looked = first.order, True
        reader = Reader(os.fspath(self.source), self._settings)
        reader.order = self._order
        return reader

    def _unit(self, reader: Reader, row: Row, image: Tensor | Unscaled) -> Tensor:
        if isinstance(image, Tensor):
            return image.to(torch.float32) / 255 if image.dtype == torch.uint8 else image
        if self._meant is None:
            self._meant = self._look(reader.order)
        return reader.scaled(image, row.name, self._meant)

    def _look(self, order: ChannelOrder | None) -> tuple[float, float]:
        """The range of the first part's numbers."""
        reader = Reader(os.fspath(self.source), self._settings)
        reader.order = order
        low, high, whole = float("inf"), float("-inf"), True
        for _, image in reader.read(self._rows.first_part()):
            if isinstance(image, Unscaled):
                ends = spread_of([image])
                low, high = min(low, ends[0]), max(high, ends[1])
                whole = whole and not image.values.is_floating_point()
        if high < low:
            raise ArgumentError(
                f"value_range: {os.fspath(self.source)!r} has pictures first and numbers later, whose range is not known. Pass "
                "value_range=(low, high)."
            )
        meant = reader.meant((low, high), whole=whole)
        warn(
            f"value_range: the images of {os.fspath(self.source)!r} are numbers, in the first part from {low:g} to {high:g}: "
            f"{meant[0]:g} is read as 0 and {meant[1]:g} as 1. Pass value_range={meant} to say so yourself.",
            DataWarning,
        )
        return meant


def _shuffled(rows: Iterator[Row], buffer: int, rng: torch.Generator) -> Iterator[Row]:
    """The rows, each after it has been exchanged with one that came up to `buffer` before."""
    kept = list(itertools.islice(rows, buffer))
    while following := list(itertools.islice(rows, min(buffer, _FOLLOWING))):
        places = torch.randint(len(kept), (len(following),), generator=rng, device="cpu").tolist()
        for place, row in zip(places, following, strict=True):
            yield kept[place]
            kept[place] = row
    yield from (kept[i] for i in torch.randperm(len(kept), generator=rng, device="cpu").tolist())
