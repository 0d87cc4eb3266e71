"""The deep VAEs of Havtorn et al. (ICML 2021), as in the repository JakobHavtorn/hvae-oodd, as generators."""

from __future__ import annotations

__all__ = ["DeepVAEAdapter"]

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from energy_prior._util import draw, not_none, plain_normal, sum_event
from energy_prior.adapters.base import Adapter
from energy_prior.adapters.likelihoods import binned_logistic, mixture_of_logistics
from energy_prior.errors import GeneratorError
from energy_prior.generators.likelihoods import InModelUnits
from energy_prior.process import reproducible
from energy_prior.protocol import Inferred
from energy_prior.topdown import infer_top_down

_PARTS = ("stages", "likelihood", "input_shape", "pad", "lambda_init", "skip_stochastic")


class _State(NamedTuple):
    """Above a stage: its input features and skip connections, None above z_L, and the number of observations."""

    features: Tensor | None
    skips: tuple[Tensor, ...] | None
    batch: int


class DeepVAEAdapter(Adapter):
    """A `VAE` or `LVAE` of JakobHavtorn/hvae-oodd, with deterministic skip connections or without.

        VAE:   q(z | x) = q(z_1 | x) ∏_i q(z_i | z_{<i}, x)  (bottom-up)
        LVAE:  q(z | x) = q(z_L | x) ∏_i q(z_i | z_{>i}, x)  (top-down)

    Observations are in [0, 1]. Where the model has a `lambda_init`, which transforms them first, densities, means and samples
    are those of the transformed observations, as the model's own are. A BIVA, which the repository itself calls not correctly
    implemented for L^{>k}, is refused.

    The mixture of logistics counts values below −0.999 and above 0.999 in [−1, 1] as the lowest and the highest level; the
    single discretised logistic rounds observations to the levels of 8 bits. Both as in the repository.

    Args:
        model: the model, in evaluation mode, with its weights.

    Raises:
        GeneratorError: if this is not such a model, or is not in evaluation mode.

    Examples:
        With `model`, a small `VAE` of that code, in evaluation mode:

        >>> from energy_prior import JointEBMPrior
        >>> prior = JointEBMPrior(DeepVAEAdapter(model))
        >>> [tuple(z) for z in prior.generator.latent_shapes]
        [(3,), (3,), (3,)]
        >>> prior.sample(4, prior="generator").shape  # the model's own samples
        torch.Size([4, 10])
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, _PARTS, "a VAE or LVAE of JakobHavtorn/hvae-oodd")
        for stage in self.model.stages:
            if not hasattr(stage, "stochastic"):
                raise GeneratorError(f"model: a {type(stage).__name__} has two latents per stage; expected a VAE or LVAE.")
        self.latent_shapes: tuple[torch.Size, ...] = tuple(
            torch.Size(int(n) for n in stage.stochastic.out_shape) for stage in self.model.stages
        )
        self.x_shape: torch.Size = torch.Size(self.model.input_shape)

    def start(self, batch_size: int) -> _State:
        """The state above z_L: nothing yet but the number of observations."""
        return _State(None, None, batch_size)

    def conditional(self, state: _State, layer: int) -> Normal:
        """p(z_i | z_{>i}) of stage i; that of the top stage may be learned."""
        module = self.model.stages[layer - 1].stochastic
        if state.features is None:
            logits = module.prior_logits.expand(state.batch, *module.prior_logits.shape)
            return self._bounded(module, *module.logits_to_mu_and_sigma(logits))
        return self._bounded(module, *module.compute_params(state.features, inference=False))

    def descend(self, state: _State, z: Tensor, layer: int) -> _State:
        """Through the stage's deterministic blocks, which empty the list of skip connections that they get: here a copy."""
        stage = self.model.stages[layer - 1]
        skips = None if state.skips is None else list(state.skips)
        features, skips = stage.p_deterministic(stage.p_projection(z), skips)
        return _State(features, tuple(skips) if self.model.skip_stochastic else None, state.batch)

    def likelihood(self, state: _State) -> Distribution:
        """p(x | z) by the model's likelihood module."""
        features = not_none(state.features)
        if self.model.pad is not None:
            features = F.pad(features, self.model.unpad)
        module = self.model.likelihood
        if module.distribution is not None:  # the forward of the discretised ones skips the activation
            features = module.activation(features)
        found = module.get_distribution_kwargs(features)  # some values are None
        parameters = {name: self._cast(value) for name, value in found.items() if value is not None}
        base = _pixels(module, parameters, len(self.x_shape))
        start = self.model.lambda_init
        return base if start is None else InModelUnits(base, start, lambda y: y)

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        """z ~ q(z | x), bottom-up for a VAE and top-down for an LVAE.

        Args:
            x: observations, (batch, *x_shape).
            rng: random number generator; None: torch's global stream.
        """
        x = x if self.model.lambda_init is None else self.model.lambda_init(x)
        data = self.model.stages[0].IO(x=x if self.model.pad is None else F.pad(x, self.model.pad))
        found = []
        with reproducible(rng, x.device):
            for stage in self.model.stages:
                data, here = stage.infer(data)
                found.append(here)
        if not hasattr(self.model.stages[0], "merge"):
            latents = tuple(self._cast(here.z) for here in found)
            posteriors = (plain_normal(self._cast(here.dist.loc), self._cast(here.dist.scale)) for here in found)
            log_q = torch.stack([sum_event(q.log_prob(z)) for q, z in zip(posteriors, latents, strict=True)], dim=1)
            return Inferred(latents, log_q)

        def posterior(state: _State, p: Any, layer: int) -> tuple[Tensor, Tensor]:
            stage = self.model.stages[layer - 1]
            merged = stage.merge(found[layer - 1].h, aux=state.features)
            return draw(self._bounded(stage.stochastic, *stage.stochastic.compute_params(merged, inference=True)))

        return infer_top_down(self, len(x), posterior, rng)

    def _bounded(self, module: Any, loc: Tensor, scale: Tensor) -> Normal:
        return plain_normal(self._cast(loc), self._cast(scale).clamp(module.min_scale, module.max_scale))


def _pixels(module: Any, parameters: dict[str, Tensor], dimensions: int) -> Distribution:
    """The distribution of observations that a likelihood module of the repository stands for."""
    if module.distribution is not None:
        return Independent(module.distribution(**parameters, validate_args=False), dimensions, validate_args=False)
    if "all_params" in parameters:
        return mixture_of_logistics(parameters["all_params"])
    if {"mean", "logscale"} <= parameters.keys() and hasattr(module, "n_bins"):
        floor = 1e-14 if module.double_precision else 1e-7
        return binned_logistic(parameters["mean"], parameters["logscale"], module.n_bins, floor)
    raise GeneratorError(
        f"model: its likelihood module, {type(module).__name__}, is not known. Override `likelihood` of DeepVAEAdapter for it."
    )
