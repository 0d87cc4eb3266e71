"""`energy-prior train`: a recipe from a file or from flags, checked before the first step, run, killed and run on."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from pictures import picture, write_parquet
from safetensors.torch import load_file, save_file

from energy_prior import ArgumentError, CheckpointError, JointEBMPrior, LadderVAE
from energy_prior.checkpoint import GENERATOR, write_checkpoint
from energy_prior.cli.main import main
from energy_prior.cli.recipe import read_recipe, settings_help
from energy_prior.cli.train import load_run, read_run
from energy_prior.generators.build import describe_generator
from energy_prior.training import ElboConfig, FitConfig

RECIPE = """
data: {{source: {data}, validation: 6}}
generator: {{latent_dims: [3, 2], hidden: 8}}
elbo: {{iterations: 4, learning_rate: 1e-3, batch_size: 8, progress: false}}
fit:
  - {{method: nce, iterations: 4, batch_size: 8, progress: false}}
  - {{method: two_stage, iterations: 3, batch_size: 8, steps: 3, progress: false}}
out: {out}
seed: 3
"""


FACTORY = """
from energy_prior import LadderVAE

def make(x_shape, width):
    return LadderVAE(x_shape, (width, 2), hidden=8)
"""


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    images = [picture(10 * i % 255, (6, 6)) for i in range(30)]
    data = write_parquet(tmp_path / "set", images)
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(data=data, out=tmp_path / "out"))
    return file


def test_a_recipe_from_a_file_and_flags(recipe: Path) -> None:
    read = read_recipe(recipe, ["fit.0.learning_rate=5e-4", "fit.2.method=joint", "elbo.kl_warmup=null", "seed=9"])
    assert read.elbo == ElboConfig(iterations=4, learning_rate=1e-3, batch_size=8, progress=False)
    assert [method for method, _ in read.fit] == ["nce", "two_stage", "joint"]
    assert read.fit[0][1].learning_rate == 5e-4
    assert read.fit[2][1] == FitConfig()
    assert read.seed == 9
    bare = read_recipe(None, ["data.source=somewhere", "elbo=null", "generator.factory=a:b"])
    assert bare.elbo is None
    assert bare.fit == ((None, FitConfig()),)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fit.0.learning_rat=1", "learning_rat: not a setting of fit.0. Did you mean 'learning_rate'"),
        ("fit.0.learning_rate=-1", "fit.0.learning_rate: expected a finite number above 0, got -1"),
        ("fit.0.method=gan", r"fit.0.method: expected one of \('denoising', 'nce'"),
        ("fit.5.method=nce", "expected a number from 0 to 2 after the list's name, got '5'"),
        ("fit=nce", "fit: expected a list of fits"),
        ("elbo.kl_warmup=9", "elbo.kl_warmup: expected fewer than iterations = 4"),
        ("data.validation=0", "data.validation: expected a whole number"),
        ("data.source=", "data.source: expected a folder or the name of a set on the hub, got None"),
        ("generator.width=3", "generator.width: not an argument of LadderVAE. There are latent_dims"),
        ("elbo=null", "elbo: null says that the generator comes trained, but those of the library do not"),
        ("generator.latent_dims=8", "generator.latent_dims: expected a sequence of whole numbers, got 8"),
        ("generator.latent_dims=[0]", "generator.latent_dims: expected a whole number of at least 1"),
        ("model=vae", "model: not a section of a recipe"),
        ("seed", "--set: expected KEY=VALUE, got 'seed'"),
        ("seed.a=1", "seed.a: 'a' would be inside 3, which is no section"),
        ("elbo=[", "elbo: not valid YAML"),
        ("elbo={1: 2}", "elbo: expected text as the name of an entry, got 1"),
        ("generator={hidden: 1000000000000, latent_dims: [1000000000000]}", "generator: LadderVAE cannot be built from"),
        ("generator.hidden=0", "generator.hidden: expected a whole number of at least 1"),
        ("generator.depth=0", "generator.depth: expected a whole number of at least 1"),
        ("generator.depth=x", "generator.depth: expected a whole number of at least 1, got 'x'"),
        ("generator.latent_dims=[1, 1, 1, 1, 0]", "generator.latent_dims: expected a whole number of at least 1, got 0"),
        ("generator.nets=[conv]", "generator.nets: expected one of"),
        ("generator.self=3", "generator.self: not an argument of LadderVAE"),
        ("generator.kind=VAE", "generator.kind: expected one of LadderVAE, ResidualVAE, got 'VAE'"),
        ("generator={kind: ResidualVAE, latent_dims: [2]}", "generator.latent_dims: not an argument of ResidualVAE"),
        ("device=meta", "device meta: not available here"),
        ("device='cuda:99999999999999999999'", "device cuda:99999999999999999999: not available here"),
        ('out="\\0"', "out: expected text that can be written"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_runs(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        read_recipe(recipe, [override])
    assert not (recipe.parent / "out").exists()


def test_train_writes_everything_and_goes_on(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = recipe.parent / "out"
    assert main(["train", str(recipe)]) == 0
    assert {p.name for p in out.iterdir()} == {
        "elbo", "fit-0-nce", "fit-1-two_stage", "generator.safetensors", "prior.safetensors", "report.json", "samples.png"
    }  # fmt: skip
    first = load_file(out / "prior.safetensors")
    report = json.loads((out / "report.json").read_text())
    assert set(report) == {"images", "recipe", "elbo", "fit-0-nce", "fit-1-two_stage"}
    assert "weight_decay" not in report["recipe"]["fit"][0], "what is at its default is left out"
    same = recipe.with_name("same.yaml")
    same.write_text(json.dumps(report["recipe"] | {"out": str(out), "device": "cpu"}))
    assert read_recipe(same) == dataclasses.replace(read_recipe(recipe), out=str(out), device="cpu")
    assert main(["train", str(recipe)]) == 0, "all of it is there: it ends at once, with the same files"
    again = load_file(out / "prior.safetensors")
    assert all(torch.equal(again[name], value) for name, value in first.items())
    vae = LadderVAE((1, 6, 6), latent_dims=(3, 2), hidden=8)
    vae.load_state_dict(load_file(out / "generator.safetensors"))
    assert JointEBMPrior.load(out / "prior.safetensors", vae).sample(2).shape == (2, 1, 6, 6)
    again_here = load_run(out)
    seed = torch.Generator().manual_seed(0)
    assert torch.equal(
        again_here.sample(2, rng=seed), JointEBMPrior.load(out / "prior.safetensors", vae).sample(2, rng=seed.manual_seed(0))
    )
    assert main(["train", str(recipe), "--set", "elbo.iterations=5"]) == 2
    assert "cannot go on like this: iterations was 4, now 5" in capsys.readouterr().err


def test_a_factory_in_the_current_folder(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when the command is run in a project's own folder; and what is said of factories that cannot be used."""
    (recipe.parent / "my_own_models.py").write_text(FACTORY)
    (recipe.parent / "no_python.py").write_text("a b")
    monkeypatch.chdir(recipe.parent)
    path = list(sys.path)
    once = "fit=[{method: nce, iterations: 2, batch_size: 8, step_size: 0.3, progress: false}]"
    own = ["--set", "generator={factory: 'my_own_models:make', width: 4}", "--set", once]
    assert main(["train", str(recipe), *own, "--out", "here", "--seed", "1", "--device", "cpu"]) == 0
    with pytest.raises(
        CheckpointError, match="factory 'my_own_models:make', and a function is not run because a file names it"
    ):
        load_run("here")
    with pytest.raises(CheckpointError, match="pass factory='my_own_models:make'"):
        load_run("here", "my_own_models:other")
    assert load_run("here", "my_own_models:make").sample_latents(2, steps=1)[0].shape == (2, 4)
    for factory, message in (
        ("nowhere:f", "cannot import"),
        ("f", 'expected "module:function"'),
        (":f", "cannot import ':f': ValueError"),
        ("no_python:f", "cannot import 'no_python:f': SyntaxError"),
        ("builtins:print", "nn.Module"),
        ("my_own_models:make", "raised TypeError for images of shape (1, 6, 6) and {}"),
    ):
        made = ["--set", f"generator={{factory: '{factory}'}}", "--out", "not-here"]
        assert main(["train", str(recipe), *made]) == 2
        assert message in capsys.readouterr().err
    assert sys.path == path


