"""Checkpoints of public models, read without running code from them."""

from __future__ import annotations

__all__ = ["load_checkpoint", "load_weights"]

import argparse
import collections
import os
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from energy_prior._util import first_line, some_of
from energy_prior.adapters.base import without_compile
from energy_prior.checkpoint import canonical_name, canonical_state, check_state_fits
from energy_prior.checks.settings import check_path
from energy_prior.errors import CheckpointError

_PLAIN: list[Any] = [argparse.Namespace]
_KEYS = ("", "state_dict", "model_state_dict", "model")  # where a state is taken from though another place has one too
_COMPUTED = "weight_normalized"
_DEPTH = 3
_SHORT = 2
_Model = TypeVar("_Model", bound=nn.Module)


def load_checkpoint(path: str | os.PathLike[str]) -> Any:
    """What `torch.save` wrote to a file, on the CPU: tensors, numbers, text, lists, dicts, `argparse.Namespace`, nothing else.

    Args:
        path: the file; `~` is the home folder.

    Raises:
        ArgumentError: if `path` is empty, or no path.
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is truncated, or asks for any other type (which could run code).
    """
    file = check_path("path", path)
    if not file.is_file():
        inside = sorted(p.name for p in file.glob("*.p[th]*")) if file.is_dir() else []
        hint = f" It is a folder; give one of the files in it: {', '.join(inside[:5])}." if inside else ""
        raise FileNotFoundError(f"No checkpoint at {os.fspath(path)!r}.{hint}")
    try:
        allowed = torch.serialization.get_safe_globals()
        with torch.serialization.safe_globals([kind for kind in _PLAIN if kind not in allowed]):  # removed again on exit
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of another kind raises whatever its bytes happen to mean
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asked:
            raise CheckpointError(
                f"{os.fspath(path)!r} asks for {asked[1]}, and holds more than tensors and plain values: reading it could "
                "run code. Where the file is your own, save the model's state_dict() alone, with the code that made the model, "
                "and load that."
            ) from None
        unreadable = isinstance(error, pickle.UnpicklingError)  # torch's text is advice to switch its safety off
        reason = "it is no pickle" if unreadable else f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(
            f"{os.fspath(path)!r} is not a whole checkpoint of torch.save ({reason}). Use another copy."
        ) from error


def load_weights(model: _Model, checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> _Model:
    """Puts the weights of a checkpoint into a model of the same architecture.

    Args:
        model: the model to fill; a wrapper of torch.compile is filled inside.
        checkpoint: a file, as for `load_checkpoint`, or what that returned: a state dict, or dicts around one ("state_dict",
            "model_state_dict" and "model" go before others; {"model": {"state_dict": …}}). What wrappers put before the
            names ("module.", "_orig_mod.", "model.", "net.", any other) is taken off, and entries of other parts of a training
            run (`n_averaged`, a loss) stay unread, where one part has all the names and shapes of the model. NVAE's
            `weight_normalized`, which its code computes again, is left out.

    Returns:
        The model itself.

    Raises:
        ArgumentError, FileNotFoundError: as `load_checkpoint`.
        CheckpointError: if no part fits, or more than one that differ; the message says which.
    """
    loaded = checkpoint if isinstance(checkpoint, Mapping) else load_checkpoint(checkpoint)
    inner = without_compile(model)
    name = "the checkpoint" if isinstance(checkpoint, Mapping) else os.fspath(checkpoint)
    expected = {key: v for key, v in canonical_state(inner).items() if not key.endswith(_COMPUTED)}
    parts = [part for where, held in _state_dicts(loaded) for part in _parts(where, held, len(expected))]
    if not parts:
        raise CheckpointError(f"{name!r} holds no state dict: no tensors with names, at its top or below.")
    fitting = [part for part in parts if _shapes(part.weights) == _shapes(expected)]
    usual = [part for part in fitting if part.where in _KEYS] or fitting
    if not usual:
        _say_what_differs(name, expected, parts, type(inner).__name__)
    if any(not _equal(usual[0].weights, other.weights) for other in usual[1:]):
        raise CheckpointError(
            f"{name!r} holds {len(usual)} different states of this {type(inner).__name__}, under "
            f"{' and '.join(repr(part.where + part.prefix) for part in usual)}. Pass the one to take: "
            "load_weights(model, load_checkpoint(path)[…])."
        )
    weights = usual[0].weights
    check_state_fits(name, expected, weights, f"this {type(inner).__name__}", "Use another copy.")  # all finite
    inner.load_state_dict(
        {key: weights[c] for key in inner.state_dict() if (c := canonical_name(key)) in weights}, strict=False
    )
    return model


class _Part(NamedTuple):
    """Tensors of a checkpoint whose names begin alike, without that beginning."""

    where: str
    prefix: str
    weights: dict[str, Tensor]


def _state_dicts(loaded: Any, where: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Dicts with tensors, at the top or in dicts below it, and their keys."""
    if not isinstance(loaded, Mapping) or depth > _DEPTH:
        return
    tensors = {
        canonical_name(key): value
        for key, value in loaded.items()
        if isinstance(key, str) and isinstance(value, Tensor) and not key.endswith(_COMPUTED)
    }
    if tensors:
        yield where, tensors
    for key, value in loaded.items():
        if isinstance(key, str):
            yield from _state_dicts(value, f"{where}.{key}".lstrip("."), depth + 1)


def _parts(where: str, tensors: Mapping[str, Tensor], size: int) -> list[_Part]:
    """A state dict itself, and its parts below beginnings of names that end in a dot: the first two, and those of this size."""
    counts = collections.Counter(key[: i + 1] for key in tensors for i, letter in enumerate(key) if letter == ".")
    prefixes = ["", *(prefix for prefix, count in counts.items() if count == size or prefix.count(".") <= _SHORT)]
    found = []
    for prefix in sorted(prefixes, key=len):
        inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        found.append(_Part(where, prefix, inside))
    return found


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in weights.items()}


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value, b[key]) for key, value in a.items())


def _say_what_differs(name: str, expected: Mapping[str, Tensor], parts: Sequence[_Part], model: str) -> NoReturn:
    """Raises: names and shapes of the part that has most in common with the model."""
    nearest = max(parts, key=lambda part: (len(part.weights.keys() & expected.keys()), -len(part.weights)))
    if nearest.weights.keys() == expected.keys():
        check_state_fits(name, expected, nearest.weights, f"this {model}", "Build the model as it was when it was trained.")
    if not nearest.weights.keys() & expected.keys():
        raise CheckpointError(
            f"{name!r} does not fit this {model}: no name is the same. The model has {some_of(expected, 3)}; the file has "
            f"{some_of(nearest.weights, 3)}. It may be of another code, or of another part of the model."
        )
    missing, more = expected.keys() - nearest.weights.keys(), nearest.weights.keys() - expected.keys()
    lacks = f" {len(missing)} names of the model are missing, such as {some_of(sorted(missing), 3)}." if missing else ""
    has = f" {len(more)} are not expected, such as {some_of(sorted(more), 3)}." if more else ""
    raise CheckpointError(
        f"{name!r} does not fit this {model}: {len(nearest.weights.keys() & expected.keys())} of {len(expected)} names are "
        f"there.{lacks}{has} Build the model as it was when it was trained."
    )
