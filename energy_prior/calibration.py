"""The default anomaly score: how far out in the tails of known observations the terms of one pass are."""

from __future__ import annotations

__all__ = ["Calibration", "Explanation", "PassTerms", "row_digests", "some_rows"]

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_TERMS = 4
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
        norms: log ‖x − x̂‖² of the likelihood's mean x̂ (or log p_β0(x | z), where it has none) and log ‖ε_i‖² of every layer,
            (batch, 1 + L): how much there is in an image, and in what was made of it.
    """

    reconstruction: Tensor
    rate: Tensor
    negative_energy: Tensor
    norms: Tensor


@dataclass(frozen=True)
class Explanation:
    """A score, and the surprise −log P_t(x) at each of its terms: the score is the root of the sum of their squares.

    Attributes:
        score: (batch,), nats; higher = more anomalous.
        reconstruction: surprise at how badly x is reconstructed, (batch,), nats, ≥ 0.
        rate: at how far the posterior is from the generator's prior.
        negative_energy: at how improbable the latents are by the energies.
        norms: at how much there is in x that is not reconstructed, and in the latents; large where it is unusually little, too.
    """

    score: Tensor
    reconstruction: Tensor
    rate: Tensor
    negative_energy: Tensor
    norms: Tensor


class Calibration(nn.Module):
    """Distributions of the terms on known observations, and the score by them.

        A(x) = √(Σ_t (log P_t(x))²),   t = reconstruction, rate, negative energy, norms

    P_t(x) is the share of known observations whose term t is at least that of x. Up to the 95% quantile q it is counted,
    beyond it is 0.05 exp(−(t − q)/m), with the mean excess m over q. The term of the norms is their Mahalanobis distance from
    the known ones, which is large on both sides: an image can be *too* easy. The others count on one side alone, so that a
    term that is better than usual does not hide one that is worse. After LPath (statistics of a VAE's likelihood path) and
    tail-based detectors (COPOD); the squares lie between Fisher's sum and the largest term. Everything is a buffer.

    Args:
        layers: L.
        like: a tensor of the dtype and on the device of the buffers.
    """

    table: Tensor
    excess: Tensor
    scores: Tensor
    centre: Tensor
    whitening: Tensor
    count: Tensor

    def __init__(self, layers: int, like: Tensor) -> None:
        super().__init__()
        place = {"dtype": like.dtype, "device": like.device}
        self.register_buffer("table", torch.zeros(_TERMS, _LEVELS, **place))
        self.register_buffer("excess", torch.ones(_TERMS, **place))
        self.register_buffer("scores", torch.zeros(_LEVELS, **place))
        self.register_buffer("centre", torch.zeros(1 + layers, **place))
        self.register_buffer("whitening", torch.zeros(1 + layers, 1 + layers, **place))
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

    def set_from(self, terms: PassTerms) -> None:
        """Learns the distributions of known observations, (n, …), n ≥ 2."""
        norms = terms.norms.double()
        centre = norms.mean(0)
        spread = norms.std(0).clamp_min(1e-6 * (1 + centre.abs()))
        unit = (norms - centre) / spread
        n, d = unit.shape
        covariance = torch.cov(unit.T).reshape(d, d)
        ridge = (d + 1) / (n + d + 1)  # few observations: towards independent norms
        covariance = (1 - ridge) * covariance + ridge * torch.eye(d, dtype=unit.dtype, device=unit.device)
        whitening = torch.linalg.inv(torch.linalg.cholesky(covariance)) / spread
        self.centre.copy_(centre)
        self.whitening.copy_(whitening)
        columns = self._columns(terms)
        levels = (torch.arange(_LEVELS, dtype=columns.dtype, device=columns.device) + 0.5) / _LEVELS
        self.table.copy_(torch.quantile(columns, levels, dim=0).T)
        start = columns.quantile(1 - _TAIL, dim=0)
        over = columns > start
        mean = ((columns - start) * over).sum(0) / over.sum(0).clamp_min(1)
        mean = mean.maximum(1e-6 * (1 + start.abs()))  # what rounding of nearly equal terms makes is no tail
        self.excess.copy_(torch.where(over.any(0), mean, torch.ones_like(mean)))
        self.count.fill_(n)
        self.scores.copy_(self.explain(terms).score.double().quantile(levels))

    def explain(self, terms: PassTerms) -> Explanation:
        """A(x) and what it is made of."""
        surprises = self._surprises(terms)
        return Explanation(surprises.square().sum(1).sqrt(), *surprises.unbind(1))

    def _surprises(self, terms: PassTerms) -> Tensor:
        """−log P_t(x) of every term, (batch, 4), nats, ≥ 0, in the dtype of the buffers."""
        columns = self._columns(terms)
        levels = torch.arange(_LEVELS, dtype=columns.dtype, device=columns.device)
        nats = -torch.log1p(-(levels + 0.5) / _LEVELS)
        found = []
        for value, table, excess in zip(columns.T, self.table.double(), self.excess.double(), strict=True):
            start = _interpolated(table.new_tensor(1 - _TAIL), (levels + 0.5) / _LEVELS, table)
            inside = _interpolated(value, table, nats).clamp_max(-math.log(_TAIL))
            found.append(torch.where(value > start, -math.log(_TAIL) + (value - start) / excess, inside))
        return torch.stack(found, dim=1).to(self.table.dtype)

    def threshold(self, quantile: float) -> float:
        """A that this share of the known observations does not exceed."""
        scores = self.scores.double()
        levels = (torch.arange(_LEVELS, dtype=scores.dtype, device=scores.device) + 0.5) / _LEVELS
        return float(_interpolated(scores.new_tensor(quantile), levels, scores))

    def _columns(self, terms: PassTerms) -> Tensor:
        """The four terms, (batch, 4), float64, each higher where it is worse."""
        away = (terms.norms.double() - self.centre.double()) @ self.whitening.double().T
        several = (terms.reconstruction, terms.rate, terms.negative_energy)
        return torch.stack([*(t.double() for t in several), away.square().sum(1)], dim=1)


def _interpolated(at: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Linear interpolation of values at sorted places, constant outside."""
    right = torch.searchsorted(places, at.contiguous()).clamp(1, len(places) - 1)
    low, high = places[right - 1], places[right]
    share = ((at - low) / (high - low).clamp_min(torch.finfo(places.dtype).tiny)).clamp(0, 1)
    return values[right - 1] + share * (values[right] - values[right - 1])


_REMEMBERED = 512


def some_rows(data: Any, like: Tensor) -> Tensor:
    """Some hundred observations, spread over a tensor or an array, in the dtype of `like`; none of anything else."""
    if not isinstance(data, Tensor) and not hasattr(data, "__array_interface__"):
        return like.new_zeros(0)
    rows = data[:: max(1, len(data) // _REMEMBERED)]
    return (rows if isinstance(rows, Tensor) else torch.as_tensor(rows, device="cpu")).to(like.dtype)


def row_digests(rows: Tensor) -> frozenset[bytes]:
    """A digest of every row, by which it is known again."""
    values = rows.detach().flatten(1).cpu().contiguous().view(torch.uint8).numpy() if len(rows) else ()
    return frozenset(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in values)
