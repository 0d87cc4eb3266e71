"""`OODDetector` in pytorch-ood's own evaluation; in an environment of its own, as that library needs torchvision.

python -m venv apart && apart/bin/pip install -c tests/apart/pytorch_ood.txt ".[eval]" pytest pytorch-ood
apart/bin/pytest --override-ini addopts= tests/apart/pytorch_ood_evaluation.py
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, TensorDataset

from energy_prior import JointEBMPrior, LadderVAE
from energy_prior.detectors import OODDetector
from energy_prior.evaluate import detection

if not torch.version.cuda:  # torchvision's operators are built for CUDA's torch; its import asks that these two exist
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

Benchmark: Any = importlib.import_module("pytorch_ood.benchmark").Benchmark
metrics: Any = importlib.import_module("pytorch_ood.metrics")


class Noise(Benchmark):
    """Known: noise of one size; unknown: noise of another."""

    ood_names = ("louder",)

    def train_set(self) -> TensorDataset:
        """Known rows."""
        return labelled(200, 0.1, 0, seed=0)

    def test_sets(self, known: bool = True, unknown: bool = True) -> list[Any]:
        """Known and unknown rows together."""
        parts = [labelled(100, 0.1, 0, seed=1)] * known + [labelled(80, 0.3, -1, seed=2)] * unknown
        return [ConcatDataset(parts)]


def labelled(n: int, scale: float, label: int, seed: int) -> TensorDataset:
    """Noise about a half, with labels."""
    x = 0.5 + scale * torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x.clamp(0, 1), torch.full((n,), label))


@pytest.mark.parametrize("method", [None, "reconstruction"])
def test_their_evaluation_takes_the_detector(method: str | None) -> None:
    """Its AUROC is that of the prior's own scores."""
    torch.manual_seed(0)
    prior = JointEBMPrior(LadderVAE((6,), latent_dims=(4, 2), hidden=16))
    benchmark, detector = Noise(), OODDetector(prior, method)
    detector.fit(torch.utils.data.DataLoader(benchmark.train_set(), batch_size=64))
    (found,) = benchmark.evaluate(detector, loader_kwargs={"batch_size": 50})
    known, unknown = (benchmark.test_sets(*which)[0] for which in ((True, False), (False, True)))
    scores = [torch.cat([detector.predict(x[None]) for x, _ in side]) for side in (known, unknown)]
    assert found["AUROC"] == pytest.approx(detection(*scores).auroc, abs=0.02)
    assert found["AUROC"] > 0.8
