"""Holds the terms of a generator's ELBO to its model's own: KL(q ‖ p) of every layer, or all in one."""

from __future__ import annotations

__all__ = ["compare_elbo", "compare_kl"]

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from energy_prior._util import sum_event
from energy_prior.checks.parting import deviation
from energy_prior.checks.reading import Reading, kl_terms
from energy_prior.checks.runs import Verdict, best_run, follow_infer, noise_of, orders_of
from energy_prior.checks.tolerance import relative
from energy_prior.errors import ArgumentError
from energy_prior.replay import Step
from energy_prior.topdown import inferred_descent

# ---------------------------------------------------------------------------------------------------------------------- kl


def compare_kl(generator: Any, x: Tensor, kl: Callable[[Tensor], Any], reading: Reading) -> str:
    """The model's own KL, or log q − log p, of every layer against the generator's at the same draws.

    Raises:
        GeneratorError: they differ; it says at which layer first.
    """
    layers = len(generator.latent_shapes)
    drawn, analytic, slack = kl_terms(generator, reading)

    def judge(result: Any, steps: Mapping[int, list[Step]], again: Callable[[], Any]) -> Verdict:
        theirs = _per_layer(result, x, layers)
        trail = follow_infer(reading, steps, layers)
        part = f" The draws part first at layer {trail.parted}: {trail.why}." if trail.parted else ""
        if theirs.shape[1] != layers:
            within = [(theirs[:, 0] - ours.sum(1)).abs() <= slack.sum(1) for ours in (drawn, analytic)]
            if any(bool(w.all()) for w in within):
                pairs = zip((drawn, analytic), within, strict=True)
                off = min(deviation(ours.sum(1), theirs[:, 0]) for ours, w in pairs if w.all())
                return Verdict(True, True, layers, 0.0, f"kl: the sum over layers agrees, to {off:.1e}")
            said = f"kl: the model says {float(theirs[0, 0]):.6g} nats in all for the first observation, the generator "
            said += f"{_values(drawn.sum(1), analytic.sum(1))}.{part}"
            return Verdict(False, True, trail.agreed, -trail.distance, said)
        fits = [(theirs - ours).abs() <= slack for ours in (drawn, analytic)]
        right = [bool(fits[0][:, i].all() | fits[1][:, i].all()) for i in range(layers)]
        if all(right):
            nearest = torch.where((theirs - drawn).abs() < (theirs - analytic).nan_to_num(math.inf).abs(), drawn, analytic)
            return Verdict(True, True, layers, 0.0, f"kl: every layer agrees, to {deviation(nearest, theirs):.1e}")
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
        return Verdict(False, True, sum(right) + trail.agreed, -trail.distance, said + hint + part)

    read = partial(_per_layer, x=x, layers=layers)
    return best_run("kl", lambda: kl(x), noise_of(reading, layers), x, orders_of(reading, layers), read, judge)


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
    elements = x[0].numel()
    rounding = slack.sum(1) + relative(x.dtype) * (log_prob.abs() + elements)
    ours = [log_prob - term.sum(1) for term in (drawn, analytic) if not bool(term.isnan().any())]

    def judge(result: Any, steps: Mapping[int, list[Step]], again: Callable[[], Any]) -> Verdict:
        theirs = _elbo(result, x)

        def fits(factor: float = 1.0) -> list[float]:
            pairs = ((value if theirs.ndim else value.mean(), theirs / factor) for value in ours)
            allowed = rounding if theirs.ndim else rounding.mean()
            return [deviation(a, b) for a, b in pairs if bool(((a - b).abs() <= allowed).all())]

        if fits():
            return Verdict(True, True, layers, 0.0, f"elbo: it agrees with the model's own, to {min(fits()):.1e}")
        trail = follow_infer(reading, steps, layers)
        part = f" The draws part first at layer {trail.parted}: {trail.why}." if trail.parted else ""
        first: Callable[[Tensor], float] = _first if theirs.ndim else lambda value: float(value.mean())
        of = "the first observation" if theirs.ndim else "the mean over the batch"
        said = (
            f"elbo: the model says {first(theirs):.6g} nats for {of}, the generator {first(ours[0]):.6g}: log p(x | z) = "
            f"{first(log_prob):.6g}, {_values(drawn.sum(1), analytic.sum(1), first)}."
        )
        hint = next((f" {words}" for factor, words in _elbo_factors(elements, len(x)) if fits(factor)), "")
        return Verdict(False, True, trail.agreed, -trail.distance, said + hint + part)

    read = partial(_elbo, x=x)
    return best_run("elbo", lambda: elbo(x), noise_of(reading, layers), x, orders_of(reading, layers), read, judge)


def _elbo_factors(elements: int, batch: int) -> list[tuple[float, str]]:
    """What a loss often is, in units of an ELBO in nats, and what to write."""
    return [
        (-1.0, "It is the negative: give the ELBO, not the loss."),
        (1 / elements, f"It is a mean over the {elements} elements of x: multiply it by them."),
        (-1 / elements, f"It is a loss, a mean over the {elements} elements of x: multiply it by minus their number."),
        (-1 / (elements * math.log(2)), f"It is in bits per dimension: multiply it by −log(2) · {elements}."),
        (float(batch), "It is a sum over the batch: divide it by the number of rows."),
        (-float(batch), "It is a loss, a sum over the batch: divide it by minus the number of rows."),
    ]


def _elbo(result: Any, x: Tensor) -> Tensor:
    """(batch,), or () for a mean over the batch."""
    if isinstance(result, float) or (hasattr(result, "__array__") and not isinstance(result, Tensor)):
        result = torch.as_tensor(result)
    if isinstance(result, Tensor) and result.is_floating_point() and result.shape in ((len(x),), ()):
        return result.detach().to(x)
    got = f"{result.dtype} of shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
    raise ArgumentError(f"elbo: expected ({len(x)},), nats per observation, or their mean, a scalar. Got {got}.")


# ----------------------------------------------------------------------------------------------------------- what both read


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


def _first(value: Tensor) -> float:
    return float(value[0])


def _values(drawn: Tensor, analytic: Tensor, shown: Callable[[Tensor], float] = _first) -> str:
    exact = "" if bool(analytic.isnan().any()) else f", KL(q ‖ p) = {shown(analytic):.6g}"
    return f"log q − log p = {shown(drawn):.6g}{exact}"
