"""The options that the examples share."""

from __future__ import annotations

__all__ = ["add_options", "default_device", "user_path"]

import argparse
from pathlib import Path

import torch


def add_options(parser: argparse.ArgumentParser, *, data: str | None, out: str | None, device: bool = True) -> None:
    """Adds --data, --out, --seed, --quick and, if asked for, --device.

    Args:
        parser: what to add them to.
        data: default of --data; None: the example has a default for each of its settings.
        out: default of --out; None: as for `data`.
        device: add --device.
    """
    setting = "the setting's own"
    parser.add_argument(
        "--data", default=data, help=f"a folder, or the name of a set on the Hugging Face hub; default: {data or setting}"
    )
    parser.add_argument("--out", type=user_path, default=out, help=f"folder to write to; default: {out or setting}")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--quick", action="store_true", help="small nets or few iterations; the figures mean nothing")
    if device:
        parser.add_argument("--device", default=None, help="cpu, cuda, …; default: a GPU if there is one")


def default_device() -> str:
    """A GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def user_path(text: str) -> Path:
    """Type of an option that is a path; ~ is the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty text")
    return Path(text).expanduser()
