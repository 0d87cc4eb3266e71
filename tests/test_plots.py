"""Plots: each writes a picture that is not blank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from energy_prior import ArgumentError, ShapeError


def test_plots_write_readable_pictures(tmp_path: Any) -> None:
    from matplotlib.image import imread

    from energy_prior import plots

    images = torch.rand(10, 3, 5, 7)
    plots.image_panels(tmp_path / "a.png", {"left": images, "right": images[:, :1]}, columns=4)
    plots.chain_strip(tmp_path / "b.png", torch.rand(2, 3, 1, 4, 4), torch.tensor([0, 5, 10]), torch.randn(3, 2))
    scores = {name: (torch.randn(30), torch.randn(20) + 1) for name in ("one", "two", "three")}
    plots.score_histograms(tmp_path / "c.png", scores, known="in", unknown="out")
    scores["one"][1][0] = torch.inf
    plots.detection_curves(tmp_path / "d.png", scores, known="in", unknown="out")
    surprises = {name: torch.rand(10) * 9 for name in ("reconstruction", "rate", "negative_energy", "norms")}
    plots.explanation(tmp_path / "e.png", images, surprises, most=5)
    for name in "abcde":
        picture = imread(tmp_path / f"{name}.png")
        assert picture.shape[2] == 4
        assert picture.std() > 0.05, "not blank"


def test_panels_are_as_high_as_the_highest_grid_and_wrap(tmp_path: Any) -> None:
    from matplotlib.image import imread

    from energy_prior import plots

    def size(**panels: int) -> tuple[int, ...]:
        images = {name: torch.rand(count, 1, 8, 8) for name, count in panels.items()}
        plots.image_panels(tmp_path / "a.png", images, columns=4)
        return imread(tmp_path / "a.png").shape[:2]

    low, high, both = size(a=4, b=4), size(a=16, b=16), size(a=4, b=16)
    assert both == high
    assert high[0] > 2 * low[0]
    seven = size(**{f"panel {i}": 4 for i in range(7)})
    assert seven == pytest.approx((2 * low[0], 2 * low[1]), abs=2), "two rows of four"


@pytest.mark.parametrize(
    ("panels", "words"),
    [
        ({}, "panels: expected one or more, got none"),
        ({"a": torch.rand(3, 5, 7)}, r"panels\['a'\]: expected a tensor of images.*got \(3, 5, 7\)"),
        ({"a": torch.rand(0, 1, 5, 7)}, r"got \(0, 1, 5, 7\)"),
        ({"a": torch.rand(2, 1, 5, 7).numpy()}, "got ndarray"),
    ],
)
def test_panels_of_no_images(panels: Any, words: str, tmp_path: Any) -> None:
    from energy_prior import plots

    with pytest.raises((ArgumentError, ShapeError), match=words):
        plots.image_panels(tmp_path / "a.png", panels)
