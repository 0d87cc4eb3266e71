"""One tensor of all images of a split."""

from __future__ import annotations

__all__ = ["Images", "load_images"]

import os
from typing import NamedTuple

import torch
from torch import Tensor

from energy_prior.checks.settings import check_count
from energy_prior.data.source import find_columns, open_split, read_label, read_rows, to_tensor
from energy_prior.errors import ArgumentError


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
        source: a folder (`~` is the home folder) with parquet files whose names begin with the split
            (train-00000-of-00001.parquet), or with one folder of images per split (train/…; a folder per class inside it gives
            labels; the images come in a fixed random order); else the name of a set on the hub, "ylecun/mnist", which is
            downloaded.
        split: "train", "test", or another that the set has.
        size: height and width to scale to, after a central square crop, ≥ 1; None: as the images are, which must agree.
        channels: 1 (gray) or 3 (RGB); None: as the first image is.
        limit: read only the first `limit` images, ≥ 1; None: all.
        streaming: read only what `limit` needs, instead of preparing the whole set first.

    Returns:
        Images as float32, on the CPU.

    Raises:
        ArgumentError: if there is no such set or split, it has no images, or they differ in size; the message says what to do.
        MissingExtraError: if `datasets` is not installed.
    """
    if channels not in (None, 1, 3):
        raise ArgumentError(f"channels: expected 1, 3 or None, got {channels!r}.")
    size = None if size is None else check_count("size", size)
    limit = None if limit is None else check_count("limit", limit)
    rows = open_split(source, split, streaming)
    if limit is not None:
        rows = rows.take(limit)
    rows, image_column, label_column = find_columns(rows, source)
    images: list[Tensor] = []
    labels: list[int] = []
    for row in read_rows(rows, source):
        picture = row[image_column]
        if channels is None:
            channels = 1 if picture.mode in ("1", "L", "I;16", "I") else 3
        image = to_tensor(picture, size, channels)
        if images and image.shape != images[0].shape:
            raise ArgumentError(
                f"size: the images of {os.fspath(source)!r} differ, {tuple(images[0].shape[1:])} and {tuple(image.shape[1:])}; "
                "pass the size that they shall all be scaled to."
            )
        images.append(image)
        if label_column is not None:
            labels.append(read_label(row[label_column], source))
    if not images:
        raise ArgumentError(f"source: split {split!r} of {os.fspath(source)!r} has no images.")
    stacked = torch.stack(images).to(torch.float32) / 255
    return Images(stacked, torch.tensor(labels, device="cpu") if label_column is not None else None)
