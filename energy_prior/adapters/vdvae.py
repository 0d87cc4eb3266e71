"""VDVAE (Child, ICLR 2021), as in the repository openai/vdvae, as a generator."""

from __future__ import annotations

__all__ = ["VDVAEAdapter"]

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from energy_prior._util import draw, not_none, plain_normal
from energy_prior.adapters.base import Adapter
from energy_prior.errors import ArgumentError
from energy_prior.generators.likelihoods import DiscretizedLogisticMixture, Observed
from energy_prior.protocol import Inferred
from energy_prior.topdown import infer_top_down

# Mean and standard deviation of a set's pixels, 0 … 255, with which its encoder was trained.
_PIXELS = {
    "cifar10": (120.63838, 64.16736),
    "imagenet32": (116.2373, 69.37404),
    "imagenet64": (115.92961967, 69.37404),
    "ffhq_256": (112.8666757481, 69.84780273),
    "ffhq_1024": (0.4387 * 255, 0.2743 * 255),
}


class _State(NamedTuple):
    """Above a block: features by resolution, and those of the block, before and after its prior, with p(z_i | z_{>i})."""

    by_resolution: Mapping[int, Tensor]
    before: Tensor | None
    after: Tensor | None
    conditional: Normal | None


class VDVAEAdapter(Adapter):
    """A `VAE` of openai/vdvae.

        p(z_i | z_{>i}) = N(μ, (t_i σ)²),   q(z_i | z_{>i}, x) Gaussian

    Observations are in [0, 1], (batch, 3, height, width): the adapter normalises them for the encoder and moves channels last.
    For "ffhq_256" the likelihood is that of the highest 5 bits, as in the repository.

    Args:
        model: the model, in evaluation mode, with its weights (`energy_prior.adapters.load_weights`).
        prior_temperature: t > 0, factor on every σ of the prior, or (t_1, …, t_L), one per layer, z_1 nearest the data first: the
            reverse of what the repository's `forward_uncond_samples(n, t)` takes.
        pixels: mean and standard deviation of pixels, 0 … 255, that the encoder was trained with; None: those that the
            repository has for `model.H.dataset`.

    Raises:
        GeneratorError: if this is not such a model, or is not in evaluation mode.
        ArgumentError: if `pixels` is needed, or a temperature is impossible.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        prior_temperature: float | Sequence[float] = 1.0,
        pixels: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(model, ("encoder", "decoder", "H"), "a VAE of openai/vdvae")
        dataset = self.model.H.dataset
        if pixels is None and dataset not in _PIXELS:
            raise ArgumentError(f"pixels: expected (mean, standard deviation), as model.H.dataset, {dataset!r}, is not known.")
        self.pixels = _check_pixels(pixels) if pixels is not None else _PIXELS[dataset]
        self._low_bit = dataset == "ffhq_256"
        blocks = self.model.decoder.dec_blocks
        self.prior_temperature = _check_temperature(prior_temperature, len(blocks))
        self.latent_shapes = tuple(torch.Size((b.zdim, b.base, b.base)) for b in reversed(blocks))
        size = self.model.H.image_size
        self.x_shape = torch.Size((self.model.H.image_channels, size, size))

    def extra_repr(self) -> str:
        """What no part of it says."""
        return f"prior_temperature={self.prior_temperature}, pixels={self.pixels}, dataset={self.model.H.dataset!r}"

    def start(self, batch_size: int) -> _State:
        """The learned features of every resolution above the top block."""
        return self._at(0, {b.shape[2]: b.expand(batch_size, -1, -1, -1) for b in self.model.decoder.bias_xs})

    def conditional(self, state: _State, layer: int) -> Normal:
        """p(z_i | z_{>i}) of block i, which comes with what the block makes of its features before it sees z."""
        return not_none(state.conditional)

    def descend(self, state: _State, z: Tensor, layer: int) -> _State:
        """Through the block, into a new dictionary of features: the repository's own code writes into the one it is given."""
        place = self._place(layer)
        block = self.model.decoder.dec_blocks[place]
        features = block.resnet(state.after + block.z_proj(z))
        return self._at(place + 1, {**state.by_resolution, block.base: features})

    def likelihood(self, state: _State) -> Distribution:
        """p(x | z): a mixture of discretised logistics."""
        decoder = self.model.decoder
        features = decoder.final_fn(state.by_resolution[self.model.H.image_size])
        parameters = self._exact(decoder.out_net(features).permute(0, 3, 1, 2))
        base = DiscretizedLogisticMixture.from_channels(parameters, levels=32 if self._low_bit else 256, top=0.999)
        return Observed(base, self._target, lambda y: ((y + 1) / 2).clamp(0, 1))

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        """z ~ q(z_i | z_{>i}, x), top-down."""
        mean, deviation = self.pixels
        activations = self.model.encoder(((255 * x - mean) / deviation).permute(0, 2, 3, 1))

        def posterior(state: _State, p: Any, layer: int) -> tuple[Tensor, Tensor]:
            return draw(self.posterior(state, activations, layer))

        return infer_top_down(self, len(x), posterior, rng)

    def posterior(self, state: _State, activations: Mapping[int, Tensor], layer: int) -> Normal:
        """q(z_i | z_{>i}, x) from the encoder's activations at the block's resolution."""
        block = self.model.decoder.dec_blocks[self._place(layer)]
        features = torch.cat([not_none(state.before), activations[block.base]], dim=1)
        loc, log_scale = block.enc(features).chunk(2, dim=1)
        return plain_normal(self._exact(loc), self._exact(log_scale).exp())

    def _place(self, layer: int) -> int:
        """Of block `layer` in the model's list, which runs from the top."""
        return len(self.latent_shapes) - layer

    def _at(self, index: int, by_resolution: Mapping[int, Tensor]) -> _State:
        """The state above block `index` of the model's list, with what the block makes of the features before it sees z."""
        blocks = self.model.decoder.dec_blocks
        if index == len(blocks):
            return _State(by_resolution, None, None, None)
        block = blocks[index]
        any_of = next(iter(by_resolution.values()))
        before = by_resolution.get(block.base)
        if before is None:
            before = any_of.new_zeros(len(any_of), block.widths[block.base], block.base, block.base)
        if block.mixin is not None:
            above = by_resolution[block.mixin][:, : before.shape[1]]
            factor = block.base // block.mixin
            before = before + above.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        loc, log_scale, residual = block.prior(before).split([block.zdim, block.zdim, before.shape[1]], dim=1)
        scale = (self._exact(log_scale) + math.log(self.prior_temperature[len(blocks) - 1 - index])).exp()
        return _State(by_resolution, before, before + residual, plain_normal(self._exact(loc), scale))

    def _target(self, x: Tensor) -> Tensor:
        """Pixels in [−1, 1] as the likelihood sees them."""
        level = 255 * x
        if self._low_bit:
            level = torch.floor(level.round() / 8) * 8
        return level / 127.5 - 1


def _check_pixels(value: Any) -> tuple[float, float]:
    """Mean and standard deviation of pixels."""
    found = _numbers(value)
    if found.shape != (2,) or not found.isfinite().all() or found[1] <= 0:
        raise ArgumentError(f"pixels: expected (mean, standard deviation > 0) of pixels from 0 to 255, got {value!r}.")
    return float(found[0]), float(found[1])


def _numbers(value: Any) -> Tensor:
    """A number, or numbers in a sequence, an array or a tensor; empty if it is anything else."""
    try:
        return torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return torch.empty(0)


def _check_temperature(value: Any, layers: int) -> tuple[float, ...]:
    """One factor above 0 for every layer's σ, or one per layer."""
    found = _numbers(value)
    found = found.expand(layers) if found.ndim == 0 else found
    if found.shape != (layers,) or not (found.isfinite() & (found > 0)).all():
        raise ArgumentError(
            f"prior_temperature: expected a number above 0, or {layers} of them (that of z_1 first), got {value!r}."
        )
    return tuple(found.tolist())
