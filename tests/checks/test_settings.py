"""Settings from files: of any size and kind, each gets the documented error, in a few words."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
import torch

from energy_prior import ArgumentError, ShapeError
from energy_prior.checks.settings import (
    check_count,
    check_device,
    check_path,
    check_positive,
    check_settings,
    check_shape,
    check_sizes,
)
from energy_prior.training import FitConfig

LONG = "x" * 10_000
LARGE = 10**6000


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: check_count("n", LONG), ArgumentError, "n: expected a whole number of at least 1, got 'xxx"),
        (lambda: check_count("n", -LARGE), ArgumentError, "n: expected a whole number of at least 1, got a int"),
        (lambda: check_positive("s", LARGE), ArgumentError, "s: expected a finite number above 0, got a int"),
        (lambda: check_sizes("sizes", LONG), ArgumentError, "sizes: expected a sequence of whole numbers, got 'xxx"),
        (lambda: check_shape("shape", [0] * 10_000), ShapeError, r"shape: expected one or more positive sizes, got \(0, 0"),
        (lambda: check_shape("shape", [2**63]), ShapeError, "shape: expected one or more positive sizes, got"),
        (lambda: check_shape("shape", [LARGE]), ShapeError, "shape: expected one or more positive sizes, got a tuple"),
        (
            lambda: check_path("path", "a\0b"),
            ArgumentError,
            r"path: expected a path, got 'a\\x00b', which holds the character 0",
        ),
        (lambda: check_settings(FitConfig, {1: 2}, "a setting"), ArgumentError, "1: not a setting. There are iterations"),  # type: ignore[dict-item]
        (
            lambda: check_settings(FitConfig, {datetime.date(2024, 1, 1): 2}, "a setting"),  # type: ignore[dict-item]
            ArgumentError,
            "2024-01-01: not a setting",
        ),
        (lambda: check_settings(FitConfig, {LONG: 2}, "a setting"), ArgumentError, "x*…: not a setting"),
        (
            lambda: check_settings(FitConfig, {"iteration": 2}, "a setting"),
            ArgumentError,
            "iteration: not a setting. Did you mean 'iterations'",
        ),
        (lambda: check_device("device", "meta"), ArgumentError, "device meta: not available here"),
        (lambda: check_device("device", LONG), ArgumentError, "device x*…: not available here"),
        (lambda: check_device("device", "cuda:99999999999999999999"), ArgumentError, "device cuda:9*: not available here"),
    ],
)
def test_messages_are_short_whatever_came(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"^{words}") as caught:
        call()
    assert len(str(caught.value)) < 700


def test_what_is_right_is_kept() -> None:
    assert check_shape("shape", [2**63 - 1]) == torch.Size([2**63 - 1])
    assert check_device("device", "cpu") == "cpu"
