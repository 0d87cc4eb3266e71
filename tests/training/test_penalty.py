"""What holds energies back: penalty, wall, and the weight that follows the gap."""

from __future__ import annotations

import pytest
import torch
from runs import make, task_of

from energy_prior.training import energy_penalty
from energy_prior.training.penalty import PenaltyWeight, energy_wall


def test_energy_penalty() -> None:
    assert float(energy_penalty(torch.tensor([1.0, 3.0]), torch.tensor([2.0]))) == pytest.approx(9.0)


def test_energy_wall_acts_beyond_the_bound_layer_by_layer() -> None:
    inside, outside = torch.tensor([[5.0, -24.0]]), torch.tensor([[27.0, -28.0]])  # Σf hardly differs from 0
    assert float(energy_wall(inside, inside)) == 0
    assert float(energy_wall(inside, outside)) == pytest.approx(4.0 + 9.0)


def test_the_weight_follows_the_gap() -> None:
    """It rises while prior draws lag behind f, up to 0.1, and falls back after."""
    weight = PenaltyWeight(1e-3, 1.0, torch.zeros(2, dtype=torch.float64))
    assert weight.value.dtype == torch.float64
    for gap, times, least, most in ((0.5, 10, 1e-3, 1e-3), (4.0, 60, 5e-3, 0.1), (50.0, 500, 0.1, 0.1), (0.0, 300, 1e-3, 1e-3)):
        for _ in range(times):
            weight.update(torch.tensor(gap))
        assert least - 1e-9 <= float(weight.value) <= most + 1e-9


def test_a_weight_of_zero_stays_zero() -> None:
    weight = PenaltyWeight(0.0, 1.0, torch.zeros(()))
    for _ in range(100):
        weight.update(torch.tensor(50.0))
    assert float(weight.value) == 0


def test_the_weight_goes_on_where_it_stood() -> None:
    first, second = (PenaltyWeight(1e-3, 1.0, torch.zeros(())) for _ in range(2))
    for _ in range(20):
        first.update(torch.tensor(4.0))
    second.load_state(first.state())
    for weight in (first, second):
        weight.update(torch.tensor(0.5))
    assert torch.equal(first.value, second.value)
    assert float(first.value) > 1e-3


def test_nce_leaves_the_weight_alone() -> None:
    for method, moved in (("nce", False), ("two_stage", True)):
        task = task_of(make(), method)
        task._gaps = [torch.tensor(50.0)]
        task.updated(1)
        assert (float(task.penalty.value) > 1e-3 + 1e-9) == moved
