"""The learning rate over a run: a linear warm-up, then a cosine from its peak down to a tenth of it."""

from __future__ import annotations

__all__ = ["warmup_cosine"]

import math

_WARMUP = 100
_FLOOR = 0.1


def warmup_cosine(t: int, iterations: int) -> float:
    """(t + 1)/w for t < w = min(100, iterations/10), then 0.1 + 0.9 · ½ (1 + cos π u), u from 0 to 1; a factor of the peak.

    Args:
        t: updates done so far, ≥ 0.
        iterations: updates of the run.
    """
    warmup = min(_WARMUP, iterations // 10)
    if t < warmup:
        return (t + 1) / warmup
    progress = (t - warmup) / max(1, iterations - warmup)
    return _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
