"""What reading images costs, against another commit of this project; and whether a stream's memory grows with its set.

    git worktree add ../before COMMIT
    python benchmarks/data.py --mnist DATA/mnist --baseline ../before     # about five minutes on two cores that do nothing else
    python benchmarks/data.py --quick                                     # see that it runs

Cases: `load_images` of MNIST's 60,000 images in one parquet file, and of a folder of 20,000 PNG files in ten classes, which the
script makes. Each run is a process of its own, those of the two commits in turn; a ratio is the median over the rounds after
the first, which fills the caches (that of `datasets`, which the older code needs, among them). Growth: memory that a pass over
a stream of 20,000 images adds beyond one of 5,000, as a share of what the other 15,000 take. Writes docs/results/data.json
and .md.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import added_memory, apart, goal_rows, ratio_table
from PIL import Image
from results import ROOT, machine, write_results

GOALS: dict[tuple[str, str], float | None] = {
    ("mnist_parquet", "over_baseline"): 1.1,
    ("folder_of_png", "over_baseline"): 1.1,
    ("mnist_parquet", "first_over_baseline"): None,
    ("folder_of_png", "first_over_baseline"): None,
    ("stream", "growth_over_images"): 0.02,
}
ROUNDS = 4


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", help="folder with MNIST's parquet files; without it that case is left out")
    parser.add_argument("--baseline", default=str(ROOT), help="checkout of the commit to compare with; by default this one")
    parser.add_argument("--quick", action="store_true", help="see that it runs; writes nothing into docs/results")
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child[0], options.child[1])))
        return
    out = Path(tempfile.mkdtemp()) if options.quick else ROOT / "docs" / "results"
    figures: dict[tuple[str, str], float] = {}
    with tempfile.TemporaryDirectory() as made:
        os.environ["HF_DATASETS_CACHE"] = str(Path(made) / "cache")
        many, few = (write_folder(Path(made) / f"{n}", n) for n in ((60, 40) if options.quick else (20_000, 5_000)))
        cases = {"folder_of_png": many} | ({"mnist_parquet": options.mnist} if options.mnist else {})
        for case, folder in cases.items():
            ratios = []
            for _ in range(2 if options.quick else ROUNDS):
                run = functools.partial(apart, __file__, "--child", "load", str(folder))
                here, before = run(package=str(ROOT)), run(package=options.baseline)
                ratios.append(here / before)
                print(f"{case:<16}{here:8.2f} s, baseline {before:8.2f} s", flush=True)
            figures[case, "first_over_baseline"] = ratios[0]
            figures[case, "over_baseline"] = statistics.median(ratios[1:])
        added = [apart(__file__, "--child", "stream", str(folder), give_back=True) for folder in (many, few)]
        counts = [len(list(folder.rglob("*.png"))) for folder in (many, few)]
        figures["stream", "growth_over_images"] = (added[0] - added[1]) / ((counts[0] - counts[1]) * 32 * 32 * 3 * 4 / 1024)
    rows = goal_rows(GOALS, figures, lambda case, metric: "not measured: needs --mnist")
    text = (
        "`python benchmarks/data.py`: ratios of times and of memory; its docstring says what is compared. Measured on: "
        f"{machine()}."
    )
    write_results(out / "data.json", rows)
    (out / "data.md").write_text(ratio_table("Data", text, rows))
    print((out / "data.md").read_text())


def child(what: str, folder: str) -> float:
    """Seconds that a split takes to load, or kB that a pass over a stream adds."""
    from energy_prior.data import ImageStream, load_images

    if what == "load":
        begin = time.perf_counter()
        load_images(folder)
        return time.perf_counter() - begin
    stream = ImageStream(folder, size=32, batch_size=20, buffer=20)
    next(iter(stream))

    def one_pass() -> None:
        for _ in stream:
            pass

    return added_memory(one_pass)


def write_folder(folder: Path, images: int) -> Path:
    """A split of PNG files, 32 × 32, smooth and in colour, in ten classes."""
    rng = np.random.default_rng(0)
    for i in range(images):
        small = rng.integers(0, 255, (4, 4, 3), np.uint8)
        path = folder / "train" / f"class {i % 10}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((32, 32)).save(path)
    return folder


if __name__ == "__main__":
    sys.exit(main())
