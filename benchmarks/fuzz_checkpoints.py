"""Ten thousand corrupted checkpoints and recipes: is each refused by the error that is promised, without harm?

    python benchmarks/fuzz_checkpoints.py            # four minutes on one core
    python benchmarks/fuzz_checkpoints.py --quick    # a few hundred of them

Files (`fuzz_targets.py`): those of `prior.save` (read by `JointEBMPrior.load`), checkpoints in the `run_dir` of `prior.fit` and
`fit_elbo`, the generator of `energy-prior train` (`load_run`), recipes (`read_recipe`), and pickles of torch.save as public
code for NVAE and VDVAE and Lightning write them, in both of torch's formats (`load_checkpoint`, `load_weights`). Corruptions
(`corrupt….py`): by accident (bits, truncation, lost and exchanged blocks, other kinds of files), and on purpose (hostile
headers, huge shapes, NaN weights, swapped tensors, bombs, code to run), many also with digests and checksums that are right
("signed").

An input is no surprise if reading it

- raises the promised error, `CheckpointError` or for recipes `ArgumentError`, in at most 1,500 letters. One about a checkpoint
  names the file, and whatever was to be filled (a prior, a generator, a model) is as it was before. A signed checkpoint of a
  run that says that it is of other settings, data or model raises the `ArgumentError` that is promised for such; or
- gives what the intact file gives: the damage is where nothing is read ("equal"); or
- gives something harmless where no file could tell: (1) a signed file, and a pickle in torch's old format, which has no
  checksum, loads as finite weights of the right names, shapes and dtypes. A digest tells damage, not who wrote a file. A run
  that goes on from such weights may diverge, and say so by its `DivergenceError`; (2) a recipe is text without a checksum, and
  loads as a recipe all of whose settings were checked.

In each case nothing that the file asks for is run (each such file tries to make a folder), nothing is warned of, and the peak
of memory that reading adds stays below the file's size plus 64 MiB. All inputs are read in a process apart; one that dies
there, or computes for 20 seconds, is a surprise too. Everything is seeded. Writes docs/results/fuzz_checkpoints.json and .md.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fuzz_targets import KINDS, Target, kept, targets
from results import ROOT, Row, write_results
from torch import Tensor

from energy_prior import ArgumentError, CheckpointError, DivergenceError
from energy_prior.cli.recipe import Recipe

INPUTS, GOAL = 10_500, 10_000
EVERY = 37  # of them in a quick run
MEMORY, HIDDEN = 64 * 2**20, 4 * 2**20  # bytes; what is below a peak of before is not seen
SECONDS = 20
LETTERS = 1500
TRIES = 20
OUTCOMES = ("refused", "equal", "harmless", "surprise")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of an input.

    Attributes:
        index: of the input.
        kind: of file.
        name: of the file.
        corruption: what was done to it.
        outcome: one of `OUTCOMES`, or "not changed".
        why: the message, or what is wrong.
        added: to the peak of memory, bytes.
    """

    index: int
    kind: str
    name: str
    corruption: str
    outcome: str
    why: str = ""
    added: int = 0


