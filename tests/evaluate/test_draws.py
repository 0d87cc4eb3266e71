"""Figures of draws: the two-sample test on known pairs, effective sample sizes of known chains."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_info, threadpool_limits

from energy_prior import ArgumentError, ShapeError
from energy_prior.evaluate import effective_sample_size, maximum_mean_discrepancy, two_sample_accuracy


def test_two_sample_accuracy_on_pairs_that_differ_and_that_do_not() -> None:
    g = torch.Generator().manual_seed(0)

    def draws(n: int, shift: float) -> torch.Tensor:
        return torch.randn(n, 2, generator=g) + shift

    same = two_sample_accuracy(draws(800, 0), draws(800, 0), draws(2000, 0), draws(2000, 0), epochs=10)
    apart = two_sample_accuracy(draws(800, 0), draws(800, 1), draws(2000, 0), draws(2000, 1), epochs=10)
    assert same == pytest.approx(0.5, abs=0.04)
    best = float(torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(0.5**0.5)))  # of two unit Gaussians √2 apart
    assert apart == pytest.approx(best, abs=0.03)


def test_two_sample_accuracy_takes_one_thread_and_gives_the_others_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def threads() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    seen: list[set[int]] = []
    fit = MLPClassifier.fit

    def spy(self: MLPClassifier, x: Any, y: Any) -> MLPClassifier:
        seen.append(threads())
        return fit(self, x, y)

    monkeypatch.setattr(MLPClassifier, "fit", spy)
    draws = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    with threadpool_limits(2, "blas"):
        two_sample_accuracy(draws, draws, draws, draws, epochs=1)
        after = threads()
    assert seen == [{1}]
    assert after == {2}


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


def test_maximum_mean_discrepancy_of_known_gaussians() -> None:
    """Of N(0, I) and N(m, I) it is (h²/(h² + 2))^{d/2} (2 − 2 exp(−‖m‖²/(2 (h² + 2)))), squared."""
    g = torch.Generator().manual_seed(0)
    a, b, h = torch.randn(3000, 2, generator=g), torch.randn(2500, 2, generator=g) + torch.tensor([0.6, 0.8]), 1.5
    expected = h**2 / (h**2 + 2) * (2 - 2 * math.exp(-1 / (2 * (h**2 + 2))))
    assert maximum_mean_discrepancy(a, b, bandwidth=h) == pytest.approx(math.sqrt(expected), rel=0.05)
    assert maximum_mean_discrepancy(a, torch.randn(2500, 2, generator=g)) < 0.02
    assert maximum_mean_discrepancy(a, b) == pytest.approx(maximum_mean_discrepancy(3 * a + 5, 3 * b + 5)), (
        "h follows the scale"
    )
    assert maximum_mean_discrepancy(torch.ones(3, 1), torch.ones(4, 1)) == 0
    near, far = torch.tensor([[0.0], [2.0]]), torch.tensor([[5.0], [7.0]])  # a draw is not compared with itself
    between = (2 * math.exp(-12.5) + math.exp(-24.5) + math.exp(-4.5)) / 4
    assert maximum_mean_discrepancy(near, far, bandwidth=1.0) == pytest.approx(math.sqrt(2 * math.exp(-2) - 2 * between))
    for wrong in (a[:1], a[:, :1], a[0]):
        with pytest.raises(ShapeError, match="a, b: expected two matrices"):
            maximum_mean_discrepancy(wrong, b)
    for name, pair in {"a": (a * torch.nan, b), "b": (a, b / 0)}.items():
        with pytest.raises(ArgumentError, match=f"{name}: expected finite values"):
            maximum_mean_discrepancy(*pair)
    with pytest.raises(ArgumentError, match="bandwidth: expected a finite number above 0"):
        maximum_mean_discrepancy(a, b, bandwidth=0.0)
