"""Where two sides that ran on the same numbers part: a layer's draw, or the observation."""

from __future__ import annotations

__all__ = ["Match", "Outcome", "deviation", "deviation_of_observation", "match_draw", "match_observation", "read_result"]

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from energy_prior._util import sum_event
from energy_prior.checks.tolerance import near, relative, same_log_density
from energy_prior.errors import ArgumentError
from energy_prior.replay import Step

_FACTORS = (2.0, 3.0)  # over `relative`, of μ in units of σ and of σ
_CLEARLY = 5e-3  # of σ: above the rounding of many layers in a row, below an error of 1 %
_NEAR_SCALE = 1.33  # a scale that is off by less than this, at the right mean, is a scale with an error in it


# ------------------------------------------------------------------------------------------------------------------- draws


class Match(NamedTuple):
    """What a model has made of a layer's noise, beside what the generator makes of it.

    Attributes:
        kind: "same", "other", or "unknown" where the model's code could not be followed.
        z: the model's z_i, where it is the same.
        why: how it is another one.
        followed: "same" at a step that is no bare ε; "other" by far more than rounding, beside such steps.
        certain: "other" in μ or σ alone, so that it can only be an error in that one.
        distance: how far they are apart, in units of σ.
    """

    kind: str
    z: Tensor | None = None
    why: str = ""
    followed: bool = False
    certain: bool = False
    distance: float = 0.0


def match_draw(steps: Sequence[Step], loc: Tensor, scale: Tensor, clearly: float = _CLEARLY) -> Match:
    """Looks for loc + scale ε among the steps that a model's noise went through.

    Args:
        steps: these.
        loc: the generator's μ.
        scale: the generator's σ.
        clearly: difference, in units of σ, above which it is no rounding.
    """
    if not steps:
        return Match("unknown")
    loc, scale = loc.detach(), scale.detach()
    best: tuple[float, Match] | None = None
    for step in steps:
        same_loc, same_scale = _same_loc(step.loc, loc, scale), _same_scale(step.scale, scale)
        if same_loc and same_scale:
            return Match("same", step.value, followed=step.shifted and bool((step.scale != 1).any()))
        if not step.shifted:
            continue
        ratio = step.scale / scale
        close = bool(((ratio > 1 / _NEAR_SCALE) & (ratio < _NEAR_SCALE)).all())
        telling = bool((step.scale != 1).any())
        shift = (step.loc - loc).abs() / (scale + clearly * loc.abs().max())
        distance = float(shift.mean() + ratio.abs().log().abs().mean())
        if best is None or distance < best[0]:
            clear = max(float(shift.max()), float((ratio - 1).abs().max())) > clearly
            varied = bool((step.loc != step.loc.flatten()[0]).any())  # no μ of 0, which many a step may have
            certain = clear and ((same_loc and (close or varied)) or (same_scale and telling))
            why = _difference(step, loc, scale, same_loc, same_scale)
            best = distance, Match("other", None, why, clear and telling, certain, distance)
    return Match("unknown") if best is None else best[1]


def match_value(steps: Sequence[Step], z: Tensor) -> Match:
    """Looks for a z among the steps that a model's noise went through."""
    if any(near(step.value, z) for step in steps):
        return Match("same", z)
    if not any(step.shifted for step in steps):
        return Match("unknown")
    off = min(float((step.value - z).abs().max()) for step in steps if step.shifted)
    return Match("other", None, f"z is off by up to {off:.3g}", distance=off)


def _same_loc(a: Tensor, b: Tensor, scale: Tensor) -> bool:
    r = relative(b.dtype)
    return bool(((a - b).abs() <= r * float(b.abs().max()) + _FACTORS[0] * r * scale).all())


def _same_scale(a: Tensor, b: Tensor) -> bool:
    return bool(((a.abs() - b).abs() <= _FACTORS[1] * relative(b.dtype) * b).all())


def _difference(step: Step, loc: Tensor, scale: Tensor, same_loc: bool, same_scale: bool) -> str:
    """The model's μ and σ of a layer beside the generator's, in words."""
    said = [] if same_loc else [f"μ is off by up to {float((step.loc - loc).abs().max()):.3g}"]
    if not same_scale:
        said.append(_scale_difference(scale, step.scale.abs()))
    return " and ".join(said)


def _scale_difference(ours: Tensor, theirs: Tensor) -> str:
    ratio = ours / theirs
    middle = float(ratio.median())
    for what, value in (
        (f"{middle:.6g} times the model's", middle * theirs),
        ("the square root of the model's", theirs.sqrt()),
        ("the square of the model's", theirs.square()),
        ("exp where the model has softplus", theirs.expm1()),
        ("softplus where the model has exp", theirs.log1p()),
    ):
        if _same_scale(value, ours):
            return f"the generator's σ is {what}"
    return f"the generator's σ is from {float(ratio.min()):.4g} to {float(ratio.max()):.4g} times the model's"


# ------------------------------------------------------------------------------------------------------------ observations


