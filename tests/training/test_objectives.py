"""Objectives of the learning rules: their values, and their gradients against finite differences of closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from ladders import LinearLadder, gaussian
from torch import Tensor, nn

from energy_prior.topdown import TopDown
from energy_prior.training import generator_likelihood, maximum_likelihood, noise_contrastive, without_affine_force


def test_noise_contrastive_is_the_logistic_loss() -> None:
    positive, negative = torch.tensor([0.3, -2.0, 50.0]), torch.tensor([1.0, -0.4])
    logits = torch.cat([positive, negative])
    labels = torch.tensor([1.0, 1, 1, 0, 0])
    weights = torch.tensor([1 / 3] * 3 + [1 / 2] * 2)
    expected = (nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none") * weights).sum()
    torch.testing.assert_close(noise_contrastive(positive, negative), expected)
    assert float(noise_contrastive(torch.zeros(4), torch.zeros(4))) == pytest.approx(2 * math.log(2))


def test_noise_contrastive_is_least_at_the_log_ratio() -> None:
    """Exactly, by quadrature: at f = log q/p every perturbation raises the loss."""
    grid = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    q, p = torch.distributions.Normal(0.7, 0.5), torch.distributions.Normal(0.0, 1.0)
    f = (q.log_prob(grid) - p.log_prob(grid)).requires_grad_()
    step = float(grid[1] - grid[0])
    loss = (q.log_prob(grid).exp() * nn.functional.softplus(-f) + p.log_prob(grid).exp() * nn.functional.softplus(f)).sum()
    (gradient,) = torch.autograd.grad(loss * step, f)
    assert float(gradient.abs().max()) < 1e-12


def test_maximum_likelihood_gradient_is_that_of_the_log_likelihood() -> None:
    """On the ladder −E[log p(z)] and log Z are closed forms; finite differences of log Z against E[∂f] under exact draws."""
    ladder = LinearLadder((2, 2), seed=4)
    f = ladder.energies[0]
    mean, covariance = ladder.tilted()
    draws = torch.distributions.MultivariateNormal(mean, covariance).sample((200_000,))
    maximum_likelihood(torch.zeros(1).double(), f(draws[:, :2])).backward()
    assert f.h.grad is not None
    gradient, h = f.h.grad.clone(), 1e-5
    for j in range(2):
        with torch.no_grad():
            f.h[j] += h
            up = ladder.log_z()
            f.h[j] -= 2 * h
            down = ladder.log_z()
            f.h[j] += h
        assert float(gradient[j]) == pytest.approx((up - down) / (2 * h), abs=6 * float(covariance[j, j] / 200_000) ** 0.5)


H = 1e-5


def points(n: int) -> Tensor:
    """2n points of equal weight with mean 0 and covariance I: averages of quadratics over them are exact."""
    axes = math.sqrt(n) * torch.eye(n, dtype=torch.float64)
    return torch.cat([axes, -axes])


def draws(mean: Tensor, covariance: Tensor) -> Tensor:
    return mean + points(len(mean)) @ torch.linalg.cholesky(covariance).T


def layers(ladder: LinearLadder, z: Tensor) -> tuple[Tensor, ...]:
    return tuple(z.split(ladder.dims, dim=1))


def surrogate(ladder: LinearLadder, x: Tensor, positive: Sequence[Tensor], log_q: Tensor | None) -> Tensor:
    """The library's objectives, with exact negatives."""
    negative = layers(ladder, draws(*ladder.tilted()))

    def tilt(latents: Sequence[Tensor]) -> Tensor:
        return torch.stack([f(z) for f, z in zip(ladder.energies, latents, strict=True)], 1).sum(1)

    topdown = TopDown(ladder, len(x))
    descent = topdown.descend(tuple(positive), "latent", to_observation=True)
    below = TopDown(ladder, len(negative[0])).descend(negative, "latent").log_priors().sum(1)
    log_likelihood = topdown.likelihood(descent).log_prob(x)
    energies = maximum_likelihood(tilt(positive), tilt(negative))
    return energies + generator_likelihood(log_likelihood, descent.log_priors().sum(1), below, log_q)


def check_gradients(value: Callable[[], float], loss: Tensor, weights: dict[str, nn.Parameter]) -> None:
    """∂loss/∂w = −∂value/∂w for every entry of every weight."""
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        flat, slopes = weight.data.view(-1), []
        for j in range(flat.numel()):
            flat[j] += H
            up = value()
            flat[j] -= 2 * H
            down = value()
            flat[j] += H
            slopes.append(-(up - down) / (2 * H))
        torch.testing.assert_close(gradient.flatten(), torch.tensor(slopes).double(), rtol=1e-5, atol=1e-7, msg=name)


