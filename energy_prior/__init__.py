"""Joint latent-space energy-based priors, p(z) = exp(Σ_i f_i(z_i)) p_β(z) / Z, for any hierarchical VAE or generator."""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "BackendWarning",
    "ChainSettings",
    "ChainWarning",
    "CheckpointError",
    "ConvEnergy",
    "ConvolvedNormal",
    "DenoisingEnergy",
    "FlatEnergy",
    "DataWarning",
    "DiscretizedLogisticMixture",
    "DistributedError",
    "DivergenceError",
    "Energy",
    "EnergyPriorError",
    "Explanation",
    "FitConfig",
    "FitResult",
    "GeneratorError",
    "HierarchicalGenerator",
    "HubError",
    "Inferred",
    "JointEBMPrior",
    "LadderVAE",
    "Logistic",
    "MLPEnergy",
    "Mismatch",
    "MissingExtraError",
    "ModelCard",
    "NoiseMap",
    "ResidualVAE",
    "ScoreTerms",
    "ShapeError",
    "TrainingWarning",
    "Trajectory",
    "__version__",
    "check_generator",
    "default_energies",
    "denoising_energies",
    "fit_elbo",
    "load_example",
    "map_batches",
]

from energy_prior.calibration import Explanation
from energy_prior.checks.generator import check_generator
from energy_prior.conditionals import Logistic, NoiseMap
from energy_prior.convolved import ConvolvedNormal
from energy_prior.energies import (
    ConvEnergy,
    DenoisingEnergy,
    Energy,
    FlatEnergy,
    MLPEnergy,
    default_energies,
    denoising_energies,
)
from energy_prior.errors import (
    ArgumentError,
    BackendWarning,
    ChainWarning,
    CheckpointError,
    DataWarning,
    DistributedError,
    DivergenceError,
    EnergyPriorError,
    GeneratorError,
    HubError,
    MissingExtraError,
    ShapeError,
    TrainingWarning,
)
from energy_prior.generators import DiscretizedLogisticMixture, LadderVAE, ResidualVAE
from energy_prior.hub import ModelCard
from energy_prior.langevin import ChainSettings, Trajectory
from energy_prior.mismatch import Mismatch
from energy_prior.pretrained import load_example
from energy_prior.prior import JointEBMPrior
from energy_prior.protocol import HierarchicalGenerator, Inferred
from energy_prior.scores import ScoreTerms
from energy_prior.training import FitConfig, FitResult, fit_elbo, map_batches

__version__ = "0.1.0"
"""Of the package."""
