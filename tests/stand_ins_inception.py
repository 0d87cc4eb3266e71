"""A stand-in for torch-fidelity's Inception: its calls, its names and its file of weights, with a small network."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

URL_INCEPTION_V3 = "https://example.invalid/releases/weights-inception.pth"
NAME = "torch_fidelity.feature_extractor_inceptionv3"


class FeatureExtractorInceptionV3(nn.Module):
    """2,048 features of 8-bit images, and a last layer of 1,008 classes."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: Any = None) -> None:
        super().__init__()
        assert features_list == ["2048"]
        self.features, self.fc = nn.Linear(3, 2048), nn.Linear(2048, 1008)
        if feature_extractor_weights_path is not None:
            self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        return (self.features(x.float().mean((2, 3))),)


@contextlib.contextmanager
def installed(folder: Path) -> Iterator[Path]:
    """torch-fidelity is there inside; its weights lie in the file that is given, where torch keeps downloads."""
    package, module = types.ModuleType("torch_fidelity"), types.ModuleType(NAME)
    vars(module).update(URL_INCEPTION_V3=URL_INCEPTION_V3, FeatureExtractorInceptionV3=FeatureExtractorInceptionV3)
    file = folder / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(FeatureExtractorInceptionV3("", ["2048"]).state_dict(), file)
    with patch.dict(sys.modules, {"torch_fidelity": package, NAME: module}), patch("torch.hub.get_dir", lambda: str(folder)):
        yield file