def generator_weights(ladder: LinearLadder) -> dict[str, nn.Parameter]:
    named = {"out": ladder.out, "a": ladder.a[0], "b": ladder.b[0], "s": ladder.s[0]}
    return named | {f"f{i}.{n}": p for i, f in enumerate(ladder.energies, 1) for n, p in f.named_parameters() if n != "c"}


def test_joint_maximum_likelihood_has_the_gradient_of_the_marginal_likelihood() -> None:
    """d/dθ of the mean log p(x), p(x) = N(B m_1, B S_11 Bᵀ + τ² I) under the tilted prior, in every parameter."""
    ladder = LinearLadder((2, 2), x_dim=3, seed=3)
    x = torch.randn(4, 3, dtype=torch.float64)

    def marginal() -> float:
        mean, covariance = gaussian(ladder, tilted=True)
        return float(torch.distributions.MultivariateNormal(mean[4:], covariance[4:, 4:]).log_prob(x).mean())

    posterior = torch.cat([draws(*ladder.tilted(row)) for row in x])
    repeated = x.repeat_interleave(len(posterior) // len(x), dim=0)
    loss = surrogate(ladder, repeated, layers(ladder, posterior), None)
    check_gradients(marginal, loss, generator_weights(ladder))


def test_the_variational_surrogate_has_the_gradient_of_the_bound() -> None:
    """d/dθ of E_q[log p_β0 + log p_β + Σf − log q] − log Z, in the inference model's parameters as well."""
    ladder = LinearLadder((2, 2), x_dim=3, seed=5)
    x = torch.randn(2, 3, dtype=torch.float64)
    noise = points(4)
    repeated = x.repeat_interleave(len(noise), dim=0)
    n1, n2 = noise.repeat(2, 1).split((2, 2), dim=1)

    def posterior() -> tuple[tuple[Tensor, ...], Tensor]:
        latents = tuple(repeated @ w.T + v * n for w, v, n in zip(ladder.w, ladder.v, (n1, n2), strict=True))
        log_q = sum(-0.5 * (n**2).sum(1) - v.log().sum() for v, n in zip(ladder.v, (n1, n2), strict=True))
        assert isinstance(log_q, Tensor)
        return latents, log_q

    def bound() -> float:
        with torch.no_grad():
            latents, log_q = posterior()
            topdown = TopDown(ladder, len(repeated))
            descent = topdown.descend(latents, "latent", to_observation=True)
            tilt = torch.stack([f(z) for f, z in zip(ladder.energies, latents, strict=True)], 1).sum(1)
            value = topdown.likelihood(descent).log_prob(repeated) + descent.log_priors().sum(1) + tilt - log_q
        return float(value.mean()) - ladder.log_z()

    latents, log_q = posterior()
    loss = surrogate(ladder, repeated, latents, log_q)
    weights = (
        generator_weights(ladder) | {f"w{i}": p for i, p in enumerate(ladder.w)} | {f"v{i}": p for i, p in enumerate(ladder.v)}
    )
    check_gradients(bound, loss, weights)


def test_the_affine_force_of_each_unit_is_taken_away() -> None:
    """What is left of a unit's gradient is the rest of its least-squares fit to (1, z), whatever the layer's shape."""
    latents = [(3 * torch.randn(50, *shape, dtype=torch.float64) + 7).requires_grad_() for shape in ((4,), (2, 3, 3))]
    force = [torch.randn_like(z) + 2 - 0.5 * z.detach() for z in latents]
    freed = without_affine_force(latents)
    sum((z * g).sum() for z, g in zip(freed, force, strict=True)).backward()  # type: ignore[union-attr]
    for z, same, g in zip(latents, freed, force, strict=True):
        assert torch.equal(same, z)
        assert z.grad is not None
        for unit, got, given in zip(z.detach().flatten(1).T, z.grad.flatten(1).T, g.flatten(1).T, strict=True):
            columns = torch.stack([torch.ones_like(unit), unit], 1)
            fitted = columns @ torch.linalg.lstsq(columns, given[:, None]).solution
            torch.testing.assert_close(got, given - fitted[:, 0])


@pytest.mark.parametrize("rows", [1, 5])
def test_draws_that_do_not_differ_get_no_force(rows: int) -> None:
    z = torch.full((rows, 2), 3.0, requires_grad=True)
    (freed,) = without_affine_force([z])
    freed.sum().backward()
    assert torch.equal(freed, z)
    assert z.grad is not None
    assert not z.grad.any()
