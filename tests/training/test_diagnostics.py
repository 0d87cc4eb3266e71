"""Figures of the history, early warnings, and where a run is stopped."""

from __future__ import annotations

import pytest
import torch
from runs import Shifted, make, recorded, task_of

from energy_prior import DivergenceError, JointEBMPrior, MLPEnergy
from energy_prior.training import FitConfig
from energy_prior.training.diagnostics import check_sound, early_warnings, history_entry


def test_the_largest_energy_of_a_window() -> None:
    prior = make()
    figures = {name: torch.zeros(3) for name in ("loss", "energy_posterior", "energy_prior")}
    figures |= {"largest_1": torch.tensor([1.0, 5.0, 2.0]), "largest_2": torch.tensor([3.0, 0.0, 0.0])}
    chains = task_of(prior, "nce").chains
    assert "saturation" not in history_entry(figures, chains, [0.0, 0.0])  # energies of one's own
    figures |= {"saturation_1": torch.tensor([0.1, 0.1, 0.1]), "saturation_2": torch.tensor([0.0, 0.6, 0.0])}
    got = history_entry(figures, chains, [0.0, 0.0])
    assert got["max_energy"] == 5.0
    assert got["saturation"] == pytest.approx(0.2)


def test_energies_on_their_way_to_saturation_are_told() -> None:
    entry = {"max_energy": 70.0, "saturation": 0.6}
    said = early_warnings(entry, FitConfig(), 0.0)
    assert set(said) == {"saturation"}
    assert "at 60% of their saturation on average, and at 75% the run stops" in said["saturation"]
    assert early_warnings(entry | {"saturation": 0.4}, FitConfig(), 0.0) == {}


@pytest.mark.parametrize("side", ["posterior", "prior"])
def test_energies_that_run_away_on_one_side_stop_the_run(side: str) -> None:
    prior = JointEBMPrior(make().generator, [MLPEnergy(shape, (8,)) for shape in make().generator.latent_shapes])
    task = task_of(prior, "nce")
    calls = iter(["posterior", "prior"])
    one = prior.energies[0].forward

    def one_sided(z: torch.Tensor) -> torch.Tensor:
        return one(z) + (95.0 if next(calls, None) == side else 0.0)

    prior.energies[0].forward = one_sided  # type: ignore[method-assign]
    _, figures = task.loss(next(task.batches), 1)
    with pytest.raises(DivergenceError, match="f_1, the energy of layer 1, is at 95% of its saturation on average"):
        check_sound({name: value.detach()[None] for name, value in figures.items()}, 1, "nce", task.config)


def test_a_few_draws_that_are_all_told_apart_are_no_saturated_estimate() -> None:
    figures = {name: torch.zeros(2) for name in ("loss", "energy_posterior", "energy_prior", "largest_1")}
    chains = task_of(make(), "nce").chains
    for draws, told in ((8.0, False), (128.0, True)):
        window = figures | {"told_apart": torch.ones(2), "told_apart_draws": torch.full((2,), draws)}
        entry = history_entry(window, chains, [0.0, 0.0])
        assert entry["told_apart"] == pytest.approx((2 * draws + 1) / (2 * draws + 2))
        assert ("told_apart" in early_warnings(entry, FitConfig(), 0.0)) == told
        assert "told_apart_draws" not in entry


def test_a_saturated_estimate_is_told_however_few_draws_a_look_has() -> None:
    """Looks of 64 draws: the first two say little, those that follow enough; a thousand new draws replace those before."""
    figures = {name: torch.zeros(1) for name in ("loss", "energy_posterior", "energy_prior", "largest_1")}
    chains, apart = task_of(make(), "nce").chains, [0.0, 0.0]

    def look(share: float, draws: float) -> float:
        window = figures | {"told_apart": torch.full((1,), share), "told_apart_draws": torch.full((1,), draws)}
        return history_entry(window, chains, apart)["told_apart"]

    told = [look(1.0, 64.0) for _ in range(20)]
    assert told[0] == pytest.approx(65 / 66)
    assert told[1] == pytest.approx(129 / 130)
    assert told == sorted(told)
    assert apart == pytest.approx([1000.0, 1000.0])
    assert look(0.5, 1000.0) == pytest.approx(501 / 1002)


def test_chains_that_do_not_follow_the_energies_are_told() -> None:
    entry = {"max_energy": 70.0}
    said = early_warnings(entry, FitConfig(), 26.0)
    assert set(said) == {"gap"}
    assert "26 nats higher at posterior draws" in said["gap"]
    assert early_warnings(entry, FitConfig(), 24.0) == {}


def test_a_saturated_ratio_estimate_is_told_with_the_rule_to_use_instead() -> None:
    """A posterior 2σ away in each of 40 units: every draw is told apart at once. One that overlaps is not complained of."""
    told = {}
    for far in (2.0, 0.3):
        torch.manual_seed(0)
        prior = JointEBMPrior(Shifted(far, 40))
        with recorded() as said:
            result = prior.fit(torch.zeros(64, 1), "nce", iterations=100, log_every=50, batch_size=64, progress=False)
        told[far] = [text for text in said if "ratio estimate is saturated" in text]
        assert told[far] == [text for text in result.warnings if "ratio estimate is saturated" in text]
        assert 0.5 < result.history[-1]["told_apart"] <= 1.0
    assert told[0.3] == []
    assert len(told[2.0]) == 1, "once"
    assert 'method="denoising"' in told[2.0][0]
