"""Priors on the Hugging Face hub, of which a stand-in runs here; and the priors that come with the package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hub_stand_in import HubStandIn, hub_stand_in
from torch import Tensor, nn

from energy_prior import (
    ArgumentError,
    CheckpointError,
    HubError,
    JointEBMPrior,
    LadderVAE,
    ModelCard,
    ResidualVAE,
    load_example,
    pretrained,
)
from energy_prior.cli.demo import load_demo_data
from energy_prior.cli.train import load_run, read_run
from energy_prior.generators.build import describe_generator, write_generator
from energy_prior.pretrained import EXAMPLES

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")  # of the hub's own client

NUMPYS: Any = np.float32(1.23456)
RIGHT, WRONG = "hf_right", "hf_wrong"
NO_NAMES = ("", "a/b/c", "a b", "https://huggingface.co/me/digits", "me/digits@main", "/nowhere/at/all")


def small() -> JointEBMPrior:
    torch.manual_seed(0)
    prior = JointEBMPrior(LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8))
    with torch.no_grad():
        for weights in prior.energies.parameters():
            weights.normal_()
    return prior


def drawn(prior: JointEBMPrior) -> Tensor:
    return prior.sample(3, steps=2, rng=torch.Generator().manual_seed(0))


def code_of(card: str) -> str:
    return card.partition("```python\n")[2].partition("```")[0]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    with hub_stand_in(monkeypatch) as running:
        yield running


# ------------------------------------------------------------------------------------------------------------------ the hub


def test_there_and_back(hub: HubStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole model: the same samples, from the hub and from what was downloaded; and nothing but safetensors and text."""
    prior = small()
    address = prior.push_to_hub("me/digits", ModelCard(license="mit"), private=True, token=RIGHT)
    assert address.startswith(f"{hub.url}/me/digits/commit/")
    assert hub.private == {"me/digits"}
    files = hub.branches["me/digits"]["main"]
    assert set(files) == {".gitattributes", "README.md", "generator.safetensors", "prior.safetensors"}
    again = JointEBMPrior.from_pretrained("me/digits", cache_dir=tmp_path)
    assert torch.equal(drawn(again), drawn(prior))
    assert len(hub.large) == 2, "weights are uploaded apart from their commit"
    count = len(hub.asked)
    kept = JointEBMPrior.from_pretrained("me/digits", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(drawn(kept), drawn(prior))
    assert len(hub.asked) == count


def test_a_branch(hub: HubStandIn, tmp_path: Path) -> None:
    """Each revision has what was written to it."""
    first, second = small(), small()
    with torch.no_grad():
        next(second.energies.parameters()).add_(1)
    first.push_to_hub("me/digits", token=RIGHT)
    second.push_to_hub("me/digits", token=RIGHT, revision="second", commit_message="Another one")
    for revision, prior in ((None, first), ("main", first), ("second", second)):
        assert torch.equal(
            drawn(JointEBMPrior.from_pretrained("me/digits", cache_dir=tmp_path, revision=revision)), drawn(prior)
        )


def test_what_the_hub_refuses(hub: HubStandIn, tmp_path: Path) -> None:
    prior = small()
    with pytest.raises(HubError, match=r"repo_id: 'me/digits' cannot be written: .*401 .*or token=…\)\.$"):
        prior.push_to_hub("me/digits", token=WRONG)
    with pytest.raises(HubError, match="source: 'me/none' is no folder here, and cannot be downloaded from the hub: "):
        JointEBMPrior.from_pretrained("me/none", cache_dir=tmp_path)
    prior.push_to_hub("me/digits", token=RIGHT)
    with pytest.raises(HubError, match="RevisionNotFoundError"):
        JointEBMPrior.from_pretrained("me/digits", cache_dir=tmp_path, revision="none")
    with pytest.raises(HubError, match="cannot be downloaded"):
        JointEBMPrior.from_pretrained("me/digits", cache_dir=tmp_path / "empty", local_files_only=True)
    del hub.branches["me/digits"]["main"]["prior.safetensors"]
    with pytest.raises(FileNotFoundError, match="'me/digits' holds no prior.safetensors"):
        JointEBMPrior.from_pretrained("me/digits", cache_dir=tmp_path / "other")


def test_a_hub_that_is_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with hub_stand_in(monkeypatch) as hub:
        address = hub.url
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    with pytest.raises(HubError, match="cannot be downloaded from the hub: (LocalEntryNotFoundError|ConnectError)"):
        JointEBMPrior.from_pretrained("me/digits", cache_dir=tmp_path)


def test_a_file_that_was_damaged_on_the_way(hub: HubStandIn, tmp_path: Path) -> None:
    small().push_to_hub("me/digits", token=RIGHT)
    for name in ("generator.safetensors", "prior.safetensors"):
        files = hub.branches["me/digits"]["main"]
        whole = files[name]
        files[name] = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
        with pytest.raises(CheckpointError, match=f"{name}' is damaged: it does not hold what was written"):
            JointEBMPrior.from_pretrained("me/digits", cache_dir=tmp_path / name)
        files[name] = whole


@pytest.mark.parametrize("source", NO_NAMES)
def test_names_that_are_none(source: str) -> None:
    with pytest.raises(ArgumentError, match="source: expected|path: expected"):
        JointEBMPrior.from_pretrained(source)
    with pytest.raises(ArgumentError, match='repo_id: expected the name of a repository, "owner/name"'):
        small().push_to_hub(source)


def test_a_push_without_a_card_keeps_that_which_is_there(hub: HubStandIn) -> None:
    prior = small()
    prior.push_to_hub("me/digits", ModelCard(data="Mine."), token=RIGHT)
    prior.push_to_hub("me/digits", token=RIGHT)
    assert b"Mine." in hub.branches["me/digits"]["main"]["README.md"]
    prior.push_to_hub("me/digits", ModelCard(data="Yours."), token=RIGHT)
    assert b"Yours." in hub.branches["me/digits"]["main"]["README.md"]


def test_a_generator_of_before_goes(hub: HubStandIn, tmp_path: Path) -> None:
    """A prior of another generator is not loaded around the one that was there."""
    own = JointEBMPrior(OwnLadder((1, 4, 4), latent_dims=(3, 2), hidden=8))
    for prior in (small(), own):
        prior.push_to_hub("me/digits", token=RIGHT)
        prior.save_pretrained(tmp_path / "here")
    assert "generator.safetensors" not in hub.branches["me/digits"]["main"]
    for source in ("me/digits", tmp_path / "here"):
        with pytest.raises(ArgumentError, match="holds a prior without its generator"):
            JointEBMPrior.from_pretrained(source, cache_dir=tmp_path / "cache")


def test_only_what_is_wanted_is_downloaded(hub: HubStandIn, tmp_path: Path) -> None:
    prior = small()
    prior.push_to_hub("me/digits", token=RIGHT)
    JointEBMPrior.from_pretrained("me/digits", prior.generator, cache_dir=tmp_path)
    assert not [asked for asked in hub.asked if asked.startswith("GET") and "generator.safetensors" in asked]
    assert [asked for asked in hub.asked if asked.startswith("GET") and "prior.safetensors" in asked]


# ------------------------------------------------------------------------------------------------------------------ folders


class OwnLadder(LadderVAE):
    """A generator that is not the library's."""


class OwnEnergy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, z: Tensor) -> Tensor:
        return -self.weight * z.flatten(1).square().sum(1)


