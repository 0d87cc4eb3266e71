"""VDVAE (Child, ICLR 2021), as in the repository openai/vdvae, as a generator."""

from __future__ import annotations

__all__ = ["VDVAEAdapter"]

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from energy_prior._util import draw, not_none, plain_normal
from energy_prior.adapters.base import Adapter
from energy_prior.adapters.temperature import check_temperatures, numbers_of
from energy_prior.errors import ArgumentError
from energy_prior.generators.likelihoods import DiscretizedLogisticMixture, InModelUnits
from energy_prior.protocol import Inferred
from energy_prior.topdown import infer_top_down

# Mean and standard deviation of a data set's pixels, 0 … 255, by which the repository normalises them for the encoder.
_PIXELS: dict[str, tuple[float, float]] = {
    "cifar10": (120.63838, 64.16736),
    "imagenet32": (116.2373, 69.37404),
    "imagenet64": (115.92961967, 69.37404),
    "ffhq_256": (112.8666757481, 69.84780273),
    "ffhq_1024": (0.4387 * 255, 0.2743 * 255),
}


class _State(NamedTuple):
    """Above a block: features by resolution, and those of the block, before and after its prior net, with p(z_i | z_{>i}).

    Below z_1 there is no block: the last three are None.
    """

    by_resolution: Mapping[int, Tensor]
    before: Tensor | None
    after: Tensor | None
    conditional: Normal | None


