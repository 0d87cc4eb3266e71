"""The ladder VAE of CAREamics, of Hierarchical DivNoising (Prakash et al., ICLR 2022) and MicroSplit, as a generator."""

from __future__ import annotations

__all__ = ["CAREamicsAdapter"]

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, constraints

from energy_prior._util import draw, normal_like, not_none, plain_normal, sum_event
from energy_prior.adapters.base import Adapter
from energy_prior.checks.settings import check_positive
from energy_prior.errors import ArgumentError, GeneratorError
from energy_prior.protocol import Inferred
from energy_prior.topdown import infer_top_down

_PARTS = ("bottomup_pass", "top_down_layers", "final_top_down", "output_layer", "predict_logvar", "target_ch")


class _State(NamedTuple):
    """The features above a layer, None above z_L, and the number of observations."""

    features: Tensor | None
    batch: int


class CAREamicsAdapter(Adapter):
    """A `LadderVAE` of CAREamics (`careamics.models.lvae`), in two or three dimensions.

        p(z_i | z_{>i}) = N(μ, σ²),   q(z_i | z_{>i}, x) Gaussian, top-down;   σ² as the model has it, clipped and bounded

    Observations are normalised as in its training, zero mean and unit variance, (batch, channels, [depth,] height, width), of
    the size that the model's learned p(z_L) has. p(x | z) is what the model was trained by, which it does not hold itself:

    - `GaussianLikelihood` with a predicted variance, with its lower bound on log σ²;
    - `NoiseModelLikelihood`, with the statistics of the data that it needs: densities are per unit of the raw data, as its own;
    - a squared error, which is what `GaussianLikelihood` is without a predicted variance: it says no variance; name one.

    A 2D decoder below a 3D encoder is refused, as that models no observation of its encoder's kind, and so are latents of odd
    size, which the model crops in its posterior alone.

    Args:
        model: the model, in evaluation mode, with its weights (`energy_prior.adapters.load_weights`).
        likelihood: the likelihood module that it was trained with; None for a squared error.
        variance: σ² > 0 of p(x | z) = N(μ(z), σ²) in the squared units of the observations, for a squared error alone.
        encoder_input: of observations x, (batch, *x_shape), in the data's units, what the model's forward pass takes for them,
            (batch, 1 + lateral inputs, …), in the data's units. For a model with several output channels (MicroSplit), how they
            are mixed; with lateral contextualisation, with its inputs of lower resolution. None: x itself.

    Raises:
        GeneratorError: if this is not such a model, is not in evaluation mode, or is one of those that are refused.
        ArgumentError: if p(x | z) or the encoder's input is not known from these arguments.

    Examples:
        With `model`, a small `LadderVAE` of CAREamics in evaluation mode, and its `likelihood`, a `GaussianLikelihood`:

        >>> from energy_prior import JointEBMPrior
        >>> prior = JointEBMPrior(CAREamicsAdapter(model, likelihood))
        >>> [tuple(z) for z in prior.generator.latent_shapes]
        [(2, 4, 4), (3, 2, 2)]
        >>> prior.sample(4, prior="generator").shape  # the model's own samples
        torch.Size([4, 1, 8, 8])
    """

    x_range = None

    def __init__(
        self,
        model: nn.Module,
        likelihood: nn.Module | None = None,
        *,
        variance: float | None = None,
        encoder_input: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(model, _PARTS, "a LadderVAE of CAREamics")
        if getattr(self.model, "_squish3d", False):
            raise GeneratorError("model: its encoder is 3D and its decoder 2D; expected both of the same dimensions.")
        self.observation: Any = likelihood
        self.variance: float | None = self._check_observation(likelihood, variance)
        several = self.model.target_ch != 1 or getattr(self.model, "_multiscale_count", 1) > 1
        if several and encoder_input is None:
            raise ArgumentError(
                f"encoder_input: the model has {self.model.target_ch} output channels and {self.model._multiscale_count} "
                "input(s) of different resolution. Give the function that makes its input of observations."
            )
        self.encoder_input = encoder_input
        shapes: list[torch.Size] = []
        with torch.no_grad():  # one pass says all sizes, also those of a decoder that crops
            state = self.start(1)
            for layer in range(len(self.model.top_down_layers), 0, -1):
                z = self.conditional(state, layer).loc
                shapes.insert(0, z.shape[1:])
                state = self.descend(state, z, layer)
            size = self.model.output_layer(self.model.final_top_down(state.features)).shape[2:]
        if any(shape[-1] % 2 for shape in shapes):
            widths = ", ".join(str(shape[-1]) for shape in shapes)
            raise GeneratorError(
                f"model: its latents, z_1 first, have widths {widths}; it crops odd ones in its posterior, not in its prior. "
                "Build it for a larger input, or with fewer layers."
            )
        self.latent_shapes: tuple[torch.Size, ...] = tuple(shapes)
        self.x_shape: torch.Size = torch.Size((self.model.target_ch, *size))

    def extra_repr(self) -> str:
        """What p(x | z) depends on besides weights."""
        statistics = [getattr(self.observation, name, None) for name in ("logvar_lowerbound", "data_mean", "data_std")]
        known = [value.tolist() if isinstance(value, Tensor) else value for value in statistics]
        return f"likelihood={type(self.observation).__name__} {known}, variance={self.variance}"

    def start(self, batch_size: int) -> _State:
        """The state above z_L: nothing yet but the number of observations."""
        return _State(None, batch_size)

    def conditional(self, state: _State, layer: int) -> Normal:
        """p(z_i | z_{>i}) of layer i; that of the top layer is learned."""
        module = self.model.top_down_layers[layer - 1]
        parameters = state.features
        if parameters is None:
            parameters = module.top_prior_params.expand(state.batch, *module.top_prior_params.shape[1:])
        return self._normal(module.stochastic.process_p_params(parameters, self.model._var_clip_max)[2])

    def descend(self, state: _State, z: Tensor, layer: int) -> _State:
        """Through the layer's skip connection and its deterministic block, which doubles height and width."""
        module = self.model.top_down_layers[layer - 1]
        features = module.stochastic.conv_out(z)
        if state.features is not None and module.stochastic_skip:
            features = module.skip_connection_merger(features, state.features)
        if module.retain_spatial_dims:  # lateral contextualisation: a finer layer sees the middle of a coarser one
            size = module.latent_shape[-1] // 2
            first = max(features.shape[-1] - size, 0) // 2
            features = features[..., first : first + size, first : first + size]
        return _State(module.deterministic_block(features), state.batch)

    def likelihood(self, state: _State) -> Distribution:
        """p(x | z): Gaussian, or by the noise model."""
        output = self._cast(self.model.output_layer(self.model.final_top_down(not_none(state.features))))
        mean, log_variance = output.chunk(2, dim=1) if self.model.predict_logvar is not None else (output, None)
        if hasattr(self.observation, "noiseModel"):
            return _Noisy(self.observation, mean)
        if self.variance is not None:
            scale = torch.full_like(mean, math.sqrt(self.variance))
        else:
            mean, log_variance = self.observation.get_mean_lv(output)
            scale = (log_variance / 2).exp()
        return Independent(plain_normal(mean, scale), mean.ndim - 1, validate_args=False)

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        """z ~ q(z_i | z_{>i}, x), top-down.

        Args:
            x: observations, (batch, *x_shape).
            rng: random number generator; None: torch's global stream.
        """
        found = self.model.bottomup_pass(x if self.encoder_input is None else self.encoder_input(x))

        def posterior(state: _State, p: Any, layer: int) -> tuple[Tensor, Tensor]:
            return draw(self.posterior(state, found, layer))

        return infer_top_down(self, len(x), posterior, rng)

    def posterior(self, state: _State, found: Sequence[Tensor], layer: int) -> Normal:
        """q(z_i | z_{>i}, x) of layer i.

        Args:
            state: the state above the layer.
            found: what the encoder gives for z_1, …, z_L, each (batch, channels, height, width), of 3D models with the depth
                before the height; features.
            layer: i, 1 … L.
        """
        module = self.model.top_down_layers[layer - 1]
        parameters = found[layer - 1]
        if state.features is not None:
            parameters = module.merge(parameters, state.features)
        if module.normalize_latent_factor:
            parameters = parameters / module.normalize_latent_factor
        return self._normal(module.stochastic.process_q_params(parameters, self.model._var_clip_max)[2])

    def _normal(self, found: Normal) -> Normal:
        return plain_normal(self._cast(found.loc), self._cast(found.scale))

    def _check_observation(self, likelihood: Any, variance: Any) -> float | None:
        """The variance of a squared error; None where p(x | z) has its own."""
        noisy: bool = hasattr(likelihood, "noiseModel")
        if likelihood is not None and not noisy and not hasattr(likelihood, "get_mean_lv"):
            raise ArgumentError(f"likelihood: expected a likelihood module of CAREamics, got {type(likelihood).__name__}.")
        predicted = getattr(likelihood, "predict_logvar", None)
        if not noisy and predicted != self.model.predict_logvar:
            raise ArgumentError(
                f"likelihood: the model was built with predict_logvar={self.model.predict_logvar!r}, the likelihood with "
                f"{predicted!r}. Give the GaussianLikelihood that it was trained with."
            )
        if noisy and (not_none(likelihood).data_mean is None or not_none(likelihood).data_std is None):
            raise ArgumentError("likelihood: it lacks the data's mean and standard deviation. Call its set_data_stats first.")
        if noisy or predicted is not None:
            if variance is not None:
                raise ArgumentError(f"variance: the likelihood has one of its own; expected None, got {variance!r}.")
            return None
        if variance is None:
            raise ArgumentError(
                "variance: the model was trained by a squared error, which says none. Name the variance of p(x | z), such as "
                "the mean squared error of reconstructions of held-out data."
            )
        return check_positive("variance", variance)


class _Noisy(Distribution):
    """p(x | z) of a noise model at the signal that the decoder gives, both in normalised units.

    Args:
        module: the `NoiseModelLikelihood`.
        signal: (batch, channels, …), in units of normalised observations.
    """

    def __init__(self, module: Any, signal: Tensor) -> None:
        self.module = module
        self.signal = signal
        super().__init__(signal.shape[:1], signal.shape[1:], validate_args=False)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        """None are checked."""
        return {}

    @property
    def mean(self) -> Tensor:
        """The signal: a noise model of CAREamics has it as its mean."""
        return self.signal

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x), (batch,), nats."""
        found = self.module.log_likelihood(value, {"mean": self.signal, "logvar": None})
        return sum_event(found.to(self.signal))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws of observations, (*sample_shape, batch, channels, …)."""
        if sample_shape:
            return torch.stack([self.sample(sample_shape[1:]) for _ in range(sample_shape[0])])
        mean, deviation = (value.to(self.signal) for value in (self.module.data_mean, self.module.data_std))
        raw, noise = self.signal * deviation + mean, self.module.noiseModel
        drawn: list[Tensor] = []
        for channel in range(raw.shape[1]):
            model = getattr(noise, f"nmodel_{channel}", noise)
            found = torch.stack(model.get_gaussian_parameters(raw[:, channel : channel + 1]))
            loc, scale, weight = found.unflatten(0, (3, -1))
            chosen = (weight.log() - torch.empty_like(weight).exponential_().log()).argmax(0, keepdim=True)
            loc, scale = (values.gather(0, chosen)[0] for values in (loc, scale))
            drawn.append(loc + scale * normal_like(loc.shape, loc))
        return ((torch.cat(drawn, dim=1) - mean) / deviation).to(self.signal)
