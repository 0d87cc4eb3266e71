"""Priors on the Hugging Face hub: the files of one, its card, and how they get there and back."""

from __future__ import annotations

__all__ = ["PRIOR_FILE", "ModelCard", "fetched", "read_generator", "upload", "write_card", "write_generator"]

import contextlib
import json
import os
import re
import shutil
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from energy_prior._util import first_line, shown
from energy_prior.checkpoint import GENERATOR, read_checkpoint, write_checkpoint
from energy_prior.checks.settings import check_path, require_extra
from energy_prior.errors import ArgumentError, CheckpointError, HubError
from energy_prior.generators.build import build_generator, describe_generator

PRIOR_FILE, GENERATOR_FILE, CARD_FILE = "prior.safetensors", "generator.safetensors", "README.md"
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PICTURE = re.compile(r"[\w-]+\.(png|jpg|jpeg|svg|webp)")
_NAMES = {
    "images": "training images",
    "elbo, validation_elbo": "ELBO of held-out images, nats",
    "accuracy": "accuracy of telling posterior draws from those of the generator's prior",
    "joint_accuracy": "the same, from those of the joint prior",
}
_FIGURES_LIKE = (int, float, str)


@dataclass(frozen=True)
class ModelCard:
    """What the page of a prior on the hub says beside what the prior says of itself.

    Attributes:
        data: what generator and prior were trained on, in words.
        license: of the weights, as the hub names licences ("mit", "cc-by-4.0", …); None: not stated.
        figures: name -> number or text, a table of the page, such as {"Fréchet distance, joint prior": 12.3}.
        settings: of the training: plain values, dicts and lists, written as JSON.
        pictures: name on the page ("samples.png") -> file that it is copied from.
        text: further text, Markdown.
        tags: more tags than those that every prior gets.

    Raises:
        ArgumentError: if a picture has a name that the page cannot have, is missing, or a value cannot be written as JSON.

    Examples:
        >>> card = ModelCard(data="1,797 scans of handwritten digits", license="cc-by-4.0", figures={"accuracy": 0.61})
        >>> card.license
        'cc-by-4.0'
    """

    data: str | None = None
    license: str | None = None
    figures: Mapping[str, float | str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, str | os.PathLike[str]] = field(default_factory=dict)
    text: str | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, file in self.pictures.items():
            if not _PICTURE.fullmatch(name):
                raise ArgumentError(f"pictures: expected names such as 'samples.png', got {shown(name)}.")
            if not check_path("pictures", file).is_file():
                raise ArgumentError(f"pictures: there is no file {os.fspath(file)!r} for {name}.")
        for name, value in self.figures.items():
            if not isinstance(value, _FIGURES_LIKE):
                raise ArgumentError(f"figures: expected numbers or text, got {shown(value)} for {name!r}.")
        try:
            json.dumps(dict(self.settings))
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"settings: expected plain values, which JSON can hold ({first_line(error)}).") from error

    @classmethod
    def of_run(
        cls, folder: str | os.PathLike[str], *, evaluation: str | os.PathLike[str] | None = None, **more: Any
    ) -> ModelCard:
        """The card of a run of `energy-prior train`: its recipe, figures and samples.

        Args:
            folder: what the recipe calls "out".
            evaluation: what `energy-prior evaluate --out` wrote for it: its figures and picture are taken too.
            **more: other attributes of the card, such as `data` and `license`; what is given here goes first.

        Raises:
            FileNotFoundError: if there is no report.json in a folder.
            CheckpointError: if one of them cannot be read.
        """
        run = check_path("folder", folder)
        report = _report(run)
        figures = {_NAMES[name]: value for name, value in _numbers("", report).items() if name in _NAMES}
        for name, entry in report.items():
            mismatch = entry.get("mismatch") if isinstance(entry, dict) else None
            found = _numbers("", mismatch)
            figures |= {f"{name}: {_NAMES[key]}": value for key, value in found.items() if key in _NAMES}
        pictures = {"samples.png": run / "samples.png"} if (run / "samples.png").is_file() else {}
        if evaluation is not None:
            place = check_path("evaluation", evaluation)
            figures |= _numbers("", _report(place))
            if (place / "samples.png").is_file():
                pictures["evaluation.png"] = place / "samples.png"
        recipe = report.get("recipe", {})
        known: dict[str, Any] = {"data": _source(recipe), "figures": figures, "settings": recipe, "pictures": pictures}
        return cls(**known | more)


