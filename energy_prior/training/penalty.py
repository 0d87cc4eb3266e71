"""What holds energies back: a penalty on (Σ f_i)² whose weight follows the gap, and a wall beyond 25 nats of |f_i|."""

from __future__ import annotations

__all__ = ["WALL_WEIGHT", "PenaltyWeight", "energy_penalty", "energy_wall"]

from typing import Any

import torch
from torch import Tensor

WALL_WEIGHT = 0.1
"""Factor of `energy_wall` in the loss."""

_BOUND = 25.0  # nats; energies of a good prior stay well inside it
_GAP_LIMIT = 1.0  # nats
_GAP_RATE = 0.1
_GROWTH = 0.05
_LARGEST_WEIGHT = 0.1


def energy_penalty(positive: Tensor, negative: Tensor) -> Tensor:
    """E₊[(Σ f_i)²] + E₋[(Σ f_i)²], (), nats squared: keeps energies, which have no absolute zero, near 0.

    Args:
        positive: Σ_i f_i at posterior draws, (batch,), nats.
        negative: Σ_i f_i at prior draws, (batch,), nats.

    Examples:
        >>> energy_penalty(torch.tensor([1.0, -1.0]), torch.tensor([2.0, 0.0]))
        tensor(3.)
    """
    return positive.square().mean() + negative.square().mean()


def energy_wall(positive: Tensor, negative: Tensor) -> Tensor:
    """Σ_i E₊[w_i²] + E₋[w_i²] with w_i = max(0, |f_i| − 25 nats), a scalar.

    Maximum likelihood alone raises f without limit where prior chains do not reach the posterior. Layer by layer, as two
    layers that cancel in Σ f would pass unseen.

    Args:
        positive: f_i at posterior draws, (batch, L), nats.
        negative: f_i at prior draws, (batch, L), nats.
    """
    return sum(((f.abs() - _BOUND).clamp_min(0).square().sum(1).mean() for f in (positive, negative)), positive.new_zeros(()))


class PenaltyWeight:
    """The weight c of `energy_penalty` in the loss, which rises while prior chains lag behind f.

    The gap is a running mean of E₊[Σ f_i] − E₋[Σ f_i], its limit 1 nat. Were the chains where f wants them, it would be near 0:
    a gap says that f is ahead of them, which is how maximum likelihood by chains diverges. Every update multiplies c by
    exp(0.05 r), with r = gap/limit − 1 kept in [−1, 1], and keeps c between `least` and 0.1. All on the device.

    Args:
        least: c where it starts, ≥ 0, and the least that it can be.
        size: what the limit is multiplied by, ≥ 1.
        reference: a tensor with the dtype and device of the energies.

    Attributes:
        value: c, a scalar.
    """

    def __init__(self, least: float, size: float, reference: Tensor) -> None:
        self._least, self._limit = least, _GAP_LIMIT * size
        self._gap = reference.new_zeros(())
        self.value: Tensor = torch.full_like(self._gap, least)

    def update(self, gap: Tensor) -> None:
        """Takes the gap of one more update into account, a scalar, nats."""
        self._gap = torch.lerp(self._gap, gap.to(self._gap.dtype), _GAP_RATE)
        factor = torch.exp(_GROWTH * (self._gap / self._limit - 1).clamp(-1, 1))
        self.value = (self.value * factor).clamp(self._least, max(self._least, _LARGEST_WEIGHT))

    def state(self) -> dict[str, Any]:
        """The gap and the weight."""
        return {"gap": self._gap, "value": self.value}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from such a state."""
        self._gap, self.value = state["gap"], state["value"]
