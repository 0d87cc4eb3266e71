"""Parts side by side in threads: cores, contexts, locks, warnings and errors."""

from __future__ import annotations

import contextvars
import os
import signal
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from energy_prior import BackendWarning, DivergenceError
from energy_prior.errors import warn
from energy_prior.langevin import _threads as threads
from energy_prior.langevin._threads import Halt, side_by_side
from energy_prior.process import exclusive


def test_threads_of_chains_leave_those_of_others_alone() -> None:
    cores = torch.get_num_threads()
    assert side_by_side(3, 1, lambda *_: torch.get_num_threads(), range(6)) == [1] * 6
    with ThreadPoolExecutor(1) as others:
        assert others.submit(torch.get_num_threads).result() == torch.get_num_threads() == cores
    mode = contextvars.ContextVar("mode", default="")
    mode.set("of the caller")
    assert side_by_side(2, 1, lambda *_: mode.get(), range(2)) == ["of the caller"] * 2
    assert side_by_side(2, 1, lambda *_: torch.is_grad_enabled(), range(2)) == [False] * 2


def test_they_never_wait_for_the_lock_of_the_caller() -> None:
    def enters(item: int, halt: Halt) -> int:
        with exclusive():
            return item

    done: list[Any] = []

    def call() -> None:
        with exclusive():
            done.extend(side_by_side(2, 1, enters, range(4)))

    caller = threading.Thread(target=call, daemon=True)
    caller.start()
    caller.join(20)
    assert done == [0, 1, 2, 3]


def test_warnings_point_at_the_line_of_the_user() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        side_by_side(2, 1, lambda *_: warn("from a thread", BackendWarning), range(2))
    assert [w.filename for w in caught] == [__file__] * 2


def test_nothing_runs_on_after_an_error() -> None:
    running: list[int] = []

    def fails_first(n: int, halt: Halt) -> None:
        if not n:
            raise ZeroDivisionError
        running.append(n)
        for step in range(1000):
            time.sleep(0.01)
            if n == 1:
                try:
                    halt.check(step)
                finally:
                    running.remove(n)
        running.remove(n)

    with pytest.raises(ZeroDivisionError):
        side_by_side(2, 1, fails_first, range(2))
    assert not running


def test_the_error_is_that_of_the_earliest_step() -> None:
    """However the threads are timed: those that have not come so far go on until then."""

    def diverges(step: int, halt: Halt) -> int:
        for block in range(64, 1000, 64):
            time.sleep(0.02 if step == 100 else 0.0)
            if step <= block:
                halt.request(block)
                raise DivergenceError("diverged", layer=1, step=step)
            halt.check(block)
        return step

    for steps in ((100, 120, 5000), (120, 100, 5000), (5000, 5000, 120), (400, 100, 64)):
        with pytest.raises(DivergenceError) as error:
            side_by_side(3, 1, diverges, steps)
        assert error.value.step == min(steps)
    assert side_by_side(3, 1, diverges, (5000, 6000)) == [5000, 6000]


def test_threads_that_begin_together_leave_the_cores_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cores, made = torch.get_num_threads(), []

    class Slow(ThreadPoolExecutor):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            made.append(self)
            time.sleep(0.1)
            super().__init__(*arguments, **more)

    monkeypatch.setattr(threads, "ThreadPoolExecutor", Slow)
    threads._pool.cache_clear()
    with ThreadPoolExecutor(8) as callers:
        list(callers.map(lambda _: side_by_side(2, 1, lambda *_: None, range(2)), range(8)))
        assert set(callers.map(lambda _: torch.get_num_threads(), range(64))) == {cores}
    assert torch.get_num_threads() == cores
    assert len(made) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    side_by_side(2, 1, lambda *_: None, range(2))
    child = os.fork()
    if not child:
        signal.alarm(60)  # waiting for threads that are not there would have no end
        os._exit(0 if side_by_side(2, 1, lambda n, _: n, range(2)) == [0, 1] else 1)
    assert os.waitpid(child, 0)[1] == 0
