"""`ResidualVAE`: many groups of latents at several scales, with residual cells and posteriors relative to the prior."""

from __future__ import annotations

__all__ = ["ResidualVAE"]

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution, Normal
from torch.utils.checkpoint import checkpoint

from energy_prior._util import draw, plain_normal
from energy_prior.checks.arguments import check_count, check_positive
from energy_prior.errors import ArgumentError, ShapeError
from energy_prior.generators.likelihoods import Likelihood, PixelLikelihood, check_x
from energy_prior.protocol import Inferred
from energy_prior.topdown import infer_top_down

_LOG_SCALE_LIMIT = 5.0
_NORM_GROUPS = 8


class ResidualVAE(nn.Module):
    """A deep hierarchical VAE in the manner of NVAE (Vahdat and Kautz, NeurIPS 2020), for images.

        p(z_i | z_{>i}) = N(μ_i, (t σ_i)²),   p(z_L) = N(0, t²)
        q(z_i | z_{>i}, x) = N(μ_i + σ_i Δμ_i, (σ_i e^{Δ_i})²)   (top-down)

    Layers come in groups at several scales. One residual decoder runs from a learned tensor at the coarsest scale to the
    image; each group reads its prior from it and adds its z to it. Posteriors are relative to the prior in units of its σ, so
    that their KL depends on Δμ and Δ alone. Cells are residual, with group norm: no observation sees the rest of its batch.

    It follows `HierarchicalGenerator`; `energy_prior.fit_elbo` trains it.

    Args:
        x_shape: (channels, height, width); both sides must be multiples of 2^(downsample + scales − 1).
        groups: groups of latents at each scale, finest first; their number is that of the scales.
        latent_channels: channels of every z_i.
        channels: of the features at the finest scale of latents; doubled from scale to scale, up to 4 times.
        cells: residual cells per group.
        tower_cells: residual cells per resolution between the image and the finest scale of latents, on the way up and down.
        downsample: halvings between the image and the finest scale of latents.
        likelihood: "mixture" (of discretised logistics), "gaussian", "bernoulli" or "discretized_logistic".
        sigma: as for `LadderVAE`.
        x_range: lowest and highest value of x.
        levels: grid values between them for the discretised likelihoods (256 for 8-bit images).
        mixtures: components of "mixture".
        prior_temperature: t > 0, factor on every σ of the prior. Train with 1.
        checkpointing: keep only the cells' inputs for the backward pass, and compute the rest anew: less memory, more time;
            not in compiled chains.

    Raises:
        ArgumentError, ShapeError: if a value is impossible; the message says which.

    Example:
        >>> vae = ResidualVAE((3, 32, 32), groups=(4, 2), channels=16)
        >>> vae.latent_shapes[0], vae.latent_shapes[-1], len(vae.latent_shapes)
        (torch.Size([8, 16, 16]), torch.Size([8, 8, 8]), 6)
    """

    autocast = True

    def __init__(
        self,
        x_shape: Sequence[int],
        *,
        groups: Sequence[int] = (4, 4),
        latent_channels: int = 8,
        channels: int = 64,
        cells: int = 1,
        tower_cells: int = 2,
        downsample: int = 1,
        likelihood: Likelihood = "mixture",
        sigma: float | None = None,
        x_range: tuple[float, float] = (0.0, 1.0),
        levels: int = 256,
        mixtures: int = 5,
        prior_temperature: float = 1.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.x_shape, self.x_range, self.checkpointing = torch.Size(x_shape), x_range, checkpointing
        self.prior_temperature = check_positive("prior_temperature", prior_temperature)
        _check_arguments(self.x_shape, groups, downsample)
        for name, value in {"latent_channels": latent_channels, "channels": channels, "cells": cells}.items():
            check_count(name, value)
        check_count("tower_cells", tower_cells, least=0)
        self.pixels = PixelLikelihood(x_shape, likelihood, sigma=sigma, x_range=x_range, levels=levels, mixtures=mixtures)
        scales = len(groups)
        sizes = [tuple(n // 2 ** (downsample + s) for n in self.x_shape[1:]) for s in range(scales)]
        widths = [channels * min(2**s, 4) for s in range(scales)]
        shapes = [torch.Size((latent_channels, *sizes[s])) for s in range(scales) for _ in range(groups[s])]
        self.latent_shapes = tuple(shapes)
        depth = cells * sum(groups) + tower_cells * (downsample + 1)  # cells that one image goes through

        def tower(width: int, count: int = cells) -> nn.Sequential:
            return nn.Sequential(*(_Cell(width, depth) for _ in range(count)))

        def image_tower(first: nn.Module) -> nn.Sequential:
            return nn.Sequential(first, tower(channels, tower_cells))

        self.stem = image_tower(nn.Conv2d(self.x_shape[0], channels, 3, padding=1))
        self.shrink = nn.ModuleList(image_tower(_Half(channels, channels)) for _ in range(downsample))
        up = list(range(scales))[::-1]
        order = [s for s in up for _ in range(groups[s])]  # scale of every group from the top
        first = [i == 0 or order[i - 1] != s for i, s in enumerate(order)]
        self.side = nn.ModuleList(tower(widths[s]) for s in order)
        self.down = nn.ModuleList(_Half(widths[s], widths[s + 1]) for s in range(scales - 1))
        self.top = nn.Parameter(torch.zeros(1, widths[-1], *sizes[-1]))
        self.prior = nn.ModuleList(_head(widths[s], 2 * latent_channels, 1) for s in order[1:])
        self.posterior = nn.ModuleList(_head(2 * widths[s], 2 * latent_channels, 3) for s in order)
        self.enter = nn.ModuleList(nn.Conv2d(latent_channels, widths[s], 1) for s in order)
        self.cells = nn.ModuleList(
            nn.Sequential(tower(widths[s]), _Twice(widths[s], widths[order[i + 1]]))
            if i + 1 < len(order) and first[i + 1]
            else tower(widths[s])
            for i, s in enumerate(order)
        )
        self._last_of_scale = tuple(i + 1 == len(order) or first[i + 1] for i in range(len(order)))
        self.grow = nn.ModuleList(image_tower(_Twice(channels, channels)) for _ in range(downsample))
        self.head = _head(channels, self.pixels.channels, 3)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def extra_repr(self) -> str:
        """What no part of it says."""
        return f"prior_temperature={self.prior_temperature}"

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles its towers in place, as `nn.Module.compile` does (for training; chains have a `backend` of their own)."""
        for part in (self.stem, *self.shrink, *self.side, *self.cells, *self.grow):
            part.compile(*args, **kwargs)

    def start(self, batch_size: int) -> Tensor:
        """The learned features above the top group."""
        return self.top.expand(batch_size, -1, -1, -1).contiguous(memory_format=torch.channels_last)

    def conditional(self, state: Tensor, layer: int) -> Normal:
        """p_β(z_i | z_{>i}) of group i from the features above it; N(0, t²) for the top one."""
        group = self._group(layer)
        if group == 0:
            zero = state.new_zeros(len(state), *self.latent_shapes[-1])
            return plain_normal(zero, torch.full_like(zero, self.prior_temperature))
        loc, raw = self.prior[group - 1](state).to(self.top.dtype).chunk(2, dim=1)
        return plain_normal(loc, self.prior_temperature * _scale(raw))

    def descend(self, state: Tensor, z: Tensor, layer: int) -> Tensor:
        """Adds z_i to the features, and goes through the cells on to the next group."""
        group = self._group(layer)
        return self._through(self.cells[group], state + self.enter[group](z))

    def likelihood(self, state: Tensor) -> Distribution:
        """p_β0(x | z); the image tower runs here, so a pass that needs no image never pays for it."""
        features = state
        for part in self.grow:
            features = self._through(part, features)
        return self.pixels(self.head(features).to(self.top.dtype))  # autocast may have made it bf16

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        """A reparameterised draw z ~ q_ω(z | x), top-down.

        Args:
            x: observations, (batch, *x_shape).
            rng: random number generator; None: torch's global stream.
        """
        check_x(x, self.x_shape)
        sides = self._sides(x)

        def posterior(state: Tensor, p: Any, layer: int) -> tuple[Tensor, Tensor]:
            group = self._group(layer)
            shift, raw = self.posterior[group](torch.cat([sides[group], state], 1)).to(x.dtype).chunk(2, dim=1)
            sigma = p.scale / self.prior_temperature
            return draw(plain_normal(p.loc + sigma * shift, sigma * _scale(raw)))

        return infer_top_down(self, len(x), posterior, rng)

    def _group(self, layer: int) -> int:
        """Place of group `layer` in the module lists, which run from the top."""
        return len(self.latent_shapes) - layer

    def _sides(self, x: Tensor) -> list[Tensor]:
        """The encoder's features for every group, from the top."""
        low, high = self.x_range
        features = self.stem((2 * (x - low) / (high - low) - 1).contiguous(memory_format=torch.channels_last))
        for part in self.shrink:
            features = self._through(part, features)
        sides: list[Tensor] = []
        scale = 0
        for group in reversed(range(len(self.latent_shapes))):
            if sides and self._last_of_scale[group]:
                features = self.down[scale](features)
                scale += 1
            features = self._through(self.side[group], features)
            sides.insert(0, features)
        return sides

    def _through(self, part: nn.Module, features: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return checkpoint(part, features, use_reentrant=False)  # type: ignore[no-any-return]
        return part(features)


class _Cell(nn.Module):
    """h + g(h), g of two 3 × 3 convolutions; the second starts small, so that a deep stack starts near the identity."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        norms = (nn.GroupNorm(math.gcd(width, _NORM_GROUPS), width) for _ in range(2))
        first, second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        with torch.no_grad():
            second.weight.mul_(1 / math.sqrt(depth))
        self.net = nn.Sequential(next(norms), nn.SiLU(), first, next(norms), nn.SiLU(), second)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.net(features)


class _Half(nn.Conv2d):
    """Half the resolution."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__(source, target, 3, stride=2, padding=1)


class _Twice(nn.Conv2d):
    """Twice the resolution: nearest neighbours and a convolution."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__(source, target, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.interpolate(input, scale_factor=2, mode="nearest"))


def _head(source: int, target: int, kernel: int) -> nn.Sequential:
    """What reads parameters of a distribution from features, small at first."""
    out = nn.Conv2d(source, target, kernel, padding=kernel // 2)
    with torch.no_grad():
        out.weight.mul_(0.1)
    return nn.Sequential(nn.SiLU(), out)


def _scale(raw: Tensor) -> Tensor:
    """e^raw with |raw| softly kept below 5."""
    return torch.exp(_LOG_SCALE_LIMIT * torch.tanh(raw / _LOG_SCALE_LIMIT))


def _check_arguments(x_shape: torch.Size, groups: Sequence[int], downsample: int) -> None:
    if len(x_shape) != 3:
        raise ShapeError(f"x_shape: expected (channels, height, width), got {tuple(x_shape)}.")
    if not isinstance(groups, Sequence):
        raise ArgumentError(f"groups: expected the number of groups at each scale, such as (4, 4), got {groups!r}.")
    if len(groups) == 0:
        raise ArgumentError("groups: expected the groups of at least one scale, got none.")
    for count in groups:
        check_count("groups", count)
    factor = 2 ** (check_count("downsample", downsample, least=0) + len(groups) - 1)
    if any(n % factor for n in x_shape[1:]):
        raise ShapeError(
            f"x_shape: expected sides that are multiples of {factor} for {len(groups)} scales and downsample={downsample}, got "
            f"{tuple(x_shape)}. Pad the images, or take fewer scales."
        )