class VDVAEAdapter(Adapter):
    """A `VAE` of openai/vdvae.

        p(z_i | z_{>i}) = N(μ, (t_i σ)²),   q(z_i | z_{>i}, x) Gaussian

    Observations are in [0, 1], (batch, 3, height, width): the adapter normalises them for the encoder and moves channels last.
    The likelihood is a mixture of discretised logistics, which counts values below −0.999 and above 0.999 in [−1, 1] as the
    lowest and the highest level; for "ffhq_256" it is that of the highest 5 bits. Both as in the repository.

    Args:
        model: the model, in evaluation mode, with its weights (`energy_prior.adapters.load_weights`).
        prior_temperature: t > 0, factor on every σ of the prior, or (t_1, …, t_L), one per layer, that of z_1 first: the
            reverse of the order that the repository's `forward_uncond_samples(n, t)` takes.
        pixels: mean and standard deviation of pixels, 0 … 255, by which they are normalised for the encoder; None: those that
            the repository has for `model.H.dataset`.

    Raises:
        GeneratorError: if this is not such a model, or is not in evaluation mode.
        ArgumentError: if `pixels` is needed, or a temperature is impossible.

    Examples:
        With `model`, a small `VAE` of that code, in evaluation mode:

        >>> from energy_prior import JointEBMPrior
        >>> prior = JointEBMPrior(VDVAEAdapter(model))
        >>> [tuple(z) for z in prior.generator.latent_shapes]
        [(2, 8, 8), (2, 8, 8), (2, 4, 4), (2, 4, 4), (2, 1, 1)]
        >>> prior.sample(4, prior="generator").shape  # the model's own samples
        torch.Size([4, 3, 8, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        prior_temperature: float | Iterable[float] = 1.0,
        pixels: Iterable[float] | None = None,
    ) -> None:
        super().__init__(model, ("encoder", "decoder", "H"), "a VAE of openai/vdvae")
        dataset = self.model.H.dataset
        if pixels is None and dataset not in _PIXELS:
            raise ArgumentError(f"pixels: expected (mean, standard deviation), as model.H.dataset, {dataset!r}, is not known.")
        self.pixels: tuple[float, float] = _check_pixels(pixels) if pixels is not None else _PIXELS[dataset]
        self._low_bit = dataset == "ffhq_256"
        blocks = self.model.decoder.dec_blocks[::-1]  # the model's list runs from z_L to z_1
        self.latent_shapes: tuple[torch.Size, ...] = tuple(torch.Size((block.zdim, block.base, block.base)) for block in blocks)
        self.prior_temperature: tuple[float, ...] = check_temperatures(prior_temperature, len(blocks))
        size = self.model.H.image_size
        self.x_shape: torch.Size = torch.Size((self.model.H.image_channels, size, size))

    def extra_repr(self) -> str:
        """The settings."""
        return f"prior_temperature={self.prior_temperature}, pixels={self.pixels}, dataset={self.model.H.dataset!r}"

    def start(self, batch_size: int) -> _State:
        """The learned features of every resolution, which are there above z_L."""
        features = {bias.shape[2]: bias.expand(batch_size, -1, -1, -1) for bias in self.model.decoder.bias_xs}
        return self._above(len(self.latent_shapes), features)

    def conditional(self, state: _State, layer: int) -> Normal:
        """p(z_i | z_{>i}) of layer i, a block in VDVAE's words, computed with the features of the block before z_i enters."""
        return not_none(state.conditional)

    def descend(self, state: _State, z: Tensor, layer: int) -> _State:
        """Through the block, into a new dictionary of features: the repository's own code writes into the one it is given."""
        block = self._block(layer)
        features = block.resnet(state.after + block.z_proj(z))
        return self._above(layer - 1, {**state.by_resolution, block.base: features})

    def likelihood(self, state: _State) -> Distribution:
        """p(x | z): a mixture of discretised logistics."""
        decoder = self.model.decoder
        features = decoder.final_fn(state.by_resolution[self.model.H.image_size])
        parameters = self._cast(decoder.out_net(features).permute(0, 3, 1, 2))
        levels, spacing = (32, 8 / 127.5) if self._low_bit else (256, None)  # targets of 5 bits are 8 k of 255, bins 255/31
        base = DiscretizedLogisticMixture.from_channels(parameters, levels=levels, bottom=-0.999, top=0.999, spacing=spacing)
        return InModelUnits(base, self._target, lambda y: ((y + 1) / 2).clamp(0, 1))

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        """z ~ q(z_i | z_{>i}, x), top-down.

        Args:
            x: observations, (batch, *x_shape).
            rng: random number generator; None: torch's global stream.
        """
        mean, deviation = self.pixels
        activations = self.model.encoder(((255 * x - mean) / deviation).permute(0, 2, 3, 1))

        def posterior(state: _State, p: Any, layer: int) -> tuple[Tensor, Tensor]:
            return draw(self.posterior(state, activations, layer))

        return infer_top_down(self, len(x), posterior, rng)

    def posterior(self, state: _State, activations: Mapping[int, Tensor], layer: int) -> Normal:
        """q(z_i | z_{>i}, x) of layer i from the encoder's activations at its resolution.

        Args:
            state: the state above the layer.
            activations: resolution -> the encoder's features, (batch, channels, height, width).
            layer: i, 1 … L.
        """
        block = self._block(layer)
        features = torch.cat([not_none(state.before), activations[block.base]], dim=1)
        loc, log_scale = block.enc(features).chunk(2, dim=1)
        return plain_normal(self._cast(loc), self._cast(log_scale).exp())

    def _block(self, layer: int) -> Any:
        """The model's block with z_i of layer i."""
        return self.model.decoder.dec_blocks[self._index(layer)]

    def _above(self, layer: int, by_resolution: Mapping[int, Tensor]) -> _State:
        """The state above z_i of layer i; layer 0: that below z_1."""
        if layer == 0:
            return _State(by_resolution, None, None, None)
        block = self._block(layer)
        reference = next(iter(by_resolution.values()))
        before = by_resolution.get(block.base)
        if before is None:
            before = reference.new_zeros(len(reference), block.widths[block.base], block.base, block.base)
        if block.mixin is not None:
            coarser = by_resolution[block.mixin][:, : before.shape[1]]
            factor = block.base // block.mixin
            before = before + coarser.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        loc, log_scale, residual = block.prior(before).split([block.zdim, block.zdim, before.shape[1]], dim=1)
        scale = (self._cast(log_scale) + math.log(self.prior_temperature[layer - 1])).exp()
        return _State(by_resolution, before, before + residual, plain_normal(self._cast(loc), scale))

    def _target(self, x: Tensor) -> Tensor:
        """Pixels in [−1, 1] as the likelihood sees them."""
        level = 255 * x
        if self._low_bit:
            level = torch.floor(level.round() / 8) * 8
        return level / 127.5 - 1


def _check_pixels(values: Any) -> tuple[float, float]:
    """Mean and standard deviation of pixels, as Python's own numbers."""
    found = numbers_of(values)
    if len(found) != 2 or found[0] is None or found[1] is None or found[1] <= 0:
        raise ArgumentError(f"pixels: expected (mean, standard deviation > 0) of pixels from 0 to 255, got {values!r}.")
    return found[0], found[1]
