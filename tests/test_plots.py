"""Plots: each writes a picture that is not blank."""

from __future__ import annotations

from typing import Any

import torch


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
