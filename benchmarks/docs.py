"""Which share of the code in README and the docs do tests run? And is the site whole?

    python benchmarks/docs.py            # minutes on one core: the tests of blocks, and a build of the site
    python benchmarks/docs.py --check    # the same, but writes nothing, and fails where a goal is missed

A block counts where a test that passed has run it, from its first line to its last, as written but for the texts that the test
replaces because they would take minutes, a GPU or a download. Blocks in Python, shell and YAML count, whatever file of the
top level or of docs they are in. `site_warnings`: what `mkdocs build --strict` says; `api_names`: names of the API reference.
Writes docs/results/docs.json.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile

import pytest
from results import ROOT, Row, write_results

sys.path.insert(0, str(ROOT / "tests"))
from doc_blocks import CODE, all_blocks

FILES = ("tests/test_readme.py", "tests/test_public_models.py")


class Recorder:
    """A plugin of pytest that keeps the blocks that tests which passed have run."""

    def __init__(self) -> None:
        self.run: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest after each phase of a test."""
        if report.when == "call" and report.passed:
            self.run |= {str(value) for name, value in report.user_properties if name == "block"}


def main() -> None:
    """Runs the tests, builds the site, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where a goal is missed")
    check = parser.parse_args().check
    os.chdir(ROOT)
    recorder = Recorder()
    pytest.main(["-q", "-m", "", "-p", "no:cacheprovider", *FILES], plugins=[recorder])
    wanted = [block.name for block in all_blocks() if block.kind in CODE]
    for name in wanted:
        if name not in recorder.run:
            print(f"not run: {name}")
    share = sum(name in recorder.run for name in wanted) / len(wanted)
    names = sum(len(re.findall(r"^::: ", page.read_text(), re.MULTILINE)) for page in (ROOT / "docs" / "api").glob("*.md"))
    rows = [
        _row("docs", "blocks_run_share", share, 1.0, "higher"),
        _row("docs", "blocks", len(wanted)),
        _row("docs", "api_names", names),
        _row("docs", "site_warnings", _site_warnings(), 0.0, "lower"),
    ]
    for row in rows:
        print(row["metric"], row["value"])
    if not check:
        write_results(ROOT / "docs" / "results" / "docs.json", rows)
    elif any(row["value"] != row["goal"] for row in rows if row["goal"] is not None):
        sys.exit("Blocks of code are not run, or the site has warnings.")


def _row(case: str, metric: str, value: float, goal: float | None = None, better: str = "higher") -> Row:
    return Row(case=case, metric=metric, value=float(value), sd=None, n=1, goal=goal, better=better)


def _site_warnings() -> int:
    """Lines of warnings and errors of a strict build."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
        environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # a notice of mkdocs-material, not of this site
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    lines = [line for line in done.stderr.splitlines() if line.startswith(("WARNING", "ERROR"))]
    return max(len(lines), int(done.returncode != 0))


if __name__ == "__main__":
    main()
