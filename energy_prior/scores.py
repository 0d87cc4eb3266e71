"""Scores of a `JointModel`: L^{>k}(x) = E[log p_β0(x|z) + log p_β(z) + Σ_i f_i(z_i)] and LLR^{>k} = L^{>0} − L^{>k}."""

from __future__ import annotations

__all__ = [
    "ANOMALY_SCORES",
    "NEED_INFER",
    "ScoreTerms",
    "Skipped",
    "expected_score",
    "llr_scores",
    "log_joint",
    "pass_terms",
    "score_terms",
]

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from energy_prior._util import not_none
from energy_prior.calibration import PassTerms
from energy_prior.errors import DivergenceError
from energy_prior.langevin import ChainSettings
from energy_prior.langevin.cost import equal_parts
from energy_prior.model import NEVER_SPLIT, JointModel, PosteriorDraw
from energy_prior.protocol import find_infer
from energy_prior.replay import AtMean
from energy_prior.topdown import Descent, TopDown

Skipped = Literal["draw", "mean"]
"""What stands for z_{<=k} in L^{>k}: a Langevin draw of the joint prior given z_{>k}, or the generator's own means."""


@dataclass(frozen=True)
class ScoreTerms:
    """The terms of the un-normalised log joint, nats: at one draw of the latents, or their means over several.

    Attributes:
        log_likelihood: log p_β0(x | z), (batch,), nats, the reconstruction term.
        log_prior: log p_β(z_i | z_{>i}), (batch, L), nats; column i − 1 is that of z_i.
        negative_energy: f_i(z_i), (batch, L), nats.
        log_q: log q_ω of each layer as the model factorises it, (batch, L), nats, or None where the draw did not come from an
            inference model.

    Examples:
        >>> from energy_prior import load_example
        >>> terms = load_example().score_terms(torch.rand(4, 1, 8, 8))
        >>> elbo = terms.log_likelihood + terms.log_prior.sum(1) - terms.log_q.sum(1)
        >>> elbo.shape, terms.negative_energy.shape
        (torch.Size([4]), torch.Size([4, 2]))
    """

    log_likelihood: Tensor
    log_prior: Tensor
    negative_energy: Tensor
    log_q: Tensor | None = None

    def log_joint(self) -> Tensor:
        """log p_β0(x | z) + log p_β(z) + Σ_i f_i(z_i), (batch,), nats."""
        return self.log_likelihood + self.log_prior.sum(1) + self.negative_energy.sum(1)


def _log_weight(terms: ScoreTerms) -> Tensor:
    """log of the importance weight p_β0(x | z) p_β(z) exp(Σ_i f_i(z_i)) / q_ω(z | x) at one draw, (batch,), nats."""
    return terms.log_joint() - not_none(terms.log_q).sum(1)


def _average(draws: Tensor) -> Tensor:
    """(draws, batch, …) -> their means, (batch, …)."""
    return draws.mean(0)


def _log_average_exp(draws: Tensor) -> Tensor:
    """(draws, batch) -> log of the means of their exponentials, (batch,)."""
    return draws.logsumexp(0) - math.log(len(draws))


ANOMALY_SCORES: dict[str, tuple[Callable[[ScoreTerms], Tensor], Callable[[Tensor], Tensor]]] = {
    "log_joint": (ScoreTerms.log_joint, _average),
    "elbo": (_log_weight, _average),
    "log_likelihood": (_log_weight, _log_average_exp),
    "negative_energy": (lambda terms: terms.negative_energy.sum(1), _average),
    "reconstruction": (lambda terms: terms.log_likelihood, _average),
}
"""Name of an anomaly score -> what is taken of every posterior draw, (batch,), nats, and how draws are put together. The score
is the negative."""

NEED_INFER = tuple(name for name, (score, _) in ANOMALY_SCORES.items() if score is _log_weight)
"""Those of them that need q_ω(z | x)."""


def log_joint(
    model: JointModel, x: Tensor, k: int, num_samples: int, prior_chain: ChainSettings | None, posterior_chain: ChainSettings
) -> Tensor:
    """L^{>k}(x), (batch,), nats, the mean over `num_samples` draws.

    Args:
        model: the joint model.
        x: observations, (batch, *x_shape).
        k: layers nearest the data that are redrawn from the joint prior, 0 … L. With k = L no posterior is drawn.
        num_samples: draws, ≥ 1.
        prior_chain: of p(z_{<=k} | z_{>k}); None: z_i = μ_i(z_{>i}) there. The smaller `max_memory`
            of the two bounds the whole.
        posterior_chain: of the posterior, for generators without `infer`.
    """
    every = k == len(model.energies)
    bound, prior_chain, posterior_chain = _shared(prior_chain, posterior_chain)

    def once(x: Tensor) -> Tensor:
        if k == 0:
            return _terms(model, x, model.posterior_draw(x, posterior_chain)).log_joint()
        latents = () if every else model.posterior_draw(x, posterior_chain).latents
        return _redrawn(model, x, latents, [k], prior_chain)[k]

    return _pooled(model, x, num_samples, bound, once, posterior=not every)


