"""p_β(z_i | z_{>i}) of one layer: how noise becomes z, and z becomes noise, under each kind of distribution.

z = T(ε) with ε ~ N(0, I) of z's shape, T smooth with an inverse:

    Normal                   z = μ + σ ε
    MultivariateNormal       z = μ + A ε, A Aᵀ = Σ
    Laplace                  z = μ − b sign(ε) (log 2 + log Φ(−|ε|))
    Logistic                 z = μ + s (log Φ(ε) − log Φ(−ε))
    Uniform                  z = low + (high − low) Φ(ε)
    TransformedDistribution  z = the transforms of z_0, which is of one of these
    any other                z = `from_noise(ε)`, and `to_noise(z)`, methods of its own

The quantile functions are taken of log Φ(−|ε|), so that z keeps its precision in both tails.
"""

from __future__ import annotations

__all__ = [
    "LocationScale",
    "Logistic",
    "NoiseMap",
    "gaussian_part",
    "is_bounded",
    "is_conditional",
    "log_ndtr_inverse",
    "ndtr",
    "of_elements",
    "rebuilt",
    "tensors_of",
    "to_latent",
    "to_noise",
]

import functools
import math
import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import (
    Distribution,
    Independent,
    Laplace,
    MultivariateNormal,
    Normal,
    Transform,
    TransformedDistribution,
    Uniform,
    constraints,
)
from torch.utils._pytree import tree_map
from typing_extensions import Self

_LOG_2 = math.log(2)
_TAIL = -30.0
_NEWTON_STEPS = 4


class NoiseMap(Protocol):
    """A distribution of your own that says how noise becomes z: what makes it a conditional.

    Examples:
        >>> from torch.distributions import Normal
        >>> class SinhNormal(Normal):  # z = μ + σ sinh ε; it needs a log_prob of its own too: docs/adapters.md
        ...     def from_noise(self, noise):
        ...         return self.loc + self.scale * noise.sinh()
        ...     def to_noise(self, value):
        ...         return ((value - self.loc) / self.scale).asinh()
        >>> SinhNormal(torch.ones(2), torch.ones(2)).from_noise(torch.tensor([0.0, 2.0]))
        tensor([1.0000, 4.6269])
    """

    def from_noise(self, noise: Tensor) -> Tensor:
        """z = T(ε), differentiable.

        Args:
            noise: ε ~ N(0, I), (batch, *latent_shape), no unit.

        Returns:
            Of this distribution: latents z, (batch, *latent_shape).
        """
        ...

    def to_noise(self, value: Tensor) -> Tensor:
        """ε = T⁻¹(z), differentiable.

        Args:
            value: latents z, (batch, *latent_shape).

        Returns:
            The noise ε of it, (batch, *latent_shape), no unit.
        """
        ...


