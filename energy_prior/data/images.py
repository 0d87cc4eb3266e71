"""Images from a Hugging Face data set by name, from local parquet files or from a folder of images: one tensor, or a stream."""

from __future__ import annotations

__all__ = ["ImageStream", "Images", "load_images"]

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from energy_prior._util import first_line
from energy_prior.checks.arguments import check_count, require_extra
from energy_prior.errors import ArgumentError

_IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Images(NamedTuple):
    """Images in [0, 1], (n, channels, height, width), and their labels, (n,), or None where the set has none."""

    images: Tensor
    labels: Tensor | None


def load_images(
    source: str | os.PathLike[str],
    split: str = "train",
    *,
    size: int | None = None,
    channels: int | None = None,
    limit: int | None = None,
    streaming: bool = False,
) -> Images:
    """Loads a split of an image set through Hugging Face `datasets`, without shuffling.

    Args:
        source: a folder with parquet files whose names begin with the split (train-00000-of-00001.parquet), or with one folder
            of images per split (train/…, a folder per class inside it gives labels; in an order that is random but always the
            same); else the name of a set on the hub,
            "ylecun/mnist", which is downloaded.
        split: "train", "test", or another that the set has.
        size: height and width to scale to, after a central square crop; None: as the images are, which must agree.
        channels: 1 (gray) or 3 (RGB); None: as the first image is.
        limit: number of images, the first ones; None: all.
        streaming: read only what `limit` needs instead of preparing the whole set first.

    Returns:
        Images as float32.

    Raises:
        ArgumentError: if there is no such set or split, it has no images, or they differ in size; the message says what to do.
        MissingExtraError: if `datasets` is not installed.
    """
    if channels not in (None, 1, 3):
        raise ArgumentError(f"channels: expected 1, 3 or None, got {channels!r}.")
    for name, value in (("size", size), ("limit", limit)):
        if value is not None:
            check_count(name, value)
    rows = _open(source, split, streaming)
    if limit is not None:
        rows = rows.take(limit)
    rows, image_column, label_column = _columns(rows, source)
    images: list[Tensor] = []
    labels: list[int] = []
    for row in _rows(rows, source):
        picture = row[image_column]
        if channels is None:
            channels = 1 if picture.mode in ("1", "L", "I;16", "I") else 3
        image = _tensor(picture, size, channels)
        if images and image.shape != images[0].shape:
            raise ArgumentError(
                f"size: the images of {os.fspath(source)!r} differ, {tuple(images[0].shape[1:])} and {tuple(image.shape[1:])}; "
                "pass the size that they shall all be scaled to."
            )
        images.append(image)
        if label_column is not None:
            labels.append(_label(row[label_column], source))
    if not images:
        raise ArgumentError(f"source: split {split!r} of {os.fspath(source)!r} has no images.")
    stacked = torch.stack(images).to(torch.float32) / 255
    return Images(stacked, torch.tensor(labels) if label_column is not None else None)


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
        for name, value in {"size": size, "batch_size": batch_size, "buffer": buffer, "world": world}.items():
            check_count(name, value)
        check_count("skip", skip, least=0)
        if check_count("rank", rank, least=0) >= world:
            raise ArgumentError(f"rank: expected a whole number below world = {world}, got {rank!r}.")
        self.source, self.size, self.batch_size, self.channels, self.buffer = source, size, batch_size, channels, buffer
        rows, self._image, _ = _columns(_open(source, split, streaming=True), source)
        self._rows, self._skip = rows.skip(skip), skip
        if world > 1:  # by image and after the skip, whatever the files: datasets' own split may skip less in each process
            self._rows = self._rows.filter(lambda _, i: i % world == rank, with_indices=True)

    def __iter__(self) -> Iterator[Tensor]:
        """One pass: float32 images in [0, 1], (batch_size, channels, size, size)."""
        seed = int(torch.randint(2**31, ()))
        batch: list[Tensor] = []
        whole = False
        for row in _rows(self._rows.shuffle(seed=seed, buffer_size=self.buffer), self.source):
            batch.append(_tensor(row[self._image], self.size, self.channels))
            if len(batch) == self.batch_size:
                yield torch.stack(batch).to(torch.float32) / 255
                batch, whole = [], True
        if not whole:
            raise ArgumentError(
                f"batch_size: expected at most {len(batch)}, the images of {os.fspath(self.source)!r} that are left for this "
                f"process (after skip = {self._skip}), got {self.batch_size}."
            )


def _open(source: str | os.PathLike[str], split: str, streaming: bool) -> Any:
    """The rows of a split."""
    datasets = require_extra("datasets", "examples")
    folder = Path(source)
    if folder.is_dir():
        files = sorted(str(f) for f in folder.glob(f"{split}*.parquet"))
        if files:
            return datasets.load_dataset("parquet", data_files={split: files}, split=split, streaming=streaming)
        if not any(f.suffix.lower() in _IMAGE_FILES for f in (folder / split).rglob("*")):
            there = sorted(f.name for f in folder.iterdir())[:6]
            raise ArgumentError(
                f"source: expected {split}*.parquet or a folder {split}/ with images in {str(folder)!r}, which has {there}."
            )
        # in a random order that is always the same: a folder per class would put whole classes at either end
        found = sorted(str(f) for f in (folder / split).rglob("*") if f.suffix.lower() in _IMAGE_FILES)
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
        files = [found[i] for i in order]
        return datasets.load_dataset("imagefolder", data_files={split: files}, split=split, streaming=streaming)
    if folder.is_absolute() or str(source).startswith("."):
        raise ArgumentError(f"source: there is no folder {str(folder)!r}.")
    try:
        return datasets.load_dataset(str(source), split=split, streaming=streaming)
    except Exception as error:  # whatever the hub, the network or the set's own loader raises
        raise ArgumentError(
            f"source: {os.fspath(source)!r} is no folder here, and loading it from the hub failed: {first_line(error)}"
        ) from error


def _columns(rows: Any, source: str | os.PathLike[str]) -> tuple[Any, str, str | None]:
    """The rows with their images decoded, and the names of the image column and of the label column, if there is one."""
    features = dict(rows.features or {})
    images = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    if not images:
        images = [name for name in ("image", "img") if name in features]
        for name in images:
            rows = rows.cast_column(name, require_extra("datasets", "examples").Image())
    if not images:
        raise ArgumentError(f"source: expected a column of images in {os.fspath(source)!r}, got {sorted(features)}.")
    labels = [name for name in ("label", "labels", "fine_label") if name in features]
    return rows, images[0], labels[0] if labels else None


def _label(value: Any, source: str | os.PathLike[str]) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ArgumentError(f"source: expected whole numbers as labels in {os.fspath(source)!r}, got {value!r}.") from None


def _rows(rows: Any, source: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    try:
        yield from rows
    except (OSError, ValueError) as error:
        raise ArgumentError(f"source: an image or file of {os.fspath(source)!r} cannot be read: {error}") from error


def _tensor(picture: Any, size: int | None, channels: int) -> Tensor:
    """A PIL image as uint8, (channels, height, width)."""
    if picture.mode.startswith("I"):  # 16 bits, of which Pillow would keep the lowest eight
        picture = picture.point(lambda value: value / 257)
    picture = picture.convert("L" if channels == 1 else "RGB")  # before it is resized: a palette cannot be averaged
    if size is not None and picture.size != (size, size):
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side)).resize((size, size), reducing_gap=2.0)
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.reshape(picture.height, picture.width, channels).permute(2, 0, 1)
