"""A Gaussian convolved with uniform noise, N(μ, σ²) * U(−½, ½), as one Normal of twice the channels: z = n + Φ(v) − ½."""

from __future__ import annotations

__all__ = ["ConvolvedNormal"]

import math

import torch
from torch import Tensor
from torch.distributions import Normal

from energy_prior._util import normal_like, plain_normal
from energy_prior.conditionals import LocationScale, log_ndtr_inverse, ndtr

_LOG_2 = math.log(2)
_LOG_ROOT_2_PI = 0.5 * math.log(2 * math.pi)
_NEWTON_STEPS = 3
_NARROW = 0.05


class ConvolvedNormal(LocationScale):
    """p(z) = Φ((z + ½ − μ)/σ) − Φ((z − ½ − μ)/σ): the prior of models for compression, where z is rounded to whole numbers.

    It is the distribution of z = n + Φ(v) − ½ with n ~ N(μ, σ²) and v ~ N(0, 1). So a layer of C channels z is one Normal
    layer of 2 C channels (n, v), n first, and a draw z ~ q(z | x) becomes one of (n, v) by a draw of

        p(n, v | z) = p(n, v)/p(z),  n a Gaussian truncated to [z − ½, z + ½],  v = Φ⁻¹(z − n + ½),

    with q(n, v | x) = q(z | x) p(n, v | z): log p(n, v) − log q(n, v | x) = log p(z) − log q(z | x), whatever was drawn.

    Args:
        loc: μ of the latents, (batch, C, *shape).
        scale: σ > 0, (batch, C, *shape), in the latents' units.
        validate_args: whether arguments are checked; None: torch's own default.

    Examples:
        >>> p = ConvolvedNormal(torch.zeros(2, 3), torch.ones(2, 3))
        >>> z = torch.rand(2, 3)
        >>> pair, log_p_of_pair = p.to_pair(z, torch.randn(2, 3))
        >>> torch.allclose(ConvolvedNormal.from_pair(pair), z, atol=1e-6)
        True
    """

    @property
    def mean(self) -> Tensor:
        """μ of the latents, (batch, C, *shape)."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """σ² + 1/12, (batch, C, *shape), in the latents' units squared."""
        return self.scale**2 + 1 / 12

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Reparameterised draws.

        Args:
            sample_shape: of draws; (): one.

        Returns:
            Draws of latents z, (*sample_shape, batch, C, *shape).
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.loc + self.scale * normal_like(shape, self.loc) + ndtr(normal_like(shape, self.loc)) - 0.5

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(z) of every element, (batch, C, *shape), nats.

        Args:
            value: latents z, (batch, C, *shape).
        """
        return _log_mass((value - self.loc) / self.scale, 0.5 / self.scale)

    def pair(self) -> Normal:
        """p(n, v) = N(n; μ, σ²) N(v; 0, 1), of (batch, 2·C, *shape): what `conditional` of a generator returns."""
        loc = torch.cat([self.loc, torch.zeros_like(self.loc)], dim=1)
        return plain_normal(loc, torch.cat([self.scale, torch.ones_like(self.scale)], dim=1))

    @staticmethod
    def from_pair(pair: Tensor) -> Tensor:
        """The latents z = n + Φ(v) − ½, (batch, C, *shape): what `descend` of a generator takes on.

        Args:
            pair: (n, v), (batch, 2·C, *shape), latents.
        """
        n, v = pair.chunk(2, dim=1)
        return n + (ndtr(v) - 0.5)

    def to_pair(self, value: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(n, v) ~ p(n, v | z), reparameterised, and its log density: what `infer` of a generator makes of its draw.

        Args:
            value: latents z, (batch, C, *shape).
            noise: noise of N(0, 1), (batch, C, *shape), of which (n, v) is made: P(v' ≤ v | z) = Φ(ε).

        Returns:
            (n, v), (batch, 2·C, *shape), latents; and log p(n, v | z) of every element of z, (batch, C, *shape), nats.
        """
        sign = torch.where(noise > 0, -1.0, 1.0).to(noise)  # of v ↦ −v, z − μ ↦ μ − z: the lower half of the distribution
        noise = sign * noise
        half = 0.5 / self.scale
        mass = _log_mass((value - self.loc) / self.scale, half)
        end = sign * (value - self.loc) / self.scale + half  # (n − μ)/σ goes from here down as v goes up
        wanted = torch.special.log_ndtr(noise) + mass
        with torch.no_grad():
            u = (self.scale * _solved(end, wanted)).clamp(torch.finfo(end.dtype).tiny, 1 - torch.finfo(end.dtype).eps)
            v = torch.special.ndtri(u)
        depth = u / self.scale
        below = _log_mass(end - 0.5 * depth, 0.5 * depth)
        slope = (below - _log_density(end - depth) + self.scale.log() - _log_density(v)).exp()  # dv/d log P(v' ≤ v | z)
        change = (wanted - below) - (wanted - below).detach()  # a change of 0, with a gradient
        bend = ((end - depth) * _log_density(v).exp() / self.scale - v) * slope - 1
        v = sign * (v + slope * (change - 0.5 * bend * change**2))
        n = value + (0.5 - ndtr(v))
        log_p = _log_density((n - self.loc) / self.scale) - self.scale.log() + _log_density(v)
        return torch.cat([n, v], dim=1), log_p - mass


