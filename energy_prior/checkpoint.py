"""Checkpoints: one safetensors file with the energies' weights, and their configuration as JSON in its header. No pickle."""

from __future__ import annotations

__all__ = [
    "FORMAT_VERSION",
    "check_generator_fits",
    "check_state_fits",
    "check_unchanged",
    "canonical_name",
    "canonical_state",
    "digest",
    "fingerprint",
    "load_named",
    "read_checkpoint",
    "read_tensors",
    "write_checkpoint",
    "write_whole",
]

import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from energy_prior.checks.settings import check_path
from energy_prior.errors import CheckpointError
from energy_prior.protocol import unwrapped

FORMAT = "energy-prior"
FORMAT_VERSION = 2
_DIGEST_PART = 2**24
_ADDRESS = re.compile(r"0x[0-9a-f]+")


def fingerprint(generator: Any) -> str:
    """SHA-256 of a generator's latent shapes and, if it is an `nn.Module`, of its weights, buffers and settings, as hex digits.

    It depends on names, shapes, dtypes and values, not on the device. Settings are what modules other than torch's own say in
    `extra_repr`: of two models with the same weights one may have another temperature.
    """
    generator = unwrapped(generator)
    shapes = repr([tuple(shape) for shape in generator.latent_shapes])
    if not isinstance(generator, nn.Module):
        return digest({}, shapes)
    own = {
        canonical_name(name): part for name, part in generator.named_modules() if not type(part).__module__.startswith("torch.")
    }
    settings = {name: _ADDRESS.sub("", part.extra_repr()) for name, part in own.items() if part.extra_repr()}
    return digest(canonical_state(generator), f"{shapes} {sorted(settings.items())}")


def canonical_name(name: str) -> str:
    """A name in a state dict without what `torch.compile` of a part of the module puts into it."""
    return name.replace("_orig_mod.", "")


def canonical_state(module: nn.Module) -> dict[str, Any]:
    """`module.state_dict()` by canonical names."""
    return {canonical_name(name): value for name, value in module.state_dict().items()}


