"""Ways of making Langevin steps: one file each, behind one interface, found by looking into this folder.

Every module here without a leading underscore that defines `BACKEND` is a backend. To add one, add a file; any file can be
deleted. All of them do what `energy_prior.langevin.step` does, with the same noise.
"""

from __future__ import annotations

__all__ = ["Backend", "available", "get"]

import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from energy_prior.errors import ArgumentError
from energy_prior.langevin.cost import Cost
from energy_prior.langevin.density import JointDensity
from energy_prior.langevin.noise import NoiseSource, RandomNoise
from energy_prior.langevin.step import Draws, End, Info, State, StepConfig


class Backend(ABC):
    """One way of making the steps of a chain: those of `energy_prior.langevin.step`, which is the reference.

    Its methods may be called by several threads at once.

    Attributes:
        name: what users ask for.
        fallback: name of the backend that takes the chains that this one cannot run; None: it runs every chain.
    """

    name: str
    fallback: str | None = None

    @abstractmethod
    def init(
        self, density: JointDensity, config: StepConfig, position: Sequence[Tensor], step_size: float | Tensor
    ) -> tuple[State, Info]:
        """The chain at its start: what `step.init` does.

        Args:
            density: the target.
            config: static configuration.
            position: the free layers, ascending, in the density's coordinates.
            step_size: s > 0, of all chains, or one per chain, (batch,).
        """

    @abstractmethod
    def step(self, density: JointDensity, config: StepConfig, state: State, draws: Draws) -> tuple[State, Info]:
        """The chain after `draws.steps` steps, at most as many as `span` says: what `step.step` does."""

    @abstractmethod
    def finalize(self, density: JointDensity, config: StepConfig, state: State, draws: Draws) -> tuple[End, Info]:
        """The chain's end after its last `draws.steps` steps, at most as many as `tail` says: what `step.finalize` does."""

    def span(self, density: JointDensity, config: StepConfig, noise: NoiseSource, left: int) -> int:
        """How many of the `left` ≥ 1 next steps one call of `step` makes."""
        return 1

    def tail(self, steps: int) -> int:
        """How many of the last steps of an unmeasured chain of `steps` steps `finalize` makes.

        1 for the reference: nothing needs the density at the last position.
        """
        return 1

    def refusal(self, density: JointDensity, config: StepConfig, noise: NoiseSource | None) -> str | None:
        """In words, why it cannot run such a chain; None if it can.

        Args:
            density: the target, with any number of rows.
            config: static configuration.
            noise: what the user has injected; None: it is that of `noise`.
        """
        return None

    def pays(self, cost: Cost, rows: int, evaluations: int) -> bool:
        """Whether "auto" is to choose it for that many gradient evaluations of a batch of `rows`.

        By counts alone, never by a clock: a call that is repeated makes the same steps again.
        """
        return False

    def workers(self, density: JointDensity, rows: int) -> tuple[int, int]:
        """Into how many parts a batch of `rows` is divided, which run side by side, and the cores of each."""
        return 1, 0

    def noise(self, shapes: Sequence[tuple[int, ...]], like: Tensor) -> NoiseSource:
        """Fresh random numbers for the whole batch: shapes (batch, *shape) of the free layers, dtype and device of `like`."""
        return RandomNoise(shapes, like)

    def prepare(self, density: JointDensity) -> JointDensity:
        """The density of a chain as the calls above take it."""
        return density


def available() -> tuple[str, ...]:
    """Names of the backends that there are."""
    return tuple(_found())


def get(name: str) -> Backend:
    """The backend of this name."""
    if name not in _found():
        raise ArgumentError(f"backend: expected one of {('auto', *available())}, got {name!r}.")
    return _found()[name]


@functools.cache
def _found() -> dict[str, Backend]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    backends: list[Backend] = [module.BACKEND for module in modules if hasattr(module, "BACKEND")]
    return {backend.name: backend for backend in backends}
