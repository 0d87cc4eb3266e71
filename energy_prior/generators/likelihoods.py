"""Likelihoods of images: the discretised logistic, P(x) = F((x + δ/2 − μ)/s) − F((x − δ/2 − μ)/s), and its mixtures."""

from __future__ import annotations

__all__ = [
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "InModelUnits",
    "check_range",
]

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, constraints

from energy_prior._util import shown
from energy_prior.checks.settings import check_count, check_positive, real_number
from energy_prior.errors import ArgumentError, ShapeError

_NARROW = 1e-4
"""Width of a bin in units of the scale, below which the series of log(1 − e^{−width}) is exact to rounding."""


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
        floor: added to every probability, as some public models do (the sum is then above 1).
        validate_args: as in torch.distributions: check `scale`, and the values given to `log_prob`.
    """

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        levels: int = 256,
        low: float = 0.0,
        high: float = 1.0,
        floor: float = 0.0,
        validate_args: bool | None = None,
    ) -> None:
        pair: Sequence[Tensor] = torch.broadcast_tensors(loc, scale)
        self.loc: Tensor = pair[0]
        self.scale: Tensor = pair[1]
        self.levels = levels
        self.low = low
        self.high = high
        self.floor = floor
        self.step: float = (high - low) / (levels - 1)
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        """Real `loc`, positive `scale`."""
        return {"loc": constraints.real, "scale": constraints.positive}

    @property
    def support(self) -> constraints.Constraint:
        """Values between the ends; a value off the grid is scored by the bin of width δ around it."""
        return constraints.interval(self.low, self.high)

    @property
    def mean(self) -> Tensor:
        """μ, clamped to the grid's range: the centre of the distribution, not the exact mean of the clipped one."""
        return self.loc.clamp(self.low, self.high)

    def log_prob(self, value: Tensor) -> Tensor:
        """log P(value), nats; log-space throughout, so that it stays finite however far `value` is from μ."""
        if self._validate_args:
            self._validate_sample(value)
        edge = self.step / 2
        pair = self.scale.reciprocal(), self.scale.log()
        log_p = _log_bin(value, self.loc, *pair, self.step, self.low + edge, self.high - edge)
        return torch.logaddexp(log_p, torch.full_like(log_p, math.log(self.floor))) if self.floor else log_p

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """A draw, on the grid."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return _draw(self.loc.expand(shape), self.scale, self.step, self.low, self.levels)


class DiscretizedLogisticMixture(Distribution):
    """A mixture of discretised logistics per pixel, with the later colours conditioned on the earlier ones.

    P(x) = Σ_m π_m ∏_c P_m(x_c | x_{<c}), each factor a discretised logistic (as `DiscretizedLogistic`) with locations

        μ_1,   μ_2 + c_1 x_1,   μ_3 + c_2 x_1 + c_3 x_2

    (Salimans, Karpathy, Chen and Kingma, "PixelCNN++", ICLR 2017, eq. 2 and 3). A value counts as the lowest level, whose bin
    reaches to −∞, if it is below `bottom`, and as the highest, whose bin reaches to +∞, if it is above `top`. By default these
    edges lie half a bin inside `low` and `high`, and probabilities sum to 1 over the grid. Public models put them elsewhere
    (−0.999 and 0.999 in most), which matters for values off the grid, such as dequantised images. The bins are evaluated in
    log space, so that log P stays finite however far x is from every component.

    Args:
        logits: unnormalised log π_m, (batch, M, height, width), nats.
        loc: μ, in the data's units, (batch, M, C, height, width).
        log_scale: log s, s in the data's units, (batch, M, C, height, width).
        coefficients: c_1, c_2, c_3, (batch, M, 3, height, width), no unit, where C = 3; None: channels do not depend on each
            other.
        levels: number of grid values, at least 2 (256 for 8-bit images).
        low: the lowest grid value.
        high: the highest grid value.
        bottom: value below which x counts as the lowest level; None: half a bin above `low`.
        top: value above which x counts as the highest level; None: half a bin below `high`.
        spacing: distance of the values that draws are rounded to, `low` the first of them, > 0, where the data lie on another
            grid than that of the bins; None: the width of a bin.

    Raises:
        ArgumentError, ShapeError: if a value is impossible; the message says which.

    Examples:
        >>> logits, loc = torch.zeros(2, 5, 8, 8), torch.zeros(2, 5, 3, 8, 8)
        >>> mixture = DiscretizedLogisticMixture(logits, loc, loc - 2, bottom=-0.999, top=0.999)
        >>> mixture.log_prob(2 * torch.rand(2, 3, 8, 8) - 1).shape
        torch.Size([2])
    """

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        log_scale: Tensor,
        coefficients: Tensor | None = None,
        *,
        levels: int = 256,
        low: float = -1.0,
        high: float = 1.0,
        bottom: float | None = None,
        top: float | None = None,
        spacing: float | None = None,
    ) -> None:
        shapes = [tuple(t.shape) for t in (logits, loc, log_scale, coefficients) if t is not None]
        per_pixel = (*loc.shape[:2], *loc.shape[3:])
        if loc.ndim != 5 or shapes != [per_pixel] + [tuple(loc.shape)] * (len(shapes) - 1):
            raise ShapeError(
                "DiscretizedLogisticMixture: expected logits of shape (batch, M, height, width), the rest of shape "
                f"(batch, M, C, height, width), got {', '.join(map(str, shapes))}."
            )
        if coefficients is not None and loc.shape[2] != 3:
            raise ShapeError(f"coefficients: expected 3 channels, which they couple, got {loc.shape[2]}.")
        self.logits = logits
        self.loc = loc
        self.log_scale = log_scale
        self.coefficients = coefficients
        self.levels: int = check_count("levels", levels, least=2)
        ends = check_range("low, high", (low, high))
        self.low: float = ends[0]
        self.high: float = ends[1]
        self.step: float = (self.high - self.low) / (self.levels - 1)
        self.bottom: float = _check_edge("bottom", bottom, self.low + self.step / 2)
        self.top: float = _check_edge("top", top, self.high - self.step / 2)
        self.spacing: float = self.step if spacing is None else check_positive("spacing", spacing)
        super().__init__(loc.shape[:1], torch.Size((loc.shape[2], *loc.shape[3:])), validate_args=False)

    @classmethod
    def from_channels(
        cls,
        parameters: Tensor,
        *,
        colours: int = 3,
        levels: int = 256,
        bottom: float | None = None,
        top: float | None = None,
        spacing: float | None = None,
    ) -> DiscretizedLogisticMixture:
        """From the channels of a network: M logits, then per colour M of μ, log s and, for RGB, c, as public models have it.

        log s is kept above −7, c is the tanh of its channels, and x is in [−1, 1].

        Args:
            parameters: features of the last layer, (batch, 10·M, height, width), or (batch, 3·M, height, width) for one colour.
            colours: 3 or 1.
            levels: number of grid values, at least 2.
            bottom: value below which x counts as the lowest level; None: half a bin above −1.
            top: value above which x counts as the highest level; None: half a bin below 1.
            spacing: distance of the values that draws are rounded to, −1 the first of them, > 0; None: the width of a bin.

        Raises:
            ShapeError: if there are other numbers of channels or colours.
        """
        per_colour = 3 if colours == 3 else 2
        mixtures = parameters.shape[1] // (1 + colours * per_colour)
        if colours not in (1, 3) or mixtures < 1 or parameters.shape[1] != mixtures * (1 + colours * per_colour):
            raise ShapeError(
                "parameters: expected 10·M channels for 3 colours or 3·M for 1, got "
                f"{parameters.shape[1]} for {colours} colours."
            )
        logits, others = parameters[:, :mixtures], parameters[:, mixtures:]
        loc, log_scale, *raw = others.unflatten(1, (colours, per_colour * mixtures)).transpose(1, 2).split(mixtures, dim=1)
        coefficients = raw[0].tanh() if raw else None
        log_scale = log_scale.clamp(min=-7.0)
        return cls(logits, loc, log_scale, coefficients, levels=levels, bottom=bottom, top=top, spacing=spacing)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        """None are checked."""
        return {}

    @property
    def mean(self) -> Tensor:
        """Σ_m π_m μ_m, (batch, C, height, width), in the data's units.

        The locations of each component are in turn clamped to the range: it is not the mean of the clipped tails.
        """
        components = self._channel_by_channel(lambda loc, scale: loc.clamp(self.low, self.high))
        return (self.logits.softmax(1).unsqueeze(2) * components).sum(1)

    def log_prob(self, value: Tensor) -> Tensor:
        """log P(x), (batch,), nats.

        Args:
            value: observations x, (batch, C, height, width).
        """
        x = value.unsqueeze(1)
        loc = self.loc
        if self.coefficients is not None:
            c1, c2, c3 = self.coefficients.unbind(2)
            red, green = x[:, :, 0], x[:, :, 1]
            loc = loc + torch.stack([torch.zeros_like(c1), c1 * red, c2 * red + c3 * green], 2)
        bins = _log_bin(x, loc, torch.exp(-self.log_scale), self.log_scale, self.step, self.bottom, self.top)
        return torch.logsumexp(bins.sum(2) + self.logits.log_softmax(1), 1).flatten(1).sum(1)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws of observations, on the grid, (*sample_shape, batch, C, height, width).

        Args:
            sample_shape: of draws; (): one.
        """
        if sample_shape:
            return torch.stack([self.sample(sample_shape[1:]) for _ in range(sample_shape[0])])
        gumbel = -torch.empty_like(self.logits).exponential_().log()
        chosen = (self.logits + gumbel).argmax(1, keepdim=True).unsqueeze(2)
        components = self._channel_by_channel(lambda loc, scale: _draw(loc, scale, self.spacing, self.low, self.levels))
        return components.gather(1, chosen.expand(-1, -1, components.shape[2], -1, -1)).squeeze(1)

    def _channel_by_channel(self, value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`value(loc, scale)` of every component, (batch, M, C, height, width): loc given the values of the channels before."""
        channels: list[Tensor] = []
        for i, (loc, scale) in enumerate(zip(self.loc.unbind(2), self.log_scale.exp().unbind(2), strict=True)):
            if self.coefficients is not None and i:
                first = i * (i - 1) // 2  # c_1 for green, c_2 and c_3 for blue
                loc = loc + sum(self.coefficients[:, :, first + j] * channels[j] for j in range(i))
            channels.append(value(loc, scale))
        return torch.stack(channels, 2)


class InModelUnits(Distribution):
    """The distribution of observations whose model has other units: log_prob(x) = base.log_prob(to_model(x)).

    For a density the Jacobian of `to_model` is left out: a figure is in the model's own units, as the model counts it.

    Args:
        base: distribution in the model's units, with batch_shape (batch,).
        to_model: from observations to the model's units.
        from_model: back again, for means and samples.
    """

    def __init__(
        self, base: Distribution, to_model: Callable[[Tensor], Tensor], from_model: Callable[[Tensor], Tensor]
    ) -> None:
        self.base = base
        self.to_model = to_model
        self.from_model = from_model
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        """None are checked."""
        return {}

    @property
    def mean(self) -> Tensor:
        """The base's mean, as an observation."""
        return self.from_model(self.base.mean)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p of observations, (batch,), nats."""
        return self.base.log_prob(self.to_model(value))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """A draw of the base, as an observation."""
        return self.from_model(self.base.sample(torch.Size(sample_shape)))


def check_range(name: str, values: Any) -> tuple[float, float]:
    """Two finite numbers, the first below the second, of any kind, as Python's own."""
    if not isinstance(values, str | bytes):
        try:
            found = [real_number(value) for value in values]
        except TypeError:  # not iterable
            found = []
        if len(found) == 2 and found[0] is not None and found[1] is not None and found[0] < found[1]:
            return found[0], found[1]
    raise ArgumentError(f"{name}: expected (lowest, highest), two finite numbers, got {shown(values)}.")


def _check_edge(name: str, value: Any, default: float) -> float:
    """A finite number of any kind, as Python's own; None: `default`."""
    number = default if value is None else real_number(value)
    if number is None:
        raise ArgumentError(f"{name}: expected a finite number or None, got {shown(value)}.")
    return number


def _log_bin(value: Tensor, loc: Tensor, inverse: Tensor, log_scale: Tensor, step: float, bottom: float, top: float) -> Tensor:
    """log of the logistic's mass in the bin of width `step` around `value`; below `bottom` and above `top` with the whole tail.

    In log space throughout: F(u) − F(l) = F(u) F(−l) (1 − e^{l − u}) for every l < u; so gradients stay finite, too, however
    wide the logistic is.
    """
    upper = (value + step / 2 - loc) * inverse
    lower = (value - step / 2 - loc) * inverse
    width = step * inverse  # u − l
    narrow = math.log(step) - log_scale - width / 2 + width.square() / 24  # also where width rounds to 0
    log_mass = torch.where(width < _NARROW, narrow, torch.log(-torch.expm1(-width.clamp_min(_NARROW))))
    inside = F.logsigmoid(upper) + F.logsigmoid(-lower) + log_mass
    return torch.where(value < bottom, F.logsigmoid(upper), torch.where(value > top, F.logsigmoid(-lower), inside))


def _draw(loc: Tensor, scale: Tensor, step: float, low: float, levels: int) -> Tensor:
    """A draw of the logistic, rounded to the grid."""
    limits = torch.finfo(loc.dtype)
    u = torch.rand_like(loc).clamp(limits.tiny, 1 - limits.eps)
    continuous = loc + scale * (u.log() - torch.log1p(-u))
    return ((continuous - low) / step).round().clamp(0, levels - 1) * step + low
