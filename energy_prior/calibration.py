"""The default anomaly score: how far out in the tails of known observations the terms of one pass are."""

from __future__ import annotations

__all__ = ["TERMS", "Calibration", "Explanation", "PassTerms", "row_digests"]

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from energy_prior.checks.arguments import is_array

TERMS = ("reconstruction", "rate", "negative_energy", "norms")
"""Of the score, in the order of columns."""

_LEVELS = 512
_TAIL = 0.05
"""Share of the known observations that the exponential tail of a term is fitted to."""


@dataclass(frozen=True)
class PassTerms:
    """What one pass through the posterior's means says of observations, each higher where it is worse but for the norms.

    Attributes:
        reconstruction: −log p_β0(x | z), (batch,), nats.
        rate: log q_ω(z | x) − log p_β(z), (batch,), nats; without `infer`, −log p_β(z).
        negative_energy: −Σ_i f_i(z_i), (batch,), nats.
        norms: log ‖x − x̂‖² of the likelihood's mean x̂ (or −log p_β0(x | z), where it has none) and log ‖ε_i‖² of every layer,
            (batch, 1 + L): how much there is in an image, and in what was made of it.
    """

    reconstruction: Tensor
    rate: Tensor
    negative_energy: Tensor
    norms: Tensor


@dataclass(frozen=True)
class Explanation:
    """A score, and the surprise −log P_t(x) at each of its terms, of which the score is the sum.

    Attributes:
        score: (batch,), nats; higher = more anomalous.
        reconstruction: surprise at how badly x is reconstructed, (batch,), nats, ≥ 0.
        rate: surprise at how far the posterior is from the generator's prior, (batch,), nats, ≥ 0.
        negative_energy: surprise at how improbable the latents are by the energies, (batch,), nats, ≥ 0.
        norms: surprise at how little there is in x that is not reconstructed, and in the latents, (batch,), nats, ≥ 0.

    Examples:
        >>> from energy_prior import load_example
        >>> surprises = load_example().explain(torch.ones(1, 1, 8, 8)).surprises()  # a white image
        >>> max(surprises, key=surprises.get)
        'reconstruction'
    """

    score: Tensor
    reconstruction: Tensor
    rate: Tensor
    negative_energy: Tensor
    norms: Tensor

    def surprises(self) -> dict[str, Tensor]:
        """Term -> its surprise, (batch,), nats."""
        return {name: getattr(self, name) for name in TERMS}


class Calibration(nn.Module):
    """Distributions of the terms on known observations, and the score by them.

        A(x) = −Σ_t log P_t(x),   t = reconstruction, rate, negative energy, norms

    P_t(x) is the share of known observations whose term t is at least that of x. Up to the 95% quantile q it is counted,
    beyond it is 0.05 exp(−(t − q)/m), with the mean excess m over q. The term of the norms is √(Σ_j min(z_j, 0)²), of their
    logarithms in standard deviations z_j from the mean of the known ones: an image can be *too* easy. Every term counts on one
    side alone, so that one that is better than usual does not hide one that is worse. After LPath (statistics of a VAE's
    likelihood path) and tail-based detectors (COPOD), with the sum of Fisher's method. Everything is a buffer.

    Args:
        layers: L.
        like: a tensor of any shape, (…), and any unit, whose dtype and device the buffers get.

    Attributes:
        table: quantiles of each term at evenly spaced levels, (4, levels): nats, of the norms no unit.
        excess: mean excess m of each term over its 95% quantile, (4,), in the same units: nats, or no unit.
        scores: quantiles of the score itself at these levels, (levels,), nats.
        centre: mean of the logarithms of the norms, (L + 1,), no unit.
        spread: their standard deviations, (L + 1,), no unit.
        count: number of observations that it knows, (), whole number.

    Examples:
        >>> from energy_prior import load_example
        >>> calibration = load_example().calibration
        >>> int(calibration.count), round(calibration.threshold(0.95), 2)
        (300, 7.78)
    """

    table: Tensor
    excess: Tensor
    scores: Tensor
    centre: Tensor
    spread: Tensor
    count: Tensor

    def __init__(self, layers: int, like: Tensor) -> None:
        super().__init__()
        dtype, device = like.dtype, like.device
        self.register_buffer("table", torch.zeros(len(TERMS), _LEVELS, dtype=dtype, device=device))
        self.register_buffer("excess", torch.ones(len(TERMS), dtype=dtype, device=device))
        self.register_buffer("scores", torch.zeros(_LEVELS, dtype=dtype, device=device))
        self.register_buffer("centre", torch.zeros(1 + layers, dtype=dtype, device=device))
        self.register_buffer("spread", torch.ones(1 + layers, dtype=dtype, device=device))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=like.device))

    @property
    def is_set(self) -> bool:
        """Whether it knows any observations."""
        return int(self.count) > 0

    def forget(self) -> None:
        """As it was built."""
        for buffer in self.buffers():
            buffer.zero_()
        self.excess.fill_(1.0)
        self.spread.fill_(1.0)

    def set_from(self, terms: PassTerms) -> None:
        """Learns the distributions of known observations.

        Args:
            terms: those of n ≥ 2 known observations.
        """
        norms = terms.norms.double()
        centre = norms.mean(0).to(self.centre)
        spread = norms.std(0).clamp_min(1e-6 * (1 + centre.abs())).to(self.spread)
        columns = _columns(terms, centre, spread)
        levels = _levels(columns)
        table = torch.quantile(columns, levels, dim=0).T.to(self.table)
        start = columns.quantile(1 - _TAIL, dim=0)
        over = columns > start
        mean = ((columns - start) * over).sum(0) / over.sum(0).clamp_min(1)
        excess = torch.where(mean > _rounding(start), mean, torch.ones_like(mean)).to(self.excess)
        scores = _surprises(columns, table, excess).sum(1).quantile(levels)
        found = {"table": table, "excess": excess, "scores": scores, "centre": centre, "spread": spread}
        for name, value in found.items():
            getattr(self, name).copy_(value)
        self.count.fill_(len(norms))

    def explain(self, terms: PassTerms) -> Explanation:
        """A(x) and what it is made of.

        Args:
            terms: those of the observations.
        """
        surprises = _surprises(_columns(terms, self.centre, self.spread), self.table, self.excess)
        return Explanation(*(t.to(self.table.dtype) for t in (surprises.sum(1), *surprises.unbind(1))))

    def threshold(self, quantile: float) -> float:
        """A that a share of the known observations does not exceed, nats.

        Args:
            quantile: that share, in (0, 1).
        """
        scores = self.scores.double()
        return float(_interpolated(scores.new_tensor(quantile), _levels(scores), scores))


