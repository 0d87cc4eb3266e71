"""One Langevin step of a `LadderVAE` with `MLPEnergy` as a list of instructions, by hand-written derivatives of these nets.

They are worked out on the host from the modules, for the kernel in `energy_prior.langevin.backends._kernels`.
"""

from __future__ import annotations

__all__ = [
    "ACCUMULATE",
    "ACTIVATE",
    "ADD",
    "CONDITIONAL",
    "HEAD",
    "MATMUL",
    "PLAIN",
    "SAMPLE",
    "SAMPLE_TOP",
    "STEP",
    "UNIT",
    "Program",
    "dense",
    "hidden_layers",
]

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from energy_prior.energies import MLPEnergy
from energy_prior.langevin.density import JointDensity
from energy_prior.topdown import parameters

_ACTIVATIONS: dict[type[nn.Module], int] = {nn.SiLU: 0, nn.Tanh: 1, nn.Softplus: 2, nn.GELU: 3}

MATMUL, SAMPLE, SAMPLE_TOP, UNIT, HEAD, ADD, CONDITIONAL, STEP = range(8)
"""Kinds of instruction: what they make of columns of a chain's memory (s: source, t: target, c, d: third, fourth) and weights.

    MATMUL       t = s · W + bias; with an activation, c = its derivative; without, t is multiplied by c if there is one
    SAMPLE       t = z = loc + σ ε with (loc, log σ before its soft clamp) at s and ε at c; d = σ; bias column = d log σ
    SAMPLE_TOP   t = z = loc + σ ε with loc at s, ε at c and σ at d
    UNIT         t = (s − shift)/scale, with shift at weight and scale at bias
    HEAD         t = W · c · (1 + (g/S)²)^(−3/2), the gradient of f = g/√(1 + (g/S)²) with respect to the layer under the head:
                 g at s, S at bias
    ADD          t = s/scale, added to t if flagged so, with scale at bias
    CONDITIONAL  t = gradient with respect to (loc, log σ before its clamp) from that of z at s; the rest as in SAMPLE
    STEP         t = ε' from ε at t, the gradient with respect to z at s and σ at d; weight: its first noise number
"""

PLAIN, ACCUMULATE, ACTIVATE = 0, 1, 8
"""Flags: nothing, add to the target, or (from here on) the activation's number."""

Dense = list[tuple[nn.Linear, int | None]]
"""Linear layers, each with the number of the activation after it."""


def dense(net: nn.Module) -> Dense | None:
    """The layers of a net of linear layers with an activation between any two, and the activation's number; None for others."""
    if type(net) is not nn.Sequential or _hooked(net):
        return None
    layers: Dense = []
    modules = [m for m in net if type(m) not in (nn.Flatten, nn.Unflatten)]
    for at in range(0, len(modules), 2):
        linear, after = modules[at], modules[at + 1] if at + 1 < len(modules) else None
        if type(linear) is not nn.Linear or _hooked(linear) or linear.weight.dtype != torch.float32:
            return None
        if after is not None and (type(after) not in _ACTIVATIONS or _hooked(after)):
            return None
        if isinstance(after, nn.GELU) and after.approximate != "none":
            return None
        if isinstance(after, nn.Softplus) and (after.beta, after.threshold) != (1, 20):
            return None
        layers.append((linear, None if after is None else _ACTIVATIONS[type(after)]))
    return layers if layers and layers[-1][1] is None else None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def hidden_layers(energy: nn.Module) -> int:
    """Of an `MLPEnergy` as it was built; 0 for anything else."""
    net = dense(energy.net) if type(energy) is MLPEnergy else None
    return len(net) - 1 if net else 0


class Program:
    """One gradient and one step as instructions of `energy_prior.langevin.backends._kernels`.

    Attributes:
        instructions: one tuple of `_kernels.COLUMNS` numbers each.
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
        kept: dict[int, tuple[Dense, list[int]]] = {}
        for i in reversed(free):  # down: z, layer by layer
            if i == free[-1]:
                self._add(SAMPLE_TOP, self._top_loc, z[i], eps[i], sigma[i], outputs=sizes[i])
                continue
            net = dense(generator.prior[i - 1])  # type: ignore[attr-defined]
            assert net is not None  # noqa: S101 (`refusal` has seen to it)
            raw, slopes = self._forward(net, z[i + 1])
            self._add(SAMPLE, raw, z[i], eps[i], sigma[i], outputs=sizes[i], bias=slope[i])
            kept[i] = net, slopes
        for i in free:  # up: the pull on each z, that of its energy and that of the layers below
            energy = density.energies[i - 1]
            assert isinstance(energy, MLPEnergy)  # noqa: S101
            net = dense(energy.net)
            assert net is not None  # noqa: S101
            unit = self._room(sizes[i])
            shift, scale = self._place(energy.shift), self._place(energy.scale)
            self._add(UNIT, z[i], unit, outputs=sizes[i], weight=shift, bias=scale)
            value, slopes = self._forward(net, unit)
            head = net[-1][0]
            delta = self._room(head.in_features)
            weight, limit = self._place(head.weight), self._place(energy.saturation)
            self._add(HEAD, value, delta, slopes[-2], outputs=head.in_features, weight=weight, bias=limit)
            gradient = self._backward(net[:-1], slopes, delta)
            self._add(ADD, gradient, pull[i], outputs=sizes[i], bias=scale, flags=PLAIN if i == free[0] else ACCUMULATE)
            if i == free[-1]:
                break
            above, slopes = kept[i]
            raw_pull = self._room(2 * sizes[i])
            self._add(CONDITIONAL, pull[i], raw_pull, eps[i], sigma[i], outputs=sizes[i], bias=slope[i])
            self._backward(above, slopes, raw_pull, pull[i + 1])
        first = 0
        for i in free:
            self._add(STEP, pull[i], eps[i], -1, sigma[i], outputs=sizes[i], weight=first)
            first += sizes[i]

    def inputs(self, start: Sequence[Tensor]) -> list[tuple[tuple[int, int], Tensor]]:
        """What a chain begins with, and the columns where it goes."""
        size = self.positions[-1][1]
        top = [t.expand(len(start[0]), size) for t in parameters(self._top)]
        above = [((self._top_loc, size), top[0]), ((self._top_scale, size), top[1])]
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
        flags: int = PLAIN,
    ) -> None:
        self.instructions.append((kind, source, target, third, fourth, inputs, outputs, weight, *strides, bias, flags))

    def _forward(self, net: Dense, source: int) -> tuple[int, list[int]]:
        """What the net makes of `source`, and where the derivatives of its activations are (−1: no activation)."""
        slopes = []
        for linear, activation in net:
            n, m = linear.in_features, linear.out_features
            target, slope = self._room(m), -1 if activation is None else self._room(m)
            self._add(
                MATMUL,
                source,
                target,
                slope,
                inputs=n,
                outputs=m,
                weight=self._place(linear.weight),
                strides=(1, n),
                bias=-1 if linear.bias is None else self._place(linear.bias),
                flags=PLAIN if activation is None else ACTIVATE + activation,
            )
            source = target
            slopes.append(slope)
        return source, slopes

    def _backward(self, net: Dense, slopes: Sequence[int], source: int, end: int | None = None) -> int:
        """Where the gradient with respect to the net's input is (`end`, if given), from that at its last layer's output."""
        for layer in reversed(range(len(net))):
            linear = net[layer][0]
            n, m = linear.in_features, linear.out_features
            target = self._room(n) if layer or end is None else end
            self._add(
                MATMUL,
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