def llr_scores(
    model: JointModel,
    x: Tensor,
    ks: Sequence[int],
    num_samples: int,
    prior_chain: ChainSettings | None,
    posterior_chain: ChainSettings,
) -> Tensor:
    """LLR^{>k}(x) = L^{>0}(x) − L^{>k}(x) for each k of `ks`, (batch, len(ks)), nats (Havtorn et al., ICML 2021).

    Every term of an observation is at the same posterior draws; log Z cancels, and LLR^{>0} is exactly 0.

    Args:
        model: the joint model.
        x: observations, (batch, *x_shape).
        ks: each 0 … L.
        num_samples: posterior draws, ≥ 1.
        prior_chain: of p(z_{<=k} | z_{>k}); None: z_i = μ_i(z_{>i}) there. The smaller `max_memory`
            of the two bounds the whole.
        posterior_chain: of the posterior, for generators without `infer`.
    """
    bound, prior_chain, posterior_chain = _shared(prior_chain, posterior_chain)

    def once(x: Tensor) -> Tensor:
        draw = model.posterior_draw(x, posterior_chain)
        l_ks, latents = {0: _terms(model, x, draw).log_joint()}, draw.latents
        del draw  # the pass of `infer` is not needed any more
        l_ks |= _redrawn(model, x, latents, ks, prior_chain)
        return torch.stack([l_ks[0] - l_ks[k] for k in ks], dim=1)

    return _pooled(model, x, num_samples, bound, once)


def expected_score(
    model: JointModel,
    x: Tensor,
    score: Callable[[ScoreTerms], Tensor],
    num_samples: int,
    posterior_chain: ChainSettings,
    pool: Callable[[Tensor], Tensor] = _average,
) -> Tensor:
    """E[score(terms of L^{>0}(x))] over posterior draws, of the score's shape (batch, …), or what `pool` makes of the draws."""

    def once(x: Tensor) -> Tensor:
        return score(_terms(model, x, model.posterior_draw(x, posterior_chain)))

    return _pooled(model, x, num_samples, posterior_chain.max_memory, once, pool=pool)


