"""Checkpoints: safetensors files with a configuration as JSON and a digest of everything in their header. No pickle.

There are three kinds: priors, runs and generators. One version number counts the changes of all three.
"""

from __future__ import annotations

__all__ = [
    "FORMAT_VERSION",
    "GENERATOR",
    "PRIOR",
    "RUN",
    "Kind",
    "check_generator_fits",
    "check_state_fits",
    "check_unchanged",
    "canonical_name",
    "canonical_state",
    "digest",
    "fingerprint",
    "load_named",
    "read_checkpoint",
    "read_prior",
    "read_tensors",
    "write_checkpoint",
    "write_whole",
]

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from energy_prior._util import first_line, shortened, shown
from energy_prior.checks.settings import check_path
from energy_prior.errors import CheckpointError
from energy_prior.protocol import unwrapped


class Kind(NamedTuple):
    """A kind of checkpoint.

    Attributes:
        format: its name in the header.
        writer: what writes it, for errors.
        remedy: what to do where it cannot be read.
    """

    format: str
    writer: str
    remedy: str


PRIOR = Kind("energy-prior", "JointEBMPrior.save", "Save the prior again, or use another copy.")
RUN = Kind("energy-prior run", "a run with a run_dir", "Name another run_dir to begin anew.")
GENERATOR = Kind("energy-prior generator", "`energy-prior train` or `save_pretrained`", "Write it again, or use another copy.")

FORMAT_VERSION = 3
_DIGITS = 9  # of a version number that can be one
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


