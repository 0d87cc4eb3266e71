"""Runs code on given standard-normal numbers: every draw is handed out, and followed through z = μ + σ ε.

Seeds cannot make two programs draw the same numbers for a layer, as they draw in different orders. So draws are taken by their
shapes. This is done below autograd, where TorchScript's and distributions' draws pass too. Uniform draws are Φ(ε) of such
numbers, from which distributions make their quantiles: for them, as for the library, z is T(ε).
"""

from __future__ import annotations

__all__ = ["AtMean", "Plan", "Replay", "Step", "plans"]

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN: Any = torch.ops.aten
_MOST_STEPS, _MOST_PLANS = 12, 16


class Step(NamedTuple):
    """What has become of a draw ε: value = loc + scale ε."""

    loc: Tensor
    scale: Tensor
    value: Tensor
    shifted: bool


class Plan(NamedTuple):
    """Which layers' noise a draw gets: draw number -> layers, and how several are laid out in one draw.

    `halves` has the draws that get a half of a layer's noise, in the channels: draw number -> 0 or 1.
    """

    layers: Mapping[int, tuple[int, ...]]
    layout: str = "one"
    halves: Mapping[int, int] = {}


class Replay(TorchDispatchMode):
    """Inside, draws come from `noise` by `plan`, the others from fixed numbers, the same for the same shapes.

    Args:
        noise: layer -> ε, (batch, *latent_shape).
        plan: which draw gets which layers' noise.
        given: draw number -> ε for draws whatever their layer; goes before `plan`.
        seed: of the draws that neither says.

    Attributes:
        drawn: shapes of the draws so far.
        steps: layer -> what has become of its noise: ε itself, then after every product and sum that it went through.
    """

    def __init__(
        self,
        noise: Mapping[int, Tensor] | None = None,
        plan: Plan | None = None,
        given: Mapping[int, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.drawn: list[torch.Size] = []
        self.steps: dict[int, list[Step]] = {}
        self._noise, self._plan, self._given, self._seed = noise or {}, plan or Plan({}), given or {}, seed
        self._others: dict[torch.Size, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Every operation of torch inside comes by here."""
        kwargs = dict(kwargs or {})
        kind = func.overloadpacket
        if kind in _DRAWS:
            return self._draw(func, args, kwargs)
        if self.steps and kind in _SUMS_AND_PRODUCTS:
            found = [entry for layer in self.steps if (entry := self._next(layer, kind, args, kwargs)) is not None]
            result = func(*args, **kwargs)
            for layer, loc, scale, shifted in found:
                self.steps[layer].append(Step(loc, scale, result.detach().to(loc.dtype, copy=True), shifted))
            return result
        return func(*args, **kwargs)

    def _draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        loc, scale = given.get("mean", 0.0), given.get("std", 1.0)
        uniform = func.overloadpacket in _UNIFORM_DRAWS
        if func.overloadpacket in _IN_PLACE:
            target = given["self"]
        elif given.get("out") is not None:
            target = given["out"]
        elif "self" in given:
            target = torch.empty_like(given["self"], **{k: v for k, v in kwargs.items() if k in (*_PLACE, "memory_format")})
        elif "size" in given:
            target = torch.empty(given["size"], **{k: v for k, v in kwargs.items() if k in _PLACE})
        else:
            like = torch.broadcast_tensors(*(t for t in (loc, scale) if isinstance(t, Tensor)))[0]
            target = torch.empty_like(like, memory_format=torch.contiguous_format)
        number, layers = len(self.drawn), ()
        self.drawn.append(target.shape)
        if number in self._given:
            noise = self._given[number].to(target).reshape(target.shape)
        elif number in self._plan.layers:
            layers = self._plan.layers[number]
            noise = _laid_out([self._noise[i] for i in layers], self._plan.layout)
            if number in self._plan.halves:
                noise, layers = noise.chunk(2, dim=1)[self._plan.halves[number]], ()
            noise = noise.to(target).reshape(target.shape)
        else:
            noise = self._other(target)
        if uniform:
            low, high = given.get("from", 0.0), given.get("to", 1.0)
            target.copy_(low + (high - low) * torch.special.ndtr(noise))
            return target  # what becomes of it is not affine in ε, so it is not followed
        target.copy_(loc + scale * noise)
        for layer in layers:
            self._begin(layer, target, loc, scale, alone=len(layers) == 1)
        return target

    def _begin(self, layer: int, target: Tensor, loc: Any, scale: Any, alone: bool) -> None:
        noise = self._noise[layer]
        zero, one = torch.zeros_like(noise), torch.ones_like(noise)
        self.steps[layer] = [Step(zero, one, noise, shifted=False)]
        if not alone:
            return
        loc, scale = (torch.as_tensor(v).to(noise).expand(target.shape).reshape(noise.shape) for v in (loc, scale))
        if bool((loc != 0).any() or (scale != 1).any()):
            shifted = bool((loc != 0).any())
            self.steps[layer].append(Step(loc.clone(), scale.clone(), loc + scale * noise, shifted))

    def _other(self, target: Tensor) -> Tensor:
        """Numbers that depend on the shape and on how many of it there were, so that both sides get the same for x."""
        count = self._others[target.shape] = self._others.get(target.shape, 0) + 1
        generator = torch.Generator().manual_seed(1000 * self._seed + count)
        return torch.randn(target.shape, generator=generator).to(target)

    def _next(self, layer: int, kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The step that an operation makes of one of a layer's steps, if that is what it works on."""
        steps = self.steps[layer]
        if len(steps) > _MOST_STEPS:
            return None
        pairs = [(i, s) for i, a in enumerate(args) for s in reversed(steps) if isinstance(a, Tensor) and _is(a, s.value)]
        if len({i for i, _ in pairs}) != 1:
            return None
        place, last = pairs[0]
        shape = args[place].shape

        def other(value: Any) -> Tensor | None:
            value = torch.as_tensor(value).detach().to(last.value)
            try:
                return value.expand(shape).reshape(last.value.shape)
            except RuntimeError:  # it is the larger one
                return None

        if kind in _THREE:
            factor = kwargs.get("value", 1)
            if place == 0:
                return None
            by, plus = other(args[3 - place]), other(args[0])
            if by is None or plus is None:
                return None
            return layer, plus + factor * by * last.loc, factor * by * last.scale, True
        by = other(args[1 - place]) if len(args) > 1 else None
        if by is None:
            return None
        if kind in _PRODUCTS:
            return layer, last.loc * by, last.scale * by, last.shifted
        if kind in _QUOTIENTS:
            return None if place else (layer, last.loc / by, last.scale / by, last.shifted)
        alpha = kwargs.get("alpha", 1) * (-1 if kind in _DIFFERENCES else 1)
        if place == 0:
            return layer, last.loc + alpha * by, last.scale.clone(), True
        return layer, by + alpha * last.loc, alpha * last.scale, True


class AtMean(Replay):
    """Inside, every normal and uniform draw is its mean."""

    def _other(self, target: Tensor) -> Tensor:
        return torch.zeros_like(target)


_PLACE = ("dtype", "layout", "device")
_UNIFORM_DRAWS = {_ATEN.rand, _ATEN.rand_like, _ATEN.uniform, _ATEN.uniform_}
_DRAWS = {_ATEN.randn, _ATEN.randn_like, _ATEN.normal, _ATEN.normal_, _ATEN.normal_functional} | _UNIFORM_DRAWS
_IN_PLACE = {_ATEN.normal_, _ATEN.uniform_}
_PRODUCTS, _QUOTIENTS = {_ATEN.mul, _ATEN.mul_}, {_ATEN.div, _ATEN.div_}
_DIFFERENCES, _THREE = {_ATEN.sub, _ATEN.sub_}, {_ATEN.addcmul, _ATEN.addcmul_}
_SUMS_AND_PRODUCTS = {_ATEN.add, _ATEN.add_} | _PRODUCTS | _QUOTIENTS | _DIFFERENCES | _THREE


def plans(drawn: Sequence[torch.Size], shapes: Mapping[int, torch.Size], orders: Sequence[Sequence[int]]) -> list[Plan]:
    """Ways to hand out the layers' noise to the draws of a run, the likelier ones first.

    Args:
        drawn: shapes of the run's draws.
        shapes: layer -> shape of its noise with the batch.
        orders: orders of the layers to try.
    """
    found: list[Plan] = []
    for order in orders:
        for variant in ("first", "last", *((kind, part) for part in range(3) for kind in ("each", "block"))):
            layers = _assigned(drawn, shapes, order, variant)
            if layers is not None and Plan(layers) not in found:
                found.append(Plan(layers))
    if not found:  # a layer's in two draws, or the first half alone: Normal layers (n, v) of a `ConvolvedNormal`
        halves = {i: torch.Size([n[0], n[1] // 2, *n[2:]]) for i, n in shapes.items() if len(n) > 1 and n[1] % 2 == 0}
        for order in orders if len(halves) == len(shapes) else ():
            parts = [_assigned(drawn, halves, order, ("each", part)) or {} for part in range(2)]
            if parts[0] and Plan(parts[1] | parts[0]) not in found:
                found.append(Plan(parts[1] | parts[0], halves={n: part for part in (1, 0) for n in parts[part]}))
    if not found:  # all at once
        total = sum(shape.numel() for shape in shapes.values())
        whole = [number for number, shape in enumerate(drawn) if shape.numel() == total]
        layouts = ["joined", "stacked", "rows"] if len({shapes[i] for i in shapes}) == 1 else ["joined"]
        found = [Plan({n: tuple(order)}, layout) for n in whole[:1] for layout in layouts for order in orders]
    return found[:_MOST_PLANS]


def _assigned(
    drawn: Sequence[torch.Size], shapes: Mapping[int, torch.Size], order: Sequence[int], variant: Any
) -> dict[int, tuple[int, ...]] | None:
    """Draw number -> layer, where layers of one shape take the draws that fit them in `order`; None: there are too few."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for layer in order:
        fitting = [n for n, shape in enumerate(drawn) if shape == shapes[layer]] or [
            n for n, s in enumerate(drawn) if len(s) > 1 and s[0] == shapes[layer][0] and s.numel() == shapes[layer].numel()
        ]
        groups.setdefault(tuple(fitting), []).append(layer)
    found: dict[int, tuple[int, ...]] = {}
    for fitting, layers in groups.items():
        count, times = len(layers), len(fitting) // len(layers)
        if times == 0:
            return None
        if isinstance(variant, str):
            chosen = fitting[:count] if variant == "first" else fitting[-count:]
        elif variant[1] >= times:
            chosen = fitting[:count]
        else:
            kind, part = variant
            chosen = fitting[part::times][:count] if kind == "each" else fitting[part * count : (part + 1) * count]
        found |= {number: (layer,) for number, layer in zip(chosen, layers, strict=True)}
    return found


def _laid_out(noise: list[Tensor], layout: str) -> Tensor:
    if layout == "stacked":
        return torch.stack(noise)
    if layout == "rows":
        return torch.stack(noise, dim=1)
    return noise[0] if len(noise) == 1 else torch.cat([n.flatten(1) for n in noise], dim=1)


def _is(value: Tensor, term: Tensor) -> bool:
    """Whether a tensor holds these numbers, in this order."""
    if value.numel() != term.numel() or not value.is_floating_point() or value.device != term.device:
        return False
    return bool(torch.equal(value.detach().reshape(-1).to(term.dtype), term.reshape(-1)))
