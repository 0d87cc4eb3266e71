"""Holds a generator to its model's own sampler and forward pass, on the same noise; names the first layer where they part."""

from __future__ import annotations

__all__ = ["compare_reconstruct", "compare_sample"]

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal

from energy_prior.checks.parting import Match, deviation_of_observation, match_draw, match_observation, read_result
from energy_prior.checks.reading import Reading
from energy_prior.checks.runs import Trail, Verdict, best_run, follow_infer, noise_of, numbers_for, on_fixed_numbers, orders_of
from energy_prior.checks.tolerance import relative
from energy_prior.conditionals import gaussian_part, of_elements, to_latent
from energy_prior.protocol import HierarchicalGenerator, Inferred
from energy_prior.replay import Replay, Step
from energy_prior.topdown import TopDown, inferred_descent

# ------------------------------------------------------------------------------------------------------------------ sample


def compare_sample(generator: HierarchicalGenerator, x: Tensor, sample: Callable[[int], Any]) -> str:
    """The model's own samples of its prior against T_β of the same noise.

    Raises:
        GeneratorError: they part; it says at which layer.
    """
    n, layers = len(x), len(generator.latent_shapes)
    noise = {i + 1: numbers_for(i, (n, *shape), x) for i, shape in enumerate(generator.latent_shapes)}

    def judge(result: Any, steps: Mapping[int, list[Step]], again: Callable[[], Any]) -> Verdict:
        state, trail = generator.start(n), Trail(layers)
        for layer in range(layers, 0, -1):
            conditional = generator.conditional(state, layer)
            gaussian, plain = gaussian_part(conditional), isinstance(of_elements(conditional), Normal)
            found = Match("unknown")
            if gaussian is not None:
                found = match_draw(steps.get(layer, []), *gaussian, 10 * relative(x.dtype))  # the rounding of one layer
            if found.kind == "other" and not trail.parted:
                found = found._replace(why=found.why + _instead(generator, state, layer, steps[layer]))
            # what becomes of a Gaussian behind transforms is not seen
            trail.add(layer, found if found.kind == "other" or plain else Match("unknown"))
            theirs = found.z if plain else None
            state = generator.descend(state, to_latent(conditional, noise[layer]) if theirs is None else theirs, layer)
        return _judged("sample", generator.likelihood(state), result, x, again, trail)

    orders, read = (range(layers, 0, -1), range(1, layers + 1)), partial(read_result, "sample", x=x)
    return best_run("sample", lambda: sample(n), noise, x, orders, read, judge)


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

    def judge(result: Any, steps: Mapping[int, list[Step]], again: Callable[[], Any]) -> Verdict:
        trail = follow_infer(reading, steps, layers)
        state = inferred_descent(generator, reading.inferred).state
        verdict = _judged("reconstruct", generator.likelihood(state), result, x, again, trail)
        if verdict.agrees or trail.parted:
            return verdict
        return verdict._replace(said=f"{verdict.said}.{_swapped(generator, reading.inferred, result, x)}")

    read = partial(read_result, "reconstruct", x=x)
    return best_run(
        "reconstruct", lambda: reconstruct(x), noise_of(reading, layers), x, orders_of(reading, layers), read, judge
    )


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


# -------------------------------------------------------------------------------------------------------------- both sides


def _judged(name: str, likelihood: Distribution, result: Any, x: Tensor, again: Callable[[], Any], trail: Trail) -> Verdict:
    """One run: the first layer that parts, and the observation."""
    differs, layer, layers = _differs(name, likelihood, result, x), trail.parted, trail.layers
    if differs is None and not trail.certain:
        off = deviation_of_observation(likelihood, read_result(name, result, x), x, _drawn(likelihood, x))
        said = f"{name}: the observation agrees with the model's own, on the same noise, to {off:.1e}"
        return Verdict(True, True, layers, 0.0, said)
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
        return Verdict(False, True, trail.agreed, -trail.distance, said)
    if is_drawn and trail.agreed == layers:
        said = f"{name}: every z agrees with the model's own; its observation is drawn, and was not compared: give its mean"
        return Verdict(True, True, layers, 0.0, said)
    if is_drawn:
        said = f"{name}: it draws the observation, with random numbers that cannot be replayed. Give its mean, or log p(x | z)."
        return Verdict(False, False, trail.agreed, -trail.distance, said)
    where = "below z_1: every z agrees. Look at descend(…, layer=1) and likelihood"
    if trail.agreed < layers:
        unseen = ", ".join(map(str, sorted(trail.unseen)))
        where = f"below z_1, or at a layer whose draw could not be followed ({unseen}); the others agree"
    said = f"{name}: the model and the generator part {where}. What differs: {differs}"
    return Verdict(False, True, trail.agreed, 0.0, said)


def _differs(name: str, likelihood: Distribution, result: Any, x: Tensor) -> str | None:
    """How p(x | z) differs from what the model's call gave; draws of both are made from the same numbers."""
    return match_observation(likelihood, read_result(name, result, x), x, _drawn(likelihood, x))


def _drawn(likelihood: Distribution, x: Tensor) -> Callable[[], Tensor | None]:
    """Gives a draw of p(x | z), always the same; None where it cannot be drawn."""

    def draw() -> Tensor | None:
        try:
            return on_fixed_numbers(likelihood.sample, Replay(), x.device).to(x)
        except NotImplementedError:  # how torch.distributions says so
            return None

    return draw