def write_checkpoint(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], config: Mapping[str, Any], kind: Kind = PRIOR
) -> None:
    """Writes a checkpoint whole or not at all: to a temporary file beside `path`, then renamed over it.

    Args:
        path: of the file.
        tensors: by canonical names, or names that become such.
        config: JSON-able.
        kind: of the checkpoint.

    Raises:
        CheckpointError: if a value in `tensors` is none.
        FileNotFoundError, IsADirectoryError, OSError: as `write_whole`.
    """
    foreign = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if foreign:
        raise CheckpointError(
            f"The state {foreign[0]!r} is a {type(tensors[foreign[0]]).__name__}, and a checkpoint holds tensors alone. "
            "Keep it out of state_dict() (get_extra_state), or make it a buffer."
        )
    values = {canonical_name(name): value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    text = json.dumps(dict(config))
    header = {"format": kind.format, "format_version": str(FORMAT_VERSION), "config": text, "digest": digest(values, text)}
    write_whole(path, save(values, metadata=header))


def write_whole(path: str | os.PathLike[str], data: bytes, what: str = "checkpoint") -> None:
    """Writes a file whole or not at all: to a temporary file beside `path`, then renamed over it.

    Args:
        path: of the file.
        data: what it will hold.
        what: what it is, for errors.

    Raises:
        FileNotFoundError, IsADirectoryError: if `path` cannot be a file.
        OSError: if it cannot be written (a full disk); what was at `path` before is untouched.
    """
    target = check_path("path", path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path: there is no folder {os.fspath(target.parent)!r} to write the {what} to.")
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
            f"{error.strerror}: the {what} {os.fspath(target)!r} ({len(data) / 2**20:.1f} MiB) could not be written. What "
            "was there before is untouched; make room and go on",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(
    path: str | os.PathLike[str], kind: Kind = PRIOR, remedy: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the configuration of a checkpoint, which are those that were written: their digest says so.

    A digest tells damage, not who wrote a file: whoever reads it checks that names, shapes and values make sense.

    Args:
        path: the file; `~` is the home folder.
        kind: what it must be.
        remedy: what to do where it cannot be read, for errors; None: the kind's own.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is truncated or damaged, of another kind, or of another version of this library.
    """
    name, remedy = repr(os.fspath(path)), remedy or kind.remedy
    tensors, header = read_tensors(path, remedy)
    if header.get("format") != kind.format:
        got = f" It has the format {shown(header['format'])}." if "format" in header else ""
        raise CheckpointError(
            f"{name} is a safetensors file, but not a checkpoint of energy-prior as expected here, one that {kind.writer} "
            f"wrote.{got} {remedy}"
        )
    version = header.get("format_version", "")
    known = version.isdecimal() and len(version) <= _DIGITS
    if not known or int(version) > FORMAT_VERSION:
        raise CheckpointError(
            f"{name} has checkpoint format {shown(version)}; this version of energy-prior reads {FORMAT_VERSION}. "
            "Upgrade: pip install -U energy-prior."
        )
    if int(version) < FORMAT_VERSION:
        raise CheckpointError(
            f"{name} has checkpoint format {version}, of an unreleased version of energy-prior; this one reads "
            f"{FORMAT_VERSION}. {'Fit the prior again.' if kind is PRIOR else remedy}"
        )
    text = header.get("config", "")
    if header.get("digest") != digest(tensors, text):
        raise CheckpointError(f"{name} is damaged: it does not hold what was written, by its digest. {remedy}")
    config: Any = None
    with contextlib.suppress(ValueError, RecursionError):  # no JSON, or nested without end
        config = json.loads(text)
    if not isinstance(config, dict):
        raise CheckpointError(f"{name} is damaged: expected its configuration as a JSON object, got {shown(text)}. {remedy}")
    return tensors, config


def read_prior(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration of a prior: "space", "latent_shapes", "generator", "energies" and "joint".

    Raises:
        FileNotFoundError, CheckpointError: as `read_checkpoint`; or if something is missing, or is not what it is called.
    """
    tensors, config = read_checkpoint(path)
    kinds = {"space": str, "latent_shapes": list, "generator": str, "energies": list, "joint": bool}
    bad = [key for key, kind in kinds.items() if not isinstance(config.get(key), kind)]
    bad += [key for key in ("step_size", "calibration.count") if key not in tensors]
    if not bad and not (tensors["step_size"].is_floating_point() and bool((tensors["step_size"] > 0).all())):
        bad = ["step_size"]
    if bad:
        raise CheckpointError(f"{os.fspath(path)!r} is damaged: its {bad[0]} is missing or impossible. {PRIOR.remedy}")
    return tensors, config


def read_tensors(path: str | os.PathLike[str], remedy: str = PRIOR.remedy) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its header.

    Args:
        path: the file; `~` is the home folder.
        remedy: what to do where it cannot be read, for errors.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is truncated or damaged, or of another kind.
    """
    path = check_path("path", path)
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {os.fspath(path)!r}.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except OSError:  # it may not be read, or the disk fails
        raise
    except Exception as error:  # torch's own, for dtypes and shapes that it does not have
        raise CheckpointError(
            f"{os.fspath(path)!r} is not a whole safetensors file ({first_line(error)}): it is truncated, "
            f"damaged or of another kind. {remedy}"
        ) from error


def check_generator_fits(
    path: str | os.PathLike[str], config: Mapping[str, Any], generator: Any, *, weights: bool = True
) -> None:
    """Raises `CheckpointError` if a checkpoint was made for another generator: other latents or, if asked, other weights."""
    shapes = [list(shape) for shape in generator.latent_shapes]
    if shapes != config["latent_shapes"]:
        raise CheckpointError(
            f"{os.fspath(path)!r} was made for latents of shapes {shown(config['latent_shapes'])} (z_1 first); this "
            f"generator has {shapes}. Give `load` the generator that the prior was fitted on."
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
    """Raises `CheckpointError`, saying what differs and the remedy, if one state dict cannot be loaded into another.

    Names and shapes must be the same, and so must the kind of number (floating, complex, whole, bool) of each; floating-point
    values must be finite.
    """
    expected = {canonical_name(name): value for name, value in expected.items()}
    faults = [f"{shortened(name)} is missing" for name in expected if name not in got]
    faults += [f"{shortened(name)} is not expected" for name in got if name not in expected]
    faults += [fault for name, value in expected.items() if name in got for fault in _faults(name, value, got[name])]
    if faults:
        more = f" (and {len(faults) - 4} more)" if len(faults) > 4 else ""
        raise CheckpointError(f"{os.fspath(path)!r} does not fit {what}: {'; '.join(faults[:4])}{more}. {remedy}")


def _faults(name: str, expected: Tensor, got: Tensor) -> list[str]:
    """What is wrong with a tensor, in words."""
    if got.shape != expected.shape:
        return [f"{name} has shape {shown(tuple(got.shape))} instead of {tuple(expected.shape)}"]
    if got.layout is not torch.strided or got.is_meta or got.is_quantized:
        return [f"{name} is no dense tensor with values"]
    kinds = [(t.is_floating_point(), t.is_complex(), t.dtype == torch.bool) for t in (expected, got)]
    if kinds[0] != kinds[1]:
        return [f"{name} is of {got.dtype} instead of {expected.dtype}"]
    values = got.float() if got.dtype.itemsize == 1 else got  # torch does not compare every type of 8 bits
    return [] if bool(torch.isfinite(values).all()) else [f"{name} is not finite"]
