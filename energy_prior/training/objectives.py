"""Objectives of two-stage learning, as functions of Σ_i f_i at posterior (+) and at prior (−) draws."""

from __future__ import annotations

__all__ = ["energy_penalty", "maximum_likelihood", "noise_contrastive"]

import torch.nn.functional as F
from torch import Tensor


def noise_contrastive(positive: Tensor, negative: Tensor) -> Tensor:
    """Logistic loss of one classifier of the whole z: E₊[log(1 + e^{−f})] + E₋[log(1 + e^f)], a scalar, 2 log 2 at f = 0.

    With equal counts its minimum is f = log q(z)/p(z), the log ratio of the aggregate posterior to the distribution of
    the negatives (Gutmann and Hyvärinen, AISTATS 2010; Aneja et al., NeurIPS 2021). One classifier with logit Σ_i f_i,
    not one per layer, which would count dependent layers twice.

    Args:
        positive: the logit at posterior draws, (batch,), nats.
        negative: the logit at draws of the prior that is to be corrected, (batch,), nats.
    """
    return F.softplus(-positive).mean() + F.softplus(negative).mean()


def maximum_likelihood(positive: Tensor, negative: Tensor) -> Tensor:
    """E₋[Σ f_i] − E₊[Σ f_i], a scalar, whose gradient is that of the negative log likelihood of the joint prior.

    ∂/∂α_i log-likelihood = E_{z ~ posterior}[∂f_i] − E_{z ~ p(z)}[∂f_i] (Cui, Wu and Han, CVPR 2023, eq. 8).

    Args:
        positive: Σ_i f_i at posterior draws, (batch,), nats.
        negative: Σ_i f_i at draws of the joint prior (Langevin), (batch,), nats.
    """
    return negative.mean() - positive.mean()


def energy_penalty(positive: Tensor, negative: Tensor) -> Tensor:
    """E₊[(Σ f_i)²] + E₋[(Σ f_i)²], a scalar: keeps energies, which have no absolute zero, near 0."""
    return positive.square().mean() + negative.square().mean()
