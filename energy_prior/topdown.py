"""The top-down pass that follows from a generator's five calls: z_i = μ_i(z_{>i}) + σ_i(z_{>i}) ε_i, with any layers held."""

from __future__ import annotations

__all__ = [
    "Decode",
    "Descent",
    "Space",
    "TopDown",
    "ancestral",
    "ancestral_noise",
    "check_decode",
    "decode_latents",
    "infer_top_down",
    "inferred_descent",
]

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal
from torch.utils._pytree import tree_map

from energy_prior._util import normal_like, plain_normal, reproducible, sum_event
from energy_prior.cost import equal_parts, forward_memory
from energy_prior.errors import ArgumentError
from energy_prior.generator import HierarchicalGenerator, Inferred

Space = Literal["noise", "latent"]
"""Coordinates of a chain: ε with z = T_β(ε), "noise", or z itself, "latent"."""

_NEVER_SPLIT = 16

Decode = Literal["mean", "sample"]
"""What stands for x: the mean of p_β0(x | z), or a draw of it."""


@dataclass(frozen=True)
class Descent:
    """One finished top-down pass.

    Attributes:
        latents: (z_1, …, z_L).
        conditionals: p_β(z_i | z_{>i}) for i = 1, …, L.
        state: the generator's state below z_1, or None if it was not asked for.
    """

    latents: tuple[Tensor, ...]
    conditionals: tuple[Normal, ...]
    state: Any = None

    def log_prior(self, layer: int) -> Tensor:
        """log p_β(z_i | z_{>i}) of one layer (1 is nearest the data), (batch,), nats."""
        return sum_event(self.conditionals[layer - 1].log_prob(self.latents[layer - 1]))

    def log_priors(self) -> Tensor:
        """log p_β(z_i | z_{>i}) of every layer, (batch, L), nats."""
        return torch.stack([self.log_prior(i + 1) for i in range(len(self.latents))], dim=1)

    def noise(self) -> tuple[Tensor, ...]:
        """ε_i = (z_i − μ_i) / σ_i, the inverse of T_β, layer by layer."""
        return tuple((z - c.loc) / c.scale for z, c in zip(self.latents, self.conditionals, strict=True))


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
        self.held = {layer: z.clone() if z.is_inference() else z for layer, z in (held or {}).items()}
        self.layers = len(generator.latent_shapes)
        self.free = tuple(i for i in range(1, self.layers + 1) if i not in self.held)
        self._above: dict[int, Normal] = {}
        self._state = generator.start(batch_size)
        for layer in range(self.layers, 0, -1):
            self._above[layer] = generator.conditional(self._state)
            if layer in self.free:
                break
            self._state = generator.descend(self._state, self.held[layer])
        self.reference = next(iter(self._above.values())).loc

    def apart(self) -> TopDown:
        """The same pass with no two of its tensors in one memory (of a state: where it is tensors, or tuples, lists, dicts)."""
        known: set[int] = set()

        def own(value: Any) -> Any:
            if type(value) is Normal:
                return plain_normal(own(value.loc), own(value.scale))
            if not isinstance(value, Tensor):
                return value
            place = value.untyped_storage().data_ptr()
            value = value.clone() if place in known else value
            known.add(place)
            return value

        copied = copy.copy(self)
        for name in ("held", "_state", "_above"):
            setattr(copied, name, tree_map(own, getattr(self, name)))
        return copied

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the free layers with the batch dimension, in ascending order of layer."""
        return tuple((self.batch_size, *self.generator.latent_shapes[i - 1]) for i in self.free)

    @property
    def top(self) -> Normal:
        """p_β(z_i | z_{>i}) of the highest free layer."""
        return self._above[self.free[-1]]

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
                conditionals[layer] = self.generator.conditional(state)
            if layer in value:
                c = conditionals[layer]
                latents[layer] = c.loc + c.scale * value[layer] if space == "noise" else value[layer]
            if layer > 1 or to_observation:
                state = self.generator.descend(state, latents[layer])
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
    posterior: Callable[[int, Any], tuple[Tensor, Tensor]],
    rng: torch.Generator | None,
) -> Inferred:
    """z ~ ∏_i q(z_i | z_{>i}, x) by an inference network that goes down through the generator, with that pass.

    Args:
        generator: the generator.
        batch_size: number of observations.
        posterior: layer, counted from the top (0, …, L − 1), and the state above it -> a reparameterised draw of
            q(z_i | z_{>i}, x), and its log q, (batch,), nats.
        rng: random number generator that the draws obey; None: torch's global stream.
    """
    latents: list[Tensor] = []
    log_q: list[Tensor] = []
    conditionals: list[Normal] = []
    state = generator.start(batch_size)
    with reproducible(rng, generator.conditional(state).loc.device):
        for layer in range(len(generator.latent_shapes)):
            conditionals.insert(0, generator.conditional(state))
            z, log_density = posterior(layer, state)
            latents.insert(0, z)
            log_q.insert(0, log_density)
            state = generator.descend(state, z)
    return Inferred(tuple(latents), torch.stack(log_q, dim=1), "top_down", tuple(conditionals), state)


def inferred_descent(generator: HierarchicalGenerator, inferred: Inferred) -> Descent:
    """The pass through the latents of an inference model down to the observation: its own, where it hands that over."""
    if inferred.conditionals is not None:
        return Descent(inferred.latents, inferred.conditionals, inferred.state)
    topdown = TopDown(generator, len(inferred.latents[0]))
    return topdown.descend(inferred.latents, "latent", to_observation=True)


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

    def likelihood(rows: slice) -> Distribution:
        topdown = TopDown(generator, rows.stop - rows.start)
        return topdown.likelihood(topdown.descend(tuple(z[rows] for z in latents), space, to_observation=True))

    n = len(latents[0])
    parts = [slice(0, n)]
    if n > _NEVER_SPLIT:
        parts = equal_parts(n, forward_memory(lambda: likelihood(slice(0, 2)), 2, generator), max_memory)
    decoded = [_decoded(likelihood(rows), decode) for rows in parts]
    return decoded[0] if len(parts) == 1 else torch.cat(decoded)


def _decoded(likelihood: Distribution, decode: Decode | None) -> Tensor:
    if decode == "sample":
        return likelihood.sample()
    try:
        return likelihood.mean
    except NotImplementedError:  # how torch.distributions says that there is no mean
        if decode == "mean":
            raise ArgumentError(f'decode: {type(likelihood).__name__} has no mean; use decode="sample".') from None
        return likelihood.sample()
