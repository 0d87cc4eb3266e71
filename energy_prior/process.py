"""What public calls change in the process while they run, and put back: module flags, random streams, torch's own switches.

Public calls may come from several threads. Whatever they change is shared by all of them, so one lock lets one of them at a
time through (`exclusive`); training holds it for one iteration at a time.
"""

from __future__ import annotations

__all__ = [
    "RandomStream",
    "claimed",
    "evaluating",
    "exclusive",
    "frozen",
    "full_precision",
    "random_state",
    "reproducible",
    "seed_from",
    "set_random_state",
    "training_mode",
    "unvalidated",
]

import contextlib
import os
import threading
from collections.abc import Generator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from energy_prior.errors import ArgumentError


class _Hold:
    """A public call that holds the lock; `active` until it gives it back."""

    active = True


_lock = threading.RLock()
_turnstile = threading.Lock()  # held by the thread that is next: one that has just given the lock back cannot overtake it
_hold: ContextVar[_Hold | None] = ContextVar("energy_prior_hold", default=None)
_claims: dict[int, int] = {}  # id of a torch.Generator in use -> the thread whose call uses it
_claiming = threading.Lock()


@contextlib.contextmanager
def exclusive() -> Generator[None]:
    """Inside, no other public call runs. Calls are let in roughly in the order in which they came.

    Re-entrant, also for threads that work for this call in a copy of its context: they never wait for it.
    """
    outer = _hold.get()
    if outer is not None and outer.active:
        yield
        return
    lock = _lock  # a process that is forked inside gets new ones
    with contextlib.nullcontext() if lock._is_owned() else _turnstile:  # type: ignore[attr-defined]
        lock.acquire()
    try:
        hold = _Hold()
        token = _hold.set(hold)
        try:
            yield
        finally:
            hold.active = False
            _hold.reset(token)
    finally:
        lock.release()


def _after_fork() -> None:
    """A forked process has none of the threads that may hold these."""
    global _lock, _turnstile, _claiming
    _lock, _turnstile, _claiming = threading.RLock(), threading.Lock(), threading.Lock()
    _claims.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# ----------------------------------------------------------------------------------------------------------- random streams


@contextlib.contextmanager
def claimed(rng: torch.Generator | None) -> Generator[None]:
    """Inside, no other thread's call may use `rng`.

    Raises:
        ArgumentError: if it is no `torch.Generator`, or if a call of another thread uses it.
    """
    if rng is None:
        yield
        return
    if not isinstance(rng, torch.Generator):
        raise ArgumentError(f"rng: expected a torch.Generator or None, got {type(rng).__name__}.")
    here = threading.get_ident()
    with _claiming:
        nested = id(rng) in _claims
        owner = _claims.setdefault(id(rng), here)
    if owner != here:
        raise ArgumentError(
            "rng: another thread's call uses this torch.Generator now, so neither would be reproducible. Give every call a "
            "generator of its own."
        )
    try:
        yield
    finally:
        if not nested:
            with _claiming:
                _claims.pop(id(rng), None)


class RandomStream:
    """A stream of torch's random numbers that stands beside the global ones.

    Args:
        seed: of the stream; None: it is the global streams as they are.
        device: where numbers are drawn, beside the CPU.

    Raises:
        ArgumentError: if devices of this type have no stream that can be seeded.
    """

    def __init__(self, seed: int | None, device: torch.device) -> None:
        self._device, self._state = device, None
        if seed is not None:
            outer = random_state(device)
            try:
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every device
                _seed_device(seed, device)
                self._state = random_state(device)
            finally:
                set_random_state(outer, device)

    @contextlib.contextmanager
    def active(self) -> Generator[None]:
        """Inside, torch draws from this stream, which goes on where it stood; the global streams are put back on exit."""
        if self._state is None:
            yield
            return
        outer = random_state(self._device)
        set_random_state(self._state, self._device)
        try:
            yield
        finally:
            self._state = random_state(self._device)
            set_random_state(outer, self._device)


