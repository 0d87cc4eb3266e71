"""The discretised logistic likelihood: P(x) = F((x + δ/2 − μ)/s) − F((x − δ/2 − μ)/s) on a grid of pixel levels."""

from __future__ import annotations

__all__ = ["DiscretizedLogistic"]

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, constraints


class DiscretizedLogistic(Distribution):
    """A logistic distribution on the grid low, low + δ, …, high of `levels` values, its tails on the two end values.

    P(x) = F((x + δ/2 − μ)/s) − F((x − δ/2 − μ)/s), F the logistic function, with −∞ and +∞ for the outer edges of the end
    values (Salimans, Karpathy, Chen and Kingma, "PixelCNN++", ICLR 2017, eq. 2, with one component). Probabilities sum to 1.

    Args:
        loc: μ, in the data's units.
        scale: s > 0, in the data's units; broadcasts against `loc`.
        levels: number of grid values, at least 2 (256 for 8-bit images).
        low: the lowest grid value.
        high: the highest grid value.
    """

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        levels: int = 256,
        low: float = 0.0,
        high: float = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.levels, self.low, self.high = levels, low, high
        self.step = (high - low) / (levels - 1)
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        """Real `loc`, positive `scale`."""
        return {"loc": constraints.real, "scale": constraints.positive}

    @property
    def support(self) -> constraints.Constraint:
        """Values between the ends; off-grid values are scored by the bin of width δ around them."""
        return constraints.interval(self.low, self.high)

    @property
    def mean(self) -> Tensor:
        """μ, clamped to the grid's range: the centre of the distribution, not the exact mean of the clipped one."""
        return self.loc.clamp(self.low, self.high)

    def log_prob(self, value: Tensor) -> Tensor:
        """log P(value), nats; log-space throughout, so that it stays finite however far `value` is from μ."""
        if self._validate_args:
            self._validate_sample(value)
        upper = (value + self.step / 2 - self.loc) / self.scale
        lower = (value - self.step / 2 - self.loc) / self.scale
        # F(u) − F(l) = F(u) F(−l) (1 − e^{l − u}) for every l < u
        log_width = torch.log(-torch.expm1(-self.step / self.scale))
        inside = F.logsigmoid(upper) + F.logsigmoid(-lower) + log_width
        edge = self.step / 2
        at_low, at_high = value < self.low + edge, value > self.high - edge
        return torch.where(at_low, F.logsigmoid(upper), torch.where(at_high, F.logsigmoid(-lower), inside))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """A draw, on the grid."""
        shape = self._extended_shape(torch.Size(sample_shape))
        tiny = torch.finfo(self.loc.dtype).tiny
        u = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device).clamp(tiny, 1 - torch.finfo(self.loc.dtype).eps)
        continuous = self.loc + self.scale * (u.log() - torch.log1p(-u))
        return ((continuous - self.low) / self.step).round().clamp(0, self.levels - 1) * self.step + self.low
