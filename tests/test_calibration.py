"""The calibrated score: tail probabilities against their definition, what it depends on, and what it sees."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_priors import enliven, mlp
from torch import Tensor

from energy_prior import DataWarning, JointEBMPrior, LadderVAE, ShapeError, fit_elbo
from energy_prior.calibration import Calibration, PassTerms
from energy_prior.evaluate import detection

LIKE = torch.zeros((), dtype=torch.float64)
TERMS = ("reconstruction", "rate", "negative_energy", "norms")


def terms_of(columns: Tensor, norms: Tensor) -> PassTerms:
    return PassTerms(columns[:, 0], columns[:, 1], columns[:, 2], norms)


def known(n: int = 4000, seed: int = 0) -> PassTerms:
    """Exponential terms, of which every tail is known, and correlated Gaussian norms."""
    g = torch.Generator().manual_seed(seed)
    columns = -torch.rand(n, 3, dtype=torch.float64, generator=g).log() * torch.tensor([1.0, 20.0, 0.1])
    norms = torch.randn(n, 2, dtype=torch.float64, generator=g) @ torch.tensor([[1.0, 0.9], [0.0, 0.3]]).double() + 5
    return terms_of(columns, norms)


def calibrated(terms: PassTerms) -> Calibration:
    calibration = Calibration(1, LIKE)
    calibration.set_from(terms)
    return calibration


def test_surprises_are_tail_probabilities() -> None:
    """Of exponential terms −log P(T ≥ t) = t/scale, below the 95% quantile where it is counted and far beyond it."""
    at = torch.tensor([[0.1, 20.0, 0.25], [2.0, 60.0, 0.7], [9.0, 300.0, 1.2]], dtype=torch.float64)
    found = calibrated(known()).explain(terms_of(at, known(3).norms))
    expected = at / torch.tensor([1.0, 20.0, 0.1])
    for i, name in enumerate(TERMS[:3]):
        torch.testing.assert_close(getattr(found, name), expected[:, i], rtol=0.12, atol=0.05)
    torch.testing.assert_close(found.score, torch.as_tensor(sum(getattr(found, name) for name in TERMS)))


def test_norms_count_where_they_are_small() -> None:
    """Against the law of D² = Σ_j min(z_j, 0)² of two independent normals: P(D > d) = e^(−d²/2)/4 + (1 − Φ(d))."""
    g = torch.Generator().manual_seed(0)
    norms = torch.randn(20_000, 2, dtype=torch.float64, generator=g) * torch.tensor([3.0, 0.2]).double() + 5
    usual = torch.zeros(4, 3, dtype=torch.float64)
    z = torch.tensor([[-1.0, 0.0], [-1.0, -1.5], [-1.0, 3.0], [4.0, 4.0]]).double()
    at = norms.mean(0) + z * norms.std(0)
    found = calibrated(terms_of(torch.zeros(20_000, 3, dtype=torch.float64), norms)).explain(terms_of(usual, at)).norms
    d = z.clamp_max(0).square().sum(1).sqrt()
    law = (-d.square() / 2).exp() / 4 + (1 - torch.distributions.Normal(0, 1).cdf(d))
    torch.testing.assert_close(found[:3], -law[:3].log(), rtol=0.1, atol=0.05)
    assert float(found[3]) < 0.3, "what is large is no surprise: −log of the share that is not small, at most"


def test_calibration_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = calibrated(known())
    before = {name: value.clone() for name, value in calibration.named_buffers()}
    monkeypatch.setattr(torch, "quantile", lambda *args, **options: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        calibration.set_from(known(seed=1))
    assert all(torch.equal(before[name], value) for name, value in calibration.named_buffers())


def test_half_of_the_known_are_below_the_threshold_of_a_half() -> None:
    calibration = calibrated(known())
    others = calibration.explain(known(seed=1)).score
    for quantile in (0.5, 0.9, 0.99):
        assert float((others <= calibration.threshold(quantile)).double().mean()) == pytest.approx(quantile, abs=0.02)


@pytest.mark.parametrize(
    ("n", "layers", "share"), [(50, 2, 0.1), (100, 2, 0.07), (200, 2, 0.06), (200, 8, 0.06), (400, 30, 0.055), (1000, 2, 0.05)]
)
def test_few_observations_of_many_layers(n: int, layers: int, share: float) -> None:
    """About a twentieth of new known observations is above the threshold of 95%, more where few were calibrated on."""
    g = torch.Generator().manual_seed(0)
    root = torch.randn(1 + layers, 1 + layers, dtype=torch.float64, generator=g)

    def some(count: int) -> PassTerms:
        columns = -torch.rand(count, 3, dtype=torch.float64, generator=g).log()
        return terms_of(columns, torch.randn(count, 1 + layers, dtype=torch.float64, generator=g) @ root)

    flagged = []
    for _ in range(20):
        calibration = Calibration(layers, LIKE)
        calibration.set_from(some(n))
        flagged.append(float((calibration.explain(some(4000)).score > calibration.threshold(0.95)).double().mean()))
    assert sum(flagged) / 20 == pytest.approx(share, abs=0.02)


def test_rounding_of_equal_terms_surprises_nobody() -> None:
    columns, norms = torch.full((300, 3), 1.2345678), torch.full((300, 2), -7.0)
    columns[:6, 2] = torch.nextafter(columns[:6, 2], torch.tensor(9.0))  # 2% of them
    calibration = Calibration(1, torch.zeros(()))
    calibration.set_from(terms_of(columns, norms))
    up, down = torch.nextafter(columns[10:12], torch.tensor(9.0)), torch.nextafter(norms[:2], torch.tensor(-9.0))
    assert float(calibration.explain(terms_of(up, down)).score.max()) < 0.02
    off = calibration.explain(terms_of(columns[10:12] + 0.1, norms[:2]))
    assert 2.9 < float(off.negative_energy.max()) < 4, "in nats, not in units of rounding"


def test_terms_that_do_not_vary_surprise_nobody() -> None:
    """Energies that are 0, and norms that are all the same: no NaN, and no surprise at the same value."""
    columns, norms = torch.zeros(50, 3, dtype=torch.float64), torch.full((50, 2), -7.0, dtype=torch.float64)
    columns[:, 0] = torch.linspace(0, 1, 50)
    found = calibrated(terms_of(columns, norms)).explain(terms_of(columns[:4], norms[:4]))
    assert float(found.negative_energy.max()) < 0.01
    assert float(found.norms.max()) < 0.01
    assert bool(torch.isfinite(found.score).all())
    far = calibrated(terms_of(columns, norms)).explain(terms_of(columns[:1] + 1.0, norms[:1]))
    assert bool(torch.isfinite(far.score).all())
    assert float(far.negative_energy) > 1


def test_terms_of_a_pass_at_the_means() -> None:
    """Against a `LadderVAE`'s nets by hand."""
    vae = mlp().double().eval()
    prior = JointEBMPrior(vae)
    for f in prior.energies:
        enliven(f)
    x = torch.rand(7, 6, dtype=torch.float64)
    prior.calibrate(torch.rand(30, 6, dtype=torch.float64))
    seen: list[PassTerms] = []
    prior.calibration.explain = lambda terms: seen.append(terms) or Calibration.explain(prior.calibration, terms)  # type: ignore[method-assign]
    prior.anomaly_score(x)
    with torch.no_grad():
        q1 = vae._normal(vae.inference[0](x))
        q2 = vae._normal(vae.inference[1](q1.loc))
        p1 = vae._normal(vae.prior[0](q2.loc))
        log_q = q1.log_prob(q1.loc).sum(1) + q2.log_prob(q2.loc).sum(1)
        log_p = p1.log_prob(q1.loc).sum(1) + torch.distributions.Normal(0, 1).log_prob(q2.loc).sum(1)
        likelihood = vae.likelihood(q1.loc)
        noise = (q1.loc - p1.loc) / p1.scale, q2.loc
    (terms,) = seen
    torch.testing.assert_close(terms.reconstruction, -likelihood.log_prob(x))
    torch.testing.assert_close(terms.rate, log_q - log_p)
    torch.testing.assert_close(terms.negative_energy, -prior.negative_energy((q1.loc, q2.loc)).sum(1).detach())
    norms = [(x - likelihood.mean).square().sum(1), *(e.square().sum(1) for e in noise)]
    torch.testing.assert_close(terms.norms, torch.stack(norms, 1).log())