@contextlib.contextmanager
def reproducible(rng: torch.Generator | None, device: torch.device) -> Generator[None]:
    """Everything inside draws from a stream seeded by `rng`; torch's global streams are left as they were.

    With `rng` None the code inside draws from the global streams. Public methods open this once, so that all the code
    below them, the user's `infer` and distributions included, obeys `rng` without passing it on.
    """
    with claimed(rng):
        if rng is None:
            yield
            return
        with exclusive(), RandomStream(seed_from(rng), device).active():
            yield


def seed_from(rng: torch.Generator) -> int:
    """A seed drawn from `rng`."""
    return int(torch.randint(2**62, (), generator=rng, device=rng.device))


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's global stream on the CPU, and on `device` if that is another."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = _device_call(device, "get_rng_state")
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Puts a `random_state` back."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type in state and device.type != "cpu":
        _device_call(device, "set_rng_state", state[device.type].cpu())


def _seed_device(seed: int, device: torch.device) -> None:
    if device.type == "cpu":
        return
    module: Any = torch.get_device_module(device)
    with module.device(device) if hasattr(module, "device") else contextlib.nullcontext():
        module.manual_seed(seed)


def _device_call(device: torch.device, name: str, *arguments: Any) -> Any:
    """A function of the device's module; those of devices that come one to a machine (mps) take no device."""
    try:
        module: Any = torch.get_device_module(device)
        function = getattr(module, name)
    except (RuntimeError, AttributeError):
        raise ArgumentError(
            f"rng: devices of type {device.type!r} have no random stream that can be seeded. Leave rng out, or use another "
            "device."
        ) from None
    return function(*arguments) if device.type == "mps" else function(*arguments, device)


# ----------------------------------------------------------------------------------------------------- modules and switches


@contextlib.contextmanager
def unvalidated() -> Generator[None]:
    """No checks inside torch.distributions, which would sync with the host at every construction; restored on exit."""
    with exclusive():
        validate = Distribution._validate_args  # pyright: ignore[reportPrivateUsage]
        try:
            Distribution.set_default_validate_args(False)
            yield
        finally:
            Distribution.set_default_validate_args(validate)


def full_precision(device: torch.device) -> torch.autocast:
    """Inside, no autocast: densities of hundreds of nats and their differences do not fit in bf16."""
    return torch.autocast(device.type, enabled=False)


@contextlib.contextmanager
def evaluating(*modules: Any) -> Generator[None]:
    """Evaluation mode and no per-call distribution checks; both restored on exit, also after an error."""
    with exclusive(), _evaluating(_parts(modules)), unvalidated():
        yield


@contextlib.contextmanager
def training_mode(module: nn.Module) -> Generator[None]:
    """Training mode; every part's own flag is restored on exit, also after an error."""
    with exclusive():
        parts = list(module.modules())
        before = [part.training for part in parts]
        module.train()
    try:
        yield
    finally:
        with exclusive():
            for part, flag in zip(parts, before, strict=True):
                if part.training != flag:
                    part.training = flag


@contextlib.contextmanager
def frozen(*modules: Any) -> Generator[None]:
    """`evaluating`, and no parameter takes part in autograd; all restored on exit, also after an error."""
    with exclusive():
        parts = _parts(modules)
        own = [part._parameters for part in parts]  # pyright: ignore[reportPrivateUsage]
        parameters = [p for held in own for p in held.values() if p is not None]
        with _evaluating(parts), unvalidated(), _restored(parameters, "requires_grad"):
            for p in parameters:
                if p.requires_grad:
                    p.requires_grad_(False)
            yield


def _parts(modules: Sequence[Any]) -> list[nn.Module]:
    """All modules inside of these, those that are none left out."""
    return [part for module in modules if isinstance(module, nn.Module) for part in module.modules()]


@contextlib.contextmanager
def _evaluating(parts: Sequence[nn.Module]) -> Generator[None]:
    with _restored(parts, "training"):
        for part in parts:
            if part.training:  # writing to a module is slow, and a deep model has hundreds
                part.training = False
        yield


@contextlib.contextmanager
def _restored(things: Sequence[Any], flag: str) -> Generator[None]:
    """Puts a flag back to what it was, also after an error."""
    before = [getattr(thing, flag) for thing in things]
    try:
        yield
    finally:
        for thing, value in zip(things, before, strict=True):
            if getattr(thing, flag) != value:
                setattr(thing, flag, value)
