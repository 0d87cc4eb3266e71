"""How far a run is: a bar on a terminal, a line every 10 s elsewhere, nothing where there is no stream."""

from __future__ import annotations

import io
import sys

import pytest
from runs import X, make

from energy_prior.training import progress
from energy_prior.training.progress import Lines, Silent, progress_bar, say


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_line_every_ten_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    lines = Lines(stream, "fit (nce)", 1000, 0, clock)
    for second in range(1, 36):  # ten iterations a second
        for tenth in range(10):
            clock.now = 100 + second - 1 + tenth / 10
            lines.advance({"iteration": 1.0, "loss": 1.25 - second / 100, "else": 3.0} if tenth == 0 else None)
    lines.close()
    assert stream.getvalue().splitlines() == [
        "fit (nce): iteration 101 of 1000, loss 1.14",
        "fit (nce): iteration 201 of 1000, loss 1.04",
        "fit (nce): iteration 301 of 1000, loss 0.94",
    ]
    assert stream.getvalue().endswith("\n")


def test_lines_of_a_run_that_goes_on() -> None:
    stream, clock = io.StringIO(), Clock()
    lines = Lines(stream, "fit", 50, 40, clock)
    clock.now += 11
    lines.advance(None)
    assert stream.getvalue() == "fit: iteration 41 of 50\n"


def test_a_short_run_writes_nothing_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    make().fit(X, iterations=3, step_size=0.3)
    assert stream.getvalue() == ""


def test_a_long_run_writes_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every iteration took six seconds."""
    stream, clock = io.StringIO(), Clock()

    def slow() -> float:
        clock.now += 6
        return clock.now

    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "Lines", lambda *a: Lines(*a, clock=slow))
    make().fit(X, iterations=5, step_size=0.3, log_every=1)
    written = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in written] == ["fit (nce): iteration 2 of 5", "fit (nce): iteration 4 of 5"]
    assert "loss" in written[0]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    make().fit(X, iterations=3, step_size=0.3)
    assert "fit (nce)" in stream.getvalue()
    assert "3/3" in stream.getvalue()
    assert "loss=" in stream.getvalue()


@pytest.mark.parametrize("stream", [None, "closed"])
def test_nothing_where_there_is_no_stream(stream: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", None if stream is None else closed)
    make().fit(X, iterations=3, step_size=0.3)
    assert isinstance(progress_bar("fit", 3, 0), Silent)


def test_nothing_where_none_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    make().fit(X, iterations=3, step_size=0.3, progress=False)
    assert stream.getvalue() == ""


def test_what_a_run_does_beside_its_iterations_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    for stream, begun, shown, said in (
        (Terminal(), 100.0, True, "tuning\n"),
        (Terminal(), 100.0, False, ""),
        (io.StringIO(), 91.0, True, ""),
        (io.StringIO(), 89.0, True, "tuning\n"),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        say("tuning", begun, shown=shown)
        assert stream.getvalue() == said
    monkeypatch.setattr(sys, "stderr", None)
    say("tuning", 0.0)


def test_a_fit_on_a_terminal_says_what_follows_its_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    make().fit(X, "nce", iterations=3)
    assert stream.getvalue().endswith("fit (nce): tuning the step size\n")
    make().fit(X, "nce", iterations=3, step_size=0.3)
    assert stream.getvalue().count("tuning") == 1, "a fixed step is not tuned"
