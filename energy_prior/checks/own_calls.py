"""Holds a generator to its model's own calls: both run on the same numbers, and the first layer where they part is named."""

from __future__ import annotations

__all__ = ["compare_kl", "compare_reconstruct", "compare_sample"]

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal

from energy_prior._util import sum_event
from energy_prior.checks.inference import Reading, kl_terms
from energy_prior.checks.parting import (
    Match,
    deviation,
    deviation_of_observation,
    match_draw,
    match_observation,
    match_value,
    read_result,
)
from energy_prior.checks.tolerance import relative
from energy_prior.conditionals import gaussian_part, to_latent
from energy_prior.errors import ArgumentError, GeneratorError
from energy_prior.process import RandomStream
from energy_prior.protocol import HierarchicalGenerator, Inferred
from energy_prior.replay import Replay, Step, plans
from energy_prior.topdown import TopDown, inferred_descent

_SEED = 77


class _Verdict(NamedTuple):
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
class _Trail:
    """The layers of one run, as they are drawn.

    Attributes:
        layers: their number.
        parted: the first one that the two sides draw otherwise; 0: none was seen.
        agreed: how many were seen to agree.
        distance: of the two sides there.
        why: how it differs.
        certain: that it does, even if the observation does not show it: the model's code was followed at other layers, or
            only one of μ and σ differs.
    """

    layers: int
    parted: int = 0
    agreed: int = 0
    distance: float = 0.0
    why: str = ""
    _small: bool = False
    _clear: bool = False
    _followed: bool = False

    def add(self, layer: int, found: Match) -> None:
        """The next layer."""
        if found.kind == "same":
            self.agreed += 1
            self._followed |= found.followed
        elif found.kind == "other" and not self.parted:
            self.parted, self.why, self.distance = layer, found.why, found.distance
            self._small, self._clear = found.certain, found.followed

    @property
    def certain(self) -> bool:
        return self.parted > 0 and (self._small or (self._clear and self._followed))


# ------------------------------------------------------------------------------------------------------------------ sample


def compare_sample(generator: HierarchicalGenerator, x: Tensor, sample: Callable[[int], Any]) -> str:
    """The model's own samples of its prior against T_β of the same noise.

    Raises:
        GeneratorError: they part; it says at which layer.
    """
    n, layers = len(x), len(generator.latent_shapes)
    noise = {i + 1: _numbers(i, (n, *shape), x) for i, shape in enumerate(generator.latent_shapes)}

    def judge(result: Any, steps: Mapping[int, list[Step]], again: Callable[[], Any]) -> _Verdict:
        state, trail = generator.start(n), _Trail(layers)
        for layer in range(layers, 0, -1):
            conditional = generator.conditional(state, layer)
            gaussian = gaussian_part(conditional)
            found = Match("unknown")
            if gaussian is not None:
                found = match_draw(steps.get(layer, []), *gaussian, 10 * relative(x.dtype))  # the rounding of one layer
            if found.kind == "other" and not trail.parted:
                found = found._replace(why=found.why + _instead(generator, state, layer, steps[layer]))
            trail.add(layer, found)
            theirs = found.z if isinstance(conditional, Normal) else None
            state = generator.descend(state, to_latent(conditional, noise[layer]) if theirs is None else theirs, layer)
        return _judged("sample", generator.likelihood(state), result, x, again, trail)

    orders, read = (range(layers, 0, -1), range(1, layers + 1)), partial(read_result, "sample", x=x)
    return _best("sample", lambda: sample(n), noise, x, orders, read, judge)


def _instead(generator: HierarchicalGenerator, state: Any, layer: int, steps: Sequence[Step]) -> str:
    """Which other layer's conditional the model's draw of `layer` comes from, if any does."""
    shapes = generator.latent_shapes
    for other in range(1, len(shapes) + 1):
        if other != layer and shapes[other - 1] == shapes[layer - 1]:
            try:
                conditional = generator.conditional(state, other)
            except Exception:  # a state of this layer need not fit that one  # noqa: S112
                continue
            gaussian = gaussian_part(conditional)
            if gaussian is not None and match_draw(steps, *gaussian).kind == "same":
                return f" (it is what the generator has as layer {other} there: are z_{layer} and z_{other} swapped?)"
    return ""