def score_terms(model: JointModel, x: Tensor, num_samples: int, posterior_chain: ChainSettings) -> ScoreTerms:
    """Every term of L^{>0}(x), each its mean over `num_samples` posterior draws."""

    def columns(terms: ScoreTerms) -> Tensor:
        several = (terms.log_likelihood[:, None], terms.log_prior, terms.negative_energy, terms.log_q)
        return torch.cat([t for t in several if t is not None], 1)

    means = expected_score(model, x, columns, num_samples, posterior_chain)
    log_likelihood, *layers = means.split([1] + [len(model.energies)] * ((means.shape[1] - 1) // len(model.energies)), 1)
    return ScoreTerms(log_likelihood[:, 0], *layers)


def pass_terms(model: JointModel, x: Tensor, posterior_chain: ChainSettings) -> PassTerms:
    """The terms of the score "tails", by one pass in which every normal draw of `infer` is its mean.

    With Gaussian posteriors nothing is random, so a score depends on neither a seed nor the rest of the batch. Without
    `infer` z is a Langevin draw.
    """
    inferred = find_infer(model.generator) is not None

    def once(x: Tensor) -> Tensor:
        with AtMean() if inferred else contextlib.nullcontext():
            draw = model.posterior_draw(x, posterior_chain)
        descent = draw.descent or _pass_through(model, draw.latents)
        likelihood, noise = model.generator.likelihood(descent.state), descent.noise()
        energies = model.negative_energy(descent.latents, noise)
        terms = _finite(ScoreTerms(likelihood.log_prob(x), descent.log_priors(), energies, draw.log_q))
        norms = [_log_norm(e) for e in noise]
        rate = -terms.log_prior.sum(1) if terms.log_q is None else terms.log_q.sum(1) - terms.log_prior.sum(1)
        error = -terms.log_likelihood
        with contextlib.suppress(NotImplementedError):  # how torch.distributions says that there is no mean; or it is NaN
            mean = likelihood.mean
            error = _log_norm(x - mean) if bool(torch.isfinite(mean).all()) else error
        return torch.stack([-terms.log_likelihood, rate, -terms.negative_energy.sum(1), error, *norms], 1)

    columns = _pooled(model, x, 1, posterior_chain.max_memory, once)
    return PassTerms(columns[:, 0], columns[:, 1], columns[:, 2], columns[:, 3:])


def _terms(model: JointModel, x: Tensor, draw: PosteriorDraw) -> ScoreTerms:
    """The terms of L^{>0}(x) at one posterior draw."""
    return _finite(_terms_of(model, x, draw.descent or _pass_through(model, draw.latents), draw.log_q))


def _redrawn(
    model: JointModel, x: Tensor, latents: Sequence[Tensor], ks: Sequence[int], prior_chain: ChainSettings | None
) -> dict[int, Tensor]:
    """L^{>k}(x) at one posterior draw for each k > 0 of `ks`: keeps z_{>k}, and redraws z_{<=k} by Langevin.

    Without a chain ε_i = 0 there. One pass goes down through the posterior's z, and stops at every such k, from
    where the rest is drawn: a step of the chain costs k layers. k = L needs no z.
    """
    scores: dict[int, Tensor] = {}
    topdown, layers = TopDown(model.generator, len(x)), len(model.energies)
    for k in range(layers, min((k for k in ks if k), default=layers + 1) - 1, -1):
        if k < layers:
            topdown = topdown.holding(latents[k])
        if k in ks:
            if prior_chain is None:
                means = [topdown.reference.new_zeros(shape) for shape in topdown.shapes]
                descent = topdown.descend(means, "noise", to_observation=True)
            else:
                drawn = model.run(model.target_below(topdown), prior_chain)
                descent = topdown.descend(drawn[:k], "latent", to_observation=True)
            scores[k] = _finite(_terms_of(model, x, descent)).log_joint()
    return scores


def _pass_through(model: JointModel, latents: Sequence[Tensor]) -> Descent:
    return TopDown(model.generator, len(latents[0])).descend(latents, "latent", to_observation=True)


def _log_norm(values: Tensor) -> Tensor:
    """log ‖values‖² of every row, (batch,)."""
    return values.flatten(1).square().sum(1).clamp_min(torch.finfo(values.dtype).tiny).log()


def _terms_of(model: JointModel, x: Tensor, descent: Descent, log_q: Tensor | None = None) -> ScoreTerms:
    log_likelihood = model.generator.likelihood(descent.state).log_prob(x)
    return ScoreTerms(log_likelihood, descent.log_priors(), model.negative_energy(descent.latents, descent.noise()), log_q)


def _shared(
    prior_chain: ChainSettings | None, posterior_chain: ChainSettings
) -> tuple[float, ChainSettings | None, ChainSettings]:
    """Bytes for a pass, and the settings of chains that run beside what it keeps: the smaller `max_memory`, in two halves."""
    half = min(chain.max_memory for chain in (prior_chain, posterior_chain) if chain is not None) / 2
    of_prior = prior_chain and dataclasses.replace(prior_chain, max_memory=half)
    return half, of_prior, dataclasses.replace(posterior_chain, max_memory=half)


def _pooled(
    model: JointModel,
    x: Tensor,
    num_samples: int,
    max_memory: float,
    once: Callable[[Tensor], Tensor],
    posterior: bool = True,
    pool: Callable[[Tensor], Tensor] = _average,
) -> Tensor:
    """The mean of `once(x)` over draws, or what `pool` makes of them.

    They go through together, in parts that need at most `max_memory` bytes.

    Args:
        model: the joint model.
        x: observations, (batch, *x_shape).
        num_samples: draws, ≥ 1.
        max_memory: > 0.
        once: x -> what is averaged, (batch, …), each row at a draw of its own.
        posterior: whether `once` draws from the posterior.
        pool: what is made of the draws, (num_samples, batch, …) -> (batch, …).
    """
    n, parts = len(x), [slice(0, len(x) * num_samples)]
    if parts[0].stop > NEVER_SPLIT:
        infer = posterior and find_infer(model.generator) is not None

        def one_pass(rows: int) -> None:
            """What a score needs memory for beside its chains."""
            some = x[torch.arange(rows, device=x.device) % n]
            draw = model.posterior_draw(some, ChainSettings()) if infer else PosteriorDraw(model.ancestral(rows), None)
            _terms_of(model, some, draw.descent or _pass_through(model, draw.latents), draw.log_q)

        parts = equal_parts(parts[0].stop, model.memory_of(one_pass, "score", infer, like=x), max_memory)
    values = [once(x[torch.arange(rows.start, rows.stop, device=x.device) % n]) for rows in parts]
    return pool(torch.cat(values).unflatten(0, (num_samples, n)))


def _finite(terms: ScoreTerms) -> ScoreTerms:
    """The terms, if all are finite; else a `DivergenceError` that names the term, and its layer."""
    for what, values in (("log p_β", terms.log_prior), ("the energy f", terms.negative_energy)):
        bad = (~torch.isfinite(values)).any(0)
        if bool(bad.any()):
            layer = int(bad.nonzero()[0]) + 1
            raise DivergenceError(
                f"A score is not finite: {what} of layer {layer} is not, at a draw of z. A log p_β of −∞ says that z is "
                "outside the support of the prior; energy_prior.check_generator says more.",
                layer=layer,
            )
    if not bool(torch.isfinite(terms.log_likelihood).all()):
        raise DivergenceError("A score is not finite: the log likelihood of an observation is not, at a draw of z.")
    return terms
