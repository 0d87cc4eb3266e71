"""`energy-prior evaluate`: its report against the functions that it is made of, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import picture
from torch import Tensor

from energy_prior import ArgumentError, JointEBMPrior, LadderVAE
from energy_prior._util import not_none
from energy_prior.cli.evaluate import evaluate_samples
from energy_prior.cli.main import main
from energy_prior.evaluate import gap_closed, inception_score, kernel_distance


def small() -> JointEBMPrior:
    torch.manual_seed(0)
    return JointEBMPrior(LadderVAE((1, 6, 6), latent_dims=(3, 2), hidden=8).eval())


def corners(images: Tensor) -> Tensor:
    """Features of four pixels."""
    return images[:, 0, :2, :2].flatten(1)


def test_distances_are_to_images_that_are_not_reconstructed() -> None:
    images = torch.rand(40, 1, 6, 6, generator=torch.Generator().manual_seed(0)).round()
    seen: list[Tensor] = []

    def features(x: Tensor) -> Tensor:
        seen.append(x)
        return corners(x)

    report = evaluate_samples(small(), images, draws=2, batch_size=8, features=features, steps=2)
    assert report["images"] == 20
    reference, others = torch.cat(seen[:3]), torch.cat(seen[3:6])
    both = {tuple(x.flatten().tolist()) for x in torch.cat([reference, others])}
    assert both == {tuple(x.flatten().tolist()) for x in images}
    assert report["real"]["kernel"]["mean"] == pytest.approx(kernel_distance(corners(others), corners(reference)))
    assert report["real"]["kernel"]["sd"] is None
    assert report["joint"]["frechet"]["sd"] > 0
    counts = {kind: len(report[kind]) for kind in ("real", "reconstructions", "generator", "joint")}
    assert set(counts.values()) == {5}
    assert report["joint"]["inception_score"] is None
    again = evaluate_samples(small(), images, draws=2, batch_size=8, features=corners, steps=2)
    assert again == report
    classes = lambda f: f.softmax(1)  # noqa: E731
    scored = evaluate_samples(small(), images, draws=2, features=corners, probabilities=classes, steps=2)
    assert scored["real"]["inception_score"]["mean"] == pytest.approx(inception_score(classes(corners(others))))


def test_share_of_the_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reconstructions are the images themselves, the generator's samples are dark, those of the joint prior half as dark."""
    prior, images = small(), torch.rand(60, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    noise = torch.Generator().manual_seed(2)

    def sample(self: Any, n: int, *, prior: str, **rest: Any) -> Tensor:
        share = 0.5 if prior == "joint" else 0.0
        return share * torch.rand(n, 1, 6, 6, generator=noise)

    monkeypatch.setattr(JointEBMPrior, "sample", sample)
    monkeypatch.setattr(JointEBMPrior, "reconstruct", lambda self, x, **rest: x)
    report = evaluate_samples(prior, images, features=corners)
    distances = [report[kind]["frechet"]["mean"] for kind in ("joint", "generator", "reconstructions")]
    assert report["gap_closed"] == pytest.approx(gap_closed(*distances))
    assert 0.3 < report["gap_closed"] < 0.9
    few = evaluate_samples(prior, images, features=lambda x: x.flatten(1))  # 36 features of 30 images
    assert few["joint"]["frechet"] is None
    kernels = [few[kind]["kernel"]["mean"] for kind in ("joint", "generator", "reconstructions")]
    assert few["gap_closed"] == pytest.approx(gap_closed(*kernels))
    monkeypatch.setattr(JointEBMPrior, "sample", lambda self, n, **rest: torch.rand(n, 1, 6, 6, generator=noise))
    assert evaluate_samples(prior, images, features=corners)["gap_closed"] is None, "no gap beyond the spread"


@pytest.mark.parametrize(
    ("images", "options", "words"),
    [
        (torch.rand(7, 1, 6, 6), {}, r"images: expected at least 8, \(n, 1, 6, 6\), got shape \(7, 1, 6, 6\)"),
        (torch.rand(9, 3, 6, 6), {}, r"got shape \(9, 3, 6, 6\)"),
        (torch.rand(9, 1, 6, 6), {"draws": 0}, "draws: expected a whole number of at least 1"),
        (torch.rand(9, 1, 6, 6), {"features": lambda x: x}, r"features: expected \(n, d\)"),
    ],
)
def test_bad_input(images: Tensor, options: dict[str, Any], words: str) -> None:
    settings: dict[str, Any] = {"features": corners} | options
    with pytest.raises(ArgumentError, match=words):
        evaluate_samples(small(), images, **settings)


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "photos" / "test"
    place.mkdir(parents=True)
    for i in range(12):
        picture(20 * i, (6, 6)).save(place / f"{i}.png")
    monkeypatch.setitem(not_none(evaluate_samples.__kwdefaults__), "features", corners)
    words = ["evaluate", str(run), "--data", str(tmp_path / "photos"), "--draws", "2", "--steps", "2"]
    assert main([*words, "--out", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    for text in ("6 images a side, 2 draws", "joint prior", "reconstructions", "gap between"):
        assert text in printed
    assert (tmp_path / "report" / "samples.png").stat().st_size > 1000
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "report" / "report.json").read_text())
    assert main([*words, "--draws", "two"]) == 2
    assert "--draws: expected a whole number, got 'two'" in capsys.readouterr().err
