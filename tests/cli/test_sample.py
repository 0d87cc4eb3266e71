"""`energy-prior sample`: files, resuming, folders that hold something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from energy_prior import ArgumentError, JointEBMPrior, LadderVAE
from energy_prior.cli.main import INTERRUPTED, main
from energy_prior.cli.options import stream
from energy_prior.cli.sample import write_samples
from energy_prior.cli.train import load_run


def read(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.png"))}


def small(channels: int = 1) -> JointEBMPrior:
    torch.manual_seed(0)
    return JointEBMPrior(LadderVAE((channels, 6, 6), latent_dims=(3, 2), hidden=8))


def test_images_are_those_of_the_prior(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, grid = tmp_path / "images", tmp_path / "grid.png"
    words = ["sample", str(run), "-n", "5", "--batch-size", "4", "--steps", "3", "--out", str(out), "--grid", str(grid)]
    assert main([*words, "--seed", "1"]) == 0
    assert "5 images of the joint prior are in" in capsys.readouterr().out
    assert list(read(out)) == [f"{i:06d}.png" for i in range(5)]
    expected = load_run(run).sample(4, rng=torch.Generator().manual_seed(1_000_003), steps=3)
    with Image.open(out / "000003.png") as image:
        assert image.mode == "L"
        pixels = torch.tensor(list(image.tobytes())).reshape(6, 6) / 255
    torch.testing.assert_close(pixels, expected[3, 0].clamp(0, 1), rtol=0, atol=0.5 / 255 + 1e-6)
    assert grid.stat().st_size > 1000
    assert main([*words, "--json", "--seed", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {"images": 5, "drawn": 0, "prior": "joint", "out": str(out), "grid": str(grid)}


def test_it_goes_on_after_a_kill_with_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prior, calls = small(3), list[int]()
    write_samples(prior, 7, tmp_path / "whole", batch_size=3, steps=2)
    sample: Any = JointEBMPrior.sample

    def killed(self: JointEBMPrior, n: int, **options: Any) -> torch.Tensor:
        calls.append(n)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(self, n, **options)

    monkeypatch.setattr(JointEBMPrior, "sample", killed)
    with pytest.raises(KeyboardInterrupt):
        write_samples(prior, 7, tmp_path / "cut", batch_size=3, steps=2)
    assert len(read(tmp_path / "cut")) == 3
    (tmp_path / "cut" / "000001.png").unlink()
    assert write_samples(prior, 7, tmp_path / "cut", batch_size=3, steps=2)["drawn"] == 7
    whole = read(tmp_path / "whole")
    assert read(tmp_path / "cut") == whole
    assert len(set(whole.values())) == 7
    assert write_samples(prior, 8, tmp_path / "cut", batch_size=3, steps=2)["drawn"] == 2
    assert len(read(tmp_path / "cut")) == 8
    assert {name: data for name, data in read(tmp_path / "cut").items() if name in whole} == whole
    with Image.open(tmp_path / "cut" / "000000.png") as image:
        assert image.mode == "RGB"
        assert image.size == (6, 6)


def test_a_folder_of_other_images_is_refused(tmp_path: Path) -> None:
    prior = small()
    write_samples(prior, 2, tmp_path / "a", steps=2)
    others: list[dict[str, Any]] = [{"steps": 3}, {"steps": 2, "seed": 1}, {"steps": 2, "which": "generator"}]
    for options in others:
        with pytest.raises(ArgumentError, match=r"out: .* holds images of another prior or other settings"):
            write_samples(prior, 2, tmp_path / "a", **options)
    with torch.no_grad():
        next(iter(prior.energies.parameters())).add_(1)
    with pytest.raises(ArgumentError, match="another prior"):
        write_samples(prior, 2, tmp_path / "a", steps=2)
    (tmp_path / "a" / "samples.json").write_text("{")
    with pytest.raises(ArgumentError, match="another prior"):
        write_samples(prior, 2, tmp_path / "a", steps=2)
    (tmp_path / "a" / "samples.json").unlink()
    with pytest.raises(ArgumentError, match="none of this command's"):
        write_samples(prior, 2, tmp_path / "a", steps=2)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="is a file"):
        write_samples(prior, 2, tmp_path / "file")


@pytest.mark.parametrize("seed", [2**63, 10**20])
def test_any_seed(seed: int, tmp_path: Path) -> None:
    """Beyond what torch takes, too; and the first batch is not that of the second."""
    assert write_samples(small(), 3, tmp_path, seed=seed, batch_size=2, steps=1)["images"] == 3
    assert stream(seed, 0).initial_seed() != stream(seed, 2).initial_seed()


def test_no_half_written_image_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Image.Image, path: Path, kind: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        write_samples(small(), 2, tmp_path, steps=2)
    assert [file.name for file in tmp_path.iterdir()] == ["samples.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-n", "many"], "--number: expected a whole number, got 'many'"),
        (["-n", "0"], "n: expected a whole number of at least 1"),
        (["--steps", "-1"], "steps: expected a whole number of at least 0"),
        (["--device", "abacus"], "--device abacus: not available here"),
        (["--out", ""], "out: expected a path, got an empty text"),
    ],
)
def test_errors_are_one_line(
    run: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sample", str(run), *words]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("energy-prior:")]
    assert len(error) == 1
    assert message in error[0]


def test_ctrl_c_says_that_it_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("energy_prior.cli.sample.write_samples", stopped)
    monkeypatch.setattr("energy_prior.cli.info.machine_lines", stopped)
    assert main(["sample", str(run)]) == INTERRUPTED
    assert "the same command goes on from there" in capsys.readouterr().err
    assert main(["info"]) == INTERRUPTED
    assert capsys.readouterr().err == "energy-prior: stopped\n"
