"""Holds the terms of a generator's ELBO to its model's own: KL(q ‖ p) of every layer, or all in one."""

from __future__ import annotations

__all__ = ["compare_elbo", "compare_kl"]

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from energy_prior._util import sum_event
from energy_prior.checks.parting import deviation
from energy_prior.checks.reading import Reading, kl_terms
from energy_prior.checks.runs import Trail, Verdict, best_run, follow_infer, noise_of, orders_of
from energy_prior.checks.tolerance import near, relative
from energy_prior.errors import ArgumentError
from energy_prior.replay import Step
from energy_prior.topdown import inferred_descent

_MOST_MIXED = 8  # layers whose KL may be analytic or at the draw, each by itself
_NEARLY = 1e-3  # relative; in single precision rounding may be that large


# ---------------------------------------------------------------------------------------------------------------------- kl


def compare_kl(generator: Any, x: Tensor, kl: Callable[[Tensor], Any], reading: Reading) -> str:
    """The model's own KL, or log q − log p, of every layer against the generator's at the same draws.

    Raises:
        GeneratorError: they differ; it says at which layer first.
    """
    layers = len(generator.latent_shapes)
    drawn, analytic, slack = kl_terms(generator, reading)

    def judge(result: Any, steps: Mapping[int, list[Step]], again: Callable[[], Any]) -> Verdict:
        theirs, trail = _per_layer(result, x, layers), follow_infer(reading, steps, layers)
        if theirs.shape[1] != layers:
            theirs, ours = theirs[:, 0], _totals(drawn, analytic)
            if (off := _agreement(theirs, ours, slack.sum(1))) is not None and not trail.certain:
                return Verdict(True, True, layers, 0.0, f"kl: the sum over layers agrees, to {off:.1e}")
            row = _worst(theirs, _nearest(theirs, ours))
            said = f"kl: the model says {float(theirs[row]):.6g} nats in all for {_observation(row)}, the generator "
            said += f"{_values(drawn.sum(1)[row], analytic.sum(1)[row])}."
            why = _unit(theirs, ours, slack.sum(1), x) or _rounding(theirs, ours, x)
            return _parted(said, why, trail, closed=not bool(analytic.isnan().any()))
        fits = [(theirs - ours).abs() <= slack for ours in (drawn, analytic)]
        right = [bool(fits[0][:, i].all() | fits[1][:, i].all()) for i in range(layers)]
        if all(right):
            nearest = torch.where((theirs - drawn).abs() < (theirs - analytic).nan_to_num(math.inf).abs(), drawn, analytic)
            return Verdict(True, True, layers, 0.0, f"kl: every layer agrees, to {deviation(nearest, theirs):.1e}")
        i = max(i for i, fine in enumerate(right) if not fine)
        ours = [of[:, i] for of in (drawn, analytic) if not bool(of[:, i].isnan().any())]
        row = _worst(theirs[:, i], _nearest(theirs[:, i], ours))
        said = (
            f"kl: it parts at layer {', '.join(str(j + 1) for j in reversed(range(layers)) if not right[j])}. At layer {i + 1} "
            f"the model says {float(theirs[row, i]):.6g} nats for {_observation(row)}, the generator "
            f"{_values(drawn[row, i], analytic[row, i])}."
        )
        other = [
            j
            for j in range(layers)
            for of in (drawn, analytic)
            if j != i and bool(((theirs[:, j] - of[:, i]).abs() <= slack[:, i]).all())
        ]
        hint = f" The model has that at layer {other[0] + 1}: kl and the generator both go from z_1 to z_L." if other else ""
        why = hint or _unit(theirs[:, i], ours, slack[:, i], x) or _rounding(theirs[:, i], ours, x)
        return _parted(said, why, trail, sum(right), closed=len(ours) > 1)

    read = partial(_per_layer, x=x, layers=layers)
    return best_run("kl", lambda: kl(x), noise_of(reading, layers), x, orders_of(reading, layers), read, judge)


