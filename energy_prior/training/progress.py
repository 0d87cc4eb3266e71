"""How far a run is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

__all__ = ["Lines", "Progress", "Silent", "progress_bar", "say"]

import sys
import time
from collections.abc import Callable, Mapping
from typing import Protocol, TextIO

from tqdm.auto import tqdm

_SHOWN = ("loss", "elbo", "validation_elbo", "gap", "max_energy", "acceptance", "step_size")
_SECONDS = 10.0


class Progress(Protocol):
    """What shows how far a run is."""

    def advance(self, entry: Mapping[str, float] | None) -> None:
        """One more iteration is done; `entry` is its entry of the history, if it has one."""

    def close(self) -> None:
        """The run has ended."""


def progress_bar(name: str, total: int, done: int, *, shown: bool = True) -> Progress:
    """Shows how far a run is on standard error: a bar on a terminal, else lines, and nothing where there is no such stream.

    Args:
        name: of the run.
        total: iterations of the run.
        done: iterations that an earlier call has done.
        shown: whether to show anything.
    """
    stream = sys.stderr
    if not shown or stream is None or stream.closed:
        return Silent()
    return _Bar(name, total, done) if stream.isatty() else Lines(stream, name, total, done)


def say(line: str, begun: float, *, shown: bool = True) -> None:
    """Writes what a run does beside its iterations to standard error; where that is no terminal, only after 10 s of the run.

    Args:
        line: what it does.
        begun: when the run began, by `time.monotonic`.
        shown: whether to show anything.
    """
    stream = sys.stderr
    if shown and stream is not None and not stream.closed and (stream.isatty() or time.monotonic() - begun >= _SECONDS):
        print(line, file=stream, flush=True)


class Silent:
    """Shows nothing."""

    def advance(self, entry: Mapping[str, float] | None) -> None:
        """Shows nothing."""

    def close(self) -> None:
        """Shows nothing."""


class Lines:
    """A whole line, with the iteration and the last figures, when 10 s have passed since the one before, or since the start.

    Args:
        stream: where lines are written.
        name: of the run.
        total: iterations of the run.
        done: iterations that an earlier call has done.
        clock: seconds that have passed since some moment.
    """

    def __init__(self, stream: TextIO, name: str, total: int, done: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._name, self._total, self._done, self._clock = stream, name, total, done, clock
        self._written = clock()
        self._figures = ""

    def advance(self, entry: Mapping[str, float] | None) -> None:
        """Counts an iteration, and writes a line if it is time for one."""
        self._done += 1
        if entry is not None:
            self._figures = "".join(f", {name} {value}" for name, value in _figures(entry).items())
        now = self._clock()
        if now - self._written >= _SECONDS:
            self._written = now
            print(f"{self._name}: iteration {self._done} of {self._total}{self._figures}", file=self._stream, flush=True)

    def close(self) -> None:
        """Writes nothing more."""


class _Bar:
    def __init__(self, name: str, total: int, done: int) -> None:
        self._bar = tqdm(total=total, initial=done, desc=name)

    def advance(self, entry: Mapping[str, float] | None) -> None:
        self._bar.update()
        if entry is not None:
            self._bar.set_postfix(_figures(entry), refresh=False)

    def close(self) -> None:
        self._bar.close()


def _figures(entry: Mapping[str, float]) -> dict[str, str]:
    """The figures that are shown, as text."""
    return {name: f"{entry[name]:.3g}" for name in _SHOWN if name in entry}
