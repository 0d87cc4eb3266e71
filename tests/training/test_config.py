"""Settings of a run: defaults by method and length, and numbers of any kind."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from energy_prior import ArgumentError
from energy_prior.training import ElboConfig, FitConfig, RunConfig


@pytest.mark.parametrize(("iterations", "rate"), [(10_000, 1e-3), (2000, 1e-3), (500, 2e-3), (20, 3e-3)])
def test_the_learning_rate_follows_the_length_of_the_run(iterations: int, rate: float) -> None:
    """1e-3 · √(2000/iterations) between 1e-3 and 3e-3, where none is given."""
    assert FitConfig(iterations=iterations).for_method("nce").learning_rate == pytest.approx(min(rate, 3e-3))
    assert FitConfig(iterations=iterations, learning_rate=5e-4).for_method("nce").learning_rate == 5e-4
    assert FitConfig(iterations=iterations).for_method("denoising").learning_rate == 2e-3
    assert FitConfig(iterations=iterations).for_method("two_stage", refined=True).learning_rate == 1e-4
    assert FitConfig(iterations=iterations).for_method("nce", refined=True).learning_rate == pytest.approx(min(rate, 3e-3))


def test_a_config_knows_its_method() -> None:
    assert FitConfig().for_method("joint").restart_probability == 0.3
    assert FitConfig().for_method("multi_stage_nce").restart_probability == 0.05
    assert FitConfig(restart_probability=0.5).for_method("nce").restart_probability == 0.5


def test_resumable_settings_leave_out_what_only_shows() -> None:
    assert "progress" not in FitConfig().resumable()
    assert "learning_rate" in FitConfig().resumable()


KINDS: dict[str, Callable[[Any], Any]] = {
    "numpy": lambda v: {int: np.int64, float: np.float32, bool: np.bool_}[type(v)](v),
    "tensor": lambda v: v if isinstance(v, bool) else torch.tensor(v),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [FitConfig, ElboConfig])
def test_numbers_of_any_kind_become_pythons_own(config: type[RunConfig], kind: str) -> None:
    chosen = {"batch_size": 8, "learning_rate": 0.5, "kl_warmup": 5, "persistent": 16, "step_size": 0.25}
    chosen |= {"restart_probability": 0.5, "ema_decay": 0.5}
    fields = {f.name: chosen.get(f.name, f.default) for f in dataclasses.fields(config)}
    given: dict[str, Any] = {name: value if isinstance(value, str) else KINDS[kind](value) for name, value in fields.items()}
    made = config(**given)
    for name, value in fields.items():
        got = getattr(made, name)
        assert type(got) is type(value), name
        assert got == pytest.approx(value), name
    json.dumps(made.resumable())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"iterations": np.float64(3.0)}, "iterations: expected a whole number"),
        ({"steps": torch.tensor([3])}, "steps: expected a whole number"),
        ({"progress": 1}, "progress: expected True or False"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number above 0"),
        ({"learning_rate": True}, "learning_rate: expected a finite number above 0"),
        ({"restart_probability": 1.5}, r"restart_probability: expected a share in \[0, 1\]"),
        ({"ema_decay": 1}, r"ema_decay: expected a number in \[0, 1\)"),
        ({"persistent": -1}, "persistent: expected a whole number of at least 0"),
    ],
)
def test_what_is_no_such_number_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        FitConfig(**settings)
