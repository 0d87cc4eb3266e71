"""Where the images of a split are: parquet files or folders here, or a set on the Hugging Face hub."""

from __future__ import annotations

__all__ = ["open_split"]

import os
from collections.abc import Callable
from typing import Any

from energy_prior.checks.settings import check_path
from energy_prior.data.folders import FolderSource, has_images, shards
from energy_prior.data.rows import ImageSource
from energy_prior.data.tables import HubSource, ParquetSource
from energy_prior.errors import ArgumentError


def open_split(
    source: str | os.PathLike[str],
    split: str,
    broken: Callable[[str, str], None],
    *,
    streaming: bool,
    column: str | None,
    label_column: str | bool,
) -> ImageSource:
    """The rows of a split.

    Args:
        source: as `load_images` has it.
        split: as `load_images` has it.
        broken: called with the name of a file that cannot be read, and why; raises, or returns to go on without it.
        streaming: as `load_images` has it.
        column: as `load_images` has it.
        label_column: as `load_images` has it.

    Raises:
        ArgumentError: if there is no such set or split, or its columns are not what was asked for.
    """
    folder, name = check_path("source", source), os.fspath(source)
    if not isinstance(split, str) or not split or split != os.path.basename(split):
        raise ArgumentError(f'split: expected a name such as "train", got {split!r}.')
    for argument, value, kinds in (("column", column, (str, type(None))), ("label_column", label_column, (str, bool))):
        if not isinstance(value, kinds):
            raise ArgumentError(f"{argument}: expected the name of a column, got {value!r}.")
    if folder.is_dir():
        files = shards(folder, split)
        if files and has_images(folder / split):
            raise ArgumentError(
                f"source: {str(folder)!r} has both {files[0].name!r} and images in {split}/; leave one of the two there."
            )
        if files:
            return ParquetSource(files, column, label_column, str(folder), broken)
        if not (folder / split).is_dir():
            there = sorted(f.name for f in folder.iterdir())[:6]
            raise ArgumentError(
                f"source: expected {split}.parquet, {split}-….parquet or a folder {split}/ with images in {str(folder)!r}, "
                f"which has {there}."
            )
        if column is not None or isinstance(label_column, str):
            raise ArgumentError(f"column: {str(folder / split)!r} is a folder of images, which has no columns; leave it out.")
        return _unlabelled(FolderSource(folder / split), label_column)
    if folder.is_absolute() or name.startswith((".", "~")):
        raise ArgumentError(f"source: there is no folder {str(folder)!r}.")
    return HubSource(name, split, streaming, column, label_column)


def _unlabelled(found: Any, label_column: str | bool) -> Any:
    if label_column is False:
        found.has_labels, found.classes = False, None
    return found
