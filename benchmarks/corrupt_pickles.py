"""Hostile files of torch.save: pickles that call, shapes that lie, bombs, records exchanged, in both of torch's formats."""

from __future__ import annotations

__all__ = ["PICKLES"]

import _codecs
import argparse
import collections
import functools
import io
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from corruptions import HUGE, Call, Corruption, flipped
from torch import Tensor, nn

_TORCH: Any = torch  # with its private modules, whose functions pickles name


class _Stored:
    """Pickled as a reference to the values of a tensor, as torch.save writes them."""

    def __init__(
        self, key: Any = "0", count: Any = 4, kind: Any = torch.FloatStorage, place: Any = "cpu", what: Any = "storage"
    ) -> None:
        self.id = (what, kind, key, place, count)


class _Pickler(pickle.Pickler):
    part: tuple[Any, ...] = ()

    def persistent_id(self, obj: Any) -> Any:
        return obj.id + self.part if isinstance(obj, _Stored) else None


def _is_archive(data: bytes) -> bool:
    return data[:2] == b"PK"


def _pickled(value: Any, data: bytes, protocol: int = 2) -> bytes:
    """As in the format that `data` has: in the old one a reference also says which part of the values it means (None: all)."""
    file = io.BytesIO()
    pickler = _Pickler(file, protocol)
    pickler.part = () if _is_archive(data) else (None,)
    pickler.dump(value)
    return file.getvalue()


def _archive(records: Mapping[str, bytes], compressed: bool = False) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return file.getvalue()


def _records(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def _file(pickled: bytes, data: bytes) -> bytes:
    """A file around a pickle, in the format that `data` has, with the values of one tensor of four numbers."""
    values = struct.pack("<4f", 1, 2, 3, 4)
    if _is_archive(data):
        return _archive({"a/data.pkl": pickled, "a/byteorder": b"little", "a/data/0": values, "a/version": b"3\n"})
    first = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {"long": 4}})
    parts = [pickle.dumps(value, 2) for value in first] + [pickled, pickle.dumps(["0"], 2)]
    return b"".join(parts) + struct.pack("<q", 4) + values


def _tensor(stored: Any = None, offset: Any = 0, shape: Any = (4,), strides: Any = (1,), function: Any = None) -> Call:
    function = function or _TORCH._utils._rebuild_tensor_v2
    return Call(function, _Stored() if stored is None else stored, offset, shape, strides, False, collections.OrderedDict())


def _code(chance: random.Random, data: bytes, bait: Path) -> bytes:
    """Pickles that call a function, by every road that there is."""
    where = str(bait)
    make = Call(os.mkdir, where)
    calls = (
        *(make, make, Call(eval, f"__import__('os').mkdir({where!r})"), Call(exec, f"import os; os.mkdir({where!r})")),
        *(Call(__import__, "antigravity"), Call(Path.mkdir, bait), Call(Path, where), os.mkdir, argparse.Namespace),
        *(Call(argparse.Namespace, state={"a": make}), Call(collections.OrderedDict, state={"x": 3}), nn.Sequential()),
        *(Call(argparse.FileType("w"), where), Call(collections.Counter, [make]), Call(nn.Linear, 2, 2)),
        *(Call(torch.load, where), Call(torch.save, 3, where), Call(torch.hub.load, "a", "b"), Call(torch.jit.load, where)),
        *(Call(_TORCH._utils._rebuild_tensor_v2, make), Call(pickle.loads, pickle.dumps(make))),
        *(Call(torch.serialization.add_safe_globals, [os.mkdir]), Call(_TORCH.storage._load_from_bytes, b"x")),
        Call(_TORCH.UntypedStorage.from_file, where, True, 16),
        Call(_TORCH._tensor._rebuild_from_type_v2, os.mkdir, torch.Tensor, (where,), {}),
    )
    call = chance.choice(calls)
    value = chance.choice((call, [call], {"state_dict": {}, "x": call}, {"0.weight": _tensor(), "x": [call]}))
    pickled = _pickled(value, data, chance.choice((0, 1, 2, 2, 2, 3, 4, 5)))
    return pickled if chance.random() < 0.3 else _file(pickled, data)


