"""Whole chains in one kernel launch, for `LadderVAE` with fully connected nets and `MLPEnergy`; needs Triton.

A chain of short steps through small nets is bound by the launches of its hundred kernels per step, not by their work. Here one
kernel runs all steps: each program takes 16 chains through a list of instructions (matrix products and the elementwise rules
between them), step after step, and draws its own noise (Philox, by seed, step, chain and unit). What the instructions are
is worked out on the host from the modules, by hand-written derivatives of these nets; tests hold them to the reference step.
"""

from __future__ import annotations

__all__ = ["fused_position", "why_not_fused"]

import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from energy_prior.energies import MLPEnergy
from energy_prior.langevin.density import JointDensity, Precision
from energy_prior.langevin.noise import InjectedNoise
from energy_prior.langevin.step import StepCoefficients

_ACTIVATIONS: dict[type[nn.Module], int] = {nn.SiLU: 0, nn.Tanh: 1, nn.Softplus: 2, nn.GELU: 3}
_MATMUL, _SAMPLE, _SAMPLE_TOP, _UNIT, _HEAD, _ADD, _CONDITIONAL, _STEP = range(8)
_PLAIN, _ACCUMULATE, _ACTIVATE = 0, 1, 8


def why_not_fused(density: JointDensity) -> str | None:
    """In words, why chains on this density cannot run in one kernel; None if they can."""
    from energy_prior.generators import LadderVAE

    topdown = density.topdown
    generator = topdown.generator
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if topdown.reference.device.type != "cuda" and not _interpreted():
        return f"it needs a CUDA device, and the generator is on {topdown.reference.device.type}"
    if type(generator) is not LadderVAE or len(generator.latent_shapes[0]) != 1:
        return 'the generator is not a LadderVAE with nets="mlp"'
    if any(type(f) is not MLPEnergy or len(_dense(f.net) or ()) < 2 for f in density.energies):
        return "the energies are not all MLPEnergy with hidden layers and without spectral_norm"
    if topdown.reference.dtype != torch.float32:
        return f"it works in float32, and the latents are {topdown.reference.dtype}"
    if density.space != "noise" or density.x is not None or topdown.held_below:
        return "it is for chains of the prior in noise space, with no held layer below a free one"
    return None


@functools.cache
def _interpreted() -> bool:
    from energy_prior.langevin.kernels import INTERPRETED

    return INTERPRETED


