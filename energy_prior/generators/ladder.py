"""`LadderVAE`: a Gaussian ladder p(x|z_1) p(z_1|z_2) … p(z_L) with a bottom-up inference model, for images of any shape."""

from __future__ import annotations

__all__ = ["LadderVAE"]

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from energy_prior._util import draw, plain_normal, shown
from energy_prior.checks.settings import check_count, check_sizes
from energy_prior.errors import ArgumentError, ShapeError
from energy_prior.generators.pixels import Likelihood, PixelLikelihood, check_x
from energy_prior.process import reproducible
from energy_prior.protocol import Inferred

Nets = Literal["mlp", "conv"]

_LOG_SCALE_LIMIT = 5.0


class LadderVAE(nn.Module):
    """A hierarchical VAE with L layers of Gaussian latents, each conditioned on the one above.

        p_β(z) = N(z_L; 0, I) ∏_{i<L} N(z_i; μ_i(z_{i+1}), σ_i(z_{i+1})²),   p_β0(x | z_1)
        q_ω(z | x) = q(z_1 | x) ∏_{i>1} q(z_i | z_{i−1})  (bottom-up)

    It follows `HierarchicalGenerator`; `energy_prior.fit_elbo` trains it.

    Args:
        x_shape: shape of an observation without the batch; (channels, height, width) for nets="conv".
        latent_dims: sizes of z_1, …, z_L (z_1 nearest the data): units, or channels of a map for nets="conv", where z_i has
            1/2^i of the image's height and width, rounded up.
        hidden: width of the hidden layers (units, or channels).
        depth: hidden layers per net.
        nets: "mlp" or "conv".
        likelihood: "gaussian", "bernoulli" (x in [0, 1]), "discretized_logistic" or "mixture" (of discretised logistics).
        sigma: scale of the likelihood in the data's units, > 0, for "gaussian" and "discretized_logistic"; None: one
            number, learned.
        x_range: lowest and highest value of x; the decoder's mean stays inside it.
        levels: grid values between them for the discretised likelihoods (256 for 8-bit images).

    Attributes:
        config: the arguments but `x_shape`, as a checkpoint keeps them: plain values, which JSON can hold.

    Raises:
        ArgumentError, ShapeError: if a value is impossible; the message says which.

    Examples:
        >>> vae = LadderVAE((1, 8, 8), latent_dims=(16, 8))
        >>> vae.latent_shapes
        (torch.Size([16]), torch.Size([8]))
    """

    autocast = True

    def __init__(
        self,
        x_shape: Sequence[int],
        latent_dims: Sequence[int] = (16, 8),
        *,
        hidden: int = 256,
        depth: int = 2,
        nets: Nets = "mlp",
        likelihood: Likelihood = "gaussian",
        sigma: float | None = None,
        x_range: Sequence[float] = (0.0, 1.0),
        levels: int = 256,
    ) -> None:
        super().__init__()
        pixels = PixelLikelihood(x_shape, likelihood, sigma=sigma, x_range=x_range, levels=levels)
        self.x_shape: torch.Size = pixels.x_shape
        self.x_range: tuple[float, float] = pixels.x_range
        self.latent_shapes: tuple[torch.Size, ...] = _latent_shapes(self.x_shape, latent_dims, nets)
        hidden, depth = check_count("hidden", hidden), check_count("depth", depth)
        self.config: dict[str, Any] = {"latent_dims": [shape[0] for shape in self.latent_shapes], **pixels.config}
        self.config |= {"hidden": hidden, "depth": depth, "nets": nets}
        make = _conv_net if nets == "conv" else _mlp_net
        shapes, layers = (self.x_shape, *self.latent_shapes), len(self.latent_shapes)
        self.inference: nn.ModuleList = nn.ModuleList(
            make(shapes[i], _double(shapes[i + 1]), hidden, depth) for i in range(layers)
        )
        self.prior: nn.ModuleList = nn.ModuleList(
            make(shapes[i + 1], _double(shapes[i]), hidden, depth) for i in range(1, layers)
        )
        self.decoder: nn.Module = make(shapes[1], torch.Size((pixels.channels, *self.x_shape[1:])), hidden, depth)
        self.pixels = pixels  # after the nets: the order of a state dict

    def start(self, batch_size: int) -> Tensor:
        """The state above z_L: zeros, the mean of p(z_L) = N(0, I), (batch, *latent_shapes[-1])."""
        return self.pixels.log_sigma.new_zeros(batch_size, *self.latent_shapes[-1])

    def conditional(self, state: Tensor, layer: int) -> Normal:
        """p_β(z_i | z_{i+1}) of layer i.

        Args:
            state: latents z_{i+1}, (batch, *latent_shapes[layer]); above z_L that of `start`.
            layer: i, 1 … L.
        """
        if layer == len(self.latent_shapes):
            return plain_normal(state, torch.ones_like(state))
        return self._normal(self.prior[layer - 1](state))

    def descend(self, state: Tensor, z: Tensor, layer: int) -> Tensor:
        """The state below z_i: z_i itself, (batch, *latent_shapes[layer - 1]).

        Args:
            state: latents z_{i+1}, (batch, *latent_shapes[layer]); not read.
            z: z_i, (batch, *latent_shapes[layer - 1]).
            layer: i, 1 … L.
        """
        return z

    def likelihood(self, state: Tensor) -> Distribution:
        """p_β0(x | z_1); the decoder runs here, so a pass that needs no image never pays for it.

        Args:
            state: latents z_1, (batch, *latent_shapes[0]).
        """
        return self.pixels(self.decoder(state))

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        """A reparameterised draw z ~ q_ω(z | x), bottom-up: log_q[:, i − 1] = log q(z_i | z_{i−1}), with z_0 = x.

        Args:
            x: observations, (batch, *x_shape).
            rng: random number generator; None: torch's global stream.
        """
        check_x(x, self.x_shape)
        latents: list[Tensor] = []
        log_q: list[Tensor] = []
        below = x
        with reproducible(rng, x.device):
            for net in self.inference:
                below, log_density = draw(self._normal(net(below)))
                latents.append(below)
                log_q.append(log_density)
        return Inferred(tuple(latents), torch.stack(log_q, dim=1))

    def _normal(self, parameters: Tensor) -> Normal:
        """N(loc, scale²) from (batch, 2·d, …), |log scale| softly kept below 5, in the weights' dtype under autocast too."""
        loc, raw = parameters.to(self.pixels.log_sigma.dtype).chunk(2, dim=1)
        log_scale = _LOG_SCALE_LIMIT * torch.tanh(raw / _LOG_SCALE_LIMIT)
        return plain_normal(loc, log_scale.exp())


