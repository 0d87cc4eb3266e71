"""Scores: many draws at once, in parts that fit into memory, and one pass down for every k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ladders import LinearLadder
from torch import Tensor, nn

from energy_prior import ArgumentError, Inferred, JointEBMPrior

X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def certain() -> JointEBMPrior:
    """A ladder of three layers whose q has no spread to speak of: every posterior draw of an observation is the same."""
    ladder = LinearLadder((3, 2, 2), seed=1)
    with torch.no_grad():
        for v in ladder.v:
            v.fill_(1e-9)
    return JointEBMPrior(ladder, ladder.energies)


def spied(prior: JointEBMPrior, name: str, monkeypatch: pytest.MonkeyPatch, of: Callable[..., Any]) -> list[Any]:
    """What `of` makes of every call of a method of the generator from now on."""
    calls: list[Any] = []
    original = getattr(LinearLadder, name)

    def spy(self: LinearLadder, *arguments: Any, **keywords: Any) -> Any:
        calls.append(of(*arguments))
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(LinearLadder, name, spy)
    return calls


SCORES: dict[str, Callable[[JointEBMPrior, float], Tensor]] = {
    "log_joint": lambda p, m: p.log_joint(X, num_samples=16, max_memory=m),
    "llr_score": lambda p, m: p.llr_score(X, 2, num_samples=16, steps=1, max_memory=m),
    "llr_scores": lambda p, m: p.llr_scores(X, num_samples=16, steps=0, max_memory=m),
    "anomaly_score": lambda p, m: p.anomaly_score(X, posterior={"max_memory": m}),
    "score_terms": lambda p, m: p.score_terms(X, num_samples=16, posterior={"max_memory": m}).log_joint(),
}


@pytest.mark.parametrize("name", SCORES)
def test_draws_go_through_together_in_parts_that_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prior, rows = certain(), 16 * len(X)
    SCORES[name](prior, 1e9)  # what a row needs has been counted now
    sizes = spied(prior, "infer", monkeypatch, lambda x: len(x))
    whole = SCORES[name](prior, 1e9)
    assert sizes == [rows]
    sizes.clear()
    parts = SCORES[name](prior, 3000)
    assert 1 < max(sizes) < rows / 2
    assert sum(sizes) == rows
    if not name.startswith("llr"):  # whose other term is a draw of the prior
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("memory", [1e9, 3000])
def test_every_observation_has_its_own_draws(memory: float) -> None:
    """Each row of several is what it is alone, whatever part its draws are in."""
    prior = certain()
    scores: list[Callable[[Tensor, int], Tensor]] = [
        lambda x, n: prior.log_joint(x, num_samples=n, max_memory=memory),
        lambda x, n: prior.anomaly_score(x, "reconstruction", num_samples=n, posterior={"max_memory": memory}),
        lambda x, n: prior.score_terms(x, num_samples=n, posterior={"max_memory": memory}).log_prior,
    ]
    for score in scores:
        alone = torch.cat([score(X[i : i + 1], 1) for i in range(len(X))])
        torch.testing.assert_close(score(X, 7), alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SCORES)
def test_the_first_call_gives_what_later_ones_give(name: str) -> None:
    """Counting what a pass needs draws nothing that shows, and is of these energies, not of others around one generator."""
    prior = certain()
    other = JointEBMPrior(prior.generator, [Wide(d) for d in (3, 2, 2)])
    for one in (prior, other, prior):
        state = torch.get_rng_state()
        first = SCORES[name](one, 1e4)
        torch.set_rng_state(state)
        assert torch.equal(SCORES[name](one, 1e4), first)
    torch.manual_seed(0)
    alone = SCORES[name](JointEBMPrior(certain().generator, other.energies), 1e4)
    torch.manual_seed(0)
    assert torch.equal(SCORES[name](other, 1e4), alone)


class Wide(nn.Module):
    """An energy that needs more memory than all the rest."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.net = nn.Linear(units, 500, dtype=torch.float64)

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z).tanh().mean(1)


def test_one_layer() -> None:
    ladder = LinearLadder((3,), seed=1)
    terms = JointEBMPrior(ladder, ladder.energies).score_terms(X)
    assert terms.log_prior.shape == (5, 1)
    assert terms.log_q is not None


