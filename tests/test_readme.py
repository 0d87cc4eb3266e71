"""The code of README and the docs runs as it is written, but for the length of what takes minutes: Python, and commands."""

from __future__ import annotations

import collections
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from doc_blocks import CODE, ROOT, Record, all_blocks, blocks, run_python, run_shell
from pictures import picture, write_parquet
from PIL import Image
from torch.distributions import Independent, Normal

from energy_prior import Inferred, JointEBMPrior, LadderVAE, check_generator
from energy_prior.cli.demo import load_demo_data
from energy_prior.cli.main import main

SHORT_ELBO = {"validation=held_out)": "validation=held_out, iterations=3, progress=False)"}
SHORT_FIT = {"prior.fit(images)": "prior.fit(images, iterations=3, progress=False)"}

BLOCKS = {
    ("CONTRIBUTING.md", "shell"): 1,
    ("README.md", "python"): 3,
    ("README.md", "shell"): 2,
    ("docs/adapters.md", "python"): 12,
    ("docs/data.md", "python"): 1,
    ("docs/detection.md", "python"): 4,
    ("docs/detection.md", "shell"): 1,
    ("docs/faq.md", "python"): 1,
    ("docs/index.md", "python"): 1,
    ("docs/index.md", "shell"): 1,
    ("docs/public-models.md", "python"): 8,
    ("docs/samples.md", "python"): 8,
    ("docs/sampling.md", "python"): 1,
    ("docs/sharing.md", "python"): 2,
    ("docs/threads.md", "python"): 1,
    ("docs/training.md", "python"): 3,
    ("docs/training.md", "shell"): 5,
}
"""How many blocks of code there are; the tests here and in test_public_models.py run them, `benchmarks/docs.py` counts them."""

NO_CODE = {("docs/index.md", "text"): 1, ("docs/samples.md", "text"): 2}  # what is printed


def test_every_block_is_known() -> None:
    found = collections.Counter((b.file, CODE.get(b.kind, b.kind)) for b in all_blocks())
    assert found == BLOCKS | NO_CODE


# ---------------------------------------------------------------------------------------------------------------- Python


@pytest.mark.parametrize("index", range(BLOCKS["README.md", "python"]))
def test_readme(
    index: int, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    monkeypatch.chdir(tmp_path)
    data = load_demo_data(9, 0)
    names: dict[str, Any] = {
        "images": data.train[:64],
        "held_out": data.validation[:32],
        "generator": LadderVAE((1, 8, 8), latent_dims=(4, 2)),
    }
    chosen = blocks("README.md", "python")[index : index + 1]
    run_python(chosen, names, record_property, [SHORT_FIT, {}, SHORT_FIT | SHORT_ELBO][index])
    if index == 1:
        assert "torch.Size([3, 8])" in capsys.readouterr().out
    else:
        assert names["prior"].sample(2).shape == (2, 1, 8, 8)


def test_quickstart(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    monkeypatch.chdir(tmp_path)
    short = {"input_noise=0.15)": "iterations=3, progress=False)"}
    short["prior.fit(train)"] = "prior.fit(train, iterations=3, progress=False)"
    run_python(blocks("docs/index.md", "python"), {}, record_property, short)
    assert capsys.readouterr().out.count("% of the ") == 2
    assert [p.name for p in tmp_path.iterdir()] == ["samples.png"]


def test_guide_to_better_samples(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    """Its blocks, one after the other: two tables and five pictures."""
    monkeypatch.chdir(tmp_path)
    short = {"input_noise=0.1)": "iterations=3, progress=False)", "fit(train)": "fit(train, iterations=3, progress=False)"}
    short |= {
        "halves(held_out)": "halves(held_out[:16], features=lambda x: x.flatten(1))",
        "GaussianMixture(10": "GaussianMixture(2",
    }
    run_python(blocks("docs/samples.md", "python"), {}, record_property, short)
    assert capsys.readouterr().out.count("gap closed") == 2
    pictures = {"samples.png", "neighbours.png", "layers-gaussian.png", "layers-joint.png", "energies.png"}
    assert {p.name for p in tmp_path.iterdir()} == pictures


def test_training_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record) -> None:
    """Its blocks, one after the other."""
    monkeypatch.chdir(tmp_path)
    data = load_demo_data(9, 0)
    names: dict[str, Any] = {"images": data.train[:64], "held_out": data.validation[:32]}
    short = {"run_dir=": "iterations=3, progress=False, run_dir=", "1000, batch_size=256": "30, batch_size=20"}
    run_python(blocks("docs/training.md", "python"), names, record_property, short)
    assert names["samples"].shape == (30, 1, 8, 8)
    assert names["scores"].shape == (64,)
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"vae", "prior", "prior-2"}


def test_detection_guide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], record_property: Record
) -> None:
    """Its blocks, one after the other, with nets of the lengths that a test has time for."""
    monkeypatch.chdir(tmp_path)
    short = {"input_noise=0.1)": "iterations=40, progress=False)"}
    short["prior.fit(train)"] = "prior.fit(train, iterations=10, progress=False)"
    names = run_python(blocks("docs/detection.md", "python"), {}, record_property, short)
    assert {p.name for p in tmp_path.iterdir()} == {"explanation.png", "histograms.png", "curves.png"}
    assert "zenati, class 4 auroc_reconstruction" in capsys.readouterr().out
    assert names["detector"].offset_ < -0.5


