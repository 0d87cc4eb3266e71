"""The Python blocks of README and of the guides in docs run as they are written, but for the number of training iterations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import picture

from energy_prior import LadderVAE
from energy_prior.cli.demo import load_demo_data

ROOT = Path(__file__).parent.parent


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


BLOCKS = blocks("README.md")


def test_there_are_blocks() -> None:
    assert len(BLOCKS) == 3
    assert len(blocks("docs/training.md")) == 3
    assert len(blocks("docs/sampling.md")) == 1
    assert len(blocks("docs/data.md")) == 1
    assert len(blocks("docs/adapters.md")) == 6
    assert len(blocks("docs/detection.md")) == 4


def test_training_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks, one after the other."""
    monkeypatch.chdir(tmp_path)
    data = load_demo_data(9, 0)
    names: dict[str, Any] = {"images": data.train[:64], "held_out": data.validation[:32]}
    for block in blocks("docs/training.md"):
        short = block.replace("run_dir=", "iterations=3, progress=False, run_dir=").replace(
            "1000, batch_size=256", "30, batch_size=20"
        )
        exec(compile(short, "docs/training.md", "exec"), names)  # noqa: S102
    assert names["samples"].shape == (30, 1, 8, 8)
    assert names["scores"].shape == (64,)
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"vae", "prior", "prior-2"}


def test_detection_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its blocks, one after the other, with nets of the lengths that a test has time for."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks("docs/detection.md"):
        short = block.replace("input_noise=0.1)", "iterations=40, progress=False)")
        short = short.replace("prior.fit(train)", "prior.fit(train, iterations=10, progress=False)")
        exec(compile(short, "docs/detection.md", "exec"), names)  # noqa: S102
    assert {p.name for p in tmp_path.iterdir()} == {"explanation.png", "histograms.png", "curves.png"}
    assert "zenati, class 4 auroc_reconstruction" in capsys.readouterr().out
    assert names["detector"].offset_ < -0.5


def test_data_guide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    picture(3).save(tmp_path / "train" / "cat" / "0.png")
    exec(compile(blocks("docs/data.md")[0].replace("path/to/set", str(tmp_path)), "docs/data.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out == "torch.Size([1, 1, 32, 32]) tensor([0]) ('cat',)\n"


@pytest.mark.parametrize("backend", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_sampling_guide(backend: str) -> None:
    names: dict[str, Any] = {"generator": LadderVAE((1, 4, 4), latent_dims=(4, 2), hidden=8)}
    block = blocks("docs/sampling.md")[0]
    assert block.count('backend="compiled"') == 1
    short = block.replace("100_000", "50").replace('backend="compiled"', f'backend="{backend}"')
    exec(compile(short, "docs/sampling.md", "exec"), names)  # noqa: S102
    assert names["z"][0].shape == (1000, 4)
    assert names["run"].steps.tolist() == [0, 25, 50]


@pytest.mark.slow
def test_adapter_guide(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that the reader has never seen, from nothing to samples: the blocks one after the other."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    data = load_demo_data(9, 0)
    names: dict[str, Any] = {"images": data.train[:64]}
    for block in blocks("docs/adapters.md"):
        short = block.replace("prior.fit(images)", "prior.fit(images, iterations=3, progress=False)")
        short = short.replace("iterations=2000)", "iterations=3, progress=False)")
        exec(compile(short, "docs/adapters.md", "exec"), names)  # noqa: S102
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "shapes, types and layer order agree with latent_shapes"
    assert "reconstruct: the observation agrees with the model's own, on the same noise" in out
    assert "kl: the sum over layers agrees" in out
    assert names["x"].shape == (16, 1, 8, 8)
    assert names["scores"].shape == (8,)
    assert out[-1] == "torch.Size([4, 1, 8, 8])"


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_block(index: int, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = load_demo_data(9, 0)
    names: dict[str, Any] = {
        "images": data.train,
        "held_out": data.validation,
        "generator": LadderVAE((1, 8, 8), latent_dims=(4, 2)),
    }
    short = BLOCKS[index].replace("prior.fit(images)", "prior.fit(images, iterations=2, progress=False)")
    short = short.replace("validation=held_out)", "validation=held_out, iterations=2, progress=False)")
    torch.manual_seed(0)
    exec(compile(short, f"README block {index}", "exec"), names)  # noqa: S102
    if "check_generator" in short:
        assert "torch.Size([3, 8])" in capsys.readouterr().out
    else:
        assert names["prior"].sample(2).shape == (2, 1, 8, 8)
