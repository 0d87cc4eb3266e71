"""A ladder of two layers whose conditionals are not normal, with reference moments and scores by quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from ladders import ScaleLadder, WildEnergy
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Distribution,
    Independent,
    Laplace,
    LogNormal,
    MultivariateNormal,
    Normal,
    TanhTransform,
    TransformedDistribution,
    Uniform,
)

from energy_prior import Inferred, Logistic
from energy_prior._util import sum_event
from energy_prior.conditionals import to_latent


class SinhNormal(Distribution):
    """z = μ + s sinh(ε): a conditional that no library knows, with its own map."""

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale
        super().__init__(loc.shape, validate_args=False)

    def from_noise(self, noise: Tensor) -> Tensor:
        return self.loc + self.scale * torch.sinh(noise)

    def to_noise(self, value: Tensor) -> Tensor:
        return torch.asinh((value - self.loc) / self.scale)

    def log_prob(self, value: Tensor) -> Tensor:
        noise = self.to_noise(value)
        return -0.5 * noise**2 - 0.5 * math.log(2 * math.pi) - self.scale.log() - torch.cosh(noise).log()


FAMILIES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "laplace": Laplace,
    "logistic": Logistic,
    "uniform": lambda loc, scale: Uniform(loc - 2 * scale, loc + 2 * scale),
    "log-normal": LogNormal,
    "tanh, scaled": lambda loc, scale: TransformedDistribution(
        Normal(loc, scale), [TanhTransform(), AffineTransform(0.3, 2.0)]
    ),
    "affine": lambda loc, scale: TransformedDistribution(Laplace(0 * loc, 1 + 0 * scale), [AffineTransform(loc, scale)]),
    "multivariate": lambda loc, scale: MultivariateNormal(loc, scale_tril=scale[..., None]),
    "sinh": SinhNormal,
}
"""Kinds of conditionals, of μ and σ."""

_SHIFT, _WIDTH = 0.3, 0.6


class _OfAsinh(WildEnergy):
    """f(asinh z): no steeper far out, where families with heavy tails have draws."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(torch.asinh(z))


