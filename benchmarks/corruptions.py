"""Ways to corrupt a file, for `fuzz_checkpoints.py`: by accident here, and on purpose in `corrupt_….py`, one for each format.

A corruption is a function of a random stream, the bytes of an intact file and a path where code in the file tries to make a
folder (the bait); it gives the bytes of the corrupted file.
"""

from __future__ import annotations

__all__ = ["BLIND", "DEEP", "HUGE", "Call", "Corruption", "deep", "flipped"]

import functools
import gzip
import io
import os
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Corruption = Callable[[random.Random, bytes, Path], bytes]

HUGE = 10**12
DEEP = 100_000


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.made = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.made


@functools.cache
def deep(begin: str, end: str, depth: int = DEEP) -> str:
    """Brackets in brackets."""
    return begin * depth + end * depth


def flipped(chance: random.Random, data: bytes, bits: int, first: int = 0, last: int | None = None) -> bytes:
    """With so many bits flipped, between two bytes."""
    changed = bytearray(data)
    for _ in range(bits):
        changed[chance.randrange(first, min(last or len(data), len(data)))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _at_start(data: bytes) -> int:
    """About where the description of a file ends: in most formats it comes first."""
    return min(len(data), max(16, len(data) // 8))


def _span(chance: random.Random, data: bytes) -> tuple[int, int]:
    first = chance.randrange(len(data))
    return first, min(len(data), first + chance.choice((1, 2, 8, 64, 512)))


def _truncated(chance: random.Random, data: bytes, bait: Path) -> bytes:
    return data[: chance.randrange(len(data))]


def _truncated_a_little(chance: random.Random, data: bytes, bait: Path) -> bytes:
    return data[: -chance.randint(1, min(16, len(data)))]


def _longer(chance: random.Random, data: bytes, bait: Path) -> bytes:
    return data + chance.choice((b"\0", b"\n", b" ")) * chance.randint(1, 64) + chance.randbytes(chance.randrange(8))


def _twice(chance: random.Random, data: bytes, bait: Path) -> bytes:
    return data + data


def _zeroed(chance: random.Random, data: bytes, bait: Path) -> bytes:
    first, last = _span(chance, data)
    return data[:first] + b"\0" * (last - first) + data[last:]


def _noise(chance: random.Random, data: bytes, bait: Path) -> bytes:
    first, last = _span(chance, data)
    return data[:first] + chance.randbytes(last - first) + data[last:]


def _removed(chance: random.Random, data: bytes, bait: Path) -> bytes:
    first, last = _span(chance, data)
    return data[:first] + data[last:]


def _doubled(chance: random.Random, data: bytes, bait: Path) -> bytes:
    first, last = _span(chance, data)
    return data[:last] + data[first:]


def _exchanged(chance: random.Random, data: bytes, bait: Path) -> bytes:
    """Two blocks of a disk in each other's place."""
    size = min(chance.choice((16, 64, 512)), len(data) // 2)
    a, b = sorted(chance.sample(range(0, len(data) - size + 1, size), 2))
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


def _reversed(chance: random.Random, data: bytes, bait: Path) -> bytes:
    return data[::-1]


def _another_kind(chance: random.Random, data: bytes, bait: Path) -> bytes:
    """What lies in the same folders: an empty file, text, pictures, archives, pickles."""
    call = Call(os.mkdir, str(bait))
    packed, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(call, 2))
        archive.writestr("checkpoint", data)
    with tarfile.open(fileobj=tarred, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            member, content = tarfile.TarInfo(name), pickle.dumps(call, 2)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    texts = (b"", b"\0", b"\n", b"\xff\xfe", b"hello", b"{}", b"null", b"[]", b"\x80", b"\x80\x02.")
    beginnings = (b"\x89PNG\r\n\x1a\n", b"PK\x03\x04", b"PAR1", b"\x89HDF\r\n\x1a\n", struct.pack("<Q", 2**63))
    others = (
        packed.getvalue(),
        tarred.getvalue(),
        gzip.compress(data),
        pickle.dumps(call, chance.choice((0, 1, 2, 3, 4, 5))),
        chance.randbytes(chance.randrange(1, 4096)),
        b"\0" * 4096,
        b"\xff" * 4096,
        b"PK\x05\x06" + b"\0" * 18,
        struct.pack("<Q", len(data)) + data,
    )
    return chance.choice((chance.choice(texts), chance.choice(beginnings) + data, *[chance.choice(others)] * 2))


BLIND: dict[str, Corruption] = {
    "one bit": lambda c, d, b: flipped(c, d, 1),
    "one bit near the start": lambda c, d, b: flipped(c, d, 1, 0, _at_start(d)),
    "one bit near the end": lambda c, d, b: flipped(c, d, 1, max(0, len(d) - 600)),
    "eight bits": lambda c, d, b: flipped(c, d, 8),
    "truncated": _truncated,
    "truncated by a few bytes": _truncated_a_little,
    "longer": _longer,
    "twice": _twice,
    "zeros": _zeroed,
    "noise": _noise,
    "a part removed": _removed,
    "a part doubled": _doubled,
    "blocks exchanged": _exchanged,
    "reversed": _reversed,
    "another kind of file": _another_kind,
}
"""What needs no knowledge of the format."""
