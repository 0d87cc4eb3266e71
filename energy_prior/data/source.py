"""Where the images of a split are: parquet files or folders here, or a set on the Hugging Face hub."""

from __future__ import annotations

__all__ = ["open_split"]

import os
from pathlib import Path

from energy_prior._util import some_of
from energy_prior.checks.settings import check_flag, check_path
from energy_prior.data.folders import FolderSource, has_images, shards
from energy_prior.data.rows import ImageSource
from energy_prior.data.tables import HubSource, ParquetSource
from energy_prior.errors import ArgumentError


def open_split(
    source: str | os.PathLike[str], split: str, *, streaming: bool, column: str | None, label_column: str | bool
) -> ImageSource:
    """The rows of a split.

    Args:
        source: as `load_images` has it.
        split: as `load_images` has it.
        streaming: as `load_images` has it.
        column: as `load_images` has it.
        label_column: as `load_images` has it.

    Raises:
        ArgumentError: if there is no such set or split, or its columns are not what was asked for.
    """
    folder, name = check_path("source", source), os.fspath(source)
    if not isinstance(split, str) or split in ("", ".", "..") or split != os.path.basename(split):
        raise ArgumentError(f'split: expected a name such as "train", got {split!r}.')
    for argument, value, kinds in (("column", column, (str, type(None))), ("label_column", label_column, (str, bool))):
        if not isinstance(value, kinds):
            raise ArgumentError(f"{argument}: expected the name of a column, got {value!r}.")
    streaming = check_flag("streaming", streaming)
    try:
        if folder.is_dir():
            return _in_folder(folder, split, column, label_column)
        if folder.exists():
            raise ArgumentError(f"source: {str(folder)!r} is a file; pass the folder that it lies in.")
    except OSError as error:
        raise ArgumentError(f"source: {str(folder)!r} cannot be read ({error.strerror}).") from error
    if folder.is_absolute() or name.startswith((".", "~")):
        raise ArgumentError(f"source: there is no folder {str(folder)!r}.")
    return HubSource(name, split, streaming, column, label_column)


def _in_folder(folder: Path, split: str, column: str | None, label_column: str | bool) -> ImageSource:
    """Parquet files of the split, else its folder of images."""
    files, images = shards(folder, split), folder / split
    if files and has_images(images):
        raise ArgumentError(
            f"source: {str(folder)!r} has both {files[0].name!r} and images in {split}/; leave one of the two there."
        )
    if files:
        return ParquetSource(files, column, label_column, str(folder))
    if not images.is_dir():
        there = sorted(entry.name for entry in folder.iterdir())
        below = next((name for name in there if (folder / name).is_dir() and shards(folder / name, split)), None)
        hint = "" if below is None else f" Its folder {below!r} has such files: pass {str(folder / below)!r}."
        raise ArgumentError(
            f"source: expected {split}.parquet, {split}-….parquet or a folder {split}/ with images in {str(folder)!r}, which "
            f"has {some_of(there) or 'nothing'}.{hint}"
        )
    if column is not None or isinstance(label_column, str):
        raise ArgumentError(f"column: {str(images)!r} is a folder of images, which has no columns; leave it out.")
    return FolderSource(images, labelled=label_column)
