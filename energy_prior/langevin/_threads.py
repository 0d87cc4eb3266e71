"""Parts of a batch in threads: each with cores of its own, in a copy of the caller's context, and none left running."""

from __future__ import annotations

__all__ = ["Halt", "side_by_side"]

import contextvars
import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from energy_prior.errors import DivergenceError, called_from, origin

_T = TypeVar("_T")
_R = TypeVar("_R")

_starting = threading.Lock()


class Halt:
    """Tells the chains of a batch's other parts that one has failed.

    They go on to the step where it was noticed, so that the error is that of the earliest step, however the threads are timed.
    """

    def __init__(self) -> None:
        self._after = float("inf")
        self._lock = threading.Lock()

    def request(self, after: int = -1) -> None:
        """No chain is to go on for longer than `after` steps; by default none is to go on."""
        with self._lock:
            self._after = min(self._after, after)

    def check(self, step: int) -> None:
        """Raises `CancelledError` in a chain that need not go on after this step."""
        if step >= self._after:
            raise CancelledError


def side_by_side(workers: int, threads: int, function: Callable[[_T, Halt], _R], items: Sequence[_T]) -> list[_R]:
    """`function` of each item, without gradients, `workers` at a time with `threads` cores each.

    They run in copies of the caller's context, so they do not wait for a lock that it holds. Whatever is raised, here or
    there: nothing of it still runs afterwards.

    Raises:
        DivergenceError: that of the earliest step, if several parts raise one; else the first item's error.
    """
    halt, at = Halt(), called_from()

    def call(item: _T) -> _R:
        origin.set(at)
        try:
            halt.check(0)
            with torch.no_grad():
                return function(item, halt)
        except (DivergenceError, CancelledError):
            raise  # the chain that diverged has said where the others may stop
        except BaseException:
            halt.request()
            raise

    with _starting:
        pool = _pool(workers, threads)
    futures: list[Future[_R]] = []
    try:
        # torch keeps the settings of its compiler in contexts
        futures += [pool.submit(contextvars.copy_context().run, call, item) for item in items]
        wait(futures)
    finally:
        halt.request()
        for future in futures:
            future.cancel()
        wait(futures)
    errors = [error for future in futures if (error := future.exception()) and not isinstance(error, CancelledError)]
    if errors:
        raise min(errors, key=_step)
    return [future.result() for future in futures]


def _step(error: BaseException) -> float:
    """Of a divergence; other errors come first."""
    return -1.0 if not isinstance(error, DivergenceError) or error.step is None else error.step


@functools.cache
def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """Kept for the process; threads that come later have as many cores as before."""
    cores, all_there = torch.get_num_threads(), threading.Barrier(workers + 1)

    def settle() -> None:
        torch.set_num_threads(threads)
        torch.get_num_threads()  # a thread takes the newest setting of any thread when it is first asked
        all_there.wait()

    pool = ThreadPoolExecutor(workers, "energy-prior", initializer=settle)
    try:
        for _ in range(workers):
            pool.submit(torch.get_num_threads)
        all_there.wait()
    except BaseException:
        all_there.abort()
        raise
    finally:
        torch.set_num_threads(cores)
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of the threads
