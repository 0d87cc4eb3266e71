"""The examples from the command line with --quick, on small files that the test writes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pictures import write_parquet
from PIL import Image
from stand_ins import NVAE

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


@pytest.mark.parametrize(("setting", "side"), [("cifar10", 32), ("lsun_church_64", 70)])
def test_two_stage(setting: str, side: int, tmp_path: Path) -> None:
    """With samples written out, on images that have to be cropped and scaled."""
    data = write_parquet(tmp_path / "set", images(60, side, 3, 1))
    run_two_stage(setting, data, tmp_path, ["--export", "10"])
    assert {"samples.png", "long_chain.png", "results.json", "prior.safetensors"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert len(list((tmp_path / "out" / "samples-joint").glob("*.png"))) == 10
    with Image.open(tmp_path / "out" / "samples-gaussian" / "000009.png") as sample:
        assert sample.size == (32 if side == 32 else 64,) * 2


def test_two_stage_on_a_checkpoint_of_nvae(tmp_path: Path) -> None:
    """The user's own code builds the model."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "model.py").write_text(NVAE_CODE)
    saved = {"state_dict": NVAE(side=32).state_dict(), "args": argparse.Namespace(decoder="mixture")}
    torch.save(saved | {"arch_instance": {"cell": ["a"]}}, tmp_path / "checkpoint.pt")
    data = write_parquet(tmp_path / "set", images(60, 32, 3, 1))
    run_two_stage("cifar10", data, tmp_path, ["--nvae", str(tmp_path / "checkpoint.pt"), "--nvae-code", str(tmp_path / "code")])
    assert "validation_elbo" not in json.loads((tmp_path / "out" / "results.json").read_text())


NVAE_CODE = """
import stand_ins

class AutoEncoder(stand_ins.NVAE):
    def __init__(self, args, writer, arch_instance):
        assert arch_instance == {"cell": ["a"]}
        super().__init__(args.decoder, side=32)
"""


def run_two_stage(setting: str, data: Path, folder: Path, more: list[str]) -> None:
    command = [
        sys.executable,
        str(EXAMPLES / "two_stage.py"),
        setting,
        "--data",
        str(data),
        "--quick",
        "--device",
        "cpu",
        *more,
    ]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    command += ["--out", str(folder / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr[-3000:]
