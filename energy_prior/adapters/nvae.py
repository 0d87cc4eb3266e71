"""NVAE (Vahdat and Kautz, NeurIPS 2020), as in the repository NVlabs/NVAE, as a generator."""

from __future__ import annotations

__all__ = ["NVAEAdapter"]

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal

from energy_prior._util import draw, plain_normal
from energy_prior.adapters.base import Adapter
from energy_prior.adapters.likelihoods import NVAEMixture
from energy_prior.checks.settings import check_positive
from energy_prior.errors import GeneratorError
from energy_prior.generators.likelihoods import InModelUnits
from energy_prior.protocol import Inferred
from energy_prior.topdown import infer_top_down

# fmt: off
_PARTS = (
    "stem", "pre_process", "enc_tower", "enc0", "enc_sampler", "dec_sampler", "nf_cells", "num_flows", "dec_tower",
    "prior_ftr0", "z0_size", "post_process", "image_conditional", "decoder_output", "res_dist", "vanilla_vae", "crop_output",
    "input_size",
)
# fmt: on


class NVAEAdapter(Adapter):
    """An `AutoEncoder` of NVlabs/NVAE: residual or plain posteriors, with or without flows, any of its three decoders.

        p(z_i | z_{>i}) = N(5 tanh(μ/5), (t (exp(5 tanh(log σ/5)) + 0.01))²), also for z_L, where μ = log σ = 0

    Observations are in [0, 1], as NVAE's loaders give them, but MNIST and Omniglot without the border of 2 that they pad.
    Densities of the Gaussian decoder are in its own units, per image in [−1, 1]. The mixture of logistics counts values below
    −0.999 and above 0.99 there as the lowest and the highest level. Images of fewer bits than 8 (`num_x_bits`) are rounded down
    to that grid first, as NVAE does.

    NVAE's convolutions store their normalised weights in every call, for the regularisation in its own training. Once the model
    is wrapped, they do so in training mode only, as a chain that writes to its model cannot be compiled.

    Args:
        model: the model, in evaluation mode, with its weights (`energy_prior.adapters.load_weights`).
        prior_temperature: t > 0, factor on every σ of the prior. NVAE's `sample(num_samples, t)`.

    Raises:
        GeneratorError: if this is not such a model, or is not in evaluation mode.

    Examples:
        With NVAE's own code, and a checkpoint of it:

            model = AutoEncoder(checkpoint["args"], None, checkpoint["arch_instance"])
            prior = JointEBMPrior(NVAEAdapter(load_weights(model, checkpoint).eval()))

        With a small `model` of four groups, in evaluation mode:

        >>> from energy_prior import JointEBMPrior
        >>> prior = JointEBMPrior(NVAEAdapter(model))
        >>> [tuple(z) for z in prior.generator.latent_shapes]
        [(2, 8, 8), (2, 8, 8), (2, 4, 4), (2, 4, 4)]
        >>> prior.sample(4, prior="generator").shape  # the model's own samples
        torch.Size([4, 3, 16, 16])
    """

    def __init__(self, model: nn.Module, *, prior_temperature: float = 1.0) -> None:
        super().__init__(model, _PARTS, "an AutoEncoder of NVlabs/NVAE")
        self.prior_temperature: float = check_positive("prior_temperature", prior_temperature)
        for part in self.model.modules():
            if hasattr(part, "normalize_weight"):
                part.forward = partial(_convolve, part)
        channels, height, width = self.model.z0_size
        shapes: list[torch.Size] = []
        self._cells: list[list[Any]] = []  # for z_L, …, z_1: the combiner and the cells that follow it
        for cell in self.model.dec_tower:
            if cell.cell_type == "combiner_dec":
                shapes.insert(0, torch.Size((channels, height, width)))
                self._cells.append([cell])
            else:
                self._cells[-1].append(cell)
                if cell.cell_type == "up_dec":
                    height, width = 2 * height, 2 * width
        self.latent_shapes: tuple[torch.Size, ...] = tuple(shapes) or (torch.Size((channels, height, width)),)
        self._border = 2 if self.model.crop_output else 0
        side = self.model.input_size - 2 * self._border
        self.x_shape: torch.Size = torch.Size((self.model.stem.in_channels, side, side))

    def extra_repr(self) -> str:
        """The temperature of the prior and the bits of the observations."""
        return f"prior_temperature={self.prior_temperature}, num_bits={getattr(self.model, 'num_bits', 8)}"

    def start(self, batch_size: int) -> Tensor:
        """The learned features above z_L, (batch, channels, height, width)."""
        return self.model.prior_ftr0.expand(batch_size, -1, -1, -1)

    def conditional(self, state: Tensor, layer: int) -> Normal:
        """p(z_i | z_{>i}) of layer i, a group in NVAE's words; N(0, (1.01 t)²) for z_L.

        Args:
            state: features above the layer, (batch, channels, height, width).
            layer: i, 1 … L.
        """
        if layer == len(self.latent_shapes):
            zero = state.new_zeros(len(state), *self.latent_shapes[-1])
            return self._normal(zero, zero, self.prior_temperature)
        return self._normal(*self._prior_parameters(state, layer), self.prior_temperature)

    def descend(self, state: Tensor, z: Tensor, layer: int) -> Tensor:
        """Through the layer's combiner, and the cells on to the next layer.

        Args:
            state: features above the layer, (batch, channels, height, width).
            z: z_i, (batch, *latent_shapes[layer - 1]).
            layer: i, 1 … L.

        Returns:
            Features below the layer, (batch, channels, height, width); z_i itself of a model that is `vanilla_vae`.
        """
        if self.model.vanilla_vae:
            return z
        combiner, *cells = self._cells[self._index(layer)]
        features = combiner(state, z)
        for cell in cells:
            features = cell(features)
        return features

    def likelihood(self, state: Tensor) -> Distribution:
        """p(x | z) by the image tower, which runs only here.

        Args:
            state: features below z_1, (batch, channels, height, width).
        """
        features = self.model.stem_decoder(state) if self.model.vanilla_vae else state
        for cell in self.model.post_process:
            features = cell(features)
        edge = self._border
        parameters = self.model.image_conditional(features)[..., edge : -edge or None, edge : -edge or None]
        return self._decoder(self.model.decoder_output(self._cast(parameters)))

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        """z ~ q(z_i | z_{>i}, x), top-down; with flows, log q is that of the transformed draw.

        Args:
            x: observations, (batch, *x_shape).
            rng: random number generator; None: torch's global stream.
        """
        features, encoded = self.model.stem(2 * F.pad(self._to_bits(x), (self._border,) * 4) - 1), []
        for cell in self.model.pre_process:
            features = cell(features)
        for cell in self.model.enc_tower:
            if cell.cell_type == "combiner_enc":
                encoded.append((cell, features))  # of z_1, …, z_{L−1}
            else:
                features = cell(features)
        top = self.model.enc0(features)

        def posterior(state: Tensor, p: Any, layer: int) -> tuple[Tensor, Tensor]:
            features = top
            if layer < len(self.latent_shapes):
                combine, below = encoded[layer - 1]
                features = combine(below, state)
            z, log_q = draw(self.posterior(state, features, layer))
            first = self._index(layer) * self.model.num_flows
            for flow in self.model.nf_cells[first : first + self.model.num_flows]:
                z, log_det = flow(z, features)
                log_q = log_q - self._cast(log_det).flatten(1).sum(1)
            return self._cast(z), log_q

        return infer_top_down(self, len(x), posterior, rng)

    def posterior(self, state: Tensor, features: Tensor, layer: int) -> Normal:
        """q(z_i | z_{>i}, x) of layer i before any flow: its parameters alone or, if residual, added to the prior's.

        Args:
            state: the decoder's features above the layer, (batch, channels, height, width).
            features: the encoder's features for the layer, (batch, channels, height, width).
            layer: i, 1 … L.
        """
        loc, log_scale = self.model.enc_sampler[self._index(layer)](features).chunk(2, dim=1)
        if self.model.res_dist and layer < len(self.latent_shapes):
            prior_loc, prior_log_scale = self._prior_parameters(state, layer)
            loc, log_scale = prior_loc + loc, prior_log_scale + log_scale
        return self._normal(loc, log_scale, 1.0)

    def _prior_parameters(self, state: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """μ and log σ of p(z_i | z_{>i}) before they are clamped; z_L has no module of its own for them."""
        loc, log_scale = self.model.dec_sampler[self._index(layer) - 1](state).chunk(2, dim=1)
        return loc, log_scale

    def _normal(self, loc: Tensor, log_scale: Tensor, temperature: float) -> Normal:
        scale = torch.exp(5 * torch.tanh(self._cast(log_scale) / 5)) + 0.01
        return plain_normal(5 * torch.tanh(self._cast(loc) / 5), scale * temperature)

    def _to_bits(self, x: Tensor) -> Tensor:
        """Observations rounded down to the grid of the model's bits, in [0, 1]."""
        bits = getattr(self.model, "num_bits", 8)
        return x if bits == 8 else torch.floor(x * 255 / 2 ** (8 - bits)) / (2**bits - 1)

    def _decoder(self, output: Any) -> Distribution:
        kind = type(output).__name__
        if isinstance(output, Bernoulli):
            return Independent(Bernoulli(logits=output.logits, validate_args=False), 3, validate_args=False)
        if kind == "NormalDecoder":
            base: Distribution = Independent(plain_normal(output.dist.mu, output.dist.sigma), 3, validate_args=False)
        elif kind == "DiscMixLogistic":
            swapped = (p.transpose(1, 2) for p in (output.means, output.log_scales, output.coeffs))
            levels = int(output.max_val) + 1
            base = NVAEMixture(output.logit_probs, *swapped, levels=levels, bottom=-0.999, top=0.99)
        else:
            raise GeneratorError(
                f"model: its decoder_output gives {kind}; expected Bernoulli, NormalDecoder or DiscMixLogistic. Override "
                "`likelihood` of NVAEAdapter for another one."
            )
        return InModelUnits(base, lambda x: 2 * self._to_bits(x) - 1, lambda y: ((y + 1) / 2).clamp(0, 1))


def _convolve(part: Any, x: Tensor) -> Tensor:
    """NVAE's convolution; in evaluation mode without storing the normalised weights."""
    if part.training:
        return type(part).forward(part, x)
    return F.conv2d(x, part.normalize_weight(), part.bias, part.stride, part.padding, part.dilation, part.groups)
