"""`energy-prior score`: anomaly scores of images under a prior that `energy-prior train` made."""

from __future__ import annotations

__all__ = ["UNREADABLE", "add_command", "score_images", "score_rows"]

import argparse
import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from energy_prior.calibration import TERMS
from energy_prior.checkpoint import digest, fingerprint
from energy_prior.checks.settings import check_count, check_device, check_path, check_share, require_extra
from energy_prior.cli.options import add_run, check_makes_images, numbers_of, stream
from energy_prior.cli.train import read_run
from energy_prior.data import load_images
from energy_prior.errors import ArgumentError, DivergenceError
from energy_prior.prior import JointEBMPrior

UNREADABLE = 3
"""Exit status where some images could not be read."""


def add_command(commands: Any) -> None:
    """Adds the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "score",
        help="anomaly scores of images under a trained prior",
        description="Scores images: the higher, the more unlike the known ones. Writes a table with a row per image: its name, "
        "score and whether it is above the threshold, and of the default score the surprise at each of its terms. The same "
        "command after a kill goes on where it was. Exit status: 0; 2 after an error; 3 if images could not be read, which "
        "have a row without a score.",
        epilog="example: energy-prior score runs/mnist --data photos --out scores.csv, for images in photos/test/; "
        "--data . --split photos for images in photos/",
    )
    add_run(parser)
    parser.add_argument(
        "--data", required=True, metavar="SOURCE", help="folder of images or parquet files, or a set on the hub"
    )
    parser.add_argument("--split", default="test", help="split of it (default: test)")
    parser.add_argument("--out", default="scores.csv", help="table to write, .csv or .parquet (default: scores.csv)")
    parser.add_argument("--method", help="score, as in JointEBMPrior.anomaly_score (default: tails)")
    parser.add_argument(
        "--quantile", default="0.95", help="share of the known images below the threshold, in (0, 1) (default: 0.95)"
    )
    parser.add_argument("--batch-size", default="256", help="images at a time (default: 256)")
    parser.add_argument("--seed", default="0", help="seed of scores that draw (default: 0)")
    parser.add_argument(
        "--as-found",
        action="store_true",
        help="find out what pixels mean, instead of reading them as the run's images were read",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(command=_run, resumes=True)


def score_images(
    prior: JointEBMPrior,
    source: str,
    out: str | os.PathLike[str],
    *,
    split: str = "test",
    method: str | None = None,
    quantile: float = 0.95,
    batch_size: int = 256,
    seed: int = 0,
    **reading: Any,
) -> dict[str, Any]:
    """Scores the images of a split and writes the table; after a kill it goes on where it was.

    Args:
        prior: a prior of images, (channels, height, width).
        source: as for `load_images`. Images are brought to the prior's channels and, if it is square, to its size; those that
            cannot be read, or have no finite score, get a row without one. All images of the split are held in memory.
        out: the table, .csv or .parquet (extra "examples"): columns "name", "score", "flagged", the surprises of "tails", and
            "error". Finished rows are in a file beside it until it is whole.
        split: split of the source.
        method: as for `JointEBMPrior.anomaly_score`.
        quantile: share of the known images that is not flagged; only "tails" has a threshold.
        batch_size: images at a time, ≥ 1.
        seed: of scores that draw.
        **reading: other arguments of `load_images`.

    Returns:
        "images", "unreadable", "flagged" (None without a threshold), "threshold", "method" and "out".

    Raises:
        ArgumentError: if a setting is impossible, or the source has no images.
        OSError: if the table cannot be written.
    """
    target, batch_size = check_path("out", out), check_count("batch_size", batch_size)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"out: there is no folder {os.fspath(target.parent)!r} to write the table to.")
    if target.suffix not in (".csv", ".parquet"):
        raise ArgumentError(f"out: expected a file ending in .csv or .parquet, got {os.fspath(target)!r}.")
    if target.suffix == ".parquet":
        require_extra("pyarrow.parquet", "examples")
    check_makes_images(prior)
    method = method or ("tails" if prior.calibration.is_set else "log_joint")
    threshold = prior.threshold(check_share("quantile", quantile)) if method == "tails" else None
    channels, height, width = prior.x_shape
    size = height if height == width else None
    data = load_images(source, split, size=size, channels=channels, label_column=False, on_error="skip", **reading)
    state = (method, seed, batch_size, data.names, fingerprint(prior.generator))
    part = target.with_name(f".{target.name}.part.jsonl")
    done = _Part(part, digest({**prior.state_dict(), "images": data.images}, repr(state)))
    for first in tqdm(range(0, len(data.images), batch_size), desc="score", unit="batch", disable=None):
        if first < len(done.rows):
            continue
        x = data.images[first : first + batch_size].to(prior.device, prior.dtype)
        names = data.names[first : first + batch_size]
        rng = stream(seed, first)
        done.add(score_rows(prior, x, names, method, rng))
    rows: list[dict[str, Any]] = [*done.rows, *({"name": name, "error": why} for name, why in data.left_out.items())]
    for row in rows:
        score = row.get("score")
        row["flagged"] = None if threshold is None or score is None else score > threshold
    unreadable = sum(bool(row["error"]) for row in rows)
    _write(target, rows)
    part.unlink(missing_ok=True)
    return {
        "images": len(rows),
        "unreadable": unreadable,
        "flagged": None if threshold is None else sum(bool(row["flagged"]) for row in rows),
        "threshold": threshold,
        "method": method,
        "out": os.fspath(target),
    }


def score_rows(
    prior: JointEBMPrior, x: Tensor, names: Sequence[str], method: str, rng: torch.Generator
) -> list[dict[str, Any]]:
    """Rows of a batch; where it has no finite score, of its images one by one."""
    try:
        if method == "tails":
            found = prior.explain(x, rng=rng)
            columns = {"score": found.score, **found.surprises()}
        else:
            columns = {"score": prior.anomaly_score(x, method, rng=rng)}
    except DivergenceError as error:
        if len(x) == 1:
            return [{"name": names[0], "error": str(error)}]
        return [row for i, name in enumerate(names) for row in score_rows(prior, x[i : i + 1], [name], method, rng)]
    values = {name: column.tolist() for name, column in columns.items()}
    return [{"name": n, "error": ""} | {key: column[i] for key, column in values.items()} for i, n in enumerate(names)]


class _Part:
    """Rows that are done, in a file that grows by batches; those of another call are dropped."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self.rows: list[dict[str, Any]] = []
        lines = path.read_text().splitlines() if path.exists() else []
        self._is_new = not lines or lines[0] != key
        whole = []
        for line in [] if self._is_new else lines[1:]:
            try:
                self.rows += json.loads(line)
            except ValueError:  # the last one, cut by a kill
                temporary = path.with_name(f"{path.name}.tmp")
                temporary.write_text("".join(f"{text}\n" for text in (key, *whole)))
                temporary.replace(path)
                break
            whole.append(line)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Rows of a batch."""
        with self._path.open("w" if self._is_new else "a") as file:
            file.write((f"{self._key}\n" if self._is_new else "") + json.dumps(list(rows)) + "\n")
        self._is_new = False
        self.rows += rows


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The table, whole or not at all."""
    names = ["name", "score", "flagged", *(n for n in TERMS if any(n in row for row in rows)), "error"]
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    try:
        if path.suffix == ".parquet":
            pa: Any = require_extra("pyarrow", "examples")
            table = pa.table({name: [row.get(name) for row in rows] for name in names})
            require_extra("pyarrow.parquet", "examples").write_table(table, temporary)
        else:
            with temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
                writer = csv.DictWriter(file, names, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _run(options: argparse.Namespace) -> int:
    """The command."""
    check_device("--device", options.device)
    numbers = numbers_of(options, {"quantile": float, "batch_size": int, "seed": int})
    prior, reading = read_run(options.run, options.factory)
    prior = prior.to(options.device)
    numbers |= {} if options.as_found else reading
    report = score_images(prior, options.data, options.out, split=options.split, method=options.method, **numbers)
    if options.json:
        print(json.dumps(report))
    else:
        above = "" if report["flagged"] is None else f", {report['flagged']} above the threshold {report['threshold']:.3g}"
        print(f"{report['images']} images{above}; scores ({report['method']}) are in {report['out']}")
        if report["unreadable"]:
            print(f"{report['unreadable']} images could not be read or scored: they have a row with the reason and no score")
    return UNREADABLE if report["unreadable"] else 0
