"""What is each safeguard of training worth? They are left out one after the other, the least active first.

    python benchmarks/ablation.py --data DATA      # hours on two cores; again: goes on where it stopped
    python benchmarks/ablation.py --quick          # see that it runs

The cases are those of `stability.py` where its plain loop fails, and two where it does not, three seeds each. A safeguard stays
out, for all that come after it too, if no run diverges without it and no case's mean ratio is above that with all of them by
more than one standard deviation (over the seeds, with all of them). Redundant safeguards each look useless alone: so they go
cumulatively. The first case that speaks against leaving one out ends its runs: the shortest come first. DATA: as there.

Writes docs/results/ablation.json and .md. Lines of safeguards that are not in the code any more stay there as they are.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import stability
from results import Row, code_key, mean_row, run_missing, write_results
from stability import Job

from energy_prior import Energy, JointEBMPrior
from energy_prior.training import Method

Cases = tuple[tuple[str, Method, int], ...]
CASES: Cases = (
    ("digits", "variational", 1050),
    ("digits", "two_stage", 3000),
    ("mnist", "joint", 300),
    ("mnist", "variational", 1425),
    ("mnist", "two_stage", 3000),
    ("cifar10", "variational", 500),
    ("cifar10", "joint", 500),
)
"""Problem, rule and iterations, the shortest first."""
Runs = dict[str, list[dict[str, Any]]]
"""Case -> its runs."""

SEEDS = range(3)
NONE = 1e30


@dataclasses.dataclass(frozen=True)
class Safeguard:
    """What is left out, and how.

    Attributes:
        name: for people.
        settings: of `fit`, without it.
        prepare: what is done to the prior without it.
    """

    name: str
    settings: tuple[tuple[str, float], ...] = ()
    prepare: Callable[[JointEBMPrior], object] | None = None


def _unbounded(prior: JointEBMPrior) -> None:
    for f in prior.energies:
        if isinstance(f, Energy):
            f.saturation.fill_(NONE)


SAFEGUARDS = (
    Safeguard("restarts of persistent chains", settings=(("restart_probability", 0.0),)),
    Safeguard("averaged weights", settings=(("ema_decay", 0.0),)),
    Safeguard("tuned step size (0.3)", settings=(("step_size", 0.3),)),
    Safeguard("saturation of the energies", prepare=_unbounded),
)
"""The least active first."""


def run(what: tuple[Job, tuple[str, ...]]) -> dict[str, Any]:
    """A run of `stability.py` without the safeguards of these names."""
    job, without = what
    out = [guard for guard in SAFEGUARDS if guard.name in without]
    prepare = [guard.prepare for guard in out if guard.prepare is not None]
    settings = {name: value for guard in out for name, value in guard.settings}
    return stability.run(job, lambda prior: [act(prior) for act in prepare], **settings)


def main() -> None:
    """Runs what is missing, then writes the results."""
    options, out = stability.read_options(__doc__)
    log = out / "ablation.partial.jsonl"
    key = code_key(Path(__file__), *stability.FILES)
    quick: Cases = (("digits", "variational", 12), ("digits", "two_stage", 12))
    cases = quick if options.quick else CASES
    seeds = range(1) if options.quick else SEEDS

    def runs(case: tuple[str, Method, int], without: tuple[str, ...]) -> list[dict[str, Any]]:
        """Of every seed, without these."""
        (p, m, n), label = case, " + ".join(without) or "all"
        todo = {f"{p} {m} {s} without {label}": (Job(p, m, s, n, False, options.data, options.quick), without) for s in seeds}
        done = dict(run_missing(todo, run, log, key, 1 if options.quick else options.workers))
        return [done[name] for name in todo]

    whole = {_label(case): runs(case, ()) for case in cases}
    rows, removed = _rows(f"all {len(SAFEGUARDS)}", whole), ()
    for guard in SAFEGUARDS:
        tried, against = {}, ""
        for case in cases:
            tried[_label(case)] = runs(case, (*removed, guard.name))
            if against := _against(_label(case), tried, whole):
                break
        rows += _rows(f"without {guard.name}", tried)
        row = Row(case=guard.name, metric="stays_out", value=float(not against), sd=None, n=1, goal=None, better="higher")
        if against:
            row["why"] = against
        rows.append(row)
        print(f"{guard.name}: {against or 'stays out'}", flush=True)
        if not against:
            removed = (*removed, guard.name)
    file = out / "ablation.json"
    replaced = (f", all {len(SAFEGUARDS)}", *(guard.name for guard in SAFEGUARDS))
    older = json.loads(file.read_text())["rows"] if file.exists() else []
    rows = [row for row in older if not row["case"].endswith(replaced)] + rows
    write_results(file, rows)
    (out / "ablation.md").write_text(markdown(rows))
    print((out / "ablation.md").read_text())
    log.unlink()


def _label(case: tuple[str, Method, int]) -> str:
    return f"{case[0]} {case[1]}"


def _against(case: str, tried: Runs, whole: Runs) -> str:
    """What a case says against leaving a safeguard out; empty if nothing."""
    if diverged := sum(r["diverged"] for r in tried[case]):
        return f"{case}: {diverged} of {len(tried[case])} diverged"
    if any(r["diverged"] for r in whole[case]):
        return f"{case}: diverged with all of them"
    ratios = [r["ratio"] for r in whole[case]]
    sd = statistics.stdev(ratios) if len(ratios) > 1 else 0.0
    worse = statistics.fmean(r["ratio"] for r in tried[case]) - statistics.fmean(ratios)
    return f"{case}: {worse:+.2g}, sd {sd:.2g}" if worse > sd else ""


def _rows(name: str, runs: Runs) -> list[Row]:
    rows: list[Row] = []
    for case, own in runs.items():
        diverged = float(sum(r["diverged"] for r in own))
        label = f"{case}, {name}"
        rows.append(Row(case=label, metric="diverged", value=diverged, sd=None, n=len(own), goal=None, better="lower"))
        for metric in ("ratio", "max_energy"):
            values = [r[metric] for r in own if not r["diverged"]]
            none = Row(case=label, metric=metric, value=None, sd=None, n=0, goal=None, better="lower", why="all diverged")
            rows.append(mean_row(label, metric, values, None, "lower") if values else none)
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """The table of all rows, in their order."""
    table = {(row["case"], row["metric"]): row for row in rows}
    named = [row["case"].split(", ", 1) for row in rows if row["metric"] == "ratio"]
    cases = [_label(case) for case in CASES if any(_label(case) == c for c, _ in named)]

    def cell(case: str, name: str) -> str:
        if (f"{case}, {name}", "ratio") not in table:
            return "–"
        ratio, diverged = table[f"{case}, {name}", "ratio"], table[f"{case}, {name}", "diverged"]
        if diverged["value"]:
            return f"{diverged['value']:.0f} of {diverged['n']} diverged"
        sd = "" if ratio["sd"] is None else f" ± {ratio['sd']:.2g}"
        return f"{ratio['value']:.2g}{sd}"

    lines = [
        "# What each safeguard of training is worth",
        "",
        "`python benchmarks/ablation.py`: ratio to the start (as in the table of stability, smaller is better), mean and "
        f"standard deviation of {max(row['n'] for row in rows)} seeds. Safeguards are left out one after the other, the least "
        "active first; one that stays out is out in all lines below it. –: not run, as another case had spoken against it.",
        "",
        "| safeguards | " + " | ".join(cases) + " | stays out |",
        "|---|" + "---|" * (len(cases) + 1),
    ]
    for name in dict.fromkeys(name for _, name in named):
        verdict = table.get((name.removeprefix("without "), "stays_out"))
        last = "" if verdict is None else "yes" if verdict["value"] else f"no: {verdict.get('why', '')}"
        lines.append(f"| {name} | " + " | ".join(cell(case, name) for case in cases) + f" | {last} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
