"""`ResidualVAE`: many layers of latents at several scales, with residual cells and posteriors relative to the prior."""

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
from energy_prior.checks.settings import check_count, check_flag, check_positive, check_shape, check_sizes
from energy_prior.errors import ArgumentError, ShapeError
from energy_prior.generators.pixels import Likelihood, PixelLikelihood, check_x
from energy_prior.protocol import Inferred
from energy_prior.topdown import infer_top_down

_LOG_SCALE_LIMIT = 5.0
_NORM_GROUPS = 8


class ResidualVAE(nn.Module):
    """A deep hierarchical VAE in the manner of NVAE (Vahdat and Kautz, NeurIPS 2020), for images.

        p(z_i | z_{>i}) = N(μ_i, (t σ_i)²),   p(z_L) = N(0, t²)
        q(z_i | z_{>i}, x) = N(μ_i + σ_i Δμ_i, (σ_i e^{Δ_i})²)   (top-down)

    Every layer is a group of latent maps, as NVAE calls it, and there are several layers at each scale. One residual decoder
    runs from a learned tensor at the coarsest scale to the image; each layer reads its prior from it and adds its z to it.
    Posteriors are relative to the prior in units of its σ, so that their KL depends on Δμ and Δ alone. Cells are residual,
    with group norm: no observation depends on the rest of its batch.

    It follows `HierarchicalGenerator`; `energy_prior.fit_elbo` trains it.

    Args:
        x_shape: (channels, height, width); both sides must be multiples of 2^(downsample + scales − 1).
        groups: number of layers (groups of latents) at each scale, that of z_1, the finest, first; as many as there are scales.
        latent_channels: channels of every z_i.
        channels: of the features at the finest scale of latents; doubled from scale to scale, up to 4 times.
        cells: residual cells per layer.
        tower_cells: residual cells per resolution between the image and the finest scale of latents, on the way up and down.
        downsample: halvings between the image and the finest scale of latents.
        likelihood: "mixture" (of discretised logistics), "gaussian", "bernoulli" or "discretized_logistic".
        sigma: as for `LadderVAE`.
        x_range: lowest and highest value of x.
        levels: grid values between them for the discretised likelihoods (256 for 8-bit images).
        mixtures: components of "mixture".
        prior_temperature: t > 0, factor on every σ of the prior. Train with 1.
        checkpointing: keep only the inputs of the cells for the backward pass, and compute the rest again: less memory, more
            time; not in compiled chains.

    Raises:
        ArgumentError, ShapeError: if a value is impossible; the message says which.

    Examples:
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
        x_range: Sequence[float] = (0.0, 1.0),
        levels: int = 256,
        mixtures: int = 5,
        prior_temperature: float = 1.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.prior_temperature: float = check_positive("prior_temperature", prior_temperature)
        self.checkpointing: bool = check_flag("checkpointing", checkpointing)
        self.x_shape: torch.Size = check_shape("x_shape", x_shape)
        groups, downsample = _check_scales(self.x_shape, groups, downsample)
        latent_channels, channels = check_count("latent_channels", latent_channels), check_count("channels", channels)
        cells, tower_cells = check_count("cells", cells), check_count("tower_cells", tower_cells, least=0)
        self.pixels: PixelLikelihood = PixelLikelihood(
            self.x_shape, likelihood, sigma=sigma, x_range=x_range, levels=levels, mixtures=mixtures
        )
        self.x_range: tuple[float, float] = self.pixels.x_range
        self._config: dict[str, Any] = {"groups": list(groups), "latent_channels": latent_channels, "channels": channels}
        self._config |= {"cells": cells, "tower_cells": tower_cells, "downsample": downsample, "mixtures": self.pixels.mixtures}
        scales = len(groups)
        sizes = [tuple(n // 2 ** (downsample + s) for n in self.x_shape[1:]) for s in range(scales)]
        widths = [channels * min(2**s, 4) for s in range(scales)]
        self._scales = tuple(s for s in range(scales) for _ in range(groups[s]))  # the scale of z_1, …, z_L
        self.latent_shapes: tuple[torch.Size, ...] = tuple(torch.Size((latent_channels, *sizes[s])) for s in self._scales)
        depth = cells * sum(groups) + tower_cells * (downsample + 1)  # cells that one image goes through

        def tower(width: int, count: int = cells) -> nn.Sequential:
            return nn.Sequential(*(_Cell(width, depth) for _ in range(count)))

        def image_tower(first: nn.Module) -> nn.Sequential:
            return nn.Sequential(first, tower(channels, tower_cells))

        self.stem: nn.Module = image_tower(nn.Conv2d(self.x_shape[0], channels, 3, padding=1))
        self.shrink: nn.ModuleList = nn.ModuleList(image_tower(_Half(channels, channels)) for _ in range(downsample))
        order = self._scales[::-1]  # the module lists below run from z_L to z_1, as the decoder does
        self.side: nn.ModuleList = nn.ModuleList(tower(widths[s]) for s in order)
        self.down: nn.ModuleList = nn.ModuleList(_Half(widths[s], widths[s + 1]) for s in range(scales - 1))
        self.top: nn.Parameter = nn.Parameter(torch.zeros(1, widths[-1], *sizes[-1]))
        self.prior: nn.ModuleList = nn.ModuleList(_head(widths[s], 2 * latent_channels, 1) for s in order[1:])
        self.posterior: nn.ModuleList = nn.ModuleList(_head(2 * widths[s], 2 * latent_channels, 3) for s in order)
        self.enter: nn.ModuleList = nn.ModuleList(nn.Conv2d(latent_channels, widths[s], 1) for s in order)
        self.cells: nn.ModuleList = nn.ModuleList(
            tower(widths[s]) if s == below else nn.Sequential(tower(widths[s]), _Twice(widths[s], widths[below]))
            for s, below in zip(order, (*order[1:], 0), strict=True)
        )
        self.grow: nn.ModuleList = nn.ModuleList(image_tower(_Twice(channels, channels)) for _ in range(downsample))
        self.head: nn.Module = _head(channels, self.pixels.channels, 3)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def config(self) -> dict[str, Any]:
        """The arguments but `x_shape`: plain values, which JSON can hold."""
        now = {"prior_temperature": self.prior_temperature, "checkpointing": self.checkpointing}
        return {**self._config, **self.pixels.config, **now}

    def extra_repr(self) -> str:
        """The temperature of the prior."""
        return f"prior_temperature={self.prior_temperature}"

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles its towers in place, as `nn.Module.compile` does (for training; chains have a `backend` of their own).

        Args:
            *args: handed on to `nn.Module.compile`.
            **kwargs: handed on to it too.
        """
        for part in (self.stem, *self.shrink, *self.side, *self.cells, *self.grow):
            part.compile(*args, **kwargs)

    def start(self, batch_size: int) -> Tensor:
        """The learned features above z_L, (batch, channels, height, width)."""
        return self.top.expand(batch_size, -1, -1, -1).contiguous(memory_format=torch.channels_last)

    def conditional(self, state: Tensor, layer: int) -> Normal:
        """p_β(z_i | z_{>i}) of layer i; N(0, t²) for z_L.

        Args:
            state: features above the layer, (batch, channels, height, width).
            layer: i, 1 … L.
        """
        if layer == len(self.latent_shapes):
            zero = self.top.new_zeros(len(state), *self.latent_shapes[-1])
            return plain_normal(zero, torch.full_like(zero, self.prior_temperature))
        loc, raw = self.prior[self._index(layer) - 1](state).to(self.top.dtype).chunk(2, dim=1)  # z_L has no head
        return plain_normal(loc, self.prior_temperature * _scale(raw))

    def descend(self, state: Tensor, z: Tensor, layer: int) -> Tensor:
        """Adds z_i to the features, and goes through the cells on to the next layer.

        Args:
            state: features above the layer, (batch, channels, height, width).
            z: z_i, (batch, *latent_shapes[layer - 1]).
            layer: i, 1 … L.

        Returns:
            Features below the layer, (batch, channels, height, width), with the size of the layer below.
        """
        index = self._index(layer)
        return self._through(self.cells[index], state + self.enter[index](z))

    def likelihood(self, state: Tensor) -> Distribution:
        """p_β0(x | z); the image tower runs here, so a pass that needs no image never pays for it.

        Args:
            state: features below z_1, (batch, channels, height, width).
        """
        features = state
        for part in self.grow:
            features = self._through(part, features)
        return self.pixels(self.head(features))

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        """A reparameterised draw z ~ q_ω(z | x), top-down.

        Args:
            x: observations, (batch, *x_shape).
            rng: random number generator; None: torch's global stream.
        """
        check_x(x, self.x_shape)
        encoded = self._encode(x)

        def posterior(state: Tensor, p: Any, layer: int) -> tuple[Tensor, Tensor]:
            features = torch.cat([encoded[layer - 1], state], 1)
            shift, raw = self.posterior[self._index(layer)](features).to(self.top.dtype).chunk(2, dim=1)
            sigma = p.scale / self.prior_temperature
            return draw(plain_normal(p.loc + sigma * shift, sigma * _scale(raw)))

        return infer_top_down(self, len(x), posterior, rng)

    def _index(self, layer: int) -> int:
        """Index of a layer in the module lists, which run from z_L to z_1."""
        return len(self.latent_shapes) - layer

    def _encode(self, x: Tensor) -> list[Tensor]:
        """The encoder's features for z_1, …, z_L."""
        low, high = self.x_range
        features = self.stem((2 * (x - low) / (high - low) - 1).contiguous(memory_format=torch.channels_last))
        for part in self.shrink:
            features = self._through(part, features)
        encoded: list[Tensor] = []
        for layer, (scale, below) in enumerate(zip(self._scales, (0, *self._scales), strict=False), start=1):
            if scale != below:
                features = self.down[below](features)
            features = self._through(self.side[self._index(layer)], features)
            encoded.append(features)
        return encoded

    def _through(self, part: nn.Module, features: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled() and not torch.compiler.is_dynamo_compiling():
            return checkpoint(part, features, use_reentrant=False)
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
    """From features to parameters of a distribution, with small weights at first."""
    out = nn.Conv2d(source, target, kernel, padding=kernel // 2)
    with torch.no_grad():
        out.weight.mul_(0.1)
    return nn.Sequential(nn.SiLU(), out)


def _scale(raw: Tensor) -> Tensor:
    """e^raw with |raw| softly kept below 5."""
    return torch.exp(_LOG_SCALE_LIMIT * torch.tanh(raw / _LOG_SCALE_LIMIT))


def _check_scales(x_shape: torch.Size, groups: Any, downsample: Any) -> tuple[tuple[int, ...], int]:
    """Groups at each scale and the number of halvings, as Python's own, where the image can be halved that often."""
    if len(x_shape) != 3:
        raise ShapeError(f"x_shape: expected (channels, height, width), got {tuple(x_shape)}.")
    groups, downsample = check_sizes("groups", groups), check_count("downsample", downsample, least=0)
    if len(groups) == 0:
        raise ArgumentError("groups: expected the groups of at least one scale, got none.")
    factor = 2 ** (downsample + len(groups) - 1)
    if any(n % factor for n in x_shape[1:]):
        raise ShapeError(
            f"x_shape: expected sides that are multiples of {factor} for {len(groups)} scales and downsample={downsample}, got "
            f"{tuple(x_shape)}. Pad the images, or take fewer scales."
        )
    return groups, downsample
