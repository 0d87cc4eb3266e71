"""How near the adapters are to the public code: a table of records that were measured with that code, in float64.

    python benchmarks/adapters_real.py RECORDS.json …     # writes the table
    python benchmarks/adapters_real.py --quick            # of made-up records; writes nothing into docs/results

The licences of the public code differ, and neither it nor code that builds its models is part of this repository. Who has a
clone measures there: the model's own calls and the adapter run on the same noise, as `check_generator` does
(docs/public-models.md), with random weights that leave nothing at 0. A record is {"model", "commit", "variant", "quantity",
"relative_deviation"}, and where that is above 1e-9 "why". Quantities: log q and log p of every layer, their KL, log p(x | z) of
a reconstruction, and parameters or density of p(x | z) of a sample. Writes docs/results/adapters_real.json and .md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from results import ROOT, Row, write_results

GOAL = 1e-9
QUANTITIES = {"log_q": "log q", "log_p": "log p", "kl": "KL", "reconstruction": "log p(x given z)", "samples": "samples"}
_MADE_UP: dict[str, Any] = {"model": "A", "commit": "1", "variant": "plain", "relative_deviation": 1e-15}


def main() -> None:
    """Reads the records, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="*", type=Path, help="JSON files, each a list of records")
    parser.add_argument("--quick", action="store_true", help="see that it runs")
    options = parser.parse_args()
    if not (options.records or options.quick):
        parser.error("records: give the files")
    records: list[dict[str, Any]] = [{**_MADE_UP, "quantity": q} for q in QUANTITIES] if options.quick else []
    for file in options.records:
        records += json.loads(file.read_text())
    out = Path(tempfile.mkdtemp()) if options.quick else ROOT / "docs" / "results"
    write_results(out / "adapters_real.json", [_row(record) for record in records])
    (out / "adapters_real.md").write_text(_table(records))
    print((out / "adapters_real.md").read_text())


def _row(record: dict[str, Any]) -> Row:
    case, value = f"{_of(record)}, {record['variant']}", record["relative_deviation"]
    row = Row(case=case, metric=record["quantity"], value=value, sd=None, n=1, goal=GOAL, better="lower")
    if "why" in record:
        row["why"] = record["why"]
    return row


def _of(record: dict[str, Any]) -> str:
    return f"{record['model']} {record['commit'][:7]}"


def _table(records: list[dict[str, Any]]) -> str:
    heads = " | ".join(QUANTITIES.values())
    lines = [
        "# Adapters and their models",
        "",
        "Largest relative deviations of the adapters from the public code itself, float64, random weights, the same noise on",
        "both sides. That code is not part of this repository; `benchmarks/adapters_real.py` says how its records are made.",
        "The page on models of public repositories has the calls to see it for your own checkpoint.",
    ]
    for model in dict.fromkeys(map(_of, records)):
        own = [record for record in records if _of(record) == model]
        lines += ["", f"## {model}", "", f"| variant | {heads} |", "|---|" + "---|" * len(QUANTITIES)]
        for variant in dict.fromkeys(record["variant"] for record in own):
            found = {r["quantity"]: r["relative_deviation"] for r in own if r["variant"] == variant}
            cells = ["" if found.get(q) is None else f"{found[q]:.1e}" if found[q] else "0" for q in QUANTITIES]
            lines.append(f"| {variant} | {' | '.join(cells)} |")
        reasons = dict.fromkeys(record["why"] for record in own if "why" in record)
        lines += ["", *(f"- {reason}" for reason in reasons)] if reasons else []
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
