"""`energy-prior evaluate`: its report, its picture and what it refuses."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from pictures import picture
from torch import Tensor

from energy_prior.cli import evaluate
from energy_prior.cli.main import main
from energy_prior.evaluate import SampleTask


def corners(images: Tensor, weights: str | None = None) -> Tensor:
    """Features of four pixels."""
    return images[:, 0, :2, :2].flatten(1)


def classes(features: Tensor, weights: str | None = None) -> Tensor:
    """Four of them."""
    assert weights == "weights.pth"
    return features.softmax(1)


@pytest.fixture
def photos(tmp_path: Path) -> str:
    """Twelve images in a folder."""
    place = tmp_path / "photos" / "test"
    place.mkdir(parents=True)
    for i in range(12):
        picture(20 * i, (6, 6)).save(place / f"{i}.png")
    return str(tmp_path / "photos")


def test_the_command(
    run: Path, photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate.SampleTask, "halves", functools.partial(SampleTask.halves, features=corners))
    words = ["evaluate", str(run), "--data", photos, "--draws", "2", "--steps", "2"]
    assert main([*words, "--out", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    for text in ("6 images a side, 2 draws", "generator's own prior", "joint prior", "reconstructions", "gap closed"):
        assert text in printed
    assert (tmp_path / "report" / "samples.png").stat().st_size > 1000
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "report" / "report.json").read_text())
    assert document["figures"]["joint prior"]["kernel"]["sd"] > 0
    assert main([*words, "--draws", "two"]) == 2
    assert "--draws: expected a whole number, got 'two'" in capsys.readouterr().err


def test_inception_is_asked_for_by_name(
    run: Path, photos: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["evaluate", str(run), "--data", photos, "--draws", "1", "--steps", "2", "--weights", "weights.pth"]
    assert main(words) == 2
    assert "--weights: they are Inception's" in capsys.readouterr().err
    seen: list[torch.Size] = []

    def features(images: Tensor, weights: str | None = None) -> Tensor:
        assert weights == "weights.pth"
        seen.append(images.shape)
        return corners(images)

    monkeypatch.setattr(evaluate, "inception_features", features)
    monkeypatch.setattr(evaluate, "inception_probabilities", classes)
    assert main([*words, "--features", "inception"]) == 0
    assert "features of Inception" in capsys.readouterr().out
    assert len(seen) == 5