def _shape(chance: random.Random, data: bytes, bait: Path) -> bytes:
    """Tensors whose description does not fit their values: huge, outside of them, negative, of another kind or place."""
    huge = chance.choice((100, 10**5, 2**31 - 1, 10**9, 10**10, HUGE, 2**62, 2**63, 2**64, 10**30))
    kinds = (
        *(torch.DoubleStorage, torch.ByteStorage, torch.ComplexFloatStorage, torch.BFloat16Storage, torch.UntypedStorage),
        *(torch.QInt8Storage, torch.BoolStorage, torch.Tensor, torch.float32, 3, None, "FloatStorage"),
    )
    places = ("cuda:0", "cuda:99", "meta", "mps", "xla:0", "hpu", "privateuseone", "", "x", 3, None, "cpu\0")
    stored = (
        *(_Stored(count=huge), _Stored(key=3), _Stored(key="1"), _Stored(key="../0"), _Stored(key=None), _Stored(count=-4)),
        *(_Stored(count=0), _Stored(count=2.0), _Stored(count="4"), _Stored(what="module"), 3, "x"),
        *(_Stored(kind=chance.choice(kinds)), _Stored(place=chance.choice(places))),
    )
    utils = _TORCH._utils
    tensors = (
        *(_tensor(one) for one in stored),
        *(_tensor(_Stored(count=huge), shape=(huge,)), _tensor(shape=(huge,)), _tensor(offset=huge), _tensor(strides=(huge,))),
        *(_tensor(shape=(huge,), strides=(0,)), _tensor(shape=(4, 3), strides=(0, 0)), _tensor(shape=(2, 2), strides=(2, 1))),
        *(
            _tensor(shape=(2, 2), strides=(2,)),
            _tensor(shape=(-1,)),
            _tensor(strides=(-1,)),
            _tensor(offset=-1),
            _tensor(offset=2),
        ),
        *(_tensor(shape=(0,), offset=huge), _tensor(shape=(2**32, 2**32)), _tensor(shape=(1,) * 70, strides=(1,) * 70)),
        *(_tensor(shape=[4]), _tensor(shape=4), _tensor(shape=None), _tensor(shape=(4.0,)), _tensor(shape=("4",))),
        *(_tensor(shape=(True,)), _tensor(function=utils._rebuild_tensor), _Stored(), Call(utils._rebuild_tensor_v2)),
        *(
            Call(utils._rebuild_parameter, _tensor(), True, {}),
            Call(utils._rebuild_parameter, 3, 1, 2),
            Call(torch.Tensor, huge),
        ),
        *(Call(torch.Tensor, 100_000, 1000), Call(torch.FloatTensor, huge), Call(bytearray, huge), Call(bytearray, 10**9)),
        *(Call(torch.Size, [huge]), Call(torch.Size, ["x"]), Call(torch.device, "cuda:99")),
        Call(utils._rebuild_meta_tensor_no_storage, torch.float32, (huge,), (1,), False),
        Call(utils._rebuild_sparse_tensor, torch.sparse_coo, (_tensor(), _tensor(), (huge,))),
        Call(utils._rebuild_wrapper_subclass, torch.Tensor, torch.float32, (huge,), (1,), 0, torch.strided, "cpu", False),
        Call(_TORCH._tensor._rebuild_from_type_v2, utils._rebuild_tensor_v2, torch.Tensor, (), {"grad_fn": 3}),
    )
    value = {"state_dict": {"0.weight": chance.choice(tensors), "0.bias": _tensor(), "x": chance.choice(tensors)}}
    return _file(_pickled(value, data), data)


class _Doubled:
    """Pickled as calls that each double what they get."""

    def __init__(self, times: int) -> None:
        self.times = times

    def __reduce__(self) -> Any:
        return _codecs.encode, (_Doubled(self.times - 1) if self.times else "x" * 1000, "hex" if self.times else "latin1")


