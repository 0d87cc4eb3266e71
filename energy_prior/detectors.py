"""A joint prior as a detector of scikit-learn's kind and of pytorch-ood's."""

from __future__ import annotations

__all__ = ["OODDetector", "OutlierDetector"]

import copy
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from energy_prior.checks.settings import check_count, check_share, require_extra
from energy_prior.errors import ArgumentError, ShapeError
from energy_prior.generators import LadderVAE
from energy_prior.prior import JointEBMPrior
from energy_prior.process import reproducible
from energy_prior.scores import ANOMALY_SCORES
from energy_prior.training import fit_elbo

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator, OutlierMixin
else:
    _base = require_extra("sklearn.base", "eval")
    BaseEstimator, OutlierMixin = _base.BaseEstimator, _base.OutlierMixin
_validation = require_extra("sklearn.utils.validation", "eval")


class OutlierDetector(OutlierMixin, BaseEstimator):
    """A joint prior as an outlier detector of scikit-learn: numpy in and out, −1 for outliers, +1 for inliers.

    With a prior of your own, `fit` calibrates a copy of it on X, known observations that it was not trained on. Without one,
    `fit` trains a `LadderVAE` on X, standardised, then its joint prior, and calibrates it on a part of X that it held out.

    Args:
        prior: a trained prior; None: one is trained.
        method: the score, as in `JointEBMPrior.anomaly_score`; None: its default.
        contamination: share of X that is to be called outliers, in (0, 0.5]; it sets `offset_`. As always with scikit-learn X
            is what `fit` gets: where it was trained on, more of new observations are called outliers.
        latent_dims: sizes of z_1, …, z_L of the `LadderVAE` that is trained.
        hidden: width of its nets.
        iterations: updates of its training.
        fit_iterations: updates of the energies.
        held_out: share of X that it is not trained on, in (0, 1).
        random_state: seed, or a `numpy.random.RandomState`; None: numpy's global one.

    Attributes:
        prior_: the calibrated prior.
        seed_: of everything random, drawn from `random_state`.
        offset_: `decision_function` is `score_samples` − `offset_`.
        n_features_in_: columns of X.

    Examples:
        >>> import numpy as np
        >>> X = np.random.default_rng(0).normal(size=(300, 4))
        >>> detector = OutlierDetector(latent_dims=(2, 2), hidden=16, iterations=50, fit_iterations=20, random_state=0).fit(X)
        >>> detector.predict([[9.0, -9.0, 9.0, -9.0]])
        array([-1])
    """

    def __init__(
        self,
        prior: JointEBMPrior | None = None,
        *,
        method: str | None = None,
        contamination: float = 0.05,
        latent_dims: tuple[int, ...] = (8, 4),
        hidden: int = 64,
        iterations: int = 3000,
        fit_iterations: int = 500,
        held_out: float = 0.2,
        random_state: Any = None,
    ) -> None:
        self.prior = prior
        self.method = method
        self.contamination = contamination
        self.latent_dims = latent_dims
        self.hidden = hidden
        self.iterations = iterations
        self.fit_iterations = fit_iterations
        self.held_out = held_out
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Self:
        """Trains, if there is no prior, and calibrates.

        Args:
            X: known observations, (n, features): of a prior of yours, each row an observation (features = those of `x_shape`
                in a row).
            y: not used.

        Raises:
            ValueError: if X is no such matrix, or has too few rows.
            ArgumentError: if a setting is out of range.
        """
        rows = _tensor(_validation.validate_data(self, X, dtype=np.float64, ensure_min_samples=8))
        contamination = check_share("contamination", self.contamination)
        if contamination > 0.5:
            raise ArgumentError(f"contamination: expected at most 0.5, got {contamination}.")
        self.seed_: int = int(require_extra("sklearn.utils", "eval").check_random_state(self.random_state).randint(2**31 - 1))
        if self.prior is None:
            prior, known = self._trained(rows, self.seed_)
        else:
            prior, known = _with_own_energies(self.prior), self._shaped(rows, self.prior)
        prior.calibrate(known, rng=torch.Generator().manual_seed(self.seed_))
        self.prior_: JointEBMPrior = prior
        self.offset_: float = float(np.percentile(self.score_samples(X), 100 * contamination))
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """−anomaly score, (n,), nats, float64: the lower, the more abnormal.

        Args:
            X: observations, (n, features).
        """
        _validation.check_is_fitted(self)
        rows = _tensor(_validation.validate_data(self, X, dtype=np.float64, reset=False))
        return self._scores(self._shaped(rows, self.prior_))

    def decision_function(self, X: Any) -> np.ndarray:
        """`score_samples` − `offset_`, (n,), nats: negative for outliers.

        Args:
            X: observations, (n, features).
        """
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> np.ndarray:
        """−1 for outliers, +1 for inliers, (n,), whole numbers.

        Args:
            X: observations, (n, features).
        """
        return np.where(self.decision_function(X) < 0, -1, 1)

    def _scores(self, x: Tensor) -> np.ndarray:
        rng = torch.Generator().manual_seed(self.seed_)  # for scores that draw: the same each time
        return -self.prior_.anomaly_score(x, self.method, rng=rng).double().cpu().numpy()

    def _shaped(self, x: Tensor, prior: JointEBMPrior) -> Tensor:
        """Rows as observations of a prior; of one that was trained here, standardised."""
        if self.prior is None:
            x = (x - self.mean_) / self.scale_
        if x.shape[1] != prior.x_shape.numel():
            raise ShapeError(
                f"X: expected {prior.x_shape.numel()} features, those of an observation of shape {tuple(prior.x_shape)} in a "
                f"row, got {x.shape[1]}."
            )
        return x.reshape(-1, *prior.x_shape).to(prior.device, prior.dtype)

    def _trained(self, x: Tensor, seed: int) -> tuple[JointEBMPrior, Tensor]:
        """A prior trained on a part of the rows, and the rest of them."""
        rng = torch.Generator().manual_seed(seed)
        x = x[torch.randperm(len(x), generator=rng)]
        count = max(2, round(check_share("held_out", self.held_out) * len(x)))
        if len(x) - count < 2:
            raise ArgumentError(f"held_out: expected to leave 2 of the {len(x)} rows to train on, got {self.held_out}.")
        spread = x.std(0)
        self.mean_: Tensor = x.mean(0)
        self.scale_: Tensor = torch.where(spread > 0, spread, torch.ones_like(spread))
        x = (x - self.mean_) / self.scale_
        low, high = float(x.min()), float(x.max())
        margin = max(high - low, 1.0)
        with reproducible(rng, x.device):
            vae = LadderVAE(x.shape[1:], self.latent_dims, hidden=self.hidden, x_range=(low - margin, high + margin))
            prior = JointEBMPrior(vae)
        known, held = x[count:].float(), x[:count]
        shared: dict[str, Any] = {"progress": False, "rng": rng}
        fit_elbo(vae, known, validation=held.float(), iterations=check_count("iterations", self.iterations), **shared)
        prior.fit(known, iterations=check_count("fit_iterations", self.fit_iterations), **shared)
        return prior.double(), held  # scored in double precision: scores then do not depend on the batch


