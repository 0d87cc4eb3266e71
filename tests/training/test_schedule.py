"""The learning rate over a run."""

from __future__ import annotations

import pytest

from energy_prior.training.schedule import warmup_cosine


def test_schedule_warms_up_and_decays_to_a_tenth() -> None:
    for iterations, warmup in ((110, 11), (2000, 100), (5, 0)):
        rates = [warmup_cosine(t, iterations) for t in range(iterations)]
        assert rates[: warmup + 1] == pytest.approx([*((t + 1) / warmup for t in range(warmup)), 1.0])
        assert warmup_cosine(iterations, iterations) == pytest.approx(0.1)
        assert all(a > b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
