"""Features and classes by networks of others: EfficientNet-Lite0 itself, and a stand-in for torch-fidelity's Inception."""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch
from urllib.error import URLError

import pytest
import stand_ins_inception as stand_in
import torch

from energy_prior import ArgumentError, MissingExtraError, ShapeError
from energy_prior.cli.demo import load_demo_data
from energy_prior.evaluate import (
    efficientnet_features,
    efficientnet_probabilities,
    frechet_distance,
    inception_features,
    inception_probabilities,
    inception_score,
)
from energy_prior.evaluate.networks import _inception


@pytest.fixture
def weights(tmp_path: Path) -> Iterator[Path]:
    """The file of weights where torch keeps it."""
    _inception.cache_clear()
    with stand_in.installed(tmp_path / "hub") as file:
        yield file
    _inception.cache_clear()


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


def test_classes_of_images() -> None:
    """Those of the whole network, and of noise fewer than of digits."""
    digits = load_demo_data(1, 0).train[:200]
    probabilities = efficientnet_probabilities(efficientnet_features(digits))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(200))
    noise = efficientnet_probabilities(efficientnet_features(torch.rand(200, 1, 8, 8)))
    assert inception_score(probabilities) > inception_score(noise)
    with pytest.raises(ShapeError, match=r"expected \(n, 1280\), those of efficientnet_features, got \(2, 3\)"):
        efficientnet_probabilities(torch.zeros(2, 3))


def test_features_of_inception(weights: Path, tmp_path: Path) -> None:
    """8-bit images of three channels, whatever the batch; the random stream stays where it was."""
    images = torch.rand(5, 1, 8, 8)
    state = torch.get_rng_state()
    features = inception_features(images, batch_size=2)
    assert torch.equal(torch.get_rng_state(), state)
    net = stand_in.FeatureExtractorInceptionV3("", ["2048"], weights)
    expected = net((255 * images).round().to(torch.uint8).expand(-1, 3, -1, -1))[0]
    torch.testing.assert_close(features, expected.detach())
    elsewhere = weights.rename(tmp_path / "elsewhere.pth")
    torch.testing.assert_close(inception_features(images, weights=elsewhere), features)
    probabilities = inception_probabilities(features, weights=elsewhere)
    torch.testing.assert_close(probabilities, (features @ net.fc.weight.T).softmax(1).detach())
    assert inception_features(images[:0], weights=elsewhere).shape == (0, 2048)
    for wrong, error, words in (
        (2 * images, ArgumentError, r"values in \[0, 1\]"),
        (images[0], ShapeError, r"expected \(n, 1 or 3, height, width\)"),
    ):
        with pytest.raises(error, match=words):
            inception_features(wrong, weights=elsewhere)
    with pytest.raises(ShapeError, match=r"\(n, 2048\), those of inception_features, got \(5, 3\)"):
        inception_probabilities(torch.zeros(5, 3), weights=elsewhere)


def test_weights_are_downloaded_once_and_the_way_without_a_network_is_named(weights: Path) -> None:
    content = weights.read_bytes()
    weights.unlink()
    asked = []

    def download(url: str, *, check_hash: bool, weights_only: bool, **_: object) -> None:
        asked.append(url)
        assert check_hash
        assert weights_only
        if len(asked) == 1:
            raise URLError("no route to host")
        weights.write_bytes(content)

    with patch("torch.hub.load_state_dict_from_url", download):
        with pytest.raises(ArgumentError, match="could not be downloaded .*no route to host.* pass weights=FILE"):
            inception_features(torch.rand(2, 3, 8, 8))
        for _ in range(2):
            inception_features(torch.rand(2, 3, 8, 8))
    assert asked == [stand_in.URL_INCEPTION_V3] * 2


class Call:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


def test_files_that_are_no_weights_of_inception(weights: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pth"
    with pytest.raises(ArgumentError, match="there is no file .*wrong.pth"):
        inception_features(torch.rand(2, 3, 8, 8), weights=wrong)
    torch.save({"a": torch.zeros(2)}, wrong)
    with pytest.raises(ArgumentError, match="expected a file of torch-fidelity's Inception weights"):
        inception_features(torch.rand(2, 3, 8, 8), weights=wrong)
    torch.save(Call(tmp_path / "run"), wrong)  # code, not weights
    with pytest.raises(ArgumentError, match="expected a file of torch-fidelity's Inception weights"):
        inception_features(torch.rand(2, 3, 8, 8), weights=wrong)
    assert not (tmp_path / "run").exists()
    for content in (b"", b"text", weights.read_bytes()[:1000]):
        wrong.write_bytes(content)
        with pytest.raises(ArgumentError, match="expected a file of torch-fidelity's Inception weights"):
            inception_features(torch.rand(2, 3, 8, 8), weights=wrong)
    assert zipfile.is_zipfile(weights)


def test_torch_fidelity_is_named_where_it_is_missing_or_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    with patch.dict(sys.modules, {"torch_fidelity": None}), pytest.raises(MissingExtraError, match=r"energy-prior\[fid\]"):
        inception_features(torch.rand(2, 3, 8, 8))

    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(MissingExtraError, match=r"nms does not exist\): its torchvision must fit torch"):
        inception_features(torch.rand(2, 3, 8, 8))
