"""Temperatures of a prior, t_1, …, t_L: factors on its σ, layer by layer."""

from __future__ import annotations

__all__ = ["check_temperatures", "numbers_of"]

from collections.abc import Iterable
from typing import Any

from energy_prior.checks.settings import real_number
from energy_prior.errors import ArgumentError


def check_temperatures(values: Any, layers: int) -> tuple[float, ...]:
    """(t_1, …, t_L) as Python's own numbers, from L of them or one for all."""
    one = real_number(values)
    found = numbers_of(values) if one is None else [one] * layers
    factors = tuple(t for t in found if t is not None and t > 0)
    if len(found) != layers or len(factors) != layers:
        raise ArgumentError(
            f"prior_temperature: expected a number above 0, or {layers} of them (that of z_1 first), got {values!r}."
        )
    return factors


def numbers_of(values: Any) -> list[float | None]:
    """The elements of an iterable as Python's own numbers, None for what is no finite number; empty if it is no iterable."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        return []
    return [real_number(value) for value in values]
