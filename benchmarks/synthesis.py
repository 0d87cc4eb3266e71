"""Image sets and the priors of one trained backbone: the joint prior beside its rivals, a table and a picture per set.

    python benchmarks/synthesis.py --data DATA --set mnist --seed 0     # some hours on one core; goes on where it stopped
    python benchmarks/synthesis.py --data DATA                          # every set and seed, days
    python benchmarks/synthesis.py --data DATA --device cuda            # minutes a set
    python benchmarks/synthesis.py --data DATA --units 'backbone'       # only some units: processes share them
    python benchmarks/synthesis.py --table                              # only the table, of what is done
    python benchmarks/synthesis.py --quick                              # see that it runs, on scikit-learn's digits

DATA: a folder with the sets of `benchmarks/backbones.py`, as `energy_prior.data.load_images` reads them; `celeba_half` and
`imagenet_church_128` are stand-ins for CelebA-HQ and LSUN-Church. Of the training images some are held out: a half is what all
distances are to, the other half is reconstructed, and the temperature is chosen on it. Test images are not used.

    gaussian               the generator's own prior
    gaussian_temperature   the same with its noise scaled by the best of 0.6 … 1.0
    lebm                   one energy, on the top layer (Pang et al., NeurIPS 2020)
    ncp                    a ratio estimate per layer given those above (NCP-VAE, Aneja et al., NeurIPS 2021), by Langevin
    ncp_resample           the same by importance resampling, of 1,000 proposals on MNIST, elsewhere of 30
    joint                  the library's prior; on MNIST also by each other rule, "joint (RULE)"

The rules "variational" and "joint", the latter also in the set cifar10_joint, train the decoder on: what these close is not the
prior's alone. Distances are of EfficientNet-Lite0 features (no FID); of "mnist (classifier)", of the classifier of
examples/mnist.py.

    gap_closed = (D(gaussian) − D(this prior)) / (D(gaussian) − D(reconstructions))
    frechet_excess_ratio = (D(this prior) − D(real)) / (D(gaussian) − D(real))

D is the Fréchet distance, or the kernel distance where images are fewer than features. Long chains, of 2,500 steps where a
sample takes 60, are compared by the excess of the kernel distance of 1,000 images over that of real ones, long over short, and
on MNIST chains of 100,000 steps by how far the mean of Σ f drifts, in its standard deviations. "mnist_toy" runs
examples/mnist_toy.py. Every unit is a line of docs/results/synthesis.partial.jsonl as it ends, with the commit and the device
that it was run on; weights are in `--runs`. A set and seed that are done stay in the table when code has changed since. Writes
docs/results/synthesis.json and .md, and pictures of every set, of the first seed that is done: its images, layers redrawn one
after the other, the way from one image to another, and chains.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import backbones
import mnist_toy
import torch
import torch.nn.functional as F
from backbones import Case
from case_runs import CaseRun, Log, Sizes, digits, read_options
from deep_measures import noise_of
from features import train_classifier
from ratios import GroupRatio, learn_group_ratios
from results import ROOT, code_key, write_results
from synthesis_table import LAST_UNIT, TOY, rows_of, table, toy_rows, units_of
from torch import Tensor, nn

from energy_prior import DivergenceError, JointEBMPrior, default_energies
from energy_prior.data import load_images
from energy_prior.evaluate import (
    efficientnet_probabilities,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest,
    precision_recall,
)
from energy_prior.plots import chain_strip, image_panels

_SHOWN = 40
FILES = (
    *("benchmarks/synthesis", "benchmarks/case_runs", "benchmarks/backbones", "benchmarks/deep_measures", "benchmarks/ratios"),
    *("examples/features", "examples/cifar10"),
)
"""What figures depend on, beside the package."""
TITLES = {
    "gaussian": "Gaussian prior",
    "gaussian_temperature": "at its best temperature",
    "lebm": "energy on the top layer",
    "ncp": "ratio per layer",
    "ncp_resample": "ratio per layer, resampled",
    "joint": "joint prior",
}


class Setting(NamedTuple):
    """A set, and what is measured on it.

    Attributes:
        make: its case.
        seeds: how many.
        sizes: numbers of images and steps.
        ratios: iterations of "ncp"; None: as many as of the joint prior.
        proposals: of each draw of "ncp_resample".
        rules: settings of `fit` by which the joint prior is learned too.
        classifier: iterations of a classifier of the images, whose features are compared too; 0: there is none.
        long: steps of long chains; 0: there are none.
        endless: steps of the longest chains; 0: there are none.
    """

    make: Callable[[], Case]
    seeds: int
    sizes: Sizes = Sizes(images=3000, draws=2)
    ratios: int | None = None
    proposals: int = 30
    rules: Mapping[str, dict[str, Any]] = MappingProxyType({})
    classifier: int = 0
    long: int = 0
    endless: int = 0


_MNIST_RULES: dict[str, dict[str, Any]] = {
    "nce": {"method": "nce", "iterations": 5400, "batch_size": 1024},
    "two_stage": {"method": "two_stage", "iterations": 3000},
    "variational": {"method": "variational", "iterations": 1500},
    "joint": {"method": "joint", "iterations": 300},
}
SETS = {
    "mnist": Setting(backbones.mnist, 3, proposals=1000, rules=_MNIST_RULES, classifier=4000, long=2500, endless=100_000),
    "fashion_mnist": Setting(backbones.fashion_mnist_small, 3),
    "cifar10": Setting(backbones.cifar10_pyramid, 2, long=2500),
    "cifar10_joint": Setting(backbones.cifar10_joint, 2),
    "celeba64": Setting(backbones.celeba64, 1, Sizes(images=2000, draws=2, held=4000)),
    "church64": Setting(backbones.church64, 1, Sizes(images=300, draws=2, few=300, held=600)),
}
_SMALL = Sizes(images=100, draws=1, moments=200, few=50, held=400)
_FEW: dict[str, Any] = {"iterations": 3, "batch_size": 32, "steps": 3, "posterior_steps": 3, "step_size": 0.3}
QUICK = {
    "digits": Setting(backbones.digits, 1, _SMALL, 3, classifier=5),
    "digits_ladder": Setting(
        backbones.digits_ladder, 1, _SMALL, 3, long=20, endless=200, rules={r: s | _FEW for r, s in _MNIST_RULES.items()}
    ),
}


def main() -> None:
    """Runs what is missing, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=tuple(SETS), action="append", help="only this one; may be given several times")
    parser.add_argument("--seed", type=int, help="only this one")
    options = read_options(parser)
    out, runs, settings = ROOT / "docs" / "results", Path(options.runs), SETS
    if options.quick:
        out = runs = Path(tempfile.mkdtemp())
        settings = QUICK
    log, asked = out / "synthesis.partial.jsonl", settings if options.quick else options.set or settings
    key = code_key(*(ROOT / f"{file}.py" for file in FILES))  # of the code as it is now
    matched = options.table
    for name, seed in [] if options.table else [(set_, seed) for set_ in asked for seed in range(settings[set_].seeds)]:
        if options.seed in (None, seed):
            its_log = Log(log, key, f"{name} {seed}", options.units, options.device)
            run = Synthesis(settings[name], name, options.data, runs, its_log, seed)
            run.run()
            matched |= run.log.matched
            picture = out / f"synthesis_{name}.png"
            if LAST_UNIT in run.log.done and (seed == 0 or not picture.exists()):
                run.draw(picture.with_suffix(""))
    if not options.table and not options.quick and options.seed is None and "mnist" in asked:
        toy = Log(log, code_key(Path(mnist_toy.__file__)), "mnist_toy", options.units, torch.device("cpu"))
        toy.unit(TOY, lambda: mnist_toy.run(f"{options.data}/mnist", runs / "mnist_toy"))
        matched |= toy.matched
    if not matched:
        parser.error("--seed, --units: no seed or unit is called so; the units are in the docstring of Synthesis.run")
    rows = [row for name, setting in settings.items() for row in rows_of(name, units_of(log, name, setting.seeds))]
    rows += toy_rows(log)
    if not rows:
        raise SystemExit(f"No set is done yet, by {log}.")  # a table of nothing would replace one that is there
    write_results(out / "synthesis.json", rows)
    (out / "synthesis.md").write_text(table(rows, [units_of(log, name, s.seeds) for name, s in settings.items()]))
    print((out / "synthesis.md").read_text())


