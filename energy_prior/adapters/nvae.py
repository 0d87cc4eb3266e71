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
from energy_prior.checks.arguments import check_positive
from energy_prior.errors import GeneratorError
from energy_prior.generators.likelihoods import DiscretizedLogisticMixture, Observed
from energy_prior.protocol import Inferred
from energy_prior.topdown import infer_top_down

_PARTS = (
    "stem",
    "pre_process",
    "enc_tower",
    "enc0",
    "enc_sampler",
    "dec_sampler",
    "nf_cells",
    "num_flows",
    "dec_tower",
    "prior_ftr0",
)
_PARTS += (
    "z0_size",
    "post_process",
    "image_conditional",
    "decoder_output",
    "res_dist",
    "vanilla_vae",
    "crop_output",
    "input_size",
)


class NVAEAdapter(Adapter):
    """An `AutoEncoder` of NVlabs/NVAE: residual or plain posteriors, with or without flows, any of its three decoders.

        p(z_i | z_{>i}) = N(5 tanh(μ/5), (t (exp(5 tanh(log σ/5)) + 0.01))²), also for the top, where μ = log σ = 0

    Observations are in [0, 1], as NVAE's loaders give them, but MNIST and Omniglot without the border of 2 that they pad.
    Densities of the Gaussian decoder are in its own units, per image in [−1, 1]. Images of fewer bits than 8 (`num_x_bits`) are
    rounded down to that grid first, as NVAE does.

    NVAE's convolutions keep their normalised weights after every call, for the regularisation in its own training; wrapped,
    they do so in training mode only, as a chain that writes to its model cannot be compiled.

    Args:
        model: the model, in evaluation mode, with its weights (`energy_prior.adapters.load_weights`).
        prior_temperature: t > 0, factor on every σ of the prior. NVAE's `sample(num_samples, t)`.

    Raises:
        GeneratorError: if this is not such a model, or is not in evaluation mode.

    Example:
        model = AutoEncoder(checkpoint["args"], None, checkpoint["arch_instance"])  # NVAE's own code
        prior = JointEBMPrior(NVAEAdapter(load_weights(model, checkpoint).eval()))
    """

    def __init__(self, model: nn.Module, *, prior_temperature: float = 1.0) -> None:
        super().__init__(model, _PARTS, "an AutoEncoder of NVlabs/NVAE")
        self.prior_temperature = check_positive("prior_temperature", prior_temperature)
        for part in self.model.modules():
            if hasattr(part, "normalize_weight"):
                part.forward = partial(_convolve, part)
        channels, height, width = self.model.z0_size
        shapes, self._cells = [], [[]]
        for cell in self.model.dec_tower:
            if cell.cell_type == "combiner_dec":
                shapes.insert(0, torch.Size((channels, height, width)))
                self._cells.append([cell])
            else:
                self._cells[-1].append(cell)
                if cell.cell_type == "up_dec":
                    height, width = 2 * height, 2 * width
        self.latent_shapes = tuple(shapes) or (torch.Size((channels, height, width)),)
        self._border = 2 if self.model.crop_output else 0
        side = self.model.input_size - 2 * self._border
        self.x_shape = torch.Size((self.model.stem.in_channels, side, side))

    def extra_repr(self) -> str:
        """What no part of it says."""
        return f"prior_temperature={self.prior_temperature}, num_bits={getattr(self.model, 'num_bits', 8)}"

    def start(self, batch_size: int) -> Tensor:
        """The learned features above the top group."""
        return self.model.prior_ftr0.expand(batch_size, -1, -1, -1)

    def conditional(self, state: Tensor, layer: int) -> Normal:
        """p(z_i | z_{>i}) of group i from the features above it; N(0, (1.01 t)²) for the top one."""
        if layer == len(self.latent_shapes):
            zero = state.new_zeros(len(state), *self.latent_shapes[-1])
            return self._normal(zero, zero, self.prior_temperature)
        loc, log_scale = self.model.dec_sampler[self._group(layer) - 1](state).chunk(2, dim=1)
        return self._normal(loc, log_scale, self.prior_temperature)

    def descend(self, state: Tensor, z: Tensor, layer: int) -> Tensor:
        """Through the group's combiner, and the cells on to the next group."""
        if self.model.vanilla_vae:
            return z
        combiner, *cells = self._cells[self._group(layer) + 1]
        features = combiner(state, z)
        for cell in cells:
            features = cell(features)
        return features

    def likelihood(self, state: Tensor) -> Distribution:
        """p(x | z) by the image tower, which runs only here."""
        features = self.model.stem_decoder(state) if self.model.vanilla_vae else state
        for cell in self.model.post_process:
            features = cell(features)
        edge = self._border
        parameters = self.model.image_conditional(features)[..., edge : -edge or None, edge : -edge or None]
        return self._decoder(self.model.decoder_output(self._exact(parameters)))

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        """z ~ q(z_i | z_{>i}, x), top-down; with flows, log q is that of the transformed draw."""
        features, sides = self.model.stem(2 * F.pad(self._levels(x), (self._border,) * 4) - 1), []
        for cell in self.model.pre_process:
            features = cell(features)
        for cell in self.model.enc_tower:
            if cell.cell_type == "combiner_enc":
                sides.append((cell, features))
            else:
                features = cell(features)
        top = self.model.enc0(features)

        def posterior(state: Tensor, p: Any, layer: int) -> tuple[Tensor, Tensor]:
            group, side = self._group(layer), top
            if group:
                combine, features = sides[-group]
                side = combine(features, state)
            z, log_q = draw(self.posterior(state, side, layer))
            for flow in self.model.nf_cells[group * self.model.num_flows : (group + 1) * self.model.num_flows]:
                z, log_det = flow(z, side)
                log_q = log_q - log_det.to(log_q.dtype).flatten(1).sum(1)
            return z.to(x.dtype), log_q

        return infer_top_down(self, len(x), posterior, rng)

    def posterior(self, state: Tensor, features: Tensor, layer: int) -> Normal:
        """q(z_i | z_{>i}, x) before any flow: residual to the prior's parameters before they are clamped, or on its own."""
        group = self._group(layer)
        loc, log_scale = self.model.enc_sampler[group](features).chunk(2, dim=1)
        if group and self.model.res_dist:
            shift, log_factor = self.model.dec_sampler[group - 1](state).chunk(2, dim=1)
            loc, log_scale = shift + loc, log_factor + log_scale
        return self._normal(loc, log_scale, 1.0)

    def _group(self, layer: int) -> int:
        """Place of group `layer` in the model's lists, which run from the top."""
        return len(self.latent_shapes) - layer

    def _normal(self, loc: Tensor, log_scale: Tensor, temperature: float) -> Normal:
        scale = torch.exp(5 * torch.tanh(self._exact(log_scale) / 5)) + 0.01
        return plain_normal(5 * torch.tanh(self._exact(loc) / 5), scale * temperature)

    def _levels(self, x: Tensor) -> Tensor:
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
            base = DiscretizedLogisticMixture(output.logit_probs, *swapped, levels=levels, top=0.99)
        else:
            raise GeneratorError(
                f"model: its decoder_output gives {kind}; expected Bernoulli, NormalDecoder or DiscMixLogistic. Override "
                "`likelihood` of NVAEAdapter for another one."
            )
        return Observed(base, lambda x: 2 * self._levels(x) - 1, lambda y: ((y + 1) / 2).clamp(0, 1))


def _convolve(part: Any, x: Tensor) -> Tensor:
    """NVAE's convolution; in evaluation mode without keeping the normalised weights."""
    if part.training:
        return type(part).forward(part, x)
    return F.conv2d(x, part.normalize_weight(), part.bias, part.stride, part.padding, part.dilation, part.groups)
