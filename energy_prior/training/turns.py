"""A run shares the process with other calls: it computes in turns, each with the lock and with the run's random stream."""

from __future__ import annotations

__all__ = ["Turns", "being_trained", "plain_gradients", "same_stream_after"]

import contextlib
import os
from collections.abc import Generator, Iterable

import torch
from torch import nn

from energy_prior.errors import ArgumentError
from energy_prior.process import (
    RandomStream,
    exclusive,
    full_precision,
    random_state,
    seed_from,
    set_random_state,
    unvalidated,
)
from energy_prior.training.distributed import Engine

_in_training: set[tuple[int, int]] = set()  # (process, id of a parameter that a run trains)


class Turns:
    """The turns of one run. Between two of them calls of other threads run, and do not change what the run draws.

    The run draws from a stream of its own if `rng` is given or if there are several processes (one stream for each of
    them), else from torch's global stream.

    Args:
        engine: the processes of the run.
        rng: random number generator that seeds the run; None: torch's global stream does.
        device: where numbers are drawn, beside the CPU.

    Attributes:
        seed: of the order of the data, the same in every process.
    """

    def __init__(self, engine: Engine, rng: torch.Generator | None, device: torch.device) -> None:
        with exclusive():  # a stream is made with the help of torch's global one
            self._stream = RandomStream(None if rng is None else seed_from(rng), device)
            with self._stream.active():
                self.seed: int = engine.objects(int(torch.randint(2**62, (), device="cpu")))[0]
                seeds = torch.randint(2**62, (engine.world,), device="cpu").tolist() if engine.world > 1 else []
            if engine.world > 1:
                self._stream = RandomStream(engine.objects(seeds)[0][engine.rank], device)

    @contextlib.contextmanager
    def turn(self) -> Generator[None]:
        """Inside, no other public call runs, torch.distributions checks nothing, and torch draws from the run's stream."""
        with exclusive(), unvalidated(), self._stream.active():
            yield


@contextlib.contextmanager
def being_trained(what: str, parameters: Iterable[nn.Parameter]) -> Generator[None]:
    """Inside, no other run may train any of these parameters.

    Args:
        what: the argument that they belong to, for the message.
        parameters: those that the run trains.

    Raises:
        ArgumentError: if another run trains one of them.
    """
    mine = {(os.getpid(), id(p)) for p in parameters}
    with exclusive():
        if mine & _in_training:
            raise ArgumentError(
                f"{what}: another run of training has not ended that trains these parameters too, in another thread or around "
                "this callback. Wait until it has ended, or train a copy."
            )
        _in_training.update(mine)
    try:
        yield
    finally:
        with exclusive():
            _in_training.difference_update(mine)


@contextlib.contextmanager
def plain_gradients(device: torch.device) -> Generator[None]:
    """Inside, gradients are on and autocast is off, whatever the caller has set; for this thread only.

    Args:
        device: where the model is.
    """
    with torch.inference_mode(False), torch.enable_grad(), full_precision(device):
        try:
            yield
        finally:
            torch.clear_autocast_cache()  # an autocast of the caller's keeps bf16 copies of weights, which are old now


@contextlib.contextmanager
def same_stream_after(device: torch.device) -> Generator[None]:
    """What is drawn inside does not show in what is drawn after."""
    before = random_state(device)
    try:
        yield
    finally:
        set_random_state(before, device)
