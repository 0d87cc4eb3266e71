"""The files that `fuzz_checkpoints.py` corrupts: how each is written, how it is read, and what it gives where it is intact."""

from __future__ import annotations

__all__ = ["KINDS", "Target", "kept", "targets"]

import argparse
import collections
import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from corrupt_pickles import PICKLES
from corrupt_safetensors import SAFETENSORS, SAFETENSORS_UNSIGNED
from corrupt_yaml import YAML
from corruptions import BLIND, Corruption
from torch import Tensor, nn

from energy_prior import (
    ArgumentError,
    CheckpointError,
    ConvEnergy,
    JointEBMPrior,
    LadderVAE,
    MLPEnergy,
    denoising_energies,
    fit_elbo,
)
from energy_prior.adapters import load_checkpoint, load_weights
from energy_prior.cli import train
from energy_prior.cli.recipe import read_recipe

Reading = tuple[Callable[[], Any], Callable[[], Any]]
"""What reads the file, and gives what is in it; what must be as before, where it was refused."""

X = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, Any] = {"iterations": 4, "batch_size": 16, "log_every": 2, "checkpoint_every": 2, "progress": False}
CHAINS: dict[str, Any] = {"steps": 2, "posterior_steps": 2, "step_size": 0.3}
RULES: tuple[Any, ...] = ("nce", "two_stage", "multi_stage_nce", "denoising", "joint")
OF_SAFETENSORS = BLIND | SAFETENSORS_UNSIGNED | SAFETENSORS
PLAIN = (
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    bool,
    type(None),
    torch.Size,
    torch.dtype,
    torch.device,
    Tensor,
    nn.Parameter,
)


@dataclasses.dataclass(frozen=True)
class Target:
    """A file, and how it is read.

    Attributes:
        kind: of file.
        name: of this one.
        file: the file that is corrupted; the folder that its folder is in holds nothing else.
        begin: everything that is needed to read it, made anew.
        error: what a bad file is promised to raise.
        corruptions: name -> function.
        loose: names of those after which other contents are harmless.
    """

    kind: str
    name: str
    file: Path
    begin: Callable[[], Reading]
    error: type[Exception]
    corruptions: Mapping[str, Corruption]
    loose: Collection[str]


def targets(folder: Path, kinds: Collection[str]) -> Iterator[Target]:
    """Writes the intact files of these kinds into a folder.

    Args:
        folder: an empty one.
        kinds: of `KINDS`.
    """
    for kind in kinds:
        yield from KINDS[kind](folder / kind.replace(" ", "-"))


def kept(value: Any) -> Any:
    """A copy of all tensors, so that it can be seen whether they change."""
    if isinstance(value, Mapping):
        return {key: kept(item) for key, item in value.items()}
    return value.detach().clone() if isinstance(value, Tensor) else value


# --------------------------------------------------------------------------------------------------------------------- priors


class Own(nn.Module):
    """An energy of the user's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Linear(width, 1)

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z)[:, 0]


def small(**settings: Any) -> LadderVAE:
    """A generator of two layers, always the same."""
    torch.manual_seed(0)
    return LadderVAE((1, 4, 4), **({"latent_dims": (3, 2), "hidden": 4} | settings))


def vectors() -> list[nn.Module]:
    """Energies of its layers."""
    torch.manual_seed(1)
    return [MLPEnergy((3,), hidden=(4, 4)), MLPEnergy((2,), hidden=(4,), activation="gelu")]


def waymarks() -> list[nn.Module]:
    """Energies of the noise of its layers."""
    torch.manual_seed(1)
    return list(denoising_energies([(3,), (2,)], channels=4))


def priors() -> Iterator[tuple[str, JointEBMPrior]]:
    """Of every kind of energy and both spaces; calibrated; trained with its generator; of energies of the user's own."""
    conv = small(nets="conv")
    yield "vectors", JointEBMPrior(small(), vectors())
    yield "maps", JointEBMPrior(conv, [ConvEnergy(s, (4,) * n) for n, s in enumerate(conv.latent_shapes, 1)], space="latent")
    yield "waymarks", JointEBMPrior(small(), waymarks())
    yield "calibrated", JointEBMPrior(small(), vectors())
    yield "joint", JointEBMPrior(small(), vectors())
    yield "own", JointEBMPrior(small(), [Own(3), Own(2)])


