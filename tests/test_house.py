"""The package as a whole: its public names, the size of its files, and what importing it costs."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import energy_prior
from energy_prior import JointEBMPrior

PACKAGE = Path(energy_prior.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def public_calls() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public functions and classes, and the public methods of the prior."""
    for name in energy_prior.__all__:
        value = getattr(energy_prior, name)
        if callable(value):
            yield name, value
    for name, method in vars(JointEBMPrior).items():
        if not name.startswith("_") and callable(getattr(JointEBMPrior, name)):
            yield f"JointEBMPrior.{name}", getattr(method, "__func__", method)


def test_public_names_are_documented() -> None:
    """Every name is there, has a docstring of its own, and the docstrings of functions and methods name every parameter."""
    assert len(set(energy_prior.__all__)) == len(energy_prior.__all__)
    missing = []
    for name, value in public_calls():
        text = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__
        parameters = inspect.signature(value).parameters if inspect.isfunction(value) else ()
        missing += [name] if not text else []
        missing += [f"{name}: {p}" for p in parameters if p not in ("self", "cls") and f"{p}:" not in (text or "")]
    assert not missing


@pytest.mark.parametrize("file", FILES, ids=[str(f.relative_to(PACKAGE)) for f in FILES])
def test_files_stay_readable(file: Path) -> None:
    """At most 400 lines, but for the prior, which is whole in one file; a docstring; `__all__` where something is defined."""
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "no docstring"
    assert file.name == "prior.py" or len(text.splitlines()) <= 400
    defines = any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body)
    listed = any(isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" for node in tree.body)
    assert listed or not defines or file.name.startswith("_"), "no __all__"


def imported(file: Path, modules: Iterable[str]) -> set[str]:
    """Modules of the package that a file imports, anywhere in it; `from package import name` is the package's `__init__`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else str(node.module) for name in inside}
    return found.intersection(modules)


def test_imports_have_no_circle() -> None:
    """The contract that `lint-imports` checks leaves out the packages' own `__init__` files."""
    files = {".".join(f.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): f for f in FILES}
    waiting = {module: imported(file, files) for module, file in files.items()}
    assert sum(map(len, waiting.values())) > 100
    done: set[str] = set()
    while ready := {module for module, needed in waiting.items() if needed <= done}:
        done |= ready
        waiting = {module: needed for module, needed in waiting.items() if module not in ready}
    assert not waiting, f"a circle among {sorted(waiting)}, or above it"


def test_the_import_is_light() -> None:
    """Nothing but torch and the small dependencies; compilers and optional extras are imported where they are needed."""
    heavy = {"accelerate", "datasets", "matplotlib", "pandas", "PIL", "scipy", "sklearn", "tensorboard", "torch._inductor"}
    code = f"""
import sys, torch
before = set(sys.modules)
import energy_prior
print(sorted((set(sys.modules) - before) & {heavy}))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert found.stdout.strip() == "[]"
