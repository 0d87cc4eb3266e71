"""The closed part of an energy against torch's multivariate normal distributions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from energy_prior.energies.quadratic import Quadratic, shrunk_covariance

DRAWS = 500


def draws_of(shape: tuple[int, ...]) -> Tensor:
    torch.manual_seed(3)
    size = torch.Size(shape).numel()
    mixed = torch.randn(DRAWS, size, dtype=torch.float64) @ torch.randn(size, size, dtype=torch.float64) / size**0.5
    return (mixed + torch.linspace(-1, 1, size, dtype=torch.float64)).reshape(DRAWS, *shape)


def moments_of(noise: Tensor) -> tuple[Tensor, Tensor]:
    flat = noise.flatten(1)
    return flat.mean(0), shrunk_covariance(flat - flat.mean(0))


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.2])
def test_is_the_log_ratio_of_the_noised_gaussian_to_the_prior(angle: float) -> None:
    """At every waymark, so that the ratios between neighbours add up to the whole."""
    noise = draws_of((2, 3, 1))
    f = Quadratic((2, 3, 1)).double()
    assert torch.equal(f(noise), torch.zeros(DRAWS, dtype=torch.float64)), "0 until it is set"
    f.set_moments(noise)
    mean, covariance = moments_of(noise)
    alpha, sigma = torch.tensor(angle, dtype=torch.float64).cos(), torch.tensor(angle, dtype=torch.float64).sin()
    eye = torch.eye(6, dtype=torch.float64)
    noised = MultivariateNormal(alpha * mean, alpha**2 * covariance + sigma**2 * eye)
    flat = noise.flatten(1)
    torch.testing.assert_close(f(noise, alpha), noised.log_prob(flat) - MultivariateNormal(0 * mean, eye).log_prob(flat))
    torch.testing.assert_close(f(noise, alpha.expand(DRAWS)), f(noise, alpha))


def test_kl_is_that_of_the_refitted_gaussian() -> None:
    noise = draws_of((5,))
    f = Quadratic((5,)).double()
    f.set_moments(noise)
    eye = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(
        f.kl(), kl_divergence(MultivariateNormal(*moments_of(noise)), MultivariateNormal(0 * eye[0], eye))
    )


def test_low_rank_keeps_the_directions_furthest_from_the_prior() -> None:
    torch.manual_seed(0)
    scales = torch.tensor([3.0, 1.0, 0.2, 1.05], dtype=torch.float64)
    noise = torch.randn(20_000, 4, dtype=torch.float64) * scales
    f = Quadratic((4,), rank=2).double()
    f.set_moments(noise)
    assert sorted(f.vectors.abs().argmax(0).tolist()) == [0, 2]


def test_a_large_layer_has_one_covariance_of_its_channels() -> None:
    """It is exact where the positions are independent and alike."""
    noise = draws_of((3,)).reshape(DRAWS // 4, 2, 2, 3).permute(0, 3, 1, 2)
    f = Quadratic((3, 2, 2), full=10).double()
    f.set_moments(noise)
    assert f.vectors.shape == (3, 3)
    centred = (noise - noise.mean(0)).permute(0, 2, 3, 1).reshape(-1, 3)
    covariance, eye = shrunk_covariance(centred), torch.eye(3, dtype=torch.float64)
    expected = torch.zeros(len(noise), dtype=torch.float64)
    for row in range(2):
        for column in range(2):
            e = noise[:, :, row, column]
            expected += MultivariateNormal(e.mean(0), covariance).log_prob(e) - MultivariateNormal(0 * eye[0], eye).log_prob(e)
    torch.testing.assert_close(f(noise), expected)


def test_few_draws_leave_the_covariance_near_the_prior() -> None:
    torch.manual_seed(0)
    draws = torch.randn(20_000, 30, dtype=torch.float64)
    eye = torch.eye(30, dtype=torch.float64)
    few, sample = shrunk_covariance(draws[:20]), draws[:20].T @ draws[:20] / 20
    assert (few - eye).norm() < 0.3 * (sample - eye).norm()
    wide = draws * torch.linspace(0.2, 3, 30, dtype=torch.float64)
    torch.testing.assert_close(shrunk_covariance(wide), wide.T @ wide / len(wide), rtol=0.0, atol=0.02)
