"""The learning rate over a run."""

from __future__ import annotations

import pytest

from energy_prior.training.schedule import warmup_cosine


def test_schedule_warms_up_and_decays_to_a_tenth() -> None:
    rates = [warmup_cosine(t, 10, 110) for t in range(110)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False))
