"""The target of a chain: log p̃ = Σ f_i + log p_β [+ log p_β0(x | z)] in latent or in noise space, and its gradient."""

from __future__ import annotations

__all__ = ["Evaluation", "JointDensity", "Precision", "Target", "matrix_products"]

import contextlib
import dataclasses
import functools
from collections.abc import Generator, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from energy_prior._util import plain, sum_event
from energy_prior.protocol import HierarchicalGenerator, layer_energy, reads_noise
from energy_prior.topdown import Descent, Space, TopDown

Precision = Literal["full", "tf32", "bf16"]
"""Of the matrix products in a chain's gradients: the dtype of the latents, TF32 (CUDA only), or bf16 by autocast."""


@dataclass(frozen=True, eq=False)
class Target:
    """What chains draw from: the joint prior of some layers, or the posterior. A description; nothing is computed here.

    Attributes:
        generator: the hierarchical generator.
        energies: f_1, …, f_L, one module per layer, f_i(z_i) -> (batch,), nats.
        space: coordinates of the chains.
        batch_size: number of chains.
        held: layer number (1 … L) -> its fixed z_i, (batch, *latent_shapes[i - 1]). The other layers are free.
        x: observations, (batch, *x_shape): the target is p(z | x). None: it is the prior.
        topdown: the pass down with `held`, where it has been run already.

    Examples:
        >>> from energy_prior import LadderVAE, default_energies
        >>> vae = LadderVAE((4,), latent_dims=(3, 2), hidden=8)
        >>> target = Target(vae, list(default_energies(vae.latent_shapes)), "noise", batch_size=5, held={2: torch.zeros(5, 2)})
        >>> target.free, target.shapes
        ((1,), ((5, 3),))
    """

    generator: HierarchicalGenerator
    energies: Sequence[nn.Module]
    space: Space
    batch_size: int
    held: Mapping[int, Tensor] = field(default_factory=dict)
    x: Tensor | None = None
    topdown: TopDown | None = None

    @property
    def free(self) -> tuple[int, ...]:
        """Numbers of the free layers, ascending."""
        return tuple(i for i in range(1, len(self.generator.latent_shapes) + 1) if i not in self.held)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes (batch, *latent_shape) of the free layers, ascending."""
        return tuple((self.batch_size, *self.generator.latent_shapes[i - 1]) for i in self.free)

    @property
    def informed(self) -> bool:
        """Whether something below depends on the free layers, an observation or a held layer: such targets can be stiff."""
        return self.x is not None or any(self.free and j < self.free[-1] for j in self.held)

    @property
    def device(self) -> torch.device:
        """Where the modules are: that of the first tensor that there is, the CPU if there is none."""
        modules = [m for m in (*self.energies, self.generator) if isinstance(m, nn.Module)]
        tensors = (t for m in modules for t in (*m.parameters(), *m.buffers()))
        return next((t.device for t in tensors), torch.device("cpu"))

    def rows(self, rows: slice) -> Target:
        """The target of some chains of the batch.

        Args:
            rows: which chains.
        """
        if rows == slice(0, self.batch_size):
            return self
        return dataclasses.replace(
            self,
            batch_size=len(range(*rows.indices(self.batch_size))),
            held={layer: z[rows] for layer, z in self.held.items()},
            x=None if self.x is None else self.x[rows],
            topdown=None,
        )

    def density(self) -> JointDensity:
        """Its density, ready to be evaluated. Runs the generator down to the highest free layer, unless that has been done."""
        topdown = self.topdown or TopDown(self.generator, self.batch_size, self.held)
        return JointDensity(topdown, self.energies, self.space, self.x)


class Evaluation(NamedTuple):
    """A density at one position of every chain.

    Attributes:
        position: the free layers, ascending, (batch, *shape) each: ε_i in noise space, z_i in latent space.
        negative_energy: f_i of the free layers at this position, (batch, layers), nats.
        log_density: log p̃ at this position, up to its constant, (batch,), nats; None where only the gradient was asked for.
        gradient: ∇ log p̃ in latent space; in noise space ∇ (log p̃ + ½‖ε‖²), the part beside the Gaussian. (batch, *shape) of
            each free layer, nats per unit of the position.

    Examples:
        >>> from energy_prior import load_example
        >>> at = load_example().model.target(3).density().evaluate([torch.zeros(3, 16), torch.zeros(3, 8)])
        >>> at.negative_energy.shape, at.log_density.shape, [tuple(g.shape) for g in at.gradient]
        (torch.Size([3, 2]), torch.Size([3]), [(3, 16), (3, 8)])
    """

    position: tuple[Tensor, ...]
    negative_energy: Tensor
    log_density: Tensor | None
    gradient: tuple[Tensor, ...]


@contextlib.contextmanager
def matrix_products(precision: Precision) -> Generator[None]:
    """Inside, CUDA computes matrix products and convolutions in TF32 if `precision` is "tf32"; restored on exit."""
    if precision != "tf32":
        yield
        return
    settings: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [s.allow_tf32 for s in settings]
    try:
        for s in settings:
            s.allow_tf32 = True
        yield
    finally:
        for s, allowed in zip(settings, before, strict=True):
            s.allow_tf32 = allowed


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

    Examples:
        >>> from energy_prior import LadderVAE, default_energies
        >>> from energy_prior.topdown import TopDown
        >>> vae = LadderVAE((4,), latent_dims=(3, 2), hidden=8)
        >>> density = JointDensity(TopDown(vae, 5), default_energies(vae.latent_shapes))
        >>> density.evaluate([torch.ones(5, 3), torch.ones(5, 2)]).log_density  # f = 0: −½‖ε‖²
        tensor([-2.5000, -2.5000, -2.5000, -2.5000, -2.5000])
    """

    def __init__(
        self, topdown: TopDown, energies: Sequence[nn.Module], space: Space = "noise", x: Tensor | None = None
    ) -> None:
        self.topdown = topdown
        self.energies = energies
        self.space: Space = space
        self.x: Tensor | None = None if x is None else plain(x)
        self._reads_noise = any(map(reads_noise, energies))

    @functools.cached_property
    def cache_key(self) -> Hashable:
        """Equal for densities whose evaluations differ in nothing but values and the number of rows."""
        topdown, like = self.topdown, self.topdown.reference
        modules = id(topdown.generator), *map(id, self.energies)
        return modules, topdown.free, tuple(topdown.held), self.space, self.x is not None, like.dtype, like.device

    def evaluate(self, position: Sequence[Tensor], *, with_density: bool = True, precision: Precision = "full") -> Evaluation:
        """Density and gradient at one position. The density is summed over the batch, so that chains stay independent.

        Args:
            position: the free layers, ascending, (batch, *shape) each: ε_i in noise space, z_i in latent space.
            with_density: also give the log density; the gradient alone is a little cheaper.
            precision: "bf16" runs the networks under autocast; "tf32" is a setting of torch's (`matrix_products`).
        """
        # torch.func is what the compiler traces, autograd has less overhead; is_compiling() is true in other threads, too
        if torch.compiler.is_dynamo_compiling():

            def summed(leaves: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
                log_tilt, energy = self._log_tilt(leaves, precision)
                return log_tilt.sum(), (log_tilt, energy)

            leaves = tuple(position)
            gradient, (log_tilt, energy) = torch.func.grad(summed, has_aux=True)(leaves)
        else:
            with torch.enable_grad():
                leaves = tuple(p.detach().requires_grad_() for p in position)
                log_tilt, energy = self._log_tilt(leaves, precision)
                if log_tilt.requires_grad:
                    gradient = torch.autograd.grad(log_tilt.sum(), leaves, allow_unused=True, materialize_grads=True)
                else:  # energies that are constant, and nothing else that pulls
                    gradient = tuple(torch.zeros_like(p) for p in leaves)
            leaves = tuple(p.detach() for p in leaves)
            log_tilt, energy = log_tilt.detach(), energy.detach()
        log_density = None
        if with_density:
            log_density = log_tilt
            if self.space == "noise":
                log_density = log_density - 0.5 * sum(sum_event(p**2) for p in leaves)
        return Evaluation(leaves, energy, log_density, gradient)

    def gradient_at(self, position: Sequence[Tensor], level: Tensor) -> tuple[Tensor | None, ...]:
        """∇_ε Σ f_i(·; t) over the free layers at waymark t, with the layers above held where they are.

        Args:
            position: noise ε_i of the free layers, ascending, (batch, *shape) each.
            level: t in [0, 1], (batch,).

        Returns:
            One tensor (batch, *shape) per free layer, nats per unit of ε_i; None where no energy depends on ε_i.
        """
        with torch.enable_grad():
            leaves = tuple(p.detach().requires_grad_() for p in position)
            noise = {**self.topdown.noise_above, **dict(zip(self.topdown.free, leaves, strict=True))}
            layers = range(1, self.topdown.layers + 1)
            tilts = [self.energies[i - 1](tuple(noise[j] for j in layers[i - 1 :]), level) for i in self.topdown.free]
            total = torch.stack(tilts).sum()
            if not total.requires_grad:
                return tuple(None for _ in leaves)
            return torch.autograd.grad(total, leaves, allow_unused=True)

    def energies_of(self, layers: Iterable[int], position: Sequence[Tensor], descent: Descent) -> Tensor:
        """f_i of these layers, (batch, layers), nats.

        Args:
            layers: their numbers.
            position: the free layers, ascending, (batch, *shape) each: ε_i in noise space, z_i in latent space.
            descent: the pass down at this position.
        """
        noise = self._noise(position, descent) if self._reads_noise else None
        return torch.stack([layer_energy(self.energies[i - 1], i, descent.latents, noise) for i in layers], dim=1)

    def drift_norm(self, position: Sequence[Tensor], gradient: Sequence[Tensor]) -> Tensor:
        """‖∇ log p̃‖ over all free layers, (batch,), nats per unit of the position.

        Args:
            position: the free layers, ascending, (batch, *shape) each: ε_i in noise space, z_i in latent space.
            gradient: as an `Evaluation` has it, (batch, *shape) each, nats per unit of the position.
        """
        total: Any = 0.0
        for p, g in zip(position, gradient, strict=True):
            total = total + sum_event((g - p if self.space == "noise" else g) ** 2)
        return total.sqrt()

    def _log_tilt(self, position: tuple[Tensor, ...], precision: Precision) -> tuple[Tensor, Tensor]:
        """log p̃ without the Gaussian of noise space, (batch,), and f_i of the free layers, (batch, free layers)."""
        dtype = position[0].dtype
        coarse = precision == "bf16"
        with torch.autocast(position[0].device.type, torch.bfloat16) if coarse else contextlib.nullcontext():
            free, below = self.topdown.free, self.topdown.held_below
            descent = self._descent(position)
            noise = self._noise(position, descent) if self._reads_noise else None
            latents = () if descent is None else descent.latents
            energy = torch.stack([layer_energy(self.energies[i - 1], i, latents, noise).to(dtype) for i in free], dim=1)
            log_tilt = energy.sum(1)
            for layer in below:  # they are functions of the free layers above them
                if reads_noise(self.energies[layer - 1]):
                    log_tilt = log_tilt + layer_energy(self.energies[layer - 1], layer, latents, noise).to(dtype)
        if descent is None:
            return log_tilt, energy
        counted = free if self.space == "latent" else ()
        for layer in (*counted, *self.topdown.held_below):
            log_tilt = log_tilt + descent.log_prior(layer)
        if self.x is not None:
            log_tilt = log_tilt + self.topdown.likelihood(descent).log_prob(self.x)
        return log_tilt, energy

    def _descent(self, position: tuple[Tensor, ...]) -> Descent | None:
        """The pass down; None where nothing needs one: in noise space, with energies that read the noise alone."""
        free = self.topdown.free
        apart = self.space == "noise" and self.x is None and not self.topdown.held_below
        if apart and all(reads_noise(self.energies[i - 1]) for i in free):
            return None
        return self.topdown.descend(position, self.space, to_observation=self.x is not None)

    def _noise(self, position: Sequence[Tensor], descent: Descent | None) -> tuple[Tensor, ...]:
        """(ε_1, …, ε_L) at this position."""
        noise = self.topdown.noise_above if descent is None else dict(enumerate(descent.noise(), start=1))
        if self.space == "noise":
            noise = {**noise, **dict(zip(self.topdown.free, position, strict=True))}
        return tuple(noise[i] for i in range(1, self.topdown.layers + 1))
