"""Recipes of `energy-prior train`: data, generator, its ELBO training and the fits of its joint prior, as YAML and flags."""

from __future__ import annotations

__all__ = ["DataSettings", "Recipe", "build_generator", "imported", "read_recipe", "settings_help"]

import contextlib
import dataclasses
import importlib
import os
import re
import sys
import textwrap
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from energy_prior._util import first_line, shortened, shown
from energy_prior.checks.settings import (
    check_count,
    check_device,
    check_path,
    check_settings,
    require_extra,
)
from energy_prior.cli.document import read_document, text_of
from energy_prior.data.pixels import ChannelOrder
from energy_prior.data.reader import ReadSettings
from energy_prior.errors import ArgumentError
from energy_prior.generators import LadderVAE
from energy_prior.generators.build import BUILT_IN, check_arguments, made
from energy_prior.training import ElboConfig, FitConfig
from energy_prior.training.config import METHODS, Method, check_method


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Where the images come from (`energy_prior.data.load_images`).

    Attributes:
        source: a folder with parquet files or images, or the name of a set on the Hugging Face hub.
        split: the split to train on.
        size: height and width to scale the images to; null: as they are.
        channels: 1 (gray) or 3 (RGB); null: RGB where any image has colours.
        limit: number of images; null: all.
        column: of the images in parquet files; null: image, img, or the only one that holds images.
        value_range: "[low, high]" of images that are numbers, which become 0 and 1; null: found.
        channel_order: where the channels of arrays are, first or last; null: found.
        background: brightness of what is behind see-through images, from 0 (black) to 1 (white).
        on_error: what an image that cannot be read does, raise or skip.
        validation: how many of them, the last ones, are kept out of training, to choose the generator's weights by and to
            calibrate scores on, ≥ 2.
    """

    source: str = ""
    split: str = "train"
    size: int | None = None
    channels: int | None = None
    limit: int | None = None
    column: str | None = None
    value_range: tuple[float, float] | None = None
    channel_order: ChannelOrder | None = None
    background: float = 1.0
    on_error: Literal["raise", "skip"] = "raise"
    validation: int = 1000

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source:
            raise ArgumentError(f"data.source: expected a folder or the name of a set on the hub, got {shown(self.source)}.")
        check_count("data.validation", self.validation, least=2)
        if self.column is not None and not isinstance(self.column, str):
            raise ArgumentError(f"data.column: expected the name of a column, got {shown(self.column)}.")
        ReadSettings(self.size, self.channels, self.value_range, self.channel_order, self.background, self.on_error)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that a run of `energy-prior train` does.

    Attributes:
        data: where the images come from.
        generator: arguments of `LadderVAE` beside the images' shape; with "kind": "ResidualVAE" those of `ResidualVAE`; or
            {"factory": "module:function", …}: a function of yours that gets the shape of an image and the other entries, and
            gives the generator.
        elbo: settings of the generator's own training; null: it comes trained.
        fit: the fits of the joint prior, one after the other: each a method and its settings.
        out: folder to write to.
        seed: of everything random.
        device: where to compute; null: the CPU, or what `accelerate launch` chooses.
    """

    data: DataSettings
    generator: dict[str, Any]
    elbo: ElboConfig | None
    fit: tuple[tuple[Method | None, FitConfig], ...]
    out: str
    seed: int = 0
    device: str | None = None

    def document(self) -> dict[str, Any]:
        """The recipe as a YAML file would have it, without settings that are at their defaults, `out` and `device`."""
        fits = [({} if method is None else {"method": method}) | _changed(config) for method, config in self.fit]
        elbo = None if self.elbo is None else _changed(self.elbo)
        return {"data": _changed(self.data), "generator": dict(self.generator), "elbo": elbo, "fit": fits, "seed": self.seed}


