"""Generators that come with the library, for users who bring only data."""

from __future__ import annotations

__all__ = ["DiscretizedLogisticMixture", "LadderVAE", "PixelLikelihood", "ResidualVAE"]

from energy_prior.generators.ladder import LadderVAE
from energy_prior.generators.likelihoods import DiscretizedLogisticMixture
from energy_prior.generators.pixels import PixelLikelihood
from energy_prior.generators.residual import ResidualVAE
