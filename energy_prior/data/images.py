"""One tensor of all images of a split."""

from __future__ import annotations

__all__ = ["Images", "load_images"]

import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from energy_prior.checks.settings import check_count
from energy_prior.data.pixels import ChannelOrder
from energy_prior.data.reader import Reader, ReadSettings, Unscaled, spread_of
from energy_prior.data.source import open_split
from energy_prior.errors import ArgumentError, DataWarning, warn

_NO_CLASS = -1  # as sets on the hub have it where labels are held back


class _Pair(NamedTuple):
    images: Tensor
    labels: Tensor | None


class Images(_Pair):
    """A split in memory; `images, labels = load_images(…)` unpacks it.

    Attributes:
        images: in [0, 1], (n, channels, height, width), float32, on the CPU.
        labels: whole numbers, (n,); None where the set has none.
        classes: names of the labels 0, 1, …; None where they have no names.
        names: of every image: its file's, or its table's and row's.
        left_out: name -> why an image is not there, with on_error="skip".

    Examples:
        >>> split = Images(torch.zeros(2, 1, 8, 8), torch.tensor([1, 0]), classes=("cat", "dog"))  # as `load_images` gives it
        >>> images, labels = split
        >>> [split.classes[label] for label in labels]
        ['dog', 'cat']
    """

    classes: tuple[str, ...] | None
    names: tuple[str, ...]
    left_out: Mapping[str, str]

    def __new__(
        cls,
        images: Tensor,
        labels: Tensor | None,
        classes: tuple[str, ...] | None = None,
        names: tuple[str, ...] = (),
        left_out: Mapping[str, str] | None = None,
    ) -> Self:
        """All of them."""
        made = super().__new__(cls, images, labels)
        made.classes, made.names, made.left_out = classes, names, left_out or {}
        return made


def load_images(
    source: str | os.PathLike[str],
    split: str = "train",
    *,
    size: int | None = None,
    channels: int | None = None,
    limit: int | None = None,
    streaming: bool = False,
    column: str | None = None,
    label_column: str | bool = True,
    value_range: tuple[float, float] | None = None,
    channel_order: ChannelOrder | None = None,
    background: float = 1.0,
    on_error: Literal["raise", "skip"] = "raise",
) -> Images:
    """Loads a split of an image set, without shuffling. `docs/data.md` says what is read, and what it means.

    Args:
        source: a folder (`~` is the home folder) with parquet files `train.parquet` or `train-….parquet`, or with a folder
            `train/` of images (the first folder inside it is an image's class; the images come in a fixed random order); else
            the name of a set on the Hugging Face hub, "ylecun/mnist", which is downloaded.
        split: "train", "test", or another that the set has.
        size: height and width to scale to, after a central square crop, ≥ 1; None: as the images are, which must agree.
        channels: 1 (gray) or 3 (RGB); None: RGB where any image has colours.
        limit: read only the first `limit` images, ≥ 1; None: all.
        streaming: of a set on the hub read only what `limit` needs, instead of preparing the whole set first.
        column: of the images; None: "image", "img", or the only one that holds images.
        label_column: of the labels; True: "label", "labels", "fine_label", or the only one of classes; False: none is read.
        value_range: (low, high) of images that are numbers: low becomes 0, high 1. None: found from all of them, 0 … 1,
            0 … 255 or 0 … 65,535 of whole numbers, 0 … 1 or −1 … 1 of others. Pictures have the range that their mode says.
        channel_order: where the channels of arrays are, "first" or "last"; None: found from the first one.
        background: brightness of what is behind see-through images, from 0 (black) to 1 (white).
        on_error: what an image that cannot be read does: "raise", or "skip": it is left out, counted and named at the end.

    Returns:
        Images, labels and names.

    Raises:
        ArgumentError: if there is no such set or split, it has no images, they differ in size, one cannot be read, or what its
            numbers or labels mean cannot be told; the message says what to do.
        MissingExtraError: if a package of the extra "examples" is not installed.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("cat", "dog"):
        ...         Path(folder, "train", name).mkdir(parents=True)
        ...         Image.new("L", (12, 8), 255).save(Path(folder, "train", name, "0.png"))
        ...     images, labels = load_images(folder, size=8)
        >>> images.shape, sorted(labels.tolist())
        (torch.Size([2, 1, 8, 8]), [0, 1])
    """
    settings = ReadSettings(size, channels, value_range, channel_order, background, on_error)
    limit = None if limit is None else check_count("limit", limit)
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else repr(source)
    reader = Reader(name, settings)
    rows = open_split(source, split, streaming=streaming, column=column, label_column=label_column)
    names: list[str] = []
    stored: list[Tensor | Unscaled] = []
    labels: list[Any] = []
    shapes: set[tuple[int, ...]] = set()
    for row, image in reader.read(itertools.islice(rows, limit if limit is None else min(limit, sys.maxsize))):
        shapes.add(tuple((image.values if isinstance(image, Unscaled) else image).shape[1:]))
        if settings.size is None and len(shapes) > 1:
            raise ArgumentError(
                f"size: the images of {name!r} differ in size, {' and '.join(map(str, sorted(shapes)))} ({row.name}); pass the "
                "size that they shall all be scaled to."
            )
        names.append(row.name)
        stored.append(image)
        if rows.has_labels:
            labels.append(_label(row.label, row.name, name))
    reader.report(rows.left_out)
    if not stored:
        raise ArgumentError(f"source: split {split!r} of {name!r} has no images.")
    images = _in_common_channels(_scaled(stored, names, reader), name)
    if all(image.dtype == torch.uint8 for image in images):  # together: that is faster
        stacked = torch.stack(images).to(torch.float32) / 255
    else:
        stacked = torch.stack([i.to(torch.float32) / 255 if i.dtype == torch.uint8 else i for i in images])
    if not rows.has_labels:
        return Images(stacked, None, None, tuple(names), reader.left_out)
    numbers, classes = _numbered(labels, rows.classes, name)
    return Images(stacked, torch.tensor(numbers, device="cpu"), classes, tuple(names), reader.left_out)


