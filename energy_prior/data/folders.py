"""Folders of images, listed by explicit paths: no name means more than itself."""

from __future__ import annotations

__all__ = ["FolderSource", "has_images", "shards"]

import errno
import functools
import itertools
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from energy_prior._util import some_of
from energy_prior.checks.settings import require_extra
from energy_prior.data.rows import Row
from energy_prior.errors import ArgumentError

_STUBS = ("BUFR", "GRIB", "HDF5", "MPEG")  # formats that Pillow can name but not read
_NUMBERED = re.compile(r"-(\d+)-of-(\d+)")
_LOOKED_AT = 1000


class FolderSource:
    """Images in a folder per split; the first folder below the split is the class, whatever lies deeper.

    Names that begin with a dot and `__MACOSX` are no part of it. Linked folders are followed, each once. What is left out for
    another reason is counted and named in `left_out`. The order is a fixed permutation of the sorted names, the same on every
    machine: sorted, a folder per class would put whole classes at either end.

    Args:
        folder: of the split.
        labelled: whether the folders are classes.

    Raises:
        ArgumentError: if images lie loose beside folders of classes, a folder cannot be listed, or there is no image.
    """

    def __init__(self, folder: Path, *, labelled: bool) -> None:
        found = _Listing(folder)
        self.left_out: str = found.reasons()
        if not found.files:
            raise ArgumentError(f"source: expected images in {str(folder)!r}, got none. {self.left_out}".rstrip())
        classes = sorted({path[0] for path in found.folders}, key=_sorting)
        loose = [path for path in found.files if len(path) == 1]
        if loose and len(loose) < len(found.files):
            raise ArgumentError(
                f"source: {len(loose)} images lie in {str(folder)!r} beside folders of classes, such as {loose[0][0]!r}. Move "
                "them into the folder of their class, or out of it."
            )
        order = torch.randperm(len(found.files), generator=torch.Generator().manual_seed(0), device="cpu").tolist()
        self._folder, self._files = folder, [found.files[i] for i in order]
        self.has_labels: bool = labelled and not loose
        self.classes: Sequence[str] | None = classes if self.has_labels else None
        self._numbers = {name: i for i, name in enumerate(classes)}

    def __iter__(self) -> Iterator[Row]:
        """All images, as paths."""
        for parts in self._files:
            label = self._numbers[parts[0]] if self.has_labels else None
            yield Row("/".join(parts), self._folder.joinpath(*parts), label)

    def first_part(self) -> Iterator[Row]:
        """The first thousand."""
        return itertools.islice(self, _LOOKED_AT)


def has_images(folder: Path) -> bool:
    """Whether a folder of a split has anything that may be an image."""
    return folder.is_dir() and bool(_Listing(folder).files)


def shards(folder: Path, split: str) -> list[Path]:
    """The parquet files of a split: `split.parquet`, `split-….parquet`, or `split-NUMBER-of-TOTAL….parquet`, sorted.

    Raises:
        ArgumentError: if they are of more than one set, or those that say their number are not all there, once each.
    """
    names = [e.name for e in _entries(folder) if e.name.endswith(".parquet") and not e.name.startswith(".")]
    own = [name for name in names if name == f"{split}.parquet" or name.startswith(f"{split}-")]
    between = {name: _NUMBERED.search(name.removeprefix(split)) for name in own}
    # "train-clean-00000-of-00001.parquet" is a shard of the split "train-clean"
    own = [name for name in own if (m := between[name]) is None or m.start() == 0]
    numbered = {name: (int(m[1]), int(m[2])) for name in own if (m := between[name])}
    totals = {total for _, total in numbered.values()}
    if numbered and (len(numbered) < len(own) or len(totals) > 1):
        raise ArgumentError(
            f"source: the files of split {split!r} in {str(folder)!r} belong to different sets: {some_of(own)}. Leave those of "
            "one set there."
        )
    if numbered:
        total, there = totals.pop(), sorted(number for number, _ in numbered.values())
        twice = next((number for number, after in itertools.pairwise(there) if number == after), None)
        if twice is not None:
            copies = [name for name, (number, _) in numbered.items() if number == twice]
            raise ArgumentError(f"source: {some_of(copies)} in {str(folder)!r} have the same number. Leave one of them there.")
        first = 1 if there[-1] == total else 0
        if len(there) != total or there[0] != first:
            missing = next(i for i in itertools.count(first) if i not in there)
            raise ArgumentError(
                f"source: split {split!r} in {str(folder)!r} has {len(there)} of its {total} files; number {missing} is "
                "missing. Download it again."
            )
    return [folder / name for name in own]


class _Listing:
    """The image files below a folder, sorted, as the parts of their paths, and what was left out and why."""

    def __init__(self, folder: Path) -> None:
        self.files: list[tuple[str, ...]] = []
        self.folders: list[tuple[str, ...]] = []
        self.left_out: dict[str, list[str]] = {}
        self._root = os.path.realpath(folder)
        self._seen: set[str] = set()  # folders elsewhere that links have led to
        self._walk(folder, ())

    def _walk(self, folder: Path, parts: tuple[str, ...]) -> None:
        for entry in _entries(folder):
            inner = (*parts, entry.name)
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            kind = _kind(entry.path)
            if kind == "folder":
                real = os.path.realpath(entry.path)
                if entry.is_symlink() and (real in self._seen or f"{real}/".startswith(f"{self._root}/") or self._holds(real)):
                    self._leave_out("a link to a folder that is read already", inner)
                    continue
                self._seen.add(real)
                self.folders.append(inner)
                self._walk(Path(entry.path), inner)
            elif kind != "file":
                self._leave_out(kind, inner)
            elif os.path.splitext(entry.name)[1].lower() not in _suffixes():
                self._leave_out("no suffix of an image", inner)
            else:
                self.files.append(inner)

    def _holds(self, real: str) -> bool:
        """Whether the folder of the split lies in this one: the way would lead round in a circle."""
        return f"{self._root}/".startswith(f"{real}/")

    def _leave_out(self, why: str, parts: tuple[str, ...]) -> None:
        self.left_out.setdefault(why, []).append("/".join(parts))

    def reasons(self) -> str:
        """What was left out: "no suffix of an image: 2 (a.txt, b.txt)"; empty if nothing was."""
        return "; ".join(f"{why}: {len(names)} ({some_of(names)})" for why, names in self.left_out.items())


def _kind(path: str) -> str:
    """What a path is: "folder", "file", or in words why it is neither.

    Raises:
        ArgumentError: if that cannot be seen.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "a link to nothing"
    except PermissionError as error:
        raise ArgumentError(f"source: {path!r} cannot be read ({error.strerror}). Change its permissions.") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a link to nothing"
        raise ArgumentError(f"source: {path!r} cannot be read ({error.strerror}).") from error
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "no regular file"


def _entries(folder: Path) -> list[Any]:
    """What a folder has, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: _sorting(entry.name))
    except OSError as error:
        raise ArgumentError(f"source: the folder {str(folder)!r} cannot be listed ({error.strerror}).") from error


def _sorting(name: str) -> tuple[str, str]:
    """Names in one order on every machine, however their accents are stored."""
    return unicodedata.normalize("NFC", name), name


@functools.lru_cache(maxsize=1)
def _suffixes() -> frozenset[str]:
    """Suffixes of the formats that Pillow can read, in small letters."""
    image = require_extra("PIL.Image", "examples")
    known = image.registered_extensions()
    return frozenset(suffix for suffix, kind in known.items() if kind in image.OPEN and kind not in _STUBS)
