"""The command line, and the demo at reduced size."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import energy_prior
from energy_prior.cli import demo, info
from energy_prior.cli.demo import DemoData, DemoSettings, load_demo_data, run_demo
from energy_prior.cli.main import main


@pytest.mark.slow
def test_demo_quick_writes_its_files_and_prints_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On some of the images; on all of them in CI."""

    def some(*arguments: Any) -> DemoData:
        data = load_demo_data(*arguments)
        rest = {name: getattr(data, name)[:50] for name in ("validation", "test", "test_labels", "unknown")}
        return dataclasses.replace(data, **rest)

    monkeypatch.setattr(demo, "load_demo_data", some)
    monkeypatch.setattr(demo, "SCORES", ("tails", "log_joint"))
    monkeypatch.setenv("HOME", str(tmp_path))
    threads = torch.get_num_threads()
    assert main(["demo", "--quick", "--unknown", "3", "--seed", "1", "--out", "~/out"]) == 0
    torch.set_num_threads(threads)
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["langevin.png", "report.json", "samples.png", "scores.png"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["unknown_digit"] == 3
    assert report["images"]["unknown"] == 50
    printed = capsys.readouterr().out
    for words in ("Gaussian prior", "joint prior", "AUROC", "'tails'", "only show that everything runs"):
        assert words in printed
    assert f"{report['scores']['tails']['auroc']:.3f}" in printed


@pytest.mark.slow
def test_demo_is_reproducible_and_leaves_the_global_stream() -> None:
    settings = DemoSettings(unknown=1, seed=4, progress=False).quick()
    before = torch.get_rng_state()
    first, second = run_demo(settings, None), run_demo(settings, None)
    assert torch.equal(torch.get_rng_state(), before)
    for report in (first, second):
        del report["seconds"]
    assert first == second
    assert first["images"]["unknown"] == 182


def test_demo_data_are_disjoint_and_leave_the_unknown_digit_out() -> None:
    data = load_demo_data(7, 0)
    total = sum(len(part) for part in (data.train, data.validation, data.test, data.unknown))
    assert total == 1797
    assert not (data.train_labels == 7).any()
    assert not (data.test_labels == 7).any()
    assert torch.equal(load_demo_data(7, 0).test, data.test)
    assert not torch.equal(load_demo_data(7, 1).test, data.test)
    assert float(data.train.min()) == 0
    assert float(data.train.max()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--unknown", "12"], "unknown: expected a digit from 0 to 9, got 12"),
        (["demo", "--device", "cuda:99"], "--device cuda:99: not available here"),
        (["demo", "--device", "abacus"], "--device abacus: not available here"),
        (["demo", "--quick", "--out", ""], "--out: expected a path, got an empty text"),
    ],
)
def test_errors_are_one_line_and_status_2(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_an_output_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["demo", "--quick", "--out", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cpuinfo", "words"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\n", "; units for bf16 (avx512_bf16): "),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", "; units for bf16 (bf16): "),
        ("processor\t: 0\nflags\t\t: fpu avx2\nbugs\t\t: amx_bf16\n", '; no units for bf16: precision="bf16" is slower'),
        ("", "; not known whether it has units for bf16"),
        (None, "; not known whether it has units for bf16"),
    ],
)
def test_info_says_what_the_processor_means(
    cpuinfo: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(info, "Path", lambda _: tmp_path / "cpuinfo")
    there = {"energy-prior": True, "datasets": False}
    monkeypatch.setattr(info, "_installed", lambda package: there.get(package, True))
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for text in (words, energy_prior.__version__, torch.__version__, "extra train: installed"):
        assert text in printed
    assert "extra examples: without datasets: pip install 'energy-prior[examples]'" in printed
    there["energy-prior"] = False
    assert main(["info"]) == 0
    assert "extras: not known" in capsys.readouterr().out


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["demo", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
    assert energy_prior.__version__ in capsys.readouterr().out
