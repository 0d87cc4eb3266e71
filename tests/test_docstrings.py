"""Every public docstring says of every parameter what it is, and of every tensor its shape and its unit, and has an example."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docstrings
import pytest
from torch import Tensor

ROOT = Path(__file__).parent.parent
NAMES = sorted(
    name
    for page in (ROOT / "docs" / "api").glob("*.md")
    for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
)
"""Those of the API reference, which `test_site.py` compares with what the packages list."""


def thing(name: str) -> Any:
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


DOCUMENTED = [name for name in NAMES if inspect.isclass(thing(name)) or inspect.isfunction(thing(name))]


def faults(of: Any) -> list[str]:
    return docstrings.faults_of_class(of) if inspect.isclass(of) else docstrings.faults_of_call(of, of.__doc__)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_public_docstrings(name: str) -> None:
    assert not faults(thing(name))


@pytest.mark.parametrize("name", DOCUMENTED)
def test_public_docstrings_have_an_example(name: str) -> None:
    """One that runs: pytest takes those of the package as doctests."""
    assert ">>>" in (thing(name).__doc__ or "")


def test_all_of_them_are_looked_at() -> None:
    assert len(DOCUMENTED) > 90


# ------------------------------------------------------------------------------------------------ what the test can find


def log_prob(x: Tensor, latents: Sequence[Tensor], steps: int = 1) -> Tensor:
    """log p(x, z), (batch,), nats.

    Args:
        x: observations, (batch, *x_shape).
        latents: (z_1, …, z_L), z_i of shape (batch, *latent_shapes[i - 1]).
        steps: number of them, over
            two lines.

    Raises:
        ShapeError, ValueError: if it does not fit.
    """
    return x


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("    steps: number of them, over\n        two lines.\n", "", "steps: no entry"),
        ("    steps: number", "    step: number", "step: there is no such parameter"),
        ("(batch, *x_shape)", "one row each", "x: no shape"),
        ("(batch, *x_shape)", "(batch)", "x: no shape"),
        ("(batch, *x_shape)", "(rows, *x_shape)", "x: no shape"),
        ("z_i of shape (batch, *latent_shapes[i - 1])", "one per layer", "latents: no shape"),
        ("observations, ", "", "x: no unit"),
        ("observations, ", "scores of observations, ", "x: no unit"),
        (", nats", "", "what it returns: no unit"),
        (", (batch,), nats", ", nats", "what it returns: no shape"),
        ("ShapeError", "ShapesError", "ShapesError: there is no such error"),
        ("    steps: number of them", "    number of them", "'number of them, over' belongs to no entry"),
        ("    steps: number of them, over\n        two lines.", "    steps:", "steps says nothing"),
        ("    steps: ", "    x: ", "x is there twice"),
        ("Raises:", "Args:", "Args is there twice"),
    ],
)
def test_faults_of_a_function(old: str, new: str, fault: str) -> None:
    text = inspect.cleandoc(log_prob.__doc__ or "")
    assert docstrings.faults_of_call(log_prob, text) == []
    assert text.count(old) == 1
    found = docstrings.faults_of_call(log_prob, text.replace(old, new))
    assert any(fault in one for one in found), found


def test_a_function_without_a_docstring() -> None:
    assert docstrings.faults_of_call(log_prob, None) == ["no docstring"]


@dataclass
class Pair:
    """Two of them.

    Attributes:
        first: log p, (n,), nats.
    """

    first: Tensor
    second: int = 0

    @property
    def noise(self) -> Tensor:
        """Their noise, ε_1, one row each."""
        return self.first

    def of(self, x: Any) -> None: ...


class Buffers:
    """Holds a tensor.

    Args:
        size: of it.
    """

    held: Tensor
    other: int

    def __init__(self, size: int, more: Tensor) -> None: ...


class Source:
    """Implements an interface, which says the rest."""

    def normal(self, step: int) -> tuple[Tensor, ...]:
        """Some."""
        return ()

    def uniform(self, step: int) -> Tensor: ...

    def rows(self, rows: slice, other: int) -> Source:
        """Fewer."""
        return self


def test_faults_of_a_class() -> None:
    assert faults(Pair) == ["second: no entry", "noise: what it returns: no shape", "of: no docstring"]
    assert faults(Buffers) == ["held: no entry", "more: no entry"]
    assert faults(Source) == ["uniform: no docstring", "rows: other: no entry"]
    assert faults(type("Bare", (), {})) == ["no docstring"]


@pytest.mark.parametrize(
    "said",
    ["(batch,)", "()", "(*latent_shape)", "(steps + 1, batch, *shape)", "(batch, 10·M, height, width)", "(d, 1, 1)", "(…)"],
)
def test_shapes(said: str) -> None:
    assert docstrings.shapes(f"A tensor, {said}, nats.")


@pytest.mark.parametrize("said", ["(batch)", "(z_1, …, z_L)", "(Cui, Wu and Han, 2023)", "f(n, m)", "batch, *shape", "(0)"])
def test_what_is_no_shape(said: str) -> None:
    assert not docstrings.shapes(f"A tensor, {said}, nats.")


@pytest.mark.parametrize(
    "said", ["nats per unit of z", "in [0, 1]", "in [0, 1)", "whole numbers", "bool", "observations", "of any unit", "no unit"]
)
def test_units(said: str) -> None:
    assert docstrings.has_unit(f"A tensor, (batch,), {said}.")


@pytest.mark.parametrize(
    "said", ["of latent_shapes[i - 1]", "scores of observations", "f_i of latents", "(n, features)", "∇ by z_i", "in (0, 1)"]
)
def test_what_is_no_unit(said: str) -> None:
    assert not docstrings.has_unit(f"A tensor, (batch,), {said}.")
