"""L^{>k} and LLR^{>k} of the linear-Gaussian ladder for every k, against their closed form."""

from __future__ import annotations

import pytest
import torch
from helpers import limit
from ladders import GaussianLadder, LinearLadder, gaussian

from energy_prior import ArgumentError, JointEBMPrior
from energy_prior.model import JointModel

DRAWS = 4000
X = torch.tensor([1.2, -0.4, 0.9], dtype=torch.float64)


@pytest.mark.parametrize("space", ["noise", "latent"])
@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_log_joint_and_llr(k: int, space: str) -> None:
    ladder = LinearLadder((2, 2, 2), seed=5)
    prior = JointEBMPrior(ladder, ladder.energies, space=space)  # type: ignore[arg-type]
    options = {"steps": 80, "step_size": 0.9 if space == "noise" else 0.5, "adjust": True}
    x = X.expand(DRAWS, -1)
    draws = prior.log_joint(x, k, num_samples=1, rng=torch.Generator().manual_seed(k), **options)  # type: ignore[arg-type]
    z = (draws.mean() - ladder.log_joint(X, k)) / (draws.std() / DRAWS**0.5)
    assert abs(float(z)) < limit(1)
    llr = prior.llr_score(x, k, num_samples=1, rng=torch.Generator().manual_seed(k), **options)  # type: ignore[arg-type]
    if k == 0:
        assert torch.equal(llr, torch.zeros_like(llr))
    else:
        expected = ladder.log_joint(X, 0) - ladder.log_joint(X, k)
        assert abs(float((llr.mean() - expected) / (llr.std() / DRAWS**0.5))) < limit(1)


def test_num_samples_averages_draws() -> None:
    ladder = LinearLadder((2, 2), seed=5)
    prior = JointEBMPrior(ladder, ladder.energies)
    x = X.expand(500, -1)
    one, many = (prior.log_joint(x, num_samples=n, rng=torch.Generator().manual_seed(0)) for n in (1, 16))
    assert float(many.std() / one.std()) == pytest.approx(0.25, rel=0.2)


def test_importance_weights_give_the_likelihood() -> None:
    """With q the exact posterior for f = 0 every weight is p(x); with energies their mean tends to Z p(x)."""
    ladder = GaussianLadder((2, 2), x_dim=3, seed=5)
    x = X.expand(4, -1)
    z = slice(4, 7)

    def log_p(*, tilted: bool) -> float:
        mean, covariance = gaussian(ladder, tilted=tilted)
        return float(torch.distributions.MultivariateNormal(mean[z], covariance[z, z]).log_prob(X))

    zero = JointEBMPrior(ladder, [_Zero(), _Zero()])
    for method in ("elbo", "log_likelihood"):
        score = zero.anomaly_score(x, method, num_samples=3)
        torch.testing.assert_close(score, torch.full_like(score, -log_p(tilted=False)), rtol=1e-6, atol=1e-6)
    prior = JointEBMPrior(ladder, ladder.energies)
    rng = torch.Generator().manual_seed(0)
    exact = -log_p(tilted=True) - ladder.log_z()
    score = prior.anomaly_score(x, "log_likelihood", num_samples=4000, rng=rng)
    torch.testing.assert_close(score, torch.full_like(score, exact), rtol=0, atol=0.03)
    bound = prior.anomaly_score(x, "elbo", num_samples=4000, rng=rng)
    assert bool((bound > score).all()), "the ELBO is a lower bound"


@pytest.mark.parametrize("method", ["elbo", "log_likelihood"])
def test_scores_with_q_need_infer(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And say so before any chain runs."""
    ladder = LinearLadder((2, 2), seed=5)
    ladder.infer = None  # type: ignore[method-assign, assignment]
    prior = JointEBMPrior(ladder, ladder.energies)
    monkeypatch.setattr(JointModel, "run", None)
    with pytest.raises(ArgumentError, match=rf'^method: "{method}" needs q_ω'):
        prior.anomaly_score(X.expand(3, -1), method)


class _Zero(torch.nn.Module):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z.flatten(1).sum(1) * 0.0
