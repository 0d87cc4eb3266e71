"""A backbone that is trained once, its energies, and images of several priors of its latents; every unit is run once."""

from __future__ import annotations

__all__ = ["CaseRun", "Log", "Sizes", "digits", "most", "read_options", "whole"]

import argparse
import copy
import functools
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from backbones import Case
from deep_measures import flat, layers_of, noise_of
from results import ROOT, commit
from torch import Tensor, nn

from energy_prior import JointEBMPrior, fit_elbo
from energy_prior._util import not_none
from energy_prior.checkpoint import fingerprint
from energy_prior.cli.demo import load_demo_data
from energy_prior.evaluate import efficientnet_features, frechet_distance, kernel_distance
from energy_prior.topdown import TopDown

Energies = Callable[[Sequence[torch.Size]], Iterable[nn.Module]]
"""Latent shapes -> an energy per layer."""
TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.0)
"""Of which the Gaussian prior's best is chosen."""


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


def read_options(parser: argparse.ArgumentParser) -> Any:
    """The command line with the options that benchmarks of cases share added: data, device, runs, units, table and quick."""
    parser.add_argument("--data", help="folder with the image sets; needed but for --quick and --table")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--runs", default=str(ROOT / "runs"), help="folder for weights")
    parser.add_argument("--units", default=".*", help="regular expression: only units whose name it is; those before are done")
    parser.add_argument("--table", action="store_true", help="run nothing, write the table of what is done")
    parser.add_argument("--quick", action="store_true", help="see that it runs; writes nothing into docs/results")
    options = parser.parse_args()
    if not (options.data or options.quick or options.table):
        parser.error("--data: the folder with the image sets is needed")
    options.device = torch.device(options.device)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return options


def digits(shape: Sequence[int]) -> Tensor:
    """The digits of the demo, twice, in images of that shape."""
    data = load_demo_data(1, 0)
    return torch.cat([data.train, data.train]).expand(-1, *shape).contiguous()


