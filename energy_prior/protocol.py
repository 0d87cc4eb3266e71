"""The generator's side of the contract: p_β(z) = p(z_L) ∏_{i<L} p_βi(z_i | z_{>i}) and p_β0(x | z), one layer at a time."""

from __future__ import annotations

__all__ = [
    "CALLS",
    "HierarchicalGenerator",
    "Inferred",
    "find_infer",
    "have_waymarks",
    "layer_energy",
    "reads_noise",
    "unwrapped",
]

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributions import Distribution

from energy_prior._util import not_none
from energy_prior.errors import GeneratorError

CALLS = ("start", "conditional", "descend", "likelihood")
"""The calls that every generator has."""


@dataclass(frozen=True)
class Inferred:
    """A draw z ~ q_ω(z | x) of the inference model.

    Attributes:
        latents: (z_1, …, z_L), `latents[0]` = z_1 nearest the data; z_i of shape (batch, *latent_shapes[i - 1]).
            Reparameterised: gradients reach the inference model when gradients are on.
        log_q: log q_ω of each layer as the model factorises it, (batch, L), nats; column i − 1 is that of z_i.
        conditionals: for an inference model that goes down through the generator: p_β(z_i | z_{>i}) of z_1, …, z_L as it met
            them, so that training need not go down again. None: it does.
        state: with `conditionals`, the state below z_1.

    Raises:
        GeneratorError: if `conditionals` is the word that an earlier form of this class asked for there.

    Examples:
        >>> from torch.distributions import Normal
        >>> q = Normal(torch.zeros(3, 2), 1.0)  # of one layer with two units, for three observations
        >>> z_1 = q.rsample()
        >>> Inferred((z_1,), q.log_prob(z_1).sum(1, keepdim=True)).log_q.shape
        torch.Size([3, 1])
    """

    latents: tuple[Tensor, ...]
    log_q: Tensor
    conditionals: tuple[Distribution, ...] | None = None
    state: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.conditionals, str):
            raise GeneratorError(
                f"Inferred: expected p(z_i | z_(>i)) of every layer or None as third argument, got {self.conditionals!r}. The "
                "kind of factorisation is no longer asked for: write Inferred(latents, log_q)."
            )


@runtime_checkable
class HierarchicalGenerator(Protocol):
    """What a hierarchical VAE must offer: its top-down pass, one layer at a time.

    The library derives everything else (ancestral sampling, the map from noise to latents, log p_β(z), Langevin with
    any layers held fixed, decoding) from these calls:

        state = start(batch)
        for i = L, …, 1:  p_β(z_i | z_{>i}) = conditional(state, i);  state = descend(state, z_i, i)
        p_β0(x | z) = likelihood(state)

    A `state` is whatever the model itself has between two layers: features, or the last z; the library only hands it back.
    `descend` must return a *new* state and leave the one it was given untouched; `conditional` and `likelihood` only read
    and are deterministic. Layers are numbered as in Cui, Wu and Han (CVPR 2023): z_1 is nearest the data, z_L is the top.
    `energy_prior.check_generator` tests an implementation and names what is wrong in words.

    Optional, beside these:

    - `infer(x, *, rng=None) -> Inferred` draws z ~ q_ω(z | x). Without it, the library samples the posterior by Langevin.
    - `x_range`, the lowest and highest value of an observation: data outside it give a `DataWarning`.
    - `posterior_log_prob(x, latents) -> Tensor`, log q_ω of given latents per layer, (batch, L): `check_generator` holds the
      log q of `infer` to it, which tests the log-determinants of a flow.
    - `autocast = True` says that the model's own calls give parameters of distributions in the dtype of its weights under
      `torch.autocast` too: mixed precision in training then reaches it. Without it, it is trained in full precision.

    Examples:
        One layer of two units, x = z_1 + noise; `docs/adapters.md` has one of several layers:

        >>> from torch.distributions import Independent, Normal
        >>> from energy_prior import JointEBMPrior
        >>> class Plain:
        ...     latent_shapes = (torch.Size([2]),)
        ...     def start(self, batch_size):
        ...         return torch.zeros(batch_size, 2)
        ...     def conditional(self, state, layer):
        ...         return Normal(state, torch.ones_like(state))
        ...     def descend(self, state, z, layer):
        ...         return z
        ...     def likelihood(self, state):
        ...         return Independent(Normal(state, 0.1), 1)
        >>> JointEBMPrior(Plain()).sample(4).shape
        torch.Size([4, 2])
    """

    @property
    def latent_shapes(self) -> tuple[torch.Size, ...]:
        """Shapes of z_1, …, z_L without the batch dimension."""
        ...

    def start(self, batch_size: int) -> Any:
        """The state above z_L.

        Args:
            batch_size: number of observations.
        """
        ...

    def conditional(self, state: Any, layer: int) -> Distribution:
        """p_β(z_i | z_{>i}) of one layer.

        Args:
            state: the state above the layer.
            layer: i, 1 … L.

        Returns:
            A distribution of shape (batch, *latent_shapes[layer - 1]), its batch and event dimensions together, that has a
            smooth map z = T(ε) from ε ~ N(0, I) of that shape, and its inverse: a `torch.distributions.Normal` as a rule;
            `MultivariateNormal`, `Laplace`, `Uniform`, `energy_prior.Logistic`; an `Independent` or a `TransformedDistribution`
            of one of these; or one with the methods of `energy_prior.NoiseMap`. Of what is not Normal, ε = 0 stands for
            the mean where a score skips a layer: for Laplace, logistic and uniform it is their mean too.
        """
        ...

    def descend(self, state: Any, z: Tensor, layer: int) -> Any:
        """Takes z_i in and goes one layer down; returns a new state.

        Args:
            state: the state above the layer, which stays as it is.
            z: z_i, (batch, *latent_shapes[layer - 1]).
            layer: i, 1 … L.
        """
        ...

    def likelihood(self, state: Any) -> Distribution:
        """p_β0(x | z): batch_shape (batch,), log_prob in nats per observation.

        Args:
            state: the state below z_1.
        """
        ...


