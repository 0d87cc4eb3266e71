"""Files of torch.save read without torch: the same values as torch.load gives, and nothing that a hostile file asks for."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from energy_prior import CheckpointError
from energy_prior.adapters import load_checkpoint
from energy_prior.adapters.unpickler import Unpickler

TORCH: Any = torch  # with its private modules, whose functions pickles name


def with_attribute(value: Tensor) -> Tensor:
    value.note = "mine"  # type: ignore[attr-defined]
    return value


BASE = torch.arange(24.0).reshape(4, 6)
SHARED = nn.Linear(2, 2)
NEWER = "dtypes without a storage class"
VALUES: dict[str, Callable[[], Any]] = {
    "a state dict": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict(),
    "every dtype": lambda: [
        torch.ones(3).to(d)
        for d in (
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
            torch.bool,
            torch.complex64,
            torch.complex128,
        )
    ],
    NEWER: lambda: [torch.ones(3).to(d) for d in (torch.uint16, torch.float8_e4m3fn)],
    "views of one storage": lambda: {"all": BASE, "columns": BASE[:, 1:3], "transposed": BASE.T, "row": BASE[2]},
    "repeated values": lambda: torch.ones(3, 1).expand(3, 5),
    "empty and scalar": lambda: [torch.zeros(0, 3), torch.tensor(2.5), torch.zeros(1, 0)],
    "parameters": lambda: [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)],
    "an attribute": lambda: [with_attribute(torch.ones(2)), with_attribute(nn.Parameter(torch.ones(2)))],
    "requires_grad": lambda: torch.ones(2, requires_grad=True),
    "numbers": lambda: [1, -1, 255, 256, 65_536, 2**31, -(2**40), 2**70, 0.5, float("inf"), True, False, None, 1 + 2j],
    "text": lambda: ["", "a", "é\U0001f600", "x" * 300, b"", b"\0\xff", bytearray(b"ab")],
    "containers": lambda: {"l": [[], [1, [2]]], "t": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), "d": {}, "s": {1, "a"}},
    "keys": lambda: {1: 2, None: 3, 0.5: 4, (1, "a"): 5, False: 6, b"x": 7},
    "ordered": lambda: collections.OrderedDict(a=1, b=collections.OrderedDict()),
    "counted": lambda: collections.Counter("aab"),
    "a namespace": lambda: argparse.Namespace(a=1, b=[torch.ones(2)], c=argparse.Namespace()),
    "of torch": lambda: [torch.Size([3, 4]), torch.float32, torch.device("cpu"), torch.device("cuda", 1)],
    "shared objects": lambda: [SHARED.state_dict()] * 3,
    "thousands": lambda: {f"{i}": [i, (i,), torch.tensor(float(i))] for i in range(2000)},
    "an optimizer": lambda: torch.optim.Adam(SHARED.parameters()).state_dict(),
}


def same(a: Any, b: Any) -> bool:
    """Equal in values, types, dtypes, strides and flags."""
    if isinstance(a, Tensor):
        described = [(type(t), t.dtype, t.shape, t.stride(), t.requires_grad, t.is_leaf) for t in (a, b)]
        return described[0] == described[1] and torch.equal(a.to(torch.complex128), b.to(torch.complex128))
    if isinstance(a, argparse.Namespace):
        return type(a) is type(b) and same(vars(a), vars(b))
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize(("name", "of_today"), [(n, t) for n in VALUES for t in (True, False) if n != NEWER or t])
def test_the_same_as_torch_load(name: str, of_today: bool, tmp_path: Path) -> None:
    value = VALUES[name]()
    torch.save(value, tmp_path / "file.pt", _use_new_zipfile_serialization=of_today)
    read = load_checkpoint(tmp_path / "file.pt")
    assert same(read, torch.load(tmp_path / "file.pt", weights_only=False))
    assert same(read, value) or name in ("an attribute",)


@pytest.mark.parametrize("of_today", [True, False])
def test_what_shares_memory_shares_it_again(of_today: bool, tmp_path: Path) -> None:
    torch.save(VALUES["views of one storage"](), tmp_path / "file.pt", _use_new_zipfile_serialization=of_today)
    read = load_checkpoint(tmp_path / "file.pt")
    read["all"].zero_()
    assert not any(bool(value.any()) for value in read.values())


def test_versions_of_a_state_dict_stay(tmp_path: Path) -> None:
    torch.save({"state_dict": nn.BatchNorm1d(2).state_dict()}, tmp_path / "file.pt")
    assert load_checkpoint(tmp_path / "file.pt")["state_dict"]._metadata == {"": {"version": 2}}


def test_large_tensors(tmp_path: Path) -> None:
    """Of more than the parts in which values are read."""
    values = {"a": torch.randn(700_000), "b": torch.randn(3)}
    for of_today in (True, False):
        torch.save(values, tmp_path / "file.pt", _use_new_zipfile_serialization=of_today)
        assert same(load_checkpoint(tmp_path / "file.pt"), values)


def test_files_without_checksums(tmp_path: Path) -> None:
    set_option: Any = getattr(torch.serialization, "set_crc32_options", None)
    if set_option is None:
        pytest.skip("this torch always writes them")
    set_option(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "file.pt")
    finally:
        set_option(True)
    assert torch.equal(load_checkpoint(tmp_path / "file.pt")["a"], torch.ones(3))


def test_numbers_of_another_byte_order(tmp_path: Path) -> None:
    value = torch.arange(5.0)
    torch.save(value, tmp_path / "file.pt")
    records = records_of(tmp_path / "file.pt")
    records = {n: b"big" if n.endswith("byteorder") else r for n, r in records.items()}
    records = {n: value.numpy().astype(">f4").tobytes() if n.endswith("data/0") else r for n, r in records.items()}
    (tmp_path / "file.pt").write_bytes(archive(records))
    assert torch.equal(load_checkpoint(tmp_path / "file.pt"), value)


# ------------------------------------------------------------------------------------------------------------- hostile files


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made = (function, arguments)

    def __reduce__(self) -> Any:
        return self.made


class Values:
    """Pickled as a reference to the values of a tensor."""

    def __init__(self, count: Any = 4, kind: Any = torch.FloatStorage, key: Any = "0", what: str = "storage") -> None:
        self.id = (what, kind, key, "cpu", count)


class Pickler(pickle.Pickler):
    part: tuple[Any, ...] = ()

    def persistent_id(self, obj: Any) -> Any:
        return obj.id + (() if len(obj.id) > 5 else self.part) if isinstance(obj, Values) else None


def pickled(value: Any, before: bool = False) -> bytes:
    """In the format before, a reference says which part of the values it means: None for all."""
    file = io.BytesIO()
    pickler = Pickler(file, 2)
    pickler.part = (None,) if before else ()
    pickler.dump(value)
    return file.getvalue()


def records_of(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def archive(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as opened:
        for name, content in records.items():
            opened.writestr(name, content)
    return file.getvalue()


def of_today(content: bytes, values: bytes = bytes(16)) -> bytes:
    return archive({"a/data.pkl": content, "a/data/0": values})


def of_before(content: Any, values: bytes = bytes(16), keys: Any = ("0",)) -> bytes:
    content = content if isinstance(content, bytes) else pickled(content, before=True)
    first = [pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    keys = pickle.dumps(list(keys), 2) if isinstance(keys, tuple) else keys
    return b"".join(first) + content + keys + struct.pack("<q", len(values) // 4) + values


def tensor(values: Any = None, offset: Any = 0, shape: Any = (4,), strides: Any = (1,), **_: Any) -> Call:
    values = Values() if values is None else values
    return Call(TORCH._utils._rebuild_tensor_v2, values, offset, shape, strides, False, collections.OrderedDict())


HUGE = 10**12
BAD_TENSORS: dict[str, Any] = {
    "more values than there are": tensor(Values(count=HUGE)),
    "a huge shape": tensor(shape=(HUGE,)),
    "an offset beyond the values": tensor(offset=2),
    "a stride beyond the values": tensor(strides=(2,)),
    "a shape of no size, beyond": tensor(shape=(0,), offset=5),
    "a negative size": tensor(shape=(-1,)),
    "a negative stride": tensor(strides=(-1,)),
    "a negative offset": tensor(offset=-1),
    "strides of another length": tensor(shape=(2, 2)),
    "a shape that is none": tensor(shape=4),
    "a size that is none": tensor(shape=(4.0,)),
    "no values": tensor(3),
    "other values": tensor(Values(key="1")),
    "values of another size": tensor(Values(kind=torch.DoubleStorage)),
    "a negative count": tensor(Values(count=-4)),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_a_tensor_that_does_not_fit_its_values(name: str, tmp_path: Path) -> None:
    """torch.load makes some of them, of memory that nobody has written to."""
    file = tmp_path / "file.pt"
    for content in (of_today(pickled({"w": tensor()})), of_before({"w": tensor()})):
        file.write_bytes(content)
        assert torch.equal(load_checkpoint(file)["w"], torch.zeros(4)), "one that fits"
    for content in (of_today(pickled({"w": BAD_TENSORS[name]})), of_before({"w": BAD_TENSORS[name]})):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="file.pt' is not a whole checkpoint of torch.save"):
            load_checkpoint(file)


class Doubled:
    """Pickled as calls that each double what they get."""

    def __init__(self, times: int) -> None:
        self.times = times

    def __reduce__(self) -> Any:
        import _codecs

        return _codecs.encode, (Doubled(self.times - 1) if self.times else "xx", "hex" if self.times else "latin1")


def makes(folder: Path) -> dict[str, Any]:
    """Values that ask for something that is no tensor and no plain value."""
    where = str(folder / "made")
    return {
        "os.mkdir": Call(os.mkdir, where),
        "eval": Call(eval, f"__import__('os').mkdir({where!r})"),
        "a class of its own": nn.Linear(1, 1),
        "memory": Call(bytearray, 10**10),
        "a tensor without values": Call(torch.Tensor, 100_000, 100_000),
        "text that doubles": Doubled(40),
        "text in another encoding": Call(Doubled(0).__reduce__()[0], "x", "utf-16"),
        "a type without a call": {"x": torch.Tensor},
        "a function in a tuple": {"x": (argparse.Namespace,)},
        "values without a tensor": {"x": (Values(),)},
        "a whole model": Values(what="module"),
        "a tensor of another type": Call(TORCH._tensor._rebuild_from_type_v2, os.mkdir, torch.Tensor, (where,), {}),
        "a reference of another kind": Values(kind=torch.QInt8Storage),
        "a namespace of arguments": Call(argparse.Namespace, 3),
        "a state where there is none": Call(set, [1]),
    }


@pytest.mark.parametrize("name", makes(Path()))
def test_nothing_else_is_called_or_made(name: str, tmp_path: Path) -> None:
    contents = [pickled(makes(tmp_path)[name], before) for before in (False, True)]
    if name == "a state where there is none":
        contents = [content[:-1] + pickle.EMPTY_DICT + pickle.BUILD + pickle.STOP for content in contents]
    for made in (of_today(contents[0]), of_before(contents[1])):
        (tmp_path / "file.pt").write_bytes(made)
        with pytest.raises(CheckpointError, match="file.pt' (asks for .*more than tensors and plain values|is not a whole)"):
            load_checkpoint(tmp_path / "file.pt")
    assert not (tmp_path / "made").exists()


def deep_tuples(count: int) -> bytes:
    return b")" + b"\x85" * count


MANY = 400_000
BOMBS = {
    "empty dicts": b"\x80\x02" + b"}" * MANY + b".",
    "marks": b"\x80\x02" + b"(" * MANY + b".",
    "copies": b"\x80\x02(]q\0(" + b"K\1" * 1000 + b"e" + b"c__builtin__\nset\nh\0\x85R" * 1000 + b"t.",
    "text again": b"\x80\x02(X\xff\xff\0\0"
    + b"x" * 65535
    + b"q\0c_codecs\nencode\nq\1"
    + b"h\1h\0X\6\0\0\0latin1\x86R" * 2000
    + b"t.",
    "a key whose hash is deep": b"\x80\x02}" + deep_tuples(100_000) + b"K\1s.",
    "an element whose hash is deep": b"\x80\x02c__builtin__\nset\n](" + deep_tuples(100_000) + b"e\x85R.",
    "text that is longer than the file": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "a name without an end": b"\x80\x02c" + b"x" * 1000,
    "nothing on the stack": b"\x80\x02.",
    "nothing kept": b"\x80\x02h\0.",
    "an item for no list": b"\x80\x02}K\1a.",
    "items for no dict": b"\x80\x02]K\1K\1s.",
    "a key without a value": b"\x80\x02}(K\1u.",
    "another operation": b"\x80\x04\x8c\1a.",
}


class Counted(io.BytesIO):
    """A file that says what was asked of it: memory is taken for that before it is known how much there is."""

    most = 0

    def read(self, size: int | None = -1) -> bytes:
        self.most = max(self.most, size or 0)
        return super().read(size)


@pytest.mark.parametrize("end", [b")R.", b"Q.", b"}\x80", b"K\1s."])
def test_what_a_message_shows_is_short_before_it_is_written(end: bytes, tmp_path: Path) -> None:
    """Of a tuple that holds the one before twice, and so on, the text would have 2^60 parts."""
    tuples = b")q\0" + b"".join(bytes([104, i, 104, i, 0x86, 113, i + 1]) for i in range(60))
    (tmp_path / "file.pt").write_bytes(of_today(b"\x80\x02}" + tuples + end))
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path / "file.pt")
    assert len(str(error.value)) < 1000


def test_no_more_is_asked_for_than_there_is() -> None:
    file = Counted(b"\x80\x02X\xff\xff\xff\x7fabc.")
    with pytest.raises(ValueError, match="it ends too early"):
        Unpickler(file, 11, lambda *_: pytest.fail("no values")).load()
    assert file.most < 100


@pytest.mark.parametrize("name", BOMBS)
def test_pickles_that_ask_for_much_or_make_no_sense(name: str, tmp_path: Path) -> None:
    for made in (of_today(BOMBS[name]), of_before(BOMBS[name])):
        (tmp_path / "file.pt").write_bytes(made)
        with pytest.raises(CheckpointError, match="is not a whole checkpoint of torch.save"):
            load_checkpoint(tmp_path / "file.pt")


def in_header(content: bytes, name: bytes, at: int, value: bytes) -> bytes:
    """The archive with another value in a record's entry of the directory."""
    entry = content.rindex(b"PK\1\2", 0, content.rindex(name))
    return content[: entry + at] + value + content[entry + at + len(value) :]