def test_data_guide(tmp_path: Path, capsys: pytest.CaptureFixture[str], record_property: Record) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    picture(3).save(tmp_path / "train" / "cat" / "0.png")
    run_python(blocks("docs/data.md", "python"), {}, record_property, {"path/to/set": str(tmp_path)})
    assert capsys.readouterr().out == "torch.Size([1, 1, 32, 32]) tensor([0]) ('cat',)\n"


def test_questions(capsys: pytest.CaptureFixture[str], record_property: Record) -> None:
    names: dict[str, Any] = {
        "prior": JointEBMPrior(LadderVAE((1, 8, 8), (4, 2), hidden=8)),
        "images": load_demo_data(9, 0).train[:64],
    }
    run_python(blocks("docs/faq.md", "python"), names, record_property, {"steps=200": "steps=40"})
    assert names["before"].joint_accuracy is None
    assert names["after"].joint_accuracy is not None
    assert "sum of energies along the chains tensor([0., 0., 0.])" in capsys.readouterr().out


def test_threads_guide(record_property: Record) -> None:
    assert len(run_python(blocks("docs/threads.md", "python"), {}, record_property)["together"]) == 6


def test_sharing_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_python(blocks("docs/sharing.md", "python"), {}, record_property)
    assert names["images"].shape == (16, 1, 8, 8)
    assert names["again"].step_size == names["prior"].step_size
    assert {p.name for p in Path("my-digits").iterdir()} == {"README.md", "generator.safetensors", "prior.safetensors"}