class Reader:
    """Corrupts files and reads them.

    Args:
        folder: for the files; an empty one.
        kinds: of files.
        guarded: this is a process apart, which may die after `SECONDS` of computing.
    """

    def __init__(self, folder: Path, kinds: Collection[str] = tuple(KINDS), guarded: bool = False) -> None:
        self.guarded, self.folder, self.bait = guarded, folder, folder / "bait"
        self.targets = list(targets(folder, kinds))
        self.intact = [target.file.read_bytes() for target in self.targets]
        self.expected = [target.begin()[0]() for target in self.targets]

    def outcome(self, index: int) -> Outcome:
        """Of one input, which depends on nothing but its index: the target goes round first, then the corruption."""
        chance = random.Random(f"energy-prior {index}")  # noqa: S311
        rounds, number = divmod(index, len(self.targets))
        target, intact = self.targets[number], self.intact[number]
        name = list(target.corruptions)[rounds % len(target.corruptions)]
        for _ in range(TRIES):
            corrupted = target.corruptions[name](chance, intact, self.bait)
            if corrupted != intact:
                return self.read(index, target, name, corrupted, self.expected[number])
        return Outcome(index, target.kind, target.name, name, "not changed")

    def read(self, index: int, target: Target, name: str, corrupted: bytes, expected: Any) -> Outcome:
        """Reads a corrupted file, judges what comes of it, and puts the intact one back."""
        place = _Place(target.file)
        target.file.write_bytes(corrupted)
        load, left = target.begin()
        before = kept(left())
        if self.guarded:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
        level, peak = _memory()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                outcome, why = _judged(load(), expected, name in target.loose)
            except (target.error, ArgumentError) as error:
                outcome, why = _refused(target, error)
                if not _equal(before, left()):
                    outcome, why = "surprise", f"refused, but something was changed: {why}"
            except DivergenceError as error:
                foreseen = target.kind == "run_dir" and name in target.loose
                outcome, why = "harmless" if foreseen else "surprise", str(error)
            except Exception as error:
                outcome, why = "surprise", f"{type(error).__name__}: {str(error)[:300]}"
        reached = _status("VmHWM")
        if self.guarded:
            signal.setitimer(signal.ITIMER_PROF, 0)
        added = reached - level if reached > peak else 0
        if added > len(corrupted) + MEMORY:
            outcome, why = "surprise", f"{added / 2**20:.0f} MiB for a file of {len(corrupted)} bytes; {outcome}: {why}"
        if warned:
            outcome, why = "surprise", f"warned: {warned[0].message}"
        if self.bait.exists():
            outcome, why = "surprise", "what the file asks for was run"
            self.bait.rmdir()
        place.restore()
        return Outcome(index, target.kind, target.name, name, outcome, why.replace(str(self.folder), "…"), added)


def _judged(got: Any, expected: Any, loose: bool) -> tuple[str, str]:
    """Outcome and reason for what was loaded."""
    if _equal(got, expected):
        return "equal", ""
    if not loose:
        return "surprise", "it loads as something else"
    if isinstance(expected, Recipe):
        return ("harmless", "") if isinstance(got, Recipe) else ("surprise", f"it loads as a {type(got).__name__}")
    for key, value in expected.items():
        other = got.get(key)
        if isinstance(value, Tensor):
            if not isinstance(other, Tensor) or (other.shape, other.dtype) != (value.shape, value.dtype):
                return "surprise", f"{key} is of another shape or dtype"
            if not bool(torch.isfinite(other.double()).all()):
                return "surprise", f"{key} is not finite"
    return "harmless", ""


def _refused(target: Target, error: Exception) -> tuple[str, str]:
    """Outcome and reason for an error of the library."""
    message = str(error)
    other_run = target.kind == "run_dir" and message.startswith("run_dir: ") and "cannot go on like this" in message
    if not isinstance(error, target.error) and not other_run:
        return "surprise", f"{type(error).__name__}: {message[:300]}"
    if len(message) > LETTERS:
        return "surprise", f"a message of {len(message)} letters: {message[:300]}"
    if isinstance(error, CheckpointError) and str(target.file) not in message and str(target.file.parent) not in message:
        return "surprise", f"the file is not named: {message}"
    return "refused", message


def _equal(a: Any, b: Any) -> bool:
    """Bit by bit."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        same = isinstance(a, Tensor) and isinstance(b, Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype)
        return same and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return bool(a == b)


class _Place:
    """The folders around a file as they are: a run that goes on writes there."""

    def __init__(self, file: Path) -> None:
        self.file, self.content, self.top = file, file.read_bytes(), file.parent.parent
        self.folders = {folder: set(folder.iterdir()) for folder in (self.top, file.parent)}
        self.others = {path: path.read_bytes() for path in self.folders[file.parent] if path != file}

    def restore(self) -> None:
        """Takes away what is new, and puts the file back."""
        for folder, names in self.folders.items():
            for new in set(folder.iterdir()) - names:
                shutil.rmtree(new) if new.is_dir() else new.unlink()
        self.file.write_bytes(self.content)


def _memory() -> tuple[int, int]:
    """Resident memory now and at its peak, bytes. A peak far above is set back, which takes a while."""
    now, peak = _status("VmRSS"), _status("VmHWM")
    if peak - now > HIDDEN:
        Path("/proc/self/clear_refs").write_text("5")
        now, peak = _status("VmRSS"), _status("VmHWM")
    return now, peak


def _status(name: str) -> int:
    """A size of this process, bytes; 0 where the system does not tell."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


# -------------------------------------------------------------------------------------------------------------------- the run


