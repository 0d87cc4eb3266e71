"""The feature net behind the examples' Fréchet distances: a small classifier, trained on the spot, without its last layer."""

from __future__ import annotations

__all__ = ["train_classifier"]

import torch
from torch import Tensor, nn


def train_classifier(images: Tensor, labels: Tensor, iterations: int, place: torch.device) -> nn.Module:
    """64 features of a convolutional classifier of ten classes, always trained from the same seed.

    Args:
        images: (n, channels, height, width).
        labels: (n,), 0 … 9.
        iterations: updates with 128 images each.
        place: where to compute.

    Returns:
        (n, channels, height, width) -> (n, 64), in batches, so that any number of images fits; on the CPU.
    """
    channels, height, width = images.shape[1:]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(channels, 16, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * -(-height // 4) * -(-width // 4), 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        ).to(place)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        for _ in range(iterations):
            rows = torch.randint(len(images), (128,))
            loss = nn.functional.cross_entropy(net(images[rows].to(place)), labels[rows].to(place))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Features(net[:-1].eval().requires_grad_(False), place)


class Features(nn.Module):
    """A net applied batch by batch."""

    def __init__(self, body: nn.Module, place: torch.device) -> None:
        super().__init__()
        self.body, self.place = body, place

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) -> (n, 64)."""
        return torch.cat([self.body(batch.to(self.place)).cpu() for batch in x.split(1000)])
