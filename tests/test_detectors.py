"""The detectors: scikit-learn's own checks, pipelines and searches; what pytorch-ood's evaluation calls."""

from __future__ import annotations

import abc
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator
from small_priors import mlp
from torch.utils.data import DataLoader, TensorDataset

from energy_prior import ArgumentError, DataWarning, JointEBMPrior, ShapeError
from energy_prior.detectors import OODDetector, OutlierDetector
from energy_prior.evaluate import detection

QUICK: dict[str, Any] = {"latent_dims": (2, 2), "hidden": 8, "iterations": 10, "fit_iterations": 3, "random_state": 0}
CHECKS: list[Any] = [check for _, check in estimator_checks_generator(OutlierDetector(**QUICK))]  # type: ignore[misc]


def rows(n: int = 200, seed: int = 0) -> np.ndarray:
    """Three columns of very different scales, two of them correlated."""
    x = np.random.default_rng(seed).normal(size=(n, 3))
    return np.stack([x[:, 0], 100 + 20 * (x[:, 0] + 0.1 * x[:, 1]), 1e-3 * x[:, 2]], axis=1)


@pytest.mark.filterwarnings("ignore")  # of data of two or three rows, and of scikit-learn's own
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.func.__name__)
def test_scikit_learns_own_check(check: Callable[[Any], None]) -> None:
    check(OutlierDetector(**QUICK))


@pytest.mark.slow
def test_outliers_among_rows() -> None:
    """What breaks the correlation is found, though each column alone is usual."""
    detector = OutlierDetector(latent_dims=(2, 2), iterations=2500, fit_iterations=100, random_state=0).fit(rows(2000))
    usual, broken = rows(300, 1), rows(300, 2)
    broken[:, 1] = rows(300, 3)[:, 1]
    assert detection(-detector.score_samples(usual), -detector.score_samples(broken)).auroc > 0.85
    assert float((detector.predict(usual) == -1).mean()) < 0.15, "0.05 of what it was fitted on"
    assert float((detector.predict(broken) == -1).mean()) > 0.4


def test_outlier_detector_in_scikit_learns_tools() -> None:
    """A pipeline, a grid search by a score that needs no labels, several processes, and a copy of a copy."""
    x = rows()
    pipeline = make_pipeline(StandardScaler(), OutlierDetector(**QUICK)).fit(x)
    assert set(pipeline.predict(x)) <= {-1, 1}
    search = GridSearchCV(
        OutlierDetector(**QUICK),
        {"hidden": [4, 8]},
        scoring=lambda e, x, y=None: float(e.score_samples(x).mean()),
        cv=2,
        n_jobs=1,
    ).fit(x)
    assert search.best_params_["hidden"] in (4, 8)
    fitted = search.best_estimator_
    again = pickle.loads(pickle.dumps(fitted))  # noqa: S301 (our own)
    np.testing.assert_array_equal(again.score_samples(x), fitted.score_samples(x))


def test_outlier_detector_around_a_prior_of_the_users() -> None:
    """It calibrates a copy; rows are observations of the prior's shape."""
    prior = JointEBMPrior(mlp())
    known = np.random.default_rng(0).uniform(size=(100, 6))
    detector: Any = clone(OutlierDetector(prior, contamination=0.1))
    detector.fit(known)
    assert not prior.calibration.is_set
    copy = JointEBMPrior(prior.generator)
    copy.load_state_dict(detector.prior_.state_dict())
    expected = copy.anomaly_score(known)
    np.testing.assert_allclose(-detector.score_samples(known), expected.double().numpy(), rtol=1e-4, atol=1e-4)
    assert float((detector.predict(known) == -1).mean()) == pytest.approx(0.1, abs=0.02)
    plain = OutlierDetector(prior, method="reconstruction").fit(known)
    assert plain.offset_ != detector.offset_
    for wrong, error, words in (
        (lambda: OutlierDetector(prior).fit(known[:, :4]), ShapeError, r"X: expected 6 features, .* got 4"),
        (lambda: OutlierDetector(prior, contamination=0.6).fit(known), ArgumentError, "contamination: expected at most 0.5"),
        (lambda: OutlierDetector(prior, method="nothing").fit(known), ArgumentError, "method: expected one of"),
        (lambda: OutlierDetector(held_out=0.99).fit(known), ArgumentError, "held_out: expected to leave 2 of the 100 rows"),
        (lambda: OutlierDetector(held_out=1.5).fit(known), ArgumentError, "held_out: expected"),
        (lambda: OutlierDetector().fit(known[:5]), ValueError, "minimum of 8 is required"),
    ):
        with pytest.raises(error, match=words):
            wrong()


