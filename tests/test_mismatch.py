"""How far a posterior is: figures of known Gaussians, a classifier that finds what there is and nothing else, and `fit`."""

from __future__ import annotations

import contextlib
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Shifted, X, make, seeded
from torch import Tensor, nn

from energy_prior import (
    ArgumentError,
    DenoisingEnergy,
    JointEBMPrior,
    LadderVAE,
    MLPEnergy,
    ShapeError,
    TrainingWarning,
    mismatch,
)
from energy_prior.mismatch import Mismatch, measure, tell_apart
from energy_prior.training import FitConfig, Method, fit

N = 2000
QUIET: dict[str, Any] = {"step_size": 0.2, "progress": False}


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
    assert all(layer.kl >= 0 for _ in range(3) for layer in measure([torch.randn(16, 8)] * 4, steps=0).layers)
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


@pytest.mark.parametrize(("far", "method"), [(2.0, "denoising"), (0.3, "nce")])
@pytest.mark.parametrize("loader", [True, False])
def test_without_a_method_the_distance_chooses_rule_and_energies(far: float, method: str, loader: bool) -> None:
    data = torch.zeros(512, 1)
    prior = JointEBMPrior(Shifted(far, 40))
    result = prior.fit(list(data.split(256)) if loader else data, iterations=3, step_size=0.2, progress=False)
    assert result.method == method
    assert result.mismatch is None, "too short a run"
    assert isinstance(prior.energies[0], MLPEnergy if method == "nce" else DenoisingEnergy)


@pytest.mark.slow
def test_the_rule_that_is_chosen_reaches_a_posterior_that_is_far() -> None:
    """Stages of ratios do not, in as many updates."""
    told = {}
    for method in (None, "multi_stage_nce"):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TrainingWarning)
            prior = JointEBMPrior(Shifted(2.0, 40))
            found = prior.fit(torch.zeros(512, 1), method, iterations=200, batch_size=128, **QUIET).mismatch
        assert found is not None
        assert found.far
        assert found.joint_accuracy is not None
        told[method] = found.joint_accuracy
    assert told[None] < 0.75
    assert told["multi_stage_nce"] > 0.95


def test_energies_that_are_given_or_have_learned_are_not_exchanged(tmp_path: Path) -> None:
    brief: dict[str, Any] = QUIET | {"iterations": 3}
    data = torch.zeros(512, 1)
    given = JointEBMPrior(Shifted(2.0, 40), [MLPEnergy((40,), (8,))])
    assert given.fit(data, **brief).method == "multi_stage_nce"
    learned = JointEBMPrior(Shifted(2.0, 40))
    learned.fit(data, "nce", **brief)
    assert learned.fit(data, **brief).method == "multi_stage_nce"
    changed = [JointEBMPrior(Shifted(2.0, 40)) for _ in range(3)]
    changed[0].energies[0] = MLPEnergy((40,), (8,))
    changed[1].energies.requires_grad_(False)[0].net[1].requires_grad_(True)  # type: ignore[index]
    changed[2].energies[0].register_forward_hook(lambda *_: None)
    assert [prior.fit(data, **brief).method for prior in changed] == ["multi_stage_nce"] * 3
    by_default = JointEBMPrior(Shifted(2.0, 40)).eval()
    by_default.fit(data, **brief)
    assert not any(module.training for module in by_default.energies.modules())
    assert by_default.fit(data, **brief).method == "denoising", "its own by now"
    by_default.save(tmp_path / "prior.safetensors")
    again = JointEBMPrior.load(tmp_path / "prior.safetensors", by_default.generator)
    assert isinstance(again.energies[0], DenoisingEnergy)


def test_a_run_that_does_not_begin_exchanges_nothing(tmp_path: Path) -> None:
    data = torch.zeros(512, 1)
    JointEBMPrior(Shifted(2.0, 40)).fit(data, iterations=3, run_dir=tmp_path, **QUIET)
    prior = JointEBMPrior(Shifted(2.0, 40))
    with pytest.raises(ArgumentError, match="iterations"):
        prior.fit(data, iterations=4, run_dir=tmp_path, **QUIET)
    assert isinstance(prior.energies[0], MLPEnergy)


