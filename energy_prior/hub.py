"""Priors on the Hugging Face hub: the files of one, its card, and how they get there and back."""

from __future__ import annotations

__all__ = [
    "CARD_FILE",
    "GENERATOR_FILE",
    "PRIOR_FILE",
    "ModelCard",
    "check_repository",
    "fetched",
    "read_model",
    "upload",
    "write_card",
    "write_model",
]

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
from energy_prior.checks.settings import check_path, real_number, require_extra, whole_number
from energy_prior.errors import ArgumentError, CheckpointError, HubError
from energy_prior.generators.build import describe_generator, generator_of, read_generator, write_generator

PRIOR_FILE, GENERATOR_FILE, CARD_FILE = "prior.safetensors", "generator.safetensors", "README.md"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_PICTURE = re.compile(r"[\w-]+\.(png|jpg|jpeg|svg|webp)")
_NAMES = {
    "images": "training images",
    "elbo, validation_elbo": "ELBO of held-out images, nats",
    "accuracy": "accuracy of telling posterior draws from those of the generator's prior",
    "joint_accuracy": "the same, from those of the joint prior",
}
_REMEDY = "Download or copy it again."


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
        for name in ("figures", "settings", "pictures"):
            if not isinstance(getattr(self, name), Mapping):
                raise ArgumentError(f"{name}: expected a dict, got {shown(getattr(self, name))}.")
        for name in ("data", "license", "text"):
            if not isinstance(getattr(self, name), str | None):
                raise ArgumentError(f"{name}: expected text or None, got {shown(getattr(self, name))}.")
        if isinstance(self.tags, str) or not all(isinstance(tag, str) for tag in self.tags):
            raise ArgumentError(f"tags: expected a tuple of texts, got {shown(self.tags)}.")
        for name, file in self.pictures.items():
            if not _PICTURE.fullmatch(name):
                raise ArgumentError(f"pictures: expected names such as 'samples.png', got {shown(name)}.")
            if not check_path("pictures", file).is_file():
                raise ArgumentError(f"pictures: there is no file {os.fspath(file)!r} for {name}.")
        for name, value in self.figures.items():
            if not isinstance(value, str) and real_number(value) is None:
                raise ArgumentError(f"figures: expected finite numbers or text, got {shown(value)} for {name!r}.")
        try:
            json.dumps(dict(self.settings), allow_nan=False)
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
            figures |= _numbers("evaluation", _report(place))
            if (place / "samples.png").is_file():
                pictures["evaluation.png"] = place / "samples.png"
        recipe = report.get("recipe", {})
        source = _source(recipe)
        settings = recipe if source is None else {**recipe, "data": {**recipe["data"], "source": source}}
        known: dict[str, Any] = {"data": source, "figures": figures, "settings": settings, "pictures": pictures}
        return cls(**known | more)


def write_model(folder: Path, generator: object) -> bool:
    """Writes a generator of the library, whole. Of any other nothing is written, and none stays in the folder.

    Args:
        folder: to write to; what a file there says of reading images is kept.
        generator: of the prior.

    Returns:
        Whether the generator is in a file now.
    """
    made: Any = generator
    described, file = describe_generator(made), folder / GENERATOR_FILE
    if described is None or not isinstance(generator, nn.Module):
        file.unlink(missing_ok=True)
        return False
    reading = None
    with contextlib.suppress(FileNotFoundError, CheckpointError):
        reading = read_generator(file).reading
    write_generator(file, generator, described, made.x_shape, reading)
    return True


def read_model(folder: Path) -> Any:
    """The generator that `write_model` wrote, on the CPU.

    Raises:
        ArgumentError: if there is none, as the prior is of a generator of the user's own.
        CheckpointError: if the file is damaged.
    """
    file = folder / GENERATOR_FILE
    found = read_generator(file, _REMEDY) if file.is_file() else None
    if found is None or "factory" in found.described:
        raise ArgumentError(
            f"generator: {str(folder)!r} holds a prior without its generator, which is not one of the library's. Pass the "
            "generator that the prior was fitted on; the card may say where it is from."
        )
    return generator_of(found, _REMEDY)


@contextlib.contextmanager
def _talking(what: str) -> Generator[None]:
    """What the hub, its client or the network raise inside becomes a `HubError`."""
    try:
        yield
    except Exception as error:
        raise HubError(
            f"{what}: {type(error).__name__}: {first_line(error).rstrip('.')}. Check the name, the network and your "
            "access (`hf auth login`, or token=…)."
        ) from error


def check_repository(repo_id: object) -> None:
    """Raises `ArgumentError` unless it is the name of a repository, "owner/name"."""
    if not isinstance(repo_id, str) or not _REPOSITORY.fullmatch(repo_id):
        raise ArgumentError(f'repo_id: expected the name of a repository, "owner/name", got {shown(repo_id)}.')


