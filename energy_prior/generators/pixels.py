"""p_β0(x | z) of images, from what a decoder gives."""

from __future__ import annotations

__all__ = ["Likelihood", "PixelLikelihood", "check_x"]

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal

from energy_prior._util import shown
from energy_prior.checks.settings import check_count, check_positive, check_shape
from energy_prior.errors import ArgumentError, ShapeError
from energy_prior.generators.likelihoods import DiscretizedLogistic, DiscretizedLogisticMixture, InModelUnits, check_range

Likelihood = Literal["gaussian", "bernoulli", "discretized_logistic", "mixture"]
"""Names of the likelihoods that `PixelLikelihood` makes."""


class PixelLikelihood(nn.Module):
    """p_β0(x | z) from a decoder's output, (batch, `channels`, …).

    "gaussian" and "discretized_logistic" have a mean inside `x_range` and one scale for all pixels, "bernoulli" has logits,
    "mixture" is a `DiscretizedLogisticMixture` of images with 1 or 3 channels.

    Args:
        x_shape: shape of an observation, without the batch.
        name: one of these four.
        sigma: scale in the data's units, > 0, for "gaussian" and "discretized_logistic"; None: one number, learned.
        x_range: lowest and highest value of x.
        levels: grid values between them for the discretised ones (256 for 8-bit images).
        mixtures: components of "mixture".

    Attributes:
        channels: size that the decoder's output has in place of x's first dimension.
        config: the likelihood, its sigma, range and levels, as arguments of a generator: plain values.

    Raises:
        ArgumentError, ShapeError: if a value is impossible; the message says which.

    Examples:
        >>> pixels = PixelLikelihood((1, 8, 8), "mixture", mixtures=2)
        >>> pixels.channels
        6
        >>> pixels(torch.zeros(4, 6, 8, 8)).log_prob(torch.zeros(4, 1, 8, 8)).shape
        torch.Size([4])
    """

    def __init__(
        self,
        x_shape: Sequence[int],
        name: Likelihood,
        *,
        sigma: float | None = None,
        x_range: Sequence[float] = (0.0, 1.0),
        levels: int = 256,
        mixtures: int = 5,
    ) -> None:
        super().__init__()
        self.x_shape: torch.Size = check_shape("x_shape", x_shape)
        self.x_range: tuple[float, float] = check_range("x_range", x_range)
        self.levels: int = check_count("levels", levels, least=2)
        self.mixtures: int = check_count("mixtures", mixtures)
        if name not in get_args(Likelihood):
            raise ArgumentError(f"likelihood: expected one of {get_args(Likelihood)}, got {shown(name)}.")
        if name == "bernoulli" and self.x_range != (0.0, 1.0):
            raise ArgumentError(f'x_range: likelihood="bernoulli" needs (0, 1), got {self.x_range}.')
        if name == "mixture" and (len(self.x_shape) != 3 or self.x_shape[0] not in (1, 3)):
            raise ShapeError(f'x_shape: likelihood="mixture" needs (1 or 3, height, width), got {tuple(self.x_shape)}.')
        self.name: Likelihood = name
        self.channels: int = (10 if self.x_shape[0] == 3 else 3) * self.mixtures if name == "mixture" else self.x_shape[0]
        given = None if sigma is None else check_positive("sigma", sigma)
        self.config: dict[str, Any] = {"likelihood": name, "sigma": given, "x_range": list(self.x_range), "levels": self.levels}
        start = 0.1 * (self.x_range[1] - self.x_range[0]) if given is None else given
        learned = sigma is None and name in ("gaussian", "discretized_logistic")
        self.log_sigma: nn.Parameter = nn.Parameter(torch.tensor(math.log(start)), requires_grad=learned)

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.name}, x_range={self.x_range}, levels={self.levels}, mixtures={self.mixtures}"

    def forward(self, parameters: Tensor) -> Distribution:
        """The distribution, batch_shape (batch,), event_shape `x_shape`, in the dtype of the weights (autocast or not).

        Args:
            parameters: features of the decoder's last layer, (batch, channels, *x_shape[1:]).
        """
        parameters = parameters.to(self.log_sigma.dtype)
        low, high = self.x_range
        if self.name == "mixture":
            base = DiscretizedLogisticMixture.from_channels(parameters, colours=self.x_shape[0], levels=self.levels)
            half = (high - low) / 2
            return InModelUnits(base, lambda x: (x - low) / half - 1, lambda y: low + half * (y + 1))
        dimensions = len(self.x_shape)
        if self.name == "bernoulli":
            return Independent(Bernoulli(logits=parameters, validate_args=False), dimensions, validate_args=False)
        mean = low + (high - low) * torch.sigmoid(parameters)
        sigma = self.log_sigma.exp().expand_as(mean)
        if self.name == "gaussian":
            pixel: Distribution = Normal(mean, sigma, validate_args=False)
        else:
            pixel = DiscretizedLogistic(mean, sigma, self.levels, low, high, validate_args=False)
        return Independent(pixel, dimensions, validate_args=False)


def check_x(x: Tensor, x_shape: torch.Size) -> None:
    """Observations of an inference model are (batch, *x_shape)."""
    if x.shape[1:] != x_shape:
        raise ShapeError(f"x: expected shape (batch, {', '.join(map(str, x_shape))}), got {tuple(x.shape)}.")
