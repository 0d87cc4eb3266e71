"""What is each safeguard of training worth? They are left out one after the other, the least active first.

    python benchmarks/ablation.py --data DATA      # hours on two cores; again: goes on where it stopped
    python benchmarks/ablation.py --quick          # see that it runs

The cases are those of `stability.py` where its plain loop fails, and two where it does not, three seeds each. A safeguard stays
out, for all that come after it too, if no run diverges without it and no case's mean ratio is above that with all of them by
more than one standard deviation (over the seeds, with all of them). Redundant safeguards each look useless alone: so they go
cumulatively. DATA: as there. Writes docs/results/ablation.json and .md.
"""

from __future__ import annotations

import dataclasses
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
    ("mnist", "variational", 1425),
    ("mnist", "joint", 300),
    ("cifar10", "variational", 500),
    ("cifar10", "joint", 500),
    ("digits", "two_stage", 3000),
    ("mnist", "two_stage", 3000),
)
"""Problem, rule and iterations."""
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
    Safeguard("saturation of the energies", prepare=_unbounded),
    Safeguard("restarts of persistent chains", settings=(("restart_probability", 0.0),)),
    Safeguard("averaged weights", settings=(("ema_decay", 0.0),)),
    Safeguard("tuned step size (0.3)", settings=(("step_size", 0.3),)),
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
    grid: list[tuple[str, Method, int, int]] = [(p, m, n, s) for p, m, n in cases for s in seeds]

    def runs(without: tuple[str, ...]) -> list[dict[str, Any]]:
        """Of every case and seed, without these."""
        label = " + ".join(without) or "all"
        todo = {
            f"{p} {m} {s} without {label}": (Job(p, m, s, n, False, options.data, options.quick), without)
            for p, m, n, s in grid
        }
        done = dict(run_missing(todo, run, log, key, 1 if options.quick else options.workers))
        return [done[name] for name in todo]

    whole = runs(())
    rows, removed = _rows("all", whole), ()
    verdicts: dict[str, list[str]] = {}
    for guard in SAFEGUARDS:
        tried = runs((*removed, guard.name))
        verdicts[guard.name] = _against(tried, whole)
        rows += _rows(f"without {guard.name}", tried)
        out_of_it = float(not verdicts[guard.name])
        rows.append(Row(case=guard.name, metric="stays_out", value=out_of_it, sd=None, n=1, goal=None, better="higher"))
        print(f"{guard.name}: {'; '.join(verdicts[guard.name]) or 'stays out'}", flush=True)
        if not verdicts[guard.name]:
            removed = (*removed, guard.name)
    write_results(out / "ablation.json", rows)
    (out / "ablation.md").write_text(_markdown(rows, verdicts, [f"{p} {m}" for p, m, _ in cases]))
    print((out / "ablation.md").read_text())
    log.unlink()


def _by_case(runs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    cases: dict[str, list[dict[str, Any]]] = {}
    for result in runs:
        cases.setdefault(f"{result['problem']} {result['method']}", []).append(result)
    return cases


def _against(tried: Sequence[dict[str, Any]], whole: Sequence[dict[str, Any]]) -> list[str]:
    """What speaks against leaving it out."""
    found = []
    for (case, own), base in zip(_by_case(tried).items(), _by_case(whole).values(), strict=True):
        if diverged := sum(r["diverged"] for r in own):
            found.append(f"{case}: {diverged} of {len(own)} diverged")
            continue
        if any(r["diverged"] for r in base):
            found.append(f"{case}: diverged with all of them")
            continue
        ratios = [r["ratio"] for r in base]
        sd = statistics.stdev(ratios) if len(ratios) > 1 else 0.0
        worse = statistics.fmean(r["ratio"] for r in own) - statistics.fmean(ratios)
        if worse > sd:
            found.append(f"{case}: {worse:+.2g}, sd {sd:.2g}")
    return found


def _rows(name: str, runs: Sequence[dict[str, Any]]) -> list[Row]:
    rows: list[Row] = []
    for case, own in _by_case(runs).items():
        diverged = float(sum(r["diverged"] for r in own))
        label = f"{case}, {name}"
        rows.append(Row(case=label, metric="diverged", value=diverged, sd=None, n=len(own), goal=None, better="lower"))
        for metric in ("ratio", "max_energy"):
            values = [r[metric] for r in own if not r["diverged"]]
            none = Row(case=label, metric=metric, value=None, sd=None, n=0, goal=None, better="lower", why="all diverged")
            rows.append(mean_row(label, metric, values, None, "lower") if values else none)
    return rows


def _markdown(rows: Sequence[Row], verdicts: dict[str, list[str]], cases: Sequence[str]) -> str:
    table = {(row["case"], row["metric"]): row for row in rows}

    def cell(case: str, name: str) -> str:
        ratio, diverged = table[f"{case}, {name}", "ratio"], table[f"{case}, {name}", "diverged"]
        if diverged["value"]:
            return f"{diverged['value']:.0f} of {diverged['n']} diverged"
        sd = "" if ratio["sd"] is None else f" ± {ratio['sd']:.2g}"
        return f"{ratio['value']:.2g}{sd}"

    lines = [
        "# What each safeguard of training is worth",
        "",
        "`python benchmarks/ablation.py`: ratio to the start (as in the table of stability, smaller is better), mean and "
        f"standard deviation of {table[f'{cases[0]}, all', 'ratio']['n']} seeds. Safeguards are left out one after the other, "
        "the least active first; one that stays out is out in all lines below it.",
        "",
        "| without | " + " | ".join(cases) + " | stays out |",
        "|---|" + "---|" * (len(cases) + 1),
        "| (all safeguards) | " + " | ".join(cell(case, "all") for case in cases) + " | |",
    ]
    for name, against in verdicts.items():
        cells = " | ".join(cell(case, f"without {name}") for case in cases)
        lines.append(f"| {name} | {cells} | {'no' if against else 'yes'} |")
    lines += ["", "What speaks against leaving one out:", ""]
    lines += [f"- {name}: {'; '.join(against)}." for name, against in verdicts.items() if against] or ["- nothing."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
