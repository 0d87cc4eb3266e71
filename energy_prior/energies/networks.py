"""Energies of z_i: fully connected and convolutional networks."""

from __future__ import annotations

__all__ = ["ConvEnergy", "FlatEnergy", "LatentEnergy", "MLPEnergy"]

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as with_spectral_norm

from energy_prior.checks.settings import check_flag, check_shape, check_sizes
from energy_prior.energies.base import Energy
from energy_prior.errors import ArgumentError, ShapeError

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"silu": nn.SiLU, "gelu": nn.GELU, "softplus": nn.Softplus, "tanh": nn.Tanh}
"""The smooth activations by name. Langevin follows ∇f: a kink in f is a jump in the drift."""


class FlatEnergy(Energy):
    """f = 0: a layer that has no energy.

    With one on every layer but the top, the joint prior is the latent-space EBM prior of that layer alone (LEBM: Pang, Han,
    Nijkamp, Zhu and Wu, NeurIPS 2020).

    Args:
        latent_shape: shape of z without the batch.
        reads_noise: whether it stands beside energies that read noise; it then takes (ε_i, …, ε_L), as they do.

    Shape: (batch, *latent_shape), or (ε_i, …, ε_L) and t -> (batch,), nats.

    Examples:
        >>> FlatEnergy((4,))(torch.randn(3, 4))
        tensor([0., 0., 0.])
    """

    bounded: bool = False

    def __init__(self, latent_shape: Sequence[int], reads_noise: bool = False) -> None:
        super().__init__(latent_shape)
        self.reads_noise: bool = check_flag("reads_noise", reads_noise)
        self.has_waymarks: bool = self.reads_noise
        self.config: dict[str, Any] = {"reads_noise": self.reads_noise}

    def forward(self, value: Tensor | Sequence[Tensor], /, level: Tensor | None = None) -> Tensor:
        """0 for each row, (batch,), nats.

        Args:
            value: latents of the layer, (batch, *latent_shape), or the noise of it and of those above, (batch, *shape) each.
            level: waymark t in [0, 1], (batch,), which changes nothing.
        """
        own = value if isinstance(value, Tensor) else value[0]
        return own.new_zeros(len(own))

    def _set_from(self, posterior: Sequence[Tensor], prior: Sequence[Tensor]) -> None:
        """There is nothing to set."""


