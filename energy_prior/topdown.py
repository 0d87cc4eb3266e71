"""The top-down pass that follows from a generator's calls: z_i = T(ε_i; p_β(z_i | z_{>i})), with any layers held."""

from __future__ import annotations

__all__ = [
    "Decode",
    "Descent",
    "Space",
    "TopDown",
    "ancestral",
    "ancestral_noise",
    "decode_state",
    "infer_top_down",
    "inferred_descent",
    "mean_of",
]

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution

from energy_prior._util import normal_like, plain, sum_event
from energy_prior.conditionals import rebuilt, tensors_of, to_latent, to_noise
from energy_prior.errors import ArgumentError
from energy_prior.process import reproducible
from energy_prior.protocol import HierarchicalGenerator, Inferred

Space = Literal["noise", "latent"]
"""Coordinates of a chain: ε with z = T_β(ε), "noise", or z itself, "latent"."""

Decode = Literal["mean", "sample"]
"""What stands for x: the mean of p_β0(x | z), or a draw of it."""


# ----------------------------------------------------------------------------------------------------------------- the pass


@dataclass(frozen=True)
class Descent:
    """One finished top-down pass.

    Attributes:
        latents: (z_1, …, z_L).
        conditionals: p_β(z_i | z_{>i}) for i = 1, …, L.
        state: the generator's state below z_1, or None if it was not asked for.
    """

    latents: tuple[Tensor, ...]
    conditionals: tuple[Distribution, ...]
    state: Any = None

    def log_prior(self, layer: int) -> Tensor:
        """log p_β(z_i | z_{>i}) of one layer (1 is nearest the data), (batch,), nats."""
        return sum_event(self.conditionals[layer - 1].log_prob(self.latents[layer - 1]))

    def log_priors(self) -> Tensor:
        """log p_β(z_i | z_{>i}) of every layer, (batch, L), nats."""
        return torch.stack([self.log_prior(i + 1) for i in range(len(self.latents))], dim=1)

    def noise(self) -> tuple[Tensor, ...]:
        """ε_1, …, ε_L, the inverse of T_β, layer by layer."""
        return tuple(to_noise(c, z) for z, c in zip(self.latents, self.conditionals, strict=True))


class TopDown:
    """The top-down pass for one batch, with the layers in `held` at fixed values and the others free.

    Everything above the highest free layer, and the conditional of that layer, is computed here, once; `descend` then
    costs only the layers from there down. The image decoder below z_1 runs only if asked for.

    Args:
        generator: the hierarchical generator.
        batch_size: number of observations.
        held: layer number (1 … L) -> fixed z_i of shape (batch, *latent_shapes[i - 1]). Shapes are the caller's to check.

    Attributes:
        free: numbers of the free layers, ascending.
        reference: a tensor with the dtype and device of the latents.
    """

    def __init__(self, generator: HierarchicalGenerator, batch_size: int, held: Mapping[int, Tensor] | None = None) -> None:
        self.generator = generator
        self.batch_size = batch_size
        self.held: dict[int, Tensor] = {layer: plain(z) for layer, z in (held or {}).items()}
        self.layers: int = len(generator.latent_shapes)
        self.free: tuple[int, ...] = tuple(i for i in range(1, self.layers + 1) if i not in self.held)
        self._above: dict[int, Distribution] = {}
        self._state = generator.start(batch_size)
        for layer in range(self.layers, 0, -1):
            self._above[layer] = generator.conditional(self._state, layer)
            if layer in self.free:
                break
            self._state = generator.descend(self._state, self.held[layer], layer)
        self.reference: Tensor = tensors_of(self._above[self.layers])[0]

    def holding(self, z: Tensor) -> TopDown:
        """The same pass with the highest free layer held at z too: one layer further down, the rest is not run again."""
        *rest, layer = self.free
        z, copied = plain(z), copy.copy(self)
        copied.held, copied.free = {layer: z, **self.held}, tuple(rest)
        copied._state, copied._above = self.generator.descend(self._state, z, layer), dict(self._above)
        if rest:
            copied._above[rest[-1]] = self.generator.conditional(copied._state, rest[-1])
        return copied

    def mapped(self, function: Callable[[Tensor], Tensor]) -> TopDown:
        """The same pass with `function` of its tensors (of a state: where it is tensors, or tuples, lists, dicts)."""
        copied = copy.copy(self)
        for name in ("held", "_state", "_above"):
            setattr(copied, name, rebuilt(getattr(self, name), function))
        return copied

    def run_by(self, generator: HierarchicalGenerator, state_of: Callable[[Any], Any]) -> TopDown:
        """The same pass, from the highest free layer down by another generator; `state_of` makes its state of this one's."""
        copied = copy.copy(self)
        copied.generator, copied._state = generator, state_of(self._state)
        return copied

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the free layers with the batch dimension, in ascending order of layer."""
        return tuple((self.batch_size, *self.generator.latent_shapes[i - 1]) for i in self.free)

    @property
    def top(self) -> Distribution:
        """p_β(z_i | z_{>i}) of the highest free layer."""
        return self._above[self.free[-1]]

    @property
    def noise_above(self) -> dict[int, Tensor]:
        """ε_j of the held layers above the highest free one, by layer."""
        return {j: to_noise(self._above[j], z) for j, z in self.held.items() if not self.free or j > self.free[-1]}

    @property
    def held_below(self) -> tuple[int, ...]:
        """Held layers with a free layer above them: their log p_βj(c_j | z_{>j}) depends on the free ones."""
        return tuple(j for j in self.held if self.free and j < self.free[-1])

    def descend(self, position: Sequence[Tensor], space: Space, *, to_observation: bool = False) -> Descent:
        """Runs the pass down from the highest free layer.

        Args:
            position: the free layers in ascending order: ε_i if `space` is "noise", z_i if it is "latent".
            space: the coordinates of `position`.
            to_observation: also descend below z_1, so that `generator.likelihood` can be called on the result's state.
        """
        value = dict(zip(self.free, position, strict=True))
        conditionals = dict(self._above)
        latents = dict(self.held)
        state = self._state
        for layer in range(self.free[-1] if self.free else 0, 0, -1):
            if layer not in conditionals:
                conditionals[layer] = self.generator.conditional(state, layer)
            if layer in value:
                latents[layer] = to_latent(conditionals[layer], value[layer]) if space == "noise" else value[layer]
            if layer > 1 or to_observation:
                state = self.generator.descend(state, latents[layer], layer)
        order = range(1, self.layers + 1)
        return Descent(
            latents=tuple(latents[i] for i in order),
            conditionals=tuple(conditionals[i] for i in order),
            state=state if to_observation or not self.free else None,
        )

    def position(self, latents: Sequence[Tensor], space: Space) -> tuple[Tensor, ...]:
        """The free layers of `latents` in the coordinates of `space`, in ascending order."""
        if space == "latent":
            return tuple(latents[i - 1] for i in self.free)
        noise = self.descend(tuple(latents[i - 1] for i in self.free), "latent").noise()
        return tuple(noise[i - 1] for i in self.free)

    def likelihood(self, descent: Descent) -> Distribution:
        """p_β0(x | z) of a pass that went down to the observation."""
        return self.generator.likelihood(descent.state)


def ancestral(generator: HierarchicalGenerator, batch_size: int) -> Descent:
    """A draw of the generator's own prior, z = T_β(ε) with ε ~ N(0, I)."""
    topdown = TopDown(generator, batch_size)
    return topdown.descend(ancestral_noise(topdown), "noise")


