"""`JointEBMPrior`: p(z) = exp(Σ_i f_i(z_i)) p_β(z) / Z around any hierarchical generator."""

from __future__ import annotations

__all__ = ["JointEBMPrior"]

import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from energy_prior import scores
from energy_prior._util import shown, some_of
from energy_prior.calibration import Calibration, Explanation, row_digests
from energy_prior.checkpoint import (
    check_generator_fits,
    check_state_fits,
    check_unchanged,
    fingerprint,
    load_named,
    read_prior,
    write_checkpoint,
)
from energy_prior.checks.arguments import (
    as_observations,
    check_energies,
    check_given,
    check_k,
    check_latents,
    check_same_place,
    checked_infer,
    energy_modules,
)
from energy_prior.checks.generator import probe_generator
from energy_prior.checks.settings import check_count, check_layers, check_path, check_positive, check_share
from energy_prior.energies import build_energies, default_energies, describe_energies
from energy_prior.errors import ArgumentError, CheckpointError, DataWarning, ShapeError, warn
from energy_prior.hub import (
    CARD_FILE,
    PRIOR_FILE,
    ModelCard,
    check_repository,
    fetched,
    read_model,
    upload,
    write_card,
    write_model,
)
from energy_prior.langevin import USUAL_ACCEPTANCE, ChainOptions, ChainSettings, NoiseSource, Trajectory, tune_step_size
from energy_prior.mismatch import LEAST_DRAWS, Mismatch, mismatch_of
from energy_prior.model import JointModel
from energy_prior.process import evaluating, exclusive, frozen, full_precision, reproducible
from energy_prior.protocol import HierarchicalGenerator, find_infer, unwrapped
from energy_prior.resampling import resampled
from energy_prior.scores import ANOMALY_SCORES, NEED_INFER, ScoreTerms, Skipped
from energy_prior.topdown import Decode, Space, TopDown
from energy_prior.training import FitConfig, FitHooks, FitResult, Method, fit_energies
from energy_prior.variations import between, varied

if TYPE_CHECKING:
    from accelerate import Accelerator

_FIXED = ("generator", "energies", "space", "x_shape")
_FIRST_STEP_SIZE = 0.3
_PROPOSALS = 1000

SampleMethod = Literal["langevin", "resample"]


