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
import json
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deep_cases import CASES, QUICK, Case
from deep_measures import GaussianMixture, flat, layers_of, noise_of
from results import ROOT, Row, code_key, mean_row, provenance, write_results
from torch import Tensor

from energy_prior import JointEBMPrior, fit_elbo
from energy_prior._util import not_none
from energy_prior.checkpoint import fingerprint
from energy_prior.cli.demo import load_demo_data
from energy_prior.data import load_images
from energy_prior.evaluate import efficientnet_features, frechet_distance
from energy_prior.mismatch import tell_apart
from energy_prior.plots import image_panels
from energy_prior.topdown import TopDown

_LAST_UNIT = "two sample"
FIGURES = ("deep_latents", "deep_measures", "nvae_style")
"""Files here that figures depend on, beside the package and the function that makes a case."""
TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.0)
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


class Sizes(NamedTuple):
    """Numbers of images, draws and steps."""

    images: int = 5000
    draws: int = 3
    moments: int = 20_000
    classifier: int = 2000
    components: int = 50
    few: int = 1000
    long: int = 1000
    held: int = 10_000


def main() -> None:
    """Runs what is missing, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the image sets; needed but for --quick")
    parser.add_argument("--case", choices=tuple(CASES), action="append", help="only this one; may be given several times")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--runs", default=str(ROOT / "runs"), help="folder for weights and pictures")
    parser.add_argument("--units", default=".*", help="regular expression: only units whose name it is; those before are done")
    parser.add_argument("--table", action="store_true", help="run nothing, write the table of the cases that are done")
    parser.add_argument("--quick", action="store_true", help="see that it runs; writes nothing into docs/results")
    options = parser.parse_args()
    if not (options.data or options.quick or options.table):
        parser.error("--data: the folder with cifar10 and fashion_mnist is needed")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    out, runs = ROOT / "docs" / "results", Path(options.runs)
    makers, sizes = {name: CASES[name] for name in ([] if options.table else options.case or CASES)}, Sizes()
    if options.quick:
        out = runs = Path(tempfile.mkdtemp())
        makers, sizes = QUICK, Sizes(images=100, draws=2, moments=200, classifier=20, components=2, few=50, long=40, held=400)
    here, log = Path(__file__), out / "deep_latents.partial.jsonl"
    for name, make in makers.items():
        key = code_key(*(here.with_name(f"{file}.py") for file in FIGURES), also=inspect.getsource(make))
        torch.manual_seed(0)
        case = make()
        images = load_images(Path(options.data) / case.data).images if case.data else digits(case.generator.x_shape)
        run = CaseRun(case, images, runs / f"deep-{name}-{key}", Log(log, key, name, options.units, device), sizes)
        run.run()
        if not run.log.matched:
            parser.error(f"--units: no unit of {name} is {options.units!r}; its units are in the docstring of CaseRun.run")
        if _LAST_UNIT in run.log.done:
            image_panels(out / f"deep_latents_{name}.png", run.panels(), columns=5)
    done = {name: units for name in (QUICK if options.quick else CASES) if (units := whole(log, name))}
    rows = [row for name, units in done.items() for row in rows_of(name, units)]
    write_results(out / "deep_latents.json", rows)
    text = table(rows, {name: units[_LAST_UNIT] for name, units in done.items()})
    (out / "deep_latents.md").write_text(text)
    print(text)


def digits(shape: Sequence[int]) -> Tensor:
    """The digits of the demo, twice, in images of that shape."""
    data = load_demo_data(1, 0)
    return torch.cat([data.train, data.train]).expand(-1, *shape).contiguous()


def lines_of(path: Path, case: str) -> list[dict[str, Any]]:
    """The lines of a case, those of other code too."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["case"] == case]


