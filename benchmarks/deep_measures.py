"""Baselines in the noise of a deep model: the refitted Gaussian and its mixture."""

from __future__ import annotations

__all__ = ["GaussianMixture", "flat", "layers_of", "noise_of"]

from collections.abc import Sequence
from typing import Any

import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from energy_prior.energies.quadratic import shrunk_covariance
from energy_prior.topdown import inferred_descent


def noise_of(vae: Any, x: Tensor) -> tuple[Tensor, ...]:
    """The posterior's noise (ε_1, …, ε_L) of observations, one draw each, (n, *latent_shape)."""
    with torch.no_grad():
        parts = [inferred_descent(vae, vae.infer(batch)).noise() for batch in x.split(250)]
    return tuple(torch.cat(layer) for layer in zip(*parts, strict=True))


def flat(layers: Sequence[Tensor]) -> Tensor:
    """Layers as rows, (n, units of all layers)."""
    return torch.cat([layer.flatten(1) for layer in layers], 1)


def layers_of(rows: Tensor, vae: Any) -> list[Tensor]:
    """Rows as layers, (n, *latent_shape) each."""
    parts = rows.split([shape.numel() for shape in vae.latent_shapes], 1)
    return [part.reshape(len(rows), *shape) for part, shape in zip(parts, vae.latent_shapes, strict=True)]


class GaussianMixture:
    """A mixture of Gaussians with one covariance, fitted by k-means; with one component N(m, C), C shrunk towards I."""

    def __init__(self, draws: Tensor, components: int) -> None:
        means = MiniBatchKMeans(components, random_state=0).fit(draws.numpy())
        labels = torch.as_tensor(means.labels_).long()
        self.weights = torch.bincount(labels, minlength=components).float()
        self.means = torch.stack([draws[labels == k].mean(0) if self.weights[k] else draws.mean(0) for k in range(components)])
        centred = (draws - self.means[labels]).double()
        self.root = torch.linalg.cholesky(shrunk_covariance(centred)).float()

    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        """Draws, (n, units)."""
        chosen = torch.multinomial(self.weights, n, replacement=True, generator=rng)
        return self.means[chosen] + torch.randn(n, len(self.root), generator=rng) @ self.root.T
