"""Checkpoints of public models, read without running code from them."""

from __future__ import annotations

__all__ = ["load_checkpoint", "load_weights"]

import argparse
import os
import pickle
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from energy_prior._util import first_line
from energy_prior.adapters.base import without_compile
from energy_prior.checkpoint import check_state_fits
from energy_prior.checks.settings import check_path
from energy_prior.errors import CheckpointError

_PLAIN: list[Any] = [argparse.Namespace]
_KEYS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")
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
        checkpoint: a file, as for `load_checkpoint`, or what that returned: a state dict, or a dict with one under
            "state_dict", "model_state_dict" or "model". The prefixes of DistributedDataParallel ("module."), torch.compile
            ("_orig_mod.") and Lightning ("model.") are removed from the names, and NVAE's `weight_normalized`, which its code
            computes again, is left out.

    Returns:
        The model itself.

    Raises:
        ArgumentError, FileNotFoundError: as `load_checkpoint`.
        CheckpointError: if names or shapes do not agree; the message says which.
    """
    loaded = checkpoint if isinstance(checkpoint, Mapping) else load_checkpoint(checkpoint)
    inner = without_compile(model)
    name = "the checkpoint" if isinstance(checkpoint, Mapping) else os.fspath(checkpoint)
    if isinstance(loaded, Mapping):
        loaded = next((loaded[key] for key in _KEYS if isinstance(loaded.get(key), Mapping)), loaded)
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise CheckpointError(f"{name!r} holds no state dict, as expected at its top or under one of {', '.join(_KEYS)}.")
    weights = {key: value for key, value in loaded.items() if not key.endswith("weight_normalized")}
    expected = {key: v for key, v in inner.state_dict().items() if not key.endswith("weight_normalized")}
    while prefix := _foreign_prefix(weights, expected):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    remedy = "Build the model with the settings that it was trained with."
    check_state_fits(name, expected, weights, f"this {type(inner).__name__}", remedy)
    inner.load_state_dict(weights, strict=False)
    return model


def _foreign_prefix(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """The prefix that a wrapper put before every name, if it did."""
    for prefix in _PREFIXES:
        if weights and all(key.startswith(prefix) for key in weights) and not all(key.startswith(prefix) for key in expected):
            return prefix
    return None
