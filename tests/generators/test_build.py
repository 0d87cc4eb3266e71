"""How recipes and checkpoints describe the built-in generators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from energy_prior import ArgumentError, CheckpointError, LadderVAE, ResidualVAE
from energy_prior.generators.build import (
    check_arguments,
    describe_generator,
    generator_of,
    made,
    read_generator,
    weights_of,
    write_generator,
)

LADDER: dict[str, Any] = {"latent_dims": [3, 2], "hidden": 8, "nets": "conv", "likelihood": "mixture"}
SIZES_OF_NUMPY: Any = (np.array([5]), np.array([3, 2]))
RESIDUAL: dict[str, Any] = {"groups": [2, 1], "channels": 8, "latent_channels": 2, "downsample": 0, "mixtures": 2}


@pytest.mark.parametrize(
    "make",
    [
        lambda: LadderVAE((1, 4, 4)),
        lambda: LadderVAE((3, 6, 6), **LADDER),
        lambda: LadderVAE(*SIZES_OF_NUMPY, hidden=7, depth=1, sigma=0.3, x_range=(-1, 1)),
        lambda: ResidualVAE((3, 8, 8), **RESIDUAL),
        lambda: ResidualVAE((1, 8, 8), groups=(1,), channels=4, cells=2, tower_cells=0, likelihood="gaussian", sigma=0.1),
        lambda: ResidualVAE((1, 8, 8), groups=(1,), channels=4, prior_temperature=0.7, checkpointing=True, levels=9),
    ],
)
def test_written_and_built_again(make: Any, tmp_path: Path) -> None:
    """The same weights and settings."""
    torch.manual_seed(3)
    generator = make()
    again = there_and_back(tmp_path / "f", generator)
    assert type(again) is type(generator)
    assert describe_generator(again) == describe_generator(generator)
    assert (again.x_shape, again.latent_shapes) == (generator.x_shape, generator.latent_shapes)
    assert str(again) == str(generator)
    for ours, theirs in zip(again.state_dict().values(), generator.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in generator.parameters()]


def there_and_back(path: Path, generator: LadderVAE | ResidualVAE) -> LadderVAE | ResidualVAE:
    write_generator(path, generator, describe_generator(generator) or {}, generator.x_shape)
    return generator_of(read_generator(path))


@pytest.mark.parametrize(("dtype", "default"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_another_dtype(dtype: torch.dtype, default: torch.dtype, tmp_path: Path) -> None:
    """That of the weights is kept, whatever torch's default is; and no random number is drawn."""
    generator = ResidualVAE((3, 8, 8), **RESIDUAL).to(dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        torch.manual_seed(0)
        again = there_and_back(tmp_path / "f", generator)
        drawn = torch.rand(1)
    finally:
        torch.set_default_dtype(before)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1, dtype=default), drawn)
    assert {value.dtype for value in again.state_dict().values()} == {dtype}


def test_a_temperature_that_is_set_later(tmp_path: Path) -> None:
    generator = ResidualVAE((3, 8, 8), **RESIDUAL)
    generator.prior_temperature = 0.8
    again = there_and_back(tmp_path / "f", generator)
    assert isinstance(again, ResidualVAE)
    assert again.prior_temperature == 0.8


def test_others_are_not_described() -> None:
    class Own(LadderVAE):
        pass

    assert describe_generator(Own((1, 4, 4))) is None
    assert describe_generator(torch.nn.Linear(1, 1)) is None


def test_shapes_of_weights() -> None:
    torch.manual_seed(0)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    shapes = weights_of("LadderVAE", (3, 6, 6), LADDER)
    assert torch.equal(torch.rand(1), drawn), "no random number is drawn"
    assert shapes == {name: value.shape for name, value in LadderVAE((3, 6, 6), **LADDER).state_dict().items()}


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("LadderVAE", {"groups": [2]}, "generator.groups: not an argument of LadderVAE. There are latent_dims, hidden"),
        ("ResidualVAE", {"hidden": 2}, "generator.hidden: not an argument of ResidualVAE. There are groups"),
        ("ResidualVAE", {"groups": []}, "generator.groups: expected the groups of at least one scale"),
        ("ResidualVAE", {"groups": [0, 1]}, "generator.groups: expected a whole number of at least 1, got 0"),
        ("ResidualVAE", {"channels": "x"}, "generator.channels: expected a whole number of at least 1, got 'x'"),
        ("LadderVAE", {"latent_dims": [2, "x"]}, "generator.latent_dims: expected a whole number of at least 1, got 'x'"),
        ("LadderVAE", {"nets": "x"}, "generator.nets: "),
        ("print", {}, "generator.kind: expected one of LadderVAE, ResidualVAE, got 'print'"),
    ],
)
def test_impossible_arguments(kind: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{words}"):
        made(kind, (1, 8, 8), settings)
    with pytest.raises(ArgumentError, match=f"^{words}"):
        check_arguments(kind, settings)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("LadderVAE", {"latent_dims": [2] * 10_000, "depth": 10**9, "hidden": 10**5}),
        ("ResidualVAE", {"groups": [10**9, 3, 2, 4, 5], "cells": 10**9, "tower_cells": 10**8, "downsample": 7}),
    ],
)
def test_arguments_are_checked_without_making_what_they_ask_for(kind: str, settings: dict[str, Any]) -> None:
    check_arguments(kind, settings)


def test_a_description_of_another_one(tmp_path: Path) -> None:
    generator = ResidualVAE((3, 8, 8), **RESIDUAL)
    described, path = describe_generator(generator) or {}, tmp_path / "here"
    for change, shape, words in (
        ({"channels": 9}, (3, 8, 8), "the generator that it describes has other weights"),
        ({}, (1, 8, 8), "the generator that it describes has other weights"),
        ({"kind": "Other"}, (3, 8, 8), "it describes a generator that this version does not have"),
        ({"cells": 10**9}, (3, 8, 8), "it asks for more layers than it has weights"),
        ({"sigma": -1}, (3, 8, 8), "generator.sigma: expected a finite number above 0, got -1"),
    ):
        write_generator(path, generator, described | change, shape)
        with pytest.raises(CheckpointError, match=f"here' is damaged: {words}.* Ask for another"):
            generator_of(read_generator(path), "Ask for another.")
    with torch.no_grad():
        generator.top.fill_(float("nan"))
    write_generator(path, generator, described, (3, 8, 8))
    with pytest.raises(CheckpointError, match="top is not finite"):
        generator_of(read_generator(path))
