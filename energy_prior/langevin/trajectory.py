"""A long chain, thinned: frames of (z, f, acceptance, drift norm) at steps 0, m, 2m and so on."""

from __future__ import annotations

__all__ = ["Trajectory", "TrajectoryRecorder"]

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from energy_prior.langevin.density import ChainState, JointDensity, latents_at


@dataclass(frozen=True)
class Trajectory:
    """A long Langevin run of the joint prior, thinned.

    Attributes:
        steps: number of the step of each frame, (frames,); the first is 0, the start.
        latents: (z_1, …, z_L), each (frames, batch, *latent_shape).
        negative_energy: f_i(z_i), (frames, batch, L), nats.
        acceptance: mean of min(1, α) over the steps since the frame before, (frames, batch), in [0, 1]: what MALA accepts,
            or would have accepted of an unadjusted chain. 1 at the start, where no step has been made.
        drift_norm: ‖∇ log p̃‖ over all free layers in the chain's space, (frames, batch).
    """

    steps: Tensor
    latents: tuple[Tensor, ...]
    negative_energy: Tensor
    acceptance: Tensor
    drift_norm: Tensor


class TrajectoryRecorder:
    """A step callback that keeps every state that it is called with.

    Args:
        parts: the chain's target, by parts of the batch.
    """

    def __init__(self, parts: Sequence[JointDensity]) -> None:
        self._parts = parts
        self._frames: list[tuple[int, tuple[Tensor, ...], Tensor, Tensor, Tensor]] = []

    def __call__(self, step: int, state: ChainState, acceptance: Tensor) -> None:
        """Takes one frame in."""
        latents = latents_at(self._parts, state.position)
        energy = torch.stack([f(z) for f, z in zip(self._parts[0].energies, latents, strict=True)], dim=1)
        self._frames.append((step, latents, energy, acceptance, self._parts[0].drift_norm(state)))

    def trajectory(self) -> Trajectory:
        """The frames so far."""
        steps, latents, energy, acceptance, drift = zip(*self._frames, strict=True)
        return Trajectory(
            steps=torch.tensor(steps),
            latents=tuple(torch.stack(layer) for layer in zip(*latents, strict=True)),
            negative_energy=torch.stack(energy),
            acceptance=torch.stack(acceptance),
            drift_norm=torch.stack(drift),
        )