def _solved(end: Tensor, wanted: Tensor) -> Tensor:
    """d with log(Φ(b) − Φ(b − d)) = y, where b is `end`, y is `wanted` and exp(y) is at most Φ(b)/2."""
    above = torch.special.log_ndtr(end)
    lower = above + torch.log1p(-(wanted - above).exp())
    upper = torch.logaddexp(torch.special.log_ndtr(-end), wanted)
    t = log_ndtr_inverse(torch.minimum(lower, upper).clamp(max=-_LOG_2))
    d = end - torch.where(lower < upper, t, -t)
    near = torch.finfo(end.dtype).eps ** 0.5 * (1 + end.abs())  # where the difference has lost its digits
    d = torch.where(d > near, d, (wanted - _log_density(end)).exp())
    for _ in range(_NEWTON_STEPS):  # in log d
        mass = _log_mass(end - 0.5 * d, 0.5 * d)
        d = d * ((wanted - mass) * (mass - _log_density(end - d)).exp() / d).exp()
    return d


def _log_mass(centre: Tensor, half: Tensor) -> Tensor:
    """log(Φ(m + h) − Φ(m − h)), in both tails and for small h too."""
    m = torch.where(centre < 0, -centre, centre)
    narrow, across = half * (1 + m) < _NARROW, m < half

    def only(where: Tensor, value: Tensor, other: float) -> Tensor:
        return torch.where(where, value, torch.full_like(value, other))  # a gradient of NaN would pass through the rest

    h, c = only(narrow, half, 1.0), only(narrow, m, 0.0)
    q, r = h**2, (c * h) ** 2  # ∫ exp(−m s − s²/2) ds over [−h, h] is 2 h (1 + …)
    series = (r - q) / 6 + (r**2 - 6 * r * q + 3 * q**2) / 120 + (r**3 - 15 * r**2 * q + 45 * r * q**2 - 15 * q**3) / 5040
    of_narrow = _log_density(c) + (2 * h).log() + series.log1p()
    h, c = only(across, half, 1.0), only(across, m, 0.0)
    of_across = torch.log1p(-ndtr(-h - c) - ndtr(c - h))
    beside = ~across & ~narrow
    h, c = only(beside, half, 1.0), only(beside, m, 2.0)
    near, far = (torch.special.erfcx((c + side * h) / math.sqrt(2)).log() for side in (-1, 1))
    of_beside = -0.5 * (c - h) ** 2 - _LOG_2 + near + torch.log(-torch.expm1(far - near - 2 * c * h))
    return torch.where(narrow, of_narrow, torch.where(across, of_across, of_beside))


def _log_density(value: Tensor) -> Tensor:
    """log φ."""
    return -0.5 * value**2 - _LOG_ROOT_2_PI
