"""Figures of images: Fréchet distance against closed forms, features of EfficientNet-Lite0."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from energy_prior import ArgumentError, ShapeError
from energy_prior.evaluate import (
    excess_ratio,
    frechet_distance,
    gap_closed,
    inception_score,
    kernel_distance,
    precision_recall,
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
        (torch.zeros(1, 2), torch.zeros(4, 2), ShapeError, "at least 2 rows"),
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


def test_inception_score() -> None:
    """1 where all images look alike, the number of classes where each is of one for sure; else by its definition."""
    p = torch.tensor([[0.7, 0.3], [0.2, 0.8], [0.5, 0.5]])
    marginal = p.mean(0)
    expected = (p * (p / marginal).log()).sum(1).mean().exp()
    assert inception_score(p) == pytest.approx(float(expected), rel=1e-6)
    assert inception_score(p[:1].expand(4, -1)) == pytest.approx(1)
    assert inception_score(torch.eye(7)) == pytest.approx(7)
    for wrong, error, words in (
        (p[0], ShapeError, r"expected \(n, classes\)"),
        (p.log(), ArgumentError, "Logits need a softmax"),
        (p * torch.nan, ArgumentError, "sum to 1"),
    ):
        with pytest.raises(error, match=words):
            inception_score(wrong)


def test_kernel_distance_is_the_unbiased_estimate() -> None:
    """Against the definition, and 0 on average where both sets are of one distribution, however few there are."""
    torch.manual_seed(0)
    a, b = torch.randn(7, 4).double(), torch.randn(5, 4).double() + 1

    def k(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x @ y / 4 + 1) ** 3)

    within = [
        sum(k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j) / (len(x) * (len(x) - 1)) for x in (a, b)
    ]
    across = sum(k(x, y) for x in a for y in b) / 35
    assert kernel_distance(a, b) == pytest.approx(sum(within) - 2 * across, rel=1e-9)
    same = [kernel_distance(torch.randn(10, 4), torch.randn(10, 4)) for _ in range(400)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 20
    assert min(same) < 0


def test_precision_and_recall_of_sets_on_a_line() -> None:
    """Real points at 0, 1, …, 9; the third neighbour of an inner point is 2 away, of an end 3."""
    real = torch.arange(10.0)[:, None]
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    few = torch.tensor([0.0, 0.1, 0.2, 0.3, 50.0])[:, None]  # four of five are on the line; they reach little of it
    precision, recall = precision_recall(real, few)
    assert precision == pytest.approx(0.8)
    assert recall == 1.0  # the third neighbour of 50 is at 0.1, so that it reaches all but 0
    assert precision_recall(real, few[:4]) == (1.0, 0.1)
    with pytest.raises(ShapeError, match="at least 4 rows"):
        precision_recall(real[:3], real)
    with pytest.raises(ArgumentError, match="neighbours"):
        precision_recall(real, real, neighbours=0)


def test_gap_closed() -> None:
    assert gap_closed(2.0, 5.0, 1.0) == pytest.approx(0.75)
    assert gap_closed(6.0, 5.0, 1.0) == pytest.approx(-0.25)
    with pytest.raises(ArgumentError, match="above that of reconstructions"):
        gap_closed(2.0, 1.0, 1.0)