def find_infer(generator: Any) -> Callable[..., Any] | None:
    """The generator's `infer`, or None if it has none."""
    infer = getattr(generator, "infer", None)
    return infer if callable(infer) else None


def reads_noise(energy: Any) -> bool:
    """Whether an energy is a function of the noise of its layer and of those above, instead of z_i: it says `reads_noise`."""
    return bool(getattr(energy, "reads_noise", False))


def layer_energy(energy: Any, layer: int, latents: Sequence[Tensor], noise: Sequence[Tensor] | None) -> Tensor:
    """f_i of layer i = `layer`, (batch,), nats: f_i(z_i), or f_i(ε_i, …, ε_L) of an energy that reads noise.

    Args:
        energy: f_i.
        layer: i, 1 … L.
        latents: (z_1, …, z_L).
        noise: (ε_1, …, ε_L); None where no energy reads it.
    """
    if reads_noise(energy):
        return energy(tuple(not_none(noise)[layer - 1 :]))
    return energy(latents[layer - 1])


def have_waymarks(energies: Iterable[Any]) -> bool:
    """Whether all energies are functions of the waymark too, f_i((ε_i, …, ε_L), t): they say `has_waymarks`."""
    return all(getattr(energy, "has_waymarks", False) for energy in energies)


def unwrapped(generator: Any) -> Any:
    """The object whose own methods the generator's calls are: the model inside `torch.compile(model)`, for instance.

    Where a wrapper passes attributes on, its calls are bound to the model inside; a wrapper with a call of its own is kept.

    Raises:
        GeneratorError: for `DataParallel` and other wrappers that hide the calls of the model in their `module`.
    """
    inside = getattr(generator, "module", None)
    if not hasattr(generator, "conditional") and hasattr(inside, "conditional"):
        raise GeneratorError(
            f"generator: {type(generator).__name__} hides the calls of the model inside it. Pass its `.module`, "
            "the model itself."
        )
    infer = find_infer(generator)
    calls = [getattr(generator, name, None) for name in CALLS] + ([] if infer is None else [infer])
    owner = getattr(calls[0], "__self__", None)
    whole = owner is not None and not isinstance(owner, type) and (find_infer(owner) is None) == (infer is None)
    return owner if whole and all(getattr(call, "__self__", None) is owner for call in calls) else generator