# ------------------------------------------------------------------------------------------------------------- reconstruct


def compare_reconstruct(generator: Any, x: Tensor, reconstruct: Callable[[Tensor], Any], reading: Reading) -> str:
    """The model's own reconstruction against that of the generator from `infer` on the same noise.

    Raises:
        GeneratorError: they part; it says at which layer.
    """
    layers = len(generator.latent_shapes)

    def judge(result: Any, steps: Mapping[int, list[Step]], again: Callable[[], Any]) -> _Verdict:
        trail = _follow_infer(reading, steps, layers)
        state = inferred_descent(generator, reading.inferred).state
        verdict = _judged("reconstruct", generator.likelihood(state), result, x, again, trail)
        if verdict.agrees or trail.parted:
            return verdict
        return verdict._replace(said=f"{verdict.said}.{_swapped(generator, reading.inferred, result, x)}")

    read = partial(read_result, "reconstruct", x=x)
    return _best("reconstruct", lambda: reconstruct(x), _noise_of(reading, layers), x, _orders(reading, layers), read, judge)


def _follow_infer(reading: Reading, steps: Mapping[int, list[Step]], layers: int) -> _Trail:
    """What the model makes of the noise beside what `infer` makes of it, in the order in which it draws."""
    trail = _Trail(layers)
    for layer in reading.order:
        if layer in reading.loc:
            found = match_draw(steps.get(layer, []), reading.loc[layer], reading.scale[layer].abs())
        else:
            found = match_value(steps.get(layer, []), reading.inferred.latents[layer - 1].detach())
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


def _swapped(generator: HierarchicalGenerator, inferred: Inferred, result: Any, x: Tensor) -> str:
    """Two layers of `infer` that, exchanged, make the observation right."""
    shapes = generator.latent_shapes
    for i, j in combinations(range(len(shapes)), 2):
        if shapes[i] == shapes[j]:
            latents = list(inferred.latents)
            latents[i], latents[j] = latents[j], latents[i]
            descent = TopDown(generator, len(latents[0])).descend(latents, "latent", to_observation=True)
            if _differs("reconstruct", generator.likelihood(descent.state), result, x) is None:
                return f" With z_{i + 1} and z_{j + 1} of infer exchanged they agree: are they swapped in its latents?"
    return ""


# ---------------------------------------------------------------------------------------------------------------------- kl


