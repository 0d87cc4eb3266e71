"""Energy networks f_i(z_i): one scalar per observation, higher = more probable, exactly 0 until trained."""

from energy_prior.energies.base import Energy
from energy_prior.energies.build import build_energies, default_energies, denoising_energies, describe_energies
from energy_prior.energies.denoising import LAST_LEVEL, DenoisingEnergy, angle, waymark
from energy_prior.energies.networks import ConvEnergy, FlatEnergy, MLPEnergy

__all__ = [
    "LAST_LEVEL",
    "ConvEnergy",
    "DenoisingEnergy",
    "Energy",
    "FlatEnergy",
    "MLPEnergy",
    "angle",
    "build_energies",
    "default_energies",
    "denoising_energies",
    "describe_energies",
    "waymark",
]
