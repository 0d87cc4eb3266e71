"""Small images, and parquet files of them."""

from __future__ import annotations

__all__ = ["encoded", "picture", "table", "write_parquet"]

import io
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(value: int, size: tuple[int, int] = (6, 4), mode: str = "L") -> Image.Image:
    """An image of one colour."""
    return Image.new(mode, size, value if mode == "L" else (value, 0, 255))


def write_parquet(folder: Path, images: list[Image.Image], split: str = "train", **columns: Any) -> Path:
    """A split as one parquet file, with labels 0, 1, … unless `columns` has others."""
    folder.mkdir(exist_ok=True)

    rows = {"image": [{"bytes": encoded(i), "path": None} for i in images], "label": list(range(len(images)))} | columns
    datasets.Dataset.from_dict(rows).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


def table(folder: Path, **columns: Any) -> Path:
    """A split "train" as one parquet file of these columns."""
    folder.mkdir(exist_ok=True, parents=True)
    pq.write_table(pa.table(columns), folder / "train.parquet")
    return folder


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """The bytes of an image's file."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()