def read_recipe(
    path: str | os.PathLike[str] | None, overrides: Sequence[str] = (), texts: Mapping[str, str] | None = None
) -> Recipe:
    """Reads and checks a recipe; nothing is trained or loaded yet.

    Args:
        path: a YAML file; None: everything comes from `overrides`.
        overrides: "key=value", with dots into sections and numbers into lists: "elbo.iterations=500", "fit.0.method=joint"; the
            value is YAML.
        texts: key -> a value that is text as it stands, over all others.

    Raises:
        ArgumentError: for an unknown key or an impossible value; the message names the key.
        FileNotFoundError: if there is no such file.
    """
    require_extra("yaml", "train")
    entries: Any = {}
    if path is not None:
        file = check_path("config", path)
        if not file.is_file():
            raise FileNotFoundError(f"There is no file {os.fspath(path)!r}.")
        entries = read_document(text_of(file), os.fspath(path)) or {}
    if not isinstance(entries, dict):
        raise ArgumentError(f"{path}: expected a mapping of sections, got {type(entries).__name__}.")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ArgumentError(f"--set: expected KEY=VALUE, got {shown(override)}.")
        _put(entries, key.strip().split("."), read_document(value, shortened(key)), key)
    for key, text in (texts or {}).items():
        _put(entries, key.split("."), text, key)
    check_settings(Recipe, entries, "a section of a recipe")
    fits = entries.get("fit", [{}])
    if not isinstance(fits, list) or not fits:
        raise ArgumentError(f"fit: expected a list of fits, each with a method and settings, got {shown(fits)}.")
    generator = _section(entries, "generator")
    if "factory" not in generator:
        check_arguments(*_kind_of(generator))
    trained = "elbo" in entries and entries["elbo"] is None
    if trained and "factory" not in generator:
        raise ArgumentError(
            "elbo: null says that the generator comes trained, but those of the library do not. Leave elbo out, or name a "
            "factory of yours that gives a trained generator (generator.factory)."
        )
    seed = check_count("seed", entries.get("seed", 0), least=0)
    return Recipe(
        data=_build(DataSettings, _section(entries, "data"), "data"),
        generator=generator,
        elbo=None if trained else _build(ElboConfig, _section(entries, "elbo"), "elbo"),
        fit=tuple(_fit(fit, f"fit.{i}") for i, fit in enumerate(fits)),
        out=_text("out", entries.get("out", "energy-prior-run")),
        seed=seed,
        device=None if entries.get("device") is None else check_device("device", str(entries["device"])),
    )


def build_generator(settings: Mapping[str, Any], x_shape: tuple[int, ...]) -> Any:
    """The generator of a recipe.

    Args:
        settings: the section "generator" of the recipe.
        x_shape: shape of an image, (channels, height, width).

    Raises:
        ArgumentError: if the generator refuses the settings, or the factory cannot be imported, raises, or gives no module.
    """
    if "factory" not in settings:
        kind, arguments = _kind_of(settings)
        return made(kind, x_shape, arguments)
    settings = dict(settings)
    factory = settings.pop("factory")
    make = imported("generator.factory", str(factory))
    with _importable_folder():
        try:
            generator = make(x_shape, **settings)
        except Exception as error:  # whatever the user's function raises
            raise ArgumentError(
                f"generator.factory: {factory!r} raised {type(error).__name__} for images of shape {x_shape} and {settings}: "
                f"{error}"
            ) from error
    if not isinstance(generator, nn.Module):
        raise ArgumentError(f"generator.factory: expected {factory!r} to give an nn.Module, got {type(generator).__name__}.")
    return generator


