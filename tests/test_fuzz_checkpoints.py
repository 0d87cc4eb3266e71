"""The benchmark of corrupted files: a part of it for each kind of file, and that it sees what would be a surprise."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from energy_prior import ArgumentError, CheckpointError, DivergenceError

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from fuzz_checkpoints import KINDS, Outcome, Reader, table, table_rows
from fuzz_targets import Target

WHOLE = {"a": torch.arange(3.0), "b": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_quick(kind: str, tmp_path: Path) -> None:
    """Every corruption of this kind of file, once."""
    reader = Reader(tmp_path, [kind])
    every = len(reader.targets[0].corruptions)
    outcomes = [reader.outcome(i * len(reader.targets) + i % len(reader.targets)) for i in range(every)]
    assert {o.corruption for o in outcomes} == set(reader.targets[0].corruptions)
    assert [o for o in outcomes if o.outcome == "surprise"] == []
    assert sum(o.outcome == "refused" for o in outcomes) > 0.6 * every
    again = Reader(tmp_path / "again", [kind]).outcome(5)
    assert again.corruption == outcomes[5 // len(reader.targets)].corruption


def refuse(self: Watched) -> None:
    raise CheckpointError(f"{self.file} is damaged.")


def other_error(self: Watched) -> None:
    raise KeyError("x")


def other_kind_of_error(self: Watched) -> None:
    raise ArgumentError("x")


def diverge(self: Watched) -> None:
    raise DivergenceError("x")


def not_named(self: Watched) -> None:
    raise CheckpointError("It is damaged.")


def long_message(self: Watched) -> None:
    raise CheckpointError(f"{self.file} {'x' * 1500}")


def half_done(self: Watched) -> None:
    self.filled["a"] += 1
    refuse(self)


def warn(self: Watched) -> dict[str, Any]:
    warnings.warn("x", stacklevel=1)
    return WHOLE


def run_code(self: Watched) -> dict[str, Any]:
    (self.file.parent.parent.parent / "bait").mkdir()
    return WHOLE


def much_memory(self: Watched) -> dict[str, Any]:
    torch.ones(2**26)
    return WHOLE


class Watched:
    """A file that is read by a function."""

    def __init__(self, folder: Path, act: Callable[[Any], Any]) -> None:
        self.file, self.filled = folder / "files" / "one" / "file", {"a": torch.zeros(2)}
        self.file.parent.mkdir(parents=True)
        self.file.write_bytes(b"whole")
        self.act = act

    def target(self, **changes: Any) -> Target:
        fixed: dict[str, Any] = {"kind": "prior.save", "name": "one", "file": self.file, "error": CheckpointError}
        return Target(**fixed, begin=self.begin, corruptions={}, **{"loose": (), **changes})

    def begin(self) -> Any:
        return lambda: self.act(self), lambda: self.filled


def other(**changes: Any) -> Callable[[Any], dict[str, Any]]:
    return lambda _: {**WHOLE, **changes}


CASES: list[tuple[Callable[[Any], Any], bool, str, str]] = [
    (refuse, False, "refused", "file is damaged"),
    (other(), False, "equal", ""),
    (other(a=torch.ones(3)), True, "harmless", ""),
    (other(a=torch.ones(3)), False, "surprise", "it loads as something else"),
    (other(b=2), False, "surprise", "it loads as something else"),
    (other(a=torch.ones(4)), True, "surprise", "a is of another shape or dtype"),
    (other(a=torch.ones(3).double()), True, "surprise", "a is of another shape or dtype"),
    (other(a=torch.ones(3) / 0), True, "surprise", "a is not finite"),
    (other(a=None), True, "surprise", "a is of another shape or dtype"),
    (other_error, True, "surprise", "KeyError: 'x'"),
    (other_kind_of_error, True, "surprise", "ArgumentError: x"),
    (diverge, True, "surprise", "x"),
    (not_named, True, "surprise", "the file is not named"),
    (long_message, True, "surprise", "a message of 15"),
    (half_done, True, "surprise", "refused, but something was changed"),
    (warn, True, "surprise", "warned: x"),
    (run_code, True, "surprise", "what the file asks for was run"),
    (much_memory, True, "surprise", "MiB for a file of 3 bytes"),
]


@pytest.mark.parametrize(("act", "loose", "outcome", "why"), CASES, ids=range(len(CASES)))
def test_what_is_a_surprise(act: Callable[[Any], Any], loose: bool, outcome: str, why: str, tmp_path: Path) -> None:
    if act is much_memory and not Path("/proc/self/status").exists():
        pytest.skip("the system does not say how much memory a process has")
    gc.collect()  # what tests before have left would be given back while the file is read, and hide what that takes
    watched = Watched(tmp_path, act)
    found = Reader(tmp_path, []).read(0, watched.target(loose=("bad",) if loose else ()), "bad", b"bad", WHOLE)
    assert found.outcome == outcome
    assert why in found.why
    assert str(tmp_path) not in found.why
    assert watched.file.read_bytes() == b"whole"


def test_what_a_run_leaves_is_taken_away(tmp_path: Path) -> None:
    def act(self: Watched) -> dict[str, Tensor | int]:
        (self.file.parent / "new").write_text("")
        (self.file.parent.parent / "new" / "inside").mkdir(parents=True)
        self.file.unlink()
        return WHOLE

    watched = Watched(tmp_path, act)
    assert Reader(tmp_path, []).read(0, watched.target(), "bad", b"bad", WHOLE).outcome == "equal"
    assert sorted(str(p.relative_to(tmp_path)) for p in (tmp_path / "files").rglob("*")) == ["files/one", "files/one/file"]
    assert watched.file.read_bytes() == b"whole"


def test_the_table_counts_what_was_changed() -> None:
    outcomes = [
        Outcome(0, "recipe", "a", "one bit", "refused", "no", 2**20),
        Outcome(1, "recipe", "a", "zeros", "not changed"),
        Outcome(2, "run_dir", "b", "one bit", "surprise", "oh", 3 * 2**20),
    ]
    rows = {(row["case"], row["metric"]): row["value"] for row in table_rows(outcomes)}
    assert (rows["", "inputs"], rows["", "surprises"], rows["", "largest_added_memory_mib"]) == (2, 1, 3)
    assert (rows["recipe", "refused"], rows["run_dir", "surprise"], rows["prior.save", "equal"]) == (1, 1, 0)
    assert "| one bit | 1 | 0 | 0 | 1 |" in table(outcomes)
    assert "- recipe, one bit: no" in table(outcomes)
