"""Objectives of the learning rules, as functions of log densities at posterior (+) and at prior (−) draws."""

from __future__ import annotations

__all__ = ["denoising", "generator_likelihood", "maximum_likelihood", "noise_contrastive", "without_affine_force"]

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from energy_prior._util import per_row, sum_event


def noise_contrastive(positive: Tensor, negative: Tensor) -> Tensor:
    """Logistic loss of one classifier of the whole z: E₊[log(1 + e^{−f})] + E₋[log(1 + e^f)], (), nats, 2 log 2 at f = 0.

    With equal counts its minimum is f = log q(z)/p(z), the log ratio of the aggregate posterior to the distribution of
    the negatives (Gutmann and Hyvärinen, AISTATS 2010; Aneja et al., NeurIPS 2021). One classifier with logit Σ_i f_i,
    not one per layer, which would count dependent layers twice.

    Args:
        positive: the logit at posterior draws, (batch,), nats.
        negative: the logit at draws of the prior that is to be corrected, (batch,), nats.

    Examples:
        >>> noise_contrastive(torch.zeros(4), torch.zeros(4))  # 2 log 2
        tensor(1.3863)
    """
    return F.softplus(-positive).mean() + F.softplus(negative).mean()


def denoising(
    gradient: Sequence[Tensor], clean: Sequence[Tensor], added: Sequence[Tensor], alpha: Tensor, sigma: Tensor
) -> Tensor:
    """E‖(σ/α) ∇_ε Σ f(ε_t; t) − (σ ε_q − α n)‖² per unit, (), no unit, at ε_t = α ε_q + σ n; 1 where f = 0 and ε_q ~ N(0, I).

    Denoising score matching (Vincent, Neural Computation 2011) of the tilt: its minimum is ∇f(·; t) = ∇ log q_t(ε) + ε with
    q_t the density of ε_t, as ∇ log q_t = −E[n | ε_t]/σ. In the weighting of Salimans and Ho (ICLR 2022, v) every waymark
    counts the same. It sees one number per unit and draw, where a classifier sees one per draw, so that it learns where
    posterior and prior are told apart completely.

    Args:
        gradient: ∇ Σ f at ε_t of every layer, (batch, *shape), nats per unit of ε.
        clean: ε_q of every layer, the posterior's noise, (batch, *shape).
        added: n of every layer, noise of N(0, 1), (batch, *shape).
        alpha: α in [0, 1], (batch,).
        sigma: σ in [0, 1], (batch,).

    Examples:
        >>> e, n = torch.ones(4, 3), torch.zeros(4, 3)
        >>> denoising([torch.zeros(4, 3)], [e], [n], torch.full((4,), 0.6), torch.full((4,), 0.8))  # σ² of f = 0
        tensor(0.6400)
    """
    total, units = 0.0, 0
    for g, e, n in zip(gradient, clean, added, strict=True):
        a, s = per_row(alpha, e), per_row(sigma, e)
        total = total + sum_event((s / a * g - (s * e - a * n)).square())
        units += e[0].numel()
    return torch.as_tensor(total).mean() / units


def maximum_likelihood(positive: Tensor, negative: Tensor) -> Tensor:
    """E₋[Σ f_i] − E₊[Σ f_i], (), nats, whose gradient is that of the negative log likelihood of the joint prior.

    ∂/∂α_i log-likelihood = E_{z ~ posterior}[∂f_i] − E_{z ~ p(z)}[∂f_i] (Cui, Wu and Han, CVPR 2023, eq. 8).

    Args:
        positive: Σ_i f_i at posterior draws, (batch,), nats.
        negative: Σ_i f_i at draws of the joint prior (Langevin), (batch,), nats.

    Examples:
        >>> maximum_likelihood(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 0.0]))
        tensor(-2.5000)
    """
    return negative.mean() - positive.mean()


def generator_likelihood(
    log_likelihood: Tensor, log_prior_positive: Tensor, log_prior_negative: Tensor, log_q: Tensor | None = None
) -> Tensor:
    """−E₊[log p_β0(x|z) + log p_β(z) − log q_ω(z|x)] + E₋[log p_β(z)], (), nats: what the joint rules add.

    With `maximum_likelihood` it has the gradient of the negative log likelihood in every parameter:
    ∂/∂β_{>0} = E₊[∂log p_β(z)] − E₋[∂log p_β(z)] and ∂/∂β_0 = E₊[∂log p_β0(x|z)] (Cui, Wu and Han, CVPR 2023, eqs. 8–10).
    With reparameterised z ~ q_ω it is the variational surrogate, whose gradient reaches ω through z and log q_ω.

    Args:
        log_likelihood: log p_β0(x | z) at posterior draws, (batch,), nats.
        log_prior_positive: log p_β(z) at posterior draws, (batch,), nats.
        log_prior_negative: log p_β(z) at draws of the joint prior, (batch,), nats.
        log_q: log q_ω(z | x) of the posterior draws, (batch,), nats; None for Langevin draws.

    Examples:
        >>> at_posterior, at_prior = torch.tensor([-8.0, -6.0]), torch.tensor([-3.0, -5.0])
        >>> generator_likelihood(torch.tensor([-20.0, -22.0]), at_posterior, at_prior, log_q=torch.tensor([-4.0, -2.0]))
        tensor(21.)
    """
    positive = log_likelihood + log_prior_positive - (0.0 if log_q is None else log_q)
    return log_prior_negative.mean() - positive.mean()


def without_affine_force(latents: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same latents, for f at reparameterised posterior draws: its force on them loses what moves or scales them all alike.

    Of ∇f, the gradient that comes back, each unit loses its regression on (1, z_ij) over the batch. It would gain nothing:
    units moved and scaled with the decoder, and f making up for it, leave p(x) as it is. And it has no rest: f follows the
    draws, the draws follow f, and chains that are behind make both grow exponentially (`docs/method.md`). What places and
    scales the draws is log p_β.

    Args:
        latents: (z_1, …, z_L), z_i of shape (batch, *latent_shape).

    Returns:
        (z_1, …, z_L) of the same values, z_i of shape (batch, *latent_shape).

    Examples:
        >>> z = torch.tensor([[-1.0], [0.0], [1.0]], requires_grad=True)
        >>> (freed,) = without_affine_force([z])
        >>> (freed * torch.tensor([[2.0], [5.0], [6.0]])).sum().backward()  # (2, 5, 6) is 13/3 + 2 z and a rest
        >>> freed.flatten().tolist(), z.grad.flatten()
        ([-1.0, 0.0, 1.0], tensor([-0.3333,  0.6667, -0.3333]))
    """
    freed = []
    for z in latents:
        mean = z.mean(0)
        centred = (z - mean).detach()
        slope = (z * centred).sum(0) / centred.square().sum(0).clamp_min(torch.finfo(z.dtype).tiny)
        freed.append(z - (mean - mean.detach()) - (slope - slope.detach()) * centred)
    return tuple(freed)
