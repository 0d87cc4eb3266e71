"""Scores: L^{>k}(x) = E[log p_β0(x|z) + log p_β(z) + Σ_i f_i(z_i)], and what its terms say of an observation."""

from __future__ import annotations

__all__ = ["ANOMALY_SCORES", "ScoreTerms", "score_terms"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from energy_prior.generator import HierarchicalGenerator
from energy_prior.topdown import TopDown


@dataclass(frozen=True)
class ScoreTerms:
    """The terms of the un-normalised log joint at one draw of the latents, nats.

    Attributes:
        log_likelihood: log p_β0(x | z), (batch,).
        log_prior: log p_β(z_i | z_{>i}), (batch, L).
        negative_energy: f_i(z_i), (batch, L).
    """

    log_likelihood: Tensor
    log_prior: Tensor
    negative_energy: Tensor

    def log_joint(self) -> Tensor:
        """log p_β0(x | z) + log p_β(z) + Σ_i f_i(z_i), (batch,)."""
        return self.log_likelihood + self.log_prior.sum(1) + self.negative_energy.sum(1)


ANOMALY_SCORES: dict[str, Callable[[ScoreTerms], Tensor]] = {
    "log_joint": ScoreTerms.log_joint,
    "negative_energy": lambda terms: terms.negative_energy.sum(1),
    "reconstruction": lambda terms: terms.log_likelihood,
}
"""Terms by the name of the anomaly score that is their negative, (batch,), nats."""


def score_terms(generator: HierarchicalGenerator, negative_energy: Tensor, x: Tensor, latents: Sequence[Tensor]) -> ScoreTerms:
    """The terms of the log joint at given latents (z_1, …, z_L), whose f_i are `negative_energy`, (batch, L)."""
    topdown = TopDown(generator, len(x))
    descent = topdown.descend(tuple(latents), "latent", to_observation=True)
    return ScoreTerms(topdown.likelihood(descent).log_prob(x), descent.log_priors(), negative_energy)