class Outcome(NamedTuple):
    """What one of the model's calls gave: observations, (batch, *x_shape), or log p(x | z), (batch,), nats."""

    kind: str
    value: Tensor


def read_result(name: str, result: Any, x: Tensor) -> Outcome:
    """An observation or a log density from whatever the model's own call gives.

    Raises:
        ArgumentError: if it is neither.
    """
    if callable(getattr(result, "log_prob", None)):
        result = sum_event(torch.as_tensor(result.log_prob(x)))
    elif hasattr(result, "__array__") and not isinstance(result, Tensor):
        result = torch.as_tensor(result)
    if isinstance(result, Tensor) and result.is_floating_point():
        value = result.detach().to(x)
        if bool(value.isnan().any()):
            raise ArgumentError(f"{name}: expected numbers, got {int(value.isnan().sum())} NaN among {value.numel()} values.")
        if value.shape == x.shape:
            return Outcome("x", value)
        if value.shape == x.shape[:1]:
            return Outcome("log p", value)
    got = f"{result.dtype} of shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
    raise ArgumentError(
        f"{name}: expected observations {tuple(x.shape)}, means or draws, in the units of x; or log p(x | z) of x, "
        f"({len(x)},), nats; or something with log_prob, each in floating-point numbers. Got {got}."
    )


def match_observation(likelihood: Distribution, outcome: Outcome, x: Tensor, draw: Callable[[], Tensor | None]) -> str | None:
    """How p(x | z) of the generator differs from what the model's call gave; None: it does not."""
    log_prob = likelihood.log_prob(x).detach()
    elements = x[0].numel()
    if outcome.kind == "log p":
        if same_log_density(outcome.value, log_prob, elements):
            return None
        ours, theirs, off = float(log_prob[0]), float(outcome.value[0]), log_prob - outcome.value
        constant = near(off, off[:1].expand_as(off), floor=0.0)
        return (
            f"log p(x | z) of the first observation is {theirs:.6g} by the model, {ours:.6g} by the generator"
            + (f", {float(off[0]) / elements:.4g} nats per element more in every observation" if constant else "")
            + " (are x and σ in the model's units, data scaling, and is it a sum over elements?)"
        )
    named = dict(_tensors(likelihood, x))
    if any(near(outcome.value, value) for value in named.values()):
        return None
    if same_log_density(sum_event(outcome.value), log_prob, elements):  # log p of every element
        return None
    drawn = draw()
    if drawn is not None and near(outcome.value, drawn):
        return None
    mean = named.get("mean")
    if mean is None:
        return "the observation is no draw, and no parameter, of the generator's likelihood"
    return f"the observation is off by up to {float((mean - outcome.value).abs().max()):.3g}{_affine_hint(mean, outcome.value)}"


def deviation_of_observation(likelihood: Distribution, outcome: Outcome, x: Tensor, draw: Callable[[], Tensor | None]) -> float:
    """The largest difference of p(x | z), in whatever form the model's call gave it, over the largest value."""
    log_prob = likelihood.log_prob(x).detach()
    if outcome.kind == "log p":
        return deviation(log_prob, outcome.value)
    forms = [deviation(value, outcome.value) for _, value in _tensors(likelihood, x)]
    drawn = draw()
    forms += [] if drawn is None else [deviation(drawn, outcome.value)]
    return min([*forms, deviation(log_prob, sum_event(outcome.value))])


def deviation(a: Tensor, b: Tensor) -> float:
    """max |a − b| / max |b|, of finite numbers."""
    off, size = (a - b).abs().nan_to_num(0.0, 0.0), b.abs().nan_to_num(0.0, 0.0)  # infinities that agree differ by nothing
    return float(off.max() / size.max().clamp_min(torch.finfo(size.dtype).tiny))


def _tensors(likelihood: Any, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Mean, and parameters of the shape of an observation, of a distribution and of what it is built on."""
    for name in ("mean", "loc", "probs", "logits"):
        try:
            value = getattr(likelihood, name, None)
        except NotImplementedError:  # how torch.distributions says that there is no mean
            continue
        if isinstance(value, Tensor) and value.shape == x.shape:
            yield name, value.detach()
    for name in ("base_dist", "base"):
        if isinstance(getattr(likelihood, name, None), Distribution):
            yield from ((key, value) for key, value in _tensors(getattr(likelihood, name), x) if key != "mean")


def _affine_hint(ours: Tensor, theirs: Tensor) -> str:
    """Says so where one is a multiple of the other, plus a constant."""
    a, b = ours.flatten().double(), theirs.flatten().double()
    a0, b0 = a - a.mean(), b - b.mean()
    if float(b0.abs().max()) == 0:
        return ""
    slope = float((a0 @ b0) / (b0 @ b0))
    shift = float(a.mean() - slope * b.mean())
    if not near((slope * b + shift).to(ours.dtype), ours.flatten()):
        return ""
    return f": the generator's is {slope:.4g} times the model's {'+' if shift >= 0 else '−'} {abs(shift):.4g} (data scaling?)"