def fused_position(
    density: JointDensity,
    start: Sequence[Tensor],
    *,
    steps: int,
    coefficients: StepCoefficients,
    noise: InjectedNoise | None,
    precision: Precision = "full",
) -> tuple[Tensor, ...]:
    """The free layers after `steps` unadjusted steps from `start`, ascending, in noise coordinates.

    Args:
        density: one that `why_not_fused` has nothing against.
        start: ε of the free layers, ascending.
        steps: ≥ 1.
        coefficients: of the step, scalars.
        noise: injected noise; None: the kernel's own, seeded from torch's global stream.
        precision: "full" or "tf32" matrix products.
    """
    from energy_prior.langevin import kernels

    chain = _Program(density)
    rows = density.topdown.batch_size
    blocks = -(-rows // kernels.ROWS)
    like = density.topdown.reference
    memory = like.new_zeros(blocks * kernels.ROWS, chain.width)
    for (at, size), values in chain.inputs(start):
        memory[:rows, at : at + size] = values
    program = torch.tensor(chain.instructions, dtype=torch.int64).to(like.device, non_blocking=True)
    units = sum(y[0].numel() for y in start)
    injected = None
    if noise is not None:
        injected = torch.stack([torch.cat(noise.normal(step), 1) for step in range(1, steps + 1)])
    seed = int(torch.randint(2**31 - steps, ()))
    weights = torch.cat([w.detach().reshape(-1) for w in chain.weights])
    exact = precision != "tf32"
    kernels.launch(memory, program, weights, injected, seed, units, rows, steps, coefficients, exact=exact)
    return tuple(memory[:rows, at : at + size].clone() for at, size in chain.positions)


_Dense = list[tuple[nn.Linear, int | None]]


def _dense(net: nn.Sequential) -> _Dense | None:
    """The linear layers of a net with the activation after each; None if it has anything else."""
    layers: _Dense = []
    for module in net:
        if type(module) is nn.Linear:
            layers.append((module, None))
        elif type(module) in _ACTIVATIONS and layers and layers[-1][1] is None:
            if isinstance(module, nn.GELU) and module.approximate != "none":
                return None
            layers[-1] = (layers[-1][0], _ACTIVATIONS[type(module)])
        elif not isinstance(module, nn.Flatten | nn.Unflatten):
            return None
    return layers


class _Program:
    """One gradient and one step as instructions of `energy_prior.langevin.kernels`.

    Attributes:
        instructions: one tuple of `kernels.COLUMNS` numbers each.
        weights: the parameters, in the order of their place.
        width: numbers that a chain works in.
        positions: (first column, size) of ε of the free layers, ascending.
    """

    def __init__(self, density: JointDensity) -> None:
        self.instructions: list[tuple[int, ...]] = []
        self.weights: list[Tensor] = []
        self.width = 0
        self._placed: dict[int, int] = {}
        topdown, generator = density.topdown, density.topdown.generator
        free = topdown.free
        self._top = topdown.top
        sizes = {i: generator.latent_shapes[i - 1][0] for i in free}
        eps, z, sigma, pull, slope = ({i: self._room(sizes[i]) for i in free} for _ in range(5))
        self._top_loc = self._room(sizes[free[-1]])
        self._top_scale = sigma[free[-1]]
        self.positions = [(eps[i], sizes[i]) for i in free]
        kept: dict[int, tuple[_Dense, list[int]]] = {}
        for i in reversed(free):  # down: z, layer by layer
            if i == free[-1]:
                self._add(_SAMPLE_TOP, self._top_loc, z[i], eps[i], sigma[i], outputs=sizes[i])
                continue
            net = _dense(generator.prior[i - 1]) or []  # type: ignore[attr-defined]
            raw, slopes = self._forward(net, z[i + 1])
            self._add(_SAMPLE, raw, z[i], eps[i], sigma[i], outputs=sizes[i], bias=slope[i])
            kept[i] = net, slopes
        for i in free:  # up: the pull on each z, that of its energy and that of the layers below
            energy = density.energies[i - 1]
            assert isinstance(energy, MLPEnergy)  # noqa: S101 (why_not_fused has seen to it)
            net = _dense(energy.net) or []
            unit = self._room(sizes[i])
            shift, scale = self._place(energy.shift), self._place(energy.scale)
            self._add(_UNIT, z[i], unit, outputs=sizes[i], weight=shift, bias=scale)
            _, slopes = self._forward(net[:-1], unit)
            head = net[-1][0]
            delta = self._room(head.in_features)
            self._add(_HEAD, 0, delta, slopes[-1], outputs=head.in_features, weight=self._place(head.weight))
            gradient = self._backward(net[:-1], slopes, delta)
            self._add(_ADD, gradient, pull[i], outputs=sizes[i], bias=scale, flags=_PLAIN if i == free[0] else _ACCUMULATE)
            if i == free[-1]:
                break
            above, slopes = kept[i]
            raw_pull = self._room(2 * sizes[i])
            self._add(_CONDITIONAL, pull[i], raw_pull, eps[i], sigma[i], outputs=sizes[i], bias=slope[i])
            self._backward(above, slopes, raw_pull, pull[i + 1])
        first = 0
        for i in free:
            self._add(_STEP, pull[i], eps[i], -1, sigma[i], outputs=sizes[i], weight=first)
            first += sizes[i]

    def inputs(self, start: Sequence[Tensor]) -> list[tuple[tuple[int, int], Tensor]]:
        """What a chain begins with, and the columns where it goes."""
        size = self.positions[-1][1]
        above = [((self._top_loc, size), self._top.loc), ((self._top_scale, size), self._top.scale)]
        return [*zip(self.positions, start, strict=True), *above]

    def _room(self, size: int) -> int:
        """The first of `size` new columns."""
        self.width += size
        return self.width - size

    def _place(self, parameter: Tensor) -> int:
        """Where a parameter is among the weights."""
        if id(parameter) not in self._placed:
            self._placed[id(parameter)] = sum(w.numel() for w in self.weights)
            self.weights.append(parameter)
        return self._placed[id(parameter)]

    def _add(
        self,
        kind: int,
        source: int,
        target: int,
        third: int = -1,
        fourth: int = -1,
        *,
        outputs: int,
        inputs: int = 0,
        weight: int = 0,
        strides: tuple[int, int] = (0, 0),
        bias: int = -1,
        flags: int = _PLAIN,
    ) -> None:
        self.instructions.append((kind, source, target, third, fourth, inputs, outputs, weight, *strides, bias, flags))

    def _forward(self, net: _Dense, source: int) -> tuple[int, list[int]]:
        """What the net makes of `source`, and where the derivatives of its activations are (−1: no activation)."""
        slopes = []
        for linear, activation in net:
            n, m = linear.in_features, linear.out_features
            target, slope = self._room(m), -1 if activation is None else self._room(m)
            self._add(
                _MATMUL,
                source,
                target,
                slope,
                inputs=n,
                outputs=m,
                weight=self._place(linear.weight),
                strides=(1, n),
                bias=-1 if linear.bias is None else self._place(linear.bias),
                flags=_PLAIN if activation is None else _ACTIVATE + activation,
            )
            source = target
            slopes.append(slope)
        return source, slopes

    def _backward(self, net: _Dense, slopes: Sequence[int], source: int, end: int | None = None) -> int:
        """Where the gradient with respect to the net's input is (`end`, if given), from that at its last layer's output."""
        for layer in reversed(range(len(net))):
            linear = net[layer][0]
            n, m = linear.in_features, linear.out_features
            target = self._room(n) if layer or end is None else end
            self._add(
                _MATMUL,
                source,
                target,
                slopes[layer - 1] if layer else -1,
                inputs=m,
                outputs=n,
                weight=self._place(linear.weight),
                strides=(n, 1),
            )
            source = target
        return source