def _columns(terms: PassTerms, centre: Tensor, spread: Tensor) -> Tensor:
    """The terms, each higher where it is more unusual, (batch, 4)."""
    centre = centre.double()
    below = ((terms.norms.double() - centre + _rounding(centre)) / spread.double()).clamp_max(0)
    one_sided = (terms.reconstruction, terms.rate, terms.negative_energy)
    return torch.stack([*(t.double() for t in one_sided), below.square().sum(1).sqrt()], dim=1)


def _surprises(columns: Tensor, table: Tensor, excess: Tensor) -> Tensor:
    """−log P_t of every term, (batch, 4), nats, ≥ 0."""
    levels = _levels(columns)
    found = []
    for value, quantiles, scale in zip(columns.T, table.to(columns), excess.to(columns), strict=True):
        start = _interpolated(quantiles.new_tensor(1 - _TAIL), levels, quantiles)
        value = value - _rounding(start)  # equal terms are not surprising, nor what rounding makes of them
        inside = _interpolated(value, quantiles, -torch.log1p(-levels)).clamp_max(-math.log(_TAIL))
        found.append(torch.where(value > start, -math.log(_TAIL) + (value - start) / scale, inside))
    return torch.stack(found, dim=1)


def _levels(like: Tensor) -> Tensor:
    """Shares of the known observations that the quantiles in a table are those of."""
    return (torch.arange(_LEVELS, dtype=like.dtype, device=like.device) + 0.5) / _LEVELS


def _rounding(value: Tensor) -> Tensor:
    """What terms of this size may differ by in single precision, with another batch, say."""
    return 1e-5 * (1 + value.abs())


def _interpolated(at: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Linear interpolation of values at sorted places, constant outside."""
    right = torch.searchsorted(places, at.contiguous()).clamp(1, len(places) - 1)
    low, high = places[right - 1], places[right]
    share = ((at - low) / (high - low).clamp_min(torch.finfo(places.dtype).tiny)).clamp(0, 1)
    return values[right - 1] + share * (values[right] - values[right - 1])


def row_digests(rows: Any, most: int | None = None) -> frozenset[bytes]:
    """Digests of observations in single precision, by which they are known again; none of what is no tensor and no array.

    Args:
        rows: (n, …).
        most: of about so many of them, spread over all; None: of each.
    """
    if not isinstance(rows, Tensor) and not is_array(rows):
        return frozenset()
    rows = rows[:: 1 if most is None else max(1, len(rows) // most)]
    array = rows.detach().cpu().float().numpy() if isinstance(rows, Tensor) else rows
    return frozenset(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in np.array(array, np.float32, order="C"))
