"""A long chain, thinned: frames of (z, f, acceptance, drift norm) at steps 0, m, 2m and so on."""

from __future__ import annotations

__all__ = ["Frame", "Trajectory"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from energy_prior.langevin.density import JointDensity
from energy_prior.langevin.step import State


class Frame(NamedTuple):
    """One moment of a chain; as in `Trajectory`, without its first dimension."""

    step: int
    latents: tuple[Tensor, ...]
    negative_energy: Tensor
    acceptance: Tensor
    drift_norm: Tensor

    @classmethod
    def of(cls, density: JointDensity, step: int, state: State, acceptance: Tensor) -> Frame:
        """The frame of this state.

        Args:
            density: the chain's target.
            step: number of the step that led there.
            state: measured.
            acceptance: mean acceptance probability since the frame before, (batch,).
        """
        descent = density.topdown.descend(state.position, density.space)
        f = density.energies_of(range(1, len(descent.latents) + 1), state.position, descent)
        return cls(step, descent.latents, f, acceptance, density.drift_norm(state.position, state.gradient))


@dataclass(frozen=True)
class Trajectory:
    """A long Langevin run of the joint prior, thinned.

    Attributes:
        steps: number of the step of each frame, (frames,), whole numbers; the first is 0, the start.
        latents: (z_1, …, z_L), each (frames, batch, *latent_shape).
        negative_energy: f_i(z_i), (frames, batch, L), nats.
        acceptance: mean of min(1, α) over the steps since the frame before, (frames, batch), in [0, 1]: what MALA accepts,
            or would have accepted of an unadjusted chain. 1 at the start, where no step has been made.
        drift_norm: ‖∇ log p̃‖ over all free layers in the chain's space, (frames, batch), nats per unit of z or ε there.

    Examples:
        >>> from energy_prior import load_example
        >>> trajectory = load_example().trajectory(2, steps=10, every=5)
        >>> trajectory.steps
        tensor([ 0,  5, 10])
        >>> [tuple(z.shape) for z in trajectory.latents]
        [(3, 2, 16), (3, 2, 8)]
    """

    steps: Tensor
    latents: tuple[Tensor, ...]
    negative_energy: Tensor
    acceptance: Tensor
    drift_norm: Tensor

    @classmethod
    def of(cls, frames: Sequence[Frame]) -> Trajectory:
        """The trajectory of some moments of one chain.

        Args:
            frames: the moments, in their order.
        """
        steps, latents, energy, acceptance, drift = zip(*frames, strict=True)
        return cls(
            steps=torch.tensor(steps),
            latents=tuple(torch.stack(layer) for layer in zip(*latents, strict=True)),
            negative_energy=torch.stack(energy),
            acceptance=torch.stack(acceptance),
            drift_norm=torch.stack(drift),
        )

    @classmethod
    def joined(cls, parts: Sequence[Trajectory]) -> Trajectory:
        """That of the whole batch, from those of its parts.

        Args:
            parts: trajectories with frames at the same steps.
        """
        if len(parts) == 1:
            return parts[0]
        return cls(
            steps=parts[0].steps,
            latents=tuple(torch.cat(layer, 1) for layer in zip(*(part.latents for part in parts), strict=True)),
            negative_energy=torch.cat([part.negative_energy for part in parts], 1),
            acceptance=torch.cat([part.acceptance for part in parts], 1),
            drift_norm=torch.cat([part.drift_norm for part in parts], 1),
        )
