"""Ratio estimates that the library does not have: rivals of its rules, with the networks of its energies."""

from __future__ import annotations

__all__ = ["GroupRatio", "learn_group_ratios", "minimise"]

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from energy_prior import DenoisingEnergy, denoising_energies

LEARNING_RATE, EMA = 1e-3, 0.999


class GroupRatio(nn.Module):
    """r_i(ε_i; ε_{i+1}, …, ε_L) = ⟨ε_i, net(ε_i, …, ε_L)⟩, the log ratio of one layer given those above, as in NCP-VAE.

    Args:
        energy: gives the network.
    """

    reads_noise = True

    def __init__(self, energy: Any) -> None:
        super().__init__()
        self.energy: DenoisingEnergy = energy

    def forward(self, noise: Sequence[Tensor]) -> Tensor:
        """r_i, (batch,), nats."""
        level = noise[0].new_zeros(len(noise[0]))
        return (noise[0] * self.energy.net(noise, level)).flatten(1).sum(1)

    @classmethod
    def of_every_layer(cls, shapes: Sequence[torch.Size]) -> list[nn.Module]:
        """(r_1, …, r_L) of layers of these shapes."""
        return [cls(f) for f in denoising_energies(shapes)]


def learn_group_ratios(ratios: Sequence[nn.Module], draw: Callable[[], Sequence[Tensor]], iterations: int) -> float:
    """One classifier per layer (Aneja et al., NeurIPS 2021): is ε_i of the posterior, or of N(0, I), given its ε_{>i}?

    Args:
        ratios: (r_1, …, r_L).
        draw: a batch of the posterior's noise, (ε_1, …, ε_L).
        iterations: updates.

    Returns:
        The last loss, nats.
    """

    def loss() -> Tensor:
        noise = draw()
        total = noise[0].new_zeros(())
        for i, ratio in enumerate(ratios):
            other = (torch.randn_like(noise[i]), *noise[i + 1 :])
            total = total + F.softplus(-ratio(noise[i:])).mean() + F.softplus(ratio(other)).mean()
        return total

    return minimise(loss, [w for ratio in ratios for w in ratio.parameters() if w.requires_grad], iterations)


def minimise(loss: Callable[[], Tensor], weights: Sequence[Tensor], iterations: int) -> float:
    """AdamW with cosine decay; the weights end at their running average. Returns the last loss."""
    average = [w.detach().clone() for w in weights]
    optimiser = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations, 0.1 * LEARNING_RATE)
    last = torch.zeros(())
    for t in range(1, iterations + 1):
        last = loss()
        optimiser.zero_grad()
        last.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            for a, w in zip(average, weights, strict=True):
                a.lerp_(w, 1 - min(EMA, (1 + t) / (10 + t)))
    with torch.no_grad():
        for a, w in zip(average, weights, strict=True):
            w.copy_(a)
    return float(last.detach())