def _scaled(stored: Sequence[Tensor | Unscaled], names: Sequence[str], reader: Reader) -> list[Tensor]:
    """All images in [0, 1], or uint8."""
    unscaled = [image for image in stored if isinstance(image, Unscaled)]
    if not unscaled:
        return [image for image in stored if isinstance(image, Tensor)]
    meant = reader.meant(spread_of(unscaled), whole=all(not image.values.is_floating_point() for image in unscaled))
    return [
        reader.scaled(image, name, meant) if isinstance(image, Unscaled) else image
        for image, name in zip(stored, names, strict=True)
    ]


def _in_common_channels(images: Sequence[Tensor], source: str) -> list[Tensor]:
    """All as RGB where one of them is."""
    gray = sum(len(image) == 1 for image in images)
    if gray in (0, len(images)):
        return list(images)
    warn(
        f"channels: {gray} of {len(images)} images of {source!r} are gray, the others have colours; all are read as RGB. Pass "
        "channels=3 or channels=1 to say so yourself.",
        DataWarning,
    )
    return [image.expand(3, -1, -1) for image in images]


def _label(value: Any, row: str, source: str) -> int | str:
    """A label as a whole number or text."""
    if isinstance(value, str):
        return value
    if (isinstance(value, int) or (isinstance(value, float) and value.is_integer())) and abs(value) < 2**63:
        return int(value)
    raise ArgumentError(
        f"label_column: expected whole numbers or names as labels in {source!r}, got {repr(value)[:80]} ({row}). Pass the name "
        "of another column, or label_column=False to read none."
    )


def _numbered(
    labels: Sequence[int | str], classes: Sequence[str] | None, source: str
) -> tuple[list[int], tuple[str, ...] | None]:
    """Labels as numbers, and the names of these: names are numbered as the source says, else in sorted order."""
    names = sorted({label for label in labels if isinstance(label, str)})
    if not names:
        numbers = [int(label) for label in labels]
        unnamed = next((n for n in numbers if classes is not None and n != _NO_CLASS and not 0 <= n < len(classes)), None)
        if unnamed is not None:
            raise ArgumentError(
                f"label_column: {source!r} has {len(classes or ())} names of classes, and a label {unnamed} without one. Pass "
                "the name of another column, or label_column=False to read none."
            )
        return numbers, None if classes is None else tuple(classes)
    if any(isinstance(label, int) for label in labels):
        raise ArgumentError(f"label_column: the labels of {source!r} are numbers here and names there, such as {names[0]!r}.")
    if classes is not None and set(names) <= set(classes):
        names = list(classes)
    number = {name: i for i, name in enumerate(names)}
    return [number[str(label)] for label in labels], tuple(names)
