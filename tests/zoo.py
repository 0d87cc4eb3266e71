"""Every kind of generator and adapter of the library, small, by name, and observations for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from stand_ins import NVAE, VDVAE, DeepVAE, perturbed
from stand_ins_biva import DeepVae, ready
from stand_ins_careamics import CAREamicsLadder, GaussianLikelihood, mixed, mixed_laterally, noise_likelihood
from stand_ins_efficient_vdvae import EfficientVDVAE, hyper_parameters
from stand_ins_ladder_vae import LadderVAE as AddttLadder
from stand_ins_qres import HierarchicalVAE, VariableRateLossyVAE, varied
from torch import Tensor

from energy_prior import LadderVAE, ResidualVAE
from energy_prior.adapters import (
    BIVAAdapter,
    CAREamicsAdapter,
    DeepVAEAdapter,
    EfficientVDVAEAdapter,
    LadderVAEAdapter,
    NVAEAdapter,
    QResVAEAdapter,
    VDVAEAdapter,
)
from energy_prior.protocol import HierarchicalGenerator
from energy_prior.topdown import TopDown

ADAPTERS: dict[str, Callable[[], Any]] = {
    "nvae": lambda: NVAEAdapter(perturbed(NVAE())),
    "nvae bernoulli": lambda: NVAEAdapter(perturbed(NVAE("bernoulli"))),
    "nvae normal, flows": lambda: NVAEAdapter(perturbed(NVAE("normal", flows=2))),
    "nvae plain posterior": lambda: NVAEAdapter(perturbed(NVAE(residual=False)), prior_temperature=0.7),
    "nvae one group": lambda: NVAEAdapter(perturbed(NVAE(vanilla=True))),
    "vdvae": lambda: VDVAEAdapter(perturbed(VDVAE())),
    "vdvae 5 bits": lambda: VDVAEAdapter(perturbed(VDVAE("ffhq_256")), prior_temperature=[0.5, 0.6, 0.7, 0.8, 0.9]),
    "deep vae": lambda: DeepVAEAdapter(perturbed(DeepVAE())),
    "deep vae without skips": lambda: DeepVAEAdapter(perturbed(DeepVAE("logistic", skips=False))),
    "deep ladder, mixture": lambda: DeepVAEAdapter(perturbed(DeepVAE("mixture", ladder=True))),
    "biva": lambda: BIVAAdapter(ready(DeepVae(dense=True)), likelihood="bernoulli"),
    "biva conditional, mixture": lambda: BIVAAdapter(
        ready(DeepVae(tensor_shp=(-1, 3, 4, 4), features_out=20, conditional_bu=True)), likelihood="mixture"
    ),
    "biva's lvae": lambda: BIVAAdapter(ready(DeepVae("lvae")), likelihood="bernoulli"),
    "biva's vae": lambda: BIVAAdapter(ready(DeepVae("vae", dense=True, no_skip=True)), likelihood="bernoulli"),
    "addtt ladder": lambda: LadderVAEAdapter(perturbed(AddttLadder())),
    "addtt ladder, gaussian": lambda: LadderVAEAdapter(
        perturbed(AddttLadder(likelihood_form="gaussian", stochastic_skip=False))
    ),
    "addtt ladder, discretised": lambda: LadderVAEAdapter(perturbed(AddttLadder(3, likelihood_form="discr_log"))),
    "addtt ladder, mixture": lambda: LadderVAEAdapter(
        perturbed(AddttLadder(3, downsample=(1, 0, 1), img_shape=(8, 8), likelihood_form="discr_log_mix"))
    ),
    "efficient vdvae": lambda: efficient_vdvae(),
    "efficient vdvae, logarithmic, residual": lambda: efficient_vdvae(
        (0.9, 0.8, 0.7, 0.6), distribution_base="logstd", output_distribution_base="logstd", use_residual_distribution=True
    ),
    "efficient vdvae, 5 bits": lambda: efficient_vdvae(num_bits=5.0),
    "efficient vdvae bernoulli": lambda: efficient_vdvae(dataset_source="binarized_mnist"),
    "careamics": lambda: CAREamicsAdapter(perturbed(CAREamicsLadder()), GaussianLikelihood()),
    "careamics, squared error, 3D": lambda: CAREamicsAdapter(
        perturbed(CAREamicsLadder((3, 8, 8), predict_logvar=None)), variance=0.1
    ),
    "careamics, noise models": lambda: CAREamicsAdapter(
        perturbed(CAREamicsLadder(target_ch=2, predict_logvar=None)), noise_likelihood(2), encoder_input=mixed
    ),
    "careamics, lateral": lambda: CAREamicsAdapter(
        perturbed(CAREamicsLadder(target_ch=2, scales=2)), GaussianLikelihood(), encoder_input=mixed_laterally
    ),
    "qres": lambda: QResVAEAdapter(varied(HierarchicalVAE()), x_shape=(3, 8, 4), variance=1 / 256),
    "qres lossless": lambda: QResVAEAdapter(varied(HierarchicalVAE(None, colours=1)), x_shape=(1, 4, 8)),
    "qarv": lambda: QResVAEAdapter(varied(VariableRateLossyVAE()), x_shape=(3, 8, 8), variance=1 / 512, lmb=64),
}

GENERATORS: dict[str, Callable[[], Any]] = {
    "ladder": lambda: LadderVAE((1, 8, 8), (3, 2), hidden=8).eval(),
    "ladder, conv, mixture": lambda: LadderVAE((3, 4, 4), (3, 2), hidden=8, nets="conv", likelihood="mixture").eval(),
    "ladder, discretised": lambda: LadderVAE((5,), (3, 2), hidden=8, likelihood="discretized_logistic").eval(),
    "residual": lambda: ResidualVAE((3, 8, 8), groups=(2, 1), channels=8, latent_channels=2).eval(),
    "residual gray, gaussian": lambda: ResidualVAE(
        (1, 8, 8), groups=(2,), channels=8, likelihood="gaussian", tower_cells=0
    ).eval(),
    "residual bernoulli": lambda: ResidualVAE((1, 8, 8), groups=(1, 1), channels=8, likelihood="bernoulli").eval(),
    "residual from the image's size": lambda: ResidualVAE((1, 4, 4), groups=(1, 2), downsample=0, channels=4).eval(),
}


def efficient_vdvae(t: Any = 1.0, **changed: Any) -> EfficientVDVAEAdapter:
    """With hyper-parameters that differ in these."""
    hparams = hyper_parameters(**changed)
    return EfficientVDVAEAdapter(perturbed(EfficientVDVAE(hparams)), hparams, prior_temperature=t)


EVERY = {**ADAPTERS, **GENERATORS}


def ones(generator: HierarchicalGenerator, n: int = 2) -> list[Tensor]:
    """A latent of ones for every layer."""
    return [torch.ones(n, *shape) for shape in generator.latent_shapes]


def likelihood_at_ones(generator: Any, n: int = 2) -> Any:
    """p(x | z) at ε = 1."""
    return generator.likelihood(TopDown(generator, n).descend(ones(generator, n), "noise", to_observation=True).state)


def images(generator: Any, n: int = 3) -> Tensor:
    """On the grid of 8-bit images; 0 or 1 for Bernoulli likelihoods."""
    x = torch.randint(0, 256, (n, *generator.x_shape)) / 255
    return (x > 0.5).float() if "Bernoulli" in repr(likelihood_at_ones(generator)) else x
