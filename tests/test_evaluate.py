"""Figures: Fréchet distance against closed forms, the two-sample test on known pairs, detection on raw scores."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from energy_prior import ArgumentError, MissingExtraError, ShapeError
from energy_prior.cli.demo import load_demo_data
from energy_prior.evaluate import (
    detection,
    effective_sample_size,
    efficientnet_features,
    excess_ratio,
    frechet_distance,
    two_sample_accuracy,
)


def test_frechet_distance_of_known_gaussians() -> None:
    """Samples whitened to have exactly the moments asked for, so that the closed form holds exactly."""
    torch.manual_seed(0)

    def exactly(mean: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
        z = torch.randn(50, 3, dtype=torch.float64)
        z = z - z.mean(0)
        z = z @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T
        return mean + z @ torch.linalg.cholesky(covariance).T

    m = torch.randn(3, 3, dtype=torch.float64)
    cov_a, cov_b = m @ m.T + torch.eye(3).double(), torch.diag(torch.tensor([1.0, 2.0, 0.3])).double()
    mean_a, mean_b = torch.tensor([1.0, 0.0, -2.0]).double(), torch.zeros(3).double()
    root = torch.as_tensor(np.real(np.asarray(sqrtm((cov_a @ cov_b).numpy()))))
    expected = (mean_a - mean_b).square().sum() + (cov_a + cov_b - 2 * root).trace()
    assert frechet_distance(exactly(mean_a, cov_a), exactly(mean_b, cov_b)) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_of_a_set_to_itself_and_with_fewer_rows_than_features() -> None:
    x = torch.randn(10, 30)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(x, x + 1) == pytest.approx(30.0, rel=1e-5)
    assert frechet_distance(x[:, :1], x[:, :1] + 2) == pytest.approx(4.0, rel=1e-5)


@pytest.mark.parametrize(
    ("a", "b", "error", "words"),
    [
        (torch.zeros(4), torch.zeros(4, 2), ShapeError, "expected two matrices"),
        (torch.zeros(4, 3), torch.zeros(4, 2), ShapeError, r"got \(4, 3\) and \(4, 2\)"),
        (torch.zeros(1, 2), torch.zeros(4, 2), ShapeError, "at least two rows"),
        (torch.full((3, 2), float("nan")), torch.zeros(4, 2), ArgumentError, "expected finite values"),
    ],
)
def test_frechet_distance_bad_input(a: torch.Tensor, b: torch.Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        frechet_distance(a, b)


def test_excess_ratio() -> None:
    assert excess_ratio(2.0, 5.0, 1.0) == pytest.approx(0.25)
    with pytest.raises(ArgumentError, match="above the floor"):
        excess_ratio(2.0, 1.0, 1.0)


def test_two_sample_accuracy_on_pairs_that_differ_and_that_do_not() -> None:
    g = torch.Generator().manual_seed(0)

    def draws(n: int, shift: float) -> torch.Tensor:
        return torch.randn(n, 2, generator=g) + shift

    same = two_sample_accuracy(draws(800, 0), draws(800, 0), draws(2000, 0), draws(2000, 0), epochs=10)
    apart = two_sample_accuracy(draws(800, 0), draws(800, 1), draws(2000, 0), draws(2000, 1), epochs=10)
    assert same == pytest.approx(0.5, abs=0.04)
    best = float(torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(0.5**0.5)))  # of two unit Gaussians √2 apart
    assert apart == pytest.approx(best, abs=0.03)


def test_detection_keeps_scores_of_hundreds_of_nats_apart() -> None:
    """No sigmoid in float32, which would tie them."""
    known, unknown = torch.tensor([500.0, 501.0, 502.0]), torch.tensor([502.5, 503.0])
    assert detection(known, unknown) == (1.0, 1.0)
    assert detection(unknown, known).auroc == 0.0


def test_detection_takes_numbers_of_any_kind() -> None:
    """Lists, arrays, tensors that require gradients; infinite scores have their rank."""
    known, unknown = [1, 2.5, -float("inf")], np.array([3, 4], np.int16)
    assert detection(known, unknown) == (1.0, 1.0)
    grown = torch.tensor([float("inf"), 3.0], requires_grad=True)
    assert detection(torch.tensor(known, dtype=torch.bfloat16), grown) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("known", "unknown", "error", "words"),
    [
        ([], [1.0], ShapeError, "known: expected one score or more"),
        ([1.0], torch.zeros(0), ShapeError, "unknown: expected one score or more"),
        ([1.0], [[1.0]], ShapeError, r"unknown: .* got the shape \(1, 1\)"),
        ([1.0, float("nan")], [1.0], ArgumentError, "known: expected numbers, and 1 of 2 scores are NaN"),
        (["a"], [1.0], ShapeError, "known: expected scores, .* got list"),
        ([1.0], None, ShapeError, "unknown: expected scores, .* got NoneType"),
    ],
)
def test_what_detection_refuses(known: Any, unknown: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        detection(known, unknown)


def test_a_missing_extra_names_its_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(MissingExtraError, match=r'pip install "energy-prior\[eval\]"'):
        detection(torch.zeros(2), torch.ones(2))


def test_plots_write_readable_pictures(tmp_path: Any) -> None:
    from matplotlib.image import imread

    from energy_prior import plots

    images = torch.rand(10, 3, 5, 7)
    plots.image_panels(tmp_path / "a.png", {"left": images, "right": images[:, :1]}, columns=4)
    plots.chain_strip(tmp_path / "b.png", torch.rand(2, 3, 1, 4, 4), torch.tensor([0, 5, 10]), torch.randn(3, 2))
    scores = {name: (torch.randn(30), torch.randn(20) + 1) for name in ("one", "two", "three")}
    plots.score_histograms(tmp_path / "c.png", scores, known="in", unknown="out")
    for name in "abc":
        picture = imread(tmp_path / f"{name}.png")
        assert picture.shape[2] == 4
        assert picture.std() > 0.05, "not blank"


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_effective_sample_size_of_an_autoregression(rho: float) -> None:
    """x_t = ρ x_{t−1} + noise has autocorrelations ρ^t, so T steps are worth T (1 − ρ)/(1 + ρ)."""
    steps, chains = 4000, 8
    noise = torch.randn(steps, chains, 2, generator=torch.Generator().manual_seed(0)) * (1 - rho**2) ** 0.5
    x = [noise[0]]
    for n in noise[1:]:
        x.append(rho * x[-1] + n)
    size = effective_sample_size(torch.stack(x))
    assert size.shape == (2,)
    assert size.tolist() == pytest.approx([steps * (1 - rho) / (1 + rho)] * 2, rel=0.1)


def test_chains_that_stay_apart_are_worth_little() -> None:
    x = 0.1 * torch.randn(400, 4, 1) + torch.arange(4.0)[:, None]
    assert float(effective_sample_size(x)) < 3
    with pytest.raises(ShapeError, match="series: expected shape"):
        effective_sample_size(torch.zeros(3, 2, 1))


def test_features_of_images() -> None:
    """They tell digits from noise by far more than one half of the digits from the other; gray counts as three channels."""
    digits = load_demo_data(1, 0).train
    state = torch.get_rng_state()
    real = efficientnet_features(digits[:400])
    assert torch.equal(torch.get_rng_state(), state)
    assert real.shape == (400, 1280)
    assert real.dtype == torch.float32
    torch.testing.assert_close(
        efficientnet_features(digits[:5].expand(-1, 3, -1, -1), batch_size=2), real[:5], rtol=1e-3, atol=1e-4
    )
    near = frechet_distance(real[:200], real[200:])
    far = frechet_distance(real[:200], efficientnet_features(torch.rand(200, 1, 8, 8)))
    assert far > 5 * near
    assert efficientnet_features(digits[:0]).shape == (0, 1280)
    for wrong, error, words in (
        (255 * digits[:2], ArgumentError, r"values in \[0, 1\], got some from 0 to 2"),
        (digits[:2] * torch.nan, ArgumentError, "got some from nan"),
        (digits[0], ShapeError, r"expected \(n, 1 or 3, height, width\), got \(1, 8, 8\)"),
    ):
        with pytest.raises(error, match=words):
            efficientnet_features(wrong)