def test_a_generator_that_cannot_be_copied() -> None:
    """As where torch's older `weight_norm` keeps a tensor with a history."""
    prior = JointEBMPrior(mlp())
    prior.generator.kept = torch.ones(1, requires_grad=True) * 2  # type: ignore[attr-defined]
    known = np.random.default_rng(0).uniform(size=(100, 6))
    detector = OutlierDetector(prior).fit(known)
    assert detector.prior_.generator is prior.generator
    assert detector.prior_.calibration.is_set
    assert not prior.calibration.is_set
    before = detector.score_samples(known[:3])
    with torch.no_grad():
        prior.energies[0].net[-1].bias.add_(3.0)  # type: ignore[union-attr,operator,index]
    np.testing.assert_array_equal(detector.score_samples(known[:3]), before)


def test_rows_in_any_layout_and_scores_that_draw() -> None:
    """Reversed and read-only rows; the same row has the same score again, also where posterior draws are made."""
    x, state = rows(), torch.get_rng_state()
    frozen = x.copy()
    frozen.flags.writeable = False
    for method in (None, "log_joint"):
        detector: Any = OutlierDetector(**QUICK, method=method).fit(frozen)
        scores = detector.score_samples(x)
        np.testing.assert_array_equal(detector.score_samples(frozen), scores)
        if method is None:
            np.testing.assert_allclose(detector.score_samples(x[::-1])[::-1], scores)
        np.testing.assert_array_equal(OutlierDetector(**QUICK, method=method).fit(x).score_samples(x), scores)
    assert torch.equal(torch.get_rng_state(), state)


def test_ood_detector() -> None:
    """`fit` takes the known observations of a loader; `predict` gives the prior's score."""
    prior = JointEBMPrior(mlp())
    x, y = torch.rand(60, 6), torch.arange(60) % 3 - 1
    detector = OODDetector(prior, max_samples=30)
    assert detector.requires_fit
    with pytest.raises(ArgumentError, match=r"call fit\(loader\) before"):
        detector.predict(x)
    assert detector.fit(DataLoader(TensorDataset(x, y), batch_size=16)) is detector
    assert int(prior.calibration.count) == 30
    other = JointEBMPrior(prior.generator)
    other.calibrate(x[y >= 0][:30])
    assert torch.equal(detector(x), other.anomaly_score(x))
    assert detector.to("cpu").device == torch.device("cpu")
    assert detector.set_hyperparameters(method="reconstruction").get_hyperparameters() == {"method": "reconstruction"}
    assert detector.predict(x).shape == (60,)
    for name in detector.hyperparameter_space["method"]:
        assert detector.set_hyperparameters(method=name).predict(x).shape == (60,)
    with pytest.raises(ArgumentError, match="data_loader: expected two or more known observations"):
        detector.fit([(x, -torch.ones(60))])


def test_it_counts_as_a_detector_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its evaluation asks for an instance of an abstract class; `tests/apart` runs that."""
    api = types.ModuleType("pytorch_ood.api")
    api.Detector = abc.ABCMeta("Detector", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pytorch_ood.api", api)
    assert isinstance(OODDetector(JointEBMPrior(mlp())), api.Detector)


def test_a_detector_says_what_was_trained_on() -> None:
    prior, x = JointEBMPrior(mlp()), torch.rand(64, 6)
    prior.fit(x, iterations=2, batch_size=8, step_size=0.3, progress=False)
    with pytest.warns(DataWarning, match="were trained on"):
        OODDetector(prior).fit([x])
