"""The examples from the command line with --quick, on small files that the test writes; and what they import."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from pictures import write_parquet
from PIL import Image
from stand_ins import NVAE

from energy_prior import JointEBMPrior

EXAMPLES = Path(__file__).parent.parent / "examples"
PUBLIC = {"energy_prior", *(f"energy_prior.{m}" for m in ("adapters", "data", "evaluate", "generators", "plots", "training"))}


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python examples/….py` has it, the examples' folder can be imported; data sets are prepared in the test's folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def run(script: str, arguments: list[str]) -> None:
    """`python examples/SCRIPT ARGUMENTS`, in this process."""
    before = sys.argv
    sys.argv = [str(EXAMPLES / script), *arguments]
    try:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    finally:
        sys.argv = before


def images(n: int, size: int, channels: int, seed: int) -> list[Image.Image]:
    pixels = torch.randint(0, 256, (n, size, size, channels), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return [Image.fromarray(p.squeeze(-1).numpy()) for p in pixels]


def labelled(folder: Path, size: int, channels: int) -> Path:
    for split, n in (("train", 700), ("test", 120)):
        write_parquet(folder, images(n, size, channels, n), split, label=[i % 10 for i in range(n)])
    return folder


CASES = [
    pytest.param(
        "mnist_toy.py", 28, 1, {"samples.png", "transitions.png", "results.json"}, id="mnist_toy", marks=pytest.mark.slow
    ),
    pytest.param(
        "mnist.py",
        28,
        1,
        {"samples.png", "long_chain.png", "results.json", "prior.safetensors"},
        id="mnist",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "anomaly_mnist.py",
        28,
        1,
        {"histograms.png", "curves.png", "extremes.png", "explanation.png", "results.json"},
        id="anomaly_mnist",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "cifar10.py",
        32,
        3,
        {"samples.png", "long_chain.png", "scores.png", "results.json", "prior.safetensors"},
        id="cifar10",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("script", "size", "channels", "files"), CASES)
def test_quick(script: str, size: int, channels: int, files: set[str], tmp_path: Path) -> None:
    data = labelled(tmp_path / "set", size, channels)
    extra = ["--unknown", str(write_parquet(tmp_path / "other", images(20, 30, 3, 1), "test"))] if channels == 3 else []
    device = [] if script == "mnist_toy.py" else ["--device", "cpu"]
    run(script, ["--data", str(data), "--out", str(tmp_path / "out"), "--quick", *device, *extra])
    assert files <= {p.name for p in (tmp_path / "out").iterdir()}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert all(value == value for value in results.values()), "no NaN"


@pytest.mark.slow
def test_digits(tmp_path: Path) -> None:
    """What it writes is a prior that others can load, and a card with the figures."""
    run("digits.py", ["--out", str(tmp_path), "--quick"])
    assert JointEBMPrior.from_pretrained(tmp_path).calibration.is_set
    card = (tmp_path / "README.md").read_text()
    assert "![samples](samples.png)" in card
    assert "| training images | 1,200 |" in card


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 32)])
def test_ood(channels: int, side: int, tmp_path: Path) -> None:
    """Against a set that has no test split and other sizes."""
    known = labelled(tmp_path / "known", side, channels)
    unknown = write_parquet(tmp_path / "unknown", images(40, side + 6, channels, 1))
    out = tmp_path / "out"
    run("ood.py", ["--known", str(known), "--unknown", str(unknown), "--jpeg", "80", "--out", str(out), "--quick"])
    assert {p.name for p in out.iterdir()} == {
        "results.json",
        "histograms.png",
        "curves.png",
        "extremes.png",
        "explanation.png",
    }
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["known/unknown", "known/known_train"]
    wanted = {"auroc", "fpr80", "auroc_llr", "auroc_llr_gaussian", "auroc_log_likelihood", "auroc_knn"}
    assert all(wanted <= set(figures) for figures in results.values())


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "side"), [("cifar10", 32), ("lsun_church_64", 70)])
def test_two_stage(setting: str, side: int, tmp_path: Path) -> None:
    """With samples written out, on images that have to be cropped and scaled."""
    data = write_parquet(tmp_path / "set", images(60, side, 3, 1))
    out = tmp_path / "out"
    run("two_stage.py", [setting, *two_stage_options(data, out), "--export", "10"])
    assert {"samples.png", "long_chain.png", "results.json", "prior.safetensors"} <= {p.name for p in out.iterdir()}
    assert len(list((out / "samples-joint").glob("*.png"))) == 10
    with Image.open(out / "samples-gaussian" / "000009.png") as sample:
        assert sample.size == (32 if side == 32 else 64,) * 2


@pytest.mark.slow
def test_one_update_of_each_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a setting as it is, here made small; it leaves no run behind that the next call would go on with."""
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("two_stage")
    small = dataclasses.replace(example.SETTINGS["cifar10"], generator=example.QUICK, batch_size=4, energy_batch=4)
    monkeypatch.setitem(example.SETTINGS, "cifar10", small)
    updates: list[int] = []
    learn, fit = example.fit_elbo, example.JointEBMPrior.fit

    def elbo(*args: Any, **settings: Any) -> Any:
        updates.append(settings["iterations"])
        return learn(*args, **settings)

    def energies(*args: Any, **settings: Any) -> Any:
        updates.append(settings["iterations"])
        return fit(*args, **settings)

    monkeypatch.setattr(example, "fit_elbo", elbo)
    monkeypatch.setattr(example.JointEBMPrior, "fit", energies)
    data = write_parquet(tmp_path / "set", images(40, 32, 3, 1))
    options = ["--data", str(data), "--out", str(tmp_path / "out"), "--device", "cpu", "--one-update"]
    monkeypatch.setattr(sys, "argv", ["two_stage.py", "cifar10", *options])
    for _ in range(2):
        example.main()
    assert {p.name for p in (tmp_path / "out").iterdir() if p.is_dir()} == set()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert min(results["elbo_seconds"], results["energies_seconds"]) > 0.0
    assert updates == [1, 1, 1, 1]


