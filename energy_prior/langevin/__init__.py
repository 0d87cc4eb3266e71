"""Langevin dynamics on the joint prior and on the posterior: densities, steps, chains and what feeds them."""

from __future__ import annotations

__all__ = [
    "ChainDraw",
    "ChainOptions",
    "ChainResult",
    "ChainSettings",
    "ChainState",
    "InjectedNoise",
    "JointDensity",
    "NoiseSource",
    "Precision",
    "RandomNoise",
    "Scheme",
    "StepCallback",
    "Trajectory",
    "TrajectoryRecorder",
    "coefficients",
    "log_acceptance",
    "propose",
    "run_chain",
    "sample_density",
    "tame",
    "tune_step_size",
]

from energy_prior.langevin.chain import ChainResult, StepCallback, run_chain
from energy_prior.langevin.density import ChainState, JointDensity, Precision
from energy_prior.langevin.noise import InjectedNoise, NoiseSource, RandomNoise
from energy_prior.langevin.settings import ChainDraw, ChainOptions, ChainSettings, sample_density, tune_step_size
from energy_prior.langevin.step import Scheme, coefficients, log_acceptance, propose, tame
from energy_prior.langevin.trajectory import Trajectory, TrajectoryRecorder