class LocationScale(Distribution):
    """What distributions of a `loc` and a `scale` share: the two, broadcast, and that z is any real number."""

    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        pair = torch.broadcast_tensors(loc, scale)
        self.loc: Tensor = pair[0]
        self.scale: Tensor = pair[1]
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        """Real `loc`, positive `scale`."""
        return {"loc": constraints.real, "scale": constraints.positive}

    @property
    def support(self) -> constraints.Constraint:
        """All real numbers."""
        return constraints.real

    def expand(self, batch_shape: torch.Size | tuple[int, ...]) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The same distribution, repeated.

        Args:
            batch_shape: the new shape, as `Tensor.expand` takes it.

        Returns:
            That distribution.
        """
        return type(self)(self.loc.expand(batch_shape), self.scale.expand(batch_shape), validate_args=False)


class Logistic(LocationScale):
    """The logistic distribution, p(z) = exp(−t)/(s (1 + exp(−t))²) with t = (z − μ)/s.

    torch has it only as a `TransformedDistribution` of a `Uniform`, which rounds its upper tail away.

    Args:
        loc: μ of the latents, (batch, *latent_shape).
        scale: s > 0, (batch, *latent_shape), in the latents' units.
        validate_args: whether arguments are checked; None: torch's own default.

    Examples:
        >>> Logistic(torch.zeros(2), torch.tensor([1.0, 2.0])).log_prob(torch.zeros(2))
        tensor([-1.3863, -2.0794])
    """

    @property
    def mean(self) -> Tensor:
        """μ of the latents, (batch, *latent_shape)."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """π²s²/3, (batch, *latent_shape), in the latents' units squared."""
        return (math.pi * self.scale) ** 2 / 3

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Reparameterised draws.

        Args:
            sample_shape: how many, in what shape.

        Returns:
            Draws of latents, (*sample_shape, batch, *latent_shape).
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self.scale * _logit_of_normal(noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(z) of every element, (batch, *latent_shape), nats.

        Args:
            value: latents z, (batch, *latent_shape).
        """
        t = (value - self.loc) / self.scale
        return F.logsigmoid(t) + F.logsigmoid(-t) - self.scale.log()


_KINDS = (Normal, MultivariateNormal, Laplace, Logistic, Uniform)


# -------------------------------------------------------------------------------------------------------------- noise and z


def to_latent(conditional: Distribution, noise: Tensor) -> Tensor:
    """z = T(ε), of the conditional's shape (batch, *latent_shape)."""
    if type(conditional) is Normal:
        return conditional.loc + conditional.scale * noise
    c: Any = conditional
    if _has_own_map(c):
        return c.from_noise(noise)
    if isinstance(c, Independent):
        return to_latent(c.base_dist, noise)
    if isinstance(c, TransformedDistribution):
        transforms: list[Any] = c.transforms
        return functools.reduce(lambda z, transform: transform(z), transforms, to_latent(c.base_dist, noise))
    if isinstance(c, MultivariateNormal):
        with torch.autocast(noise.device.type, enabled=False):
            return c.loc + (_factor(c) @ noise[..., None])[..., 0]
    if isinstance(c, Laplace):
        return c.loc + c.scale * _odd(noise, _laplace_quantile)
    if isinstance(c, Logistic):
        return c.loc + c.scale * _logit_of_normal(noise)
    if isinstance(c, Uniform):
        low, high = torch.broadcast_tensors(c.low, c.high)
        tail = (high - low) * ndtr(_negative(noise))
        z = torch.where(noise < 0, low + tail, high - tail)
        last = torch.nextafter(high.detach(), low.detach())  # an older torch has no derivative of it
        return torch.where(z < high, z, last + (high - high.detach()))  # where its density is not 0
    return c.loc + c.scale * noise  # a class derived from Normal


def to_noise(conditional: Distribution, z: Tensor) -> Tensor:
    """ε = T⁻¹(z), the inverse of `to_latent`; not finite where z is outside the support."""
    if type(conditional) is Normal:
        return (z - conditional.loc) / conditional.scale
    c: Any = conditional
    if _has_own_map(c):
        return c.to_noise(z)
    if isinstance(c, Independent):
        return to_noise(c.base_dist, z)
    if isinstance(c, TransformedDistribution):
        transforms: list[Any] = c.transforms
        return to_noise(c.base_dist, functools.reduce(lambda z, transform: transform.inv(z), reversed(transforms), z))
    if isinstance(c, MultivariateNormal):
        return torch.linalg.solve_triangular(_factor(c), (z - c.loc)[..., None], upper=False)[..., 0]
    if isinstance(c, Laplace):
        return _odd((z - c.loc) / c.scale, _laplace_noise)
    if isinstance(c, Logistic):
        return _odd((z - c.loc) / c.scale, _logistic_noise)
    if isinstance(c, Uniform):
        below, above = z - c.low, c.high - z
        nearest = torch.where(below < above, below, above)
        ends = torch.maximum(c.low.abs(), c.high.abs())
        nearest = torch.where(nearest == 0, 0.25 * torch.finfo(z.dtype).eps * ends, nearest)  # a draw that was rounded there
        noise = torch.special.ndtri(nearest / (c.high - c.low))
        return torch.where(below < above, noise, -noise)
    return (z - c.loc) / c.scale


def _has_own_map(conditional: Any) -> TypeGuard[NoiseMap]:
    return hasattr(conditional, "from_noise") and hasattr(conditional, "to_noise")


def _factor(c: Any) -> Tensor:
    """A of a MultivariateNormal, A Aᵀ = Σ, lower triangular, of shape (d, d) or (batch, d, d)."""
    return c._unbroadcasted_scale_tril


def _negative(value: Tensor) -> Tensor:
    """−|value|, with the derivative from the right at 0."""
    return torch.where(value < 0, value, -value)


def _odd(value: Tensor, of_negative: Callable[[Tensor], Tensor]) -> Tensor:
    """The odd function that is `of_negative` below 0."""
    there = of_negative(_negative(value))
    return torch.where(value < 0, there, -there)


def _laplace_quantile(noise: Tensor) -> Tensor:
    """The quantile of the standard Laplace distribution at Φ(ε), ε ≤ 0."""
    return _LOG_2 + torch.special.log_ndtr(noise)


def _laplace_noise(t: Tensor) -> Tensor:
    return log_ndtr_inverse(t - _LOG_2)


def _logistic_noise(t: Tensor) -> Tensor:
    return log_ndtr_inverse(F.logsigmoid(t))


def _logit_of_normal(noise: Tensor) -> Tensor:
    """The quantile of the standard logistic distribution at Φ(ε)."""
    return torch.special.log_ndtr(noise) - torch.special.log_ndtr(-noise)


def ndtr(value: Tensor) -> Tensor:
    """Φ, with its digits in the lower tail; torch's own is 0 a little below −5."""
    return 0.5 * torch.erfc(-value / math.sqrt(2))


def log_ndtr_inverse(y: Tensor) -> Tensor:
    """ε ≤ 0 with log Φ(ε) = y, for y ≤ −log 2; differentiable twice."""
    fixed = y.detach()
    tail = fixed.clamp(max=_TAIL)  # exp(y) would lose its digits, later be 0
    x = -(-2 * tail - (-4 * math.pi * tail).log()).sqrt()
    for _ in range(_NEWTON_STEPS):
        x = x - (torch.special.log_ndtr(x) - tail) * _mills(x)
    x = torch.where(fixed < _TAIL, x, torch.special.ndtri(fixed.clamp(min=_TAIL).exp()))
    slope, change = _mills(x), y - fixed  # a change of 0, with a gradient
    return x + slope * change + 0.5 * slope * (1 + x * slope) * change**2


def _mills(x: Tensor) -> Tensor:
    """Φ(x)/φ(x), for x ≤ 0."""
    return math.sqrt(math.pi / 2) * torch.special.erfcx(-x / math.sqrt(2))


# --------------------------------------------------------------------------------------------------- what is one, and of what


def is_conditional(value: Any) -> TypeGuard[Distribution]:
    """Whether noise becomes z, and z noise, under this distribution."""
    if isinstance(value, Independent):
        return is_conditional(value.base_dist)
    if isinstance(value, TransformedDistribution) and not _has_own_map(value):
        return is_conditional(value.base_dist) and all(transform.bijective for transform in value.transforms)
    return isinstance(value, Distribution) and (isinstance(value, _KINDS) or _has_own_map(value))


def is_bounded(conditional: Distribution) -> bool:
    """Whether z does not reach all real numbers, as far as is known: only chains in noise space stay within its support."""
    c: Any = conditional
    if isinstance(c, Independent):
        return is_bounded(c.base_dist)
    if isinstance(c, TransformedDistribution):
        bounded = is_bounded(c.base_dist)
        for transform in c.transforms:  # of real numbers to real numbers: such as it was
            bounded = not _is_real(transform.codomain) or (bounded and _is_real(transform.domain))
        return bounded
    try:
        return not _is_real(c.support)
    except NotImplementedError:  # how torch.distributions says that there is no support
        return False


def _is_real(constraint: Any) -> bool:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint is None or constraint is constraints.real


def of_elements(distribution: Distribution) -> Distribution:
    """What `Independent` makes one event of."""
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return distribution


def gaussian_part(conditional: Distribution) -> tuple[Tensor, Tensor] | None:
    """μ and σ of the Normal that z, or what transforms make z of, is drawn from; None: there is none."""
    c: Any = conditional
    if isinstance(c, Normal):
        return c.loc, c.scale
    if isinstance(c, Independent | TransformedDistribution) and not _has_own_map(c):
        return gaussian_part(c.base_dist)
    return None


# ------------------------------------------------------------------------------------------------------------ their tensors


def tensors_of(conditional: Distribution) -> list[Tensor]:
    """The tensors that a conditional is made of; not those of modules inside it, such as a flow's weights."""
    c: Any = conditional
    if isinstance(c, MultivariateNormal):  # it keeps what it is asked for: a covariance, say
        return [c.loc, _factor(c)]
    if isinstance(c, Independent | TransformedDistribution) and not _has_own_map(c):  # those of the base first
        return [*tensors_of(c.base_dist), *_tensors_in(getattr(c, "transforms", []))]
    return _tensors_in(c)


def _tensors_in(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    rebuilt(value, keep)
    return found


def rebuilt(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same with `function` of each of its tensors; what is of another kind stays as it is.

    Args:
        value: a tensor, a distribution, a transform, or tuples, lists and dicts of them.
        function: takes a tensor, and gives one of the same shape.
    """
    known: dict[int, Any] = {}  # a transform and its inverse refer to each other

    def of(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if isinstance(leaf, Distribution | Transform) and not isinstance(leaf, nn.Module):
            if id(leaf) not in known:
                copied = known[id(leaf)] = object.__new__(type(leaf))
                for name, attribute in vars(leaf).items():
                    object.__setattr__(copied, name, tree_map(of, attribute))
            return known[id(leaf)]
        return None if isinstance(leaf, weakref.ref) else leaf  # to an inverse, in an older torch: it is made anew

    return tree_map(of, value)
