"""FID, KID and inception score by `inception_features` beside torch-fidelity's own; in an environment of its own.

python -m venv apart && apart/bin/pip install -c tests/apart/torch_fidelity.txt ".[eval,fid]" pytest
apart/bin/pytest --override-ini addopts= tests/apart/torch_fidelity_inception.py

The weights are drawn here, as the published ones are a download: what is compared is what is done with them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.version.cuda:  # torchvision's operators are built for CUDA's torch; its import asks that these two exist
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import torch_fidelity  # type: ignore[import-not-found]
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # type: ignore[import-not-found]

from energy_prior.evaluate import (
    frechet_distance,
    inception_features,
    inception_probabilities,
    inception_score,
    kernel_distance,
)


class Bytes(torch.utils.data.Dataset[Tensor]):
    """Images as torch-fidelity takes them."""

    def __init__(self, images: Tensor) -> None:
        self.pixels = (255 * images).round().to(torch.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return self.pixels[index]


def test_figures_are_those_of_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights.pth"
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: None)
        net = FeatureExtractorInceptionV3("drawn", ["2048"])
    torch.save(net.state_dict(), file)
    real, drawn = torch.rand(40, 3, 32, 32), torch.rand(40, 3, 32, 32).square()
    theirs: dict[str, Any] = torch_fidelity.calculate_metrics(
        input1=Bytes(drawn),
        input2=Bytes(real),
        fid=True,
        kid=True,
        isc=True,
        isc_splits=1,
        kid_subsets=1,
        kid_subset_size=40,
        batch_size=20,
        cuda=False,
        cache=False,
        verbose=False,
        feature_extractor_weights_path=str(file),
    )
    a, b = (inception_features(x, weights=file) for x in (real, drawn))
    assert frechet_distance(a, b) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert kernel_distance(a, b) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3, abs=1e-7)
    score = inception_score(inception_probabilities(b, weights=file))
    assert score == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
