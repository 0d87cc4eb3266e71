"""Checkpoints of public models, read without running code from them."""

from __future__ import annotations

__all__ = ["load_checkpoint", "load_weights"]

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from energy_prior._util import first_line, shortened, some_of
from energy_prior.adapters.base import without_compile
from energy_prior.adapters.torch_calls import UnsafeError
from energy_prior.adapters.torch_files import read_torch_file
from energy_prior.checkpoint import canonical_name, canonical_state, check_state_fits
from energy_prior.checks.settings import check_path
from energy_prior.errors import CheckpointError

_KEYS = ("", "state_dict", "model_state_dict", "model")  # where a state is taken from though another place has one too
_COMPUTED = "weight_normalized"
_DEPTH = 3
_SHORT, _DOTS = 2, 10
_Model = TypeVar("_Model", bound=nn.Module)


def load_checkpoint(path: str | os.PathLike[str]) -> Any:
    """What `torch.save` wrote to a file, on the CPU: tensors, numbers, text, lists, dicts, `argparse.Namespace`, nothing else.

    Files of today's format have checksums, which are compared. Memory: the file's size and a constant, and some dozens of times
    what is not a tensor.

    Args:
        path: the file; `~` is the home folder.

    Raises:
        ArgumentError: if `path` is empty, or no path.
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is truncated or damaged, or asks for anything else (which could run code, or take more memory
            than the file is large).

    Examples:
        >>> import tempfile
        >>> from torch import nn
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"epoch": 3, "state_dict": nn.Linear(2, 3).state_dict()}, f"{folder}/checkpoint.pt")
        ...     checkpoint = load_checkpoint(f"{folder}/checkpoint.pt")
        >>> checkpoint["epoch"], sorted(checkpoint["state_dict"])
        (3, ['bias', 'weight'])
    """
    file = check_path("path", path)
    if not file.is_file():
        inside = sorted(p.name for p in file.glob("*.p[th]*")) if file.is_dir() else []
        hint = f" It is a folder; give one of the files in it: {', '.join(inside[:5])}." if inside else ""
        raise FileNotFoundError(f"No checkpoint at {os.fspath(path)!r}.{hint}")
    size = file.stat().st_size
    with file.open("rb") as opened:
        try:
            return read_torch_file(opened, size)
        except UnsafeError as error:
            raise CheckpointError(
                f"{os.fspath(path)!r} asks for {shortened(error.name)}, and holds more than tensors and plain values: reading "
                "it could run code. Where the file is your own, save the model's state_dict() alone, with the code that made "
                "the model, and load that."
            ) from None
        except Exception as error:  # a file of another kind raises whatever its bytes happen to mean
            what = first_line(error) if type(error) is ValueError else f"{type(error).__name__}: {first_line(error)}"
            raise CheckpointError(
                f"{os.fspath(path)!r} is not a whole checkpoint of torch.save ({what if size else 'it is empty'}): it is "
                "truncated, damaged or of another kind. Use another copy."
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

    Examples:
        >>> from torch import nn
        >>> state = {"module.weight": torch.ones(1, 2), "module.bias": torch.zeros(1)}  # of DistributedDataParallel
        >>> model = load_weights(nn.Linear(2, 1), {"epoch": 3, "state_dict": state})
        >>> model(torch.ones(1, 2)).detach()
        tensor([[2.]])
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
    for part in usual:
        check_state_fits(name, expected, part.weights, f"this {type(inner).__name__}", "Use another copy.")  # all finite
    weights = usual[0].weights
    if any(not _equal(weights, other.weights) for other in usual[1:]):
        places = [repr(part.where + part.prefix) for part in usual]
        raise CheckpointError(
            f"{name!r} holds {len(usual)} different states of this {type(inner).__name__}, under {' and '.join(places[:4])}"
            f"{' and others' if len(places) > 4 else ''}. Pass the one to take: load_weights(model, load_checkpoint(path)[…])."
        )
    inner.load_state_dict(
        {key: weights[c] for key in inner.state_dict() if (c := canonical_name(key)) in weights}, strict=False
    )
    return model


class _Part(NamedTuple):
    """Tensors of a checkpoint whose names begin alike, without that beginning."""

    where: str
    prefix: str
    weights: dict[str, Tensor]


def _state_dicts(loaded: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Dicts with tensors, at the top or in dicts below it, and their keys.

    One that is in several places is met once at each depth: dicts that share what is in them may have more paths than bytes.
    """
    level: list[tuple[str, Any]] = [("", loaded)]
    for _ in range(_DEPTH + 1):
        below: dict[int, tuple[str, Any]] = {}
        for where, held in level:
            texts = {key: value for key, value in held.items() if isinstance(key, str)} if isinstance(held, Mapping) else {}
            tensors = {
                canonical_name(key): value
                for key, value in texts.items()
                if isinstance(value, Tensor) and not key.endswith(_COMPUTED)
            }
            if tensors:
                yield where, tensors
            for key in sorted(texts, key=lambda key: key not in _KEYS):
                below.setdefault(id(texts[key]), (f"{where}.{shortened(key)}".lstrip("."), texts[key]))
        level = list(below.values())


def _parts(where: str, tensors: Mapping[str, Tensor], size: int) -> list[_Part]:
    """A state dict itself, and its parts below beginnings of names that end in a dot: the first two, and those of this size."""
    inside: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        dot = key.find(".")
        for _ in range(_DOTS):
            if dot < 0:
                break
            inside.setdefault(key[: dot + 1], {})[key[dot + 1 :]] = value
            dot = key.find(".", dot + 1)
    found = {"": dict(tensors)} | {p: part for p, part in inside.items() if len(part) == size or p.count(".") <= _SHORT}
    return [_Part(where, prefix, found[prefix]) for prefix in sorted(found, key=len)]


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in weights.items()}


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return all(value.dtype == b[key].dtype and torch.equal(value, b[key]) for key, value in a.items())


def _say_what_differs(name: str, expected: Mapping[str, Tensor], parts: Sequence[_Part], model: str) -> NoReturn:
    """Raises: names and shapes of the part that has most in common with the model."""
    nearest = max(parts, key=lambda part: (len(part.weights.keys() & expected.keys()), -len(part.weights)))
    if nearest.weights.keys() == expected.keys():
        check_state_fits(name, expected, nearest.weights, f"this {model}", "Build the model as it was when it was trained.")
    if not nearest.weights.keys() & expected.keys():
        ours, theirs = (some_of(map(shortened, names), 3) for names in (expected, nearest.weights))
        raise CheckpointError(
            f"{name!r} does not fit this {model}: no name is the same. The model has {ours}; the file has {theirs}. It may be "
            "of another code, or of another part of the model."
        )
    missing, more = expected.keys() - nearest.weights.keys(), nearest.weights.keys() - expected.keys()
    lacks = (
        f" {len(missing)} names of the model are missing, such as {some_of(map(shortened, sorted(missing)), 3)}."
        if missing
        else ""
    )
    has = f" {len(more)} are not expected, such as {some_of(map(shortened, sorted(more)), 3)}." if more else ""
    raise CheckpointError(
        f"{name!r} does not fit this {model}: {len(nearest.weights.keys() & expected.keys())} of {len(expected)} names are "
        f"there.{lacks}{has} Build the model as it was when it was trained."
    )