def test_models_of_the_users_own(tmp_path: Path) -> None:
    """Generator and energies that no file can hold are asked for, and the card says so."""
    vae = OwnLadder((1, 4, 4), latent_dims=(3, 2), hidden=8)
    prior = JointEBMPrior(vae, [OwnEnergy(), OwnEnergy()])
    prior.save_pretrained(tmp_path / "own")
    assert sorted(p.name for p in (tmp_path / "own").iterdir()) == ["README.md", "prior.safetensors"]
    with pytest.raises(ArgumentError, match="generator: .* holds a prior without its generator.* Pass the generator"):
        JointEBMPrior.from_pretrained(tmp_path / "own")
    with pytest.raises(CheckpointError, match=r"Pass energies=\[…\] to load"):
        JointEBMPrior.from_pretrained(tmp_path / "own", vae)
    again = JointEBMPrior.from_pretrained(tmp_path / "own", vae, [OwnEnergy(), OwnEnergy()])
    assert torch.equal(drawn(again), drawn(prior))
    card = (tmp_path / "own" / "README.md").read_text()
    assert 'JointEBMPrior.from_pretrained("own", generator, energies=energies)' in card
    assert "| generator | OwnLadder, not part of the files |" in card
    with pytest.raises(CheckpointError, match="other weights|fitted on"):
        JointEBMPrior.from_pretrained(tmp_path / "own", OwnLadder((1, 4, 4), latent_dims=(3, 2), hidden=8), [OwnEnergy()] * 2)


