"""Whole chains in one kernel launch, for `LadderVAE` with fully connected nets and `MLPEnergy`; needs Triton.

A chain of short steps through small nets is bound by the launches of its hundred kernels per step, not by their work. Here one
kernel runs all steps: each program takes 16 chains through a list of instructions (matrix products and the elementwise rules
between them), step after step, and draws its own noise (Philox, by seed, step, chain and unit). What a chain works in lies
in global memory, that of a small batch in the cache. Tests hold the kernel to the reference step.
"""

from __future__ import annotations

__all__ = ["BACKEND", "Triton"]

import copy
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from energy_prior._util import normal_like
from energy_prior.errors import ArgumentError
from energy_prior.generators import LadderVAE
from energy_prior.langevin.backends import Backend, plain_refusal, unevaluated
from energy_prior.langevin.backends._program import Program, dense, hidden_layers
from energy_prior.langevin.density import JointDensity
from energy_prior.langevin.noise import InjectedNoise, NoiseSource
from energy_prior.langevin.step import Draws, End, Info, State, StepConfig, end_at


class Triton(Backend):
    """All steps of a chain in `finalize`."""

    name = "triton"
    fallback = "compiled"

    def init(
        self, density: JointDensity, config: StepConfig, position: Sequence[Tensor], step_size: float | Tensor
    ) -> tuple[State, Info]:
        return unevaluated(density, config, position, step_size), Info()

    def step(self, density: JointDensity, config: StepConfig, state: State, draws: Draws) -> tuple[State, Info]:
        return state._replace(position=_launch(density, config, state, draws)), Info()

    def finalize(self, density: JointDensity, config: StepConfig, state: State, draws: Draws) -> tuple[End, Info]:
        position = _launch(density, config, state, draws) if draws.steps else state.position
        return end_at(density, position), Info()

    def span(self, density: JointDensity, config: StepConfig, noise: NoiseSource, left: int) -> int:
        return left

    def tail(self, steps: int) -> int:
        return steps

    def refusal(self, density: JointDensity, config: StepConfig, noise: NoiseSource | None) -> str | None:
        topdown = density.topdown
        generator, free = topdown.generator, topdown.free
        if (why := plain_refusal(config)) is not None:
            return why
        if noise is not None and not isinstance(noise, InjectedNoise):
            return "it takes no NoiseSource but InjectedNoise"
        if config.max_drift is not None:
            return "it has no max_drift"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if topdown.reference.device.type != "cuda" and not _interpreted():
            return f"it needs a CUDA device, and the generator is on {topdown.reference.device.type}"
        if density.space != "noise" or density.x is not None or topdown.held_below:
            return "it is for chains of the prior in noise space, with no held layer below a free one"
        if topdown.reference.dtype != torch.float32:
            return f"it works in float32, and the latents are {topdown.reference.dtype}"
        flat = all(len(shape) == 1 for shape in generator.latent_shapes)
        if type(generator) is not LadderVAE or not flat or any(dense(generator.prior[i - 1]) is None for i in free[:-1]):
            return 'the generator is not a LadderVAE with nets="mlp", as it was built'
        if any(hidden_layers(density.energies[i - 1]) < 1 for i in free):
            return "the energies are not all MLPEnergy with hidden layers and without spectral_norm, as they were built"
        return None

    def noise(self, shapes: Sequence[tuple[int, ...]], like: Tensor) -> NoiseSource:
        return _KernelNoise(shapes, like)


BACKEND = Triton()


class _KernelNoise:
    """Numbers that the kernel draws itself, by seed and row; here are the seed, and the ancestral start of the whole batch."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], like: Tensor) -> None:
        self.seed, self.first_row = int(torch.randint(2**62, (), device="cpu")), 0
        self._shapes, self._like = shapes, like

    def normal(self, step: int) -> tuple[Tensor, ...]:
        """ε of the start."""
        if step:
            raise ArgumentError("noise: what the kernel draws cannot be read.")
        return tuple(normal_like(shape, self._like) for shape in self._shapes)

    def uniform(self, step: int) -> Tensor:
        """There are none: nothing is accepted or rejected."""
        raise ArgumentError("noise: what the kernel draws cannot be read.")

    def rows(self, rows: slice) -> _KernelNoise:
        """The random numbers of some chains of the batch."""
        own = copy.copy(self)
        own.first_row = self.first_row + rows.indices(self._shapes[0][0])[0]
        return own


def _launch(density: JointDensity, config: StepConfig, state: State, draws: Draws) -> tuple[Tensor, ...]:
    """The free layers after these steps, ascending, in noise coordinates."""
    from energy_prior.langevin.backends import _kernels as kernels

    program, like, n = Program(density), density.topdown.reference, density.topdown.batch_size
    memory = like.new_zeros(-(-n // kernels.ROWS) * kernels.ROWS, program.width)
    for (at, size), values in program.inputs(state.position):
        memory[:n, at : at + size] = values
    injected, seed, first_row = None, 0, 0
    if isinstance(draws.noise, _KernelNoise):
        seed, first_row = draws.noise.seed, draws.noise.first_row
    else:
        injected = torch.stack([torch.cat(list(draw.noise), 1) for draw in draws.each(config)])
    kernels.launch(
        memory,
        torch.tensor(program.instructions, dtype=torch.int64).to(like.device),
        torch.cat([w.detach().reshape(-1) for w in program.weights]),
        injected,
        seed,
        first_row,
        n,
        draws.steps,
        state.coefficients,
        products="tf32" if config.precision == "tf32" else "ieee",
    )
    return tuple(memory[:n, at : at + size] for at, size in program.positions)


def _interpreted() -> bool:
    from energy_prior.langevin.backends._kernels import INTERPRETED

    return INTERPRETED
