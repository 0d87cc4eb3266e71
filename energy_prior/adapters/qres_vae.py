"""QRes-VAE (Duan et al., WACV 2023) and QARV (TPAMI 2024) of duanzhiihao/lossy-vae, image compressors, as generators."""

from __future__ import annotations

__all__ = ["QResVAEAdapter"]

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from energy_prior._util import normal_like, not_none, plain_normal, sum_event
from energy_prior.adapters.base import Adapter
from energy_prior.adapters.likelihoods import rounded_normal
from energy_prior.checks.settings import check_positive, check_shape
from energy_prior.convolved import ConvolvedNormal
from energy_prior.errors import ArgumentError, GeneratorError, ShapeError
from energy_prior.protocol import Inferred
from energy_prior.topdown import infer_top_down

_SOURCE = "a HierarchicalVAE (QRes-VAE) or VariableRateLossyVAE (QARV) of duanzhiihao/lossy-vae"
_PARTS = ("encoder", "im_shift", "im_scale", "max_stride")
_FIXED_RATE, _VARIABLE_RATE = ("decoder", "out_net"), ("dec_blocks", "bias", "lmb_embedding")


class _State(NamedTuple):
    """Above a layer: its prior, after the block's first residual cell; below z_1 no prior, and the output of the decoder.

    `embedding` is that of λ; None for a fixed rate.
    """

    features: Tensor
    prior: ConvolvedNormal | None
    embedding: Tensor | None