def whole(path: Path, case: str) -> dict[str, dict[str, Any]]:
    """Units of a case as they were last run to the end; empty if they never were."""
    lines = lines_of(path, case)
    key = next((line["key"] for line in reversed(lines) if line["unit"] == _LAST_UNIT), None)
    return {line["unit"]: line["result"] for line in lines if line["key"] == key}


class Log:
    """Units of a case that are done, a line each; those of other code do not count.

    Args:
        path: the file; several processes may add to it.
        key: what code they are of.
        case: name of the case.
        units: regular expression, of the names of units that may be run.
        device: what they are run on.
    """

    def __init__(self, path: Path, key: str, case: str, units: str, device: torch.device) -> None:
        self.path, self.key, self.case, self.units, self.device = path, key, case, re.compile(units), device
        self.matched = False
        path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def done(self) -> dict[str, dict[str, Any]]:
        """Results by name."""
        return {line["unit"]: line["result"] for line in lines_of(self.path, self.case) if line["key"] == self.key}

    def unit(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Runs a unit whose result is not there, if it is one of those that may be run."""
        mine = self.units.fullmatch(name) is not None
        self.matched |= mine
        if mine and name not in self.done:
            begin = time.perf_counter()
            result = run()
            result |= {"seconds": round(time.perf_counter() - begin), "commit": provenance()["commit"]}
            result |= {"device": torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"}
            line = {"key": self.key, "case": self.case, "unit": name, "result": result}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(self.case, name, result, flush=True)


# ------------------------------------------------------------------------------------------------------------------- one case


class CaseRun:
    """A case's backbone, energies and distances. Every unit is run once; weights are files in `folder`.

    Args:
        case: what is trained, and how.
        images: all training images.
        folder: for weights.
        log: units that are done.
        sizes: numbers of images and steps.
    """

    def __init__(self, case: Case, images: Tensor, folder: Path, log: Log, sizes: Sizes) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.case, self.folder, self.log, self.sizes, self.device = case, folder, log, sizes, log.device
        self.batch = 1000 if self.device.type == "cuda" else 250
        self.train, held = images[: -sizes.held], images[-sizes.held :]
        self.reference, self.others = held[: sizes.images], held[sizes.images : 2 * sizes.images]
        self.vae = case.generator.to(self.device)
        self.units = sum(shape.numel() for shape in self.vae.latent_shapes)

    def run(self) -> None:
        """All units, in order.

        "backbone", "mismatch", "energies", "real", "reconstructions", "best temperature"; for i = 0 … 2 "gaussian i",
        "temperature i", "gaussian_refit i", "mixture_refit i" and "joint i"; "shorter energies" and "shorter_fit i";
        "few real", "few short", "few long"; "two sample".
        """
        unit, draws = self.log.unit, range(self.sizes.draws)
        unit("backbone", self._backbone)
        backbone = self._made("backbone.pt", "backbone")
        self.vae.load_state_dict(torch.load(backbone, weights_only=True, map_location=self.device))
        self.vae.eval()
        unit("mismatch", self._mismatch)
        unit("energies", lambda: self._energies("energies", {}))
        unit("real", lambda: self._distance(self.others))
        unit("reconstructions", lambda: self._distance(self._reconstructed(self.others)))
        unit("best temperature", self._temperature)
        for i in draws:
            unit(f"gaussian {i}", lambda i=i: self._distance(self._gaussian(self.sizes.images, i)))
            unit(f"temperature {i}", lambda i=i: self._distance(self._at_best_temperature(i)))
            unit(f"gaussian_refit {i}", lambda i=i: self._distance(self._refit(self.sizes.images, i)))
            unit(f"mixture_refit {i}", lambda i=i: self._distance(self._refit(self.sizes.images, i, mixture=True)))
        for i in draws:
            unit(f"joint {i}", lambda i=i: self._distance(self._joint(self.sizes.images, i, self.folder / f"joint-{i}.pt")))
        if (differ := self.case.shorter) is not None:
            unit("shorter energies", lambda: self._energies("shorter", differ))
            for i in draws:
                unit(f"shorter_fit {i}", lambda i=i: self._distance(self._joint(self.sizes.images, i, learned="shorter")))
        if self.case.long_chains:
            unit("few real", lambda: self._distance(self.others[: self.sizes.few]))
            unit("few short", lambda: self._distance(self._joint(self.sizes.few, 90)))
            unit("few long", lambda: self._distance(self._joint(self.sizes.few, 90, steps=self.sizes.long)))
        unit(_LAST_UNIT, self._two_sample)

    def panels(self) -> dict[str, Tensor]:
        """Forty images of each kind, the last of them frames of five chains of the joint prior."""
        path = self._learned("energies").trajectory(
            5, every=max(1, self.sizes.long // 70), steps=self.sizes.long // 10, rng=_seeded(99)
        )
        frames = torch.linspace(0, len(path.steps) - 1, 8).long()
        chains = self._plain.decode([z[frames].flatten(0, 1) for z in path.latents]).cpu()
        images = {
            "real": self.reference[:40],
            "reconstructions": self._reconstructed(self.others[:40]),
            "Gaussian prior": self._gaussian(40, 99),
            "refitted Gaussian": self._refit(40, 99),
            "joint prior": self._joint(40, 99),
            "its chains, downwards": chains,
        }
        return {title: x.clamp(0, 1) for title, x in images.items()}

    def _backbone(self) -> dict[str, Any]:
        validation, folder = self.others[: self.sizes.few], self.folder / "backbone"
        result = fit_elbo(self.vae, self.train, validation=validation, run_dir=folder, rng=_seeded(0), **self.case.backbone)
        torch.save(self.vae.state_dict(), self.folder / "backbone.pt")
        elbo = not_none(result.validation_elbo)
        bits = -elbo / (self.vae.x_shape.numel() * math.log(2))
        return {"validation_elbo": elbo, "bits_per_dimension": bits, "fingerprint": fingerprint(self.vae)}

    def _energies(self, name: str, differ: dict[str, Any]) -> dict[str, Any]:
        """A run of `fit`. Its seconds are those of its last part, after iteration `resumed_at`."""
        prior = JointEBMPrior(self.vae)
        settings = self.case.energies | differ
        result = prior.fit(self.train, run_dir=self.folder / name, rng=_seeded(1), **settings)
        prior.save(self.folder / f"{name}.safetensors")
        last = {name: round(value, 4) for name, value in result.history[-1].items()}
        return {"method": result.method, "last": last, "resumed_at": result.resumed_at, "warnings": result.warnings}

    def _learned(self, name: str) -> JointEBMPrior:
        return JointEBMPrior.load(self._made(f"{name}.safetensors", "energies or shorter energies"), self.vae)

    def _made(self, file: str, unit: str) -> Path:
        """A file that a unit before made."""
        if not (path := self.folder / file).exists():
            raise SystemExit(f"{path} is not there: the unit {unit} has to be run first, with this --runs")
        return path

    def _mismatch(self) -> dict[str, Any]:
        """What `prior.mismatch` says before any energy is trained."""
        found = JointEBMPrior(self.vae).mismatch(
            self.train[: 2 * self.sizes.few].to(self.device), prior="generator", rng=_seeded(4)
        )
        print(found)
        return dataclasses.asdict(found)

    def _temperature(self) -> dict[str, Any]:
        count = 2 * self.sizes.few
        chosen_on = self._features(self.others[:count])
        found = {t: frechet_distance(self._features(self._gaussian(count, 50, t)), chosen_on) for t in TEMPERATURES}
        return {"temperature": min(found, key=lambda t: found[t]), "distances": found}

    def _two_sample(self) -> dict[str, Any]:
        files = [self.folder / f"joint-{i}.pt" for i in range(self.sizes.draws)]
        chains = torch.cat([torch.load(file, weights_only=True) for file in files])[: self.sizes.moments]
        posterior = self._posterior[: len(chains)]
        torch.manual_seed(3)

        def accuracy(rows: Tensor) -> float:
            sides = (layers_of(side.to(self.device), self.vae) for side in (posterior, rows))
            return tell_apart(*sides, steps=self.sizes.classifier)

        gaussian, joint = accuracy(torch.randn_like(posterior)), accuracy(chains[: len(posterior)])
        return {"gaussian": gaussian, "joint": joint, "ratio": (joint - 0.5) / (gaussian - 0.5)}

    @functools.cached_property
    def _plain(self) -> JointEBMPrior:
        """For decoding and reconstructions."""
        return JointEBMPrior(self.vae)

    @functools.cached_property
    def _reference_features(self) -> Tensor:
        return self._features(self.reference)

    @functools.cached_property
    def _posterior(self) -> Tensor:
        """The posterior's noise of training images, a row each."""
        torch.manual_seed(2)
        return flat(noise_of(self.vae, self.train[: self.sizes.moments].to(self.device))).cpu()

    @functools.cached_property
    def _one_gaussian(self) -> GaussianMixture:
        return GaussianMixture(self._posterior, 1)

    @functools.cached_property
    def _mixture(self) -> GaussianMixture:
        return GaussianMixture(self._posterior, self.sizes.components)

    def _distance(self, x: Tensor) -> dict[str, Any]:
        return {"fd": frechet_distance(self._features(x), self._reference_features)}

    def _features(self, x: Tensor) -> Tensor:
        return efficientnet_features(x.clamp(0, 1).to(self.device)).cpu()

    def _reconstructed(self, x: Tensor) -> Tensor:
        return torch.cat([self._plain.reconstruct(batch).cpu() for batch in x.to(self.device).split(self.batch)])

    def _gaussian(self, n: int, number: int, temperature: float = 1.0) -> Tensor:
        return self._decoded(temperature * torch.randn(n, self.units, generator=_seeded(number)))

    def _at_best_temperature(self, number: int) -> Tensor:
        return self._gaussian(self.sizes.images, number, self.log.done["best temperature"]["temperature"])

    def _refit(self, n: int, number: int, *, mixture: bool = False) -> Tensor:
        return self._decoded((self._mixture if mixture else self._one_gaussian).sample(n, _seeded(number)))

    def _decoded(self, noise: Tensor) -> Tensor:
        """Images of rows of noise, through T_β."""
        parts = []
        with torch.no_grad():
            for rows in noise.to(self.device).split(self.batch):
                descent = TopDown(self.vae, len(rows)).descend(layers_of(rows, self.vae), "noise")
                parts.append(self._plain.decode(descent.latents).cpu())
        return torch.cat(parts)

    def _joint(self, n: int, number: int, keep: Path | None = None, learned: str = "energies", **chain: Any) -> Tensor:
        """Images of the joint prior; `keep`: the file that their noise goes into; `learned`: the run of `fit`."""
        prior, rng = self._learned(learned), _seeded(number)
        if self.device.type == "cuda":  # where compiling takes longer than the chains
            chain["backend"] = "eager"
        latents = [prior.sample_latents(min(self.batch, n - at), rng=rng, **chain) for at in range(0, n, self.batch)]
        if keep is not None:
            with torch.no_grad():
                noise = torch.cat([flat(TopDown(self.vae, len(z[0])).position(z, "noise")) for z in latents])
            torch.save(noise.cpu(), keep)
        return torch.cat([self._plain.decode(z).cpu() for z in latents])


def _seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


# ------------------------------------------------------------------------------------------------------------------ the table


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
        return [(gaussian - fd) / (gaussian - reconstructions) for fd in distances(kind)]

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
    at = ", ".join(f"{case} at commit {unit['commit'][:7]}, {unit.get('device', 'CPU')}" for case, unit in last.items())
    return "\n".join([*lines, "", f"Run: {at}."]) + "\n"


if __name__ == "__main__":
    main()
