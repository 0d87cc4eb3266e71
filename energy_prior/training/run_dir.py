"""The folder of a run: checkpoints of everything that a run needs to go on exactly where it was."""

from __future__ import annotations

__all__ = ["RunFolder"]

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from energy_prior._util import shortened, shown
from energy_prior.checkpoint import RUN, canonical_name, read_checkpoint, write_checkpoint
from energy_prior.checks.settings import check_path
from energy_prior.errors import ArgumentError, CheckpointError
from energy_prior.training.distributed import Engine
from energy_prior.training.state import unlike

_KEPT = 2


class RunFolder:
    """`path`/checkpoint-<iteration>/rank<r>.safetensors: tensors, with everything else as JSON in the header, and a digest.

    A checkpoint is written into a hidden folder, then renamed: there are only whole ones, whenever the run is killed. The
    last two are kept.

    Args:
        path: folder of the run; made if it is not there; `~` is the home folder.
        engine: the processes of the run, each of which writes its own file.
        identity: what a run must keep to go on (settings, data, model), JSON-able and flat.
    """

    def __init__(self, path: str | os.PathLike[str], engine: Engine, identity: dict[str, Any]) -> None:
        self.path: Path = check_path("run_dir", path)
        self._engine = engine
        self._identity = json.loads(json.dumps(identity | {"processes": engine.world}))
        if self.path.exists() and not self.path.is_dir():
            raise ArgumentError(f"run_dir: expected a folder, but {str(self.path)!r} is a file.")
        self.path.mkdir(parents=True, exist_ok=True)
        self._check_shared()

    @contextlib.contextmanager
    def held(self) -> Generator[None]:
        """Keeps other runs out of the folder; the operating system gives it back if the run is killed.

        Raises:
            ArgumentError: if another run holds it.
        """
        with _opened(self.path) as folder:
            free = not self._engine.main or _lock(folder)
            if not all(self._engine.objects(free)):
                raise ArgumentError(
                    f"run_dir: another run is writing to {str(self.path)!r}. Wait for it, or name another folder."
                )
            if self._engine.main:
                for left in self.path.glob(".checkpoint-*"):  # of a run that was killed while it wrote
                    shutil.rmtree(left, ignore_errors=True)
            self._engine.wait()
            yield

    def _check_shared(self) -> None:
        """Several processes, on several hosts perhaps, must see one folder: a checkpoint is made of all their parts."""
        if self._engine.world == 1:
            return
        token = self.path / f".seen-{self._engine.objects(secrets.token_hex(8))[0]}"
        if self._engine.main:
            token.touch()
        self._engine.wait()
        seen = self._engine.objects(token.exists())
        if self._engine.main:
            token.unlink()
        if not all(seen):
            raise ArgumentError(
                f"run_dir: process {seen.index(False)} does not see what process 0 writes to {str(self.path)!r}. Name a folder "
                "on a file system that all hosts share."
            )

    def save(self, iteration: int, state: dict[str, Any]) -> None:
        """Writes a checkpoint, whole or not at all, and drops those before the last two.

        Raises:
            OSError: if it cannot be written; the one before is whole.
        """
        final = self.path / _folder_name(iteration)
        hidden = self.path / f".{final.name}"
        hidden.mkdir(exist_ok=True)
        failure: OSError | None = None
        tensors: dict[str, Tensor] = {}
        document = {"iteration": iteration, "identity": self._identity, "state": _pack(state, "", tensors)}
        try:
            write_checkpoint(hidden / f"rank{self._engine.rank}.safetensors", tensors, document, RUN)
        except OSError as error:
            failure = error
        whole = all(self._engine.objects(failure is None))
        if not whole and self._engine.main:
            shutil.rmtree(hidden, ignore_errors=True)
        if failure is not None:
            raise failure
        if not whole:
            raise OSError(f"Another process could not write its part of the checkpoint {final.name}; the one before is whole.")
        if self._engine.main:
            if final.exists():
                shutil.rmtree(final)
            hidden.rename(final)
            for old in self._checkpoints()[:-_KEPT]:
                shutil.rmtree(old, ignore_errors=True)
        self._engine.wait()

    def load(self, device: torch.device, like: Any) -> tuple[int, dict[str, Any]] | None:
        """Iteration and state of the last checkpoint, or None if there is none yet.

        Args:
            device: where its tensors go.
            like: the pattern of a state that this run can go on from, as for `unlike`.

        Raises:
            ArgumentError: if it is of a run with other settings, data or model; the message says which.
            CheckpointError: if its file was damaged since, or holds something else.
        """
        checkpoints = self._checkpoints()
        self._engine.agree("run_dir", [c.name for c in checkpoints])
        if not checkpoints:
            return None
        folder = checkpoints[-1]
        file = folder / f"rank{self._engine.rank}.safetensors"
        self._check_processes(folder, file)
        remedy = (
            f"Delete the folder {folder.name} to go on from the checkpoint before it, or name another run_dir to begin anew."
        )
        remedy = remedy if len(checkpoints) > 1 else RUN.remedy
        tensors, document = read_checkpoint(file, RUN, remedy)
        identity, iteration, packed = (document.get(name) for name in ("identity", "iteration", "state"))
        fault = None if isinstance(identity, dict) else "it does not say of which run it is"
        if isinstance(identity, dict):
            self._check_identity(identity)
        if not isinstance(iteration, int) or folder.name != _folder_name(iteration):
            fault = f"it says that it was written after iteration {shown(iteration)}"
        state = None
        try:
            state = _unpack(packed, {name: t.to(device) for name, t in tensors.items()}) if fault is None else None
            fault = fault or unlike(state, like)
        except (ValueError, RecursionError) as error:
            fault = f"its state cannot be put together ({shortened(str(error))})"
        if fault is not None or not isinstance(iteration, int) or state is None:
            raise CheckpointError(f"{str(file)!r} is damaged, or not of this run: {fault}. {remedy}")
        return iteration, state

    def _check_identity(self, identity: dict[str, Any]) -> None:
        """Raises `ArgumentError` if a checkpoint is of another run."""
        changed = [name for name in self._identity | identity if identity.get(name) != self._identity.get(name)]
        if changed:
            was = {name: shown(identity.get(name)) for name in changed[:4]}
            now = {name: shown(self._identity.get(name)) for name in was}
            what = "; ".join(f"{shortened(name)} was {old}, now {now[name]}" for name, old in was.items())
            raise ArgumentError(
                f"run_dir: {str(self.path)!r} holds a run that cannot go on like this: {what}. Use the same settings, data and "
                "model, or name another run_dir to begin anew."
            )

    def _check_processes(self, checkpoint: Path, own: Path) -> None:
        files = len(list(checkpoint.glob("rank*.safetensors")))
        if files == 0 or (files == self._engine.world and not own.is_file()):
            raise CheckpointError(
                f"{str(checkpoint)!r} lacks the file of a process, {own.name}: it is damaged. Delete it, to go on from the "
                "checkpoint before it if there is one."
            )
        if files != self._engine.world:
            raise ArgumentError(
                f"run_dir: the run in {str(self.path)!r} has {files} processes, and can only go on with as many; got "
                f"{self._engine.world}."
            )

    def _checkpoints(self) -> list[Path]:
        return sorted(p for p in self.path.glob("checkpoint-*") if p.is_dir())


