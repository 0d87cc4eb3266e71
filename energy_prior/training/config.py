"""Settings of `prior.fit`, validated before the first step."""

from __future__ import annotations

__all__ = ["FitConfig", "Method"]

from dataclasses import dataclass
from typing import Literal, get_args

from energy_prior._util import check_count, check_positive
from energy_prior.errors import ArgumentError

Method = Literal["nce", "two_stage"]


@dataclass(frozen=True)
class FitConfig:
    """Settings of two-stage learning. The defaults are meant to be safe; none needs tuning per seed.

    Attributes:
        iterations: updates of the energies, ≥ 1.
        batch_size: posterior draws, and as many prior draws, per update, ≥ 1.
        learning_rate: of AdamW, > 0, after a linear warm-up and with cosine decay to a tenth of it.
        weight_decay: of AdamW, ≥ 0.
        warmup: iterations of the linear warm-up, ≥ 0.
        energy_penalty: c ≥ 0 of the penalty c·E[(Σ_i f_i)²] over posterior and prior draws: energies are only defined up
            to a constant, and this keeps it, and their magnitude, near 0.
        gradient_clip: largest norm of an update's gradient, > 0.
        ema_decay: d in [0, 1) of the running average of the weights, a ← d a + (1 − d) w, which is what the prior uses;
            early on d is at most (1 + t)/(10 + t).
        max_energy: largest |f_i| in nats on a training batch, > 0; beyond it the run has diverged and stops.
        steps: Langevin steps per prior draw ("two_stage"), ≥ 1.
        persistent: chains kept from update to update ("two_stage"; Tieleman, ICML 2008): each update takes `batch_size` of
            them where they stood and runs them on. 0: every chain starts ancestrally.
        restart: share of the persistent chains taken up that start again ancestrally, in [0, 1].
        step_size: fixed Langevin step size, > 0; None: tuned while training.
        target_acceptance: MALA acceptance that the tuning of the step size aims at, in (0, 1).
        log_every: iterations between looks at the run, each with an entry in the history and a check that nothing has
            diverged, ≥ 1.
        progress: show a progress bar.
    """

    iterations: int = 2000
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    warmup: int = 100
    energy_penalty: float = 1e-3
    gradient_clip: float = 1.0
    ema_decay: float = 0.99
    max_energy: float = 1e3
    steps: int = 60
    persistent: int = 0
    restart: float = 0.05
    step_size: float | None = None
    target_acceptance: float = 0.9
    log_every: int = 20
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "steps", "log_every"):
            check_count(name, getattr(self, name))
        for name in ("warmup", "persistent"):
            check_count(name, getattr(self, name), least=0)
        if 0 < self.persistent < self.batch_size:
            raise ArgumentError(
                f"persistent: expected 0 or at least batch_size = {self.batch_size} chains, got {self.persistent}."
            )
        if not 0 <= self.restart <= 1:
            raise ArgumentError(f"restart: expected a share in [0, 1], got {self.restart!r}.")
        for name in ("learning_rate", "gradient_clip", "max_energy"):
            check_positive(name, getattr(self, name))
        for name in ("weight_decay", "energy_penalty"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ArgumentError(f"{name}: expected a finite number of at least 0, got {getattr(self, name)!r}.")
        if self.step_size is not None:
            check_positive("step_size", self.step_size)
        if not 0 <= self.ema_decay < 1:
            raise ArgumentError(f"ema_decay: expected a number in [0, 1), got {self.ema_decay!r}.")
        if not 0 < self.target_acceptance < 1:
            raise ArgumentError(f"target_acceptance: expected a number between 0 and 1, got {self.target_acceptance!r}.")


def check_method(method: str) -> Method:
    """The method, if there is such a one."""
    if method not in get_args(Method):
        raise ArgumentError(f"method: expected one of {get_args(Method)}, got {method!r}.")
    return method  # type: ignore[return-value]