def test_a_home_folder_is_expanded(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In the recipe's own path, in data.source, in out and in what `load_run` gets."""
    monkeypatch.setenv("HOME", str(recipe.parent))
    monkeypatch.chdir(recipe.parent / "set")  # where nothing may be written
    once = "fit=[{method: nce, iterations: 1, batch_size: 8, step_size: 0.3, progress: false}]"
    assert main(["train", "~/recipe.yaml", "--set", "data.source='~/set'", "--set", once, "--out", "~/home"]) == 0
    assert load_run("~/home").x_shape == (1, 6, 6)
    assert [p.name for p in Path.cwd().iterdir()] == ["train-00000-of-00001.parquet"]
    assert main(["train", "~/recipe.yaml", "--out", ""]) == 2
    assert "out: expected" in capsys.readouterr().err
    with pytest.raises(ArgumentError, match="folder: expected a path, got an empty text"):
        load_run("")


def test_a_folder_that_holds_no_run(recipe: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No checkpoint at"):
        load_run(recipe.parent)
    save_file({"a": torch.zeros(1)}, recipe.parent / "generator.safetensors")
    with pytest.raises(
        CheckpointError, match="not a checkpoint of energy-prior .* `energy-prior train` or `save_pretrained` wrote"
    ):
        load_run(recipe.parent)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fit.1.batch_size=25", "fit.1.batch_size: expected at most the 24 images that a process trains on, got 25"),
        ("elbo.batch_size=99", "elbo.batch_size: expected at most the 24 images"),
        ("data.size=0", "data.size: expected a whole number"),
        ("data.source=/nowhere", "data.source: there is no folder '/nowhere'"),
    ],
)
def test_data_are_checked_before_the_first_step(
    recipe: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe), "--set", override]) == 2
    assert message in capsys.readouterr().err
    assert not (recipe.parent / "out" / "elbo").exists()