def test_energies_that_were_exchanged_are_trained_by_one_run_alone() -> None:
    prior, data = JointEBMPrior(Shifted(2.0, 40)), torch.zeros(512, 1)
    with pytest.raises(ArgumentError, match="another run of training has not ended"):
        prior.fit(data, iterations=3, log_every=1, callback=lambda _: prior.fit(data, iterations=3, **QUIET), **QUIET)


def test_energies_that_were_exchanged_are_those_of_the_run(tmp_path: Path) -> None:
    """Random numbers come from `rng`, and a run that was stopped goes on with them."""
    often: dict[str, Any] = QUIET | {"iterations": 6, "log_every": 1, "checkpoint_every": 1}

    def run(folder: str, stop: float = math.inf) -> Tensor:
        def interrupt(entry: dict[str, float]) -> None:
            if entry["iteration"] >= stop:
                raise KeyboardInterrupt

        prior = JointEBMPrior(Shifted(2.0, 40))
        with contextlib.suppress(KeyboardInterrupt):
            prior.fit(torch.zeros(512, 1), run_dir=tmp_path / folder, rng=seeded(), callback=interrupt, **often)
        return torch.cat([p.detach().flatten() for p in prior.parameters()])

    whole = run("whole")
    assert not torch.equal(run("stopped", 3), whole)
    assert torch.equal(run("stopped"), whole)


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
    assert 'use "nce"' in fit._what_went_wrong("denoising", found, "")
    assert 'use "nce"' not in fit._what_went_wrong("nce", found, "")


def test_a_comparison_that_fails_after_a_run_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6 GiB.")

    monkeypatch.setattr(fit, "mismatch_of", too_large)
    prior = make()
    with pytest.warns(TrainingWarning, match=r"could not be compared \(CUDA out of memory"):
        result = prior.fit(X, "nce", iterations=100, batch_size=8, step_size=0.2, progress=False)
    assert result.mismatch is None
    assert float(prior.step_size) == pytest.approx(0.2)
    prior = make()
    with pytest.raises(TrainingWarning):  # warnings are errors here
        prior.fit(X, "nce", iterations=100, batch_size=8, step_size=0.2, progress=False)
    assert float(prior.step_size) == pytest.approx(0.2)
    with pytest.raises(torch.OutOfMemoryError):
        make().fit(X, iterations=100, batch_size=8, step_size=0.2, progress=False)  # before it, nothing is lost


def test_models_of_many_units_are_compared_by_few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "_MOST_NUMBERS", 40 * 40)
    few = {"iterations": 100, "batch_size": 16, "step_size": 0.2, "progress": False}
    found = JointEBMPrior(Shifted(0.3, 40)).fit(torch.zeros(256, 1), "nce", **few).mismatch
    assert found is not None
    assert found.draws == 40


def test_the_classifier_of_large_maps_takes_few_rows_and_small_maps() -> None:
    net = mismatch._Classifier([torch.Size([600, 64, 64]), torch.Size([600, 32, 32])])
    assert net.batch == 8
    assert net._size == (32, 32)
    assert mismatch._Classifier([torch.Size([8, 16, 16])]).batch == 128
    logits = mismatch._Classifier([torch.Size([2, 64, 64])])([torch.randn(2, 2, 64, 64)], torch.zeros(2))
    assert logits.shape == (2,)


def test_rows_at_once_are_as_many_as_fit_into_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    prior, rows = make(), list[int]()
    original = LadderVAE.infer
    monkeypatch.setattr(LadderVAE, "infer", lambda self, x, **k: (rows.append(len(x)), original(self, x, **k))[1])
    data = X.repeat(50, 1, 1, 1)[:300]
    prior.mismatch(data, prior="generator")
    assert max(rows) == 256
    rows.clear()
    prior.mismatch(data, prior="generator", max_memory=1.0)
    assert max(rows) == 16


@pytest.mark.parametrize(("draws", "joint_draws", "worse"), [(300, 300, False), (3000, 3000, True), (3000, 60, False)])
def test_worse_by_more_than_the_error_of_these_draws(draws: int, joint_draws: int, worse: bool) -> None:
    assert Mismatch((), 0.0, 0.6, 0.7, draws, joint_draws).worse is worse
    assert not Mismatch((), 0.0, 0.7, 0.6, draws, joint_draws).worse
    assert not Mismatch((), 0.0, 0.7, None, draws).worse
    assert not Mismatch((), 0.0, 0.6, 0.7, draws).worse, "of so many draws nobody knows"


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
