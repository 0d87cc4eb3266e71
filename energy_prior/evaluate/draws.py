"""Figures of draws: how many a chain is worth, whether two sets of them can be told apart."""

from __future__ import annotations

__all__ = ["effective_sample_size", "maximum_mean_discrepancy", "two_sample_accuracy"]

import threading
import warnings

import torch
from torch import Tensor

from energy_prior.checks.settings import check_positive, require_extra
from energy_prior.errors import ArgumentError, ShapeError

_FOR_MEDIAN, _AT_ONCE = 1000, 1000  # draws
_ALONE = threading.Lock()  # the number of BLAS's threads is the process's


def effective_sample_size(series: Tensor) -> Tensor:
    """Effective sample size of one chain of T steps, T/(1 + 2 Σ_t ρ_t), in (0, T].

    ρ_t is the autocorrelation at lag t, pooled over the chains about their common mean (chains that stay apart count as
    correlated). The sum ends where two neighbouring terms add up to less than 0 (Geyer, Statistical Science 1992).

    Args:
        series: d quantities of any unit along the chains, (T, chains, d), T ≥ 4.

    Returns:
        The effective number of steps of each quantity, (d,), no unit.

    Raises:
        ShapeError: if the shape is another.

    Examples:
        >>> draws = torch.randn(2000, 4, 1, generator=torch.Generator().manual_seed(0))
        >>> chains = draws.repeat_interleave(10, 0)  # 20,000 steps, which move at every tenth
        >>> float(effective_sample_size(chains).round(decimals=-2))
        2000.0
    """
    if series.ndim != 3 or len(series) < 4:
        raise ShapeError(f"series: expected shape (T, chains, d) with T of at least 4, got {tuple(series.shape)}.")
    steps = len(series)
    centred = series.double() - series.double().mean((0, 1))
    spectrum = torch.fft.rfft(centred, n=2 * steps, dim=0)
    covariance = torch.fft.irfft(spectrum.abs() ** 2, n=2 * steps, dim=0)[:steps].mean(1) / steps
    correlation = covariance / covariance[0].clamp_min(1e-300)
    pairs = correlation[: steps // 2 * 2].reshape(steps // 2, 2, -1).sum(1)
    positive = (pairs > 0).long().cumprod(0)
    return steps / (2 * (pairs * positive).sum(0) - 1).clamp_min(1.0)


def maximum_mean_discrepancy(a: Tensor, b: Tensor, *, bandwidth: float | None = None) -> float:
    """The distance of two sets of draws in the Gaussian kernel exp(−‖x − y‖²/(2 h²)), ≥ 0 (Gretton et al., JMLR 2012).

    The root of the unbiased estimate of MMD² = E k(x, x′) + E k(y, y′) − 2 E k(x, y), or 0 where that is below 0. MMD is 0 only
    where both are draws of one distribution; the estimate's error is about 1/√n.

    Args:
        a: draws, (n, d), of any unit, n ≥ 2.
        b: draws, (m, d), of the same unit, m ≥ 2.
        bandwidth: h > 0, of the same unit; None: the median distance between draws of `a`.

    Raises:
        ShapeError: if they are not two matrices with the same d and two rows or more.
        ArgumentError: if a value is not finite, or the bandwidth is not above 0.

    Examples:
        >>> a, b = torch.randn(500, 2), torch.randn(500, 2)
        >>> maximum_mean_discrepancy(a, b) < 0.1 < maximum_mean_discrepancy(a, b + 1)
        True
    """
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ShapeError(
            f"a, b: expected two matrices (n, d) and (m, d) of two rows or more, got {tuple(a.shape)} and {tuple(b.shape)}."
        )
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    for name, draws in {"a": a, "b": b}.items():
        if not bool(torch.isfinite(draws).all()):
            raise ArgumentError(f"{name}: expected finite values, got NaN or infinity.")
    if bandwidth is None:
        bandwidth = max(float(torch.pdist(a[:_FOR_MEDIAN]).median()), 1e-12)
    scale = 2 * check_positive("bandwidth", bandwidth) ** 2

    def mean(x: Tensor, y: Tensor, alike: int = 0) -> Tensor:
        """Of k over all pairs but those of a draw with itself, of which there are `alike`."""
        total = torch.stack([torch.exp(-torch.cdist(part, y).square() / scale).sum() for part in x.split(_AT_ONCE)]).sum()
        return (total - alike) / (len(x) * len(y) - alike)

    square = mean(a, a, len(a)) + mean(b, b, len(b)) - 2 * mean(a, b)
    return float(square.clamp_min(0).sqrt())


def two_sample_accuracy(
    train_a: Tensor, train_b: Tensor, test_a: Tensor, test_b: Tensor, *, hidden: int = 128, epochs: int = 25, seed: int = 0
) -> float:
    """Classifier two-sample test: balanced accuracy of telling A from B on test draws, in [0, 1]; 0.5: no difference found.

    After Lopez-Paz and Oquab (ICLR 2017), with scikit-learn's perceptron of two hidden layers.

    Args:
        train_a: draws of A to train on, (n, d), of any unit; their mean and standard deviation standardise all inputs.
        train_b: draws of B to train on, (m, d), of the same unit.
        test_a: draws of A to test on, (k, d), of the same unit.
        test_b: draws of B to test on, (l, d), of the same unit.
        hidden: width of the two hidden layers.
        epochs: passes over the training draws.
        seed: random state of the classifier.

    Raises:
        MissingExtraError: if scikit-learn is not installed.

    Examples:
        >>> a, b = torch.randn(200, 2), torch.randn(200, 2) + 10
        >>> round(two_sample_accuracy(a[:100], b[:100], a[100:], b[100:]), 1)
        1.0
    """
    perceptron = require_extra("sklearn.neural_network", "eval").MLPClassifier
    mean, spread = train_a.mean(0), train_a.std(0).clamp_min(1e-12)
    unit = [((t - mean) / spread).cpu().numpy() for t in (train_a, train_b, test_a, test_b)]
    labels = torch.cat([torch.ones(len(train_a)), torch.zeros(len(train_b))]).numpy()
    net = perceptron((hidden, hidden), alpha=1e-3, batch_size=min(256, len(labels)), max_iter=epochs, random_state=seed)
    limited = require_extra("threadpoolctl", "eval").threadpool_limits
    with _ALONE, limited(1, "blas"), warnings.catch_warnings():  # more threads only stall beside other programs
        warnings.filterwarnings("ignore", message="Stochastic Optimizer: Maximum iterations")
        net.fit(torch.cat([torch.as_tensor(unit[0]), torch.as_tensor(unit[1])]).numpy(), labels)
    return 0.5 * float(net.predict(unit[2]).mean() + (1 - net.predict(unit[3])).mean())
