"""Hostile safetensors files: headers, shapes and values, as they are and with a digest that is right ("signed")."""

from __future__ import annotations

__all__ = ["SAFETENSORS", "SAFETENSORS_UNSIGNED"]

import json
import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from corruptions import DEEP, HUGE, Corruption, deep
from safetensors.torch import load, save
from torch import Tensor

from energy_prior.checkpoint import digest

_DTYPES: tuple[Any, ...] = (
    *("BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I16"),
    *("U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64", "F128", "", "float", 3, None),
)
_DTYPES_OF_TORCH = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.uint16, torch.bool, torch.complex64, torch.float8_e4m3fn),
)


def _take_apart(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _put_together(header: Any, body: bytes) -> bytes:
    encoded = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded + body


def _metadata(data: bytes) -> dict[str, str]:
    return dict(_take_apart(data)[0]["__metadata__"])


def _signed(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    return save(dict(tensors), metadata | {"digest": digest(tensors, metadata["config"])})


def _length(chance: random.Random, data: bytes, bait: Path) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    lengths = (0, 1, size - 1, size + 1, len(data), len(data) - 8, 100_000_000, 2**31, 2**32, 2**62, 2**63, 2**64 - 1)
    return struct.pack("<Q", chance.choice(lengths)) + data[8:]


def _header(chance: random.Random, data: bytes, bait: Path) -> bytes:
    header, body = _take_apart(data)
    text, many = json.dumps(header), "5000 more tensors"
    two = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    texts = (
        *("", "{}", "[]", "null", "0", '"x"', "{", "}", text[:-1], text + "}", text + " " * 4096, " " + text, "\ufeff" + text),
        *(text * 2, "\0" + text, text.replace('"', "'"), text.replace(":", ": \t\n"), text.replace("shape", "\\u0073hape")),
        *(text.replace("{", '{"__metadata__": {},', 1), text.replace('"F32"', '"F64"'), text.replace('"dtype"', '"type"')),
        *(deep("[", "]"), '{"a":' + deep("[", "]") + "}", '{"a":' * DEEP, "{" + '"' * 1000, two, many),
    )
    chosen = chance.choice(texts)
    if chosen == many:
        chosen = json.dumps(header | {f"_{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(5000)})
    return _put_together(chosen, body)


def _description(chance: random.Random, data: bytes, bait: Path) -> bytes:
    """Of one tensor: its dtype, shape, place or name."""
    header, body = _take_apart(data)
    names = [name for name in header if name != "__metadata__"]
    name, other, what = chance.choice(names), chance.choice(names), chance.randrange(7)
    entry, (begin, end) = header[name], header[name]["data_offsets"]
    shape, count, size = entry["shape"], (end - begin) // 4, len(body)
    if what == 0:
        entry["dtype"] = chance.choice(_DTYPES)
    elif what == 1:
        shapes: tuple[Any, ...] = (
            *([], [0], [count], [1, count], [count, 1], shape[::-1], [*shape, 1], [1, *shape], [count + 1], [1] * 100),
            *([-1], [count, -1], [2**62, 4], [2**63], [2**64], [10**30], [2**32, 2**32], [0, 2**63], [2**62, 0], [HUGE]),
            *([1.5], ["1"], [True], None, 3, {}, [1] * 10_000),
        )
        entry["shape"] = chance.choice(shapes)
    elif what == 2:
        places: tuple[Any, ...] = (
            *([0, 0], [0, 4], [end, begin], [begin + 4, end + 4], [begin + 1, end + 1], [begin, end + 4], [begin, end - 4]),
            *([begin, size], [0, size], [size, size], [begin, HUGE], [HUGE, HUGE + 4], [-4, 0], [2**64 - 4, 2**64], [begin]),
            *([], None, [1.0, 2.0], header[other]["data_offsets"]),
        )
        entry["data_offsets"] = chance.choice(places)
    elif what == 3:
        header[name], header[other] = header[other], header[name]
    elif what == 4:
        del header[name]
    elif what == 5:
        header[chance.choice(("", "x", name + "\0", name + ".0", "../x", "__metadata__", "x" * 10_000))] = header.pop(name)
    else:
        entry[chance.choice(("extra", "shape ", "dtype"))] = chance.choice((1, "x", None, []))
    return _put_together(header, body)


def _unsigned_metadata(chance: random.Random, data: bytes, bait: Path) -> bytes:
    """Format, version, configuration and digest."""
    header, body = _take_apart(data)
    meta, what = header["__metadata__"], chance.randrange(4)
    key = chance.choice(list(meta))
    values: tuple[Any, ...] = (
        *("", "0", "1", "2", "3", "-1", "99", "²", "٣", "1" * 6000, "2.0", " 2", "2\n", "energy-prior", "energy-prior run"),
        *(
            "x" * 100_000,
            "{}",
            "[]",
            "null",
            "\0",
            "0" * 64,
            None,
            3,
            [],
            {},
            meta[key][::-1],
            meta[key] + " ",
            meta[key].upper(),
        ),
    )
    if what == 0:
        del meta[key]
    elif what == 1:
        meta[key] = chance.choice(values)
    elif what == 2:
        meta[chance.choice(("format", "format_version", "config", "digest", "x", ""))] = meta[key]
    else:
        header["__metadata__"] = chance.choice(({}, [], None, "x", 3, {"format": "pt"}, {"format": "energy-prior"}))
    return _put_together(header, body)


def _swapped(chance: random.Random, data: bytes, bait: Path) -> bytes:
    """The values of two tensors of one kind in each other's place."""
    tensors = load(data)
    a, b = chance.choice(
        [
            (a, b)
            for a, x in tensors.items()
            for b, y in tensors.items()
            if a < b and (x.shape, x.dtype) == (y.shape, y.dtype) and not torch.equal(x, y)
        ]
    )
    return save(tensors | {a: tensors[b], b: tensors[a]}, _metadata(data))


# --------------------------------------------------------------------------------------------------------------------- signed


def _not_finite(chance: random.Random, data: bytes, bait: Path) -> bytes:
    """NaN or infinity in one weight."""
    tensors = load(data)
    name = chance.choice([key for key, value in tensors.items() if value.is_floating_point() and value.numel()])
    value = tensors[name].clone()
    value.view(-1)[chance.randrange(value.numel())] = chance.choice((torch.nan, torch.inf, -torch.inf))
    return _signed(tensors | {name: value}, _metadata(data))


def _values(chance: random.Random, data: bytes, bait: Path) -> bytes:
    """Other finite values in one tensor."""
    tensors = load(data)
    name = chance.choice([key for key, value in tensors.items() if value.numel()])
    value = tensors[name].clone()
    high = 2 if value.dtype == torch.bool else 200
    value.view(-1)[chance.randrange(value.numel())] = chance.choice((0, 1, high - 1, chance.randrange(high)))
    if value.is_floating_point() and chance.random() < 0.5:
        value = value * chance.choice((-1.0, 0.0, 1e-30, 1e30))
    return _signed(tensors | {name: value}, _metadata(data))


def _tensors(chance: random.Random, data: bytes, bait: Path) -> bytes:
    """A tensor of another shape, dtype or name, one too few or too many."""
    tensors = load(data)
    name, what = chance.choice(list(tensors)), chance.randrange(8)
    value = tensors[name]
    flat = value.flatten()
    if what == 0:
        tensors[name] = value.to(chance.choice(_DTYPES_OF_TORCH))
    elif what == 1:
        shapes = (flat, value[None], value[..., None], flat[:0], flat[:1], flat.repeat(2), value.T if value.ndim == 2 else flat)
        tensors[name] = chance.choice(shapes).contiguous()
    elif what == 2:
        del tensors[name]
    elif what == 3:
        more = ("x", "", "energies.0.x", "step_size", "/x", name + ".x", "x" * 10_000)
        tensors[chance.choice(more)] = value.clone()
    elif what == 4:
        tensors[chance.choice(list(tensors))] = value.clone()
    elif what == 5:
        tensors[name + "_orig_mod."] = tensors.pop(name)
    elif what == 6:
        tensors = {}
    else:
        tensors |= {f"extra.{i}": torch.zeros(0) for i in range(2000)}
    return _signed(tensors, _metadata(data))


def _config(chance: random.Random, data: bytes, bait: Path) -> bytes:
    metadata = _metadata(data)
    return _signed(load(data), metadata | {"config": hostile_json(chance, metadata["config"])})


def _any_config(chance: random.Random, data: bytes, bait: Path) -> bytes:
    """Text that is no configuration, or one that asks for code or for much."""
    metadata = _metadata(data)
    text = metadata["config"]
    config = json.loads(text)
    mlp, conv, waymarks = ({"kind": f"{kind}Energy", "latent_shape": [3]} for kind in ("MLP", "Conv", "Denoising"))
    energies: tuple[Any, ...] = (
        mlp | {"hidden": [HUGE, HUGE]},
        mlp | {"hidden": [100_000, 100_000]},
        mlp | {"hidden": [1] * 50_000},
        mlp | {"hidden": [int("9" * 4000)]},
        mlp | {"latent_shape": [HUGE]},
        conv | {"latent_shape": [3, 2, 2], "channels": [20_000, 20_000]},
        waymarks | {"above": [[2]], "channels": 100_000},
        waymarks | {"above": [[1]] * 50_000, "channels": 4},
        {"kind": "custom", "name": "x" * 10_000},
    )
    ladder = {"latent_dims": [3, 2], "hidden": 4}
    generators: tuple[Any, ...] = (
        {"factory": f"{bait.name}:make"},
        {"factory": "os:mkdir", "mode": 7},
        {"factory": "builtins:print"},
        {"factory": 3},
        ladder | {"hidden": 50_000},
        ladder | {"hidden": HUGE},
        ladder | {"depth": HUGE},
        ladder | {"latent_dims": [1] * 50_000},
        ladder | {"levels": 10**30, "likelihood": "mixture"},
        *({"x_shape": [1]}, {"self": 3}, {"": 3}, [], None, "x"),
    )
    shapes: tuple[Any, ...] = (
        [1, 4, 4],
        [1, 4, 4],
        [1, 50_000, 50_000],
        [HUGE],
        [10**30],
        [],
        None,
        "x",
        [str(bait)],
        [-1],
        [1.5],
    )
    if "energies" in config and chance.random() < 0.6:
        text = json.dumps(config | {"energies": [chance.choice(energies), chance.choice(energies)]})
    elif "reading" in config and chance.random() < 0.7:
        text = json.dumps(config | {"generator": chance.choice(generators), "x_shape": chance.choice(shapes)})
    else:
        text = chance.choice(("", "{}", "[]", "null", "3", "{", '"x"', deep("[", "]"), text[:-1], text * 2, "[" * DEEP, "\0"))
    return _signed(load(data), metadata | {"config": text})


SAFETENSORS_UNSIGNED: dict[str, Corruption] = {
    "length of the header": _length,
    "header": _header,
    "description of a tensor": _description,
    "metadata": _unsigned_metadata,
    "tensors swapped": _swapped,
}
SAFETENSORS: dict[str, Corruption] = {
    "not finite, signed": _not_finite,
    "other values, signed": _values,
    "other tensors, signed": _tensors,
    "other configuration, signed": _config,
    "any configuration, signed": _any_config,
}

# ----------------------------------------------------------------------------------------------------------------------- JSON


class _Raw:
    """Text to stand in JSON as it is."""

    def __init__(self, text: str) -> None:
        self.text = text


def _value(chance: random.Random) -> Any:
    numbers = (-1, 0, 1, 2, 7, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), 2**31, 2**63, 2**64, 10**30, HUGE, -HUGE)
    texts = ("", "x", "0", "nan", "\0", "\U0001f600", "x" * 10_000, "os:system", "relu", "tanh")
    lists = ([], [[]], [{}], [None], [0], [-1], [1.5], ["a"], [HUGE, HUGE], [2**62, 2], [1] * 10_000)
    dicts = ({}, {"a": 1}, {"": 0}, {"tensor": "/weights/0"}, {"tensor": []}, {"tensor": None}, {"value": 3}, {"value": [1]})
    parts = ({"list": []}, {"list": 3}, {"dict": {}}, {"dict": 3})
    raw = ("1" * 4000, "1" * 6000, "1e999", "NaN", "[" * 2000, "'x'", '"\\ud800"', deep("[", "]"), deep('{"a":', "}"))
    kind = chance.choice((numbers, numbers, texts, lists, dicts, parts, raw, (None, True, False)))
    value = chance.choice(kind)
    return _Raw(str(value)) if kind is raw else value


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """To everything in a document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, item in inside for deeper in _paths(item, (*path, key)))]


def hostile_json(chance: random.Random, text: str) -> str:
    """A JSON document with one to three values replaced, removed, doubled, renamed or moved."""
    document = json.loads(text)
    raw: dict[str, str] = {}
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        paths = [path for path in _paths(document) if path]
        shallow = [path for path in paths if len(path) <= 3]
        if not paths:
            break
        path = list(chance.choice(shallow if chance.random() < 0.5 else paths))
        holder, key = document, path.pop()
        for step in path:
            holder = holder[step]
        kind = chance.choice(("replace", "replace", "replace", "remove", "add", "move", "number"))
        if kind == "number" and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = holder[key] * chance.choice((-1, 0, 2, 1000, HUGE)) + chance.choice((-1, 0, 1))
        elif kind == "remove":
            del holder[key]
        elif kind == "add" and isinstance(holder, dict):
            holder[chance.choice(("", "x", "step_size", "kind", "depth"))] = holder[key]
        elif kind == "add":
            holder.insert(key, holder[key])
        elif kind == "move" and isinstance(holder, dict):
            holder[chance.choice(["x", *holder])] = holder.pop(key)
        else:
            value = _value(chance)
            if isinstance(value, _Raw):
                mark = f"@{len(raw)}@"
                raw[f'"{mark}"'], value = value.text, mark
            holder[key] = value
    text = json.dumps(document)
    for mark, own in raw.items():
        text = text.replace(mark, own)
    return text
