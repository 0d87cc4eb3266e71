"""The examples from the command line with --quick, on small files that the test writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_data import write_parquet

EXAMPLES = Path(__file__).parent.parent / "examples"


def images(n: int, size: int, channels: int, seed: int) -> list[Image.Image]:
    pixels = torch.randint(0, 256, (n, size, size, channels), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return [Image.fromarray(p.squeeze(-1).numpy()) for p in pixels]


def labelled(folder: Path, size: int, channels: int) -> Path:
    for split, n in (("train", 700), ("test", 120)):
        write_parquet(folder, images(n, size, channels, n), split, label=[i % 10 for i in range(n)])
    return folder


CASES = [
    ("mnist.py", 28, 1, {"samples.png", "long_chain.png", "results.json", "prior.safetensors"}),
    ("mnist_toy.py", 28, 1, {"samples.png", "transitions.png", "results.json"}),
    ("cifar10.py", 32, 3, {"samples.png", "long_chain.png", "scores.png", "results.json", "prior.safetensors"}),
]


@pytest.mark.parametrize(("script", "size", "channels", "files"), CASES, ids=[c[0] for c in CASES])
def test_quick(script: str, size: int, channels: int, files: set[str], tmp_path: Path) -> None:
    data = labelled(tmp_path / "set", size, channels)
    extra = ["--unknown", str(write_parquet(tmp_path / "other", images(20, 30, 3, 1), "test"))] if channels == 3 else []
    command = [sys.executable, str(EXAMPLES / script), "--data", str(data), "--out", str(tmp_path / "out"), "--quick", *extra]
    if script != "mnist_toy.py":
        command += ["--device", "cpu"]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr[-3000:]
    assert files <= {p.name for p in (tmp_path / "out").iterdir()}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert all(value == value for value in results.values()), "no NaN"
