"""Parquet files, read as they stand, and sets of the Hugging Face hub."""

from __future__ import annotations

__all__ = ["HubSource", "ParquetSource"]

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from energy_prior._util import first_line
from energy_prior.checks.settings import require_extra
from energy_prior.data.rows import Broken, Row, choose_image_column, choose_label_column
from energy_prior.errors import ArgumentError

_BATCH = 256
_LOOKED_AT = 1000


class ParquetSource:
    """Rows of parquet files, one file after the other, a few hundred at a time; what cannot be read of one is a row `Broken`.

    Args:
        files: in their order, at least one.
        column: of the images; None: it is found.
        label_column: of the labels; True: it is found; False: none is read.
        source: for messages.

    Raises:
        ArgumentError: if no file can be read, a column is missing, or two files name their classes differently.
    """

    left_out: str = ""

    def __init__(self, files: Sequence[Path], column: str | None, label_column: str | bool, source: str) -> None:
        self._files = files
        schemas = {file.name: _schema(file) for file in files}
        whole = {name: schema for name, schema in schemas.items() if not isinstance(schema, Broken)}
        if not whole:
            why = next(schema.why for schema in schemas.values() if isinstance(schema, Broken))
            raise ArgumentError(f"source: none of the {len(files)} parquet files of {source!r} can be read: {why}.")
        kinds = {field.name: field.type for field in next(iter(whole.values()))}
        usable = {name: kind for name, kind in kinds.items() if _may_be_images(kind)}
        named = {name: _class_names(schema) for name, schema in whole.items()}
        self._image = choose_image_column(usable, kinds, column, source)
        self._label = choose_label_column(list(next(iter(named.values()))), kinds, label_column, source)
        self.has_labels: bool = self._label is not None
        columns = [name for name in (self._image, self._label) if name is not None]
        for name, schema in whole.items():
            missing = next((c for c in columns if c not in schema.names), None)
            extra = None
            if label_column is True and not self.has_labels:
                extra = choose_label_column([], dict.fromkeys(schema.names), True, source)
            if missing or extra:
                raise ArgumentError(
                    f"source: {name!r} of {source!r} has {'no ' if missing else 'a '}column {missing or extra!r}, other than "
                    f"{next(iter(whole))!r}. Name columns that all files have (column=, label_column=)."
                )
        classes = {name: tuple(found.get(self._label or "", ())) for name, found in named.items()}
        first = next(iter(classes))
        other = next((name for name in classes if classes[name] != classes[first]), None)
        if other is not None:
            raise ArgumentError(
                f"source: {first!r} and {other!r} of {source!r} name their classes differently, {classes[first]} and "
                f"{classes[other]}: the same number means two things. Load them one by one, or pass label_column=False."
            )
        self.classes: Sequence[str] | None = classes[first] or None

    def __iter__(self) -> Iterator[Row]:
        """All rows, in the order of the files."""
        for file in self._files:
            yield from self._rows(file)

    def first_part(self) -> Iterator[Row]:
        """The first file that has rows."""
        for file in self._files:
            some = False
            for row in self._rows(file):
                some = some or not isinstance(row.image, Broken)
                yield row
            if some:
                return

    def _rows(self, file: Path) -> Iterator[Row]:
        columns = [name for name in (self._image, self._label) if name is not None]
        number = 0
        with contextlib.ExitStack() as stack:
            try:
                table = _open(file, stack)
                batches = table.iter_batches(_BATCH, columns=columns)
                while (batch := next(batches, None)) is not None:
                    images = _values(batch.column(self._image))
                    labels = self._labels(batch, file.name)
                    for image, label in zip(images, labels, strict=True):
                        yield Row(f"{file.name}, row {number}", image, label)
                        number += 1
            except ArgumentError:
                raise
            except Exception as error:  # whatever pyarrow makes of the bytes
                where = f"it cannot be read from row {number} on" if number else "it is no whole parquet file"
                yield Row(file.name, Broken(f"{where} ({first_line(error)})"))

    def _labels(self, batch: Any, file: str) -> list[Any]:
        if self._label is None:
            return [None] * batch.num_rows
        try:
            return batch.column(self._label).to_pylist()
        except Exception as error:  # a type that Python has no value for
            raise ArgumentError(
                f"label_column: the column {self._label!r} of {file!r} cannot be read ({first_line(error)}). Name another "
                "one, or pass False to read none."
            ) from error


def _open(file: Path, stack: contextlib.ExitStack) -> Any:
    if not file.is_file():
        raise OSError("there is no such file" if not file.exists() else "it is no regular file")
    parquet: Any = require_extra("pyarrow.parquet", "examples")
    return parquet.ParquetFile(stack.enter_context(file.open("rb")), pre_buffer=False)


def _schema(file: Path) -> Any:
    """The Arrow schema of a file, or why it has none."""
    with contextlib.ExitStack() as stack:
        try:
            return _open(file, stack).schema_arrow
        except Exception as error:
            return Broken(first_line(error))


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

    left_out: str = ""

    def __init__(self, name: str, split: str, streaming: bool, column: str | None, label_column: str | bool) -> None:
        datasets = require_extra("datasets", "examples")
        packaged = require_extra("datasets.packaged_modules", "examples")
        if name in getattr(packaged, "_PACKAGED_DATASETS_MODULES", ()):
            raise ArgumentError(f"source: {name!r} is a kind of files, no set on the hub; pass the folder that has them.")
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
        self.has_labels: bool = self._label is not None
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
        return itertools.islice(self, _LOOKED_AT)


def _may_be_images(kind: Any) -> bool:
    """Whether an Arrow type may be one of images: encoded bytes, a struct with them, or numbers in two dimensions or more."""
    types: Any = require_extra("pyarrow.types", "examples")
    kind = getattr(kind, "storage_type", kind)
    if types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    if types.is_binary(kind) or types.is_large_binary(kind):
        return True
    depth = 0
    while _is_list(kind):
        kind, depth = kind.value_type, depth + 1
    number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    return depth >= 2 and number


def _values(column: Any) -> Sequence[Any]:
    """The images of an Arrow column: bytes, dicts, or numbers, as one array where all of them have one shape."""
    compute: Any = require_extra("pyarrow.compute", "examples")
    inner, shape = getattr(column, "storage", column), [len(column)]
    while _is_list(inner.type):
        sizes = compute.min_max(compute.list_value_length(inner)).as_py()
        if inner.null_count or sizes["min"] != sizes["max"]:
            return column.to_pylist()
        shape.append(sizes["min"])
        inner = inner.flatten()
    if len(shape) == 1 or inner.null_count:
        return column.to_pylist()
    return [image.copy() for image in inner.to_numpy(zero_copy_only=False).reshape(shape)]  # a kept one keeps no other


def _is_list(kind: Any) -> bool:
    types: Any = require_extra("pyarrow.types", "examples")
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Columns that `datasets` wrote as classes, and the names of these."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        named = {key: f["names"] for key, f in features.items() if f.get("_type") == "ClassLabel"}
        return {k: v for k, v in named.items() if isinstance(v, list) and v and all(isinstance(n, str) for n in v)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