def test_a_deep_generator(tmp_path: Path) -> None:
    prior = JointEBMPrior(ResidualVAE((1, 8, 8), groups=(2, 2), channels=4, latent_channels=2, tower_cells=0, downsample=0))
    prior.save_pretrained(tmp_path)
    assert torch.equal(drawn(JointEBMPrior.from_pretrained(tmp_path)), drawn(prior))
    assert "| energies | 4 DenoisingEnergy; " in (tmp_path / "README.md").read_text()


def test_another_dtype(tmp_path: Path) -> None:
    prior = small().double()
    prior.save_pretrained(tmp_path)
    assert torch.equal(drawn(JointEBMPrior.from_pretrained(tmp_path)), drawn(prior))


def test_a_run_of_the_command_line(tmp_path: Path) -> None:
    """Its folder and that of `save_pretrained` are alike, and one can be the other."""
    prior = small()
    vae: Any = prior.generator
    reading = {"value_range": None, "channel_order": None, "background": 0.5}
    write_generator(tmp_path / "generator.safetensors", vae, describe_generator(vae) or {}, vae.x_shape, reading)
    prior.save(tmp_path / "prior.safetensors")
    for _ in range(2):
        assert torch.equal(drawn(JointEBMPrior.from_pretrained(tmp_path)), drawn(prior))
        assert torch.equal(drawn(load_run(tmp_path)), drawn(prior))
        assert read_run(tmp_path)[1] == reading
        prior.save_pretrained(tmp_path)


def test_a_prior_that_was_trained_jointly(tmp_path: Path) -> None:
    prior = small()
    prior.train_jointly()
    prior.save_pretrained(tmp_path)
    again = JointEBMPrior.from_pretrained(tmp_path)
    assert again.trained_jointly
    assert torch.equal(drawn(again), drawn(prior))


# ----------------------------------------------------------------------------------------------------------------- the card


