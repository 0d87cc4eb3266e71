"""What a source of images gives: rows with a name, an image as it is stored, and a label; and how columns are chosen."""

from __future__ import annotations

__all__ = ["Broken", "ImageSource", "Row", "choose_image_column", "choose_label_column", "column_error"]

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from energy_prior.errors import ArgumentError

_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "labels", "fine_label")


class Broken(NamedTuple):
    """In place of an image: why its file cannot be read, or the rest of it."""

    why: str


class Row(NamedTuple):
    """One image of a source.

    Attributes:
        name: of its file, or of its table and row, for messages.
        image: a path, encoded bytes, a dict with "bytes" and "path", numbers (nested lists or an array), or why it is `Broken`;
            None: there is none.
        label: as it is stored; None: there is none.
    """

    name: str
    image: Any
    label: Any = None


class ImageSource(Protocol):
    """A split of an image set, that can be gone through again and again.

    Attributes:
        classes: names of the labels 0, 1, …, where the source has them.
        has_labels: whether rows have labels.
        left_out: what of it are no images, and how many; empty if nothing was left out.
    """

    left_out: str
    classes: Sequence[str] | None
    has_labels: bool

    def __iter__(self) -> Iterator[Row]:
        """All rows, in the same order every time."""
        ...

    def first_part(self) -> Iterator[Row]:
        """Enough rows, from the first one on, to see what range their numbers have."""
        ...


def choose_image_column(usable: Mapping[str, Any], everything: Mapping[str, Any], wanted: str | None, source: str) -> str:
    """The column of images: the one asked for, else "image", else "img", else the only one there is.

    Args:
        usable: columns that may hold images, by name.
        everything: all columns, name -> type.
        wanted: the name that was asked for; None: any.
        source: for messages.

    Raises:
        ArgumentError: if there is none, more than one, or the one asked for holds no images.
    """
    if wanted is not None:
        if wanted not in everything:
            raise ArgumentError(f"column: {source!r} has no column {wanted!r}; there are {_listed(everything)}.")
        if wanted not in usable:
            raise column_error(wanted, everything[wanted], source)
        return wanted
    for name in (*_IMAGE_NAMES, *(usable if len(usable) == 1 else ())):
        if name in usable:
            return name
    if usable:
        raise ArgumentError(f"column: {source!r} has several columns of images, {_listed(usable)}; name one of them.")
    named = next((name for name in _IMAGE_NAMES if name in everything), None)
    if named is not None:
        raise column_error(named, everything[named], source)
    raise ArgumentError(f"source: expected a column of images in {source!r}, got {_listed(everything)}.")


def choose_label_column(
    class_columns: Sequence[str], everything: Mapping[str, Any], wanted: str | bool, source: str
) -> str | None:
    """The column of labels: the one asked for, else "label", "labels" or "fine_label", else the only one of classes, else None.

    Args:
        class_columns: columns that the source itself calls classes.
        everything: all columns.
        wanted: the name that was asked for; True: any; False: none.
        source: for messages.

    Raises:
        ArgumentError: if the one asked for is not there, or there are several of classes and no usual name.
    """
    if wanted is False:
        return None
    if isinstance(wanted, str):
        if wanted not in everything:
            raise ArgumentError(f"label_column: {source!r} has no column {wanted!r}; there are {_listed(everything)}.")
        return wanted
    for name in _LABEL_NAMES:
        if name in everything:
            return name
    if len(class_columns) > 1:
        raise ArgumentError(
            f"label_column: {source!r} has several columns of classes, {_listed(class_columns)}; name one of them, or pass "
            "False to read none."
        )
    return class_columns[0] if class_columns else None


def column_error(name: str, kind: Any, source: str) -> ArgumentError:
    """What is said of a column that holds no images."""
    return ArgumentError(
        f"column: expected images in the column {name!r} of {source!r} (encoded files, or numbers of shape (height, width), "
        f"(height, width, channels) or (channels, height, width)), got {kind}. Name another column, or store the images so."
    )


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names) or "none"
