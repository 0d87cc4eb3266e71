"""`energy-prior info`: versions, what this machine computes with, and which extras are there."""

from __future__ import annotations

__all__ = ["add_command", "bf16_units", "machine_lines"]

import argparse
import contextlib
import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

import torch

from energy_prior import __version__
from energy_prior.langevin import backends

_EXTRAS = ("eval", "fid", "train", "examples", "hub")
_BF16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}  # as Linux names them, the last on ARM


def add_command(commands: Any) -> None:
    """Adds the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "info",
        help="versions, what this machine computes with, and which extras are there",
        description="Prints versions, processor and GPUs with what they mean for `precision`, the backends of chains, and "
        "which extras are installed. For reports of faults too.",
    )
    parser.set_defaults(command=_run)


def machine_lines() -> list[str]:
    """The lines that the command prints."""
    found = bf16_units()
    if found:
        bf16 = f'units for bf16 ({", ".join(found)}): precision="bf16" is faster in large chains'
    elif found is not None:
        bf16 = 'no units for bf16: precision="bf16" is slower than full precision, the default'
    else:
        bf16 = 'not known whether it has units for bf16: without them precision="bf16" is slower than full precision'
    lines = [
        f"energy-prior {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"CPU: {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads; {bf16}",
    ]
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        with torch.cuda.device(number):
            coarse = '"tf32" and "bf16"' if torch.cuda.is_bf16_supported(including_emulation=False) else "neither tf32 nor bf16"
        lines.append(f"GPU {number}: {torch.cuda.get_device_name(number)}; {coarse} for precision")
    if not torch.cuda.is_available():
        lines.append('GPU: none that CUDA sees; backend="graph" and precision="tf32" need one')
    lines.append(f"backends of chains: {', '.join(backends.available())}; auto takes compiled where one call is long enough")
    if not _installed("energy-prior"):
        return [*lines, "extras: not known, as energy-prior is not installed but imported from a folder"]
    for extra in _EXTRAS:
        missing = [name for name in _packages(extra) if not _installed(name)]
        wanted = f"without {', '.join(missing)}: pip install 'energy-prior[{extra}]'" if missing else "installed"
        lines.append(f"extra {extra}: {wanted}")
    return lines


def bf16_units() -> list[str] | None:
    """The processor's units for bf16, as Linux names them; None where it does not say what the processor has."""
    with contextlib.suppress(OSError):
        named = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        flags = {flag for name, _, value in named if name.strip() in ("flags", "Features") for flag in value.split()}
        return sorted(_BF16_UNITS & flags) if flags else None
    return None


def _packages(extra: str) -> list[str]:
    """Packages of an extra, from the metadata of the installed project."""
    needs = importlib.metadata.requires("energy-prior") or []
    named = [re.match(r"[\w.-]+", need) for need in needs if re.search(rf"""extra == ["']{extra}["']""", need)]
    return [name.group() for name in named if name is not None]


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _run(options: argparse.Namespace) -> int:
    print("\n".join(machine_lines()))
    return 0
