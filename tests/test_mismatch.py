"""How far a posterior is: figures of known Gaussians, a classifier that finds what there is and nothing else, and `fit`."""

from __future__ import annotations

import math

import pytest
import torch
from runs import Shifted, X, make, seeded
from torch import Tensor, nn

from energy_prior import ArgumentError, JointEBMPrior, ShapeError, TrainingWarning
from energy_prior.mismatch import Mismatch, measure, tell_apart
from energy_prior.training import FitConfig, Method, fit

N = 2000


def test_figures_of_a_known_gaussian() -> None:
    """Means 0.5 in the one half of the units and variances 1/2: KL and tilt in closed form, per layer."""
    torch.manual_seed(0)
    first = torch.randn(N, 32) * math.sqrt(0.5) + torch.tensor([0.5, -0.5]).repeat(16)
    second = torch.randn(N, 6)
    found = measure([first, second])
    a, b = found.layers
    assert (a.units, b.units, found.draws) == (32, 6, N)
    assert a.mean == pytest.approx(0.5, rel=0.05)
    assert b.mean == pytest.approx(0.0, abs=0.05)
    assert a.variance == pytest.approx(0.5, rel=0.05)
    assert 0.35 < a.smallest < 0.5
    assert b.largest == pytest.approx(1.0, abs=0.1)
    kl = 16 * (0.5 - 1 - math.log(0.5)) + 16 * 0.25
    back = 16 * (2 - 1 + math.log(0.5)) + 16 * 0.25 / 0.5
    assert a.kl == pytest.approx(kl, rel=0.05)
    assert b.kl == pytest.approx(0.0, abs=0.05)
    assert found.tilt == pytest.approx(kl + back, rel=0.05)
    assert found.joint_accuracy is None


def test_the_classifier_finds_no_difference_where_there_is_none_and_the_best_accuracy_where_there_is() -> None:
    """Of N(0, I) and N(m, I) the best accuracy is Φ(‖m‖/2)."""
    torch.manual_seed(1)
    assert tell_apart([torch.randn(N, 8)], [torch.randn(N, 8)]) == pytest.approx(0.5, abs=0.03)
    best = float(torch.distributions.Normal(0, 1).cdf(torch.tensor(0.5 * 0.4 * math.sqrt(8))))
    assert tell_apart([torch.randn(N, 8) + 0.4], [torch.randn(N, 8)]) == pytest.approx(best, abs=0.03)


def test_the_classifier_knows_the_gaussians_of_both_sides() -> None:
    """Variances of 6 along ten directions that no unit shows alone, too few draws for a network to find them."""
    torch.manual_seed(3)
    directions = torch.linalg.qr(torch.randn(96, 10)).Q

    def wide() -> Tensor:
        e = torch.randn(900, 96)
        return e + (math.sqrt(6) - 1) * e @ directions @ directions.T

    assert tell_apart([wide()], [torch.randn(900, 96)], steps=60) > 0.85