@pytest.mark.slow
def test_two_stage_on_a_checkpoint_of_nvae(tmp_path: Path) -> None:
    """In a process of its own, as a user starts it; the user's code, which is a module `model`, builds the model."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "model.py").write_text(NVAE_CODE)
    saved = {"state_dict": NVAE(side=32).state_dict(), "args": argparse.Namespace(decoder="mixture")}
    torch.save(saved | {"arch_instance": {"cell": ["a"]}}, tmp_path / "checkpoint.pt")
    data = write_parquet(tmp_path / "set", images(60, 32, 3, 1))
    nvae = ["--nvae", "~/checkpoint.pt", "--nvae-code", "~/code"]
    command = [sys.executable, str(EXAMPLES / "two_stage.py"), "cifar10", *two_stage_options(data, Path("~/out")), *nvae]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr[-3000:]
    assert "validation_elbo" not in json.loads((tmp_path / "out" / "results.json").read_text())


NVAE_CODE = """
import stand_ins

class AutoEncoder(stand_ins.NVAE):
    def __init__(self, args, writer, arch_instance):
        assert arch_instance == {"cell": ["a"]}
        super().__init__(args.decoder, side=32)
"""


def two_stage_options(data: Path, out: Path) -> list[str]:
    return ["--data", str(data), "--out", str(out), "--quick", "--device", "cpu"]


@pytest.mark.parametrize("script", sorted(p.name for p in EXAMPLES.glob("*.py")))
def test_examples_import_public_names_only(script: str) -> None:
    """From the package itself and its documented modules, what their `__all__` lists."""
    imported = 0
    for node in ast.walk(ast.parse((EXAMPLES / script).read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("energy_prior.") for alias in node.names)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("energy_prior"):
            assert node.module in PUBLIC
            public = importlib.import_module(str(node.module)).__all__
            for alias in node.names:
                assert alias.name in public or f"{node.module}.{alias.name}" in PUBLIC, alias.name
                imported += 1
    assert imported or script in ("command_line.py", "features.py")


@pytest.mark.parametrize("script", ["cifar10.py", "mnist.py", "mnist_toy.py", "two_stage.py"])
def test_options(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = ["cifar10"] if script == "two_stage.py" else []
    with pytest.raises(SystemExit) as caught:
        run(script, ["--help"])
    assert caught.value.code == 0
    assert "--data" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        run(script, [*first, "--out", ""])
    assert caught.value.code == 2
    assert "expected a path, got an empty text" in capsys.readouterr().err
