"""How near two results must be to count as one: rounding of the dtype, far below an error of 1 % in a scale."""

from __future__ import annotations

__all__ = ["gaussian_rounding", "near", "relative", "same_conditional", "same_log_density", "same_tensors"]

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution

from energy_prior._util import sum_event
from energy_prior.conditionals import tensors_of

_ELEMENT_FACTOR = 10.0  # of one element over that of the largest: a net's error goes with its largest features


def relative(dtype: torch.dtype) -> float:
    """The relative difference up to which two ways to compute one number may differ: 1e-9 in float64, 1e-4 in float32."""
    return 1e-9 if dtype == torch.float64 else 1e-4


def near(a: Tensor, b: Tensor, floor: float = 1.0) -> bool:
    """|a − b| within rounding.

    Args:
        a: one result.
        b: the other, of the same shape.
        floor: magnitude below which numbers count as 0.
    """
    if a.shape != b.shape:
        return False
    a, b = a.detach(), b.detach()
    finite = torch.maximum(a.abs(), b.abs()).nan_to_num(0.0, 0.0, 0.0)  # of sizes only
    largest = float(finite.max()) if a.numel() else 0.0
    r = relative(a.dtype)
    return bool(torch.allclose(a, b, rtol=r, atol=0.1 * r * (largest + floor), equal_nan=True))


def same_conditional(p: Distribution, q: Distribution) -> bool:
    """Two conditionals of one layer are one within rounding; small scales count by their own size."""
    return same_tensors(tensors_of(p), tensors_of(q))


def same_tensors(p: Sequence[Tensor], q: Sequence[Tensor]) -> bool:
    """`same_conditional` of what two conditionals are made of."""
    return all(
        bool(torch.allclose(a, b, rtol=_ELEMENT_FACTOR * relative(a.dtype), atol=relative(a.dtype) * _size(a, b)))
        for a, b in zip((t.detach() for t in p), (t.detach() for t in q), strict=True)
    )


def same_log_density(a: Tensor, b: Tensor, elements: int, rounding: Tensor | float = 0.0) -> bool:
    """Sums of `elements` log densities of order 1, (batch,), nats; `rounding` is what else they may differ by."""
    a, b = a.detach(), b.detach()
    allowed = relative(a.dtype) * (torch.maximum(a.abs(), b.abs()) + elements) + rounding
    return a.shape == b.shape and bool((((a - b).abs() <= allowed) | (a == b) | (a.isnan() & b.isnan())).all())


def gaussian_rounding(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """What log N(z; loc, scale²) may be off by where the scale is so small that z itself is rounded, (batch,), nats."""
    z, loc, scale = z.detach(), loc.detach(), scale.detach().abs()
    unit = 16 * torch.finfo(z.dtype).eps * (z.abs() + loc.abs()) / scale  # of (z − loc)/scale
    return sum_event(unit * ((z - loc) / scale).abs() + 0.5 * unit.square() + unit.clamp(max=1.0))


def _size(a: Tensor, b: Tensor) -> float:
    return float(torch.maximum(a.abs().max(), b.abs().max())) + 1e-4
