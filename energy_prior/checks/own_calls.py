"""Holds a generator to its model's own calls: both run on the same numbers, and the first layer where they part is named."""

from __future__ import annotations

__all__ = ["compare_kl", "compare_reconstruct", "compare_sample"]

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from energy_prior._util import sum_event
from energy_prior.checks.inference import Reading, kl_terms
from energy_prior.checks.parting import Match, match_draw, match_observation, match_value, read_result
from energy_prior.checks.replay import Replay, Step, plans
from energy_prior.errors import ArgumentError, GeneratorError
from energy_prior.process import RandomStream
from energy_prior.protocol import HierarchicalGenerator, Inferred
from energy_prior.topdown import TopDown, inferred_descent, parameters, to_latent

_SEED = 77


class _Verdict(NamedTuple):
    """What a run of the model's call showed: a fault, or what agrees; the better of two is the larger."""

    agrees: bool
    layers: int
    said: str


# ------------------------------------------------------------------------------------------------------------------ sample


def compare_sample(generator: HierarchicalGenerator, x: Tensor, sample: Callable[[int], Any]) -> str:
    """The model's own samples of its prior against T_β of the same noise.

    Raises:
        GeneratorError: they part; it says at which layer.
    """
    n, layers = len(x), len(generator.latent_shapes)
    noise = {i + 1: _numbers(i, (n, *shape), x) for i, shape in enumerate(generator.latent_shapes)}

    def judge(result: Any, steps: Mapping[int, list[Step]], again: Callable[[], Any]) -> _Verdict:
        state, first, followed = generator.start(n), (0, Match("same")), 0
        for layer in range(layers, 0, -1):
            conditional = generator.conditional(state, layer)
            found = match_draw(steps.get(layer, []), *parameters(conditional))
            if found.kind == "other" and not first[0]:
                first = (layer, found._replace(why=found.why + _instead(generator, state, layer, steps[layer])))
            followed += found.kind == "same" and not first[0]
            state = generator.descend(state, to_latent(conditional, noise[layer]) if found.z is None else found.z, layer)
        return _judged("sample", generator.likelihood(state), result, x, again, first, followed, layers)

    return _best("sample", lambda: sample(n), noise, x, (range(layers, 0, -1), range(1, layers + 1)), judge)


def _instead(generator: HierarchicalGenerator, state: Any, layer: int, steps: Sequence[Step]) -> str:
    """Which other layer's conditional the model's draw of `layer` comes from, if any does."""
    shapes = generator.latent_shapes
    for other in range(1, len(shapes) + 1):
        if other != layer and shapes[other - 1] == shapes[layer - 1]:
            try:
                conditional = generator.conditional(state, other)
            except Exception:  # a state of this layer need not fit that one  # noqa: S112
                continue
            if match_draw(steps, *parameters(conditional)).kind == "same":
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
        first, followed = _follow_infer(reading, steps)
        state = inferred_descent(generator, reading.inferred).state
        verdict = _judged("reconstruct", generator.likelihood(state), result, x, again, first, followed, layers)
        if verdict.agrees or first[0]:
            return verdict
        swapped = _swapped(generator, reading.inferred, lambda p: match_observation(p, read_result("", result, x), x, again))
        return verdict._replace(said=verdict.said + swapped)

    return _best("reconstruct", lambda: reconstruct(x), _noise_of(reading, layers), x, _orders(reading, layers), judge)


def _follow_infer(reading: Reading, steps: Mapping[int, list[Step]]) -> tuple[tuple[int, Match], int]:
    """The first layer, as they are drawn, that the model draws otherwise than `infer`, and how many agree before it."""
    followed = 0
    for layer in reading.order:
        if layer in reading.loc:
            found = match_draw(steps.get(layer, []), reading.loc[layer], reading.scale[layer].abs())
        else:
            found = match_value(steps.get(layer, []), reading.inferred.latents[layer - 1].detach())
        if found.kind == "other":
            return (layer, found._replace(why=f"{found.why}, in q(z_{layer} | …, x)")), followed
        followed += found.kind == "same"
    return (0, Match("same")), followed