def state_of(prior: JointEBMPrior) -> dict[str, Any]:
    """All that a prior holds, its generator with it."""
    inside = prior.generator.state_dict() if isinstance(prior.generator, nn.Module) else {}
    held = {**prior.state_dict(), **{f"its generator.{name}": value for name, value in inside.items()}}
    return held | {"space": prior.space, "joint": prior.trained_jointly, "energies": str(prior.energies)}


def saved_priors(folder: Path) -> Iterator[Target]:
    """Files of `prior.save`."""
    for name, prior in priors():
        with torch.no_grad():
            for i, value in enumerate(prior.parameters()):
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(i)))
        if name == "calibrated":
            prior.calibrate(X[:32])
        file = folder / name / "prior.safetensors"
        file.parent.mkdir(parents=True)
        original = copy.deepcopy(prior.generator)
        if name == "joint":
            prior.train_jointly()
        prior.save(file)

        def begin(file: Path = file, original: Any = original, own: bool = name == "own") -> Reading:
            generator, energies = copy.deepcopy(original), [Own(3), Own(2)] if own else []
            filled = nn.ModuleList([generator, *energies])
            return lambda: state_of(JointEBMPrior.load(file, generator, energies or None)), filled.state_dict

        yield Target("prior.save", name, file, begin, CheckpointError, OF_SAFETENSORS, SAFETENSORS)


# ----------------------------------------------------------------------------------------------------------------------- runs


def runs(folder: Path) -> Iterator[Target]:
    """Checkpoints of `prior.fit` by every kind of rule, and of `fit_elbo`."""

    def of_prior(rule: Any, place: Path) -> Reading:
        prior = JointEBMPrior(small(), waymarks() if rule == "denoising" else vectors())

        def run() -> Any:
            result = prior.fit(X, rule, run_dir=place, rng=torch.Generator().manual_seed(3), **SETTINGS, **CHAINS)
            return {**state_of(prior), "history": result.history, "resumed": result.resumed_at}

        return run, lambda: state_of(prior)

    def of_generator(place: Path) -> Reading:
        vae = small()

        def run() -> Any:
            result = fit_elbo(vae, X[8:], validation=X[:8], run_dir=place, rng=torch.Generator().manual_seed(3), **SETTINGS)
            return {**vae.state_dict(), "history": result.history, "best": result.validation_elbo, "resumed": result.resumed_at}

        return run, vae.state_dict

    begins: dict[str, Callable[[Path], Reading]] = {rule: lambda place, rule=rule: of_prior(rule, place) for rule in RULES}
    for name, begin in (begins | {"elbo": of_generator}).items():
        place = folder / name
        begin(place)[0]()
        file = sorted(place.glob("checkpoint-*"))[-1] / "rank0.safetensors"
        yield Target("run_dir", name, file, lambda b=begin, p=place: b(p), CheckpointError, OF_SAFETENSORS, SAFETENSORS)


def trained(folder: Path) -> Iterator[Target]:
    """The generator of `energy-prior train`, as it writes and reads it."""
    place = folder / "run"
    fast = "{iterations: 2, batch_size: 8, progress: false}"
    ladder = "generator={latent_dims: [3, 2], hidden: 4}"
    recipe = read_recipe(None, [f"out='{place}'", "data.source=none", "data.validation=8", ladder, f"elbo={fast}"])
    place.mkdir(parents=True)
    generator = small()
    train._save_generator(place / "generator.safetensors", generator, recipe, (1, 4, 4))
    JointEBMPrior(generator, vectors()).save(place / "prior.safetensors")

    def begin() -> Reading:
        return lambda: state_of(train.load_run(place)), lambda: None

    file = place / "generator.safetensors"
    yield Target("energy-prior train", "ladder", file, begin, CheckpointError, OF_SAFETENSORS, SAFETENSORS)


# -------------------------------------------------------------------------------------------------------------------- recipes