FINE = of_today(pickled({"w": tensor()}))
ARCHIVES: dict[str, tuple[bytes, str]] = {
    "compressed": (archive({"a/data.pkl": bytes(10**7)}, zipfile.ZIP_DEFLATED), "its records are compressed"),
    "overlap": (in_header(FINE, b"data/0", 20, b"\xff\xff\0\0" * 2), "its records overlap"),
    "no pickle": (archive({"a/x": b"x"}), "it is an archive, but not one of torch.save"),
    "two pickles": (archive({"a/data.pkl": b"\x80\2}.", "b/data.pkl": b"\x80\2}."}), "it is an archive, but not one of"),
    "a script": (archive({"a/data.pkl": b"\x80\2}.", "a/constants.pkl": b"\x80\2)."}), "it is an archive, but not one of"),
    "byte order": (archive({"a/data.pkl": b"\x80\2}.", "a/byteorder": b"middle"}), "its numbers have the byte order 'middle'"),
    "a flipped bit of a value": (FINE.replace(bytes(16), bytes(15) + b"\1", 1), "Bad CRC-32"),
    "no values": (archive({"a/data.pkl": pickled(tensor())}), "it lacks the values '0' of a tensor"),
    "values of another size": (of_today(pickled(tensor()), bytes(15)), "a/data/0 has 15 bytes instead of 16"),
    "truncated": (FINE[:-30], "is not a whole checkpoint"),
    "empty": (b"", "it is empty"),
    "another magic number": (of_before({}).replace(b"\x6c\xfc\x9c", b"\x6d\xfc\x9c", 1), "does not begin as files of"),
    "values that end too early": (of_before(tensor())[:-1], "it ends too early"),
    "another count of values": (of_before(tensor(), bytes(12)), "another number of values"),
    "other names of values": (of_before(tensor(), keys=("1",)), "the list of its tensors' values is wrong"),
    "names that are none": (of_before(tensor(), keys=b"\x80\2](" + deep_tuples(100_000) + b"e."), "the list of its"),
    "more values than the file": (of_before(tensor(Values(count=10**6))), "it is shorter than its tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    content, words = ARCHIVES[name]
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"is not a whole checkpoint of torch.save .*{words}|^.*{words}"):
        load_checkpoint(tmp_path / "file.pt")


def test_a_part_of_values_stays_inside_of_them(tmp_path: Path) -> None:
    """The format before can say that a tensor's values are a part of others."""

    class Part(Values):
        def __init__(self, first: int, count: int) -> None:
            self.id = ("storage", torch.FloatStorage, "0", "cpu", 4, ("1", first, count))  # type: ignore[assignment]

    class Whole(Values):
        def __init__(self) -> None:
            self.id = ("storage", torch.FloatStorage, "0", "cpu", 4, None)  # type: ignore[assignment]

    values = struct.pack("<4f", 1, 2, 3, 4)
    file = tmp_path / "file.pt"
    file.write_bytes(of_before([tensor(Whole()), tensor(Part(1, 2), shape=(2,))], values))
    assert [t.tolist() for t in load_checkpoint(file)] == [[1, 2, 3, 4], [2, 3]]
    for bad in (tensor(Part(3, 2), shape=(2,)), tensor(Part(1, 2), shape=(3,)), tensor(Part(-1, 2), shape=(1,))):
        file.write_bytes(of_before([tensor(Whole()), bad], values))
        with pytest.raises(CheckpointError, match="is not a whole checkpoint of torch.save"):
            load_checkpoint(file)
