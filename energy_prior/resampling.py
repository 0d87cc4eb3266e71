"""Draws of the joint prior without a chain: one of many draws of the generator's own prior, by importance."""

from __future__ import annotations

__all__ = ["Resampled", "resampled"]

import math
from typing import NamedTuple

import torch
from torch import Tensor

from energy_prior.errors import ChainWarning, DivergenceError, warn
from energy_prior.langevin.cost import equal_parts
from energy_prior.model import NEVER_SPLIT, JointModel
from energy_prior.topdown import TopDown, ancestral_noise

_FEW = 10  # effective proposals per draw


class Resampled(NamedTuple):
    """Draws chosen among proposals.

    Attributes:
        latents: (z_1, …, z_L), z_i of shape (n, *latent_shapes[i - 1]).
        effective_sample_size: of each draw's proposals, (Σ w)²/Σ w² with w = exp(Σ_i f_i), (n,), from 1 to their number.
    """

    latents: tuple[Tensor, ...]
    effective_sample_size: Tensor


def resampled(model: JointModel, n: int, proposals: int, max_memory: float) -> Resampled:
    """z = z_m with probability w_m/Σ_m w_m, w = exp(Σ_i f_i), of z_1, …, z_M ~ p_β: exact as M grows.

    Every draw has proposals of its own. They are compared as they are made, f + Gumbel noise against the largest before (the
    Gumbel-max trick), so that memory does not grow with their number. NCP-VAE (Aneja et al., NeurIPS 2021) samples so.

    Args:
        model: the joint model.
        n: number of draws, ≥ 1.
        proposals: M, of each draw, ≥ 1.
        max_memory: bytes that a pass may need, > 0; fewer than 16 rows are never split.

    Raises:
        DivergenceError: if an energy is not finite.
    """
    like = TopDown(model.generator, 1).reference
    needed = model.memory_of(lambda rows: _proposed(model, rows), "proposals", like=like)
    most = max(NEVER_SPLIT, math.floor(max_memory / max(needed, 1.0)))
    sizes = [rows.stop - rows.start for rows in equal_parts(n, 1, most)]
    parts = [_resampled(model, size, proposals, max(1, most // size)) for size in sizes]
    latents = tuple(torch.cat(layer) for layer in zip(*(part.latents for part in parts), strict=True))
    found = Resampled(latents, torch.cat([part.effective_sample_size for part in parts]))
    mean = float(found.effective_sample_size.mean())
    if mean < min(_FEW, proposals / 2):
        warn(
            f'method="resample": of {proposals} proposals of the generator\'s prior {mean:.3g} count on average, as the joint '
            'prior is far from it. Raise `proposals`, or sample by Langevin (method="langevin").',
            ChainWarning,
        )
    return found


def _resampled(model: JointModel, n: int, proposals: int, at_once: int) -> Resampled:
    """Draws whose proposals are made some at a time."""
    chosen: tuple[Tensor, ...] | None = None
    best = total = squares = torch.empty(0)
    for first in range(0, proposals, at_once):
        count = min(at_once, proposals - first)
        latents, f = _proposed(model, n * count)
        f = f.reshape(n, count)
        keyed, index = (f - torch.empty_like(f).exponential_().log()).max(dim=1)
        rows = torch.arange(n, device=f.device) * count + index
        latents = tuple(z[rows] for z in latents)
        sums = f.logsumexp(1), (2 * f).logsumexp(1)
        if chosen is None:
            chosen, best, (total, squares) = latents, keyed, sums
            continue
        new = keyed > best
        chosen = tuple(
            torch.where(new.reshape(-1, *[1] * (z.ndim - 1)), z, old) for z, old in zip(latents, chosen, strict=True)
        )
        best = torch.where(new, keyed, best)
        total, squares = torch.logaddexp(total, sums[0]), torch.logaddexp(squares, sums[1])
    return Resampled(chosen or (), (2 * total - squares).exp())


def _proposed(model: JointModel, rows: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Draws of the generator's own prior and Σ_i f_i of them, (rows,), nats."""
    topdown = TopDown(model.generator, rows)
    noise = ancestral_noise(topdown)
    latents = topdown.descend(noise, "noise").latents
    f = model.negative_energy(latents, noise).sum(1)
    if not bool(torch.isfinite(f).all()):
        raise DivergenceError(
            f"{int((~torch.isfinite(f)).sum())} values of Σ f_i at draws of the generator's prior are NaN or infinite. Look at "
            "the energies' weights, or fit them anew."
        )
    return latents, f
