"""Scores: L^{>k}(x) = E[log p_β0(x|z) + log p_β(z) + Σ_i f_i(z_i)], and what its terms say of an observation."""

from __future__ import annotations

__all__ = ["ANOMALY_SCORES", "ScoreTerms", "calibrated", "score_terms"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from energy_prior.errors import DivergenceError
from energy_prior.protocol import HierarchicalGenerator
from energy_prior.topdown import TopDown


@dataclass(frozen=True)
class ScoreTerms:
    """The terms of the un-normalised log joint at one draw of the latents, nats.

    Attributes:
        log_likelihood: log p_β0(x | z), (batch,).
        log_prior: log p_β(z_i | z_{>i}), (batch, L).
        negative_energy: f_i(z_i), (batch, L).
        log_q: Σ_i log q_ω of the draw, (batch,), or None where it did not come from an inference model.
    """

    log_likelihood: Tensor
    log_prior: Tensor
    negative_energy: Tensor
    log_q: Tensor | None = None

    def log_joint(self) -> Tensor:
        """log p_β0(x | z) + log p_β(z) + Σ_i f_i(z_i), (batch,)."""
        return self.log_likelihood + self.log_prior.sum(1) + self.negative_energy.sum(1)

    def checked(self) -> Self:
        """Itself, if every term is finite.

        Raises:
            DivergenceError: naming the term, and its layer.
        """
        for what, values in (("the energy f", self.negative_energy), ("log p_β", self.log_prior)):
            bad = (~torch.isfinite(values)).any(0)
            if bool(bad.any()):
                layer = int(bad.nonzero()[0]) + 1
                raise DivergenceError(f"A score is not finite: {what} of layer {layer} is not, at a draw of z.", layer=layer)
        if not bool(torch.isfinite(self.log_likelihood).all()):
            raise DivergenceError("A score is not finite: the log likelihood of an observation is not, at a draw of z.")
        return self

    def parts(self) -> Tensor:
        """log p_β0(x | z), log p_β(z) [− log q_ω(z | x)] and Σ_i f_i(z_i), (batch, 3): what `calibrated` weighs."""
        rate = self.log_prior.sum(1) if self.log_q is None else self.log_prior.sum(1) - self.log_q
        return torch.stack([self.log_likelihood, rate, self.negative_energy.sum(1)], dim=1)


ANOMALY_SCORES: dict[str, Callable[[ScoreTerms], Tensor]] = {
    "log_joint": ScoreTerms.log_joint,
    "negative_energy": lambda terms: terms.negative_energy.sum(1),
    "reconstruction": lambda terms: terms.log_likelihood,
}
"""Terms by the name of the anomaly score that is their negative, (batch,), nats."""


def calibrated(terms: ScoreTerms, calibration: Tensor) -> Tensor:
    """Σ_t (t − m_t)/s_t over the three `parts`, (batch,), with m and s in the rows of `calibration`, (2, 3)."""
    return ((terms.parts() - calibration[0]) / calibration[1]).sum(1)


def score_terms(
    generator: HierarchicalGenerator,
    negative_energy: Tensor,
    x: Tensor,
    latents: Sequence[Tensor],
    log_q: Tensor | None = None,
) -> ScoreTerms:
    """The terms of the log joint at given latents (z_1, …, z_L), whose f_i are `negative_energy`, (batch, L)."""
    topdown = TopDown(generator, len(x))
    descent = topdown.descend(tuple(latents), "latent", to_observation=True)
    return ScoreTerms(topdown.likelihood(descent).log_prob(x), descent.log_priors(), negative_energy, log_q)