def ancestral_noise(topdown: TopDown) -> list[Tensor]:
    """ε ~ N(0, I) of the free layers, ascending."""
    return [normal_like(shape, topdown.reference) for shape in topdown.shapes]


def infer_top_down(
    generator: HierarchicalGenerator,
    batch_size: int,
    posterior: Callable[[Any, Distribution, int], tuple[Tensor, Tensor]],
    rng: torch.Generator | None,
) -> Inferred:
    """z ~ ∏_i q(z_i | z_{>i}, x) by an inference network that goes down through the generator, with that pass.

    Args:
        generator: the generator.
        batch_size: number of observations.
        posterior: of (state above layer i, p_β(z_i | z_{>i}), i), i = L, …, 1 -> a reparameterised draw of q(z_i | z_{>i}, x),
            and its log q, (batch,), nats.
        rng: random number generator that the draws obey; None: torch's global stream.
    """
    latents: list[Tensor] = []
    log_q: list[Tensor] = []
    conditionals: list[Distribution] = []
    layers = len(generator.latent_shapes)
    state = generator.start(batch_size)
    with reproducible(rng, tensors_of(generator.conditional(state, layers))[0].device):
        for layer in range(layers, 0, -1):
            conditionals.insert(0, generator.conditional(state, layer))
            z, log_density = posterior(state, conditionals[0], layer)
            latents.insert(0, z)
            log_q.insert(0, log_density)
            state = generator.descend(state, z, layer)
    return Inferred(tuple(latents), torch.stack(log_q, dim=1), tuple(conditionals), state)


def inferred_descent(generator: HierarchicalGenerator, inferred: Inferred) -> Descent:
    """The pass through the latents of an inference model down to the observation: its own, where it hands that over."""
    if inferred.conditionals is not None:
        return Descent(inferred.latents, inferred.conditionals, inferred.state)
    topdown = TopDown(generator, len(inferred.latents[0]))
    return topdown.descend(inferred.latents, "latent", to_observation=True)


def decode_state(generator: HierarchicalGenerator, state: Any, decode: Decode | None = None) -> Tensor:
    """x of the state below z_1: the mean of p_β0(x | z), or a draw; None: the mean where there is one, (batch, *x_shape)."""
    likelihood = generator.likelihood(state)
    if decode == "sample":
        return likelihood.sample()
    mean = mean_of(likelihood)
    if mean is not None:
        return mean
    if decode == "mean":
        raise ArgumentError(f'decode: {type(likelihood).__name__} has no mean; use decode="sample".')
    return likelihood.sample()


def mean_of(likelihood: Distribution) -> Tensor | None:
    """Its mean, observations; None where it has none, or only NaN, as torch's `Categorical`."""
    try:
        mean = likelihood.mean
    except NotImplementedError:  # how torch.distributions says that there is no mean
        return None
    by_definition = bool(mean.isnan().all()) and all(bool(torch.isfinite(t).all()) for t in tensors_of(likelihood))
    return None if by_definition else mean