def _shared(width: int, depth: int) -> dict[str, Any]:
    """Dicts of dicts with width^depth paths to the few that there are."""
    inside: dict[str, Any] = {"w": _tensor()}
    for _ in range(depth):
        inside = {f"k{i}": inside for i in range(width)}
    return inside


def _bomb(chance: random.Random, data: bytes, bait: Path) -> bytes:
    """Small files that ask for much memory, time or stack."""
    if chance.random() < 0.2:
        return chance.choice(_bombs_of_archives())
    many, few, very_many = chance.choice((1000, 30_000)), chance.choice((100, 3000)), chance.choice((30_000, 900_000))
    long_name = "a." * chance.choice((100, 20_000))
    values: tuple[Callable[[], Any], ...] = (
        lambda: {"state_dict": _shared(100, 3)},
        lambda: _shared(1000, 4),
        lambda: {long_name + f"{i}": _tensor() for i in range(3)},
        lambda: {f"a{i}.b{i}.w": _tensor() for i in range(few)},
        lambda: {f"a.b.c.d.{i}.w": _tensor() for i in range(few)},
        lambda: {f"k{i}": {"w": _tensor()} for i in range(few)},
        lambda: {"x": _Doubled(chance.choice((5, 30)))},
        lambda: {"x": [[] for _ in range(many * 5)]},
        lambda: {f"{i}": {} for i in range(many)},
        lambda: {"x" * 1_000_000: _tensor()},
    )
    tuples = b")" + b"\x85" * very_many
    doubled = b")q\x00" + b"".join(bytes([104, i, 104, i, 0x86, 113, i + 1]) for i in range(60))  # (t, t) of the t before
    pickles: tuple[bytes, ...] = (
        *(b"\x80\x02" + tuples + b".", b"\x80\x02}" + tuples + b"K\x01s."),
        b"\x80\x02}X\x01\x00\x00\x00ac__builtin__\nset\n](" + tuples + b"e\x85Rs.",
        b"\x80\x02(]q\x00(" + b"K\x01" * many + b"e" + b"c__builtin__\nset\nh\x00\x85R" * many + b"t.",
        *(b"\x80\x02" + operation * very_many + b"." for operation in (b"(", b"}", b"]", b")", b"N", b"K\x07")),
        *(b"\x80\x02X\xff\xff\xff\xffabc.", b"\x80\x02T\xff\xff\xff\x7fabc.", b"\x80\x02\x8b\xff\xff\xff\x7f.", b"\x80\x02."),
        *(b"\x80\x02r\xff\xff\xff\xff.", b"\x80\x02}r\xff\xff\xff\xffj\xff\xff\xff\xff.", b"\x80\x02j\x00\x00\x00\x00."),
        *(b"\x80\x02}q\x00" + b"h\x00" * many + b".", b"\x80\x02}q\x00h\x00\x85R.", b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."),
        *(b"\x80\x02" + doubled + b")R.", b"\x80\x02}" + doubled + b"K\x01s.", b"\x80\x02" + doubled + b"Q."),
        *(b"\x80\x02]q\x00h\x00a.", b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.", b"\x80\xff}.", b"}.", b"\x80\x02}}."),
    )
    pickled = _pickled(chance.choice(values)(), data) if chance.random() < 0.5 else chance.choice(pickles)
    return _file(pickled, data)