def test_a_score_depends_on_neither_seed_nor_batch() -> None:
    prior = JointEBMPrior(mlp())
    prior.calibrate(torch.rand(50, 6))
    x = torch.rand(20, 6)
    whole = prior.anomaly_score(x, rng=torch.Generator().manual_seed(1))
    torch.testing.assert_close(prior.anomaly_score(x[3:5]), whole[3:5], rtol=1e-4, atol=1e-4)
    assert torch.equal(prior.anomaly_score(x), whole)
    assert torch.equal(whole, prior.explain(x).score)


def test_the_default_is_log_joint_until_it_is_calibrated(tmp_path: Path) -> None:
    prior, x = JointEBMPrior(mlp()), torch.rand(20, 6)
    plain = prior.anomaly_score(x, rng=torch.Generator().manual_seed(1))
    assert torch.equal(plain, prior.anomaly_score(x, "log_joint", rng=torch.Generator().manual_seed(1)))
    prior.calibrate(torch.rand(50, 6))
    score = prior.anomaly_score(x)
    assert torch.equal(score, prior.anomaly_score(x, "tails"))
    prior.save(tmp_path / "a.safetensors")
    again = JointEBMPrior.load(tmp_path / "a.safetensors", prior.generator)
    assert torch.equal(again.anomaly_score(x), score)
    assert again.threshold(0.9) == prior.threshold(0.9)


