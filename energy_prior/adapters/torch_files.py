"""Files of torch.save, in torch's format of today (a zip archive) and the one before, read by a small unpickler of our own.

It makes only the calls that tensors and plain values are pickled as. torch.load with `weights_only=True` runs no code either,
but lets a file of a few bytes ask for any amount of memory, and looks at no checksum.
"""

from __future__ import annotations

__all__ = ["read_torch_file"]

import dataclasses
import io
import struct
import sys
import zipfile
from typing import IO, Any

import torch
from torch import Tensor

from energy_prior._util import shown
from energy_prior.adapters.torch_calls import Stored, bytes_each, kind_of, text_of, whole
from energy_prior.adapters.unpickler import Unpickler, exactly

_MAGIC = 0x1950A86A20F9469CFC6C  # of the format before
_CHUNK = 2**20


def read_torch_file(file: IO[bytes], size: int) -> Any:
    """What torch.save wrote, on the CPU: tensors, numbers, text, bytes, lists, dicts, sets, `argparse.Namespace`.

    Memory: the tensors, which take no more than the file, a constant, and some dozens of times the part that is a pickle. A
    tensor may say that its values are repeated: it then has any shape, and takes no memory for that.

    Args:
        file: opened, at its start.
        size: of the file, bytes.

    Raises:
        UnsafeError: if it asks for anything else.
        Exception: any other, if it is damaged or of another kind; its text says how.
    """
    start = file.read(4)
    file.seek(0)
    return _of_archive(file, size) if start == b"PK\3\4" else _of_stream(file, size)


def _of_archive(file: IO[bytes], size: int) -> Any:
    """Of the format of today: a pickle, and a record for the values of each tensor. All have checksums."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        by_name: dict[str, Any] = {record.filename: record for record in records}
        if any(r.compress_type != zipfile.ZIP_STORED or r.file_size != r.compress_size for r in records):
            raise ValueError("its records are compressed, which torch.save does not do")
        if len(by_name) < len(records) or sum(record.file_size for record in records) > size:
            raise ValueError("its records overlap")
        if all(record.CRC == 0 for record in records):  # torch.serialization.set_crc32_options(False)
            for record in by_name.values():
                record.CRC = None
        folders = [name.removesuffix("data.pkl") for name in by_name if name.rpartition("/")[2] == "data.pkl"]
        if len(folders) != 1 or folders[0].count("/") > 1 or f"{folders[0]}constants.pkl" in by_name:
            raise ValueError("it is an archive, but not one of torch.save")
        folder = folders[0]
        order = archive.read(f"{folder}byteorder").decode() if f"{folder}byteorder" in by_name else sys.byteorder
        if order not in ("little", "big"):
            raise ValueError(f"its numbers have the byte order {shown(order)}")
        stored: dict[str, Tensor] = {}

        def load(kind: Any, key: Any, place: Any, count: Any) -> Stored:
            dtype, length = kind_of(kind), whole(count) * bytes_each(kind)
            record = by_name.get(f"{folder}data/{text_of(key)}")
            if record is None:
                raise ValueError(f"it lacks the values {shown(key)} of a tensor")
            if record.file_size != length:
                raise ValueError(f"{record.filename} has {record.file_size} bytes instead of {shown(length)}")
            if key not in stored:
                stored[key] = torch.empty(length, dtype=torch.uint8)
                with archive.open(record) as opened:
                    _fill(stored[key], opened)
                if order != sys.byteorder and dtype is not None:
                    stored[key].untyped_storage().byteswap(dtype)
            return Stored(stored[key], dtype, 0, count)

        content = archive.read(f"{folder}data.pkl")
        return Unpickler(io.BytesIO(content), len(content), load).load()


def _of_stream(file: IO[bytes], size: int) -> Any:
    """Of the format before: pickles of a number, a version, the system and the content, then the values, without checksums."""
    stored: dict[str, Stored] = {}
    left = size

    def load(kind: Any, key: Any, place: Any, count: Any, part: Any) -> Stored:
        nonlocal left
        if text_of(key) not in stored:
            length = whole(count) * bytes_each(kind)
            left -= length
            if left < 0:
                raise ValueError("it is shorter than its tensors")
            stored[key] = Stored(torch.empty(length, dtype=torch.uint8), kind_of(kind), 0, count)
        if part is None:
            return stored[key]
        _, first, count = part
        if whole(first) + whole(count) > stored[key].count:
            raise ValueError("a tensor is outside of the values that it is a part of")
        return dataclasses.replace(stored[key], first=first, count=count)

    def of_next() -> Any:
        return Unpickler(file, size, load).load()

    if of_next() != _MAGIC:
        raise ValueError("it does not begin as files of torch.save do")
    of_next()
    system = of_next()
    if isinstance(system, dict) and system.get("little_endian", True) is not True:
        raise ValueError("its numbers have another byte order")
    content, keys = of_next(), of_next()
    if not isinstance(keys, list) or sorted(keys) != sorted(stored):
        raise ValueError("the list of its tensors' values is wrong")
    for key in keys:
        part = stored[key]
        if struct.unpack("<q", exactly(file, 8))[0] != part.count:
            raise ValueError("it holds another number of values than its tensors have")
        _fill(part.values, file)
    return content


def _fill(values: Tensor, file: IO[bytes]) -> None:
    """Reads the bytes of a tensor."""
    view: Any = values.numpy()
    for first in range(0, len(view), _CHUNK):
        part = exactly(file, min(_CHUNK, len(view) - first))
        memoryview(view)[first : first + len(part)] = part
