"""Langevin dynamics on the joint prior and on the posterior: targets, steps, chains and what feeds them."""

from __future__ import annotations

__all__ = [
    "LARGEST_STEP",
    "USUAL_ACCEPTANCE",
    "ChainDraw",
    "ChainOptions",
    "ChainResult",
    "ChainSettings",
    "Evaluation",
    "InjectedNoise",
    "JointDensity",
    "NoiseSource",
    "Precision",
    "RandomNoise",
    "Scheme",
    "Target",
    "Trajectory",
    "choose_backend",
    "coefficients",
    "crossed",
    "cut_drift",
    "log_acceptance",
    "propose",
    "sample_target",
    "tune_step_size",
    "warn_if_stuck",
]

from energy_prior.langevin.chain import ChainResult
from energy_prior.langevin.density import Evaluation, JointDensity, Precision, Target
from energy_prior.langevin.noise import InjectedNoise, NoiseSource, RandomNoise
from energy_prior.langevin.proposal import Scheme, coefficients, cut_drift, propose
from energy_prior.langevin.sample import (
    LARGEST_STEP,
    USUAL_ACCEPTANCE,
    ChainDraw,
    choose_backend,
    crossed,
    sample_target,
    tune_step_size,
    warn_if_stuck,
)
from energy_prior.langevin.settings import ChainOptions, ChainSettings
from energy_prior.langevin.step import log_acceptance
from energy_prior.langevin.trajectory import Trajectory