@pytest.mark.parametrize("backend", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_sampling_guide(backend: str, record_property: Record) -> None:
    names: dict[str, Any] = {"generator": LadderVAE((1, 4, 4), latent_dims=(4, 2), hidden=8)}
    short = {"100_000": "50", 'backend="compiled"': f'backend="{backend}"'}
    run_python(blocks("docs/sampling.md", "python"), names, record_property, short)
    assert names["z"][0].shape == (1000, 4)
    assert names["run"].steps.tolist() == [0, 25, 50]


@pytest.mark.slow
def test_adapter_guide(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    """A model that the reader has never seen, from nothing to samples, and without a model: the blocks one after the other."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    data = load_demo_data(9, 0)
    names: dict[str, Any] = {"images": data.train[:64]}
    chosen = blocks("docs/adapters.md", "python")
    short = SHORT_FIT | {"iterations=2000)": "iterations=3, progress=False)"}
    run_python([block for block in chosen if "ConvolvedNormal" not in block.code], names, record_property, short)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "shapes, types and layer order agree with latent_shapes"
    assert any(
        line.startswith("reconstruct: the observation agrees with the model's own, on the same noise, to ") for line in out
    )
    assert any(line.startswith("kl: the sum over layers agrees, to ") for line in out)
    assert "log p of every layer is that of the map from noise" in out
    assert names["x"].shape == (16, 1, 8, 8)
    assert names["scores"].shape == (8,)
    assert out[-1] == "torch.Size([4, 1, 8, 8])"


def test_learned_compression(capsys: pytest.CaptureFixture[str], record_property: Record) -> None:
    """The block by itself, with what those before it import."""
    names: dict[str, Any] = {"torch": torch, "nn": torch.nn, "Normal": Normal, "Independent": Independent, "Inferred": Inferred}
    names |= {"check_generator": check_generator, "images": load_demo_data(9, 0).train[:8]}
    chosen = [block for block in blocks("docs/adapters.md", "python") if "ConvolvedNormal" in block.code]
    run_python(chosen, names, record_property)
    assert "reconstruct: the observation agrees with the model's own, on the same noise" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A set like MNIST, of 28 × 28 pixels and ten classes, small."""
    folder = tmp_path_factory.mktemp("digits")
    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        for split, n in (("train", 800), ("test", 120)):
            pixels = torch.randint(0, 256, (n, 28, 28), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
            images = [Image.fromarray(p.numpy()) for p in pixels]
            write_parquet(folder / "mnist", images, split, label=[i % 10 for i in range(n)])
        yield folder / "mnist"


@pytest.mark.slow
@pytest.mark.parametrize("file", ["README.md", "docs/index.md"])
def test_installing(file: str, tmp_path: Path, record_property: Record) -> None:
    """From a folder with what pip reads here; the demo is short, and of the tests one file runs."""
    for name in ("constraints.txt", "pyproject.toml", "README.md", "LICENSE", "energy_prior", "tests", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    short = {"energy-prior demo": "energy-prior demo --quick", "pytest -n 2": "pytest -n 2 -q tests/langevin/test_noise.py"}
    printed = run_shell(blocks(file, "shell"), tmp_path, record_property, short if file == "README.md" else None)
    assert printed.count("Would install energy-prior") == len(blocks(file, "shell"))
    if file == "README.md":
        assert (tmp_path / "energy-prior-demo" / "samples.png").exists()
        assert " passed in " in printed


@pytest.mark.slow
def test_checking_a_change(tmp_path: Path, record_property: Record) -> None:
    """The checks as they are, but for the types and the tests, which take minutes; they need the extra "dev"."""
    if not (shutil.which("ruff") and shutil.which("pyright") and shutil.which("mkdocs")):
        pytest.skip('needs the extra "dev"')
    short = {"pyright\n": "pyright docs\n", "--strict": f"--strict --site-dir {tmp_path / 'site'}"}
    short["pytest -n 2"] = "pytest -n 2 -q -p no:cacheprovider tests/langevin/test_noise.py"
    printed = run_shell(blocks("CONTRIBUTING.md", "shell"), ROOT, record_property, short, cache=tmp_path / "cache")
    for said in ("Would install energy-prior", "0 errors", "Contracts: 4 kept", " passed in "):
        assert said in printed
    assert (tmp_path / "site" / "contributing.html").exists()


@pytest.mark.slow
def test_training_on_several_processes(digits: Path, tmp_path: Path, record_property: Record) -> None:
    """Both commands, on the CPU and a small set."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    short = {"--data ylecun/mnist": "--data path/to/mnist --device cpu --quick --out runs/first", "path/to/mnist": str(digits)}
    short["cpu --quick\n"] = "cpu --quick --out runs/second\n"
    run_shell(blocks("docs/training.md", "shell")[:1], tmp_path, record_property, short)
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"first", "second"}


@pytest.mark.slow
def test_training_from_the_command_line(digits: Path, tmp_path: Path, record_property: Record) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    few = "iterations=5 --set fit.0.batch_size=64 --set elbo.iterations=5 --set data.validation=100"
    short = {"path/to/mnist": str(digits), "iterations=500": few, "-n 1000": "-n 20"}
    short["view.html"] = "view.html --limit 50 -n 4"
    printed = run_shell(blocks("docs/training.md", "shell")[1:], tmp_path, record_property, short)
    assert len(list((tmp_path / "samples").glob("*.png"))) == 20
    assert "60 images a side, 3 draws" in printed
    assert (tmp_path / "report" / "samples.png").exists()
    assert "the page is in view.html" in printed


@pytest.mark.slow
def test_scoring_from_the_command_line(digits: Path, tmp_path: Path, record_property: Record) -> None:
    """With a short run, and a folder of photos."""
    settings = ["generator.latent_dims=[3, 2]", "generator.hidden=8", "data.validation=100"]
    settings += [f"{part}.{name}" for part in ("elbo", "fit.0") for name in ("iterations=4", "batch_size=8", "progress=false")]
    words = [word for setting in settings for word in ("--set", setting)]
    assert main(["train", "--data", str(digits), "--out", str(tmp_path / "runs" / "mnist"), "--device", "cpu", *words]) == 0
    (tmp_path / "photos" / "test").mkdir(parents=True)
    for i in range(3):
        picture(80 * i, (28, 28)).save(tmp_path / "photos" / "test" / f"{i}.png")
    run_shell(blocks("docs/detection.md", "shell"), tmp_path, record_property)
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 4