def main() -> None:
    """Reads all, prints and writes what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few; writes nothing into docs/results")
    parser.add_argument("--child", nargs=2, type=int, metavar=("FIRST", "EVERY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        read_all(range(options.child[0], INPUTS, options.child[1]))
        return
    begin, outcomes = time.perf_counter(), []
    for outcome in apart(EVERY if options.quick else 1):
        outcomes.append(outcome)
        if outcome.outcome == "surprise":
            print(f"SURPRISE {outcome.index} {outcome.kind}, {outcome.name}, {outcome.corruption}: {outcome.why}", flush=True)
        if len(outcomes) % 500 == 0:
            print(f"{len(outcomes)} read", flush=True)
    rows = table_rows(outcomes)
    out = Path(tempfile.mkdtemp()) if options.quick else ROOT / "docs" / "results"
    write_results(out / "fuzz_checkpoints.json", rows)
    (out / "fuzz_checkpoints.md").write_text(table(outcomes))
    surprises = sum(o.outcome == "surprise" for o in outcomes)
    print(f"{surprises} surprises among {len(outcomes)} inputs; {time.perf_counter() - begin:.0f} s; {out}")
    if surprises:
        raise SystemExit(1)


def read_all(indices: Sequence[int]) -> None:
    """In the process apart: a line of JSON for every input."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / "bait.py").write_text("import os\n\nos.mkdir(__file__.removesuffix('.py'))\n")
        sys.path.append(made)  # were a file to have it imported
        reader = Reader(Path(made), guarded=True)
        print("ready", flush=True)
        for index in indices:
            print(json.dumps(dataclasses.asdict(reader.outcome(index))), flush=True)


def apart(every: int) -> Iterator[Outcome]:
    """Every so many inputs, in a process apart; where it dies, another one goes on after the input at fault."""
    first = 0
    while first < INPUTS:
        command = [sys.executable, __file__, "--child", str(first), str(every)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:  # noqa: S603
            lines = iter(process.stdout or ())
            if next(lines, "") != "ready\n":
                raise SystemExit("The process that reads the files could not begin.")
            for line in lines:
                outcome = Outcome(**json.loads(line))
                first = outcome.index + every
                yield outcome
        if first < INPUTS:
            yield Outcome(first, "?", "?", "?", "surprise", f"the process that read it died: {process.returncode}")
            first += every


def table_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """Counts over all, and by kind of file."""
    changed = [o for o in outcomes if o.outcome != "not changed"]

    def row(case: str, metric: str, value: float, goal: float | None, better: str) -> Row:
        return Row(case=case, metric=metric, value=float(value), sd=None, n=len(changed), goal=goal, better=better)

    surprises = sum(o.outcome == "surprise" for o in changed)
    rows = [
        row("", "inputs", len(changed), GOAL, "higher"),
        row("", "surprises", surprises, 0.0, "lower"),
        row("", "largest_added_memory_mib", round(max(o.added for o in changed) / 2**20, 1), None, "lower"),
    ]
    for kind in KINDS:
        mine = collections.Counter(o.outcome for o in changed if o.kind == kind)
        rows += [row(kind, outcome, mine[outcome], 0.0 if outcome == "surprise" else None, "lower") for outcome in OUTCOMES]
    return rows


def table(outcomes: Sequence[Outcome]) -> str:
    """What became of each kind of file and of each corruption, and one message of each kind."""
    changed = [o for o in outcomes if o.outcome != "not changed"]
    lines = [
        "# Corrupted checkpoints and recipes",
        "",
        f"{len(changed)} corrupted files, {sum(o.outcome == 'surprise' for o in changed)} surprises; reading one added at most "
        f"{max(o.added for o in changed) / 2**20:.0f} MiB to the memory (`python benchmarks/fuzz_checkpoints.py`, whose "
        "docstring says what counts as what).",
    ]
    for title, key in (("file", lambda o: o.kind), ("corruption", lambda o: o.corruption)):
        lines += ["", f"| {title} | " + " | ".join(OUTCOMES) + " |", "|---" * (1 + len(OUTCOMES)) + "|"]
        for name in dict.fromkeys(map(key, sorted(changed, key=lambda o: o.index))):
            count = collections.Counter(o.outcome for o in changed if key(o) == name)
            lines.append(f"| {name} | " + " | ".join(str(count[outcome]) for outcome in OUTCOMES) + " |")
    lines += ["", "What is said, for example:", ""]
    for kind in KINDS:
        said = next((o for o in changed if o.kind == kind and o.outcome == "refused"), None)
        lines += [f"- {kind}, {said.corruption}: {said.why}"] if said else []
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
