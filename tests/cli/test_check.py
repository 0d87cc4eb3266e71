"""`energy-prior check`: a generator of the current folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from pictures import picture

from energy_prior.cli.check import FAULTS
from energy_prior.cli.main import main

MODELS = """
import torch
from energy_prior import Inferred, LadderVAE


def right():
    torch.manual_seed(0)
    return LadderVAE((1, 8, 8), latent_dims=(3, 2), hidden=8).eval()


def vectors():
    return LadderVAE((5,), latent_dims=(3, 2), hidden=8).eval()


def ranged():
    generator = right()
    generator.x_range = (10.0, 11.0)
    return generator


class Swapped(LadderVAE):
    def infer(self, x, *, rng=None):
        found = super().infer(x, rng=rng)
        return Inferred(found.latents, found.log_q.flip(1))


def wrong():
    torch.manual_seed(0)
    return Swapped((1, 8, 8), latent_dims=(3, 2), hidden=8).eval()


def raising():
    raise ValueError("no weights")
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models_of_mine.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "models_of_mine", raising=False)


def test_what_is_right_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "models_of_mine:right"]) == 0
    printed = capsys.readouterr().out
    assert "no faults found in 4 observations" in printed
    assert "- shapes, types and layer order agree" in printed
    place = tmp_path / "photos" / "train"
    place.mkdir(parents=True)
    for i in range(3):
        picture(60 * i, (9, 8), "RGB").save(place / f"{i}.png")
    assert main(["check", "models_of_mine:right", "--data", "photos", "--number", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["faults"] is None
    assert len(report["right"]) > 3


def test_images_are_brought_to_the_range_that_the_model_says() -> None:
    """Those that leave it are a warning, which is an error in tests."""
    assert main(["check", "models_of_mine:ranged"]) == 0


def test_faults_are_named_and_have_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "models_of_mine:wrong"]) == FAULTS
    assert "Swapped breaks the generator protocol" in capsys.readouterr().out
    assert main(["check", "models_of_mine:wrong", "--json"]) == FAULTS
    assert "log_q" in json.loads(capsys.readouterr().out)["faults"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["models_of_mine"], 'factory: expected "module:function"'),
        (["models_of_mine:none"], "factory: cannot import"),
        (["models_of_mine:raising"], "raised ValueError: no weights"),
        (["models_of_mine:right", "--number", "1"], "--number: expected a whole number of at least 2, got 1"),
        (["models_of_mine:vectors", "--data", "photos"], "--data: the generator makes no images"),
    ],
)
def test_errors_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
