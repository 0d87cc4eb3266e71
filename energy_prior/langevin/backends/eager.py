"""The reference, operation by operation."""

from __future__ import annotations

__all__ = ["BACKEND", "Eager"]

from collections.abc import Sequence

from torch import Tensor

from energy_prior.langevin import step as reference
from energy_prior.langevin.backends import Backend
from energy_prior.langevin.density import JointDensity
from energy_prior.langevin.step import Draws, End, Info, State, StepConfig, per_chain


class Eager(Backend):
    """`energy_prior.langevin.step` as it is, one step in a call."""

    name: str = "eager"

    def init(
        self, density: JointDensity, config: StepConfig, position: Sequence[Tensor], step_size: float | Tensor
    ) -> tuple[State, Info]:
        return reference.init(density, config, position, per_chain(step_size, position))

    def step(self, density: JointDensity, config: StepConfig, state: State, draws: Draws) -> tuple[State, Info]:
        return reference.step(density, config, state, draws.each(config))

    def finalize(self, density: JointDensity, config: StepConfig, state: State, draws: Draws) -> tuple[End, Info]:
        return reference.finalize(density, config, state, draws.each(config))


BACKEND = Eager()
