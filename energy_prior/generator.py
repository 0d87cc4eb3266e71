"""The generator's side of the contract: p_β(z) = p(z_L) ∏_{i<L} p_βi(z_i | z_{>i}) and p_β0(x | z), one layer at a time."""

from __future__ import annotations

__all__ = ["Factorization", "HierarchicalGenerator", "Inferred"]

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal

Factorization = Literal["top_down", "bottom_up"]
"""How a model writes log q_ω(z | x): q(z_i | z_{>i}, x), "top_down", or q(z_i | z_{<i}, x), "bottom_up"."""


@dataclass(frozen=True)
class Inferred:
    """A draw z ~ q_ω(z | x) of the inference model.

    Attributes:
        latents: (z_1, …, z_L), `latents[0]` = z_1 nearest the data; z_i of shape (batch, *latent_shapes[i - 1]).
            Reparameterised: gradients reach the inference model when gradients are on.
        log_q: log q_ω of each layer in the model's own factorisation, (batch, L), nats.
        factorization: "top_down" if `log_q[:, i - 1]` is log q(z_i | z_{>i}, x), "bottom_up" if it is log q(z_i | z_{<i}, x).
            Only the first gives log q(z_{>k} | x) as a sum over layers.
        conditionals: for an inference model that goes down through the generator: p_β(z_i | z_{>i}) of z_1, …, z_L as it met
            them, so that training need not go down again. None: it does.
        state: with `conditionals`, the state below z_1.
    """

    latents: tuple[Tensor, ...]
    log_q: Tensor
    factorization: Factorization
    conditionals: tuple[Normal, ...] | None = None
    state: Any = None


@runtime_checkable
class HierarchicalGenerator(Protocol):
    """What a hierarchical VAE must offer: its top-down pass, one layer at a time.

    The library derives everything else (ancestral sampling, the map from noise to latents, log p_β(z), Langevin with
    any layers held fixed, decoding) from these calls:

        state = start(batch)
        for i = L, …, 1:  p_β(z_i | z_{>i}) = conditional(state);  state = descend(state, z_i)
        p_β0(x | z) = likelihood(state)

    A `state` is whatever the model likes; the library only hands it back. `descend` must return a *new* state and leave
    the one it was given untouched; `conditional` and `likelihood` only read and are deterministic. Layers are numbered
    as in Cui, Wu and Han (CVPR 2023): z_1 is nearest the data, z_L is the top. `energy_prior.check_generator` tests an
    implementation and names what is wrong in words.

    Optional, beside these:

    - `infer(x, *, rng=None) -> Inferred` draws z ~ q_ω(z | x). Without it, the library samples the posterior by Langevin.
    - `x_range`, the lowest and highest value of an observation: data outside it give a `DataWarning`.
    - `posterior_log_prob(x, latents) -> Tensor`, log q_ω of given latents per layer, (batch, L): `check_generator` holds the
      log q of `infer` to it, which tests the log-determinants of a flow.
    """

    @property
    def latent_shapes(self) -> tuple[torch.Size, ...]:
        """Shapes of z_1, …, z_L without the batch dimension."""
        ...

    def start(self, batch_size: int) -> Any:
        """The state above z_L, for `batch_size` observations."""
        ...

    def conditional(self, state: Any) -> Normal:
        """p_β(z_i | z_{>i}) at this state: loc and scale of shape (batch, *latent_shapes[i - 1]), scale > 0."""
        ...

    def descend(self, state: Any, z: Tensor) -> Any:
        """Take z_i in and go one layer down; returns a new state."""
        ...

    def likelihood(self, state: Any) -> Distribution:
        """p_β0(x | z) at the state below z_1: batch_shape (batch,), log_prob in nats per observation."""
        ...
