"""Likelihoods of 8-bit images in [0, 1] that several public models share, at the edges and floors that they have there."""

from __future__ import annotations

__all__ = ["NVAEMixture", "binned_logistic", "mixture_of_logistics", "rounded_normal"]

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from energy_prior._util import normal_like
from energy_prior.convolved import ConvolvedNormal
from energy_prior.generators.likelihoods import DiscretizedLogistic, DiscretizedLogisticMixture, InModelUnits


class NVAEMixture(DiscretizedLogisticMixture):
    """The mixture of logistics with the mean of NVAE's samples: of averaged locations and coefficients, channel by channel."""

    @property
    def mean(self) -> Tensor:
        """x̂_1 = μ̄_1, x̂_2 = μ̄_2 + c̄_1 x̂_1, x̂_3 = μ̄_3 + c̄_2 x̂_1 + c̄_3 x̂_2, each clamped to the range, with averages under π.

        Observations, (batch, C, height, width).
        """
        weights = self.logits.softmax(1).unsqueeze(2)
        means = (self.loc * weights).sum(1)
        coefficients = torch.zeros_like(means) if self.coefficients is None else (self.coefficients * weights).sum(1)
        found: list[Tensor] = []
        for i, mean in enumerate(means.unbind(1)):
            first = i * (i - 1) // 2  # c_1 for green, c_2 and c_3 for blue
            shift = [coefficients[:, first + j] * found[j] for j in range(i)]
            found.append(torch.stack([mean, *shift]).sum(0).clamp(self.low, self.high))
        return torch.stack(found, 1)


def mixture_of_logistics(parameters: Tensor) -> Distribution:
    """PixelCNN++'s mixture of RGB images: below −0.999 in [−1, 1] is the lowest level, above 0.999 the highest.

    Args:
        parameters: features of the last layer, (batch, 10·M, height, width).
    """
    mixture = DiscretizedLogisticMixture.from_channels(parameters, bottom=-0.999, top=0.999)
    return InModelUnits(mixture, lambda x: 2 * x - 1, lambda y: (y + 1) / 2)


def binned_logistic(mean: Tensor, log_scale: Tensor, bins: int, floor: float) -> Distribution:
    """A logistic's mass in n bins of width 1/n on [0, 1], of the bin that 255/256 x + 1/512 is in.

    Args:
        mean: μ, (batch, *x_shape), observations.
        log_scale: log s, (batch, *x_shape), s in the data's units.
        bins: n.
        floor: added to every probability.
    """
    # Here the levels lie at k/(n − 1), in the middle of bins of width 1/(n − 1): the same bins, shifted and stretched.
    stretched = bins / (bins - 1)
    loc, scale = (mean - 0.5 / bins) * stretched, log_scale.exp() * stretched
    pixel = DiscretizedLogistic(loc, scale, bins, floor=floor, validate_args=False)
    base = Independent(pixel, mean.ndim - 1, validate_args=False)
    return InModelUnits(base, lambda x: torch.floor((x * (255 / 256) + 1 / 512) * bins) / (bins - 1), lambda y: y)


def rounded_normal(mean: Tensor, scale: Tensor) -> Distribution:
    """A Gaussian's mass in bins of width 1/255 around 8-bit levels; those below 0 and above 1 keep theirs.

    Args:
        mean: μ, (batch, *x_shape), observations.
        scale: σ, (batch, *x_shape), in the data's units.
    """
    base = Independent(_Rounded(255 * mean, 255 * scale, validate_args=False), mean.ndim - 1, validate_args=False)
    return InModelUnits(base, lambda x: 255 * x, lambda y: y / 255)


class _Rounded(ConvolvedNormal):
    """N(μ, σ²) rounded to whole numbers: its probabilities are densities of the convolution."""

    has_rsample = False

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, whole numbers, (*sample_shape, batch, *x_shape)."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return (self.loc + self.scale * normal_like(shape, self.loc)).round()
