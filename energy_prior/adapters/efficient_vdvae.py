"""Efficient-VDVAE (Hazami, Mama and Thurairatnam, 2022), as in the repository Rayhane-mamah/Efficient-VDVAE, as a generator."""

from __future__ import annotations

__all__ = ["EfficientVDVAEAdapter"]

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal

from energy_prior._util import draw, not_none, plain_normal
from energy_prior.adapters.base import Adapter
from energy_prior.adapters.temperature import check_temperatures
from energy_prior.errors import ArgumentError, GeneratorError
from energy_prior.generators.likelihoods import DiscretizedLogisticMixture, InModelUnits
from energy_prior.protocol import Inferred
from energy_prior.topdown import infer_top_down

_BORDER = 2  # of zeros around 28 × 28 digits
_EDGE = 1e-6  # the model gives the tails to values equal to the lowest and the highest level: this is rounding


class _State(NamedTuple):
    """Above a block: its features, unpooled; those with the residual of its prior net; and p(z_i | z_{>i}).

    Below z_1 there is no block: the last three are None.
    """

    features: Tensor
    after: Tensor | None
    prior: tuple[Tensor, Tensor] | None
    conditional: Normal | None


class _Settings(NamedTuple):
    """What the adapter reads of the hyper-parameters, by their names there."""

    distribution_base: str
    use_residual_distribution: bool
    output_distribution_base: str
    output_gradient_smoothing_beta: float
    min_mol_logscale: float
    num_bits: float
    dataset_source: str