def test_an_out_that_is_a_file(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "--out", str(recipe)]) == 2
    assert "out: expected a folder to write to, but" in capsys.readouterr().err


def test_too_few_images(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "--set", "data.validation=30"]) == 2
    assert "data.validation: expected fewer than the 30 images, got 30" in capsys.readouterr().err
    assert main(["train", str(recipe.parent / "none.yaml")]) == 2
    assert "There is no file" in capsys.readouterr().err


def test_every_setting_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--settings"]) == 0
    text = capsys.readouterr().out
    assert text.strip() == settings_help()
    for kind in (ElboConfig, FitConfig):
        for field in dataclasses.fields(kind):
            line: Any = next(line for line in text.splitlines() if line.strip().startswith(f"{field.name}:"))
            assert len(line.partition("#")[2].strip()) > 10, field.name


@pytest.mark.parametrize("name", ["2024_01_15", "0755", "runs #2", "on", "1e3", "null"])
def test_a_folder_is_named_as_it_is_written(name: str) -> None:
    """A flag is text, not YAML; in a recipe such names need quotes, and other values are refused."""
    assert read_recipe(None, ["data.source=x"], {"out": name}).out == name
    if name != "1e3":  # which is a number in a recipe, quoted or not
        assert read_recipe(None, ["data.source=x", f"out='{name}'"]).out == name


def test_an_out_that_is_no_text() -> None:
    with pytest.raises(ArgumentError, match="out: expected text, got 20240115. Put it in quotes."):
        read_recipe(None, ["data.source=x", "out=2024_01_15"])


def test_a_recipe_takes_no_memory_for_what_it_describes() -> None:
    """Whatever its sizes, no weight is made before the run, and of many layers a few stand for all."""
    before = time.process_time()
    read = read_recipe(None, ["data.source=x", "generator={hidden: 50000, latent_dims: [100000, 100000], depth: 1000000000}"])
    assert read.generator["depth"] == 10**9
    assert len(read_recipe(None, ["data.source=x", f"generator.latent_dims={[1] * 15_000}"]).generator["latent_dims"]) == 15_000
    assert time.process_time() - before < 4


def saved(folder: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]]:
    """A folder as `energy-prior train` leaves it, and what its file of the generator holds."""
    folder.mkdir()
    vae = LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8)
    described = {"generator": describe_generator(vae), "x_shape": [1, 4, 4]}
    described["reading"] = {"value_range": None, "channel_order": None, "background": 1.0}
    write_checkpoint(folder / "generator.safetensors", vae.state_dict(), described, GENERATOR)
    JointEBMPrior(vae).save(folder / "prior.safetensors")
    return folder / "generator.safetensors", vae.state_dict(), described


