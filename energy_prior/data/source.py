"""Rows of an image set, from parquet files, image folders or the Hugging Face hub, and pixels of their images."""

from __future__ import annotations

__all__ = ["find_columns", "open_split", "read_label", "read_rows", "to_tensor"]

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from energy_prior._util import first_line
from energy_prior.checks.settings import check_path, require_extra
from energy_prior.errors import ArgumentError

_IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def open_split(source: str | os.PathLike[str], split: str, streaming: bool) -> Any:
    """The rows of a split, a data set of Hugging Face `datasets`."""
    folder = check_path("source", source)
    datasets = require_extra("datasets", "examples")
    if folder.is_dir():
        files = sorted(str(f) for f in folder.glob(f"{split}*.parquet"))
        if files:
            return datasets.load_dataset("parquet", data_files={split: files}, split=split, streaming=streaming)
        if not any(f.suffix.lower() in _IMAGE_FILES for f in (folder / split).rglob("*")):
            there = sorted(f.name for f in folder.iterdir())[:6]
            raise ArgumentError(
                f"source: expected {split}*.parquet or a folder {split}/ with images in {str(folder)!r}, which has {there}."
            )
        # in a fixed random order: sorted by name, a folder per class would put whole classes at either end
        found = sorted(str(f) for f in (folder / split).rglob("*") if f.suffix.lower() in _IMAGE_FILES)
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0), device="cpu").tolist()
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


def find_columns(rows: Any, source: str | os.PathLike[str]) -> tuple[Any, str, str | None]:
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


def read_label(value: Any, source: str | os.PathLike[str]) -> int:
    """The label of an image."""
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ArgumentError(f"source: expected whole numbers as labels in {os.fspath(source)!r}, got {value!r}.") from None


def read_rows(rows: Any, source: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The rows one by one; an `ArgumentError` names the source if one cannot be read."""
    try:
        yield from rows
    except (OSError, ValueError) as error:
        raise ArgumentError(f"source: an image or file of {os.fspath(source)!r} cannot be read: {error}") from error


def to_tensor(picture: Any, size: int | None, channels: int) -> Tensor:
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
