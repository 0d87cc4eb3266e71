"""A model's own call, run on known noise: in every order that its draws allow, and followed layer by layer."""

from __future__ import annotations

__all__ = ["Trail", "Verdict", "best_run", "follow_infer", "noise_of", "numbers_for", "on_fixed_numbers", "orders_of"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from energy_prior.checks.parting import Match, match_draw, match_value
from energy_prior.checks.reading import Reading
from energy_prior.errors import ArgumentError, GeneratorError
from energy_prior.process import RandomStream
from energy_prior.replay import Replay, Step, plans

_SEED = 77


class Verdict(NamedTuple):
    """What a run of the model's call showed: a fault, or what agrees; the better of two is the larger.

    Attributes:
        agrees: nothing differs.
        comparable: else the call gives something that cannot be held to anything.
        layers: how many agree.
        closeness: at the first layer that does not.
        said: in words.
    """

    agrees: bool
    comparable: bool
    layers: int
    closeness: float
    said: str


@dataclass
class Trail:
    """The layers of one run, as they are drawn.

    Attributes:
        layers: their number.
        parted: the first one that the two sides draw otherwise; 0: none was seen.
        agreed: how many were seen to agree.
        distance: of the two sides there.
        why: how it differs.
        unseen: layers whose draw could not be followed to the end.
        certain: that it does, even if the observation does not show it: the model's code was followed at other layers, or
            only one of μ and σ differs.
    """

    layers: int
    parted: int = 0
    agreed: int = 0
    distance: float = 0.0
    why: str = ""
    unseen: list[int] = field(default_factory=list)
    _small: bool = False
    _clear: bool = False
    _followed: bool = False

    def add(self, layer: int, found: Match) -> None:
        """The next layer."""
        if found.kind == "same":
            self.agreed += 1
            self._followed |= found.followed
        elif found.kind == "unknown":
            self.unseen.append(layer)
        elif found.kind == "other" and not self.parted:
            self.parted, self.why, self.distance = layer, found.why, found.distance
            self._small, self._clear = found.certain, found.followed

    @property
    def certain(self) -> bool:
        """Whether the two sides part, whatever the observation shows."""
        return self.parted > 0 and (self._small or (self._clear and self._followed))


def follow_infer(reading: Reading, steps: Mapping[int, list[Step]], layers: int) -> Trail:
    """What the model makes of the noise beside what `infer` makes of it, in the order in which it draws."""
    trail = Trail(layers)
    for layer in reading.order:
        if layer in reading.loc:
            found = match_draw(steps.get(layer, []), reading.loc[layer], reading.scale[layer].abs())
        else:
            found = match_value(steps.get(layer, []), reading.inferred.latents[layer - 1].detach())
            if found.kind == "other" and layer not in reading.followed:  # a map follows, which no step shows of either side
                before = reading.before.get(layer)
                found = Match("unknown") if before is None else match_draw(steps[layer], before.loc, before.scale.abs())
                found = Match("unknown") if found.kind == "same" else found
        swapped = _instead_of_infer(reading, layer, steps) if found.kind == "other" and not trail.parted else ""
        trail.add(layer, found._replace(why=f"{found.why}, in q(z_{layer} | …, x){swapped}"))
    return trail


def _instead_of_infer(reading: Reading, layer: int, steps: Mapping[int, list[Step]]) -> str:
    """Which other layer of `infer` the model's draw of `layer` is, if it is one."""
    for other, loc in reading.loc.items():
        if other == layer or loc.shape != reading.noise[layer].shape:
            continue
        if match_draw(steps[layer], loc, reading.scale[other].abs()).kind == "same":
            return f" (it is what infer has as z_{other}: are z_{layer} and z_{other} swapped in its latents?)"
    return ""


def best_run(
    name: str,
    call: Callable[[], Any],
    noise: Mapping[int, Tensor],
    x: Tensor,
    orders: Sequence[Sequence[int]],
    read: Callable[[Any], Any],
    judge: Callable[[Any, Mapping[int, list[Step]], Callable[[], Any]], Verdict],
) -> str:
    """Runs the model's call with the noise in every order that its draws allow; one in which all agrees is enough."""
    counting = Replay()
    try:
        first = on_fixed_numbers(call, counting, x.device)
    except Exception as error:
        given = f"x, {tuple(x.shape)}" if name != "sample" else f"n = {len(x)}"
        raise ArgumentError(f"{name}: called with {given}, it raised {type(error).__name__}: {error}") from error
    read(first)
    shapes = {i: n.shape for i, n in noise.items()}
    best: Verdict | None = None
    for plan in plans(counting.drawn, shapes, orders):
        replay = Replay(noise, plan)
        result = on_fixed_numbers(call, replay, x.device)
        with torch.no_grad():
            verdict = judge(
                result, replay.steps, lambda plan=plan: on_fixed_numbers(call, Replay(noise, plan, seed=1), x.device, 1)
            )
        best = verdict if best is None or verdict[:4] > best[:4] else best
        if best.agrees:
            return best.said
    if best is None:
        raise ArgumentError(
            f"{name}: it draws numbers of shapes {[tuple(s) for s in counting.drawn]}, which are not those of the "
            f"layers, {[tuple(s) for s in shapes.values()]}. It must draw z as the model does, a batch of {len(x)}, with torch."
        )
    said = best.said + _twice(counting.drawn, shapes)
    raise GeneratorError(said) if best.comparable else ArgumentError(said)


def _twice(drawn: Sequence[torch.Size], shapes: Mapping[int, torch.Size]) -> str:
    """Says so where a call draws what several passes do."""
    counts = [sum(d == shape for d in drawn) // sum(s == shape for s in shapes.values()) for shape in shapes.values()]
    times = min(counts)
    return f" The call draws {times} times what one pass does: are its parts of different passes?" if times > 1 else ""


def on_fixed_numbers(call: Callable[[], Any], replay: Replay, device: torch.device, seed: int = 0) -> Any:
    """What the call gives with these draws, and others that are always the same."""
    with torch.no_grad(), RandomStream(_SEED + seed, device).active(), replay:
        return call()


def noise_of(reading: Reading, layers: int) -> dict[int, Tensor]:
    """Layer -> the noise that `infer` makes its z_i of."""
    missing = [i for i in range(1, layers + 1) if i not in reading.noise]
    if missing:
        raise ArgumentError(
            f"reconstruct, kl, elbo: infer cannot be run on given numbers at layer {missing[0]}: {reading.unread[missing[0]]}. "
            "Leave them out, or draw each layer's noise by itself with torch.randn."
        )
    return reading.noise


def orders_of(reading: Reading, layers: int) -> tuple[Sequence[int], ...]:
    """In which a model may draw its layers: as `infer` does, down, up."""
    return reading.order, range(layers, 0, -1), range(1, layers + 1)


def numbers_for(seed: int, shape: Sequence[int], x: Tensor) -> Tensor:
    """Normal numbers that are the same in every call."""
    generator = torch.Generator().manual_seed(_SEED + seed)
    return torch.randn(tuple(shape), generator=generator).to(x)