def _kind_of(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The class of a generator of the library, and its other arguments."""
    return str(settings.get("kind", LadderVAE.__name__)), {name: value for name, value in settings.items() if name != "kind"}


def imported(argument: str, text: str) -> Any:
    """What "module:name" names; modules of the current folder can be named too.

    Args:
        argument: that it is the value of, for messages.
        text: the name.

    Raises:
        ArgumentError: if it cannot be imported.
    """
    module, separator, name = text.partition(":")
    if not separator:
        raise ArgumentError(f'{argument}: expected "module:function", got {shown(text)}.')
    with _importable_folder():
        try:
            return getattr(importlib.import_module(module), name)
        except Exception as error:  # whatever the user's module raises while it is imported
            raise ArgumentError(
                f"{argument}: cannot import {shown(text)}: {type(error).__name__}: {first_line(error)}. "
                "Modules of the current folder and installed ones can be named."
            ) from error


def settings_help() -> str:
    """Every setting of a recipe with its default and what it means."""
    parts = ["A recipe is a YAML file. Sections and settings, with their defaults:"]
    for title, kind in (("(top)", Recipe), ("data", DataSettings), ("elbo", ElboConfig), ("fit.<number>", FitConfig)):
        parts.append(f"\n{title}")
        meanings = _meanings(kind)
        if kind is FitConfig:
            parts.append(_paragraph("method", None, f"the learning rule: {', '.join(METHODS)}; null: as `prior.fit` chooses."))
        for field in dataclasses.fields(kind):
            default = "" if field.default is dataclasses.MISSING else field.default
            parts.append(_paragraph(field.name, default, meanings.get(field.name, "")))
    for name, generator in BUILT_IN.items():
        parts.append(f"\ngenerator: arguments of {name}" + ("\n" if generator is LadderVAE else f", after kind: {name}\n"))
        arguments = re.split(r"(?:Attributes|Raises):", (generator.__doc__ or "").partition("Args:")[2])[0]
        parts.append(textwrap.indent(textwrap.dedent(arguments).strip(), "  "))
    return "\n".join(parts)


def _paragraph(name: str, default: Any, meaning: str) -> str:
    value = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
    return textwrap.fill(f"{name}: {value}".rstrip() + f"  # {meaning}", 118, initial_indent="  ", subsequent_indent="      ")


def _meanings(kind: type[Any]) -> dict[str, str]:
    """Attribute -> its paragraph in the class's docstring."""
    text = textwrap.dedent(re.split(r"\n\s*(?:Examples|Raises):\n", (kind.__doc__ or "").partition("Attributes:\n")[2])[0])
    found = re.findall(r"^(\w+): (.*?)(?=^\w+: |\Z)", text, flags=re.DOTALL | re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in found}


def _put(entries: Any, keys: list[str], value: Any, name: str) -> None:
    """Sets entries[k][l]… = value, making the sections and list entries on the way."""
    for here, following in zip(keys, [*keys[1:], None]):
        index: Any = here
        if isinstance(entries, list):
            if not here.isdecimal() or int(here) > len(entries):
                raise ArgumentError(
                    f"{name}: expected a number from 0 to {len(entries)} after the list's name, got {shown(here)}."
                )
            index = int(here)
            if index == len(entries):
                entries.append(None)
        elif not isinstance(entries, dict):
            raise ArgumentError(f"{name}: {shown(here)} would be inside {shown(entries)}, which is no section.")
        if following is None:
            entries[index] = value
            return
        present = entries[index] if isinstance(entries, list) else entries.get(index)
        if present is None:
            present = [] if following.isdecimal() else {}
            entries[index] = present
        entries = present


def _section(entries: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = entries.get(name) or {}
    if not isinstance(section, dict):
        raise ArgumentError(f"{name}: expected a section of settings, got {shown(section)}.")
    return section


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ArgumentError(f"{name}: expected text, got {shown(value)}. Put it in quotes.")
    return value


def _changed(section: Any) -> dict[str, Any]:
    """Settings of a section that are not at their defaults."""
    values = {field.name: (getattr(section, field.name), field.default) for field in dataclasses.fields(section)}
    return {name: value for name, (value, default) in values.items() if value != default}


def _build(kind: type[Any], section: Mapping[str, Any], name: str) -> Any:
    check_settings(kind, section, f"a setting of {name}")
    try:
        return kind(**section)
    except ArgumentError as error:
        message = str(error)
        raise ArgumentError(message if message.startswith(name) else f"{name}.{message}") from None


def _fit(entry: Any, name: str) -> tuple[Method | None, FitConfig]:
    if not isinstance(entry, dict):
        raise ArgumentError(f"{name}: expected a section with a method and its settings, got {shown(entry)}.")
    settings = dict(entry)
    try:
        named = settings.pop("method", None)
        method = None if named is None else check_method(named)
    except ArgumentError as error:
        raise ArgumentError(f"{name}.{error}") from None
    return method, _build(FitConfig, settings, name)


@contextlib.contextmanager
def _importable_folder() -> Generator[None]:
    """Inside, modules of the current folder can be imported."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path.remove(str(Path.cwd()))