def _with_own_energies(prior: JointEBMPrior) -> JointEBMPrior:
    """A copy that shares the generator alone: not every generator can be copied, or is small."""
    copied, parts = copy.copy(prior), vars(prior)
    own = {name: copy.deepcopy(part) for name, part in parts["_modules"].items() if name != "generator"}
    vars(copied)["_modules"] = {name: own.get(name, part) for name, part in parts["_modules"].items()}
    vars(copied)["_buffers"] = copy.deepcopy(parts["_buffers"])
    return copied


def _tensor(X: np.ndarray) -> Tensor:
    """Rows as a tensor, whatever their strides and whether they may be written to."""
    return torch.from_numpy(np.require(X, np.float64, ["C", "W"]))


class OODDetector:
    """A joint prior as a detector of pytorch-ood 0.4: `fit(loader)`, `predict(x)`, higher = more out of distribution.

    It counts as a `pytorch_ood.api.Detector` where that was imported before, so that library's benchmarks take it.

    Args:
        prior: a trained prior. `fit` calibrates it.
        method: the score, as in `JointEBMPrior.anomaly_score`; None: its default.
        max_samples: observations of the loader that `fit` calibrates on, ≥ 2.

    Examples:
        >>> from energy_prior import load_example
        >>> prior = load_example()
        >>> loader = [(prior.sample(32, prior="generator"), torch.zeros(32))]  # known images, which have labels ≥ 0
        >>> OODDetector(prior).fit(loader).predict(torch.rand(4, 1, 8, 8)).shape
        torch.Size([4])
    """

    requires_fit = True
    info = None
    hyperparameter_space: ClassVar[dict[str, list[Any]]] = {"method": ["tails", *ANOMALY_SCORES]}

    def __init__(self, prior: JointEBMPrior, method: str | None = None, *, max_samples: int = 10_000) -> None:
        self.prior = prior
        self.method = method
        self.max_samples: int = check_count("max_samples", max_samples, least=2)
        if (api := sys.modules.get("pytorch_ood.api")) is not None:
            api.Detector.register(type(self))

    def fit(self, data_loader: Iterable[Any]) -> Self:
        """Calibrates the prior on known observations that it was not trained on.

        Args:
            data_loader: batches x or (x, y), x of shape (batch, *x_shape). Observations with a label y < 0 are unknown ones,
                by that library's convention, and are left out.

        Raises:
            ArgumentError: if it has fewer than two known observations.
        """
        known: list[Tensor] = []
        count = 0
        for batch in data_loader:
            x, y = batch if isinstance(batch, tuple | list) else (batch, None)
            x = x if y is None else x[y >= 0]
            known.append(x[: self.max_samples - count].to(self.prior.device))
            count += len(known[-1])
            if count >= self.max_samples:
                break
        if count < 2:
            raise ArgumentError(f"data_loader: expected two or more known observations to calibrate on, got {count}.")
        self.prior.calibrate(torch.cat(known))
        return self

    def predict(self, x: Tensor) -> Tensor:
        """The anomaly score, (batch,), nats; higher = more out of distribution.

        Args:
            x: observations, (batch, *x_shape), on any device.

        Raises:
            ArgumentError: before `fit`, unless `method` needs none.
        """
        if self.method is None and not self.prior.calibration.is_set:
            raise ArgumentError("OODDetector: call fit(loader) before predict(x), with known observations.")
        return self.prior.anomaly_score(x.to(self.prior.device), self.method)

    def __call__(self, x: Tensor) -> Tensor:
        """The same as `predict`."""
        return self.predict(x)

    @property
    def device(self) -> torch.device:
        """Where the prior is."""
        return self.prior.device

    def to(self, device: str | torch.device) -> Self:
        """Moves the prior.

        Args:
            device: where to.
        """
        self.prior.to(device)
        return self

    def get_hyperparameters(self) -> dict[str, Any]:
        """The score's name."""
        return {"method": self.method}

    def set_hyperparameters(self, *, method: str) -> Self:
        """Sets the score's name.

        Args:
            method: as in `JointEBMPrior.anomaly_score`.
        """
        self.method = method
        return self