def compare_kl(generator: Any, x: Tensor, kl: Callable[[Tensor], Any], reading: Reading) -> str:
    """The model's own KL, or log q − log p, of every layer against the generator's at the same draws.

    Raises:
        GeneratorError: they differ; it says at which layer first.
    """
    layers = len(generator.latent_shapes)
    drawn, analytic, slack = kl_terms(generator, reading)

    def judge(result: Any, steps: Mapping[int, list[Step]], again: Callable[[], Any]) -> _Verdict:
        theirs = _per_layer(result, x, layers)
        trail = _follow_infer(reading, steps, layers)
        part = f" The draws part first at layer {trail.parted}: {trail.why}." if trail.parted else ""
        if theirs.shape[1] != layers:
            within = [(theirs[:, 0] - ours.sum(1)).abs() <= slack.sum(1) for ours in (drawn, analytic)]
            if any(bool(w.all()) for w in within):
                pairs = zip((drawn, analytic), within, strict=True)
                off = min(deviation(ours.sum(1), theirs[:, 0]) for ours, w in pairs if w.all())
                return _Verdict(True, True, layers, 0.0, f"kl: the sum over layers agrees, to {off:.1e}")
            said = f"kl: the model says {float(theirs[0, 0]):.6g} nats in all for the first observation, the generator "
            said += f"{_values(drawn.sum(1), analytic.sum(1))}.{part}"
            return _Verdict(False, True, trail.agreed, -trail.distance, said)
        fits = [(theirs - ours).abs() <= slack for ours in (drawn, analytic)]
        right = [bool(fits[0][:, i].all() | fits[1][:, i].all()) for i in range(layers)]
        if all(right):
            nearest = torch.where((theirs - drawn).abs() < (theirs - analytic).nan_to_num(math.inf).abs(), drawn, analytic)
            return _Verdict(True, True, layers, 0.0, f"kl: every layer agrees, to {deviation(nearest, theirs):.1e}")
        i = max(i for i, fine in enumerate(right) if not fine)
        said = (
            f"kl: it parts at layer {', '.join(str(j + 1) for j in reversed(range(layers)) if not right[j])}. At layer {i + 1} "
            f"the model says {float(theirs[0, i]):.6g} nats for the first observation, the generator "
            f"{_values(drawn[:, i], analytic[:, i])}."
        )
        other = [
            j
            for j in range(layers)
            for ours in (drawn, analytic)
            if j != i and bool(((theirs[:, j] - ours[:, i]).abs() <= slack[:, i]).all())
        ]
        hint = f" The model has that at layer {other[0] + 1}: kl and the generator both go from z_1 to z_L." if other else ""
        return _Verdict(False, True, sum(right) + trail.agreed, -trail.distance, said + hint + part)

    read = partial(_per_layer, x=x, layers=layers)
    return _best("kl", lambda: kl(x), _noise_of(reading, layers), x, _orders(reading, layers), read, judge)


def _per_layer(result: Any, x: Tensor, layers: int) -> Tensor:
    """(batch, L), or (batch, 1) for a sum over layers."""
    if isinstance(result, list | tuple) and len(result) == layers:
        parts = [torch.as_tensor(part) for part in result]
        if all(part.ndim > 0 and len(part) == len(x) for part in parts):
            return torch.stack([sum_event(part.detach().to(x)) for part in parts], dim=1)
    elif hasattr(result, "__array__") and not isinstance(result, Tensor):
        result = torch.as_tensor(result)
    if isinstance(result, Tensor) and result.shape in ((len(x), layers), (len(x),)):
        return result.detach().to(x).reshape(len(x), -1)
    got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
    raise ArgumentError(
        f"kl: expected ({len(x)}, {layers}), nats per observation and layer, z_1 first; a list of {layers} tensors "
        f"({len(x)}, …), whose elements are summed; or ({len(x)},), their sum. Got {got}."
    )


def _values(drawn: Tensor, analytic: Tensor) -> str:
    exact = "" if bool(analytic.isnan().any()) else f", KL(q ‖ p) = {float(analytic[0]):.6g}"
    return f"log q − log p = {float(drawn[0]):.6g}{exact}"


# -------------------------------------------------------------------------------------------------------------- both sides


def _judged(name: str, likelihood: Distribution, result: Any, x: Tensor, again: Callable[[], Any], trail: _Trail) -> _Verdict:
    """One run: the first layer that parts, and the observation."""
    differs, layer, layers = _differs(name, likelihood, result, x), trail.parted, trail.layers
    if differs is None and not trail.certain:
        off = deviation_of_observation(likelihood, read_result(name, result, x), x, _drawn(likelihood, x))
        said = f"{name}: the observation agrees with the model's own, on the same noise, to {off:.1e}"
        return _Verdict(True, True, layers, 0.0, said)
    outcome = read_result(name, result, x)
    is_drawn = outcome.kind == "x" and not torch.equal(read_result(name, again(), x).value, outcome.value)
    if layer and (trail.certain or not is_drawn):
        above, inside = "", ""
        if name == "sample":
            seen = f"z_{layers}" if layer == layers - 1 else f"z_{layers} … z_{layer + 1}"
            above = f"{seen} agree; " if layer < layers else ""
            before = f"descend(…, layer={layer + 1})" if layer < layers else "start"
            inside = f" Look at {before} and conditional(…, layer={layer})."
        said = f"{name}: the model and the generator first part at layer {layer}: {above}on the same noise {trail.why}.{inside}"
        return _Verdict(False, True, trail.agreed, -trail.distance, said)
    if is_drawn and trail.agreed == layers:
        said = f"{name}: every z agrees with the model's own; its observation is drawn, and was not compared: give its mean"
        return _Verdict(True, True, layers, 0.0, said)
    if is_drawn:
        said = f"{name}: it draws the observation, with random numbers that cannot be replayed. Give its mean, or log p(x | z)."
        return _Verdict(False, False, trail.agreed, -trail.distance, said)
    where = "below z_1. Every z agrees"
    if trail.agreed < layers:
        where = f"below z_1, or at a layer that could not be followed. {trail.agreed} of {layers} layers were seen to agree"
    said = f"{name}: the model and the generator part {where}, but {differs}"
    return _Verdict(False, True, trail.agreed, 0.0, said)


