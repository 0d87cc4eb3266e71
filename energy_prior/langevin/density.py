"""Log densities for Langevin: log p̃ = Σ f_i + log p_β [+ log p_β0(x | z)], in latent or in noise space."""

from __future__ import annotations

__all__ = ["ChainState", "JointDensity"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from energy_prior._util import sum_event
from energy_prior.topdown import Space, TopDown


@dataclass(frozen=True)
class ChainState:
    """What the next Langevin step needs.

    Attributes:
        position: the free layers, ascending, in the coordinates of the density.
        negative_energy: f_i of the free layers at this position, (batch, free layers), nats.
        log_density: log p̃ at this position, up to its constant, (batch,), nats.
        gradient: ∇ log p̃ in latent space; in noise space ∇ (log p̃ + ½‖ε‖²), the part beside the Gaussian.
    """

    position: tuple[Tensor, ...]
    negative_energy: Tensor
    log_density: Tensor
    gradient: tuple[Tensor, ...]


class JointDensity:
    """The joint prior, or the posterior if `x` is given, over the free layers of a top-down pass.

    With F the free and C the held layers (`docs/method.md` derives both):

        latent space: log p̃(z_F) = Σ_{i∈F} f_i(z_i) + log p_β(z)  [+ log p_β0(x | z)]
        noise space:  log p̃(ε_F) = Σ_{i∈F} f_i(T_β(ε)_i) − ½‖ε_F‖² + Σ_{j∈C} log p_βj(c_j | z_{>j})  [+ log p_β0(x | z)]

    Held layers with no free layer above them add a constant, which is left out.

    Args:
        topdown: the pass, with its held layers.
        energies: one module per layer, f_i(z_i) -> (batch,).
        space: coordinates of the chain.
        x: observations, (batch, *x_shape), for the posterior.
    """

    def __init__(
        self, topdown: TopDown, energies: Sequence[nn.Module], space: Space = "noise", x: Tensor | None = None
    ) -> None:
        self.topdown = topdown
        self.energies = energies
        self.space: Space = space
        self.x = x.clone() if x is not None and x.is_inference() else x

    @property
    def informed(self) -> bool:
        """Whether something below pulls on the free layers (an observation, or a held layer): such targets can be stiff."""
        return self.x is not None or bool(self.topdown.held_below)

    def evaluate(self, position: Sequence[Tensor]) -> ChainState:
        """Density and gradient at one position. The density is summed over the batch, so that chains stay independent."""
        with torch.enable_grad():
            leaves = tuple(p.detach().requires_grad_() for p in position)
            descent = self.topdown.descend(leaves, self.space, to_observation=self.x is not None)
            free = self.topdown.free
            energy = torch.stack([self.energies[i - 1](descent.latents[i - 1]) for i in free], dim=1)
            log_tilt = energy.sum(1)
            counted = free if self.space == "latent" else ()
            for layer in (*counted, *self.topdown.held_below):
                log_tilt = log_tilt + descent.log_prior(layer)
            if self.x is not None:
                log_tilt = log_tilt + self.topdown.likelihood(descent).log_prob(self.x)
            if log_tilt.requires_grad:
                gradient = torch.autograd.grad(log_tilt.sum(), leaves, allow_unused=True, materialize_grads=True)
            else:  # energies that are constant, and nothing else that pulls
                gradient = tuple(torch.zeros_like(p) for p in leaves)
        log_density = log_tilt.detach()
        if self.space == "noise":
            log_density = log_density - 0.5 * sum(sum_event(p.detach() ** 2) for p in leaves)
        return ChainState(tuple(p.detach() for p in leaves), energy.detach(), log_density, gradient)

    def negative_energy(self, position: Sequence[Tensor]) -> Tensor:
        """f_i of the free layers at one position, without its gradient, (batch, free layers)."""
        latents = self.topdown.descend(position, self.space).latents
        return torch.stack([self.energies[i - 1](latents[i - 1]) for i in self.topdown.free], dim=1)

    def drift_norm(self, state: ChainState) -> Tensor:
        """‖∇ log p̃‖ over all free layers, (batch,)."""
        total: Any = 0.0
        for p, g in zip(state.position, state.gradient, strict=True):
            total = total + sum_event((g - p if self.space == "noise" else g) ** 2)
        return total.sqrt()