class FamilyLadder(ScaleLadder):
    """z_2 ~ D(0, 1), z_1 | z_2 ~ D(a t, e^{b t}) with t = tanh z_2, x | z_1 ~ N(asinh z_1, 1), D not normal."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.family = family
        self.energies = [_OfAsinh(1.2, 0.6, 0.05), _OfAsinh(-0.9, 0.5, 0.05)]

    def conditional(self, state: Tensor, layer: int) -> Any:
        loc, scale = (state, torch.ones_like(state)) if layer == 2 else self._loc_and_scale(state)
        return FAMILIES[self.family](loc, scale)

    def _loc_and_scale(self, z2: Tensor) -> tuple[Tensor, Tensor]:
        return self.slope * torch.tanh(z2), torch.exp(self.spread * torch.tanh(z2))

    def likelihood(self, state: Tensor) -> Independent:
        return Independent(Normal(torch.asinh(state), 1.0), 1)

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        """z_2 ~ D(c, w), z_1 | z_2 ~ D(μ_1 + c σ_1, w σ_1) with c = 0.3 tanh x: within the support of p."""
        drawn = []
        for layer in (2, 1):
            loc, scale = (torch.zeros_like(x), torch.ones_like(x)) if layer == 2 else self._loc_and_scale(drawn[0][0])
            q = FAMILIES[self.family](loc + _SHIFT * torch.tanh(x) * scale, _WIDTH * scale)
            z = to_latent(q, torch.randn(loc.shape, generator=rng, dtype=x.dtype))
            drawn.append((z, sum_event(q.log_prob(z))))
        (z2, log_q2), (z1, log_q1) = drawn
        return Inferred((z1, z2), torch.stack([log_q1, log_q2], 1))

    def moments(self, held: dict[int, float] | None = None, x: float | None = None) -> Tensor:
        """As `ScaleLadder.moments`, of asinh(z), by quadrature over z itself and the density of its family."""
        held = held or {}
        grid = _grid(self.family)
        t1, t2 = torch.meshgrid(grid, grid, indexing="ij")
        z2, log_p2 = _at(self.family, t2, torch.zeros_like(t2), torch.ones_like(t2))
        z2 = torch.full_like(t2, held[2]) if 2 in held else z2
        loc, scale = self._loc_and_scale(z2)
        z1, log_p1 = _at(self.family, t1, loc, scale)
        if 1 in held:
            z1 = torch.full_like(t1, held[1])
            q = FAMILIES[self.family](loc.reshape(-1, 1), scale.reshape(-1, 1))
            log_p1 = q.log_prob(z1.reshape(-1, 1)).reshape(z1.shape)
        log_weight = log_p1 + (0 if 2 in held else log_p2)
        for layer, z in ((1, z1), (2, z2)):
            if layer not in held:
                log_weight = log_weight + self.energies[layer - 1](z.reshape(-1, 1)).reshape(z.shape)
        if x is not None:
            log_weight = log_weight - 0.5 * (x - torch.asinh(z1)) ** 2
        weight = torch.softmax(log_weight.flatten(), 0).reshape(z1.shape)
        z1, z2 = torch.asinh(z1), torch.asinh(z2)
        return torch.stack([(weight * t).sum() for t in (z1, z2, z1**2, z2**2, z1 * z2)])

    def log_joint(self, x: float, k: int) -> float:
        """L^{>k}(x) by quadrature over t_1 and t_2: z_i ~ q where i > k, and of the joint prior below."""
        grid = _grid(self.family)
        t1, t2 = torch.meshgrid(grid, grid, indexing="ij")
        c, zeros, ones = _SHIFT * math.tanh(x), torch.zeros_like(t1), torch.ones_like(t1)
        f1, f2 = ((lambda z, f=f: f(z.reshape(-1, 1)).reshape(z.shape)) for f in self.energies)
        z2, of_2 = _at(self.family, t2, zeros, ones) if k == 2 else _at(self.family, t2, zeros + c, _WIDTH * ones)
        loc, scale = self._loc_and_scale(z2)
        z1, of_1 = _at(self.family, t1, loc, scale) if k else _at(self.family, t1, loc + c * scale, _WIDTH * scale)
        of_1 = of_1 + f1(z1) if k else of_1
        # but for k = 2, z_2 is of q, and the density of z_1 is normalised for every z_2
        log_weight = of_1 + of_2 + f2(z2) if k == 2 else torch.log_softmax(of_1, 0) + torch.log_softmax(of_2, 1)
        weight = torch.softmax(log_weight.flatten(), 0)
        density = FAMILIES[self.family]
        log_p = density(loc.reshape(-1, 1), scale.reshape(-1, 1)).log_prob(z1.reshape(-1, 1)).reshape(-1)
        log_p = log_p + density(zeros.reshape(-1, 1), ones.reshape(-1, 1)).log_prob(z2.reshape(-1, 1)).reshape(-1)
        values = log_p + f1(z1).flatten() + f2(z2).flatten() + Normal(torch.asinh(z1), ones).log_prob(torch.tensor(x)).flatten()
        return float((weight * torch.where(weight > 1e-30, values, zeros.flatten())).sum())


def _grid(family: str) -> Tensor:
    """Of the standardised variable t."""
    n = 901
    if family == "uniform":  # midpoints
        return 4 * (torch.arange(n, dtype=torch.float64) + 0.5) / n - 2
    reach = 40.0 if family in ("laplace", "logistic", "affine") else 8.0
    return torch.linspace(-reach, reach, n, dtype=torch.float64)


def _at(family: str, t: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """z, and the log of its density times dz/dt up to a constant, each by the textbook's formula."""
    normal = -0.5 * t**2
    if family in ("laplace", "affine"):
        return loc + scale * t, -t.abs()
    if family == "logistic":
        return loc + scale * t, -t.abs() - 2 * torch.log1p(torch.exp(-t.abs()))
    if family == "uniform":
        return loc + scale * t, torch.zeros_like(t)
    if family == "log-normal":
        return torch.exp(loc + scale * t), normal
    if family == "tanh, scaled":
        return 0.3 + 2 * torch.tanh(loc + scale * t), normal
    return loc + scale * (torch.sinh(t) if family == "sinh" else t), normal