def _per_layer(result: Any, x: Tensor, layers: int) -> Tensor:
    """(batch, L), or (batch, 1) for a sum over layers."""
    got = _shown(result)
    if isinstance(result, list | tuple) and len(result) == layers:
        parts = [torch.as_tensor(part) for part in result]
        if all(part.ndim > 0 and len(part) == len(x) for part in parts):
            return torch.stack([sum_event(part.detach().to(x)) for part in parts], dim=1)
    elif hasattr(result, "__array__") and not isinstance(result, Tensor):
        result = torch.as_tensor(result)
    if isinstance(result, Tensor) and result.shape in ((len(x), layers), (len(x),)):
        return result.detach().to(x).reshape(len(x), -1)
    raise ArgumentError(
        f"kl: expected ({len(x)}, {layers}), nats per observation and layer, z_1 first; a list of {layers} tensors "
        f"({len(x)}, …), whose elements are summed; or ({len(x)},), their sum. Got {got}."
    )


# -------------------------------------------------------------------------------------------------------------------- elbo


def compare_elbo(generator: Any, x: Tensor, elbo: Callable[[Tensor], Any], reading: Reading) -> str:
    """The model's own ELBO against log p(x | z) + Σ log p − Σ log q, or log p(x | z) − KL, of the generator at the same draw.

    Raises:
        GeneratorError: they differ.
    """
    layers = len(generator.latent_shapes)
    drawn, analytic, slack = kl_terms(generator, reading)
    with torch.no_grad():
        log_prob = generator.likelihood(inferred_descent(generator, reading.inferred).state).log_prob(x)
    rounding = slack.sum(1) + relative(x.dtype) * (log_prob.abs() + x[0].numel())

    def judge(result: Any, steps: Mapping[int, list[Step]], again: Callable[[], Any]) -> Verdict:
        theirs, trail = _elbo(result, x), follow_infer(reading, steps, layers)
        per_row = theirs.ndim > 0
        terms = [_reduced(total, per_row) for total in _totals(drawn, analytic, mixed=per_row)]
        p, allowed = _reduced(log_prob, per_row), _reduced(rounding, per_row)
        theirs = theirs.reshape(-1)
        ours = [p - term for term in terms]
        if (off := _agreement(theirs, ours, allowed)) is not None and not trail.certain:
            return Verdict(True, True, layers, 0.0, f"elbo: it agrees with the model's own, to {off:.1e}")
        row = _worst(theirs, _nearest(theirs, ours))
        of = _observation(row) if per_row else "the mean over the batch"
        both = [_reduced(term.sum(1), per_row)[row] for term in (drawn, analytic)]
        said = (
            f"elbo: the model says {float(theirs[row]):.6g} nats for {of}, the generator {float(ours[0][row]):.6g}: "
            f"log p(x | z) = {float(p[row]):.6g}, {_values(*both)}."
        )
        why = _unit(theirs, ours, allowed, x, batch=not per_row) or _of_terms(theirs, p, terms, allowed, x[0].numel())
        return _parted(said, why or _rounding(theirs, ours, x), trail, closed=not bool(analytic.isnan().any()))

    read = partial(_elbo, x=x)
    return best_run("elbo", lambda: elbo(x), noise_of(reading, layers), x, orders_of(reading, layers), read, judge)


def _elbo(result: Any, x: Tensor) -> Tensor:
    """(batch,), or () for a mean over the batch."""
    got = _shown(result)
    if isinstance(result, float) or (hasattr(result, "__array__") and not isinstance(result, Tensor)):
        result = torch.as_tensor(result)
    if isinstance(result, Tensor) and result.is_floating_point() and result.shape in ((len(x),), ()):
        return result.detach().to(x)
    raise ArgumentError(f"elbo: expected ({len(x)},), nats per observation, or their mean, a scalar. Got {got}.")


def _reduced(value: Tensor, per_row: bool) -> Tensor:
    return value if per_row else value.mean().reshape(1)


def _of_terms(theirs: Tensor, log_prob: Tensor, terms: Sequence[Tensor], allowed: Tensor, elements: int) -> str:
    """Names an ELBO of which one term alone is in another unit, or has a weight."""
    for sign in (1, -1):
        if _agreement(sign * theirs, [log_prob / elements - term for term in terms], allowed) is not None:
            return f" Its log p(x | z) is a mean over the {elements} elements of x: it must be their sum."
        for term in terms if len(theirs) > 1 else ():
            weight = (log_prob - sign * theirs) / term
            if bool((term.abs() > 10 * allowed).all()) and near(weight, weight[:1].expand_as(weight), floor=0.0):
                return f" Its KL has the weight {float(weight[0]):.4g}: it must be 1."
    return ""


