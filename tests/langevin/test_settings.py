"""What users set about a chain: numbers of any kind, and refusals in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_priors import lively, mlp

from energy_prior import ArgumentError
from energy_prior.langevin import ChainSettings


def test_numbers_of_any_kind_are_kept_as_pythons_own() -> None:
    settings = ChainSettings(
        steps=np.int64(5),  # type: ignore[arg-type]
        step_size=torch.tensor(0.25),  # type: ignore[arg-type]
        adjust=np.bool_(True),  # type: ignore[arg-type]
        temperature=np.float32(2),  # type: ignore[arg-type]
        max_drift=torch.tensor(3),  # type: ignore[arg-type]
        max_memory=np.int32(1000),  # type: ignore[arg-type]
    )
    values = settings.steps, settings.step_size, settings.adjust, settings.temperature, settings.max_drift, settings.max_memory
    assert values == (5, 0.25, True, 2.0, 3.0, 1000.0)
    assert [type(value) for value in values] == [int, float, bool, float, float, float]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", -1),
        ("steps", 2.5),
        ("step_size", 0),
        ("temperature", float("nan")),
        ("max_drift", 0.0),
        ("max_drift", True),
        ("adjust", 1),
        ("adjust", "yes"),
        ("scheme", "heun"),
        ("backend", "fast"),
        ("backend", "_loops"),
        ("precision", "half"),
        ("max_memory", 0),
    ],
)
def test_bad_options(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"{name}: expected"):
        ChainSettings(**{name: value})
    with pytest.raises(ArgumentError, match=f"{name}: expected"):
        lively(mlp()).sample_latents(2, **{name: value})


def test_the_backends_that_there_are_are_listed() -> None:
    with pytest.raises(ArgumentError, match=r"'auto', 'compiled', 'eager', 'graph'\)"):
        ChainSettings(backend="fast")


def test_an_unknown_option_is_told_with_the_nearest_name() -> None:
    with pytest.raises(ArgumentError, match="Did you mean 'max_drift'"):
        ChainSettings.of({"max_drft": 1.0})  # type: ignore[typeddict-unknown-key]


def test_the_scheme_of_a_space() -> None:
    assert ChainSettings().scheme_in("noise") == "crank_nicolson"
    assert ChainSettings().scheme_in("latent") == "euler"
    assert ChainSettings(scheme="euler").scheme_in("noise") == "euler"
    with pytest.raises(ArgumentError, match='needs space="noise"'):
        ChainSettings(scheme="crank_nicolson").scheme_in("latent")
