"""Learning: the generator's ELBO, and the joint prior's energies on the frozen generator."""

from __future__ import annotations

__all__ = [
    "ElboConfig",
    "ElboResult",
    "FitConfig",
    "FitResult",
    "elbo",
    "energy_penalty",
    "fit_elbo",
    "fit_energies",
    "maximum_likelihood",
    "noise_contrastive",
]

from energy_prior.training.config import FitConfig
from energy_prior.training.elbo import ElboConfig, ElboResult, elbo, fit_elbo
from energy_prior.training.fit import FitResult, fit_energies
from energy_prior.training.objectives import energy_penalty, maximum_likelihood, noise_contrastive