def images_of(case: Case, data: str | None) -> tuple[Tensor, Tensor | None]:
    """All training images of a case, and their labels."""
    if not case.data:
        shown = digits(case.generator.x_shape)
        return shown, torch.arange(len(shown)) % 10
    images, labels = load_images(Path(data or "") / case.data, size=None if case.crop else case.size)
    if case.crop is not None:
        top, left = ((side - case.crop) // 2 for side in images.shape[2:])
        images = images[:, :, top : top + case.crop, left : left + case.crop]
        parts = images.split(1000)
        images = torch.cat([F.interpolate(x, size=case.size, mode="bilinear", antialias=True).clamp(0, 1) for x in parts])
    return images, labels


def on_top(shapes: Sequence[torch.Size]) -> nn.ModuleList:
    """An energy on the top layer, f = 0 on the others."""
    return default_energies(shapes, layers=[len(shapes)])


class Synthesis(CaseRun):
    """A set and a seed.

    Args:
        setting: what is measured.
        name: of the set.
        data: folder of the sets.
        runs: folder of the runs.
        log: units that are done.
        seed: of the backbone and all that follows.
    """

    def __init__(self, setting: Setting, name: str, data: str | None, runs: Path, log: Log, seed: int) -> None:
        torch.manual_seed(seed)
        case = setting.make()
        images, self._labels = images_of(case, data)
        super().__init__(case, images, runs / f"synthesis-{name}-{log.key}-{seed}", log, setting.sizes, seed)
        self._setting = setting

    def run(self) -> None:
        """All units, in order.

        "backbone"; "joint energies", "lebm energies", "ncp energies", "joint (RULE) energies" and "classifier"; "real 0",
        "reconstructions 0", "best temperature"; "PRIOR i" of every prior for i = 0, 1, …; "few real", "few short", "few long",
        "endless"; "seconds".
        """
        unit, n = self.log.unit, self.sizes.images
        unit("backbone", self.backbone)
        self.load_backbone()
        unit("joint energies", lambda: self.learn("joint", self.case.energies))
        unit("lebm energies", lambda: self.learn("lebm", self._lebm_settings, on_top))
        unit("ncp energies", self._learn_ratios)
        for rule, settings in self._setting.rules.items():
            unit(f"joint ({rule}) energies", lambda rule=rule, settings=settings: self.learn(f"joint-{rule}", settings))
        if self._setting.classifier:
            unit("classifier", self._train_classifier)
        unit("real 0", lambda: self._figures(self.others))
        unit("reconstructions 0", lambda: self._figures(self.reconstructed(self.others)))
        unit("best temperature", self.best_temperature)
        draws = self._draws()
        for i in range(self.sizes.draws):
            for name, draw in draws.items():
                unit(f"{name} {i}", lambda draw=draw, i=i: self._figures(draw(n, i)))
        few, long, endless = self.sizes.few, self._setting.long, self._setting.endless
        if long:
            unit("few real", lambda: self._figures(self.others[:few]))
            unit("few short", lambda: self._figures(self.sampled(self.learned("joint"), few, 90)))
            unit("few long", lambda: self._figures(self.sampled(self.learned("joint"), few, 90, steps=long)))
        if endless:
            unit("endless", lambda: self._endless(endless))
        self.log.last(LAST_UNIT, lambda: self._seconds(draws))

    def draw(self, start: Path) -> None:
        """Writes its pictures, into files whose names begin so."""
        prior, gaussian = self.learned("joint"), JointEBMPrior(self.vae)
        image_panels(start.with_suffix(".png"), self._panels())
        layers = range(1, len(self.vae.latent_shapes) + 1)
        one = self.of_images(self.others[:1]).to(self.device)
        panels: dict[str, Tensor] = {}
        for title, model in {"Gaussian": gaussian, "joint": prior}.items():
            for k in layers:
                redrawn = model.vary(one, range(1, k + 1), _SHOWN // 2, rng=self.seeded(97))[0]
                panels[f"{title}: layers 1 to {k} redrawn" if k > 1 else f"{title}: layer 1 redrawn"] = self._shown(redrawn)
        image_panels(start.with_name(f"{start.name}_layers.png"), panels, columns=5)
        ends = self.of_images(self.others[:10]).to(self.device)
        ways = prior.interpolate(ends[:5], ends[5:], rng=self.seeded(98))
        image_panels(
            start.with_name(f"{start.name}_between.png"),
            {"from one image to another": self._shown(ways.flatten(0, 1))},
            columns=9,
        )
        steps = self._setting.long or self.sizes.few // 10
        path = prior.trajectory(8, steps=steps, every=max(1, steps // 20), rng=self.seeded(99))
        frames = [self._shown(prior.decode([z[i] for z in path.latents])) for i in range(len(path.steps))]
        total = path.negative_energy.sum(2).cpu()
        chain_strip(start.with_name(f"{start.name}_chain.png"), torch.stack(frames, 1), path.steps.cpu(), total)

    def _shown(self, x: Tensor) -> Tensor:
        """What a generator draws, as images to look at."""
        return self.to_images(x).clamp(0, 1).cpu()

    def _endless(self, steps: int) -> dict[str, Any]:
        """Σ f of 100 chains: its mean over the last tenth from that over the second, in standard deviations."""
        try:
            path = self.learned("joint").trajectory(100, steps=steps, every=max(1, steps // 200), rng=self.seeded(96))
        except DivergenceError as error:
            return {"lost": 1.0, "drift": None, "error": str(error)}
        f = path.negative_energy.sum(2)
        tenth = len(f) // 10
        early, late = f[tenth : 2 * tenth], f[-tenth:]
        return {"lost": 0.0, "drift": float((late.mean() - early.mean()).abs() / early.std()), "mean": float(late.mean())}

    def _panels(self) -> dict[str, Tensor]:
        """Forty images of each kind, and the nearest training images of the joint prior's."""
        made = {name: draw(_SHOWN, 99).clamp(0, 1) for name, draw in self._draws().items() if name in TITLES}
        images = {"real": self.reference[:_SHOWN], "reconstructions": self.reconstructed(self.others[:_SHOWN]).clamp(0, 1)}
        images |= {TITLES[name]: x for name, x in made.items()}
        return images | {"nearest to these in training": self.train[nearest(made["joint"], self.train)[0][:, 0]]}

    def _draws(self) -> dict[str, Callable[[int, int], Tensor]]:
        """Prior -> (n, number of the draw) -> images."""

        def joint(name: str) -> Callable[[int, int], Tensor]:
            return lambda n, i: self.sampled(self.learned(name), n, i)

        draws: dict[str, Callable[[int, int], Tensor]] = {
            "gaussian": self.gaussian,
            "gaussian_temperature": self.at_best_temperature,
            "lebm": lambda n, i: self.sampled(self.learned("lebm", on_top), n, i),
            "ncp": lambda n, i: self.sampled(self._ratios, n, i),
            "ncp_resample": self._resampled,
            "joint": joint("joint"),
        }
        return draws | {f"joint ({rule})": joint(f"joint-{rule}") for rule in self._setting.rules}

    @property
    def _lebm_settings(self) -> dict[str, Any]:
        """As the joint prior is learned, where that leaves the generator alone."""
        settings = self.case.energies
        return settings | {"method": "two_stage"} if settings.get("method") == "joint" else settings

    def _learn_ratios(self) -> dict[str, Any]:
        torch.manual_seed(1000 * self.seed + 5)
        ratios = [ratio.to(self.device) for ratio in GroupRatio.of_every_layer(self.vae.latent_shapes)]

        def draw() -> tuple[Tensor, ...]:
            x = self.train[torch.randint(len(self.train), (128,))]
            return noise_of(self.vae, self.of_images(x).to(self.device))

        loss = learn_group_ratios(ratios, draw, self._setting.ratios or self.case.energies["iterations"])
        prior = JointEBMPrior(self.vae, ratios)
        step_size = prior.tune_step_size(rng=self.seeded(6))
        prior.save(self.folder / "ncp.safetensors")
        return {"loss": loss, "step_size": step_size}

    @property
    def _ratios(self) -> JointEBMPrior:
        return self.learned("ncp", GroupRatio.of_every_layer)

    def _resampled(self, n: int, number: int) -> Tensor:
        options: dict[str, Any] = {"method": "resample", "proposals": self._setting.proposals, "rng": self.seeded(number)}
        prior = self._ratios
        parts = [prior.sample(min(self.batch, n - at), **options).cpu() for at in range(0, n, self.batch)]
        return self.to_images(torch.cat(parts))

    def _figures(self, x: Tensor) -> dict[str, Any]:
        """Of images beside as many of the reference."""
        features, reference = self.features(x), self.reference_features[: len(x)]
        precision, recall = precision_recall(reference, features)
        found = {"frechet": frechet_distance(features, reference), "kernel": kernel_distance(features, reference)}
        found |= {"precision": precision, "recall": recall}
        found["inception_score_lite0"] = inception_score(efficientnet_probabilities(features))
        found["few"] = len(reference) <= reference.shape[1]  # a Fréchet distance says little then
        if self._setting.classifier:
            features, reference = (self._classifier(images) for images in (x.clamp(0, 1), self.reference[: len(x)]))
            found["frechet (classifier)"] = frechet_distance(features, reference)
        return found

    def _train_classifier(self) -> dict[str, Any]:
        """Of the training images."""
        torch.save(self._new_classifier(self._setting.classifier).state_dict(), self.folder / "classifier.pt")
        return {}

    def _new_classifier(self, iterations: int) -> nn.Module:
        assert self._labels is not None  # noqa: S101
        with torch.enable_grad():
            return train_classifier(self.train, self._labels[: len(self.train)], iterations, self.device)

    @functools.cached_property
    def _classifier(self) -> nn.Module:
        net = self._new_classifier(0)
        net.load_state_dict(torch.load(self.made("classifier.pt", "'classifier'"), weights_only=True))
        return net

    def _seconds(self, draws: dict[str, Callable[[int, int], Tensor]]) -> dict[str, Any]:
        """Of a batch under each prior over that under the Gaussian prior, after one that does not count."""
        n = min(self.batch, self.sizes.few)

        def seconds(draw: Callable[[int, int], Tensor], times: int) -> float:
            found = []
            for i in range(times):
                begin = time.perf_counter()
                draw(n, i)  # ends on the CPU
                found.append(time.perf_counter() - begin)
            return statistics.median(found[1:])

        gaussian = seconds(draws["gaussian"], 6)
        return {name: seconds(draw, 2) / gaussian for name, draw in draws.items()}


if __name__ == "__main__":
    main()