@pytest.mark.parametrize("maps", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_classifier_sees_layers_together(maps: bool) -> None:
    """Each layer alone is N(0, I) on both sides; on one of them the lower follows the sign of the upper one."""
    torch.manual_seed(2)

    def layers(*, dependent: bool) -> list[Tensor]:
        upper = torch.randn(N, 2, 4, 4) if maps else torch.randn(N, 3)
        size = torch.randn(upper.shape).abs()
        return [size * upper.sign() if dependent else torch.randn(upper.shape), upper]

    assert tell_apart(layers(dependent=True), layers(dependent=False), steps=200) > 0.75
    if not maps:
        assert measure(layers(dependent=True)).tilt == pytest.approx(0.0, abs=0.2), "no layer alone shows it"


@pytest.mark.slow
def test_of_a_prior_before_and_after_it_has_learned() -> None:
    prior = JointEBMPrior(Shifted(0.8, 6))
    data = torch.zeros(1000, 1)
    before = prior.mismatch(data, prior="generator", rng=seeded())
    assert before.joint_accuracy is None
    assert before.layers[0].kl == pytest.approx(0.5 * 6 * 0.8**2, rel=0.2)
    assert 'near enough for "nce"' in str(before)
    assert '"nce" saturates, use "denoising"' in str(JointEBMPrior(Shifted(2.0, 40)).mismatch(data, prior="generator"))
    result = prior.fit(data, iterations=300, batch_size=256, progress=False)
    after = prior.mismatch(data, rng=seeded())
    for found in (after, result.mismatch):
        assert found is not None
        assert found.joint_accuracy is not None
        assert found.joint_accuracy - 0.5 < 0.4 * (found.accuracy - 0.5)
    assert f"told apart in {after.joint_accuracy:.1%}" in str(after)


def test_bad_arguments() -> None:
    prior = make()
    with pytest.raises(ShapeError, match="x: expected at least 32 observations, got 31"):
        prior.mismatch(X[:31])
    with pytest.raises(ArgumentError, match='prior="generator" is ancestral'):
        prior.mismatch(X, prior="generator", steps=3)
    with pytest.raises(ArgumentError, match='prior: expected "joint" or "generator"'):
        prior.mismatch(X, prior="other")  # type: ignore[arg-type]


@pytest.mark.parametrize(("far", "method"), [(2.0, "multi_stage_nce"), (0.3, "nce")])
@pytest.mark.parametrize("loader", [True, False])
def test_without_a_method_the_distance_chooses_the_rule(far: float, method: str, loader: bool) -> None:
    data = torch.zeros(512, 1)
    prior = JointEBMPrior(Shifted(far, 40))
    result = prior.fit(list(data.split(256)) if loader else data, iterations=3, step_size=0.2, progress=False)
    assert result.method == method
    assert result.mismatch is None, "too short a run"


def test_looking_how_far_it_is_changes_no_run() -> None:
    weights = []
    for method in (None, "nce"):
        prior = make()
        prior.fit(list(X.split(16)), method, iterations=3, step_size=0.2, rng=seeded(), progress=False)
        weights.append(torch.cat([p.flatten() for p in prior.parameters()]))
    assert torch.equal(*weights)


class Slanted(nn.Module):
    """f = 3 Σ z, whatever is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        return 3 * z.sum(1) + 0 * self.unused


def test_a_run_that_made_the_prior_worse_says_so() -> None:
    data = torch.zeros(256, 1)
    prior = JointEBMPrior(Shifted(0.0, 3), [Slanted()])
    with pytest.warns(TrainingWarning, match=r'it made the prior worse.*prior="generator"'):
        result = prior.fit(data, "nce", iterations=100, batch_size=16, step_size=0.2, progress=False)
    assert result.mismatch is not None
    assert result.mismatch.worse
    assert "worse" in result.warnings[-1]
    assert "more than before" in str(result.mismatch)


def test_denoising_of_a_posterior_that_is_near_names_the_rule_to_take() -> None:
    found = measure([torch.randn(96, 3)], [torch.randn(96, 3) + 3], steps=20)
    assert found.worse
    assert 'use "nce"' in fit._went_away("fit (denoising)", "denoising", found)
    assert 'use "nce"' not in fit._went_away("fit (nce)", "nce", found)


@pytest.mark.parametrize(("draws", "joint_draws", "worse"), [(300, 300, False), (3000, 3000, True), (3000, 60, False)])
def test_worse_by_more_than_the_error_of_these_draws(draws: int, joint_draws: int, worse: bool) -> None:
    assert Mismatch((), 0.0, 0.6, 0.7, draws, joint_draws).worse is worse
    assert not Mismatch((), 0.0, 0.7, 0.6, draws, joint_draws).worse
    assert not Mismatch((), 0.0, 0.7, None, draws).worse


def test_a_run_too_short_for_stages_has_none() -> None:
    assert JointEBMPrior(Shifted(2.0, 40)).fit(torch.zeros(512, 1), iterations=2, step_size=0.2, progress=False).method == "nce"


def test_after_a_run_that_is_short_beside_its_chains_they_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose steps are cheap is compared all the same."""
    data = torch.zeros(256, 1)
    for flops, expected in ((1e11, True), (1.0, False)):
        monkeypatch.setattr(fit, "_JOINT_FLOPS", flops)
        prior = JointEBMPrior(Shifted(0.3, 3))
        found = prior.fit(data, "nce", iterations=100, batch_size=16, step_size=0.2, progress=False).mismatch
        assert found is not None
        assert (found.joint_accuracy is not None) is expected


@pytest.mark.parametrize(("method", "expected"), [("nce", 16), ("denoising", 16), ("two_stage", 336)])
def test_what_chains_after_a_run_may_cost_is_a_share_of_it(
    method: Method, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three per cent of 1,000 updates of 16, of two draws each and, by maximum likelihood, a chain of 40 steps."""
    monkeypatch.setattr(fit, "_JOINT_FLOPS", 0.0)
    config = FitConfig(iterations=1000, steps=40)
    with torch.no_grad():
        assert fit._affordable_draws(make().model, config, 16, method) == expected