@contextlib.contextmanager
def _opened(folder: Path) -> Generator[int | None]:
    """The folder as an open file, or None where there is no such thing (Windows)."""
    try:
        file = os.open(folder, os.O_RDONLY)
    except OSError:
        yield None
        return
    try:
        yield file
    finally:
        os.close(file)


def _lock(file: int | None) -> bool:
    """Whether nobody else holds this file; it is held from now on, as long as it is open."""
    if file is None:
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system that knows no locks
        return True
    return True


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Nested dicts and lists with every tensor moved to `tensors` and its name put in its place."""
    if isinstance(value, Tensor):
        tensors[name] = value  # which `write_checkpoint` copies, under its canonical name
        return {"tensor": canonical_name(name)}
    if isinstance(value, dict):
        return {"dict": {key: _pack(item, f"{name}/{key}", tensors) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        return {"list": [_pack(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]}
    return {"value": value}


def _unpack(packed: Any, tensors: dict[str, Tensor]) -> Any:
    """What `_pack` packed.

    Raises:
        ValueError: if it is nothing that `_pack` gives.
    """
    kind, content = next(iter(packed.items())) if isinstance(packed, dict) and len(packed) == 1 else ("", None)
    if kind == "tensor" and isinstance(content, str) and content in tensors:
        return tensors[content]
    if kind == "dict" and isinstance(content, dict):
        return {key: _unpack(item, tensors) for key, item in content.items()}
    if kind == "list" and isinstance(content, list):
        return [_unpack(item, tensors) for item in content]
    if kind == "value" and not isinstance(content, dict | list):
        return content
    raise ValueError(f"{shown(packed)} is no part of a state")


def _folder_name(iteration: int) -> str:
    return f"checkpoint-{iteration:08d}"