@functools.cache
def _bombs_of_archives() -> tuple[bytes, ...]:
    """Archives that are far smaller than what is in them."""
    zeros = b"\0" * (2 * 10**8)
    value = {"0.weight": _tensor(_Stored(count=len(zeros) // 4), shape=(len(zeros) // 4,))}
    whole = {"a/data.pkl": _pickled(value, b"PK"), "a/data/0": zeros, "a/version": b"3\n"}
    return _archive({"a/data.pkl": zeros}, compressed=True), _archive(whole, compressed=True)


def _record(chance: random.Random, data: bytes, bait: Path) -> bytes:
    """Parts of the archive changed, with checksums that are right; in the old format, bits of the pickles."""
    if not _is_archive(data):
        return flipped(chance, data, chance.choice((1, 2, 4)), 0, 900)
    records = _records(data)
    pickled = next(name for name in records if name.endswith("data.pkl"))
    name, other, what = chance.choice(list(records)), chance.choice(list(records)), chance.randrange(8)
    if what <= 2:
        records[pickled] = flipped(chance, records[pickled], chance.choice((1, 1, 2, 8)))
    elif what == 3:
        records[name] = chance.choice((b"", records[name][:-1], records[name] + b"\0", records[name] * 2, b"\0" * 16))
    elif what == 4:
        del records[name]
    elif what == 5:
        records[name], records[other] = records[other], records[name]
    elif what == 6:
        orders = (b"big", b"", b"x", b"\xff")
        more = (("byteorder", chance.choice(orders)), ("version", b"99\n"), ("constants.pkl", b"\x80\x02)."), ("../x", b"x"))
        added, content = chance.choice((*more, (".format_version", b"9"), (".storage_alignment", b"-1")))
        records[pickled.removesuffix("data.pkl") + added] = content
    else:
        records[chance.choice(("data.pkl", "x/data.pkl", "x", "a/b/data.pkl"))] = records[pickled]
    return _archive(records, compressed=chance.random() < 0.1)


def _not_finite(chance: random.Random, data: bytes, bait: Path) -> bytes:
    """NaN or infinity for a value, with checksums that are right."""
    bad = struct.pack("<f", chance.choice((float("nan"), float("inf"), -float("inf"))))
    if not _is_archive(data):
        at = len(data) - 4 * chance.randint(1, 8)
        return data[:at] + bad + data[at + 4 :]
    records = _records(data)
    name = chance.choice([name for name, content in records.items() if "/data/" in name and len(content) >= 16])
    at = 4 * chance.randrange(len(records[name]) // 4)
    records[name] = records[name][:at] + bad + records[name][at + 4 :]
    return _archive(records)


def _weights(chance: random.Random, data: bytes, bait: Path) -> bytes:
    """Weights of another shape, dtype, name, layout or class, and places of them, as torch.save writes them."""
    loaded = torch.load(io.BytesIO(data), weights_only=False)
    weights: dict[str, Any] = dict(loaded.get("state_dict", loaded))
    name = chance.choice(list(weights))
    value: Tensor = weights[name].float()
    dtypes = (*(torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn), torch.int64, torch.uint16, torch.complex64)
    others: tuple[Any, ...] = (
        *(value.to(chance.choice(dtypes)), value > 0, value[None], value.flatten(), value.flatten()[:0], torch.zeros(())),
        *(value.flip(0) if value.ndim else value, value.to_sparse(), value.to("meta"), nn.Parameter(value), value.numpy()),
        *(value.clone().requires_grad_(), value[None].expand(100_000, *value.shape), value.tolist(), None, 3, "x"),
    )
    what = chance.randrange(6)
    if what <= 2:
        weights[name] = chance.choice(others)
    elif what == 3:
        weights[chance.choice(("x", "", "module.x", name + ".x", "\0", "_orig_mod." + name))] = value
    elif what == 4:
        del weights[name]
    else:
        prefix = chance.choice(("module.", "", "x."))
        weights = {prefix + key: item for key, item in weights.items()}
    places: tuple[Any, ...] = (
        *({"state_dict": weights}, [weights], {"a": {"b": {"c": {"d": weights}}}}, {"model": weights, "ema": weights}),
        *({3: weights}, {"state_dict": {}}, (weights,), {"optimizer": {"state": weights}}),
    )
    whole = chance.choice(places) if chance.random() < 0.3 else weights
    file = io.BytesIO()
    try:
        torch.save(whole, file, _use_new_zipfile_serialization=_is_archive(data))
    except (AttributeError, KeyError, RuntimeError, TypeError):  # what the old format does not have
        return data
    return file.getvalue()


PICKLES: dict[str, Corruption] = {
    "code": _code,
    "shapes": _shape,
    "bombs": _bomb,
    "records": _record,
    "not finite": _not_finite,
    "other weights": _weights,
}