def load_named(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads a state of canonical names."""
    module.load_state_dict({name: tensors[canonical_name(name)] for name in module.state_dict()})


def digest(values: Mapping[str, Any], start: str = "") -> str:
    """SHA-256 of named tensors and plain values, as hexadecimal digits, after that of `start`.

    Plain are numbers, text, bytes, None, and lists, tuples and dicts of such; of any other object only its type counts, as its
    text need not be the same in another process.
    """
    total = hashlib.sha256(start.encode())
    for name, value in sorted(values.items()):
        total.update(name.encode())
        _digest_value(total, value)
    return total.hexdigest()


def _digest_value(total: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        total.update(f"{tuple(value.shape)}{value.dtype}".encode())
        for part in value.detach().flatten().split(_DIGEST_PART):
            total.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    elif value is None or isinstance(value, bool | int | float | complex | str | bytes):
        total.update(repr(value).encode())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            total.update(repr(key).encode() if isinstance(key, bool | int | float | str) else type(key).__name__.encode())
            _digest_value(total, item)
    elif isinstance(value, list | tuple):
        total.update(f"{type(value).__name__} of {len(value)}".encode())
        for item in value:
            _digest_value(total, item)
    else:
        total.update(type(value).__qualname__.encode())


def write_checkpoint(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Writes a checkpoint whole or not at all: to a temporary file beside `path`, then renamed over it."""
    foreign = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if foreign:
        raise CheckpointError(
            f"The state {foreign[0]!r} is a {type(tensors[foreign[0]]).__name__}, and a checkpoint holds tensors alone. "
            "Keep it out of state_dict() (get_extra_state), or make it a buffer."
        )
    values = {canonical_name(name): value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    text = json.dumps(dict(config))
    header = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "config": text, "digest": digest(values, text)}
    write_whole(path, save(values, metadata=header))


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file whole or not at all: to a temporary file beside `path`, then renamed over it.

    Raises:
        FileNotFoundError, IsADirectoryError: if `path` cannot be a file.
        OSError: if it cannot be written (a full disk); what was at `path` before is untouched.
    """
    target = check_path("path", path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path: there is no folder {os.fspath(target.parent)!r} to write the checkpoint to.")
    if target.is_dir():
        raise IsADirectoryError(f"path: {os.fspath(target)!r} is a folder; name a file in it.")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}: the checkpoint {os.fspath(target)!r} ({len(data) / 2**20:.1f} MiB) could not be written. What "
            "was there before is untouched; make room and go on",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration of a checkpoint.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is truncated or damaged, was not written by this library, or by a newer version of it.
    """
    tensors, header = read_tensors(path)
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{os.fspath(path)!r} is a safetensors file, but not a checkpoint of energy-prior. Expected one that "
            "JointEBMPrior.save wrote."
        )
    version = header.get("format_version", "")
    if not version.isdecimal() or int(version) > FORMAT_VERSION:
        raise CheckpointError(
            f"{os.fspath(path)!r} has checkpoint format {version!r}; this version of energy-prior reads up to "
            f"{FORMAT_VERSION}. Upgrade: pip install -U energy-prior."
        )
    if int(version) < FORMAT_VERSION:
        raise CheckpointError(
            f"{os.fspath(path)!r} has checkpoint format {version}, of an unreleased version of energy-prior; this one reads "
            f"{FORMAT_VERSION}. Fit the prior again."
        )
    config: dict[str, Any] = {}
    try:
        config = json.loads(header["config"])
        whole = all(
            isinstance(config[key], kind)
            for key, kind in {"space": str, "latent_shapes": list, "generator": str, "energies": list}.items()
        )
    except (KeyError, TypeError, ValueError):
        whole = False
    if (
        not whole
        or not {"step_size", "calibration.count"} <= set(tensors)
        or header.get("digest") != digest(tensors, header["config"])
    ):
        raise CheckpointError(f"{os.fspath(path)!r} is damaged. Save the prior again, or use another copy.")
    return tensors, config


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its header.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is truncated or damaged.
    """
    path = check_path("path", path)
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {os.fspath(path)!r}.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise CheckpointError(
            f"{os.fspath(path)!r} is not a whole safetensors file ({error}): it is truncated, damaged or of another kind. "
            "Save it again, or use another copy."
        ) from error


def check_generator_fits(
    path: str | os.PathLike[str], config: Mapping[str, Any], generator: Any, *, weights: bool = True
) -> None:
    """Raises `CheckpointError` if a checkpoint was made for another generator: other latents or, if asked, other weights."""
    shapes = [list(shape) for shape in generator.latent_shapes]
    if shapes != config["latent_shapes"]:
        raise CheckpointError(
            f"{os.fspath(path)!r} was made for latents of shapes {config['latent_shapes']} (z_1 first); this generator "
            f"has {shapes}. Give `load` the generator that the prior was fitted on."
        )
    if weights and fingerprint(generator) != config["generator"]:
        raise CheckpointError(
            f"{os.fspath(path)!r} was made for a generator with other weights or another dtype: energies are only valid "
            "for the generator that they were fitted on. Give `load` that one, or fit the prior again."
        )


def check_unchanged(fitted_on: str | None, now: str) -> None:
    """Raises `CheckpointError` if the generator's fingerprint is no longer the one that the energies were fitted on."""
    if fitted_on not in (None, now):
        raise CheckpointError(
            "The generator has changed since the energies were fitted, and they are only valid for the one that they were "
            "fitted on. Fit the prior again before saving it."
        )


def check_state_fits(
    path: str | os.PathLike[str],
    expected: Mapping[str, Tensor],
    got: Mapping[str, Tensor],
    what: str = "these energies",
    remedy: str = "Pass `energies` built as they were when it was saved.",
) -> None:
    """Raises `CheckpointError`, saying what differs and the remedy, if names or shapes of two state dicts do not agree."""
    expected = {canonical_name(name): value for name, value in expected.items()}
    faults = [f"{name} is missing" for name in expected if name not in got]
    faults += [f"{name} is not expected" for name in got if name not in expected]
    faults += [
        f"{name} has shape {tuple(got[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in got and got[name].shape != value.shape
    ]
    faults += [f"{name} is not finite" for name, value in got.items() if not bool(torch.isfinite(value.float()).all())]
    if faults:
        more = f" (and {len(faults) - 4} more)" if len(faults) > 4 else ""
        raise CheckpointError(f"{os.fspath(path)!r} does not fit {what}: {'; '.join(faults[:4])}{more}. {remedy}")