def write_generator(folder: Path, generator: object) -> bool:
    """Writes a generator of the library, whole; False for any other, of which nothing is written."""
    described = describe_generator(generator)
    if described is None or not isinstance(generator, nn.Module):
        return False
    write_checkpoint(folder / GENERATOR_FILE, generator.state_dict(), described, GENERATOR)
    return True


def read_generator(folder: Path) -> Any:
    """The generator that `write_generator` wrote, on the CPU.

    Raises:
        ArgumentError: if there is none, as the prior is of a generator of the user's own.
        CheckpointError: if the file is damaged.
    """
    file = folder / GENERATOR_FILE
    if not file.is_file():
        raise ArgumentError(
            f"generator: {str(folder)!r} holds a prior without its generator, which is not one of the library's. Pass the "
            "generator that the prior was fitted on; the card may say where it is from."
        )
    weights, described = read_checkpoint(file, GENERATOR, "Use another copy.")
    return build_generator(file, described, weights)


@contextlib.contextmanager
def _talking(what: str) -> Generator[None]:
    """What the hub, its client or the network raise inside becomes a `HubError`."""
    try:
        yield
    except (ArgumentError, CheckpointError):
        raise
    except Exception as error:
        raise HubError(
            f"{what}: {type(error).__name__}: {first_line(error).rstrip('.')}. Check the name, the network and your "
            "access (`hf auth login`, or token=…)."
        ) from error


def fetched(source: str | os.PathLike[str], **options: Any) -> Path:
    """The folder with the files of a prior: `source` itself if it is one, else those of the repository, downloaded or cached.

    Args:
        source: a folder, or the name of a repository of models.
        **options: of `huggingface_hub.snapshot_download`, such as `revision` and `token`.

    Raises:
        ArgumentError: if `source` is neither.
        HubError: if it cannot be downloaded.
        FileNotFoundError: if there is no prior in it.
    """
    place = check_path("source", source)
    if not place.is_dir():
        if not _REPOSITORY.fullmatch(os.fspath(source)) or place.exists():
            raise ArgumentError(
                f'source: expected a folder or the name of a repository, "owner/name", got {os.fspath(source)!r}. A file of '
                "JointEBMPrior.save is read by JointEBMPrior.load."
            )
        hub = require_extra("huggingface_hub", "hub")
        with _talking(f"source: {os.fspath(source)!r} is no folder here, and cannot be downloaded from the hub"):
            wanted = [PRIOR_FILE, GENERATOR_FILE]
            place = Path(
                hub.snapshot_download(os.fspath(source), allow_patterns=wanted, library_name="energy-prior", **options)
            )
    if not (place / PRIOR_FILE).is_file():
        raise FileNotFoundError(f"{os.fspath(source)!r} holds no {PRIOR_FILE}, as JointEBMPrior.push_to_hub writes it.")
    return place


