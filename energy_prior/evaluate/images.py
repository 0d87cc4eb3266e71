"""Figures of features of images: Fréchet and kernel distances, precision and recall, what a prior mends of a distance."""

from __future__ import annotations

__all__ = [
    "excess_ratio",
    "frechet_distance",
    "gap_closed",
    "inception_score",
    "kernel_distance",
    "precision_recall",
]

import torch
from torch import Tensor

from energy_prior.checks.settings import check_count
from energy_prior.errors import ArgumentError, ShapeError

_PART = 1000  # rows whose distances to all others are computed at a time
_SUMS_TO_ONE = 1e-3


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance of two sets of features, ‖m_a − m_b‖² + tr(C_a + C_b − 2 (C_a C_b)^{1/2}), ≥ 0.

    The squared 2-Wasserstein distance of Gaussians with the sets' means m and covariances C; the FID of Heusel et al. (NeurIPS
    2017) where the features are Inception's. Computed in float64.

    Args:
        features_a: features of the one set, (n, d), n ≥ 2.
        features_b: features of the other, (m, d), m ≥ 2.

    Raises:
        ShapeError: if they are not two matrices with the same d.
        ArgumentError: if a value is not finite.

    Examples:
        >>> features = torch.randn(100, 2)
        >>> round(frechet_distance(features, features + torch.tensor([3.0, 4.0])), 2)
        25.0
    """
    a, b = _two_sides(features_a, features_b, least=2)
    cov_a, cov_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def kernel_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Kernel distance of two sets of features: the unbiased estimate of their squared maximum mean discrepancy.

    With the kernel k(a, b) = (aᵀb/d + 1)³ it is the KID of Bińkowski et al. (ICLR 2018) where the features are Inception's.
    Unlike a Fréchet distance it is not biased where images are few: sets of any size compare, and it may be below 0.

    Args:
        features_a: features of the one set, (n, d), n ≥ 2.
        features_b: features of the other, (m, d), m ≥ 2.

    Raises:
        ShapeError: if they are not two matrices with the same d.
        ArgumentError: if a value is not finite.

    Examples:
        >>> a, b = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[1.0], [2.0], [3.0]])
        >>> round(kernel_distance(a, b), 2)
        21.67
    """
    a, b = _two_sides(features_a, features_b, least=2)

    def kernel(dots: Tensor) -> Tensor:
        return (dots / a.shape[1] + 1) ** 3

    def total(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([kernel(part @ y.T).sum() for part in x.split(_PART)]).sum()

    def within(x: Tensor) -> Tensor:
        return (total(x, x) - kernel(x.square().sum(1)).sum()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b)))


def precision_recall(real: Tensor, generated: Tensor, *, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., NeurIPS 2019), each in [0, 1].

    Precision is the share of generated images that lie within the k-th neighbour's distance of some real image, recall that of
    real ones that lie so near a generated one. Equal counts on both sides make two priors comparable.

    Args:
        real: features of real images, (n, d), n > `neighbours`.
        generated: features of generated ones, (m, d), m > `neighbours`.
        neighbours: k ≥ 1.

    Returns:
        Precision and recall.

    Raises:
        ShapeError: if they are not two matrices with the same d, or have too few rows.
        ArgumentError: if a value is not finite.

    Examples:
        >>> one = torch.arange(5.0)[:, None]
        >>> precision_recall(torch.cat([one, one + 100]), one)  # samples of one of two kinds of images
        (1.0, 0.5)
    """
    k = check_count("neighbours", neighbours)
    a, b = _two_sides(real, generated, least=k + 1)

    def covered(x: Tensor, by: Tensor) -> float:
        radius = torch.cdist(by, by).kthvalue(k + 1, dim=1).values  # the nearest is the image itself
        return float(torch.cat([(torch.cdist(part, by) <= radius).any(1) for part in x.split(_PART)]).double().mean())

    return covered(b, a), covered(a, b)


def inception_score(probabilities: Tensor) -> float:
    """exp of the mean of KL(p(y | x) ‖ p(y)) over images, p(y) the mean of p(y | x): from 1 to the number of classes.

    Of Salimans et al. (NeurIPS 2016), where the classifier is Inception's, in ten splits; here all images are one. It is high
    where each image is of one class for sure and all classes are there, and knows nothing of real images: compare with theirs.

    Args:
        probabilities: p(y | x) in [0, 1], (n, classes), each row a distribution, n ≥ 2.

    Raises:
        ShapeError: if that is no matrix, or has fewer rows.
        ArgumentError: if a row is no distribution.

    Examples:
        >>> round(inception_score(torch.eye(3)), 2)  # three images, each of a class of its own
        3.0
    """
    if probabilities.ndim != 2 or len(probabilities) < 2:
        raise ShapeError(f"probabilities: expected (n, classes) of two or more images, got {tuple(probabilities.shape)}.")
    p = probabilities.double()
    rounding = max(_SUMS_TO_ONE, 4 * torch.finfo(probabilities.dtype).eps) if probabilities.is_floating_point() else 0.0
    if not bool(((p >= 0).all(1) & ((p.sum(1) - 1).abs() <= rounding)).all()):
        raise ArgumentError("probabilities: expected rows of numbers of at least 0 that sum to 1. Logits need a softmax first.")
    p = p / p.sum(1, keepdim=True)
    return float((torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).sum(1).mean().exp())


def _two_sides(a: Tensor, b: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Two matrices of finite features, in float64, with at least so many rows."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ShapeError(f"features: expected two matrices (n, d) and (m, d), got {tuple(a.shape)} and {tuple(b.shape)}.")
    if min(len(a), len(b)) < least:
        raise ShapeError(f"features: expected at least {least} rows on each side, got {len(a)} and {len(b)}.")
    a, b = a.double(), b.double()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ArgumentError("features: expected finite values, got NaN or infinity.")
    return a, b


def gap_closed(joint: float, generator: float, reconstructions: float) -> float:
    """(D(generator) − D(joint))/(D(generator) − D(reconstructions)) of three distances to the same images at equal counts.

    What the prior mends of what a prior can mend: 1 where samples are as near as reconstructions of held-out images, 0 where
    they are no nearer than the generator's own. A blurred decoder does not show in it.

    Args:
        joint: distance of the joint prior's samples.
        generator: distance of samples of the generator's own prior.
        reconstructions: distance of reconstructions of images that are not among those that are compared with.

    Raises:
        ArgumentError: if `generator` does not exceed `reconstructions`: there is then no gap.

    Examples:
        >>> gap_closed(joint=12.0, generator=20.0, reconstructions=4.0)
        0.5
    """
    if not generator > reconstructions:
        floor = f"above that of reconstructions, {reconstructions:.4g}"
        raise ArgumentError(f"generator: expected a distance {floor}, got {generator:.4g}.")
    return (generator - joint) / (generator - reconstructions)


def excess_ratio(joint: float, generator: float, floor: float) -> float:
    """(joint − floor)/(generator − floor) of three Fréchet distances to the same test images at equal sample counts.

    0: samples of the joint prior are as near to the test images as training images are. 1: no better than the generator's.

    Args:
        joint: distance of the joint prior's samples.
        generator: distance of samples of the generator's own prior.
        floor: distance of training images, which is not 0 at finite sample counts.

    Raises:
        ArgumentError: if `generator` does not exceed `floor`: there is then no excess to compare with.

    Examples:
        >>> excess_ratio(joint=8.0, generator=20.0, floor=4.0)
        0.25
    """
    if not generator > floor:
        raise ArgumentError(f"generator: expected a distance above the floor {floor:.4g}, got {generator:.4g}.")
    return (joint - floor) / (generator - floor)
