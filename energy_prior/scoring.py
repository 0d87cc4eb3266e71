"""The scores as methods of the prior: L^{>k}, LLR^{>k} = L^{>0} − L^{>k} and anomaly scores."""

from __future__ import annotations

__all__ = ["ScoreMethods"]

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import Unpack

from energy_prior.checks import arguments as validate
from energy_prior.checks.arguments import check_count
from energy_prior.errors import ArgumentError, ShapeError
from energy_prior.langevin import ChainOptions, ChainSettings
from energy_prior.model import JointModel
from energy_prior.process import evaluating
from energy_prior.protocol import HierarchicalGenerator
from energy_prior.scores import ANOMALY_SCORES, ScoreTerms, calibrated
from energy_prior.topdown import TopDown


class ScoreMethods:
    """What `JointEBMPrior` says of observations. Log Z is left out of every score."""

    generator: HierarchicalGenerator
    calibration: Tensor
    x_shape: torch.Size
    _quiet: Callable[[torch.Generator | None], contextlib.AbstractContextManager[JointModel]]

    @property
    def reference(self) -> Tensor:
        """A tensor with the latents' dtype and device."""
        with torch.no_grad(), evaluating(self.generator):
            return TopDown(self.generator, 1).reference

    def log_joint(
        self,
        x: Tensor,
        k: int = 0,
        *,
        num_samples: int = 8,
        rng: torch.Generator | None = None,
        **chain: Unpack[ChainOptions],
    ) -> Tensor:
        """L^{>k}(x) = E[log p_β0(x|z) + log p_β(z) + Σ_i f_i(z_i)], (batch,), nats, without −log Z.

        The expectation is over z_{>k} ~ q_ω(z_{>k} | x) and z_{<=k} ~ p(z_{<=k} | z_{>k}) under the *joint prior*
        (Langevin on the k lower layers with z_{>k} held fixed). k = 0: all of z from the posterior; k = L: all of z from
        the joint prior. A generator without `infer` takes its posterior draws from Langevin.

        Args:
            x: observations, (batch, *x_shape).
            k: number of layers nearest the data that are redrawn from the prior, 0 … L.
            num_samples: draws that the expectation is averaged over; a single one is noisy.
            rng: random number generator.
            **chain: chain options.
        """
        validate.check_k(k, len(self.generator.latent_shapes))
        return self._expectation(x, num_samples, rng, chain, lambda redraw: redraw(k).log_joint())

    def llr_score(
        self,
        x: Tensor,
        k: int,
        *,
        num_samples: int = 8,
        rng: torch.Generator | None = None,
        **chain: Unpack[ChainOptions],
    ) -> Tensor:
        """LLR^{>k}(x) = L^{>0}(x) − L^{>k}(x), (batch,), nats; higher = more out of distribution (Havtorn et al., ICML 2021).

        Both terms use the same posterior draws, so LLR^{>0} is exactly 0; log Z cancels.

        Args:
            x: observations, (batch, *x_shape).
            k: as in `log_joint`.
            num_samples: draws that the expectation is averaged over; a single one is noisy.
            rng: random number generator.
            **chain: chain options.
        """
        validate.check_k(k, len(self.generator.latent_shapes))

        def difference(redraw: Callable[[int], ScoreTerms]) -> Tensor:
            here = redraw(0).log_joint()
            return here - (redraw(k).log_joint() if k else here)

        return self._expectation(x, num_samples, rng, chain, difference)

    def anomaly_score(
        self,
        x: Tensor,
        method: str = "log_joint",
        *,
        num_samples: int = 16,
        rng: torch.Generator | None = None,
        **chain: Unpack[ChainOptions],
    ) -> Tensor:
        """How unlike the training data each observation is, (batch,); higher = more anomalous.

        With z ~ q_ω(z | x) (or Langevin posterior draws), averaged over `num_samples` draws:

            "log_joint"        −L^{>0} = −E[log p_β0(x|z) + log p_β(z) + Σ_i f_i(z_i)], nats (Cui, Wu and Han, CVPR 2023)
            "calibrated"       −Σ_t (E[t] − m_t)/s_t over the terms t = log p_β0(x|z), log p_β(z) − log q_ω(z|x), Σ_i f_i(z_i),
                               with their mean m_t and standard deviation s_t on known data (`calibrate`): no term drowns
                               the others, as the reconstruction does in "log_joint". In standard deviations; without
                               `infer`, the second term is log p_β(z) alone
            "negative_energy"  −E[Σ_i f_i(z_i)], nats: how improbable the latents are against the generator's own prior
            "reconstruction"   −E[log p_β0(x | z)], nats: how badly x is reconstructed

        Args:
            x: observations, (batch, *x_shape).
            method: the score's name.
            num_samples: draws that the expectation is averaged over.
            rng: random number generator.
            **chain: chain options, for generators without `infer`.
        """
        if method not in (*ANOMALY_SCORES, "calibrated"):
            raise ArgumentError(f"method: expected one of {sorted((*ANOMALY_SCORES, 'calibrated'))}, got {method!r}.")
        if method == "calibrated":
            if not bool((self.calibration[1] > 0).all()):
                raise ArgumentError('method: "calibrated" needs prior.calibrate(x) on known data that were not trained on.')
            score = functools.partial(calibrated, calibration=self.calibration)
        else:
            score = ANOMALY_SCORES[method]
        return self._expectation(x, num_samples, rng, chain, lambda redraw: -score(redraw(0)))

    def calibrate(
        self, x: Tensor, *, num_samples: int = 16, rng: torch.Generator | None = None, **chain: Unpack[ChainOptions]
    ) -> None:
        """Sets the mean and standard deviation of each term of the "calibrated" anomaly score from known observations.

        Do it after `fit` and again after every further `fit`. `save` keeps it.

        Args:
            x: observations like the training data but held out from it, (batch, *x_shape); two or more.
            num_samples: draws that each term is averaged over; use the same for scoring.
            rng: random number generator.
            **chain: chain options, for generators without `infer`.
        """
        validate.check_observations("x", x, self.x_shape, self.reference, self.generator)
        if len(x) < 2:
            raise ShapeError("x: expected two or more observations to calibrate on, got one.")
        parts = self._expectation(x, num_samples, rng, chain, lambda redraw: redraw(0).parts())
        spread = parts.std(0)
        if not bool((spread > 0).all()):
            raise ArgumentError(
                "x: expected observations on which every term varies; an untrained prior (f = 0) has nothing to calibrate: "
                "fit first."
            )
        self.calibration.copy_(torch.stack([parts.mean(0), spread]))

    def _expectation(
        self,
        x: Tensor,
        num_samples: int,
        rng: torch.Generator | None,
        chain: ChainOptions,
        score: Callable[[Callable[[int], ScoreTerms]], Tensor],
    ) -> Tensor:
        """Mean over posterior draws of score(redraw), where redraw(k) gives the terms of L^{>k} at the same draw."""
        validate.check_observations("x", x, self.x_shape, self.reference, self.generator)
        check_count("num_samples", num_samples)
        settings = ChainSettings.of(chain)

        def once(model: JointModel) -> Tensor:
            draw = model.posterior_draw(x, settings)
            return score(functools.partial(model.redraw, x, draw, settings=settings))

        with self._quiet(rng) as model:
            total = once(model)
            for _ in range(num_samples - 1):
                total = total + once(model)
        return total / num_samples
