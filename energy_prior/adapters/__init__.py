"""Adapters: hierarchical VAEs of public repositories as generators. They wrap your model object and hold none of its code."""

from __future__ import annotations

__all__ = [
    "BIVAAdapter",
    "CAREamicsAdapter",
    "DeepVAEAdapter",
    "EfficientVDVAEAdapter",
    "LadderVAEAdapter",
    "NVAEAdapter",
    "QResVAEAdapter",
    "VDVAEAdapter",
    "load_checkpoint",
    "load_weights",
]

from energy_prior.adapters.biva import BIVAAdapter
from energy_prior.adapters.careamics import CAREamicsAdapter
from energy_prior.adapters.deep_vae import DeepVAEAdapter
from energy_prior.adapters.efficient_vdvae import EfficientVDVAEAdapter
from energy_prior.adapters.ladder_vae import LadderVAEAdapter
from energy_prior.adapters.nvae import NVAEAdapter
from energy_prior.adapters.qres_vae import QResVAEAdapter
from energy_prior.adapters.vdvae import VDVAEAdapter
from energy_prior.adapters.weights import load_checkpoint, load_weights
