"""What the examples in the adapters' docstrings take from a public repository, by adapter: small stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stand_ins import NVAE, VDVAE, DeepVAE, perturbed
from stand_ins_biva import DeepVae, ready
from stand_ins_careamics import CAREamicsLadder, GaussianLikelihood
from stand_ins_efficient_vdvae import EfficientVDVAE, hyper_parameters
from stand_ins_ladder_vae import LadderVAE
from stand_ins_qres import HierarchicalVAE, varied

EXAMPLE_MODELS: dict[str, Callable[[], dict[str, Any]]] = {
    "BIVAAdapter": lambda: {"model": ready(DeepVae(dense=True))},
    "CAREamicsAdapter": lambda: {"model": perturbed(CAREamicsLadder()), "likelihood": GaussianLikelihood()},
    "DeepVAEAdapter": lambda: {"model": perturbed(DeepVAE())},
    "EfficientVDVAEAdapter": lambda: {
        "model": perturbed(EfficientVDVAE(hyper_parameters())),
        "hparams": hyper_parameters(),
    },
    "LadderVAEAdapter": lambda: {"model": perturbed(LadderVAE())},
    "NVAEAdapter": lambda: {"model": perturbed(NVAE())},
    "QResVAEAdapter": lambda: {"model": varied(HierarchicalVAE())},
    "VDVAEAdapter": lambda: {"model": perturbed(VDVAE())},
}
