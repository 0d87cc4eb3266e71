"""Settings of a run: defaults by method and length, and numbers of any kind."""

from __future__ import annotations

import pytest

from energy_prior.training import (
    FitConfig,
)


@pytest.mark.parametrize(("iterations", "rate"), [(10_000, 1e-3), (2000, 1e-3), (500, 2e-3), (20, 3e-3)])
def test_the_learning_rate_follows_the_length_of_the_run(iterations: int, rate: float) -> None:
    """1e-3 · √(2000/iterations) between 1e-3 and 3e-3, where none is given."""
    assert FitConfig(iterations=iterations).for_method("nce").learning_rate == pytest.approx(min(rate, 3e-3))
    assert FitConfig(iterations=iterations, learning_rate=5e-4).for_method("nce").learning_rate == 5e-4


def test_a_config_knows_its_method() -> None:
    assert FitConfig().for_method("joint").restart_probability == 0.3
    assert FitConfig().for_method("multi_stage_nce").restart_probability == 0.05
    assert FitConfig(restart_probability=0.5).for_method("nce").restart_probability == 0.5


def test_resumable_settings_leave_out_what_only_shows() -> None:
    assert "progress" not in FitConfig().resumable()
    assert "learning_rate" in FitConfig().resumable()