def test_every_k_shares_the_posterior_draw_and_the_pass_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers passed: 3 for L^{>0}, 2 on the way down, and for k = 1, 2, 3 a draw of k layers and the pass through it."""
    prior = certain()
    prior.llr_scores(X, steps=0)
    rows = spied(prior, "infer", monkeypatch, lambda x: len(x))
    passed = spied(prior, "descend", monkeypatch, lambda state, z, layer: len(z))
    prior.llr_scores(X, steps=0)
    assert rows == [8 * len(X)]
    assert passed.count(rows[0]) == 3 + 2 + (0 + 1) + (1 + 2) + (2 + 3)


def test_options_of_a_chain_without_steps_are_checked_as_those_of_any_other() -> None:
    with pytest.raises(ArgumentError, match='"tf32" needs a CUDA device'):
        certain().llr_scores(X, steps=0, precision="tf32")


@pytest.mark.parametrize("chain", [{"steps": 0}, {"steps": 60, "step_size": 0.6, "adjust": True}])
def test_all_k_agree_with_each_k_alone(chain: dict[str, Any]) -> None:
    prior = certain()
    together = prior.llr_scores(X, num_samples=1500, rng=torch.Generator().manual_seed(1), **chain)
    alone = [prior.llr_score(X, k, num_samples=1500, rng=torch.Generator().manual_seed(k), **chain) for k in (1, 2, 3)]
    torch.testing.assert_close(together, torch.stack(alone, 1), rtol=0.15, atol=2.0)


def test_the_last_layer_needs_no_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = certain()
    draws = spied(prior, "infer", monkeypatch, lambda *_: 1)
    assert bool(torch.isfinite(prior.log_joint(X, 3, steps=2)).all())
    assert not draws


def test_latents_of_inference_mode_are_held_in_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose gradient has to keep them: below z_2 the state is z_2 z_3."""
    prior = certain()
    original = LinearLadder.infer
    monkeypatch.setattr(LinearLadder, "infer", torch.inference_mode()(original))
    monkeypatch.setattr(LinearLadder, "descend", lambda self, state, z, layer: state * z if layer == 2 else z)
    assert bool(torch.isfinite(prior.llr_score(X, 2, steps=2)).all())


def test_what_infer_hands_over_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An inference model that goes down through the generator gives its pass: L^{>0} needs no other one."""
    prior = certain()
    plain = prior.log_joint(X)
    original = LinearLadder.infer

    def infer(self: LinearLadder, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        found = original(self, x, rng=rng)
        above = (*found.latents[1:], self.start(len(x)))
        conditionals = tuple(self.conditional(z, i) for i, z in enumerate(above, start=1))
        return Inferred(found.latents, found.log_q, conditionals, found.latents[0])

    monkeypatch.setattr(LinearLadder, "infer", infer)
    prior.log_joint(X)
    layers = spied(prior, "descend", monkeypatch, lambda *_: 1)
    torch.testing.assert_close(prior.log_joint(X), plain, rtol=1e-6, atol=1e-6)
    assert not layers


def test_means_stand_for_skipped_layers() -> None:
    """L^{>k} written out: z_i = μ_i(z_{>i}) for i <= k below the posterior's z_{>k}, which is nearly certain here."""
    prior = certain()
    ladder = prior.generator
    assert isinstance(ladder, LinearLadder)
    q = ladder.infer(X).latents
    means = prior.llr_scores(X, num_samples=2, skipped="mean")
    whole = prior.log_joint(X, 0, num_samples=1)
    for k in (1, 2, 3):
        with torch.no_grad():
            state, z, log_prior = ladder.start(len(X)), [Tensor()] * 3, torch.zeros(len(X), dtype=torch.float64)
            for i in (3, 2, 1):
                conditional = ladder.conditional(state, i)
                z[i - 1] = conditional.mean if i <= k else q[i - 1]
                log_prior = log_prior + conditional.log_prob(z[i - 1]).sum(1)
                state = ladder.descend(state, z[i - 1], i)
            own = ladder.likelihood(state).log_prob(X) + log_prior + prior.negative_energy(z).sum(1)
        torch.testing.assert_close(prior.log_joint(X, k, num_samples=1, skipped="mean"), own, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(means[:, k - 1], whole - own, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(prior.llr_score(X, k, num_samples=1, skipped="mean"), whole - own, rtol=1e-5, atol=1e-5)


def test_means_have_no_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = certain()
    with pytest.raises(ArgumentError, match=r'^steps: skipped="mean" runs no chain'):
        prior.llr_score(X, 1, skipped="mean", steps=10)
    with pytest.raises(ArgumentError, match=r"^skipped: expected one of \('draw', 'mean'\), got 'mode'"):
        prior.log_joint(X, 1, skipped="mode")  # type: ignore[arg-type]
    sizes = spied(prior, "infer", monkeypatch, lambda x: len(x))
    small = prior.llr_scores(X, num_samples=16, skipped="mean", posterior={"max_memory": 3000})
    assert max(sizes) < 16 * len(X), "in parts that fit"
    torch.testing.assert_close(small, prior.llr_scores(X, num_samples=1, skipped="mean"), rtol=1e-5, atol=1e-5)