def fetched(source: str | os.PathLike[str], generator: bool, **options: Any) -> Path:
    """The folder with the files of a prior: `source` itself if it is one, else those of the repository, downloaded or cached.

    Args:
        source: a folder, or the name of a repository of models.
        generator: the generator is wanted too.
        **options: of `huggingface_hub.snapshot_download`, such as `revision` and `token`.

    Raises:
        ArgumentError: if `source` is neither.
        HubError: if it cannot be downloaded.
        FileNotFoundError: if there is no prior in it.
    """
    place = check_path("source", source)
    if not place.is_dir():
        if place.exists() or not _REPOSITORY.fullmatch(os.fspath(source)):
            raise ArgumentError(
                f'source: expected a folder or the name of a repository, "owner/name", got {os.fspath(source)!r}. A file of '
                "JointEBMPrior.save is read by JointEBMPrior.load."
            )
        hub = require_extra("huggingface_hub", "hub")
        options |= {"allow_patterns": [PRIOR_FILE, *([GENERATOR_FILE] if generator else [])], "library_name": "energy-prior"}
        with _talking(f"source: {os.fspath(source)!r} is no folder here, and cannot be downloaded from the hub"):
            place = Path(hub.snapshot_download(os.fspath(source), **options))
    if not (place / PRIOR_FILE).is_file():
        raise FileNotFoundError(f"{os.fspath(source)!r} holds no {PRIOR_FILE}, as JointEBMPrior.push_to_hub writes it.")
    return place


def upload(
    folder: Path, repo_id: str, *, private: bool | None, token: str | bool | None, keep_card: bool, **options: Any
) -> str:
    """Uploads what is in a folder as one commit, and makes the repository if there is none.

    Args:
        folder: what to upload. A generator that is there, and is not in the folder, is taken away.
        repo_id: "owner/name".
        private: whether a repository that is made is private; None: as its owner's settings have it.
        token: of the hub.
        keep_card: leave a card that is there.
        **options: of `huggingface_hub.HfApi.upload_folder`: `revision`, `commit_message`, `create_pr`.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        HubError: if the hub refuses, or cannot be reached.
    """
    api = require_extra("huggingface_hub", "hub").HfApi(token=token, library_name="energy-prior")
    with _talking(f"repo_id: {repo_id!r} cannot be written"):
        revision = options.get("revision")
        if not options.get("create_pr"):
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
        keep = keep_card and api.file_exists(repo_id, CARD_FILE, revision=revision)
        gone = [] if (folder / GENERATOR_FILE).is_file() else [GENERATOR_FILE]
        options |= {"ignore_patterns": [CARD_FILE] if keep else None, "delete_patterns": gone or None}
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, **options)
        return str(commit.pr_url or commit.commit_url)


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
    metadata: dict[str, Any] = {"library_name": "energy-prior", "license": card.license}
    metadata["pipeline_tag"] = "unconditional-image-generation" if images else None
    metadata["tags"] = list(dict.fromkeys(["energy-prior", "energy-based-model", "hierarchical-vae", *card.tags]))
    lines = [f"{name}: {_json(value)}" for name, value in metadata.items() if value is not None]  # JSON is YAML
    arguments = [_json(repository), *([] if whole else ["generator"]), *(["energies=energies"] if energies else [])]
    needs = [] if whole else ["generator = …  # the one that the prior was fitted on, with its weights"]
    needs += ["energies = […]  # modules of its author's own"] if energies else []
    code = ["from energy_prior import JointEBMPrior", "", *needs]
    code += [f"prior = JointEBMPrior.from_pretrained({', '.join(arguments)})", "x = prior.sample(16)"]
    parts = [
        "\n".join(["---", *lines, "---"]),
        f"# {repository.rpartition('/')[2]}",
        "A joint latent-space energy-based prior, p(z) = exp(Σ_i f_i(z_i)) p_β(z) / Z, around a hierarchical generator "
        "(`energy-prior`).",
        *(f"![{Path(name).stem}]({name})" for name in card.pictures),
        "## Use",
        '```sh\npip install "energy-prior[hub]"\n```',
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


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _figure(value: Any) -> str:
    whole = whole_number(value)
    return value if isinstance(value, str) else f"{real_number(value):.4g}" if whole is None else f"{whole:,}"


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


def _source(recipe: Any) -> str | None:
    """What the images came from: the name of a set, or the last part of a path, as the rest is nobody's business."""
    data = recipe.get("data") if isinstance(recipe, Mapping) else None
    source = data.get("source") if isinstance(data, Mapping) else None
    if not isinstance(source, str):
        return None
    return source if _REPOSITORY.fullmatch(source) and not Path(source).exists() else Path(source).name