def ladder(**arguments: Any) -> dict[str, Any]:
    return {"kind": "LadderVAE", **arguments}


GENERATORS: list[tuple[dict[str, Any], str]] = [
    ({"generator": None}, "what it says of its generator and images is incomplete or impossible"),
    ({"generator": []}, "what it says of its generator and images is incomplete or impossible"),
    ({"x_shape": None}, "what it says of its generator and images is incomplete or impossible"),
    ({"x_shape": ["a"]}, "what it says of its generator and images is incomplete or impossible"),
    ({"x_shape": [10**30]}, "what it says of its generator and images is incomplete or impossible"),
    ({"x_shape": [1, 4, 5]}, "the generator that it describes has other weights"),
    ({"x_shape": [1, 100_000, 100_000]}, "the generator that it describes has other weights"),
    (
        {"generator": ladder(latent_dims=[3, 2], hidden=9)},
        "the generator that it describes has other weights",
    ),
    (
        {"generator": ladder(latent_dims=[3, 2], hidden=10**6)},
        "the generator that it describes has other weights",
    ),
    (
        {"generator": ladder(latent_dims=[3, 2], hidden=10**12)},
        "generator: LadderVAE cannot be built from",
    ),
    (
        {"generator": ladder(latent_dims=[3, 2], hidden=8, depth=10**9)},
        "it asks for more layers than it has weights",
    ),
    ({"generator": ladder(latent_dims=[1] * 100_000)}, "it asks for more layers than it has weights"),
    (
        {"generator": ladder(latent_dims=[3, 2], hidden=8, more=3)},
        "generator.more: not an argument of LadderVAE",
    ),
    ({"generator": {"kind": "print"}}, "it describes a generator that this version does not have, {'kind': 'print'"),
    ({"generator": {}}, "it describes a generator that this version does not have, {}"),
    ({"generator": ladder(kind="ResidualVAE", groups=[10**9])}, "it asks for more layers than it has weights"),
    ({"generator": ladder(kind="ResidualVAE", downsample=10**9)}, "it asks for more layers than it has weights"),
    ({"generator": {"factory": "os:mkdir"}}, "factory 'os:mkdir', and a function is not run because a file names it"),
    ({"generator": {"factory": 3}}, "factory 3, and a function is not run because a file names it"),
]


@pytest.mark.parametrize(("change", "words"), GENERATORS, ids=range(len(GENERATORS)))
def test_a_generator_that_is_not_what_it_says(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    path, weights, described = saved(tmp_path / "run")
    assert load_run(path.parent).x_shape == (1, 4, 4)
    write_checkpoint(path, weights, described | change, GENERATOR)
    before = time.process_time()
    with pytest.raises(CheckpointError, match=f"generator.safetensors' .*{words}") as error:
        load_run(path.parent)
    assert len(str(error.value)) < 600
    assert time.process_time() - before < 4


def test_what_is_said_of_reading(tmp_path: Path) -> None:
    path, weights, described = saved(tmp_path / "run")
    assert read_run(path.parent)[1] == described["reading"]
    write_checkpoint(path, weights, described | {"reading": None}, GENERATOR)
    assert read_run(path.parent)[1] == {}, "as JointEBMPrior.save_pretrained writes it"
    for reading in (3, [], {"value_range": 3}, {"os": 1}):
        write_checkpoint(path, weights, described | {"reading": reading}, GENERATOR)
        with pytest.raises(CheckpointError, match="is damaged: what it says of reading images is impossible"):
            read_run(path.parent)


def test_a_flipped_bit_of_the_generator(tmp_path: Path) -> None:
    path, *_ = saved(tmp_path / "run")
    content = bytearray(path.read_bytes())
    content[-2] ^= 4
    path.write_bytes(content)
    for read in (load_run, read_run):
        with pytest.raises(CheckpointError, match="generator.safetensors' is damaged: .*by its digest. Write it again"):
            read(path.parent)


def test_a_factory_where_there_is_none(tmp_path: Path) -> None:
    path, *_ = saved(tmp_path / "run")
    with pytest.raises(ArgumentError, match="factory: the generator in .* is one of the library's, of no factory; got 'a:b'"):
        load_run(path.parent, "a:b")