RECIPES = {
    "whole": """# a comment
data: {source: path/to/images, size: 28, channels: 1, validation: 100, value_range: [0, 255], channel_order: last}
generator: {latent_dims: [16, 8], hidden: 64, depth: 2, nets: mlp, likelihood: discretized_logistic, sigma: 0.1, levels: 256}
elbo: {iterations: 400, learning_rate: 1e-3, batch_size: 8, kl_warmup: 20, progress: false}
fit:
  - {method: nce, iterations: 400, batch_size: 8}
  - {method: two_stage, iterations: 300, steps: 3, persistent: 16, step_size: 0.1}
out: runs/mnist
seed: 3
device: cpu
""",
    "factory": """data:
  source: path/to/images
generator:
  factory: models:make
  width: 4
  channels: [1, 2, 3]
elbo: null
""",
    "aliases": """data: {source: images}
generator: {nets: conv, hidden: 8, latent_dims: [2, 2]}
fit:
  - &usual {iterations: 100, learning_rate: 3e-4}
  - {<<: *usual, method: joint, generator_learning_rate: 1.0e-5}
""",
}


def recipes(folder: Path) -> Iterator[Target]:
    """Of `energy-prior train`, as they are read before anything runs."""
    for name, text in RECIPES.items():
        file = folder / name / "recipe.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(text)

        def begin(file: Path = file) -> Reading:
            return lambda: read_recipe(file), lambda: None

        yield Target("recipe", name, file, begin, ArgumentError, BLIND | YAML, BLIND | YAML)


# -------------------------------------------------------------------------------------------------------------------- pickles


def pickles(folder: Path) -> Iterator[Target]:
    """As public code writes them, in torch's format of today and in the one before."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    generator = torch.Generator().manual_seed(7)
    weights = {
        key: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value + 7
        for key, value in model().state_dict().items()
    }
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.ones(4, 3)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]}
    nvae = {
        "epoch": 3,
        "state_dict": weights | {"0.weight_normalized": torch.zeros(1)},
        "optimizer": optimizer,
        "args": argparse.Namespace(num_latent_scales=2, dataset="cifar10", lr=0.01),
        "arch_instance": {"normal_enc": ["res_bnswish"]},
    }
    lightning = {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"vae.{key}": value for key, value in weights.items()} | {"loss.scale": torch.ones(3)},
        "optimizer_states": [optimizer],
        "callbacks": {"best": float("inf")},
        "hyper_parameters": collections.OrderedDict(width=4, sizes=torch.Size([3, 4]), names={"a", "b"}, z=1 + 2j),
    }
    vdvae = {f"module.{key}": value for key, value in weights.items()}
    for name, content in {"nvae": nvae, "vdvae": vdvae, "lightning": lightning}.items():
        for old in (False, True):
            file = folder / f"{name}{', old format' if old else ''}" / "model.pt"
            file.parent.mkdir(parents=True)
            torch.save(content, file, _use_new_zipfile_serialization=not old)

            def begin(file: Path = file) -> Reading:
                mine = model()

                def read() -> Any:
                    check_plain(load_checkpoint(file))
                    return load_weights(mine, file).state_dict()

                return read, mine.state_dict

            every = BLIND | PICKLES
            yield Target("torch.save", file.parent.name, file, begin, CheckpointError, every, every if old else PICKLES)


def check_plain(value: Any) -> None:
    """Raises unless it is made of tensors and plain values alone."""
    waiting: list[Any] = [value]
    seen: set[int] = set()
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, argparse.Namespace):
            waiting.append(vars(item))
        elif isinstance(item, Mapping):
            waiting += [*item.keys(), *item.values()]
        elif type(item) in (list, tuple, set):
            waiting += item
        elif type(item) not in PLAIN:
            raise AssertionError(f"it holds a {type(item).__name__}")


KINDS: dict[str, Callable[[Path], Iterator[Target]]] = {
    "prior.save": saved_priors,
    "run_dir": runs,
    "energy-prior train": trained,
    "recipe": recipes,
    "torch.save": pickles,
}
"""Kind of file -> the files of it."""
