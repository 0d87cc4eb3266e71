"""What a joint prior does for models with deep latents: one backbone's samples under several priors of its latents.

    python benchmarks/deep_latents.py --data DATA --case fashion_mnist_small   # hours on two cores; goes on where it stopped
    python benchmarks/deep_latents.py --data DATA                              # every case, days
    python benchmarks/deep_latents.py --table                                  # only the table, of the cases that are done
    python benchmarks/deep_latents.py --data DATA --case … --units 'backbone'  # only some units: processes share them
    python benchmarks/deep_latents.py --data DATA --device cuda                # minutes a case
    python benchmarks/deep_latents.py --quick                                  # see that it runs, on scikit-learn's digits

DATA: a folder with `cifar10` and `fashion_mnist`, as `energy_prior.data.load_images` reads them. Of the training images the
last 10,000 are held out: 5,000 are the reference of every Fréchet distance (EfficientNet-Lite0 features, no FID), the other
5,000 are what is reconstructed and what the temperature is chosen on. Test images are not used.

    gap_closed = (FD(Gaussian) − FD(this prior)) / (FD(Gaussian) − FD(reconstructions))

Beside the joint prior of the defaults: the Gaussian prior at its best temperature; N(m, C) fitted to the posterior's noise of
all layers; a mixture of 50 such Gaussians with one covariance. Every unit is a line of docs/results/deep_latents.partial.jsonl
as it ends, with the commit and the device that it was run on; weights are in `--runs`. A case that is done stays in the table
when code has changed since. Writes docs/results/deep_latents.json and .md, and a picture per case.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from backbones import CASES, QUICK
from case_runs import CaseRun, Log, Sizes, digits, read_options, whole
from deep_measures import GaussianMixture, layers_of
from results import ROOT, Row, code_key, mean_row, write_results
from torch import Tensor

from energy_prior.data import load_images
from energy_prior.mismatch import tell_apart
from energy_prior.plots import image_panels

_LAST_UNIT = "two sample"
FIGURES = ("deep_latents", "case_runs", "deep_measures", "nvae_style")
"""Files here that figures depend on, beside the package and the function that makes a case."""
GOALS: dict[tuple[str, str], tuple[float, str]] = {
    ("fashion_mnist_small", "gap_closed"): (0.8, "higher"),
    ("fashion_mnist_small", "above_gaussian_refit"): (0.15, "higher"),
    ("cifar10_pyramid", "gap_closed"): (0.6, "higher"),
    ("cifar10_pyramid", "gap_closed_shorter_fit"): (0.3, "higher"),
    ("cifar10_pyramid", "long_over_short"): (1.1, "lower"),
    ("cifar10_pyramid", "latent_two_sample_ratio"): (0.7, "lower"),
    ("cifar10_wide", "gap_closed"): (0.2, "higher"),
    ("nvae_cells", "gap_closed"): (0.4, "higher"),
}


def main() -> None:
    """Runs what is missing, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=tuple(CASES), action="append", help="only this one; may be given several times")
    options = read_options(parser)
    out, runs = ROOT / "docs" / "results", Path(options.runs)
    makers, sizes = {name: CASES[name] for name in ([] if options.table else options.case or CASES)}, Sizes()
    if options.quick:
        out = runs = Path(tempfile.mkdtemp())
        makers, sizes = QUICK, Sizes(images=100, draws=2, moments=200, classifier=20, components=2, few=50, long=40, held=400)
    here, log = Path(__file__), out / "deep_latents.partial.jsonl"
    files = [here.with_name(f"{file}.py") for file in FIGURES]
    keys = {name: code_key(*files, also=inspect.getsource(make)) for name, make in makers.items()}  # of the code as it is now
    for name, make in makers.items():
        key = keys[name]
        torch.manual_seed(0)
        case = make()
        images = load_images(Path(options.data) / case.data).images if case.data else digits(case.generator.x_shape)
        run = DeepRun(case, images, runs / f"deep-{name}-{key}", Log(log, key, name, options.units, options.device), sizes)
        run.run()
        if not run.log.matched:
            parser.error(f"--units: no unit of {name} is {options.units!r}; its units are in the docstring of DeepRun.run")
        if _LAST_UNIT in run.log.done:
            image_panels(out / f"deep_latents_{name}.png", run.panels(), columns=5)
    done = {name: units for name in (QUICK if options.quick else CASES) if (units := whole(log, name, _LAST_UNIT))}
    rows = [row for name, units in done.items() for row in rows_of(name, units)]
    write_results(out / "deep_latents.json", rows)
    text = table(rows, {name: units[_LAST_UNIT] for name, units in done.items()})
    (out / "deep_latents.md").write_text(text)
    print(text)


