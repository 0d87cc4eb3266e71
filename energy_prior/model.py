"""The joint model p(x, z) ∝ p_β0(x | z) exp(Σ_i f_i(z_i)) p_β(z) behind `JointEBMPrior`: the computations, without checks."""

from __future__ import annotations

__all__ = ["NEVER_SPLIT", "JointModel", "PosteriorDraw"]

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from energy_prior._util import not_none
from energy_prior.checks.arguments import checked_infer
from energy_prior.errors import ArgumentError, DivergenceError
from energy_prior.langevin import ChainSettings, NoiseSource, Target, Trajectory, sample_target, warn_if_stuck
from energy_prior.langevin.cost import equal_parts, forward_memory
from energy_prior.protocol import HierarchicalGenerator, find_infer, layer_energy, reads_noise
from energy_prior.topdown import (
    Decode,
    Descent,
    Space,
    TopDown,
    ancestral,
    ancestral_noise,
    decode_state,
    inferred_descent,
)

NEVER_SPLIT = 16
"""Rows that go through a pass together whatever it needs."""


class PosteriorDraw(NamedTuple):
    """One posterior draw.

    Attributes:
        latents: (z_1, …, z_L).
        log_q: log q_ω of every layer, (batch, L), if it came from an inference model.
        descent: the pass down through these latents to the observation, if the inference model went that way.
    """

    latents: tuple[Tensor, ...]
    log_q: Tensor | None
    descent: Descent | None = None


