"""The closed form: a quadratic function of a layer's noise, set from the posterior's moments instead of learned."""

from __future__ import annotations

__all__ = ["Quadratic", "shrunk_covariance"]

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_FULL = 4096
_RANK = 512


class Quadratic(nn.Module):
    """log N(ε; α m, α² C + σ² I) − log N(ε; 0, I), σ² = 1 − α²: the tilt that gives a layer's noise ε the moments m and C.

    C = I + V (Λ − I) Vᵀ, with orthonormal V: the `rank` directions whose variance is furthest from 1 (by their share
    ½ (λ − 1 − log λ) of KL(N(0, C) ‖ N(0, I))), so that

        f(ε) = (α m)ᵀ ε − ½ ‖α m‖² + ½ Σ_k [(1 − 1/λ_k) (v_kᵀ (ε − α m))² − log λ_k],   λ_k → α² λ_k + σ².

    At α = 1 it is the log ratio of the refitted Gaussian to the prior, below that of the noised one, α ε + σ n.
    It is 0 until `set_moments`. All of it are buffers, which no rule trains.

    A map of more than `full` units has one C of its channels for all positions, with a mean for each.

    Args:
        latent_shape: shape of ε without the batch.
        rank: largest number of directions, ≥ 1.
        full: units of a map up to which C is of all of them, ≥ 1; setting it takes time in proportion to their cube.

    Shape: (batch, *latent_shape) -> (batch,), nats.
    """

    mean: Tensor
    vectors: Tensor
    variances: Tensor

    def __init__(self, latent_shape: Sequence[int], rank: int = _RANK, full: int = _FULL) -> None:
        super().__init__()
        size = math.prod(latent_shape)
        self._block = size if size <= full else int(latent_shape[0])  # units whose covariance is not 0
        rank = min(rank, self._block)
        self.register_buffer("mean", torch.zeros(size // self._block, self._block))
        self.register_buffer("vectors", torch.zeros(self._block, rank))
        self.register_buffer("variances", torch.ones(rank))

    def forward(self, noise: Tensor, alpha: Tensor | float = 1.0) -> Tensor:
        """f(ε), (batch,), at α in [0, 1], (batch,) or one for all rows."""
        alpha = torch.as_tensor(alpha, dtype=noise.dtype, device=noise.device).reshape(-1, 1, 1)
        with torch.autocast(noise.device.type, enabled=False):  # it is a small difference of large numbers
            blocks, mean = self._blocks(noise), alpha * self.mean
            variances = 1 + alpha**2 * (self.variances - 1)
            along = (blocks - mean) @ self.vectors
            quadratic = (1 - 1 / variances) * along.square() - variances.log()
            return (mean * blocks - 0.5 * mean.square()).sum((1, 2)) + 0.5 * quadratic.sum((1, 2))

    def set_moments(self, noise: Tensor) -> None:
        """Takes the moments of these draws of the posterior's noise, (n, *latent_shape), n ≥ 2, the covariance shrunk."""
        blocks = self._blocks(noise).to(torch.float64)
        mean = blocks.mean(0)
        covariance = shrunk_covariance((blocks - mean).reshape(-1, self._block))
        variances, vectors = torch.linalg.eigh(covariance)
        variances = variances.clamp_min(1e-4)
        far = (variances - 1 - variances.log()).argsort(descending=True)[: len(self.variances)]
        self.mean.copy_(mean)
        self.vectors.copy_(vectors[:, far])
        self.variances.copy_(variances[far])

    def kl(self) -> Tensor:
        """KL(N(m, C) ‖ N(0, I)), nats: what the refitted Gaussian adds to the prior."""
        spread = (self.variances - 1 - self.variances.log()).sum() * len(self.mean)
        return 0.5 * (self.mean.square().sum() + spread)

    def _blocks(self, noise: Tensor) -> Tensor:
        """(batch, blocks, units of a block): one block of all units, or one of the channels at each position."""
        flat = noise.flatten(1)
        return flat.reshape(len(flat), self._block, -1).mT


def shrunk_covariance(draws: Tensor) -> Tensor:
    """Covariance of centred draws, (n, d), shrunk towards I: (1 − ρ) S + ρ I, with ρ as Ledoit and Wolf (JMVA 2004) have it.

    Their ρ minimises the expected squared error: min(1, Σ_k ‖x_k x_kᵀ − S‖² / (n² ‖S − I‖²)). With few draws the
    covariance stays near that of the prior.
    """
    n, d = draws.shape
    sample = draws.T @ draws / n
    eye = torch.eye(d, dtype=draws.dtype, device=draws.device)
    error = (draws.square().sum(1).square().sum() / n - sample.square().sum()) / n
    rho = float((error / (sample - eye).square().sum().clamp_min(1e-300)).clamp(0, 1))
    return (1 - rho) * sample + rho * eye
