"""L^{>k} and LLR^{>k} of the linear-Gaussian ladder for every k, against their closed form."""

from __future__ import annotations

import pytest
import torch
from helpers import limit
from ladders import LinearLadder

from energy_prior import JointEBMPrior

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