class EfficientVDVAEAdapter(Adapter):
    """A `UniversalAutoEncoder` of the PyTorch code of Rayhane-mamah/Efficient-VDVAE.

        p(z_i | z_{>i}) = N(μ, (t_i σ)²),   σ = softplus_β(s) or exp(β s);   q(z_i | z_{>i}, x) Gaussian, residual or plain

    Observations are in [0, 1], (batch, 3, height, width); binarised MNIST without the border of 2 that the repository pads.
    The likelihood is Bernoulli for binarised MNIST, and else a mixture of discretised logistics. Images of fewer bits than 8
    are rounded down to that grid first. As in the repository, only the lowest and the highest level have an open tail.

    The model must have been run once, as its own scripts do before they load weights: its unpooling layers make their
    biases then. That run needs a GPU, which the adapter does not. The masks by which the repository's codec drops latents are
    no part of the model.

    Args:
        model: the model, in evaluation mode, with its weights (`energy_prior.adapters.load_weights`).
        hparams: the hyper-parameters that the model was built with, which it does not hold itself: the repository's object,
            or any with the same sections `model`, `loss` and `data`.
        prior_temperature: t > 0, factor on every σ of the prior, or (t_1, …, t_L), one per layer, that of z_1 first. The
            repository's `sample_from_prior(n, temperatures)` takes one per entry of `down_strides`, from the top.

    Raises:
        GeneratorError: if this is not such a model, is not in evaluation mode, or has not been run.
        ArgumentError: if `hparams` lacks a value or has an unknown one, or a temperature is impossible.

    Examples:
        With `model`, a small `UniversalAutoEncoder` that has run once and is in evaluation mode, and its `hparams`:

        >>> from energy_prior import JointEBMPrior
        >>> prior = JointEBMPrior(EfficientVDVAEAdapter(model, hparams))
        >>> [tuple(z) for z in prior.generator.latent_shapes]
        [(4, 8, 8), (2, 4, 4), (2, 4, 4), (3, 2, 2)]
        >>> prior.sample(4, prior="generator").shape  # the model's own samples
        torch.Size([4, 3, 8, 8])
    """

    def __init__(self, model: nn.Module, hparams: Any, *, prior_temperature: float | Iterable[float] = 1.0) -> None:
        super().__init__(model, ("bottom_up", "top_down"), "a UniversalAutoEncoder of Efficient-VDVAE")
        self._settings = _read(hparams)
        top_down = self.model.top_down
        self._blocks: list[tuple[int, Any]] = [  # of z_L, …, z_1, with the index of the skip connection that each takes
            (index, block)
            for index, (first, others) in enumerate(zip(top_down.levels_down_upsample, top_down.levels_down))
            for block in (first, *others)
        ]
        shapes: list[torch.Size] = []
        height, width = (int(n) for n in top_down.trainable_h.shape[2:])
        for _, block in self._blocks:
            if block.strides > 1 and block.unpool.scale_bias is None:
                raise GeneratorError(
                    "model: it has never been run, so that its unpooling layers lack their biases. Run it once on an image, as "
                    "its own scripts do, before you load weights."
                )
            height, width = height * block.strides, width * block.strides
            shapes.insert(0, torch.Size((block.z_projection.in_channels, height, width)))
        self.latent_shapes: tuple[torch.Size, ...] = tuple(shapes)
        self.prior_temperature: tuple[float, ...] = check_temperatures(prior_temperature, len(shapes))
        self._border = _BORDER if self._settings.dataset_source == "binarized_mnist" else 0
        channels = self.model.bottom_up.input_conv.in_channels
        self.x_shape: torch.Size = torch.Size((channels, height - 2 * self._border, width - 2 * self._border))

    def extra_repr(self) -> str:
        """The settings."""
        return f"prior_temperature={self.prior_temperature}, {self._settings}"

    def start(self, batch_size: int) -> _State:
        """The learned features above z_L."""
        return self._above(len(self.latent_shapes), self.model.top_down.trainable_h.expand(batch_size, -1, -1, -1))

    def conditional(self, state: _State, layer: int) -> Normal:
        """p(z_i | z_{>i}) of layer i, a block of the model, computed with the features of the block before z_i enters."""
        return not_none(state.conditional)

    def descend(self, state: _State, z: Tensor, layer: int) -> _State:
        """Through the block."""
        _, block = self._blocks[self._index(layer)]
        return self._above(layer - 1, block.residual_block(not_none(state.after) + block.z_projection(z)))

    def likelihood(self, state: _State) -> Distribution:
        """p(x | z): Bernoulli, or a mixture of discretised logistics."""
        parameters = self._cast(self.model.top_down.output_conv(state.features))
        if edge := self._border:
            pixels = Bernoulli(logits=parameters[..., edge:-edge, edge:-edge], validate_args=False)
            return Independent(pixels, 3, validate_args=False)
        mixtures = parameters.shape[1] // 10
        logits, others = parameters[:, :mixtures], parameters[:, mixtures:]
        loc, raw, coefficients = others.unflatten(1, (3, 3 * mixtures)).transpose(1, 2).split(mixtures, dim=1)
        levels, top = 2 ** int(self._settings.num_bits), float(self.model.top_down.max_pix_value)
        base = DiscretizedLogisticMixture(
            logits,
            loc,
            self._log_scale(raw),
            coefficients.tanh(),
            levels=levels,
            bottom=-1 + _EDGE,
            top=top - _EDGE,
            spacing=self._step / 127.5,
        )
        return InModelUnits(base, self._target, lambda y: ((y + 1) / 2).clamp(0, (top + 1) / 2))

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        """z ~ q(z_i | z_{>i}, x), top-down.

        Args:
            x: observations, (batch, *x_shape).
            rng: random number generator; None: torch's global stream.
        """
        skips = self.model.bottom_up(F.pad(x, (self._border,) * 4) if self._border else self._target(x))

        def posterior(state: _State, p: Any, layer: int) -> tuple[Tensor, Tensor]:
            return draw(self.posterior(state, skips, layer))

        return infer_top_down(self, len(x), posterior, rng)

    def posterior(self, state: _State, skips: Sequence[Tensor], layer: int) -> Normal:
        """q(z_i | z_{>i}, x) of layer i; if residual, its mean adds to the prior's, and σ multiplies the prior's.

        Args:
            state: the state above the layer.
            skips: the encoder's features, from the top, each (batch, channels, height, width).
            layer: i, 1 … L.
        """
        index, block = self._blocks[self._index(layer)]
        features = block.posterior_net(torch.cat([state.features, skips[index]], dim=1))
        prior = state.prior if self._settings.use_residual_distribution else None
        return self._normal(block.posterior_layer, block.posterior_layer(features, prior_stats=prior, return_sample=False), 1.0)

    def _above(self, layer: int, features: Tensor) -> _State:
        """The state above z_i of layer i; layer 0: that below z_1."""
        if layer == 0:
            return _State(features, None, None, None)
        _, block = self._blocks[self._index(layer)]
        if block.strides > 1:
            features = block.unpool(features)
        residual, prior = block.prior_net(features).chunk(2, dim=1)
        loc, scale = block.prior_layer(prior, return_sample=False)
        conditional = self._normal(block.prior_layer, (loc, scale), self.prior_temperature[layer - 1])
        return _State(features, features + residual, (loc, scale), conditional)

    def _normal(self, module: Any, statistics: Sequence[Tensor], temperature: float) -> Normal:
        """From what a latent layer of the model gives: μ, and σ or log σ/β."""
        loc, scale = (self._cast(value) for value in statistics)
        if self._settings.distribution_base == "logstd":
            scale = (module.softplus.beta * scale).exp()
        return plain_normal(loc, temperature * scale)

    def _log_scale(self, raw: Tensor) -> Tensor:
        """log s of the mixture's components."""
        beta, least = self._settings.output_gradient_smoothing_beta, self._settings.min_mol_logscale
        if self._settings.output_distribution_base == "logstd":
            return beta * raw.clamp(min=least)
        return F.softplus(raw, beta=beta).clamp(min=math.exp(least)).log()

    def _target(self, x: Tensor) -> Tensor:
        """Pixels in [−1, 1], of the model's bits."""
        level = 255 * x
        if self._step > 1:
            level = torch.floor(level.round() / self._step) * self._step
        return level / 127.5 - 1

    @property
    def _step(self) -> int:
        """8-bit levels that are one of the model's."""
        return 2 ** (8 - int(self._settings.num_bits))


def _read(hparams: Any) -> _Settings:
    """The values that the adapter needs."""
    found: dict[str, Any] = {}
    for section, names in (("model", _Settings._fields[:4]), ("loss", _Settings._fields[4:5]), ("data", _Settings._fields[5:])):
        for name in names:
            if not hasattr(getattr(hparams, section, None), name):
                raise ArgumentError(
                    f"hparams: expected the hyper-parameters of Efficient-VDVAE, but {section}.{name} is missing."
                )
            found[name] = getattr(getattr(hparams, section), name)
    for name in ("distribution_base", "output_distribution_base"):
        if found[name] not in ("std", "logstd"):
            raise ArgumentError(f'hparams: expected model.{name} to be "std" or "logstd", got {found[name]!r}.')
    return _Settings(**found)