def _latent_shapes(x_shape: torch.Size, latent_dims: Any, nets: str) -> tuple[torch.Size, ...]:
    """Shapes of z_1, …, z_L."""
    if nets not in get_args(Nets):
        raise ArgumentError(f"nets: expected one of {get_args(Nets)}, got {shown(nets)}.")
    if nets == "conv" and len(x_shape) != 3:
        raise ShapeError(f'x_shape: nets="conv" needs (channels, height, width), got {tuple(x_shape)}.')
    dims = check_sizes("latent_dims", latent_dims)
    if len(dims) == 0:
        raise ArgumentError("latent_dims: expected the size of at least one layer, got none.")
    sides = x_shape[1:] if nets == "conv" else ()
    return tuple(torch.Size((dim, *(-(-n // 2**i) for n in sides))) for i, dim in enumerate(dims, start=1))


def _double(shape: torch.Size) -> torch.Size:
    """The shape of loc and log scale together, side by side along the first dimension."""
    return torch.Size((2 * shape[0], *shape[1:]))


def _mlp_net(source: torch.Size, target: torch.Size, hidden: int, depth: int) -> nn.Sequential:
    """A fully connected net between any two shapes."""
    layers: list[nn.Module] = [nn.Flatten()]
    width = math.prod(source)
    for _ in range(depth):
        layers += [nn.Linear(width, hidden), nn.SiLU()]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, math.prod(target)), nn.Unflatten(1, target))


def _conv_net(source: torch.Size, target: torch.Size, hidden: int, depth: int) -> nn.Sequential:
    """A convolutional net between two (channels, height, width) maps, resized to the target before its hidden layers."""
    layers: list[nn.Module] = [nn.Conv2d(source[0], hidden, 3, padding=1), nn.SiLU(), _Resize(target[1:])]
    for _ in range(depth):
        layers += [nn.Conv2d(hidden, hidden, 3, padding=1), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(hidden, target[0], 3, padding=1))


class _Resize(nn.Module):
    """Area averaging down, nearest neighbour up; for whole factors by pooling and repetition, which are far faster."""

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.size = (int(size[0]), int(size[1]))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        down = height // self.size[0], width // self.size[1]
        if (self.size[0] * down[0], self.size[1] * down[1]) == (height, width):
            return F.avg_pool2d(x, down) if max(down) > 1 else x
        if self.size[0] % height == 0 and self.size[1] % width == 0:
            return F.interpolate(x, self.size, mode="nearest")
        return F.interpolate(x, self.size, mode="area")