# ------------------------------------------------------------------------------------------------------- what both come to


def _totals(drawn: Tensor, analytic: Tensor, mixed: bool = True) -> list[Tensor]:
    """Sums over layers, (batch,), of log q − log p at the draw and, where there is one, of KL(q ‖ p).

    Args:
        drawn: the first, (batch, L).
        analytic: the second, (batch, L), NaN where there is none.
        mixed: whether each of a few layers may have either, whatever the others have.
    """
    layers = range(drawn.shape[1])
    known = [i for i in layers if not bool(analytic[:, i].isnan().any())]
    if mixed and len(known) <= _MOST_MIXED:
        chosen = [these for n in range(len(known) + 1) for these in combinations(known, n)]
    else:  # none, all, and those up to one layer or from it on
        chosen = [tuple(part) for n in range(len(known) + 1) for part in (known[:n], known[n:])]
    masks = [torch.tensor([i in these for i in layers], device=drawn.device) for these in chosen]
    return [torch.where(mask, analytic, drawn).sum(1) for mask in masks]


def _agreement(theirs: Tensor, ours: Sequence[Tensor], allowed: Tensor) -> float | None:
    """How near the nearest of ours is, relative; None: none is within what is allowed."""
    found = [deviation(value, theirs) for value in ours if bool(((theirs - value).abs() <= allowed).all())]
    return min(found, default=None)


def _nearest(theirs: Tensor, ours: Sequence[Tensor]) -> Tensor:
    return min(ours, key=lambda value: float((theirs - value).abs().sum()))


def _worst(theirs: Tensor, ours: Tensor) -> int:
    return int((theirs - ours).abs().nan_to_num(math.inf).argmax())  # a row that is NaN before all others


def _observation(row: int) -> str:
    return "the first observation" if row == 0 else f"observation {row} of the batch"


def _values(drawn: Tensor, analytic: Tensor) -> str:
    exact = "" if bool(analytic.isnan()) else f", KL(q ‖ p) = {float(analytic):.6g}"
    return f"log q − log p = {float(drawn):.6g}{exact}"


def _unit(theirs: Tensor, ours: Sequence[Tensor], allowed: Tensor, x: Tensor, batch: bool = False) -> str:
    """Names another unit or sign."""
    elements = x[0].numel()
    units = [(1.0, ""), (1 / math.log(2), "in bits"), (1 / elements, f"divided by the {elements} elements of x")]
    units.append((1 / (elements * math.log(2)), "in bits per dimension"))
    units += [(float(len(x)), "summed over the batch")] if batch else []
    for factor, unit in units:
        for sign in (1.0, -1.0):
            if _agreement(theirs / (sign * factor), ours, allowed) is not None and (sign < 0 or unit):
                said = " and ".join(
                    part for part in ("its sign is the other" if sign < 0 else "", f"it is {unit}" if unit else "") if part
                )
                return f" The two agree but for the unit: {said}. Multiply it by {sign / factor:.6g}."
    return ""


def _rounding(theirs: Tensor, ours: Sequence[Tensor], x: Tensor) -> str:
    """Says that rounding may be all that differs."""
    close = deviation(_nearest(theirs, ours), theirs) < _NEARLY
    rounded = close and x.dtype != torch.float64
    return " That is near rounding: `.double()` of the model and of x would tell it from an error." if rounded else ""


def _parted(said: str, why: str, trail: Trail, right: int = 0, closed: bool = True) -> Verdict:
    """The verdict of a run in which terms differ, with what its draws show."""
    if trail.parted:
        why = f" The draws part first at layer {trail.parted}: {trail.why}."
    elif trail.agreed == trail.layers and not why:
        why = " All draws agree, so it is a density that differs: log q, log p or p(x | z)."
        if not closed:
            why += " Of some layers no closed KL(q ‖ p) is known here: there give log q − log p at the draw."
    return Verdict(False, True, right + trail.agreed, -trail.distance, said + why)


def _shown(result: Any) -> str:
    if isinstance(result, list | tuple):
        parts: Sequence[Any] = result
        return f"{type(result).__name__} of {len(parts)}: {', '.join(map(_shown, parts[:4]))}"
    return f"{result.dtype} of shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
