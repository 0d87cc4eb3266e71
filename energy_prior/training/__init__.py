"""Learning: the generator's ELBO, and the joint prior by six rules, on one process or many, resumable."""

from __future__ import annotations

__all__ = [
    "METHODS",
    "Callback",
    "ElboConfig",
    "ElboResult",
    "FitConfig",
    "FitHooks",
    "FitResult",
    "Method",
    "RunConfig",
    "denoising",
    "elbo",
    "fit_elbo",
    "fit_energies",
    "generator_likelihood",
    "launched_accelerator",
    "map_batches",
    "maximum_likelihood",
    "noise_contrastive",
    "without_affine_force",
]

from energy_prior.training.config import METHODS, FitConfig, Method, RunConfig
from energy_prior.training.distributed import launched_accelerator, map_batches
from energy_prior.training.elbo import ElboConfig, ElboResult, elbo, fit_elbo
from energy_prior.training.fit import FitResult, fit_energies
from energy_prior.training.hooks import FitHooks
from energy_prior.training.loop import Callback
from energy_prior.training.objectives import (
    denoising,
    generator_likelihood,
    maximum_likelihood,
    noise_contrastive,
    without_affine_force,
)
