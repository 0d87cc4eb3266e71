"""Cases, a function each: a data set, a backbone, and how it and its energies are trained."""

from __future__ import annotations

__all__ = ["CASES", "QUICK", "Case"]

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from nvae_style import NVAEStyle

from energy_prior import LadderVAE, ResidualVAE
from energy_prior.adapters import NVAEAdapter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from cifar10 import TwoLayers


class Case(NamedTuple):
    """What is trained, and how.

    Attributes:
        data: name of the image set; "": the digits of the demo.
        generator: the backbone, with weights drawn from torch's global stream.
        backbone: settings of `fit_elbo`.
        energies: settings of `fit`.
        shorter: settings that differ in a second, shorter run of `fit`; None: there is none.
        long_chains: whether long chains are compared with those of the default length.
        signed: whether the generator's images are in [−1, 1].
        crop: side of the square that is cut from the middle of images; None: they are taken whole.
        size: side that images are scaled to; None: as they are.
    """

    data: str
    generator: Any
    backbone: dict[str, Any]
    energies: dict[str, Any]
    shorter: dict[str, Any] | None = None
    long_chains: bool = False
    signed: bool = False
    crop: int | None = None
    size: int | None = None


def fashion_mnist_small() -> Case:
    """Maps of 14 × 14 and 7 × 7, 1,176 dimensions."""
    vae = ResidualVAE((1, 28, 28), groups=(1, 2), channels=16, latent_channels=4)
    return Case("fashion_mnist", vae, {"iterations": 1500, "batch_size": 64}, {"iterations": 3000, "batch_size": 128})


def cifar10_pyramid() -> Case:
    """Maps of 8 × 8, 4 × 4 and 2 × 2, 1,184 dimensions."""
    vae = ResidualVAE((3, 32, 32), groups=(2, 1, 1), channels=24, latent_channels=8, downsample=2)
    energies = {"iterations": 5000, "batch_size": 128}
    return Case("cifar10", vae, {"iterations": 3500, "batch_size": 64}, energies, {"iterations": 2500}, long_chains=True)


def cifar10_wide() -> Case:
    """Maps of 16 × 16 and 8 × 8, 5,120 dimensions, and no layer that sees the whole image."""
    vae = ResidualVAE((3, 32, 32), groups=(2, 2), channels=32, latent_channels=8)
    return Case("cifar10", vae, {"iterations": 4000, "batch_size": 64}, {"iterations": 2000, "batch_size": 128})


def nvae_cells() -> Case:
    """NVAE's cells through its adapter: maps of 8 × 8 and 4 × 4, 1,280 dimensions."""
    vae = NVAEAdapter(NVAEStyle(groups=2, channels=8, latents=8, cells=1).eval())
    return Case("cifar10", vae, {"iterations": 4000, "batch_size": 64}, {"iterations": 6000, "batch_size": 128})


def mnist() -> Case:
    """Vectors of 16 and 8 units: the model and the energies' training of examples/mnist.py."""
    vae = LadderVAE((1, 28, 28), latent_dims=(16, 8), hidden=512)
    energies = {"method": "multi_stage_nce", "stages": 3, "steps": 60, "iterations": 5400, "batch_size": 1024}
    energies |= {"persistent": 8192}
    return Case("mnist", vae, {"iterations": 10_000, "learning_rate": 1e-3, "log_every": 500}, energies)


def cifar10_joint() -> Case:
    """Vectors of 128 and 100 units and the joint training of examples/cifar10.py, the paper's, with narrower nets."""
    energies = {"method": "joint", "iterations": 1500, "steps": 60, "posterior_steps": 20, "batch_size": 64}
    backbone = {"iterations": 6000, "batch_size": 100, "learning_rate": 1e-3, "log_every": 500}
    return Case("cifar10", TwoLayers(width=24), backbone, energies, signed=True)


def celeba64() -> Case:
    """Maps of 8 × 8, 4 × 4 and 2 × 2, of faces at 64 × 64."""
    vae = ResidualVAE((3, 64, 64), groups=(2, 1, 1), channels=24, latent_channels=8, downsample=3)
    energies = {"iterations": 5000, "batch_size": 128}
    return Case("celeba_half", vae, {"iterations": 3500, "batch_size": 32}, energies, crop=74, size=64)


def church64() -> Case:
    """The same for churches, of which there are few."""
    case = celeba64()
    return case._replace(data="imagenet_church_128", crop=None, backbone=case.backbone | {"iterations": 2000})


def digits() -> Case:
    """Digits of 8 × 8, a residual VAE."""
    vae = ResidualVAE((1, 8, 8), groups=(1, 1), channels=8, latent_channels=2)
    few: dict[str, Any] = {"iterations": 30, "batch_size": 64, "progress": False}
    return Case("", vae, few, {**few, "iterations": 10}, {"iterations": 5}, long_chains=True)


def digits_ladder() -> Case:
    """Digits of 8 × 8, vectors of 4 and 2 units."""
    few: dict[str, Any] = {"iterations": 30, "batch_size": 64, "progress": False}
    vae = LadderVAE((1, 8, 8), latent_dims=(4, 2), hidden=16)
    return Case("", vae, few, {**few, "method": "multi_stage_nce", "iterations": 6, "steps": 3, "step_size": 0.3})


def digits_nvae() -> Case:
    """Digits of 8 × 8 in grey of three channels, NVAE's cells."""
    vae = NVAEAdapter(NVAEStyle(groups=1, channels=4, latents=2, blocks=1, cells=1, side=8).eval())
    few: dict[str, Any] = {"iterations": 10, "batch_size": 64, "progress": False}
    return Case("", vae, few, few)


CASES: dict[str, Callable[[], Case]] = {f.__name__: f for f in (fashion_mnist_small, cifar10_pyramid, cifar10_wide, nvae_cells)}
QUICK: dict[str, Callable[[], Case]] = {f.__name__: f for f in (digits, digits_nvae)}
