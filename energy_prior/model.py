"""The joint model p(x, z) ∝ p_β0(x | z) exp(Σ_i f_i(z_i)) p_β(z) behind `JointEBMPrior`: the computations, without checks."""

from __future__ import annotations

__all__ = ["JointModel", "PosteriorDraw", "check_decode", "decode_latents"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from energy_prior.checks import arguments as validate
from energy_prior.errors import ArgumentError
from energy_prior.langevin import ChainSettings, NoiseSource, Target, sample_target, warn_if_stuck
from energy_prior.langevin.cost import equal_parts, forward_memory
from energy_prior.protocol import HierarchicalGenerator, find_infer
from energy_prior.scores import ScoreTerms, score_terms
from energy_prior.topdown import Decode, Space, TopDown, decode_state

_NEVER_SPLIT = 16


class PosteriorDraw(NamedTuple):
    """z of one posterior draw, and Σ_i log q_ω of it, (batch,), if it came from an inference model."""

    latents: tuple[Tensor, ...]
    log_q: Tensor | None


@dataclass(frozen=True)
class JointModel:
    """A generator with its energies. Callers check arguments, freeze the modules and choose the random stream.

    Attributes:
        generator: the hierarchical generator.
        energies: f_1, …, f_L.
        space: coordinates of the chains.
        step_size: Langevin step size where a chain's settings give none.
    """

    generator: HierarchicalGenerator
    energies: Sequence[nn.Module]
    space: Space
    step_size: float

    def negative_energy(self, latents: Sequence[Tensor]) -> Tensor:
        """f_i(z_i), (batch, L), nats."""
        return torch.stack([f(z).to(z.dtype) for f, z in zip(self.energies, latents, strict=True)], dim=1)

    def log_prior(self, latents: Sequence[Tensor]) -> Tensor:
        """log p_β(z_i | z_{>i}), (batch, L), nats."""
        return TopDown(self.generator, len(latents[0])).descend(tuple(latents), "latent").log_priors()

    def target(self, n: int, held: Mapping[int, Tensor] | None = None, x: Tensor | None = None) -> Target:
        """p(z_free | z_held) of n draws, or the posterior of n observations x."""
        return Target(self.generator, self.energies, self.space, n, held or {}, x)

    def run(
        self,
        target: Target,
        settings: ChainSettings,
        *,
        start: Sequence[Tensor] | None = None,
        noise: NoiseSource | None = None,
    ) -> tuple[Tensor, ...]:
        """Chains on a target; all latents at their end."""
        draw = sample_target(target, settings, default_step_size=self.step_size, start=start, noise=noise)
        warn_if_stuck(draw.result)
        return draw.latents

    def sample_posterior(
        self,
        x: Tensor,
        settings: ChainSettings,
        *,
        start: Sequence[Tensor] | None = None,
        noise: NoiseSource | None = None,
    ) -> tuple[Tensor, ...]:
        """Langevin on p(z | x), from `start`, else from q_ω where there is one, else ancestral."""
        if start is None and find_infer(self.generator) is not None:
            start = validate.checked_infer(self.generator, x).latents
        return self.run(self.target(len(x), x=x), settings, start=start, noise=noise)

    def posterior_draw(self, x: Tensor, settings: ChainSettings | None = None) -> PosteriorDraw:
        """z ~ q_ω(z | x) where the generator has `infer`, else a Langevin draw of the posterior."""
        if find_infer(self.generator) is not None:
            inferred = validate.checked_infer(self.generator, x)
            return PosteriorDraw(inferred.latents, inferred.log_q.sum(1))
        return PosteriorDraw(self.sample_posterior(x, settings or ChainSettings()), None)

    def redraw(self, x: Tensor, draw: PosteriorDraw, k: int, settings: ChainSettings) -> ScoreTerms:
        """The terms of L^{>k}(x) at one posterior draw (after Havtorn et al., ICML 2021).

        Keeps z_{>k} and redraws z_{<=k} ~ p(z_{<=k} | z_{>k}) from the joint prior by Langevin; the pass down to layer
        k + 1 is computed once, so that a step costs k layers. k = 0 keeps the draw as it is and runs no chain.
        """
        if not k:
            terms = score_terms(self.generator, self.negative_energy(draw.latents), x, draw.latents, draw.log_q)
            return terms.checked()
        held = {layer: draw.latents[layer - 1] for layer in range(k + 1, len(draw.latents) + 1)}
        latents = self.run(self.target(len(x), held), settings)
        return score_terms(self.generator, self.negative_energy(latents), x, latents).checked()


def check_decode(decode: Any) -> None:
    """One of `Decode`, or None."""
    if decode not in (None, *get_args(Decode)):
        raise ArgumentError(f'decode: expected "mean", "sample" or None, got {decode!r}.')


def decode_latents(
    generator: HierarchicalGenerator,
    latents: Sequence[Tensor],
    decode: Decode | None = None,
    max_memory: float = 2.0**30,
    *,
    space: Space = "latent",
) -> Tensor:
    """Observations of given latents (z_1, …, z_L), (batch, *x_shape), by one top-down pass.

    Args:
        generator: the hierarchical generator.
        latents: z_i of shape (batch, *latent_shapes[i - 1]), or ε_i for space="noise".
        decode: the "mean" of p_β0(x | z) or a "sample" of it; None: the mean where there is one.
        max_memory: bytes that the decoder may need, > 0; batches of more than 16 that need more are decoded in parts.
        space: the coordinates of `latents`.
    """
    check_decode(decode)

    def state(rows: slice) -> Any:
        topdown = TopDown(generator, rows.stop - rows.start)
        return topdown.descend(tuple(z[rows] for z in latents), space, to_observation=True).state

    n = len(latents[0])
    parts = [slice(0, n)]
    if n > _NEVER_SPLIT:
        needed = forward_memory(lambda: generator.likelihood(state(slice(0, 2))), 2, generator)
        parts = equal_parts(n, needed, max_memory)
    decoded = [decode_state(generator, state(rows), decode) for rows in parts]
    return decoded[0] if len(parts) == 1 else torch.cat(decoded)