def _lines(path: Path, case: str) -> list[dict[str, Any]]:
    """The lines of a case, those of other code too."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["case"] == case]


def whole(path: Path, case: str, last: str) -> dict[str, dict[str, Any]]:
    """Units of a case as they were last run to the end, that of the name `last`; empty if they never were."""
    lines = _lines(path, case)
    key = next((line["key"] for line in reversed(lines) if line["unit"] == last), None)
    return {line["unit"]: line["result"] for line in lines if line["key"] == key}


def most(path: Path, case: str) -> dict[str, dict[str, Any]]:
    """Units of a case by the code of which most are done."""
    by_key: dict[str, dict[str, dict[str, Any]]] = {}
    for line in _lines(path, case):
        by_key.setdefault(line["key"], {})[line["unit"]] = line["result"]
    return max(by_key.values(), key=len, default={})


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
        self.commit = commit()  # now: what runs is the code of this moment
        self.matched = False
        self.asked: list[str] = []
        path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def done(self) -> dict[str, dict[str, Any]]:
        """Results by name."""
        return {line["unit"]: line["result"] for line in _lines(self.path, self.case) if line["key"] == self.key}

    def unit(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Runs a unit whose result is not there, if it is one of those that may be run."""
        self.asked.append(name)
        mine = self.units.fullmatch(name) is not None
        self.matched |= mine
        if mine and name not in self.done:
            begin = time.perf_counter()
            result = run()
            result |= {"seconds": round(time.perf_counter() - begin), "commit": self.commit}
            result |= {"device": torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"}
            line = {"key": self.key, "case": self.case, "unit": name, "result": result}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(self.case, name, result, flush=True)

    def last(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """The unit that ends a case: it is only run once all that were asked for before it are done."""
        self.matched |= self.units.fullmatch(name) is not None
        if set(self.asked) <= set(self.done):
            self.unit(name, run)


class CaseRun:
    """A backbone, energies on it, and images and distances. Weights are files in `folder`.

    Of the training images the last `sizes.held` are held out: `reference`, which all distances are to, and `others`, which are
    reconstructed, and on which the backbone's iteration and the temperature are chosen.

    Args:
        case: what is trained, and how.
        images: all training images, in [0, 1].
        folder: for weights.
        log: units that are done.
        sizes: numbers of images and steps.
        seed: of everything random but the backbone's first weights.
    """

    def __init__(self, case: Case, images: Tensor, folder: Path, log: Log, sizes: Sizes, seed: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.case, self.folder, self.log, self.sizes, self.device = case, folder, log, sizes, log.device
        self.batch, self.seed = 1000 if self.device.type == "cuda" else 250, seed
        self._priors: dict[str, JointEBMPrior] = {}
        self.train, held = images[: -sizes.held], images[-sizes.held :]
        self.reference, self.others = held[: sizes.images], held[sizes.images : 2 * sizes.images]
        self.vae = case.generator.to(self.device)
        self.units = sum(shape.numel() for shape in self.vae.latent_shapes)

    def backbone(self) -> dict[str, Any]:
        """Trains it."""
        validation = self.of_images(self.others[: self.sizes.few])
        settings: dict[str, Any] = {"validation": validation, "run_dir": self.folder / "backbone", "rng": self.seeded(0)}
        result = fit_elbo(self.vae, self.of_images(self.train), **settings, **self.case.backbone)
        torch.save(self.vae.state_dict(), self.folder / "backbone.pt")
        elbo = not_none(result.validation_elbo)
        bits = -elbo / (self.train[0].numel() * math.log(2))
        return {"validation_elbo": elbo, "bits_per_dimension": bits, "fingerprint": fingerprint(self.vae)}

    def load_backbone(self) -> None:
        """Takes its weights from their file."""
        weights = torch.load(self.made("backbone.pt", "'backbone'"), weights_only=True, map_location=self.device)
        self.vae.load_state_dict(weights)
        self.vae.eval()

    def learn(
        self, name: str, settings: dict[str, Any], energies: Energies | None = None, after: str | None = None
    ) -> dict[str, Any]:
        """A run of `fit`, with energies of a kind, that goes on from another run where there is one to go on from.

        Its seconds are those of its last part, after iteration `resumed_at`.
        """
        torch.manual_seed(1000 * self.seed + 7)  # of the energies' first weights
        prior = JointEBMPrior(copy.deepcopy(self.vae), self._energies(energies))
        if after is not None:
            prior.load_state_dict(self.learned(after).state_dict())
        result = prior.fit(self.of_images(self.train), run_dir=self.folder / name, rng=self.seeded(1), **settings)
        prior.save(self.folder / f"{name}.safetensors")
        last = {name: round(value, 4) for name, value in result.history[-1].items()}
        return {"method": result.method, "last": last, "resumed_at": result.resumed_at, "warnings": result.warnings}

    def learned(self, name: str, energies: Energies | None = None) -> JointEBMPrior:
        """The prior of such a run, with a generator of its own: the joint rules train it too. It is read once."""
        if name not in self._priors:
            file, generator = self.made(f"{name}.safetensors", f"that learns {name!r}"), copy.deepcopy(self.vae)
            self._priors[name] = JointEBMPrior.load(file, generator, self._energies(energies))
        return self._priors[name]

    def _energies(self, make: Energies | None) -> list[nn.Module] | None:
        return None if make is None else [energy.to(self.device) for energy in make(self.vae.latent_shapes)]

    def made(self, file: str, unit: str) -> Path:
        """A file that a unit before made."""
        if not (path := self.folder / file).exists():
            raise SystemExit(f"{path} is not there: the unit {unit} has to be run first, with this --runs")
        return path

    def best_temperature(self) -> dict[str, Any]:
        """Of the Gaussian prior, on images that nothing else is compared with."""
        count = min(2 * self.sizes.few, len(self.others))
        chosen_on = self.features(self.others[:count])
        distance = frechet_distance if count > chosen_on.shape[1] else kernel_distance
        found = {t: distance(self.features(self.gaussian(count, 50, t)), chosen_on) for t in TEMPERATURES}
        return {"temperature": min(found, key=lambda t: found[t]), "distances": found}

    @functools.cached_property
    def plain(self) -> JointEBMPrior:
        """For decoding and reconstructions."""
        return JointEBMPrior(self.vae)

    @functools.cached_property
    def reference_features(self) -> Tensor:
        """Features of what all distances are to."""
        return self.features(self.reference)

    @functools.cached_property
    def posterior(self) -> Tensor:
        """The posterior's noise of training images, a row each."""
        torch.manual_seed(1000 * self.seed + 2)
        return flat(noise_of(self.vae, self.of_images(self.train[: self.sizes.moments]).to(self.device))).cpu()

    def distance(self, x: Tensor) -> dict[str, Any]:
        """Fréchet distance (EfficientNet-Lite0) of images to the reference."""
        return {"fd": frechet_distance(self.features(x), self.reference_features)}

    def features(self, x: Tensor) -> Tensor:
        """Features (EfficientNet-Lite0) of images, as they come of a decoder."""
        return efficientnet_features(x.clamp(0, 1).to(self.device)).cpu()

    def reconstructed(self, x: Tensor) -> Tensor:
        """What the backbone makes of images."""
        parts = (self.plain.reconstruct(batch) for batch in self.of_images(x).to(self.device).split(self.batch))
        return self.to_images(torch.cat([part.cpu() for part in parts]))

    def gaussian(self, n: int, number: int, temperature: float = 1.0) -> Tensor:
        """Images of the generator's own prior."""
        return self.decoded(temperature * torch.randn(n, self.units, generator=self.seeded(number)))

    def at_best_temperature(self, n: int, number: int) -> Tensor:
        """The same at the temperature of `best_temperature`."""
        return self.gaussian(n, number, self.log.done["best temperature"]["temperature"])

    def decoded(self, noise: Tensor) -> Tensor:
        """Images of rows of noise, through T_β."""
        parts = []
        with torch.no_grad():
            for rows in noise.to(self.device).split(self.batch):
                descent = TopDown(self.vae, len(rows)).descend(layers_of(rows, self.vae), "noise")
                parts.append(self.plain.decode(descent.latents).cpu())
        return self.to_images(torch.cat(parts))

    def sampled(self, prior: JointEBMPrior, n: int, number: int, keep: Path | None = None, **chain: Any) -> Tensor:
        """Images of a joint prior; `keep`: the file that their noise goes into."""
        rng = self.seeded(number)
        if self.device.type == "cuda":  # where compiling takes longer than the chains
            chain["backend"] = "eager"
        latents = [prior.sample_latents(min(self.batch, n - at), rng=rng, **chain) for at in range(0, n, self.batch)]
        if keep is not None:
            with torch.no_grad():
                noise = torch.cat([flat(TopDown(self.vae, len(z[0])).position(z, "noise")) for z in latents])
            torch.save(noise.cpu(), keep)
        return self.to_images(torch.cat([prior.decode(z).cpu() for z in latents]))

    def of_images(self, x: Tensor) -> Tensor:
        """Images in the range of the generator."""
        return 2 * x - 1 if self.case.signed else x

    def to_images(self, x: Tensor) -> Tensor:
        """What a generator draws, in the range of images."""
        return (x + 1) / 2 if self.case.signed else x

    def seeded(self, number: int) -> torch.Generator:
        """A stream of random numbers, the same for a number and the run's seed."""
        return torch.Generator().manual_seed(1000 * self.seed + number)