def _differs(name: str, likelihood: Distribution, result: Any, x: Tensor) -> str | None:
    """How p(x | z) differs from what the model's call gave; draws of both are made from the same numbers."""
    return match_observation(likelihood, read_result(name, result, x), x, _drawn(likelihood, x))


def _drawn(likelihood: Distribution, x: Tensor) -> Callable[[], Tensor | None]:
    """Gives a draw of p(x | z), always the same; None where it cannot be drawn."""

    def draw() -> Tensor | None:
        try:
            return _on_fixed_numbers(likelihood.sample, Replay(), x.device).to(x)
        except NotImplementedError:  # how torch.distributions says so
            return None

    return draw


def _best(
    name: str,
    call: Callable[[], Any],
    noise: Mapping[int, Tensor],
    x: Tensor,
    orders: Sequence[Sequence[int]],
    read: Callable[[Any], Any],
    judge: Callable[[Any, Mapping[int, list[Step]], Callable[[], Any]], _Verdict],
) -> str:
    """Runs the model's call with the noise in every order that its draws allow; one in which all agrees is enough."""
    counting = Replay()
    read(_on_fixed_numbers(call, counting, x.device))
    shapes = {i: n.shape for i, n in noise.items()}
    best: _Verdict | None = None
    for plan in plans(counting.drawn, shapes, orders):
        replay = Replay(noise, plan)
        result = _on_fixed_numbers(call, replay, x.device)
        with torch.no_grad():
            verdict = judge(
                result, replay.steps, lambda plan=plan: _on_fixed_numbers(call, Replay(noise, plan, seed=1), x.device, 1)
            )
        best = verdict if best is None or verdict[:4] > best[:4] else best
        if best.agrees:
            return best.said
    if best is None:
        raise ArgumentError(
            f"{name}: it draws numbers of shapes {[tuple(s) for s in counting.drawn]}, which are not those of the "
            f"layers, {[tuple(s) for s in shapes.values()]}. It must draw z as the model does, a batch of {len(x)}, with torch."
        )
    raise GeneratorError(best.said) if best.comparable else ArgumentError(best.said)


def _on_fixed_numbers(call: Callable[[], Any], replay: Replay, device: torch.device, seed: int = 0) -> Any:
    with torch.no_grad(), RandomStream(_SEED + seed, device).active(), replay:
        return call()


def _noise_of(reading: Reading, layers: int) -> dict[int, Tensor]:
    missing = [i for i in range(1, layers + 1) if i not in reading.noise]
    if missing:
        raise ArgumentError(
            f"reconstruct, kl: infer cannot be run on given numbers at layer {missing[0]}: {reading.unread[missing[0]]}. Leave "
            "them out, or draw each layer's noise by itself with torch.randn."
        )
    return reading.noise


def _orders(reading: Reading, layers: int) -> tuple[Sequence[int], ...]:
    return reading.order, range(layers, 0, -1), range(1, layers + 1)


def _numbers(seed: int, shape: Sequence[int], x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED + seed)
    return torch.randn(tuple(shape), generator=generator).to(x)