class WithoutMean(LadderVAE):
    """Its likelihood has no mean, or a NaN where others have one, and it has no inference model."""

    nan = False

    infer = None  # type: ignore[assignment]

    def likelihood(self, state: Tensor) -> Any:
        base = torch.distributions.Normal(super().likelihood(state).mean, 0.5)
        return meanless(torch.distributions.Independent(base, 1), self.nan)


def meanless(base: Any, nan: bool = False) -> Any:
    """The same distribution without a mean, or with one of NaN, as that of Cauchy is."""

    class NoMean(torch.distributions.Independent):
        @property
        def mean(self) -> Tensor:
            if nan:
                return torch.full_like(base.mean, torch.nan)
            raise NotImplementedError

    return NoMean(base.base_dist, base.reinterpreted_batch_ndims)


@pytest.mark.parametrize("nan", [False, True])
def test_generators_without_a_mean_or_without_infer(nan: bool) -> None:
    generator = WithoutMean((6,), latent_dims=(4, 3), hidden=16)
    generator.nan = nan
    prior = JointEBMPrior(generator)
    chain: Any = {"posterior": {"steps": 4}}
    prior.calibrate(torch.rand(40, 6), rng=torch.Generator().manual_seed(0), **chain)
    one, same, other = (prior.anomaly_score(torch.ones(5, 6), rng=torch.Generator().manual_seed(s), **chain) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other), "a posterior draw of a chain"


def test_observations_that_were_trained_on_are_told() -> None:
    prior, x = JointEBMPrior(mlp()), torch.rand(700, 6)
    prior.fit(x, iterations=2, batch_size=8, step_size=0.3, progress=False)
    with pytest.warns(DataWarning, match="observations to calibrate on were trained on"):
        prior.calibrate(x[:300])
    prior.calibrate(torch.rand(300, 6))
    settings: Any = {"iterations": 2, "batch_size": 8, "step_size": 0.3, "progress": False}
    other = torch.rand(700, 6).numpy()
    for array in (other.astype(np.float64), other[::-1], other.astype(">f4"), other.astype(np.longdouble)):
        again = JointEBMPrior(mlp())
        again.fit(array, **settings)
        with pytest.warns(DataWarning, match="of the 100 observations"):
            again.calibrate(other[:100])
    prior.fit([torch.rand(8, 6)], iterations=2, batch_size=8, step_size=0.3, progress=False)
    with pytest.warns(DataWarning, match="of the 300 observations"):
        prior.double().calibrate(x[:300].double())


def test_too_few_observations() -> None:
    with pytest.raises(ShapeError, match="two or more observations"):
        JointEBMPrior(mlp()).calibrate(torch.rand(1, 6))
    prior = JointEBMPrior(mlp())
    prior.calibrate(torch.rand(2, 6))
    assert bool(torch.isfinite(prior.anomaly_score(torch.rand(9, 6))).all())


@pytest.mark.slow
@pytest.mark.parametrize("has_mean", [True, False])
def test_what_is_too_easy_is_seen(has_mean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noisy images are known, smooth ones unknown: they are more probable, so −L^{>0} is upside down."""
    g = torch.Generator().manual_seed(0)

    def images(n: int, noise: float) -> Tensor:
        return (0.5 + 0.1 * torch.randn(n, 1, generator=g) + noise * torch.randn(n, 36, generator=g)).clamp(0, 1)

    torch.manual_seed(0)
    vae = LadderVAE((36,), latent_dims=(4, 2), hidden=32)
    fit_elbo(vae, images(2000, 0.15), validation=images(200, 0.15), iterations=300, progress=False)
    if not has_mean:
        plain = vae.likelihood
        monkeypatch.setattr(vae, "likelihood", lambda state: meanless(plain(state)))
    prior = JointEBMPrior(vae)
    prior.calibrate(images(500, 0.15))
    usual, easy = images(300, 0.15), images(300, 0.02)
    assert detection(prior.anomaly_score(usual, "log_joint"), prior.anomaly_score(easy, "log_joint")).auroc < 0.2
    assert detection(prior.anomaly_score(usual), prior.anomaly_score(easy)).auroc > 0.9
    assert math.isclose(detection(prior.anomaly_score(usual), prior.anomaly_score(images(300, 0.15))).auroc, 0.5, abs_tol=0.08)
    explained = prior.explain(easy)
    assert float(explained.norms.mean()) > 3 * float(explained.reconstruction.mean())
