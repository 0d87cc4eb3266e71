"""Sixteen faults planted in correct adapters, and correct generators of every kind: does `check_generator` tell them apart?

    python benchmarks/check_generator.py            # a minute or two on one core
    python benchmarks/check_generator.py --quick    # one fault, three correct generators

A fault counts as found only where the message gives the right reason: it must match the words that tests/faults.py has for
it, the layer at fault among them. Faults 1 to 7 are to be found without any of the model's own calls, the others with them.
Writes docs/results/check_generator.json and .md.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
from results import ROOT, Row, write_results

from energy_prior import GeneratorError, check_generator

sys.path.insert(0, str(ROOT / "tests"))  # the stand-ins of public models, and what is planted in them
from faults import FAULTS, Case, Fault, correct_cases

QUICK = 3


def main() -> None:
    """Checks all, prints and writes what was said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few; writes nothing into docs/results")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    begin = time.perf_counter()
    torch.manual_seed(0)
    faults = FAULTS[:1] if quick else FAULTS
    said = [find(fault) for fault in faults]
    refused, correct = [], 0
    for name, case in islice(correct_cases(), QUICK if quick else None):
        correct += 1
        message = check(case)
        print(f"{'refused' if message else 'passed':<8} {name}", flush=True)
        if message:
            refused.append(f"{name}: {message}")
    found = sum(right for right, _ in said)
    rows = [
        row("planted_faults", "found", found, len(faults), float(len(FAULTS)), "higher"),
        row("correct_adapters", "refused", len(refused), correct, 0.0, "lower"),
        row("correct_adapters", "tried", correct, correct, None, "higher"),
    ]
    out = Path(tempfile.mkdtemp()) if quick else ROOT / "docs" / "results"
    write_results(out / "check_generator.json", rows)
    (out / "check_generator.md").write_text(table(faults, [message for _, message in said], found, correct, refused))
    seconds = time.perf_counter() - begin
    print(
        f"{found} of {len(faults)} faults found, {len(refused)} of {correct} correct generators refused; {seconds:.0f} s; {out}"
    )
    if found < len(faults) or refused:
        raise SystemExit(1)


def find(fault: Fault) -> tuple[bool, str]:
    """Whether a fault is found for the right reason, and what is said."""
    case = fault.make()
    message = check(case)
    right = re.search(fault.says, message, re.DOTALL) is not None
    print(f"{'found' if right else 'MISSED':<8} {fault.name}", flush=True)
    return right, message


def check(case: Case) -> str:
    """The faults that are named, one a line; empty: none."""
    try:
        check_generator(case.generator, case.x, **case.calls)
    except GeneratorError as error:
        return str(error).partition("\n")[2]
    return ""


def row(case: str, metric: str, value: int, n: int, goal: float | None, better: str) -> Row:
    """A count."""
    return Row(case=case, metric=metric, value=float(value), sd=None, n=n, goal=goal, better=better)


def table(faults: tuple[Fault, ...], said: list[str], found: int, correct: int, refused: list[str]) -> str:
    """Every fault with the first line of what is said of it."""
    lines = [
        "# What `check_generator` says",
        "",
        f"{found} of {len(faults)} planted faults are found, and {len(refused)} of {correct} correct generators refused "
        "(`python benchmarks/check_generator.py`).",
        "",
        "| fault | the message's first line |",
        "|---|---|",
    ]
    for fault, message in zip(faults, said, strict=True):
        first = message.partition("\n")[0].removeprefix("- ").replace("|", "\\|") or "not found"
        lines.append(f"| {fault.name} | {first} |")
    return "\n".join([*lines, *([""] if refused else []), *refused]) + "\n"


if __name__ == "__main__":
    main()
