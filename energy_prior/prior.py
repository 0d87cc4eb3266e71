"""`JointEBMPrior`: p(z) = exp(Σ_i f_i(z_i)) p_β(z) / Z around any hierarchical generator."""

from __future__ import annotations

__all__ = ["JointEBMPrior"]

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from energy_prior.checkpoint import (
    check_generator_fits,
    check_state_fits,
    check_unchanged,
    fingerprint,
    read_checkpoint,
    write_checkpoint,
)
from energy_prior.checks import arguments as validate
from energy_prior.checks.arguments import check_count
from energy_prior.checks.generator import probe_generator
from energy_prior.energies import build_energies, default_energies, describe_energies
from energy_prior.errors import ArgumentError
from energy_prior.langevin import (
    ChainOptions,
    ChainSettings,
    NoiseSource,
    Trajectory,
    TrajectoryRecorder,
)
from energy_prior.learning import LearnMethods
from energy_prior.model import JointModel, check_decode, decode_latents
from energy_prior.process import evaluating, frozen, reproducible
from energy_prior.protocol import HierarchicalGenerator
from energy_prior.scoring import ScoreMethods
from energy_prior.topdown import Decode, Space, TopDown, ancestral, ancestral_noise


class JointEBMPrior(ScoreMethods, LearnMethods):
    """The joint latent-space energy-based prior of a hierarchical generator (Cui, Wu and Han, CVPR 2023, eq. 5).

        p(z) = exp(Σ_i f_i(z_i)) p_β(z) / Z,   p_β(z) = p(z_L) ∏_{i<L} p_β(z_i | z_{>i})

    Layers are numbered as in the paper: z_1 is nearest the data, z_L is the top; `latents[0]` is z_1. A higher f_i means
    more probable. All densities, energies and scores are in nats per observation.

    Methods that run a chain take its options as keywords: `steps`, `step_size`, `adjust`, `temperature`, `scheme`, `taming`,
    `backend`, `precision`, `max_memory` (see `energy_prior.langevin.ChainSettings`). Methods that draw random numbers take
    `rng`: the same seed gives the same result (for the same batch size), None uses torch's global stream, and an
    explicit `rng` leaves that stream untouched.

    The generator is not a submodule. `parameters()` are the energies'; `state_dict()` holds them (`energies.<i − 1>.…`),
    the tuned `step_size` and the `calibration` of a score; after joint training both hold the generator (`generator.…`)
    too. `.to()` moves the generator in any case. Sampling and scoring run
    everything in evaluation mode and leave train/eval flags, `requires_grad` and `.grad` as they were.

    Args:
        generator: any `HierarchicalGenerator`; `check_generator` tests one.
        energies: one module per layer for z_1, …, z_L, f_i(z_i) -> (batch,), higher = more probable; None: networks fitted
            to the latent shapes, f = 0 until trained.
        space: coordinates of the chains, "noise" (ε with z = T_β(ε): unit scale at every layer) or "latent".

    Raises:
        GeneratorError: if the generator breaks the protocol in a way that a single pass shows.
        ArgumentError, ShapeError: if the energies do not fit the generator, or `space` is unknown.

    Example:
        >>> from energy_prior import JointEBMPrior, LadderVAE
        >>> prior = JointEBMPrior(LadderVAE((1, 8, 8), latent_dims=(16, 8)))
        >>> prior.sample(4).shape
        torch.Size([4, 1, 8, 8])
    """

    generator: HierarchicalGenerator
    step_size: Tensor
    calibration: Tensor

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
        self.space: Space = space
        object.__setattr__(self, "generator", generator)  # not a submodule: see the class docstring
        with torch.no_grad(), frozen(generator):
            probe = probe_generator(generator)
        self.x_shape = probe.x_shape
        self._fitted_on: str | None = None
        reference = probe.latents[0]
        if energies is None:
            self.energies = default_energies(generator.latent_shapes).to(reference.device, reference.dtype)
        else:
            self.energies = nn.ModuleList(validate.energy_modules(energies))
            with torch.no_grad(), evaluating(self.energies):
                validate.check_energies(self.energies, probe.latents)
        self.register_buffer("calibration", torch.zeros(2, 3, dtype=reference.dtype, device=reference.device))
        self.register_buffer("step_size", torch.tensor(0.3, dtype=reference.dtype, device=reference.device))

    def sample(
        self,
        n: int,
        *,
        decode: Decode | None = None,
        given: Mapping[int, Tensor] | None = None,
        prior: Literal["joint", "generator"] = "joint",
        rng: torch.Generator | None = None,
        **chain: Unpack[ChainOptions],
    ) -> Tensor:
        """Draws observations: latents as `sample_latents` draws them, decoded by the generator's likelihood.

        Args:
            n: number of observations.
            decode: "mean" of p_β0(x | z) or a "sample" of it; None: the mean where the likelihood has one.
            given: layers held fixed, as in `sample_latents`.
            prior: "joint", or "generator" for the generator's own, to compare with.
            rng: random number generator.
            **chain: chain options.

        Returns:
            (n, *x_shape).
        """
        check_decode(decode)
        settings = self._check_prior(prior, given, chain)
        self._check_chain(n, given)
        with self._quiet(rng):
            if given or (prior == "joint" and settings.steps):
                latents = self.sample_latents(n, given=given, prior=prior, **chain)
                return decode_latents(self.generator, latents, decode, settings.max_memory)
            noise = ancestral_noise(TopDown(self.generator, n))  # one pass for latents and observations
            return decode_latents(self.generator, noise, decode, settings.max_memory, space="noise")

    def sample_latents(
        self,
        n: int,
        *,
        given: Mapping[int, Tensor] | None = None,
        prior: Literal["joint", "generator"] = "joint",
        start: Sequence[Tensor] | None = None,
        noise: NoiseSource | None = None,
        rng: torch.Generator | None = None,
        **chain: Unpack[ChainOptions],
    ) -> tuple[Tensor, ...]:
        """Draws latents from the joint prior, p(z) or p(z_free | z_given), by Langevin.

        Args:
            n: number of draws.
            given: layer *number* as in the paper (1 = nearest the data, … L) -> its fixed value, (n, *latent_shape).
            prior: "joint", or "generator" for the generator's own prior (f = 0): ancestral draws, no chain.
            start: latents (z_1, …, z_L) that the chains start from; None: ancestral draws.
            noise: the chain's random numbers (`energy_prior.langevin.InjectedNoise`); None: drawn from `rng`.
            rng: random number generator.
            **chain: chain options.

        Returns:
            (z_1, …, z_L), z_i of shape (n, *latent_shapes[i - 1]); held layers come back as given.

        Raises:
            ArgumentError, ShapeError: if an argument does not fit; the message says how.
            DivergenceError: if the chain diverges; it names the layer and the step.
        """
        self._check_chain(n, given, start)
        settings = self._check_prior(prior, given or start or noise, chain)
        with self._quiet(rng) as model:
            if prior == "generator":
                return ancestral(self.generator, n).latents
            return model.run(model.parts(n, settings.max_memory, given), settings, start=start, noise=noise)

    def decode(
        self, latents: Sequence[Tensor], *, decode: Decode | None = None, rng: torch.Generator | None = None
    ) -> Tensor:
        """Observations of given latents, by the generator's likelihood.

        Args:
            latents: (z_1, …, z_L), z_i of shape (batch, *latent_shapes[i - 1]).
            decode: "mean" of p_β0(x | z) or a "sample" of it; None: the mean where the likelihood has one.
            rng: random number generator.

        Returns:
            (batch, *x_shape).
        """
        check_decode(decode)
        self._check_latents("latents", latents)
        with self._quiet(rng):
            return decode_latents(self.generator, latents, decode)

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
            given: layers held fixed, as in `sample_latents`.
            start: latents that the chains start from; None: ancestral draws.
            noise: the chain's random numbers; None: drawn from `rng`.
            rng: random number generator.
            **chain: chain options; `steps`, the length of the chains, is 2500 unless given.
        """
        chain.setdefault("steps", 2500)
        settings = ChainSettings.of(chain)
        if check_count("every", every) > settings.steps:
            raise ArgumentError(f"every: expected at most steps = {settings.steps}, got {every}.")
        self._check_chain(n, given, start)
        with self._quiet(rng) as model:
            parts = model.parts(n, settings.max_memory, given)
            if not parts[0].topdown.free:
                raise ArgumentError("given: every layer is held, so there is nothing to follow; leave one free.")
            recorder = TrajectoryRecorder(parts)
            model.run(parts, settings, start=start, noise=noise, on_step=recorder, every=every)
            return recorder.trajectory()

    def sample_posterior(
        self,
        x: Tensor,
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
            start: latents that the chains start from; None: a draw of q_ω, or ancestral where there is no `infer`.
            noise: the chain's random numbers (then `start` is needed too); None: drawn from `rng`.
            rng: random number generator.
            **chain: chain options.

        Returns:
            (z_1, …, z_L), z_i of shape (batch, *latent_shapes[i - 1]).
        """
        validate.check_observations("x", x, self.x_shape, self.reference, self.generator)
        self._check_chain(len(x), start=start)
        settings = ChainSettings.of(chain)
        if method not in ("langevin", "infer"):
            raise ArgumentError(f'method: expected "langevin" or "infer", got {method!r}.')
        if method == "infer" and (start is not None or noise is not None or chain):
            raise ArgumentError('method: "infer" runs no chain, so it takes neither start, noise nor options of a chain.')
        if noise is not None and start is None:
            raise ArgumentError("noise: give `start` as well; the draw of q that a chain starts from is random too.")
        with self._quiet(rng) as model:
            if method == "infer":
                return validate.checked_infer(self.generator, x).latents
            return model.sample_posterior(x, settings, start=start, noise=noise)

    def negative_energy(self, latents: Sequence[Tensor]) -> Tensor:
        """f_i(z_i) of every layer, (batch, L), nats; higher = more probable. Differentiable.

        Args:
            latents: (z_1, …, z_L), z_i of shape (batch, *latent_shapes[i - 1]).
        """
        self._check_latents("latents", latents)
        with evaluating(self):
            return self.model.negative_energy(latents)

    def log_density(self, latents: Sequence[Tensor]) -> Tensor:
        """Σ_i f_i(z_i) + log p_β(z), the log density of the joint prior without −log Z, (batch,), nats. Differentiable.

        Args:
            latents: (z_1, …, z_L), z_i of shape (batch, *latent_shapes[i - 1]).
        """
        energy = self.negative_energy(latents)
        with evaluating(self.generator):
            return energy.sum(1) + self.model.log_prior(latents).sum(1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `state_dict()` and the generator's fingerprint to one safetensors file, atomically.

        The file holds the energies and the tuned step size; after joint training the generator's weights too.
        """
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
        write_checkpoint(path, self.state_dict(), config)

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
        tensors, config = read_checkpoint(path)
        joint = bool(config.get("joint"))
        check_generator_fits(path, config, generator, weights=not joint)
        if energies is None:
            step_size = tensors["step_size"]  # its dtype is that of the latents
            device = TopDown(generator, 1).reference.device
            energies = build_energies(config["energies"]).to(device, step_size.dtype)
        prior = cls(generator, energies, space=config["space"])
        if joint:
            prior.train_jointly()
            own, saved = (
                {k: v for k, v in state.items() if k.startswith("generator.")} for state in (prior.state_dict(), tensors)
            )
            check_state_fits(path, own, saved, "this generator", "Build it as it was when the prior was saved.")
        check_state_fits(path, prior.state_dict(), tensors)
        prior.load_state_dict(tensors)
        prior._fitted_on = config["generator"]
        return prior

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """What `.to()`, `.double()`, `.cuda()` … call: the generator goes along."""
        if isinstance(self.generator, nn.Module) and not self.trained_jointly:
            self.generator._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @property
    def model(self) -> JointModel:
        """What the methods compute with, unchecked; for training and for code that runs its own chains."""
        return JointModel(self.generator, list(self.energies), self.space, float(self.step_size))

    @contextlib.contextmanager
    def _quiet(self, rng: torch.Generator | None) -> Iterator[JointModel]:
        """The model without gradients, in evaluation mode, drawing from `rng`; also inside `torch.inference_mode`."""
        here = self.reference
        validate.check_same_place(here, self.step_size)
        quiet = frozen(self.generator, self)
        with torch.inference_mode(False), torch.no_grad(), quiet, reproducible(rng, here.device):
            yield self.model

    @staticmethod
    def _check_prior(prior: str, more: object, chain: ChainOptions) -> ChainSettings:
        """The chain's settings, if `prior` is known, and takes them and what `more` there is."""
        settings = ChainSettings.of(chain)
        if prior not in ("joint", "generator"):
            raise ArgumentError(f'prior: expected "joint" or "generator", got {prior!r}.')
        if prior == "generator" and (more or chain):
            raise ArgumentError('prior="generator" is ancestral: it takes neither `given` nor options of a chain.')
        return settings

    def _check_latents(self, name: str, latents: Sequence[Tensor], batch: int | None = None) -> None:
        validate.check_latents(name, latents, self.generator.latent_shapes, self.reference, batch)

    def _check_chain(self, n: int, given: Mapping[int, Tensor] | None = None, start: Sequence[Tensor] | None = None) -> None:
        check_count("n", n)
        if given:
            validate.check_given(given, self.generator.latent_shapes, self.reference, n)
        if start is not None:
            self._check_latents("start", start, n)
