"""Tests of moments with a declared rate of false alarms."""

from __future__ import annotations

import torch
from scipy.stats import norm
from torch import Tensor

FALSE_ALARMS = 1e-6
"""Probability that one call of `worst_z_score` exceeds its limit although the samples have the stated moments."""


def moment_table(samples: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """z scores of all first and second central moments of independent draws, (n, d).

    Every row is one draw of its own chain, so the effective sample size is n. The variance of (z_i − m_i)(z_j − m_j) of a
    Gaussian is Σ_ii Σ_jj + Σ_ij².
    """
    n = len(samples)
    centred = samples.double() - mean
    first = centred.mean(0) / (covariance.diagonal() / n).sqrt()
    second = centred.T @ centred / n - covariance
    error = ((torch.outer(covariance.diagonal(), covariance.diagonal()) + covariance**2) / n).sqrt()
    upper = torch.triu_indices(len(mean), len(mean))
    return torch.cat([first, (second / error)[upper[0], upper[1]]])


def limit(count: int) -> float:
    """Largest |z| that `count` scores may reach, with probability 1 − FALSE_ALARMS (Bonferroni)."""
    return float(norm.isf(FALSE_ALARMS / (2 * count)))


def agrees(z_scores: Tensor) -> bool:
    """Whether all z scores are inside the limit."""
    return bool(z_scores.abs().max() < limit(z_scores.numel()))
