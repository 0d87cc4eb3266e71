"""How recipes and checkpoints describe the built-in generators."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from energy_prior import ArgumentError, CheckpointError, LadderVAE, ResidualVAE
from energy_prior.generators.build import build_generator, check_arguments, describe_generator, made, weights_of

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
def test_built_again_from_its_description(make: Any) -> None:
    """Through JSON: the same weights and the same samples."""
    torch.manual_seed(3)
    generator = make()
    described = json.loads(json.dumps(describe_generator(generator)))
    again = build_generator("f", described, generator.state_dict())
    assert type(again) is type(generator)
    assert describe_generator(again) == describe_generator(generator)
    assert (again.x_shape, again.latent_shapes) == (generator.x_shape, generator.latent_shapes)
    assert str(again) == str(generator)
    for ours, theirs in zip(again.state_dict().values(), generator.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in generator.parameters()]


def test_a_temperature_that_is_set_later() -> None:
    generator = ResidualVAE((3, 8, 8), **RESIDUAL)
    generator.prior_temperature = 0.8
    described = describe_generator(generator) or {}
    again = build_generator("f", described, generator.state_dict())
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
    described, weights = describe_generator(generator) or {}, generator.state_dict()
    for change, words in (
        ({"channels": 9}, "the generator that it describes has other weights"),
        ({"x_shape": [1, 8, 8]}, "the generator that it describes has other weights"),
        ({"x_shape": None}, "it describes a generator that this version does not have"),
        ({"cells": 10**9}, "it asks for more layers than it has weights"),
        ({"sigma": -1}, "generator.sigma: expected a finite number above 0, got -1"),
    ):
        with pytest.raises(CheckpointError, match=f"'here' is damaged: {words}.* Train it again, or use another copy"):
            build_generator("here", described | change, weights)
    with pytest.raises(CheckpointError, match="top is not finite"):
        build_generator("here", described, weights | {"top": torch.full_like(weights["top"], float("nan"))})