def test_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its metadata are YAML that the hub reads, its code runs, and all that was passed is there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(b"picture")
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "own.png").write_bytes(b"is there already")
    card = ModelCard(
        data="Ten digits.",
        license="cc-by-4.0",
        figures={"a|b\nc": NUMPYS, "images": 12_345, "what": "text"},
        settings={"fit": [{"method": "nce"}]},
        pictures={"samples.png": "a.png", "own.png": "digits/own.png"},
        text="## More\n\nMuch more.",
        tags=("digits", "energy-prior"),
    )
    prior = small()
    prior.save_pretrained("digits", card)
    text = Path("digits/README.md").read_text(encoding="utf-8")
    _, metadata, body = text.split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "library_name": "energy-prior",
        "license": "cc-by-4.0",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["energy-prior", "energy-based-model", "hierarchical-vae", "digits"],
    }
    for part in (
        *("# digits\n", "![samples](samples.png)", "| a\\|b c | 1.235 |", "| images | 12,345 |", "| what | text |"),
        *("Ten digits.", '"method": "nce"', "## More\n\nMuch more.", "cc-by-4.0", "z_1 (3,), z_2 (2,); z_1 nearest"),
        "| calibrated for anomaly scores | no |",
    ):
        assert part in body
    assert Path("digits/samples.png").read_bytes() == b"picture"
    assert Path("digits/own.png").read_bytes() == b"is there already"
    names: dict[str, Any] = {}
    exec(code_of(body), names)  # noqa: S102
    assert names["x"].shape == (16, 1, 4, 4)
    assert torch.equal(drawn(names["prior"]), drawn(prior))
    prior.save_pretrained("digits")
    assert Path("digits/README.md").read_text(encoding="utf-8") == text, "without a card that which is there stays"
    no_card: Any = {"data": "x"}
    with pytest.raises(ArgumentError, match=r"card: expected a ModelCard, got \{'data': 'x'\}"):
        prior.save_pretrained("other", no_card)
    assert not Path("other").exists()
    prior.save_pretrained("other")
    assert "## Data\n\nNot stated." in Path("other/README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pictures": {"../a.png": "a"}}, "pictures: expected names such as 'samples.png', got '../a.png'"),
        ({"pictures": {"a.png": "/nowhere"}}, "pictures: there is no file '/nowhere' for a.png"),
        ({"figures": {"a": [1]}}, r"figures: expected finite numbers or text, got \[1\] for 'a'"),
        ({"figures": {"a": float("nan")}}, "figures: expected finite numbers or text, got nan for 'a'"),
        ({"figures": [1]}, r"figures: expected a dict, got \[1\]"),
        ({"settings": {"a": object()}}, "settings: expected plain values"),
        ({"settings": {"a": float("nan")}}, "settings: expected plain values"),
        ({"license": 3}, "license: expected text or None, got 3"),
        ({"tags": "digits"}, "tags: expected a tuple of texts, got 'digits'"),
    ],
)
def test_a_card_that_is_impossible(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        ModelCard(**arguments)


def test_the_card_of_a_run(tmp_path: Path) -> None:
    run, evaluation = tmp_path / "run", tmp_path / "evaluation"
    for folder in (run, evaluation):
        folder.mkdir()
        (folder / "samples.png").write_bytes(folder.name.encode())
    recipe = {"data": {"source": str(tmp_path / "mnist"), "size": 8}, "generator": {"hidden": 8}, "fit": [{"method": "nce"}]}
    fit = {"method": "nce", "last": {"loss": 1.0}, "mismatch": {"accuracy": 0.75, "joint_accuracy": 0.5, "draws": 3}}
    report = {"images": 100, "recipe": recipe, "elbo": {"validation_elbo": -12.5, "iteration": 3}, "fit-0-nce": fit}
    (run / "report.json").write_text(json.dumps(report))
    (evaluation / "report.json").write_text(json.dumps({"images": 50, "joint": {"frechet": {"mean": 3.5, "sd": None}}}))
    card = ModelCard.of_run(run, evaluation=evaluation, license="mit")
    assert card.settings == {**recipe, "data": {"source": "mnist", "size": 8}}, "a path of this machine is nobody's business"
    assert (card.data, card.license) == ("mnist", "mit")
    assert list(card.figures.values()) == [100, -12.5, 0.75, 0.5, 50, 3.5]
    assert list(card.figures)[-2:] == ["evaluation, images", "evaluation, joint, frechet, mean"]
    assert set(card.pictures) == {"samples.png", "evaluation.png"}
    assert ModelCard.of_run(run, data="MNIST").data == "MNIST"
    for content in ("[]", "{"):
        (run / "report.json").write_text(content)
        with pytest.raises(CheckpointError, match="report.json' is damaged"):
            ModelCard.of_run(run)
    with pytest.raises(FileNotFoundError, match="There is no report.json in"):
        ModelCard.of_run(tmp_path)


# ------------------------------------------------------------------------------------------------- what comes with the package


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_small_and_make_images(name: str) -> None:
    folder = Path(pretrained.__file__).parent / name
    assert sum(p.stat().st_size for p in folder.iterdir()) < 2**20
    x = load_example(name).sample(8, rng=torch.Generator().manual_seed(0))
    assert bool(((x >= 0) & (x <= 1)).all())


def test_the_digits_know_their_digits() -> None:
    """Upright ones from turned ones, as their card says."""
    data = load_demo_data(9, 0)
    digits = torch.cat([data.train, data.test])[:300]
    prior = load_example("digits")
    threshold = prior.threshold(0.95)
    assert (prior.anomaly_score(digits) > threshold).float().mean() < 0.15
    assert (prior.anomaly_score(digits.rot90(1, (2, 3))) > threshold).float().mean() > 0.9


def test_loading_draws_no_random_number() -> None:
    """Of torch's global stream: the weights that are made are replaced."""
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    load_example("digits")
    assert torch.equal(torch.rand(1), expected)


def test_no_such_example() -> None:
    with pytest.raises(ArgumentError, match=r"name: expected one of \('digits',\), got 'faces'"):
        load_example("faces")