def _swapped(generator: HierarchicalGenerator, inferred: Inferred, differs: Callable[[Distribution], str | None]) -> str:
    """Two layers of `infer` that, exchanged, make the observation right."""
    shapes = generator.latent_shapes
    for i, j in combinations(range(len(shapes)), 2):
        if shapes[i] == shapes[j]:
            latents = list(inferred.latents)
            latents[i], latents[j] = latents[j], latents[i]
            descent = TopDown(generator, len(latents[0])).descend(latents, "latent", to_observation=True)
            if differs(generator.likelihood(descent.state)) is None:
                return f" With z_{i + 1} and z_{j + 1} of infer exchanged it does not: are these layers swapped in its latents?"
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
        first, _ = _follow_infer(reading, steps)
        part = "" if not first[0] else f" The draws part first at layer {first[0]}: {first[1].why}."
        if theirs.shape[1] != layers:
            within = [(theirs[:, 0] - ours.sum(1)).abs() <= slack.sum(1) for ours in (drawn, analytic)]
            if any(bool(w.all()) for w in within):
                return _Verdict(True, layers, "kl: the sum over layers agrees")
            said = f"the model says {float(theirs[0, 0]):.6g} nats in all for the first observation, the generator "
            return _Verdict(False, 0, f"kl: {said}{_values(drawn.sum(1), analytic.sum(1))}.{part}")
        fits = [(theirs - ours).abs() <= slack for ours in (drawn, analytic)]
        right = [bool(fits[0][:, i].all() | fits[1][:, i].all()) for i in range(layers)]
        if all(right):
            return _Verdict(True, layers, "kl: every layer agrees")
        i = max(i for i, fine in enumerate(right) if not fine)
        said = (
            f"kl: it parts at layer {', '.join(str(j + 1) for j in reversed(range(layers)) if not right[j])}. At layer {i + 1} "
            f"the model says {float(theirs[0, i]):.6g} nats for the first observation, the generator "
            f"{_values(drawn[:, i], analytic[:, i])}."
        )
        other = [j for j in range(layers) if j != i and bool(((theirs[:, j] - drawn[:, i]).abs() <= slack[:, i]).all())]
        hint = f" The model has that at layer {other[0] + 1}: kl and the generator both go from z_1 to z_L." if other else ""
        return _Verdict(False, sum(right), said + hint + part)

    return _best("kl", lambda: kl(x), _noise_of(reading, layers), x, _orders(reading, layers), judge)


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


def _judged(
    name: str,
    likelihood: Distribution,
    result: Any,
    x: Tensor,
    again: Callable[[], Any],
    first: tuple[int, Match],
    followed: int,
    layers: int,
) -> _Verdict:
    """One run: the first layer that parts, and the observation."""
    outcome = read_result(name, result, x)

    def draw() -> Tensor:
        return _on_fixed_numbers(likelihood.sample, Replay())

    differs = match_observation(likelihood, outcome, x, draw)
    layer, match = first
    if differs is None and not match.certain:
        return _Verdict(True, layers, f"{name}: the observation agrees with the model's own, on the same noise")
    if layer:
        above = f"They agree from z_{layers} down to z_{layer + 1}; " if layer < layers and name == "sample" else ""
        inside = f" Look at descend(…, layer={layer + 1}) and conditional(…, layer={layer})." if name == "sample" else ""
        said = f"{name}: the model and the generator first part at layer {layer}. {above}on the same noise {match.why}.{inside}"
        return _Verdict(False, followed, said)
    if outcome.kind == "x" and not torch.equal(read_result(name, again(), x).value, outcome.value):
        if followed == layers:
            said = f"{name}: every z agrees with the model's own; its observation is drawn, and was not compared: give its mean"
            return _Verdict(True, layers, said)
        raise ArgumentError(
            f"{name}: it draws the observation, with random numbers that cannot be replayed. Give its mean, or log p(x | z)."
        )
    known = "Every z agrees" if followed == layers else f"{followed} of {layers} layers were seen to agree, none to differ"
    return _Verdict(False, followed, f"{name}: the model and the generator part below z_1. {known}, but {differs}")


def _best(
    name: str,
    call: Callable[[], Any],
    noise: Mapping[int, Tensor],
    x: Tensor,
    orders: Sequence[Sequence[int]],
    judge: Callable[[Any, Mapping[int, list[Step]], Callable[[], Any]], _Verdict],
) -> str:
    """Runs the model's call with the noise in every order that its draws allow; one in which all agrees is enough."""
    counting = Replay()
    _on_fixed_numbers(call, counting)
    shapes = {i: n.shape for i, n in noise.items()}
    best: _Verdict | None = None
    for plan in plans(counting.drawn, shapes, orders):
        replay = Replay(noise, plan)
        result = _on_fixed_numbers(call, replay)
        with torch.no_grad():
            verdict = judge(result, replay.steps, lambda plan=plan: _on_fixed_numbers(call, Replay(noise, plan, seed=1), 1))
        best = verdict if best is None or verdict[:2] > best[:2] else best
        if best.agrees:
            return best.said
    if best is None:
        raise ArgumentError(
            f"{name}: it draws normal numbers of shapes {[tuple(s) for s in counting.drawn]}, which are not those of the "
            f"layers, {[tuple(s) for s in shapes.values()]}. It must draw z as the model does, a batch of {len(x)}, with torch."
        )
    raise GeneratorError(best.said)


def _on_fixed_numbers(call: Callable[[], Any], replay: Replay, seed: int = 0) -> Any:
    device = next((n.device for n in replay.noise.values()), torch.device("cpu"))
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
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(x)