class JointEBMPrior(nn.Module):
    """The joint latent-space energy-based prior of a hierarchical generator (Cui, Wu and Han, CVPR 2023, eq. 5).

        p(z) = exp(Σ_i f_i(z_i)) p_β(z) / Z,   p_β(z) = p(z_L) ∏_{i<L} p_β(z_i | z_{>i})

    Layers are numbered as in the paper: z_1 is nearest the data, z_L is the top; `latents[0]` is z_1. A higher f_i means
    more probable. All densities, energies and scores are in nats per observation.

    Methods that run a chain take its options as keywords: `steps`, `step_size`, `adjust`, `temperature`, `scheme`,
    `max_drift`, `backend`, `precision`, `max_memory` (see `energy_prior.ChainSettings`). Methods that draw random numbers take
    `rng`: the same seed gives the same result (for the same batch size), None uses torch's global stream, and an
    explicit `rng` leaves that stream untouched. Observations are tensors in the model's dtype and on its device, or numpy
    arrays of floating-point numbers, which are converted to them.

    The generator is not a submodule. `parameters()` are the energies'; `state_dict()` holds them (`energies.<i − 1>.…`),
    the tuned `step_size` and the `calibration.…` of a score; after joint training both hold the generator (`generator.…`)
    too. `.to()` moves the generator in any case. Sampling and scoring run everything in evaluation mode and outside of
    autocast, and leave train/eval flags, `requires_grad` and `.grad` as they were. Calls may come from several threads: one
    runs at a time, and training lets others through between its iterations (`docs/threads.md`).

    Args:
        generator: any `HierarchicalGenerator`; `check_generator` tests one. Of `torch.compile(model)` it is the model inside.
        energies: one module per layer for z_1, …, z_L, f_i(z_i) -> (batch,), higher = more probable; None: networks fitted
            to the latent shapes, f = 0 until trained, which a first `fit` without a method exchanges for those of
            `denoising_energies` where the posterior is far.
        space: coordinates of the chains, "noise" (ε with z = T_β(ε): unit scale at every layer) or "latent".

    Attributes:
        step_size: s of chains whose options give none, a buffer, (), in units of ε_i in noise space, of z_i in latent space.
        x_shape: shape of an observation.
        calibration: what `calibrate` has learned.

    Raises:
        GeneratorError: if the generator breaks the protocol in a way that a single pass shows, or has half-precision weights.
        ArgumentError, ShapeError: if the energies do not fit the generator, or `space` is unknown, or "latent" where a z_i does
            not reach all real numbers.

    Examples:
        >>> from energy_prior import JointEBMPrior, LadderVAE
        >>> prior = JointEBMPrior(LadderVAE((1, 8, 8), latent_dims=(16, 8)))
        >>> prior.sample(4).shape
        torch.Size([4, 1, 8, 8])
        >>> prior
        JointEBMPrior(LadderVAE; z_1 (16,) MLPEnergy, z_2 (8,) MLPEnergy; space="noise", step_size=0.3)
    """

    generator: HierarchicalGenerator
    energies: nn.ModuleList
    space: Space
    x_shape: torch.Size
    step_size: Tensor
    calibration: Calibration

    def __init__(
        self,
        generator: HierarchicalGenerator,
        energies: Iterable[nn.Module] | None = None,
        *,
        space: Space = "noise",
    ) -> None:
        super().__init__()
        if space not in get_args(Space):
            raise ArgumentError(f"space: expected one of {get_args(Space)}, got {space!r}.")
        generator = unwrapped(generator)
        with torch.no_grad(), frozen(generator):
            probe = probe_generator(generator)
        if space == "latent" and probe.bounded:
            layer = max(probe.bounded)
            raise ArgumentError(
                f'space: expected "noise" for this generator, got "latent": z_{layer}, a {probe.families[layer]}, does not '
                "reach all real numbers, and chains in latent space would leave its support. In noise space, the default, they "
                "cannot."
            )
        reference = probe.latents[0]
        if energies is None:
            modules = default_energies(generator.latent_shapes).to(reference.device, reference.dtype)
        else:
            modules = nn.ModuleList(energy_modules(energies))
            with torch.no_grad(), full_precision(reference.device), evaluating(modules):
                noise = TopDown(generator, len(reference)).position(probe.latents, "noise")
                check_energies(modules, probe.latents, noise)
        object.__setattr__(self, "generator", generator)  # not a submodule: see the class docstring
        self.energies, self.space, self.x_shape = modules, space, probe.x_shape
        self._families = probe.families
        self.calibration = Calibration(len(modules), reference)
        self.register_buffer("step_size", torch.tensor(_FIRST_STEP_SIZE, dtype=reference.dtype, device=reference.device))
        self._default_energies = tuple(modules) if energies is None else ()
        self._fitted_on: str | None = None
        self._trained_on: frozenset[bytes] = frozenset()
        self._built = True

    # ------------------------------------------------------------------------------------------------------------- samples

    def sample(
        self,
        n: int,
        *,
        decode: Decode | None = None,
        given: Mapping[int, Tensor] | None = None,
        prior: Literal["joint", "generator"] = "joint",
        method: SampleMethod = "langevin",
        proposals: int | None = None,
        rng: torch.Generator | None = None,
        **chain: Unpack[ChainOptions],
    ) -> Tensor:
        """Draws observations: latents as `sample_latents` draws them, decoded by the generator's likelihood.

        Args:
            n: number of observations.
            decode: "mean" of p_β0(x | z) or a "sample" of it; None: the mean where the likelihood has one.
            given: layers held fixed, number -> z_i, (n, *latent_shape), as in `sample_latents`.
            prior: "joint", or "generator" for the generator's own, to compare with.
            method: "langevin", or "resample", as in `sample_latents`.
            proposals: of each draw, ≥ 1, for "resample"; None: 1,000.
            rng: random number generator.
            **chain: chain options.

        Returns:
            Observations, (n, *x_shape).

        Raises:
            ArgumentError, ShapeError: if an argument does not fit; the message says how.
            DivergenceError: if the chain diverges, or an observation is not finite.
        """
        _check_decode(decode)
        settings = ChainSettings.of(chain)
        _check_prior(prior, given or method != "langevin", chain)
        proposals = _check_method(method, proposals, given, chain)
        n = check_count("n", n)
        given = self._check_given(given, n)
        with self._computing(rng) as model:
            if method == "resample":
                return model.decode(resampled(model, n, proposals, settings.max_memory).latents, decode, settings.max_memory)
            if given or (prior == "joint" and settings.steps):
                return model.decode(model.sample(n, settings, held=given), decode, settings.max_memory)
            return model.decode_ancestral(n, decode, settings.max_memory)

    def sample_latents(
        self,
        n: int,
        *,
        given: Mapping[int, Tensor] | None = None,
        prior: Literal["joint", "generator"] = "joint",
        start: Sequence[Tensor] | None = None,
        noise: NoiseSource | None = None,
        method: SampleMethod = "langevin",
        proposals: int | None = None,
        rng: torch.Generator | None = None,
        **chain: Unpack[ChainOptions],
    ) -> tuple[Tensor, ...]:
        """Draws latents from the joint prior, p(z) or p(z_free | z_given), by Langevin or by importance resampling.

        Args:
            n: number of draws.
            given: layer *number* as in the paper (1 = nearest the data, … L) -> its fixed z_i, (n, *latent_shape).
            prior: "joint", or "generator" for the generator's own prior (f = 0): ancestral draws, no chain.
            start: latents (z_1, …, z_L) that the chains start from, (n, *latent_shape) each; None: ancestral draws.
            noise: the chain's random numbers (`energy_prior.langevin.InjectedNoise`); None: drawn from `rng`.
            method: "langevin", chains; or "resample": of `proposals` draws of the generator's prior one, with probability
                proportional to exp(Σ_i f_i), without a chain. It takes max_memory of the options alone, and warns where few
                proposals count.
            proposals: of each draw, ≥ 1, for "resample"; None: 1,000.
            rng: random number generator.
            **chain: chain options.

        Returns:
            (z_1, …, z_L), z_i of shape (n, *latent_shapes[i - 1]); held layers come back as given.

        Raises:
            ArgumentError, ShapeError: if an argument does not fit; the message says how.
            DivergenceError: if the chain diverges; it names the layer and the step.
        """
        settings = ChainSettings.of(chain)
        more = any(option is not None for option in (given or None, start, noise))
        _check_prior(prior, more or method != "langevin", chain)
        proposals = _check_method(method, proposals, more, chain)
        n = check_count("n", n)
        given = self._check_given(given, n)
        self._check_start(start, n)
        with self._computing(rng) as model:
            if method == "resample":
                return resampled(model, n, proposals, settings.max_memory).latents
            if prior == "generator":
                return model.ancestral(n)
            return model.sample(n, settings, held=given, start=start, noise=noise)

    def sample_posterior(
        self,
        x: Any,
        *,
        method: Literal["langevin", "infer"] = "langevin",
        start: Sequence[Tensor] | None = None,
        noise: NoiseSource | None = None,
        rng: torch.Generator | None = None,
        **chain: Unpack[ChainOptions],
    ) -> tuple[Tensor, ...]:
        """Draws latents of the posterior under the joint prior, p(z | x) ∝ p_β0(x | z) p_β(z) exp(Σ_i f_i(z_i)).

        Args:
            x: observations, (batch, *x_shape).
            method: "langevin": chains on the exact posterior, by default Metropolis-adjusted with step sizes that each
                chain adapts over its first half; "infer": one draw of the generator's inference model q_ω(z | x).
            start: latents (z_1, …, z_L) that the chains start from, (batch, *latent_shape) each; None: a draw of q_ω, or
                ancestral where there is no `infer`.
            noise: the chain's random numbers (then `start` is needed too); None: drawn from `rng`.
            rng: random number generator.
            **chain: chain options.

        Returns:
            (z_1, …, z_L), z_i of shape (batch, *latent_shapes[i - 1]).
        """
        x = self._observations(x)
        self._check_start(start, len(x))
        settings = ChainSettings.of(chain)
        if method not in ("langevin", "infer"):
            raise ArgumentError(f'method: expected "langevin" or "infer", got {method!r}.')
        if method == "infer" and (start is not None or noise is not None or chain):
            raise ArgumentError('method: "infer" runs no chain, so it takes neither start, noise nor options of a chain.')
        if noise is not None and start is None:
            raise ArgumentError("noise: give `start` as well; the draw of q that a chain starts from is random too.")
        with self._computing(rng) as model:
            if method == "infer":
                return checked_infer(self.generator, x).latents
            return model.sample_posterior(x, settings, start=start, noise=noise)

    def decode(
        self,
        latents: Sequence[Tensor],
        *,
        decode: Decode | None = None,
        rng: torch.Generator | None = None,
        max_memory: float = 2.0**30,
    ) -> Tensor:
        """Observations of given latents, by p_β0(x | z).

        Args:
            latents: (z_1, …, z_L), z_i of shape (batch, *latent_shapes[i - 1]).
            decode: "mean" of p_β0(x | z) or a "sample" of it; None: the mean where the likelihood has one.
            rng: random number generator, for samples.
            max_memory: bytes that the decoder may need, > 0; larger batches are decoded in parts.

        Returns:
            Observations, (batch, *x_shape).

        Raises:
            ArgumentError, ShapeError: if an argument does not fit; the message says how.
            DivergenceError: if an observation is not finite.
        """
        _check_decode(decode)
        settings = ChainSettings(max_memory=max_memory)
        self._check_latents("latents", latents)
        with self._computing(rng) as model:
            return model.decode(latents, decode, settings.max_memory)

    def reconstruct(
        self,
        x: Any,
        *,
        decode: Decode | None = None,
        rng: torch.Generator | None = None,
        posterior: ChainOptions | None = None,
    ) -> Tensor:
        """Observations as the model sees them: z ~ q_ω(z | x), or a Langevin posterior draw where there is no `infer`, decoded.

        Args:
            x: observations, (batch, *x_shape).
            decode: "mean" of p_β0(x | z) or a "sample" of it; None: the mean where the likelihood has one.
            rng: random number generator.
            posterior: options of the posterior's chain, for generators without `infer`.

        Returns:
            Observations, (batch, *x_shape).
        """
        _check_decode(decode)
        x, settings = self._observations(x), _of_posterior(posterior)
        with self._computing(rng) as model:
            return model.decode(model.posterior_draw(x, settings).latents, decode, settings.max_memory)

    def interpolate(
        self,
        a: Any,
        b: Any,
        *,
        frames: int = 9,
        decode: Decode | None = None,
        rng: torch.Generator | None = None,
        posterior: ChainOptions | None = None,
        **chain: Unpack[ChainOptions],
    ) -> Tensor:
        """Observations on the way from reconstructions of a to those of b, through the noise of all layers.

            ε(θ) = cos θ ε_a + sin θ ε_b,  θ evenly from 0 to π/2

        ε_a and ε_b are the noise of posterior draws. The variance of independent noise stays 1 on this way, where a straight
        line would shrink it. The frames between its ends are then moved by a chain on the joint prior, to where z is more
        probable; `steps=0` leaves them on the way.

        Args:
            a: observations, (batch, *x_shape).
            b: observations, (batch, *x_shape), as many.
            frames: observations of each way, its two ends among them, ≥ 2.
            decode: "mean" of p_β0(x | z) or a "sample" of it; None: the mean where the likelihood has one.
            rng: random number generator.
            posterior: options of the posterior's chain, for generators without `infer`.
            **chain: options of the chain that moves them; its `steps` are 10 here by default.

        Returns:
            Observations, (batch, frames, *x_shape).

        Raises:
            ArgumentError, ShapeError: if an argument does not fit; the message says how.
            DivergenceError: if a chain diverges, or an observation is not finite.
        """
        _check_decode(decode)
        frames = check_count("frames", frames, least=2)
        a, b, settings = self._observations(a), self._observations(b), ChainSettings.of({"steps": 10, **chain})
        if len(a) != len(b):
            raise ShapeError(f"b: expected as many observations as a has, {len(a)}, got {len(b)}.")
        of_posterior = _of_posterior(posterior)
        with self._computing(rng) as model:
            ends = [model.posterior_draw(x, of_posterior).latents for x in (a, b)]
            z = between(model, ends[0], ends[1], frames, settings)
            return model.decode(z, decode, settings.max_memory).unflatten(0, (len(a), frames))

    def vary(
        self,
        x: Any,
        layers: Iterable[int],
        n: int = 8,
        *,
        decode: Decode | None = None,
        rng: torch.Generator | None = None,
        posterior: ChainOptions | None = None,
        **chain: Unpack[ChainOptions],
    ) -> Tensor:
        """Observations that share all layers but some with x: these are drawn given the others, p(z_layers | z_others).

        The others are those of a posterior draw. With the layers nearest the data redrawn, what the upper layers say is kept
        and detail differs; with the top redrawn it is the other way about.

        Args:
            x: observations, (batch, *x_shape).
            layers: numbers of the layers that are redrawn, from 1 (nearest the data) to L.
            n: observations for each, ≥ 1.
            decode: "mean" of p_β0(x | z) or a "sample" of it; None: the mean where the likelihood has one.
            rng: random number generator.
            posterior: options of the posterior's chain, for generators without `infer`.
            **chain: options of the chain that redraws.

        Returns:
            Observations, (batch, n, *x_shape).

        Raises:
            ArgumentError, ShapeError: if an argument does not fit; the message says how.
            DivergenceError: if a chain diverges, or an observation is not finite.
        """
        _check_decode(decode)
        n, chosen = check_count("n", n), check_layers("layers", layers, len(self.energies))
        x, settings, of_posterior = self._observations(x), ChainSettings.of(chain), _of_posterior(posterior)
        with self._computing(rng) as model:
            z = varied(model, model.posterior_draw(x, of_posterior).latents, chosen, n, settings)
            return model.decode(z, decode, settings.max_memory).unflatten(0, (len(x), n))

    def trajectory(
        self,
        n: int,
        *,
        every: int = 25,
        given: Mapping[int, Tensor] | None = None,
        start: Sequence[Tensor] | None = None,
        noise: NoiseSource | None = None,
        rng: torch.Generator | None = None,
        **chain: Unpack[ChainOptions],
    ) -> Trajectory:
        """Follows long chains of the joint prior and keeps the frames at steps 0, every, 2·every, … with diagnostics.

        Args:
            n: number of chains.
            every: steps between frames, 1 … steps.
            given: layers held fixed, number -> z_i, (n, *latent_shape), as in `sample_latents`.
            start: latents (z_1, …, z_L) that the chains start from, (n, *latent_shape) each; None: ancestral draws.
            noise: the chain's random numbers; None: drawn from `rng`.
            rng: random number generator.
            **chain: chain options; `steps`, the length of the chains, is 2500 unless given.
        """
        chain.setdefault("steps", 2500)
        settings = ChainSettings.of(chain)
        every = check_count("every", every)
        if every > settings.steps:
            raise ArgumentError(f"every: expected at most steps = {settings.steps}, got {every}.")
        n = check_count("n", n)
        given = self._check_given(given, n)
        self._check_start(start, n)
        if len(given or {}) == len(self.energies):
            raise ArgumentError("given: every layer is held, so there is nothing to follow; leave one free.")
        with self._computing(rng) as model:
            return model.trajectory(n, every, settings, held=given, start=start, noise=noise)

    # ----------------------------------------------------------------------------------------------------------- densities

    def negative_energy(self, latents: Sequence[Tensor]) -> Tensor:
        """f_i(z_i) of every layer, (batch, L), nats; higher = more probable. Differentiable.

        Args:
            latents: (z_1, …, z_L), z_i of shape (batch, *latent_shapes[i - 1]).
        """
        self._check_latents("latents", latents)
        with full_precision(self.device), evaluating(self):
            return self.model.negative_energy(latents)

    def log_density(self, latents: Sequence[Tensor]) -> Tensor:
        """Σ_i f_i(z_i) + log p_β(z), the log density of the joint prior without −log Z, (batch,), nats. Differentiable.

        Args:
            latents: (z_1, …, z_L), z_i of shape (batch, *latent_shapes[i - 1]).
        """
        self._check_latents("latents", latents)
        with full_precision(self.device), evaluating(self, self.generator):
            return self.model.negative_energy(latents).sum(1) + self.model.log_prior(latents).sum(1)

    # -------------------------------------------------------------------------------------------------------------- scores

    def log_joint(
        self,
        x: Any,
        k: int = 0,
        *,
        num_samples: int = 8,
        skipped: Skipped = "draw",
        rng: torch.Generator | None = None,
        posterior: ChainOptions | None = None,
        **chain: Unpack[ChainOptions],
    ) -> Tensor:
        """L^{>k}(x) = E[log p_β0(x|z) + log p_β(z) + Σ_i f_i(z_i)], (batch,), nats, without −log Z.

        The expectation is over z_{>k} ~ q_ω(z_{>k} | x) and z_{<=k} ~ p(z_{<=k} | z_{>k}) under the *joint prior*
        (Langevin on the k lower layers with z_{>k} held fixed). k = 0: all of z from the posterior; k = L: all of z from
        the joint prior, and no posterior is drawn. A generator without `infer` takes its posterior draws from Langevin.

        Args:
            x: observations, (batch, *x_shape).
            k: number of layers nearest the data that are redrawn from the prior, 0 … L.
            num_samples: draws that the expectation is averaged over; a single one is noisy.
            skipped: what stands for z_{<=k}. "draw": draws of the joint prior. "mean": z_i = μ_i(z_{>i}), the mean of the
                generator's own p_β, where the evaluation of Havtorn et al. puts them (the terms stay those of L^{>k}); then no
                chain runs, and a bound of memory goes into `posterior`.
            rng: random number generator.
            posterior: options of the posterior's chain, for generators without `infer`.
            **chain: options of the prior's chain.
        """
        k, num_samples = check_k(k, len(self.energies)), check_count("num_samples", num_samples)
        x, settings, of_posterior = self._observations(x), _of_skipped(skipped, chain), _of_posterior(posterior)
        with self._computing(rng) as model:
            return scores.log_joint(model, x, k, num_samples, settings, of_posterior)

    def llr_score(
        self,
        x: Any,
        k: int,
        *,
        num_samples: int = 8,
        skipped: Skipped = "draw",
        rng: torch.Generator | None = None,
        posterior: ChainOptions | None = None,
        **chain: Unpack[ChainOptions],
    ) -> Tensor:
        """LLR^{>k}(x) = L^{>0}(x) − L^{>k}(x), (batch,), nats; higher = more out of distribution (Havtorn et al., ICML 2021).

        Both terms use the same posterior draws, so LLR^{>0} is exactly 0; log Z cancels.

        Args:
            x: observations, (batch, *x_shape).
            k: as in `log_joint`.
            num_samples: draws that the expectation is averaged over; a single one is noisy.
            skipped: as in `log_joint`.
            rng: random number generator.
            posterior: options of the posterior's chain, for generators without `infer`.
            **chain: options of the prior's chain.
        """
        k, num_samples = check_k(k, len(self.energies)), check_count("num_samples", num_samples)
        x, settings, of_posterior = self._observations(x), _of_skipped(skipped, chain), _of_posterior(posterior)
        with self._computing(rng) as model:
            return scores.llr_scores(model, x, [k], num_samples, settings, of_posterior)[:, 0]

    def llr_scores(
        self,
        x: Any,
        *,
        num_samples: int = 8,
        skipped: Skipped = "draw",
        rng: torch.Generator | None = None,
        posterior: ChainOptions | None = None,
        **chain: Unpack[ChainOptions],
    ) -> Tensor:
        """LLR^{>k}(x) for k = 1 … L at the same posterior draws, (batch, L), nats; column k − 1 is LLR^{>k}.

        Args:
            x: observations, (batch, *x_shape).
            num_samples: draws that the expectation is averaged over; a single one is noisy.
            skipped: as in `log_joint`.
            rng: random number generator.
            posterior: options of the posterior's chain, for generators without `infer`.
            **chain: options of the prior's chain.
        """
        num_samples = check_count("num_samples", num_samples)
        x, settings, of_posterior = self._observations(x), _of_skipped(skipped, chain), _of_posterior(posterior)
        with self._computing(rng) as model:
            return scores.llr_scores(model, x, range(1, len(self.energies) + 1), num_samples, settings, of_posterior)

    def score_terms(
        self,
        x: Any,
        *,
        num_samples: int = 8,
        rng: torch.Generator | None = None,
        posterior: ChainOptions | None = None,
    ) -> ScoreTerms:
        """The terms of L^{>0}(x), each its mean over posterior draws: log p_β0(x|z), and log p_β, log q_ω and f of every layer.

        Args:
            x: observations, (batch, *x_shape).
            num_samples: posterior draws; a single one is noisy.
            rng: random number generator.
            posterior: options of the posterior's chain, for generators without `infer`.

        Returns:
            `log_likelihood`, (batch,); `log_prior`, `negative_energy` and, with `infer`, `log_q`, (batch, L) each, nats.
        """
        num_samples = check_count("num_samples", num_samples)
        x, settings = self._observations(x), _of_posterior(posterior)
        with self._computing(rng) as model:
            return scores.score_terms(model, x, num_samples, settings)

    def anomaly_score(
        self,
        x: Any,
        method: str | None = None,
        *,
        num_samples: int = 16,
        rng: torch.Generator | None = None,
        posterior: ChainOptions | None = None,
    ) -> Tensor:
        """How unlike the training data each observation is, (batch,), nats; higher = more anomalous.

            "tails"            −Σ_t log P_t(x), nats: how far out in the tails of known observations (`calibrate`) x is by
                               four terms t of one pass (`docs/method.md`). It is ours, depends on no random
                               numbers where there is `infer`, and is the default once the prior is calibrated
            "log_joint"        −L^{>0} = −E[log p_β0(x|z) + log p_β(z) + Σ_i f_i(z_i)], nats (Cui, Wu and Han, CVPR 2023); the
                               default before
            "elbo"             −E[log p_β0(x|z) + log p_β(z) + Σ_i f_i(z_i) − log q_ω(z|x)], nats: with the posterior's entropy
            "log_likelihood"   −log (1/S) Σ_s p_β0(x|z_s) p_β(z_s) exp(Σ_i f_i) / q_ω(z_s|x), nats, S = `num_samples`
                               (importance weights: Burda, Grosse and Salakhutdinov, ICLR 2016); − log p(x) − log Z for S → ∞
            "negative_energy"  −E[Σ_i f_i(z_i)], nats: how improbable the latents are against the generator's own prior
            "reconstruction"   −E[log p_β0(x | z)], nats: how badly x is reconstructed

        with z ~ q_ω(z | x) (or Langevin posterior draws), over `num_samples` draws, in all but "tails"; "elbo" and
        "log_likelihood" need `infer`.

        Args:
            x: observations, (batch, *x_shape).
            method: the score's name; None: "tails" if the prior is calibrated, else "log_joint".
            num_samples: draws that the expectation is averaged over; not used by "tails".
            rng: random number generator.
            posterior: options of the posterior's chain, for generators without `infer`.

        Raises:
            ArgumentError: if there is no such method, "tails" without `calibrate`, or one that needs `infer` without it.
        """
        if method is None:
            method = "tails" if self.calibration.is_set else "log_joint"
        if method not in ("tails", *ANOMALY_SCORES):
            raise ArgumentError(f"method: expected one of {sorted(('tails', *ANOMALY_SCORES))}, got {method!r}.")
        if method in NEED_INFER and find_infer(self.generator) is None:
            raise ArgumentError(f'method: "{method}" needs q_ω(z | x), and the generator has no infer. Use "log_joint".')
        num_samples = check_count("num_samples", num_samples)
        if method == "tails":
            return self.explain(x, rng=rng, posterior=posterior).score
        x, settings = self._observations(x), _of_posterior(posterior)
        with self._computing(rng) as model:
            score, pool = ANOMALY_SCORES[method]
            return -scores.expected_score(model, x, score, num_samples, settings, pool)

    def explain(self, x: Any, *, rng: torch.Generator | None = None, posterior: ChainOptions | None = None) -> Explanation:
        """Why observations are anomalous: the score "tails", and −log P_t(x) of each of its terms.

        Args:
            x: observations, (batch, *x_shape).
            rng: random number generator, for generators without `infer`.
            posterior: options of the posterior's chain, for generators without `infer`.

        Raises:
            ArgumentError: if the prior is not calibrated.
        """
        x, settings = self._observations(x), _of_posterior(posterior)
        self._check_calibrated()
        with self._computing(rng) as model:
            return self.calibration.explain(scores.pass_terms(model, x, settings))

    def calibrate(self, x: Any, *, rng: torch.Generator | None = None, posterior: ChainOptions | None = None) -> None:
        """Learns from known observations what is usual, for the anomaly score "tails" and its `threshold`.

        Do it after `fit`, which forgets it. `save` keeps it.

        Args:
            x: observations like the training data but held out from it, (n, *x_shape), n ≥ 2; of the terms' tails a thousand
                show more than a hundred. Observations that were trained on reconstruct too well; a `DataWarning` says so
                where it finds some of the rows that this prior's `fit` got as a tensor or an array.
            rng: random number generator, for generators without `infer`.
            posterior: options of the posterior's chain, for generators without `infer`.
        """
        x, settings = self._observations(x), _of_posterior(posterior)
        if len(x) < 2:
            raise ShapeError("x: expected two or more observations to calibrate on, got one.")
        if known := self._trained_on and self._trained_on.intersection(row_digests(x)):
            warn(
                f"x: at least {len(known)} of the {len(x)} observations to calibrate on were trained on, which reconstruct too "
                "well: new ones will seem anomalous. Calibrate on observations that were held out.",
                DataWarning,
            )
        with self._computing(rng) as model:
            self.calibration.set_from(scores.pass_terms(model, x, settings))

    def threshold(self, quantile: float) -> float:
        """The score "tails" that a share of the observations of `calibrate` does not exceed, nats.

        Args:
            quantile: that share, in (0, 1): at 0.95 a twentieth of known observations is flagged. Beyond 0.999 it is that of
                0.999.

        Raises:
            ArgumentError: if the prior is not calibrated, or `quantile` is out of range.
        """
        quantile = check_share("quantile", quantile)
        self._check_calibrated()
        return self.calibration.threshold(quantile)

    def _check_calibrated(self) -> None:
        if not self.calibration.is_set:
            raise ArgumentError('The score "tails" needs prior.calibrate(x) first, on known data that were not trained on.')

    # ------------------------------------------------------------------------------------------------------------ learning

    def fit(
        self,
        data: Tensor | Iterable[Any],
        method: Method | str | None = None,
        *,
        config: FitConfig | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        accelerator: Accelerator | None = None,
        rng: torch.Generator | None = None,
        callback: Callable[[dict[str, float]], object] | None = None,
        **settings: Any,
    ) -> FitResult:
        """Learns the energies, and in the joint rules the generator too, then tunes `step_size` where the settings give none.

        Training again goes on where it stood. The rules, with z⁺ the posterior's draws and z⁻ the prior's:

            "denoising"        score matching of f along waymarks between the posterior's noise and N(0, I), for energies that
                               have them (Vincent, Neural Computation 2011)
            "nce"              one classifier of z⁺ ~ q_ω against z⁻ ~ p_β with logit Σ f_i (Aneja et al., NeurIPS 2021)
            "multi_stage_nce"  `stages` such estimates, each against draws of the prior before it; f is their sum
            "two_stage"        maximum likelihood, ∂/∂α_i = E[∂f_i(z⁺)] − E[∂f_i(z⁻)], with z⁺ ~ q_ω and z⁻ ~ p(z) by short
                               Langevin runs (Cui, Wu and Han, CVPR 2023, section 3.3)
            "variational"      the same, with the generator and its inference model learning too (joint training, z⁺ ~ q_ω)
            "joint"            the same, with z⁺ by Langevin on p(z | x): maximum likelihood of the whole model

        The first four leave the generator as it is. The last two train it in place, best from a pretrained one, and then
        `parameters()`, `state_dict()` and `save` hold it too.

        Other threads' calls run between two iterations. Scores of this prior that overlap its `fit` are of the weights of
        some iteration; the prior has the average of the weights when `fit` returns.

        Args:
            data: all observations, (n, *x_shape), a tensor or a floating-point array; or an iterable that can be run through
                again and again (a `DataLoader`) giving batches: tensors or arrays, tuples whose first entry is one, or dicts
                with one under "x", "image", "images", "pixel_values", "img", "data", "input" or "inputs", or with one alone
                of the right shape. Arrays are converted to the model's dtype and device.
            method: the learning rule; None: "denoising" where all energies have waymarks, as those of deep models have by
                default, else "nce". Where posterior and prior are told apart so well that "nce" would saturate, energies that
                the prior has by default, and that have learned nothing, are exchanged for those of `denoising_energies`;
                others learn by "multi_stage_nce".
            config: settings; None: the defaults of `energy_prior.FitConfig`.
            run_dir: folder for checkpoints of the whole run, TensorBoard and sample grids. The same call after a kill goes
                on from the last checkpoint, with the weights that it would have had. None: nothing is written.
            accelerator: an `accelerate.Accelerator`, for several processes, hosts, GPUs and bf16 (extra "train"; bf16 for
                generators that say `autocast = True`); None: this process alone.
            rng: random number generator.
            callback: called between two iterations, in every process, with a copy of every new entry of the history (every
                `log_every` iterations and at checkpoints). What it raises ends the run as Ctrl-C does: the prior holds its
                last good average.
            **settings: single settings of `FitConfig`, over those in `config`.

        Returns:
            The history of the run.

        Raises:
            ArgumentError, ShapeError: for impossible settings or data (empty, not finite, wrong shape or dtype, fewer than a
                batch), a `run_dir` that holds another run, energies that `save` could not write or "multi_stage_nce" not
                copy, or weights that another run trains now.
            GeneratorError: if the method cannot work with the generator.
            DivergenceError: if something stops being finite, |f| leaves `max_energy`, or built-in energies stay near their
                saturation; the prior then holds its last good average.
            CheckpointError: if the last checkpoint in `run_dir` is damaged; the prior is as it was.
            DistributedError: if another process dies.
            OSError: if a checkpoint cannot be written; the one before is whole.
        """

        def learned() -> None:
            self.calibration.forget()  # it was that of other energies
            self._fitted_on = fingerprint(self.generator)
            self._trained_on |= row_digests(data, most=512)

        def exchange(energies: nn.ModuleList) -> None:
            super(JointEBMPrior, self).__setattr__("energies", energies)  # else a prior keeps those that it was built with

        hooks = FitHooks(
            started=self.train_jointly,
            learned=learned,
            save=self.save,
            sample=lambda n, step_size: self.sample(n, step_size=step_size),
            tuned=self.step_size.fill_,
            exchange=exchange if self._has_default_energies() else None,
        )
        return fit_energies(
            self.model,
            data,
            method,
            config,
            settings,
            x_shape=self.x_shape,
            hooks=hooks,
            run_dir=run_dir,
            accelerator=accelerator,
            rng=rng,
            callback=callback,
        )

    def _has_default_energies(self) -> bool:
        """Whether the energies are those that the library chose, with nothing changed of what learns and who looks on."""
        same = tuple(self.energies) == self._default_energies
        hooked = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in self.energies.modules())
        return same and not hooked and all(p.requires_grad for p in self.energies.parameters())

    def mismatch(
        self,
        x: Any,
        *,
        prior: Literal["joint", "generator"] = "joint",
        rng: torch.Generator | None = None,
        posterior: ChainOptions | None = None,
        **chain: Unpack[ChainOptions],
    ) -> Mismatch:
        """How far the posterior of observations is from the prior: before `fit` what has to be learned, after it what was.

        In noise space, ε_i = (z_i − μ_i)/σ_i: there the generator's own prior is N(0, I). `print` shows it as a table.

        Args:
            x: observations, (n, *x_shape), n ≥ 32; of a thousand units thousands of observations.
            prior: "joint": draws of the joint prior are compared with too; "generator": its own prior alone, without a chain.
            rng: random number generator.
            posterior: options of the posterior's chain, for generators without `infer`.
            **chain: options of the prior's chain.

        Returns:
            Moments and nats of every layer, and how often a classifier tells posterior draws from draws of either prior.

        Raises:
            ArgumentError, ShapeError: if an argument does not fit; the message says how.
        """
        x, settings, of_posterior = self._observations(x), ChainSettings.of(chain), _of_posterior(posterior)
        _check_prior(prior, None, chain)
        if len(x) < LEAST_DRAWS:
            raise ShapeError(f"x: expected at least {LEAST_DRAWS} observations, got {len(x)}: fewer show no moments.")
        with self._computing(rng) as model:
            of_joint = settings if prior == "joint" else None
            return mismatch_of(model, x, of_posterior, of_joint, max_memory=settings.max_memory)

    def tune_step_size(
        self,
        *,
        target_acceptance: float = USUAL_ACCEPTANCE,
        batch_size: int = 64,
        max_memory: float = 2.0**30,
        rng: torch.Generator | None = None,
    ) -> float:
        """Sets `step_size` to the one at which MALA on this prior accepts the share `target_acceptance`, and returns it.

        Args:
            target_acceptance: share of the proposals, in (0, 1).
            batch_size: chains that look at what they accept, ≥ 1; fewer where they do not fit into `max_memory`.
            max_memory: bytes that a gradient evaluation may keep, > 0.
            rng: random number generator.
        """
        target_acceptance = check_share("target_acceptance", target_acceptance)
        batch_size, max_memory = check_count("batch_size", batch_size), check_positive("max_memory", max_memory)
        with self._computing(rng) as model:
            tuned = tune_step_size(
                model.target(batch_size),
                start_step_size=model.step_size,
                target_acceptance=target_acceptance,
                max_memory=max_memory,
            )
            self.step_size.fill_(tuned)
        return tuned

    @property
    def trained_jointly(self) -> bool:
        """Whether the generator belongs to what is learned and saved; the joint rules of `fit` switch it on."""
        return "generator" in self._modules

    def train_jointly(self) -> None:
        """Makes the generator, an `nn.Module`, part of the prior: `parameters()` and `state_dict()` hold it from now on."""
        if not self.trained_jointly:
            self._modules["generator"] = self.__dict__["generator"]  # first: other threads always find one of the two
            del self.__dict__["generator"]

    # --------------------------------------------------------------------------------------------------------- checkpoints

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `state_dict()` and the generator's fingerprint to one safetensors file, atomically.

        The file holds the energies and the tuned step size; after joint training the generator's weights too.

        Args:
            path: of the file; `~` is the home folder.

        Raises:
            CheckpointError: if the generator has changed since the energies were fitted.
            OSError: if the file cannot be written; what was there before is untouched.
        """
        target = check_path("path", path)
        with exclusive():
            now = fingerprint(self.generator)
            if not self.trained_jointly:  # else the generator is in the file
                check_unchanged(self._fitted_on, now)
            config = {
                "space": self.space,
                "latent_shapes": [list(shape) for shape in self.generator.latent_shapes],
                "generator": now,
                "energies": describe_energies(self.energies),
                "joint": self.trained_jointly,
            }
            write_checkpoint(target, self.state_dict(), config)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        generator: HierarchicalGenerator,
        energies: Iterable[nn.Module] | None = None,
    ) -> Self:
        """A prior as `save` wrote it, around the same generator; on the generator's device.

        Args:
            path: the checkpoint.
            generator: the generator that the energies were trained on; after joint training one built like it, into which
                its weights are loaded.
            energies: needed if the prior was built with energy modules of your own: the same modules, whose weights are
                then loaded. None: the built-in ones that the checkpoint describes.

        Raises:
            FileNotFoundError: if there is no such file.
            CheckpointError: if the file is truncated, foreign, of a future version, or belongs to another generator or to
                other energies. The message says which.
        """
        source = check_path("path", path)
        generator = unwrapped(generator)
        tensors, config = read_prior(source)
        joint, space = config["joint"], config["space"]
        check_generator_fits(source, config, generator, weights=not joint)
        with torch.no_grad(), frozen(generator):
            reference = TopDown(generator, 1).reference
        if tensors["step_size"].dtype != reference.dtype or space not in get_args(Space):
            raise CheckpointError(
                f"{os.fspath(source)!r} is of a prior in {tensors['step_size'].dtype} and the space {shown(space)}; "
                f"expected {reference.dtype}, as this generator computes in, and one of {get_args(Space)}. Convert the "
                "generator, or use another copy."
            )
        if energies is None:
            weights = {name: value.shape for name, value in tensors.items()}
            try:
                energies = build_energies(config["energies"], generator.latent_shapes, weights)
            except CheckpointError as error:
                raise CheckpointError(f"{os.fspath(source)!r}: {error}") from error.__cause__
            energies = energies.to(reference.device, reference.dtype)
        prior = cls(generator, energies, space=space)
        if joint:
            prior.train_jointly()
            check_state_fits(
                source,
                _of_generator(prior.state_dict()),
                _of_generator(tensors),
                "this generator",
                "Build it as it was when the prior was saved.",
            )
        check_state_fits(source, prior.state_dict(), tensors)
        load_named(prior, tensors)
        prior._fitted_on = config["generator"]
        return prior

    def save_pretrained(self, folder: str | os.PathLike[str], card: ModelCard | None = None) -> None:
        """Writes a folder as `push_to_hub` uploads it, which `from_pretrained` reads.

        It holds prior.safetensors, as `save` writes it, README.md, the card, and for a generator of the library (`LadderVAE`,
        `ResidualVAE`) generator.safetensors, so that the model is whole. Files of these names that are there are replaced.

        Args:
            folder: to write to; it is made. `~` is the home folder.
            card: what the page says beside what the prior says of itself; None: nothing, and a README.md that is there stays.

        Raises:
            ArgumentError: if `card` is none.
            CheckpointError: as `save`.
            OSError: if a file cannot be written.
        """
        place = check_path("folder", folder)
        keep = card is None and (place / CARD_FILE).exists()
        self._write_files(place, place.resolve().name, card, keep)

    def push_to_hub(
        self,
        repo_id: str,
        card: ModelCard | None = None,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "A joint energy-based prior",
        create_pr: bool = False,
    ) -> str:
        """Uploads the prior, its card and, of the library's own generators, the generator to the Hugging Face hub.

        Files are those of `save_pretrained`; none is a pickle. Needs the extra "hub".

        Args:
            repo_id: "owner/name"; the repository is made if there is none.
            card: as in `save_pretrained`; `ModelCard.of_run` makes one of a run of `energy-prior train`.
            private: a repository that is made is private; None: as its owner's settings have it.
            token: of the hub; None: that of `hf auth login`.
            revision: branch to write to, made if there is none; None: the main one.
            commit_message: of the commit.
            create_pr: propose the files as a pull request, to a repository that may be another's.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            ArgumentError: if `repo_id` is no name of a repository, or `card` is no card.
            CheckpointError: as `save`.
            HubError: if the hub refuses, or cannot be reached.
        """
        check_repository(repo_id)
        options: dict[str, Any] = {"revision": revision, "commit_message": commit_message, "create_pr": create_pr}
        with tempfile.TemporaryDirectory() as made:
            self._write_files(Path(made), repo_id, card, keep_card=False)
            return upload(Path(made), repo_id, private=private, token=token, keep_card=card is None, **options)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        generator: HierarchicalGenerator | None = None,
        energies: Iterable[nn.Module] | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """A prior from the Hugging Face hub, or from a folder that `save_pretrained` wrote; no code of its files is run.

        Args:
            source: a folder, or "owner/name" of a repository (extra "hub").
            generator: the generator that the prior was fitted on, with its weights; None: the one beside it, on the CPU, if
                it is one of the library's.
            energies: as in `load`.
            revision: branch, tag or commit; None: the main branch.
            token: of the hub; None: that of `hf auth login`.
            cache_dir: where downloads are kept; None: as huggingface_hub has it.
            force_download: download again what is kept, which may be damaged.
            local_files_only: take only what was downloaded before.

        Raises:
            ArgumentError: if `source` is neither, or no generator was passed and there is none.
            HubError: if it cannot be downloaded.
            FileNotFoundError, CheckpointError: as `load`.
        """
        options = {"revision": revision, "token": token, "cache_dir": cache_dir}
        options |= {"force_download": force_download, "local_files_only": local_files_only}
        folder = fetched(source, generator is None, **options)
        return cls.load(folder / PRIOR_FILE, read_model(folder) if generator is None else generator, energies)

    def _write_files(self, folder: Path, repository: str, card: ModelCard | None, keep_card: bool) -> None:
        """The files of a repository."""
        if not isinstance(card, ModelCard | None):
            raise ArgumentError(f"card: expected a ModelCard, got {shown(card)}.")
        folder.mkdir(parents=True, exist_ok=True)
        self.save(folder / PRIOR_FILE)
        whole = write_model(folder, self.generator)
        if keep_card:
            return
        own = [entry["name"] for entry in describe_energies(self.energies) if entry["kind"] == "custom"]
        shapes = [f"z_{i} {tuple(z)}" for i, z in enumerate(self.generator.latent_shapes, start=1)]
        kinds = Counter(type(f).__name__ for f in self.energies)
        count = sum(p.numel() for p in self.energies.parameters())
        known, beside = int(self.calibration.count), ", in a file beside the prior" if whole else ", not part of the files"
        facts = {
            "generator": type(self.generator).__name__ + beside,
            "observations": f"{tuple(self.x_shape)}, {self.dtype}",
            "latents": f"{some_of(shapes)}; z_1 nearest the data",
            "energies": f"{', '.join(f'{n} {kind}' for kind, n in kinds.items())}; {count:,} parameters",
            "space of the chains": self.space,
            "Langevin step size": f"{float(self.step_size):.4g}",
            "calibrated for anomaly scores": f"on {known:,} observations" if known else "no",
        }
        card, images = ModelCard() if card is None else card, len(self.x_shape) == 3
        write_card(folder, card, facts, repository=repository, whole=whole, images=images, energies=bool(own))

    # ------------------------------------------------------------------------------------------------------- what it is

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.step_size.device

    @property
    def dtype(self) -> torch.dtype:
        """Of latents, observations, energies and scores."""
        return self.step_size.dtype

    @property
    def model(self) -> JointModel:
        """What the methods compute with, unchecked; for code that runs chains of its own."""
        return JointModel(self.generator, self.energies, self.space, float(self.step_size))

    def __repr__(self) -> str:
        """Generator, layers with their energies, space and step size."""
        shapes = (tuple(shape) for shape in self.generator.latent_shapes)
        layers = ", ".join(
            f"z_{i} {shape} {type(f).__name__}" for i, (shape, f) in enumerate(zip(shapes, self.energies, strict=True), start=1)
        )
        kind = type(self.generator).__name__
        return f'{type(self).__name__}({kind}; {layers}; space="{self.space}", step_size={float(self.step_size):.3g})'

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and self.__dict__.get("_built"):
            raise ArgumentError(
                f"{name}: a prior keeps what it was built with, as its energies and its step size belong to it. Build another "
                "one: JointEBMPrior(generator, energies, space=…)."
            )
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """What `.to()`, `.double()`, `.cuda()` … call: the generator goes along."""
        with exclusive():
            if isinstance(self.generator, nn.Module) and not self.trained_jointly:
                self.generator._apply(fn, recurse)
            return super()._apply(fn, recurse)

    # --------------------------------------------------------------------------------------------------------- once per call

    @contextlib.contextmanager
    def _computing(self, rng: torch.Generator | None) -> Generator[JointModel]:
        """Where a public call computes: alone, without gradients, in evaluation mode and full precision, with `rng`."""
        here = self.device
        with (
            reproducible(rng, here),
            exclusive(),
            torch.inference_mode(False),
            torch.no_grad(),
            full_precision(here),
            frozen(self.generator, self),
        ):
            check_same_place(TopDown(self.generator, 1).reference, self.step_size)
            yield self.model

    def _observations(self, x: Any) -> Tensor:
        return as_observations("x", x, self.x_shape, self.step_size, self.generator)

    def _check_latents(self, name: str, latents: Sequence[Tensor], batch: int | None = None) -> None:
        check_latents(name, latents, self.generator.latent_shapes, self.step_size, batch)

    def _check_start(self, start: Sequence[Tensor] | None, batch: int) -> None:
        if start is not None:
            self._check_latents("start", start, batch)

    def _check_given(self, given: Mapping[int, Tensor] | None, n: int) -> dict[int, Tensor] | None:
        """The held layers by their numbers, as Python's own, each where its prior can be."""
        if not given:
            return None
        held = check_given(given, self.generator.latent_shapes, self.step_size, n)
        if any(layer in self._families for layer in held):
            with self._computing(None) as model:
                model.check_support(held)
        return held


