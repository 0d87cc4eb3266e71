"""Ladder VAEs (Sønderby et al., NeurIPS 2016) with spatial latents, as in addtt/ladder-vae-pytorch, as generators."""

from __future__ import annotations

__all__ = ["LadderVAEAdapter"]

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal

from energy_prior._util import draw, not_none, plain_normal
from energy_prior.adapters.base import Adapter
from energy_prior.adapters.likelihoods import binned_logistic, mixture_of_logistics
from energy_prior.errors import GeneratorError
from energy_prior.protocol import Inferred
from energy_prior.topdown import infer_top_down

# fmt: off
_PARTS = (
    "top_down_layers", "bottomup_pass", "final_top_down", "pad_input", "likelihood", "color_ch", "img_shape", "downsample",
)
# fmt: on
_PARAMETERS = {
    "GaussianLikelihood": ("mean", "logvar"),
    "DiscretizedLogisticLikelihood": ("mean", "logscale"),
    "DiscretizedLogisticMixLikelihood": ("all_params",),
}  # of a likelihood module's `distr_params`, those that count


class _State(NamedTuple):
    """Above a layer: the features of the layer above it, None above z_L, and the number of observations."""

    features: Tensor | None
    batch: int


class LadderVAEAdapter(Adapter):
    """A `LadderVAE` of addtt/ladder-vae-pytorch, with stochastic skip connections or without, and any of its likelihoods.

        p(z_i | z_{>i}) = N(μ, exp(log σ²)),   q(z | x) = q(z_L | x) ∏_i q(z_i | z_{>i}, x)  (top-down)

    Observations are in [0, 1] and have the size `img_shape` of the model, which pads them for its encoder. z_L ~ N(0, I), or
    learned. The Gaussian likelihood is a density of these observations. The discretised logistic has n bins of width 1/n; the
    mixture of logistics counts values below −0.999 and above 0.999 in [−1, 1] as the lowest and the highest level. All of this
    as in the repository, but that the Bernoulli likelihood is that of its logits, where the repository takes the logarithm of
    their rounded probabilities.

    Args:
        model: the model, in evaluation mode, with its weights (`energy_prior.adapters.load_weights`).

    Raises:
        GeneratorError: if this is not such a model, or is not in evaluation mode.

    Examples:
        With `model`, a small `LadderVAE` of that code, in evaluation mode:

        >>> from energy_prior import JointEBMPrior
        >>> prior = JointEBMPrior(LadderVAEAdapter(model))
        >>> [tuple(z) for z in prior.generator.latent_shapes]
        [(3, 4, 4), (2, 2, 2), (2, 1, 1)]
        >>> prior.sample(4, prior="generator").shape  # the model's own samples
        torch.Size([4, 1, 6, 7])
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, _PARTS, "a LadderVAE of addtt/ladder-vae-pytorch")
        height, width = self.model.top_down_layers[-1].top_prior_params.shape[2:]
        shapes: list[torch.Size] = []
        for part, halvings in zip(self.model.top_down_layers[::-1], self.model.downsample[::-1], strict=True):
            shapes.insert(0, torch.Size((int(part.z_dim), int(height), int(width))))
            height, width = height * 2**halvings, width * 2**halvings  # on the way down, below the latent
        self.latent_shapes: tuple[torch.Size, ...] = tuple(shapes)
        self.x_shape: torch.Size = torch.Size((int(self.model.color_ch), *(int(n) for n in self.model.img_shape)))

    def start(self, batch_size: int) -> _State:
        """The state above z_L: nothing yet but the number of observations."""
        return _State(None, batch_size)

    def conditional(self, state: _State, layer: int) -> Normal:
        """p(z_i | z_{>i}) of layer i."""
        part = self.model.top_down_layers[layer - 1]
        if state.features is None:
            return self._normal(part.top_prior_params.expand(state.batch, -1, -1, -1))
        return self._normal(part.stochastic.conv_in_p(state.features))

    def descend(self, state: _State, z: Tensor, layer: int) -> _State:
        """Past the skip connection, where there is one, and through the layer's residual blocks."""
        part = self.model.top_down_layers[layer - 1]
        features = part.stochastic.conv_out(z)
        if part.stochastic_skip and state.features is not None:
            features = part.skip_connection_merger(features, state.features)
        return _State(part.deterministic_block(features), state.batch)

    def likelihood(self, state: _State) -> Distribution:
        """p(x | z) by the model's likelihood module, of the middle of the padded image.

        Raises:
            GeneratorError: if the module is not known.
        """
        features = self.model.final_top_down(not_none(state.features))
        for dimension, size in zip((2, 3), self.x_shape[1:], strict=True):
            features = features.narrow(dimension, (features.shape[dimension] - size) // 2, size)
        module = self.model.likelihood
        kind = type(module).__name__
        if kind == "BernoulliLikelihood":
            logits = self._cast(module.parameter_net(features))
            return Independent(Bernoulli(logits=logits, validate_args=False), 3, validate_args=False)
        if kind in _PARAMETERS:
            found = module.distr_params(features)
            first, *rest = (self._cast(found[name]) for name in _PARAMETERS[kind])
            if kind == "GaussianLikelihood":
                return Independent(plain_normal(first, (rest[0] / 2).exp()), 3, validate_args=False)
            if kind == "DiscretizedLogisticLikelihood":
                return binned_logistic(first, rest[0], module.n_bins, 1e-14 if module.double_precision else 1e-7)
            return mixture_of_logistics(first)
        raise GeneratorError(
            f"model: its likelihood module, {kind}, is not known. Override `likelihood` of LadderVAEAdapter for it."
        )

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        """z ~ q(z_i | z_{>i}, x), top-down.

        Args:
            x: observations, (batch, *x_shape).
            rng: random number generator; None: torch's global stream.
        """
        below = self.model.bottomup_pass(self.model.pad_input(x))

        def posterior(state: _State, p: Any, layer: int) -> tuple[Tensor, Tensor]:
            part, features = self.model.top_down_layers[layer - 1], below[layer - 1]
            if state.features is not None:
                features = part.merge(features, state.features)
            return draw(self._normal(part.stochastic.conv_in_q(features)))

        return infer_top_down(self, len(x), posterior, rng)

    def _normal(self, parameters: Tensor) -> Normal:
        """Of μ and log σ², one behind the other in the channels."""
        loc, log_variance = self._cast(parameters).chunk(2, dim=1)
        return plain_normal(loc, (log_variance / 2).exp())
