"""Baselines and tests in the noise of a deep model: the refitted Gaussian, its mixture, and a classifier of noise maps."""

from __future__ import annotations

__all__ = ["GaussianMixture", "flat", "layers_of", "noise_of", "tell_apart"]

from collections.abc import Sequence
from typing import Any

import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn

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


class _Classifier(nn.Module):
    """Convolutions on every layer's map, its mean squares and means, and one linear map of all of them."""

    def __init__(self, vae: Any, width: int = 64) -> None:
        super().__init__()
        self.vae = [vae]  # no part of it
        self.nets = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(shape[0], width, 3, padding=1),
                nn.SiLU(),
                nn.GroupNorm(8, width),
                nn.Conv2d(width, width, 3, padding=1),
                nn.SiLU(),
                nn.GroupNorm(8, width),
                nn.Conv2d(width, width, 3, padding=1),
                nn.SiLU(),
            )
            for shape in vae.latent_shapes
        )
        self.head = nn.Linear(2 * width * len(vae.latent_shapes), 1)

    def forward(self, rows: Tensor) -> Tensor:
        maps = [net(e) for net, e in zip(self.nets, layers_of(rows, self.vae[0]), strict=True)]
        pooled = [m.mean((2, 3)) for m in maps] + [m.square().mean((2, 3)).sqrt() for m in maps]
        return self.head(torch.cat(pooled, 1)).squeeze(1)


def tell_apart(vae: Any, real: Tensor, drawn: Tensor, epochs: int = 6) -> float:
    """Balanced accuracy, on the last third of both, of a classifier that learns to tell rows of noise apart on the rest."""
    torch.manual_seed(0)
    net = _Classifier(vae)
    first = 2 * len(real) // 3
    x = torch.cat([real[:first], drawn[:first]])
    y = torch.cat([torch.ones(first), torch.zeros(first)])
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            loss = nn.functional.binary_cross_entropy_with_logits(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    net.eval()
    with torch.no_grad():
        sides = [torch.cat([net(rows) for rows in side[first:].split(500)]) for side in (real, drawn)]
    return 0.5 * float((sides[0] > 0).float().mean() + (sides[1] < 0).float().mean())