def _check_decode(decode: Any) -> None:
    if decode not in (None, *get_args(Decode)):
        raise ArgumentError(f'decode: expected "mean", "sample" or None, got {decode!r}.')


def _check_prior(prior: str, more: object, chain: ChainOptions) -> None:
    """Whether `prior` is known, and takes these options of a chain and what `more` there is."""
    if prior not in ("joint", "generator"):
        raise ArgumentError(f'prior: expected "joint" or "generator", got {prior!r}.')
    if prior == "generator" and (more or set(chain) - {"max_memory"}):
        raise ArgumentError(
            'prior="generator" is ancestral: it takes max_memory of the options of a chain, and neither `given`, `start`, '
            "`noise` nor a `method`."
        )


def _check_method(method: str, proposals: int | None, more: object, chain: ChainOptions) -> int:
    """Whether `method` is known, and takes these options and what `more` there is; the number of proposals."""
    if method not in get_args(SampleMethod):
        raise ArgumentError(f"method: expected one of {get_args(SampleMethod)}, got {method!r}.")
    if method == "resample" and (more or set(chain) - {"max_memory"}):
        raise ArgumentError(
            'method: "resample" runs no chain: it takes max_memory of the options, and neither `given`, `start` nor `noise`.'
        )
    if method == "langevin" and proposals is not None:
        raise ArgumentError(f'proposals: method="langevin" has none, got {proposals!r}. Leave it out, or take "resample".')
    return _PROPOSALS if proposals is None else check_count("proposals", proposals)


def _of_generator(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.startswith("generator.")}


def _of_posterior(options: ChainOptions | None) -> ChainSettings:
    """Settings of the posterior's chain, from the argument `posterior`."""
    try:
        return ChainSettings.of({} if options is None else options)
    except ArgumentError as error:
        raise ArgumentError(f"posterior: {str(error).removeprefix('options: ')}") from None


def _of_skipped(skipped: Skipped, chain: ChainOptions) -> ChainSettings | None:
    """Settings of the chain that redraws layers; None where their means stand for them."""
    if skipped not in get_args(Skipped):
        raise ArgumentError(f"skipped: expected one of {get_args(Skipped)}, got {skipped!r}.")
    if skipped == "draw":
        return ChainSettings.of(chain)
    if chain:
        raise ArgumentError(
            f'{next(iter(chain))}: skipped="mean" runs no chain of the prior. Leave it out, or give it to the posterior: '
            "posterior={…}."
        )
    return None