class QResVAEAdapter(Adapter):
    """A `HierarchicalVAE` (`qres34m`, `qres17m`, `qres34m_lossless`) or `VariableRateLossyVAE` (`qarv_base`) of lossy-vae.

        p(z_i | z_{>i}) = N(μ, σ²) * U(−½, ½),   q(z_i | z_{>i}, x) = U(μ_q − ½, μ_q + ½)  (top-down)

    These are the distributions that the model is trained with; for files it rounds instead of drawing. A layer is the pair
    (n, v) of a `ConvolvedNormal`, of twice the channels of the model's z: z = n + Φ(v) − ½.

    Observations are in [0, 1]. The model is trained with KL + λ Σ (x̂ − x)², its sum over pixels and colours in [−1, 1]: that is
    −log N(x; x̂, 1/(2λ)) there, and a variance of 1/(8λ) in [0, 1]. So `variance=1 / (8 * lmb)` gives the model's own ELBO:
    6.1e-5, a σ of 2.0 of 255 levels, for λ = 2048. Means are not clamped to [0, 1], which the model's own samples are.
    The lossless model has σ of its own, and probabilities of 8-bit levels.

    σ is the model's, above exp(−2.3) = 0.1. Its densities are exact here, also where the model takes the Gaussian's density for
    a probability below 1e-6. Its rounding for files, with σ ≥ 0.11 and probabilities ≥ 1e-9, plays no part.

    Args:
        model: the model, in evaluation mode, with its weights (`energy_prior.adapters.load_weights`).
        x_shape: shape of an observation, (channels, height, width), height and width multiples of the model's `max_stride`.
        variance: of p(x | z) = N(x̂, variance), in units of observations squared; None for the lossless model alone.
        lmb: λ of a variable-rate model, within its `lmb_range`; None for the others.

    Raises:
        GeneratorError: if this is not such a model, is not in evaluation mode, or makes observations of another shape.
        ArgumentError, ShapeError: if `variance` or `lmb` is missing, not for this model, or impossible, or `x_shape` is.

    Examples:
        With `model`, a small `HierarchicalVAE` of that code in evaluation mode, trained with λ = 32:

        >>> from energy_prior import JointEBMPrior
        >>> prior = JointEBMPrior(QResVAEAdapter(model, x_shape=(3, 8, 4), variance=1 / (8 * 32)))
        >>> [tuple(z) for z in prior.generator.latent_shapes]
        [(4, 4, 2), (6, 2, 1), (6, 2, 1)]
        >>> prior.sample(4, prior="generator").shape  # the model's own samples
        torch.Size([4, 3, 8, 4])
    """

    def __init__(
        self, model: nn.Module, *, x_shape: Iterable[int], variance: float | None = None, lmb: float | None = None
    ) -> None:
        super().__init__(model, _PARTS, _SOURCE)
        self._fixed = all(hasattr(self.model, part) for part in _FIXED_RATE)
        if not self._fixed and not all(hasattr(self.model, part) for part in _VARIABLE_RATE):
            raise GeneratorError(
                f"model: expected {_SOURCE}, but {type(self.model).__name__} has neither {' and '.join(_FIXED_RATE)} nor "
                f"{', '.join(_VARIABLE_RATE)}."
            )
        self._blocks: list[Any] = list(self._decoder.dec_blocks)
        self._places: list[int] = [i for i, b in enumerate(self._blocks) if hasattr(b, "transform_prior")][::-1]  # z_1 first
        if not self._places or not all(hasattr(self._blocks[i], "discrete_gaussian") for i in self._places):
            raise GeneratorError(
                f"model: expected {_SOURCE}, but this {type(self.model).__name__} does not quantise its latents. Those of "
                "lvae.models.rd are Gaussian: write the methods of energy_prior.HierarchicalGenerator, with Normal layers."
            )
        self.x_shape: torch.Size = check_shape("x_shape", x_shape)
        stride = int(self.model.max_stride)
        if len(self.x_shape) != 3 or any(n % stride for n in self.x_shape[1:]):
            raise ShapeError(
                f"x_shape: expected (channels, height, width), the last two multiples of {stride}, got {tuple(self.x_shape)}."
            )
        self._lossless = self._fixed and hasattr(self.model.out_net, "conv_scale")
        self.variance: float | None = self._checked_variance(variance)
        self.lmb: float | None = self._checked_lmb(lmb)
        self.latent_shapes: tuple[torch.Size, ...] = ()
        with torch.no_grad():
            state = self.start(1)
            for place in self._places[::-1]:
                shape = not_none(state.prior).pair().batch_shape
                self.latent_shapes = (shape[1:], *self.latent_shapes)
                state = self._through(place, state, torch.zeros(shape).to(self._decoder.bias))
            made = self.likelihood(state).event_shape
        if made != self.x_shape:
            raise GeneratorError(f"model: it makes observations of shape {tuple(made)}, not x_shape, {tuple(self.x_shape)}.")

    @property
    def _decoder(self) -> Any:
        return self.model.decoder if self._fixed else self.model

    def extra_repr(self) -> str:
        """The settings."""
        return f"x_shape={tuple(self.x_shape)}, variance={self.variance}, lmb={self.lmb}"

    def start(self, batch_size: int) -> _State:
        """The learned constant above z_L."""
        height, width = (n // int(self.model.max_stride) for n in self.x_shape[1:])
        features = self._decoder.bias.expand(batch_size, -1, height, width)
        return self._down_to_next(0, features, self._embedding(batch_size))

    def conditional(self, state: _State, layer: int) -> Normal:
        """p(n_i, v_i | z_{>i}) of layer i, computed with the state above it."""
        return not_none(state.prior).pair()

    def descend(self, state: _State, z: Tensor, layer: int) -> _State:
        """Through the rest of the block, and on to the next block with a latent."""
        return self._through(self._places[layer - 1], state, z)

    def likelihood(self, state: _State) -> Distribution:
        """p(x | z): N(x̂, variance), or the lossless model's probabilities of levels."""
        if self._lossless:
            out = self.model.out_net
            log_scale = nn.functional.softplus(self._cast(out.conv_scale(state.features)) + 16) - 16
            return rounded_normal((self._cast(out.conv_mean(state.features)) + 1) / 2, log_scale.exp() / 2)
        mean = (self._cast(state.features) + 1) / 2
        scale = torch.full_like(mean, not_none(self.variance) ** 0.5)
        return Independent(plain_normal(mean, scale), 3, validate_args=False)

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        """(n_i, v_i) ~ q(z_i | z_{>i}, x) p(n_i, v_i | z_i, z_{>i}), top-down.

        Args:
            x: observations, (batch, *x_shape).
            rng: random number generator; None: torch's global stream.
        """
        seen = (x + self.model.im_shift) * self.model.im_scale
        found = self.model.encoder(seen) if self._fixed else self.model.encoder(seen, self._embedding(len(x)))[1]

        def posterior(state: _State, p: Any, layer: int) -> tuple[Tensor, Tensor]:
            block, prior = self._blocks[self._places[layer - 1]], not_none(state.prior)
            if self._fixed:
                loc = block.posterior(torch.cat([state.features, found[state.features.shape[2]]], dim=1))
            else:
                loc = block.transform_posterior(state.features, found[block.enc_key], state.embedding)
            of_z, of_pair = normal_like(p.loc.shape, p.loc).chunk(2, dim=1)
            pair, log_q = prior.to_pair(self._cast(loc) + torch.special.ndtr(of_z) - 0.5, of_pair)
            return pair, sum_event(log_q)  # and log q(z) = 0

        return infer_top_down(self, len(x), posterior, rng)

    def _down_to_next(self, first: int, features: Tensor, embedding: Tensor | None) -> _State:
        """From a block of the decoder through those without a latent, and into the next one that has one."""
        for block in self._blocks[first:]:
            if hasattr(block, "transform_prior"):
                features, loc, scale = block.transform_prior(features, *_given(embedding))
                scale = self._cast(scale).exp() if self._fixed else self._cast(scale)  # QRes-VAE gives log σ
                return _State(features, ConvolvedNormal(self._cast(loc), scale, validate_args=False), embedding)
            embedded = getattr(block, "requires_embedding", False)
            features = block(features, *_given(embedding if embedded else None))
        return _State(features, None, embedding)

    def _through(self, place: int, state: _State, pair: Tensor) -> _State:
        """A block with its latent, and on."""
        block = self._blocks[place]
        features = state.features + block.z_proj(ConvolvedNormal.from_pair(pair))
        features = block.resnet_end(features, *_given(state.embedding))
        return self._down_to_next(place + 1, features, state.embedding)

    def _embedding(self, batch: int) -> Tensor | None:
        """The embedding of λ, (batch, features); None for a fixed rate."""
        if self._fixed:
            return None
        two = self._decoder.bias.new_full((2,), not_none(self.lmb))  # a batch of one the model would make anew, in float32
        return self.model._get_lmb_embedding(two, 2)[:1].expand(batch, -1)

    def _checked_variance(self, variance: float | None) -> float | None:
        if self._fixed and not self._lossless and not hasattr(self.model.out_net, "mse_lmb"):
            raise GeneratorError(
                f"model: its output, a {type(self.model.out_net).__name__}, is neither for a squared error nor lossless. "
                "Override `likelihood` of QResVAEAdapter for it."
            )
        if self._lossless:
            if variance is not None:
                raise ArgumentError(f"variance: expected None, as the lossless model has σ of its own, got {variance!r}.")
            return None
        if variance is None:
            raise ArgumentError(
                "variance: expected that of p(x | z) = N(x̂, variance), in units of observations in [0, 1], squared. "
                "1 / (8 * lmb) is what training with lmb stands for."
            )
        return check_positive("variance", variance)

    def _checked_lmb(self, lmb: float | None) -> float | None:
        if self._fixed:
            if lmb is not None:
                raise ArgumentError(f"lmb: expected None, as this model has one rate, got {lmb!r}.")
            return None
        low, high = self.model.lmb_range
        found = None if lmb is None else check_positive("lmb", lmb)
        if found is None or not low <= found <= high:
            raise ArgumentError(f"lmb: expected λ of this variable-rate model, from {low:g} to {high:g}, got {lmb!r}.")
        return found


def _given(embedding: Tensor | None) -> tuple[Tensor, ...]:
    """The embedding as what it is for a call: one more argument, or none."""
    return () if embedding is None else (embedding,)
