"""Parquet files, read as they stand, and sets of the Hugging Face hub."""

from __future__ import annotations

__all__ = ["HubSource", "ParquetSource"]

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from energy_prior._util import first_line
from energy_prior.checks.settings import require_extra
from energy_prior.data.rows import Row, choose_image_column, choose_label_column
from energy_prior.errors import ArgumentError

_BATCH = 256
_LOOKED_AT = 1000


class ParquetSource:
    """Rows of parquet files, one file after the other, a few hundred at a time.

    Args:
        files: in their order, at least one.
        column: of the images; None: it is found.
        label_column: of the labels; True: it is found; False: none is read.
        source: for messages.
        broken: called with a file's name and what is wrong with it, where it cannot be read; raises, or returns to go on.

    Raises:
        ArgumentError: if no file can be read, or a column is missing.
    """

    def __init__(
        self,
        files: Sequence[Path],
        column: str | None,
        label_column: str | bool,
        source: str,
        broken: Callable[[str, str], None],
    ) -> None:
        self._parquet: Any = require_extra("pyarrow.parquet", "examples")
        self._files, self._broken, self._source = files, broken, source
        schema = next((s for s in map(self._schema, files) if s is not None), None)
        if schema is None:
            raise ArgumentError(f"source: none of the {len(files)} parquet files of {source!r} can be read.")
        kinds = {field.name: field.type for field in schema}
        usable = {name: kind for name, kind in kinds.items() if _may_be_images(kind)}
        classes = _class_names(schema)
        self._image = choose_image_column(usable, kinds, column, source)
        self._label = choose_label_column(list(classes), kinds, label_column, source)
        self.left_out, self.has_labels = "", self._label is not None
        self.classes: Sequence[str] | None = None if self._label is None else classes.get(self._label)

    def __iter__(self) -> Iterator[Row]:
        """All rows, in the order of the files."""
        for file in self._files:
            yield from self._rows(file)

    def first_part(self) -> Iterator[Row]:
        """The first file."""
        yield from self._rows(self._files[0])

    def _schema(self, file: Path) -> Any:
        try:
            with file.open("rb") as opened:
                return self._parquet.ParquetFile(opened).schema_arrow
        except Exception as error:  # whatever pyarrow makes of the bytes
            self._broken(file.name, f"it is no whole parquet file ({first_line(error)})")
            return None

    def _rows(self, file: Path) -> Iterator[Row]:
        columns = [name for name in (self._image, self._label) if name is not None]
        number = 0
        with contextlib.ExitStack() as stack:
            try:
                table = self._parquet.ParquetFile(stack.enter_context(file.open("rb")))
                missing = [name for name in columns if name not in table.schema_arrow.names]
                batches = iter(() if missing else table.iter_batches(_BATCH, columns=columns))
            except Exception as error:
                self._broken(file.name, f"it is no whole parquet file ({first_line(error)})")
                return
            if missing:
                raise ArgumentError(f"source: {file.name!r} of {self._source!r} has no column {missing[0]!r}, as others have.")
            while True:
                try:
                    batch = next(batches, None)
                    if batch is None:
                        return
                    images = _values(batch.column(self._image))
                    labels = [None] * len(images) if self._label is None else batch.column(self._label).to_pylist()
                except Exception as error:
                    self._broken(file.name, f"it cannot be read from row {number} on ({first_line(error)})")
                    return
                for image, label in zip(images, labels, strict=True):
                    yield Row(f"{file.name}, row {number}", image, label)
                    number += 1


class HubSource:
    """Rows of a set on the Hugging Face hub, or of what `datasets` keeps of it.

    Args:
        name: of the set.
        split: of it.
        streaming: read over the network as needed, instead of preparing the whole set first.
        column: of the images; None: it is found.
        label_column: of the labels; True: it is found; False: none is read.

    Raises:
        ArgumentError: if the set cannot be loaded, or a column is missing.
    """

    def __init__(self, name: str, split: str, streaming: bool, column: str | None, label_column: str | bool) -> None:
        datasets = require_extra("datasets", "examples")
        self._name = name
        try:
            rows = datasets.load_dataset(name, split=split, streaming=streaming)
        except Exception as error:  # whatever the hub, the network or the set's own loader raises
            raise ArgumentError(
                f"source: {name!r} is no folder here, and loading it from the hub failed: {first_line(error)} Without a "
                "network, pass a folder with the set's parquet files, downloaded elsewhere."
            ) from error
        features = dict(rows.features or {})
        kinds = {key: type(kind).__name__ for key, kind in features.items()}
        usable = {key: kind for key, kind in kinds.items() if kind in ("Image", "Array2D", "Array3D")}
        if not usable:
            usable = {key: kind for key, kind in kinds.items() if key in ("image", "img")}
        self._image = choose_image_column(usable, kinds, column, name)
        self._label = choose_label_column(
            [key for key, kind in kinds.items() if kind == "ClassLabel"], kinds, label_column, name
        )
        self.left_out, self.has_labels = "", self._label is not None
        self.classes: Sequence[str] | None = getattr(features.get(self._label or ""), "names", None)
        if kinds[self._image] == "Image":
            rows = rows.cast_column(self._image, datasets.Image(decode=False))
        self._rows = rows.select_columns([key for key in (self._image, self._label) if key is not None])

    def __iter__(self) -> Iterator[Row]:
        """All rows, in the set's order."""
        number = 0
        try:
            for row in self._rows:
                yield Row(f"row {number}", row[self._image], None if self._label is None else row[self._label])
                number += 1
        except Exception as error:
            raise ArgumentError(
                f"source: {self._name!r} cannot be read from row {number} on: {first_line(error)}. Is the network there?"
            ) from error

    def first_part(self) -> Iterator[Row]:
        """The first thousand."""
        for row, _ in zip(self, range(_LOOKED_AT)):
            yield row


def _may_be_images(kind: Any) -> bool:
    """Whether an Arrow type may be one of images: encoded bytes, a struct with them, or numbers in two dimensions or more."""
    types: Any = require_extra("pyarrow.types", "examples")
    kind = getattr(kind, "storage_type", kind)
    if types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    if types.is_binary(kind) or types.is_large_binary(kind):
        return True
    depth = 0
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    return depth >= 2 and number


def _values(column: Any) -> Sequence[Any]:
    """The images of an Arrow column: bytes, dicts, or numbers, as one array where all of them have one shape."""
    compute: Any = require_extra("pyarrow.compute", "examples")
    inner, shape = getattr(column, "storage", column), [len(column)]
    if hasattr(inner, "flatten") and "list" in str(inner.type).partition("<")[0]:
        while "list" in str(inner.type).partition("<")[0]:
            sizes = compute.min_max(compute.list_value_length(inner)).as_py()
            if inner.null_count or sizes["min"] != sizes["max"]:
                return column.to_pylist()
            shape.append(sizes["min"])
            inner = inner.flatten()
        if not inner.null_count:
            return inner.to_numpy(zero_copy_only=False).reshape(shape)
    return column.to_pylist()


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Columns that `datasets` wrote as classes, and the names of these."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {key: list(f["names"]) for key, f in features.items() if f.get("_type") == "ClassLabel" and f.get("names")}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