def upload(
    folder: Path, repository: str, *, private: bool | None, token: str | bool | None, revision: str | None, message: str
) -> str:
    """Uploads what is in a folder as one commit, and makes the repository if there is none.

    Returns:
        The address of the commit.

    Raises:
        ArgumentError: if `repository` is no name of one.
        HubError: if the hub refuses, or cannot be reached.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise ArgumentError(f'repository: expected a name such as "owner/name", got {shown(repository)}.')
    api = require_extra("huggingface_hub", "hub").HfApi(token=token, library_name="energy-prior")
    with _talking(f"repository: {repository!r} cannot be written"):
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message=message).commit_url)


# ----------------------------------------------------------------------------------------------------------------- the card


def write_card(
    folder: Path, card: ModelCard, facts: Mapping[str, str], *, repository: str, whole: bool, images: bool, energies: bool
) -> None:
    """Writes the page, Markdown after its metadata, and puts its pictures beside it.

    Args:
        folder: to write to.
        card: what is known beside the prior.
        facts: of the prior, a table.
        repository: its name there, or that of the folder.
        whole: the generator is in a file beside it.
        images: it makes images.
        energies: energies of the user's own have to be passed.
    """
    hub = require_extra("huggingface_hub", "hub")
    tags = ["energy-prior", "energy-based-model", "hierarchical-vae", *card.tags]
    metadata = hub.ModelCardData(
        library_name="energy-prior",
        license=card.license,
        pipeline_tag="unconditional-image-generation" if images else None,
        tags=list(dict.fromkeys(tags)),
    )
    arguments = [repr(repository), *([] if whole else ["generator"]), *(["energies=energies"] if energies else [])]
    needs = [] if whole else ["generator = …  # the one that the prior was fitted on, with its weights"]
    needs += ["energies = […]  # modules of its author's own"] if energies else []
    code = ["from energy_prior import JointEBMPrior", "", *needs]
    code += [f"prior = JointEBMPrior.from_pretrained({', '.join(arguments)})", "x = prior.sample(16)"]
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {repository.rpartition('/')[2]}",
        "A joint latent-space energy-based prior, p(z) = exp(Σ_i f_i(z_i)) p_β(z) / Z, around a hierarchical generator "
        "(`energy-prior`).",
        *(f"![{Path(name).stem}]({name})" for name in card.pictures),
        "## Use",
        "```sh\npip install energy-prior\n```",
        "```python\n" + "\n".join(code) + "\n```",
        "The files are safetensors: reading them runs no code.",
        "## The model",
        _table(facts),
    ]
    parts += ["## Figures", _table({name: _figure(value) for name, value in card.figures.items()})] if card.figures else []
    parts += ["## Data", card.data or "Not stated."]
    parts += ["## Settings", f"```json\n{json.dumps(dict(card.settings), indent=2)}\n```"] if card.settings else []
    parts += [card.text] if card.text else []
    parts += ["## Licence", card.license or "Not stated."]
    (folder / CARD_FILE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    for name, file in card.pictures.items():
        source, target = check_path("pictures", file), folder / name
        if not (target.exists() and source.samefile(target)):
            shutil.copyfile(source, target)


def _table(entries: Mapping[str, str]) -> str:
    rows = (f"| {_cell(name)} | {_cell(value)} |" for name, value in entries.items())
    return "\n".join(["| | |", "|---|---|", *rows])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _figure(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


def _report(folder: Path) -> dict[str, Any]:
    file = folder / "report.json"
    if not file.is_file():
        raise FileNotFoundError(f"There is no report.json in {str(folder)!r}, as `energy-prior train` or `evaluate` writes it.")
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{str(file)!r} is damaged ({first_line(error)}). Run the command again.") from error
    if not isinstance(report, dict):
        raise CheckpointError(f"{str(file)!r} is damaged: expected a JSON object. Run the command again.")
    return report


def _numbers(name: str, entry: Any) -> dict[str, float | str]:
    """All numbers in nested dicts, by their paths."""
    if isinstance(entry, dict):
        names = {inside: f"{name}, {inside}".removeprefix(", ") for inside in entry}
        return {key: value for inside, item in entry.items() for key, value in _numbers(names[inside], item).items()}
    return {name: entry} if isinstance(entry, float | int) and not isinstance(entry, bool) else {}


def _source(recipe: Mapping[str, Any]) -> str | None:
    data = recipe.get("data") if isinstance(recipe, Mapping) else None
    source = data.get("source") if isinstance(data, Mapping) else None
    return None if source is None else f"`{Path(str(source)).name or source}`"