@dataclass(frozen=True)
class JointModel:
    """A generator with its energies. Callers check arguments, freeze the modules and choose the random stream.

    Attributes:
        generator: the hierarchical generator.
        energies: f_1, …, f_L.
        space: coordinates of the chains.
        step_size: Langevin step size where a chain's settings give none.

    Examples:
        >>> from energy_prior import ChainSettings, load_example
        >>> model = load_example().model
        >>> latents = model.sample(3, ChainSettings(steps=5))
        >>> model.negative_energy(latents).shape, model.decode(latents).shape
        (torch.Size([3, 2]), torch.Size([3, 1, 8, 8]))
    """

    generator: HierarchicalGenerator
    energies: nn.ModuleList
    space: Space
    step_size: float

    def negative_energy(self, latents: Sequence[Tensor], noise: Sequence[Tensor] | None = None) -> Tensor:
        """f_i, (batch, L), nats.

        Args:
            latents: (z_1, …, z_L), z_i of shape (batch, *latent_shapes[i - 1]).
            noise: (ε_1, …, ε_L) of them, (batch, *latent_shape) each; None: it is computed where an energy reads it.
        """
        if noise is None and any(map(reads_noise, self.energies)):
            noise = self.noise(latents)
        layers = enumerate(self.energies, start=1)
        return torch.stack([layer_energy(f, i, latents, noise).to(latents[0].dtype) for i, f in layers], dim=1)

    def energies_at(self, noise: Sequence[Tensor], level: Tensor) -> Tensor:
        """f_i(ε_i, …, ε_L; t) of energies that have waymarks, (batch, L), nats.

        Args:
            noise: (ε_1, …, ε_L), (batch, *latent_shape) each.
            level: waymark t in [0, 1], (batch,).
        """
        return torch.stack([f(tuple(noise[i:]), level) for i, f in enumerate(self.energies)], dim=1)

    def noise(self, latents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """(ε_1, …, ε_L), (batch, *latent_shape) each, by one top-down pass.

        Args:
            latents: (z_1, …, z_L), z_i of shape (batch, *latent_shapes[i - 1]).

        Raises:
            DivergenceError: if a z_i is outside the support of p_β(z_i | z_{>i}).
        """
        descent = TopDown(self.generator, len(latents[0])).descend(tuple(latents), "latent")
        noise = descent.noise()
        for layer, (conditional, e) in enumerate(zip(descent.conditionals, noise, strict=True), start=1):
            if not isinstance(conditional, Normal) and not bool(torch.isfinite(e).all()):
                raise DivergenceError(
                    f"{int((~torch.isfinite(e)).sum())} values of z_{layer} are outside the support of p(z_{layer} | "
                    f"z_(>{layer})), a {type(conditional).__name__}: no noise gives them. q and p must have one support; "
                    "energy_prior.check_generator says more.",
                    layer=layer,
                )
        return noise

    def check_support(self, held: Mapping[int, Tensor]) -> None:
        """Each held z_j with no free layer above it is where p_β(z_j | z_{>j}) can be.

        Args:
            held: layer number (1 … L) -> its fixed z_i, (n, *latent_shapes[i - 1]).

        Raises:
            ArgumentError: names the layer.
        """
        topdown = TopDown(self.generator, len(next(iter(held.values()))), held)
        for layer, noise in topdown.noise_above.items():
            outside = ~torch.isfinite(noise)
            if bool(outside.any()):
                raise ArgumentError(
                    f"given[{layer}]: {int(outside.sum())} values of z_{layer} are where p(z_{layer} | z_(>{layer})) cannot "
                    "be: log p is −∞ there. Give a z within its support, such as one of sample_latents."
                )

    def log_prior(self, latents: Sequence[Tensor]) -> Tensor:
        """log p_β(z_i | z_{>i}), (batch, L), nats.

        Args:
            latents: (z_1, …, z_L), z_i of shape (batch, *latent_shapes[i - 1]).
        """
        return TopDown(self.generator, len(latents[0])).descend(tuple(latents), "latent").log_priors()

    def target(self, n: int, held: Mapping[int, Tensor] | None = None, x: Tensor | None = None) -> Target:
        """p(z_free | z_held) of n draws, or the posterior of n observations x.

        Args:
            n: number of chains.
            held: layer number (1 … L) -> its fixed z_i, (n, *latent_shapes[i - 1]); None: all layers are free.
            x: observations, (n, *x_shape); None: the target is the prior.
        """
        return Target(self.generator, list(self.energies), self.space, n, held or {}, x)

    def target_below(self, topdown: TopDown) -> Target:
        """p(z_free | z_held) for the held layers of a pass down, which is not run again.

        Args:
            topdown: the pass.
        """
        return dataclasses.replace(self.target(topdown.batch_size, topdown.held), topdown=topdown)

    def run(
        self,
        target: Target,
        settings: ChainSettings,
        *,
        start: Sequence[Tensor] | None = None,
        noise: NoiseSource | None = None,
    ) -> tuple[Tensor, ...]:
        """Runs chains on a target.

        Args:
            target: what to draw from.
            settings: the chains' settings.
            start: (z_1, …, z_L) that the chains start from, (batch, *latent_shape) each; None: ancestral draws.
            noise: the chains' random numbers; None: torch's global stream.

        Returns:
            (z_1, …, z_L), z_i of shape (batch, *latent_shapes[i - 1]) at their end, the held layers included.
        """
        draw = sample_target(target, settings, default_step_size=self.step_size, start=start, noise=noise)
        warn_if_stuck(draw.result)
        return draw.latents

    def sample(
        self,
        n: int,
        settings: ChainSettings,
        *,
        held: Mapping[int, Tensor] | None = None,
        start: Sequence[Tensor] | None = None,
        noise: NoiseSource | None = None,
    ) -> tuple[Tensor, ...]:
        """Draws of p(z_free | z_held) by Langevin.

        Args:
            n: number of draws.
            settings: the chains' settings.
            held: layer number (1 … L) -> its fixed z_i, (n, *latent_shapes[i - 1]); None: all layers are free.
            start: (z_1, …, z_L) that the chains start from, (batch, *latent_shape) each; None: ancestral draws.
            noise: the chains' random numbers; None: torch's global stream.

        Returns:
            (z_1, …, z_L), z_i of shape (n, *latent_shapes[i - 1]).
        """
        return self.run(self.target(n, held), settings, start=start, noise=noise)

    def sample_posterior(
        self,
        x: Tensor,
        settings: ChainSettings,
        *,
        start: Sequence[Tensor] | None = None,
        noise: NoiseSource | None = None,
    ) -> tuple[Tensor, ...]:
        """Draws of p(z | x) by Langevin.

        Args:
            x: observations, (batch, *x_shape).
            settings: the chains' settings.
            start: (z_1, …, z_L) that the chains start from, (batch, *latent_shape) each; None: a draw of q_ω, or ancestral
                where there is no `infer`.
            noise: the chains' random numbers; None: torch's global stream.

        Returns:
            (z_1, …, z_L), z_i of shape (batch, *latent_shapes[i - 1]).
        """
        if start is None and find_infer(self.generator) is not None:
            start = checked_infer(self.generator, x).latents
        return self.run(self.target(len(x), x=x), settings, start=start, noise=noise)

    def trajectory(
        self,
        n: int,
        every: int,
        settings: ChainSettings,
        *,
        held: Mapping[int, Tensor] | None = None,
        start: Sequence[Tensor] | None = None,
        noise: NoiseSource | None = None,
    ) -> Trajectory:
        """Chains on p(z_free | z_held) with a frame at the start and after every so many steps.

        Args:
            n: number of chains.
            every: steps between frames, ≥ 1.
            settings: the chains' settings.
            held: layer number (1 … L) -> its fixed z_i, (n, *latent_shapes[i - 1]); None: all layers are free.
            start: (z_1, …, z_L) that the chains start from, (batch, *latent_shape) each; None: ancestral draws.
            noise: the chains' random numbers; None: torch's global stream.
        """
        target = self.target(n, held)
        draw = sample_target(target, settings, default_step_size=self.step_size, start=start, noise=noise, every=every)
        return not_none(not_none(draw.result).trajectory)

    def posterior_draw(self, x: Tensor, settings: ChainSettings) -> PosteriorDraw:
        """z ~ q_ω(z | x) where the generator has `infer`, else a Langevin draw of the posterior.

        Args:
            x: observations, (batch, *x_shape).
            settings: the chains' settings, for generators without `infer`.
        """
        if find_infer(self.generator) is not None:
            inferred = checked_infer(self.generator, x)
            descent = None if inferred.conditionals is None else inferred_descent(self.generator, inferred)
            return PosteriorDraw(inferred.latents, inferred.log_q, descent)
        return PosteriorDraw(self.sample_posterior(x, settings), None)

    def ancestral(self, n: int) -> tuple[Tensor, ...]:
        """Draws of the generator's own prior.

        Args:
            n: number of draws.

        Returns:
            (z_1, …, z_L), z_i of shape (n, *latent_shapes[i - 1]).
        """
        return ancestral(self.generator, n).latents

    def decode(self, latents: Sequence[Tensor], decode: Decode | None = None, max_memory: float = 2.0**30) -> Tensor:
        """Observations of (z_1, …, z_L), (batch, *x_shape), by one top-down pass.

        Args:
            latents: (z_1, …, z_L), z_i of shape (batch, *latent_shapes[i - 1]).
            decode: the "mean" of p_β0(x | z) or a "sample" of it; None: the mean where there is one.
            max_memory: bytes that the decoder may need, > 0; batches of more than 16 that need more are decoded in parts.

        Raises:
            DivergenceError: if an observation is not finite.
        """
        return self._decode(latents, "latent", decode, max_memory)

    def decode_ancestral(self, n: int, decode: Decode | None = None, max_memory: float = 2.0**30) -> Tensor:
        """Observations of the generator's own prior, (n, *x_shape), with one pass for latents and observations.

        Args:
            n: number of observations.
            decode: as in `decode`.
            max_memory: as in `decode`.
        """
        return self._decode(ancestral_noise(TopDown(self.generator, n)), "noise", decode, max_memory)

    def memory_of(self, run: Callable[[int], object], *what: Hashable, like: Tensor) -> float:
        """Bytes per row that a pass of this model without gradients needs.

        Args:
            run: number of rows -> the pass on a batch of so many.
            *what: tells the pass from others; one that is known is not run again.
            like: latents of any shape, (batch, …), which tell the dtype and the device.
        """
        key = what, id(self.generator), tuple(map(id, self.energies)), like.dtype, like.device
        return forward_memory(run, self.energies[0], key, like.device)

    def in_parts(
        self,
        run: Callable[[Sequence[Tensor]], tuple[Tensor, ...]],
        layers: Sequence[Tensor],
        *what: Hashable,
        max_memory: float,
    ) -> tuple[Tensor, ...]:
        """What a pass gives row by row, in parts of the batch that need at most so many bytes.

        Args:
            run: latents or noise of each layer, (n, *latent_shape) -> tensors of n rows, (n, …), of any unit.
            layers: latents, or noise of N(0, 1), (batch, *latent_shape) each; up to 16 rows are never split.
            *what: tells the pass from others, as in `memory_of`.
            max_memory: bytes that it may need, > 0.

        Returns:
            What `run` gives, for the whole batch, (batch, …) each, of any unit.
        """
        n = len(layers[0])
        if n <= NEVER_SPLIT:
            return run(layers)
        needed = self.memory_of(lambda rows: run([t[:rows] for t in layers]), *what, like=layers[0])
        parts = [run([t[rows] for t in layers]) for rows in equal_parts(n, needed, max_memory)]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def _decode(self, position: Sequence[Tensor], space: Space, decode: Decode | None, max_memory: float) -> Tensor:
        def decoded(rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
            descent = TopDown(self.generator, len(rows[0])).descend(tuple(rows), space, to_observation=True)
            return (decode_state(self.generator, descent.state, decode),)

        (x,) = self.in_parts(decoded, position, "decode", decode, max_memory=max_memory)
        if not bool(torch.isfinite(x).all()):
            raise DivergenceError(
                f"decode: {int((~torch.isfinite(x)).sum())} values of the decoded observations are NaN or infinite, though the "
                "latents are finite. Look at the generator's likelihood: are its weights finite?"
            )
        return x
