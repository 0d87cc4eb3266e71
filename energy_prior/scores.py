"""Scores of a `JointModel`: L^{>k}(x) = E[log p_β0(x|z) + log p_β(z) + Σ_i f_i(z_i)] and LLR^{>k} = L^{>0} − L^{>k}."""

from __future__ import annotations

__all__ = ["ANOMALY_SCORES", "ScoreTerms", "calibrated", "expected_score", "llr_scores", "log_joint", "score_terms"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from energy_prior._util import not_none
from energy_prior.errors import DivergenceError
from energy_prior.langevin import ChainSettings
from energy_prior.model import JointModel, PosteriorDraw
from energy_prior.topdown import TopDown


@dataclass(frozen=True)
class ScoreTerms:
    """The terms of the un-normalised log joint, nats: at one draw of the latents, or their means over several.

    Attributes:
        log_likelihood: log p_β0(x | z), (batch,), the reconstruction term.
        log_prior: log p_β(z_i | z_{>i}), (batch, L); column i − 1 is that of z_i.
        negative_energy: f_i(z_i), (batch, L).
        log_q: log q_ω of each layer as the model factorises it, (batch, L), or None where the draw did not come from an
            inference model.
    """

    log_likelihood: Tensor
    log_prior: Tensor
    negative_energy: Tensor
    log_q: Tensor | None = None

    def log_joint(self) -> Tensor:
        """log p_β0(x | z) + log p_β(z) + Σ_i f_i(z_i), (batch,)."""
        return self.log_likelihood + self.log_prior.sum(1) + self.negative_energy.sum(1)

    def calibration_terms(self) -> Tensor:
        """log p_β0(x | z), log p_β(z) [− log q_ω(z | x)] and Σ_i f_i(z_i), (batch, 3): what `calibrated` weighs."""
        rate = self.log_prior.sum(1) if self.log_q is None else self.log_prior.sum(1) - self.log_q.sum(1)
        return torch.stack([self.log_likelihood, rate, self.negative_energy.sum(1)], dim=1)


ANOMALY_SCORES: dict[str, Callable[[ScoreTerms], Tensor]] = {
    "log_joint": ScoreTerms.log_joint,
    "negative_energy": lambda terms: terms.negative_energy.sum(1),
    "reconstruction": lambda terms: terms.log_likelihood,
}
"""Terms by the name of the anomaly score that is their negative, (batch,), nats."""


def calibrated(terms: ScoreTerms, calibration: Tensor) -> Tensor:
    """Σ_t (t − m_t)/s_t over the three `calibration_terms`, (batch,), with m and s in the rows of `calibration`, (2, 3)."""
    return ((terms.calibration_terms() - calibration[0]) / calibration[1]).sum(1)


def log_joint(
    model: JointModel, x: Tensor, k: int, num_samples: int, prior_chain: ChainSettings, posterior_chain: ChainSettings
) -> Tensor:
    """L^{>k}(x), (batch,), nats, the mean over `num_samples` draws.

    Args:
        model: the joint model.
        x: observations, (batch, *x_shape).
        k: layers nearest the data that are redrawn from the joint prior, 0 … L. With k = L no posterior is drawn.
        num_samples: draws, ≥ 1.
        prior_chain: of p(z_{<=k} | z_{>k}).
        posterior_chain: of the posterior, for generators without `infer`.
    """

    def once() -> Tensor:
        draw = None if k == len(model.energies) else model.posterior_draw(x, posterior_chain)
        return _terms(model, x, draw, k, prior_chain).log_joint()

    return _mean(once, num_samples)


def llr_scores(
    model: JointModel,
    x: Tensor,
    ks: Sequence[int],
    num_samples: int,
    prior_chain: ChainSettings,
    posterior_chain: ChainSettings,
) -> Tensor:
    """LLR^{>k}(x) = L^{>0}(x) − L^{>k}(x) for each k of `ks`, (batch, len(ks)), nats (Havtorn et al., ICML 2021).

    Every term of an observation is at the same posterior draws; log Z cancels, and LLR^{>0} is exactly 0.

    Args:
        model: the joint model.
        x: observations, (batch, *x_shape).
        ks: each 0 … L.
        num_samples: posterior draws, ≥ 1.
        prior_chain: of p(z_{<=k} | z_{>k}).
        posterior_chain: of the posterior, for generators without `infer`.
    """

    def once() -> Tensor:
        draw = model.posterior_draw(x, posterior_chain)
        l_0 = _terms(model, x, draw, 0).log_joint()
        l_ks = [_terms(model, x, draw, k, prior_chain).log_joint() if k else l_0 for k in ks]
        return torch.stack([l_0 - l_k for l_k in l_ks], dim=1)

    return _mean(once, num_samples)


def expected_score(
    model: JointModel, x: Tensor, score: Callable[[ScoreTerms], Tensor], num_samples: int, posterior_chain: ChainSettings
) -> Tensor:
    """E[score(terms of L^{>0}(x))] over posterior draws, of the score's shape (batch, …)."""
    return _mean(lambda: score(_terms(model, x, model.posterior_draw(x, posterior_chain), 0)), num_samples)


def score_terms(model: JointModel, x: Tensor, num_samples: int, posterior_chain: ChainSettings) -> ScoreTerms:
    """Every term of L^{>0}(x), each its mean over `num_samples` posterior draws."""
    draws = [_terms(model, x, model.posterior_draw(x, posterior_chain), 0) for _ in range(num_samples)]

    def mean(values: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(values)).mean(0)

    log_q = [t.log_q for t in draws if t.log_q is not None]
    return ScoreTerms(
        log_likelihood=mean([t.log_likelihood for t in draws]),
        log_prior=mean([t.log_prior for t in draws]),
        negative_energy=mean([t.negative_energy for t in draws]),
        log_q=mean(log_q) if log_q else None,
    )


def _terms(
    model: JointModel, x: Tensor, draw: PosteriorDraw | None, k: int, prior_chain: ChainSettings | None = None
) -> ScoreTerms:
    """The terms of L^{>k}(x) at one posterior draw.

    Keeps z_{>k} and redraws z_{<=k} ~ p(z_{<=k} | z_{>k}) from the joint prior by Langevin; the pass down to layer
    k + 1 is computed once, so that a step costs k layers. k = 0 keeps the draw as it is and runs no chain;
    k = L needs no draw.
    """
    latents, log_q = ((), None) if draw is None else draw
    if k:
        held = {layer: latents[layer - 1] for layer in range(k + 1, len(latents) + 1)}
        latents, log_q = model.sample(len(x), not_none(prior_chain), held=held), None
    topdown = TopDown(model.generator, len(x))
    descent = topdown.descend(latents, "latent", to_observation=True)
    log_likelihood = topdown.likelihood(descent).log_prob(x)
    return _finite(ScoreTerms(log_likelihood, descent.log_priors(), model.negative_energy(latents, descent.noise()), log_q))


def _mean(once: Callable[[], Tensor], num_samples: int) -> Tensor:
    total = once()
    for _ in range(num_samples - 1):
        total = total + once()
    return total / num_samples


def _finite(terms: ScoreTerms) -> ScoreTerms:
    """The terms, if all are finite; else a `DivergenceError` that names the term, and its layer."""
    for what, values in (("the energy f", terms.negative_energy), ("log p_β", terms.log_prior)):
        bad = (~torch.isfinite(values)).any(0)
        if bool(bad.any()):
            layer = int(bad.nonzero()[0]) + 1
            raise DivergenceError(f"A score is not finite: {what} of layer {layer} is not, at a draw of z.", layer=layer)
    if not bool(torch.isfinite(terms.log_likelihood).all()):
        raise DivergenceError("A score is not finite: the log likelihood of an observation is not, at a draw of z.")
    return terms