class DeepRun(CaseRun):
    """A case of this benchmark."""

    def run(self) -> None:
        """All units, in order.

        "backbone", "mismatch", "energies", "real", "reconstructions", "best temperature"; for i = 0 … 2 "gaussian i",
        "temperature i", "gaussian_refit i", "mixture_refit i" and "joint i"; "shorter energies" and "shorter_fit i";
        "few real", "few short", "few long"; "two sample".
        """
        unit, n, few = self.log.unit, self.sizes.images, self.sizes.few
        unit("backbone", self.backbone)
        self.load_backbone()
        unit("mismatch", self._mismatch)
        unit("energies", lambda: self.learn("energies", self.case.energies))
        unit("real", lambda: self.distance(self.others))
        unit("reconstructions", lambda: self.distance(self.reconstructed(self.others)))
        unit("best temperature", self.best_temperature)
        for i in range(self.sizes.draws):
            unit(f"gaussian {i}", lambda i=i: self.distance(self.gaussian(n, i)))
            unit(f"temperature {i}", lambda i=i: self.distance(self.at_best_temperature(n, i)))
            unit(f"gaussian_refit {i}", lambda i=i: self.distance(self.refit(n, i)))
            unit(f"mixture_refit {i}", lambda i=i: self.distance(self.refit(n, i, mixture=True)))
        for i in range(self.sizes.draws):
            keep = self.folder / f"joint-{i}.pt"
            unit(f"joint {i}", lambda i=i, keep=keep: self.distance(self.sampled(self.learned("energies"), n, i, keep)))
        if (differ := self.case.shorter) is not None:
            unit("shorter energies", lambda: self.learn("shorter", self.case.energies | differ))
            for i in range(self.sizes.draws):
                unit(f"shorter_fit {i}", lambda i=i: self.distance(self.sampled(self.learned("shorter"), n, i)))
        if self.case.long_chains:
            unit("few real", lambda: self.distance(self.others[:few]))
            unit("few short", lambda: self.distance(self.sampled(self.learned("energies"), few, 90)))
            unit("few long", lambda: self.distance(self.sampled(self.learned("energies"), few, 90, steps=self.sizes.long)))
        self.log.last(_LAST_UNIT, self._two_sample)

    def panels(self) -> dict[str, Tensor]:
        """Forty images of each kind, the last of them frames of five chains of the joint prior."""
        prior = self.learned("energies")
        path = prior.trajectory(5, every=max(1, self.sizes.long // 70), steps=self.sizes.long // 10, rng=self.seeded(99))
        frames = torch.linspace(0, len(path.steps) - 1, 8).long()
        images = {
            "real": self.reference[:40],
            "reconstructions": self.reconstructed(self.others[:40]),
            "Gaussian prior": self.gaussian(40, 99),
            "refitted Gaussian": self.refit(40, 99),
            "joint prior": self.sampled(prior, 40, 99),
            "its chains, downwards": prior.decode([z[frames].flatten(0, 1) for z in path.latents]).cpu(),
        }
        return {title: x.clamp(0, 1) for title, x in images.items()}

    def refit(self, n: int, number: int, *, mixture: bool = False) -> Tensor:
        """Images of N(m, C) fitted to the posterior's noise, or of a mixture of such."""
        return self.decoded((self._mixture if mixture else self._one_gaussian).sample(n, self.seeded(number)))

    def _mismatch(self) -> dict[str, Any]:
        """What `prior.mismatch` says before any energy is trained."""
        x = self.train[: 2 * self.sizes.few].to(self.device)
        found = self.plain.mismatch(x, prior="generator", rng=self.seeded(4))
        print(found)
        return dataclasses.asdict(found)

    def _two_sample(self) -> dict[str, Any]:
        files = [self.made(f"joint-{i}.pt", f"'joint {i}'") for i in range(self.sizes.draws)]
        chains = torch.cat([torch.load(file, weights_only=True) for file in files])[: self.sizes.moments]
        posterior = self.posterior[: len(chains)]
        torch.manual_seed(3)

        def accuracy(rows: Tensor) -> float:
            sides = (layers_of(side.to(self.device), self.vae) for side in (posterior, rows))
            return tell_apart(*sides, steps=self.sizes.classifier)

        gaussian, joint = accuracy(torch.randn_like(posterior)), accuracy(chains[: len(posterior)])
        return {"gaussian": gaussian, "joint": joint, "ratio": (joint - 0.5) / (gaussian - 0.5)}

    @functools.cached_property
    def _one_gaussian(self) -> GaussianMixture:
        return GaussianMixture(self.posterior, 1)

    @functools.cached_property
    def _mixture(self) -> GaussianMixture:
        return GaussianMixture(self.posterior, self.sizes.components)


def rows_of(case: str, found: dict[str, dict[str, Any]]) -> list[Row]:
    """The rows of a case from its units."""
    real, reconstructions = found["real"]["fd"], found["reconstructions"]["fd"]

    def distances(kind: str) -> list[float]:
        return [found[f"{kind} {i}"]["fd"] for i in range(len(found)) if f"{kind} {i}" in found]

    gaussian = statistics.fmean(distances("gaussian"))

    def row(metric: str, values: Sequence[float], better: str = "lower") -> Row:
        goal, better = GOALS.get((case, metric), (None, better))
        return mean_row(case, metric, values, goal, better)

    def closed(kind: str) -> list[float]:
        return [(gaussian - fd) / (gaussian - reconstructions) for fd in distances(kind)]  # --quick may have no gap

    before = found["mismatch"]
    rows = [row("tilt_nats", [before["tilt"]]), row("told_apart_before", [before["accuracy"]])]
    rows.append(row("bits_per_dimension", [found["backbone"]["bits_per_dimension"]]))
    rows.append(row("fd_real", [real]))
    rows.append(row("fd_reconstructions", [reconstructions]))
    for kind in ("gaussian", "temperature", "gaussian_refit", "mixture_refit", "joint"):
        rows.append(row(f"fd_{kind}", distances(kind)))
    for kind in ("temperature", "gaussian_refit", "mixture_refit"):
        rows.append(row(f"gap_closed_{kind}", closed(kind), "higher"))
    rows.append(row("gap_closed", closed("joint"), "higher"))
    if shorter := closed("shorter_fit"):
        rows.append(row("gap_closed_shorter_fit", shorter, "higher"))
    above = statistics.fmean(closed("joint")) - statistics.fmean(closed("gaussian_refit"))
    rows.append(row("above_gaussian_refit", [above], "higher"))
    if "few long" in found:
        floor = found["few real"]["fd"]
        rows.append(row("long_over_short", [(found["few long"]["fd"] - floor) / (found["few short"]["fd"] - floor)]))
    rows.append(row("latent_two_sample_ratio", [found[_LAST_UNIT]["ratio"]]))
    return rows


def table(rows: Sequence[Row], last: dict[str, dict[str, Any]]) -> str:
    """The rows in Markdown, and from the last unit of every case the commit and the device."""
    lines = [
        "# Deep latents",
        "",
        "`python benchmarks/deep_latents.py`: one backbone's samples under several priors of its latents; its docstring says "
        "what is compared. Fréchet distances (EfficientNet-Lite0) to 5,000 held-out training images, means over draws.",
        "",
        "| case | metric | value | sd | goal |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        goal = "" if row["goal"] is None else f"{'≤' if row['better'] == 'lower' else '≥'} {row['goal']:g}"
        sd = "" if row["sd"] is None else f"{row['sd']:.2g}"
        lines.append(f"| {row['case']} | {row['metric']} | {row['value']:.4g} | {sd} | {goal} |")
    at = ", ".join(
        f"{case} at commit {(unit['commit'] or 'unknown')[:7]}, {unit.get('device', 'CPU')}" for case, unit in last.items()
    )
    return "\n".join([*lines, "", f"Run: {at}."]) + "\n"


if __name__ == "__main__":
    main()
