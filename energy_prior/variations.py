"""Latents between those of two observations, and latents that share some layers with those of one."""

from __future__ import annotations

__all__ = ["between", "varied"]

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from energy_prior.langevin import ChainSettings
from energy_prior.model import JointModel
from energy_prior.topdown import TopDown


def between(
    model: JointModel, a: Sequence[Tensor], b: Sequence[Tensor], frames: int, settings: ChainSettings
) -> tuple[Tensor, ...]:
    """Latents of ε(θ) = cos θ ε_a + sin θ ε_b, θ evenly from 0 to π/2; those inside are moved by `settings.steps` steps.

    Args:
        model: the joint model.
        a: latents (z_1, …, z_L), (batch, *latent_shape) each.
        b: latents as many.
        frames: of each way, ≥ 2.
        settings: the chain's settings.

    Returns:
        Latents, (batch · frames, *latent_shape) each, the frames of one way in a row.
    """
    first, last = (model.in_parts(model.noise, z, "noise", max_memory=settings.max_memory) for z in (a, b))
    angles = torch.linspace(0, math.pi / 2, frames, dtype=a[0].dtype, device=a[0].device)

    def latents(noise: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return TopDown(model.generator, len(noise[0])).descend(tuple(noise), "noise").latents

    def way(e: Tensor, f: Tensor) -> Tensor:
        cos, sin = (t.reshape(-1, *[1] * (e.ndim - 1)) for t in (angles.cos(), angles.sin()))
        return (cos * e[:, None] + sin * f[:, None]).flatten(0, 1)

    noise = [way(e, f) for e, f in zip(first, last, strict=True)]
    number = torch.arange(frames, device=angles.device).repeat(len(a[0]))
    z = model.in_parts(latents, noise, "latents", max_memory=settings.max_memory)
    for n, end in ((0, a), (frames - 1, b)):  # as they were, without the rounding of the way to noise and back
        z = tuple(t.index_put(((number == n).nonzero()[:, 0],), e) for t, e in zip(z, end, strict=True))
    inside = number.remainder(frames - 1).bool()
    if settings.steps and frames > 2:
        moved = model.sample(int(inside.sum()), settings, start=[t[inside] for t in z])
        z = tuple(t.index_put((inside.nonzero()[:, 0],), m) for t, m in zip(z, moved, strict=True))
    return z


def varied(
    model: JointModel, z: Sequence[Tensor], layers: Sequence[int], n: int, settings: ChainSettings
) -> tuple[Tensor, ...]:
    """Latents of which these layers are drawn given the others, n times each.

    Args:
        model: the joint model.
        z: latents (z_1, …, z_L), (batch, *latent_shape) each.
        layers: numbers of the layers that are drawn.
        n: draws of each, ≥ 1.
        settings: the chain's settings.

    Returns:
        Latents, (batch · n, *latent_shape) each, the draws of one in a row.
    """
    held = {i: t.repeat_interleave(n, 0) for i, t in enumerate(z, start=1) if i not in layers}
    return model.sample(len(z[0]) * n, settings, held=held)