class LatentEnergy(Energy):
    """f(z) = g/√(1 + (g/s)²) with g = net((z − shift)/scale).

    `shift` and `scale` bring a layer to unit scale, so that layers of very different width learn at one rate; `fit` sets
    them once, from posterior and prior draws. They are buffers and travel with checkpoints.

    Args:
        latent_shape: shape of z without the batch.
        saturation: s of `Energy`.

    Attributes:
        shift: mean of the draws that it was set from, z_i's units, (*latent_shape), or (channels, 1, 1) of a map.
        scale: their standard deviation, z_i's units, (*latent_shape), or (channels, 1, 1) of a map.

    Shape: (batch, *latent_shape) -> (batch,), nats.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, latent_shape: Sequence[int], saturation: float | None = None) -> None:
        super().__init__(latent_shape, saturation)
        self.register_buffer("shift", torch.zeros(self._statistics_shape()))
        self.register_buffer("scale", torch.ones(self._statistics_shape()))

    def forward(self, z: Tensor) -> Tensor:
        """f(z), (batch,), nats.

        Args:
            z: latents of the layer, (batch, *latent_shape).
        """
        return self._bounded(self.net((z - self.shift) / self.scale).squeeze(1))

    def _set_from(self, posterior: Sequence[Tensor], prior: Sequence[Tensor]) -> None:
        """Sets shift and scale to the mean and standard deviation of the draws in equal parts."""
        latents = torch.cat([part for pair in zip(posterior, prior, strict=True) for part in pair])
        over = [0] + [d for d, size in enumerate(self.shift.shape, start=1) if size == 1 < self.latent_shape[d - 1]]
        self.shift.copy_(latents.mean(over, keepdim=True)[0])
        self.scale.copy_(latents.std(over, keepdim=True)[0].clamp_min(1e-3))

    def _statistics_shape(self) -> tuple[int, ...]:
        return tuple(self.latent_shape)


class MLPEnergy(LatentEnergy):
    """A fully connected energy, as in Cui, Wu and Han (CVPR 2023), with a smooth activation.

    Args:
        latent_shape: shape of z without the batch; flattened.
        hidden: widths of the hidden layers.
        activation: "silu", "gelu", "softplus" or "tanh".
        spectral_norm: bound every hidden layer's Lipschitz constant by 1 (Miyato et al., ICLR 2018).
        saturation: s of `Energy`, nats, > 0; None: f grows without limit.

    Shape: (batch, *latent_shape) -> (batch,), nats.

    Examples:
        >>> f = MLPEnergy((16,), hidden=(64, 64))
        >>> f(torch.randn(3, 16))
        tensor([0., 0., 0.], grad_fn=<DivBackward0>)
    """

    def __init__(
        self,
        latent_shape: Sequence[int],
        hidden: Sequence[int] = (128, 128),
        activation: str = "silu",
        spectral_norm: bool = False,
        saturation: float | None = 100.0,
    ) -> None:
        super().__init__(latent_shape, saturation)
        hidden, spectral_norm = check_sizes("hidden", hidden), check_flag("spectral_norm", spectral_norm)
        make = _activation(activation)
        self.config.update(hidden=list(hidden), activation=str(activation), spectral_norm=spectral_norm)
        layers: list[nn.Module] = [nn.Flatten()]
        width = math.prod(self.latent_shape)
        for size in hidden:
            linear = _scaled(nn.Linear(width, size))
            layers += [with_spectral_norm(linear) if spectral_norm else linear, make()]
            width = size
        self.net: nn.Module = nn.Sequential(*layers, _zero_head(width))


class ConvEnergy(LatentEnergy):
    """A convolutional energy for latents of shape (channels, height, width): strided 3×3 convolutions and a linear head.

    Args:
        latent_shape: (channels, height, width).
        channels: channels of the convolutions; each after the first halves height and width while they are above 1.
        activation: "silu", "gelu", "softplus" or "tanh".
        spectral_norm: normalise every convolution by its largest singular value (Miyato et al., ICLR 2018).
        saturation: s of `Energy`, nats, > 0; None: f grows without limit.

    Shape: (batch, *latent_shape) -> (batch,), nats.

    Examples:
        >>> f = ConvEnergy((4, 8, 8), channels=(16, 16))
        >>> f(torch.randn(3, 4, 8, 8))
        tensor([0., 0., 0.], grad_fn=<DivBackward0>)
    """

    def __init__(
        self,
        latent_shape: Sequence[int],
        channels: Sequence[int] = (64, 128, 128),
        activation: str = "silu",
        spectral_norm: bool = False,
        saturation: float | None = 100.0,
    ) -> None:
        shape = check_shape("latent_shape", latent_shape)
        if len(shape) != 3:
            raise ShapeError(f"latent_shape: ConvEnergy needs (channels, height, width), got {tuple(shape)}.")
        super().__init__(shape, saturation)
        channels, spectral_norm = check_sizes("channels", channels), check_flag("spectral_norm", spectral_norm)
        make = _activation(activation)
        self.config.update(channels=list(channels), activation=str(activation), spectral_norm=spectral_norm)
        layers: list[nn.Module] = []
        width, h, w = self.latent_shape
        for n, size in enumerate(channels):
            stride = (2 if n and h > 1 else 1, 2 if n and w > 1 else 1)
            conv = _scaled(nn.Conv2d(width, size, 3, stride, padding=1))
            layers += [with_spectral_norm(conv) if spectral_norm else conv, make()]
            width, h, w = size, -(-h // stride[0]), -(-w // stride[1])
        self.net: nn.Module = nn.Sequential(*layers, nn.Flatten(), _zero_head(width * h * w))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _statistics_shape(self) -> tuple[int, ...]:
        return (self.latent_shape[0], 1, 1)


_Weighted = TypeVar("_Weighted", nn.Linear, nn.Conv2d)


def _scaled(layer: _Weighted) -> _Weighted:
    """He initialisation: with torch's own, signals shrink layer by layer to where smooth activations are nearly linear."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _zero_head(width: int) -> nn.Linear:
    """A last layer that starts at f = 0: an untrained joint prior is the generator's own prior."""
    head = nn.Linear(width, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _activation(name: str) -> Callable[[], nn.Module]:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ArgumentError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {name!r}.")
    return ACTIVATIONS[name]
