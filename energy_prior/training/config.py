"""Settings of a run of training, validated before the first step."""

from __future__ import annotations

__all__ = [
    "JOINT_METHODS",
    "LANGEVIN_METHODS",
    "METHODS",
    "FitConfig",
    "Method",
    "RunConfig",
    "check_method",
    "count_from_zero",
]

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from energy_prior._util import shown
from energy_prior.checks.settings import check_count, check_flag, check_not_negative, check_positive, real_number
from energy_prior.errors import ArgumentError

Method = Literal["denoising", "nce", "multi_stage_nce", "two_stage", "variational", "joint"]
"""The learning rules; `JointEBMPrior.fit` says what each does."""

StepBackend = Literal["auto", "eager", "compiled"]
"""Backends whose chains can be measured on the way."""

METHODS: tuple[Method, ...] = get_args(Method)
"""All of them, in this order."""
JOINT_METHODS: tuple[Method, ...] = ("variational", "joint")
"""Rules that train the generator too."""
LANGEVIN_METHODS: tuple[Method, ...] = ("two_stage", "variational", "joint")
"""Rules whose prior draws are Langevin chains on the joint prior as it is now."""


@dataclass(frozen=True)
class RunConfig:
    """What every run of training has. Numbers of any kind (numpy's, tensors of one element) are kept as Python's own.

    Attributes:
        iterations: updates, ≥ 1.
        batch_size: observations per update, process and accumulation step, ≥ 1; None: `usual_batch`, or all of them if there
            are fewer.
        learning_rate: of AdamW, > 0, after a linear warm-up of 100 iterations, or a tenth of them if fewer, and with cosine
            decay to a tenth of it; None: the task's own.
        weight_decay: of AdamW, ≥ 0.
        accumulate: batches whose gradients are averaged into one update, ≥ 1.
        log_every: iterations between looks at the run, each with an entry in the history and a check that nothing has
            diverged, ≥ 1.
        checkpoint_every: iterations between checkpoints in `run_dir`, ≥ 1.
        tensorboard: write the history to `run_dir`/tensorboard as well (extra "train").
        progress: show how far the run is: a bar where standard error is a terminal, else a line every 10 seconds at most.
        usual_batch: what `batch_size` is where none is given, of the class: 256, of `ElboConfig` 128.

    Examples:
        >>> RunConfig(iterations=100, progress=False).resumable()  # what a run must keep when it goes on
        {'iterations': 100, 'batch_size': None, 'learning_rate': None, 'weight_decay': 0.0, 'accumulate': 1, 'log_every': 20,
         'checkpoint_every': 200}
    """

    iterations: int = 2000
    batch_size: int | None = None
    learning_rate: float | None = None
    weight_decay: float = 0.0
    accumulate: int = 1
    log_every: int = 20
    checkpoint_every: int = 200
    tensorboard: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        self._keep(check_count, "iterations", "accumulate", "log_every", "checkpoint_every")
        self._keep_unless_none(check_count, "batch_size")
        self._keep_unless_none(check_positive, "learning_rate")
        self._keep(check_not_negative, "weight_decay")
        self._keep(check_flag, "tensorboard", "progress")

    def _keep(self, check: Callable[[str, Any], Any], *names: str) -> None:
        """Checks these settings, and keeps them as Python's own numbers: any other would fail later, in a file or a digest."""
        for name in names:
            object.__setattr__(self, name, check(name, getattr(self, name)))

    def _keep_unless_none(self, check: Callable[[str, Any], Any], *names: str) -> None:
        self._keep(check, *(name for name in names if getattr(self, name) is not None))

    usual_batch: ClassVar[int] = 256

    def resumable(self) -> dict[str, Any]:
        """The settings that a run must keep when it goes on: all but those that only show it."""
        shown = ("progress", "tensorboard", "sample_every")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in shown}


@dataclass(frozen=True)
class FitConfig(RunConfig):
    """Settings of `prior.fit`. The defaults are meant to be safe; none needs tuning per seed.

    Attributes:
        iterations: updates, ≥ 1.
        batch_size: posterior draws, and as many prior draws, per update, process and accumulation step, ≥ 1; None: 256, or
            all observations if there are fewer.
        learning_rate: of the energies' AdamW, > 0, after a linear warm-up of 100 iterations, or a tenth of them if fewer, and
            with cosine decay to a tenth of it; None: 2e-3 for "denoising", 1e-4 for maximum likelihood that goes on with
            energies with waymarks, else 1e-3, and 1e-3 · √(2000/iterations), up to 3e-3, where there are fewer than 2000
            iterations to get anywhere in.
        weight_decay: of the energies' AdamW, ≥ 0.
        accumulate: batches whose gradients are averaged into one update, ≥ 1.
        log_every: iterations between looks at the run, each with an entry in the history, warnings of what may go wrong and
            a check that nothing has diverged, ≥ 1.
        checkpoint_every: iterations between checkpoints in `run_dir`, ≥ 1.
        tensorboard: write the history and sample grids to `run_dir`/tensorboard as well (extra "train").
        progress: show how far the run is: a bar where standard error is a terminal, else a line every 10 seconds at most.
        ema_decay: d in [0, 1) of the running average of the weights, a ← d a + (1 − d) w, which is what the prior uses;
            early on d is at most (1 + t)/(10 + t); None: 0.999 for "denoising", else 0.99. The joint rules average the
            generator's weights as well.
        max_energy: largest |f_i| in nats on a training batch, > 0, of layers of up to 128 units, and in proportion more of
            larger ones (per unit for energies with waymarks); beyond it the run has diverged and stops. Built-in energies
            saturate before: for them it has where their mean |f_i| on posterior or on prior draws is above three quarters of
            their saturation.
        steps: Langevin steps per prior draw, ≥ 1. "multi_stage_nce": of the chains that a stage starts with.
        persistent: chains kept from update to update (Tieleman, ICML 2008): each update takes as many as a batch has, where
            they stood, and runs them on. None: four batches of them; 0: every chain starts ancestrally.
        restart_probability: with which a persistent chain that is taken up starts again ancestrally, in [0, 1]; None: 0.3, so
            that draws are 1/0.3 · `steps` steps old on average, about as old as samples (0.05 in "multi_stage_nce", whose
            chains run on a prior that stands still).
        posterior_steps: Langevin steps per posterior draw, where the posterior is sampled by Langevin, ≥ 1. These chains
            are Metropolis-adjusted and each adapts its step size, from where the last ones ended.
        step_size: fixed Langevin step size of the prior chains, > 0, which the prior keeps after the run; None: tuned while
            training, and for the prior that was learned after it.
        backend: how the chains' steps are made, as in `energy_prior.langevin.ChainSettings`: "eager", "compiled", or "auto",
            which compiles where the run is so long that it pays.
        stages: ratio estimates of "multi_stage_nce", each against samples of the prior before it, ≥ 1.
        generator_learning_rate: of the generator's AdamW in the joint rules, > 0, with the same schedule.
        sample_every: iterations between sample grids in `run_dir`/samples, ≥ 0; 0: none (extra "examples").

    Examples:
        >>> config = FitConfig(iterations=500, steps=40).for_method("two_stage")
        >>> config.learning_rate, config.restart_probability, config.ema_decay
        (0.002, 0.3, 0.99)
    """

    weight_decay: float = 1e-4
    ema_decay: float | None = None
    max_energy: float = 1e3
    steps: int = 20
    persistent: int | None = None
    restart_probability: float | None = None
    posterior_steps: int = 20
    step_size: float | None = None
    backend: StepBackend = "auto"
    stages: int = 3
    generator_learning_rate: float = 1e-4
    sample_every: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._keep(check_count, "steps", "posterior_steps", "stages")
        self._keep(count_from_zero, "sample_every")
        self._keep_unless_none(count_from_zero, "persistent")
        if self.batch_size is not None and 0 < (self.persistent or 0) < self.batch_size:
            raise ArgumentError(
                f"persistent: expected 0 or at least batch_size = {self.batch_size} chains, got {self.persistent}."
            )
        self._keep_unless_none(_share, "restart_probability")
        self._keep(check_positive, "max_energy", "generator_learning_rate")
        if self.backend not in get_args(StepBackend):
            raise ArgumentError(f"backend: expected one of {get_args(StepBackend)}, got {shown(self.backend)}.")
        self._keep_unless_none(check_positive, "step_size")
        self._keep_unless_none(_decay, "ema_decay")

    def for_method(self, method: Method, *, refined: bool = False) -> FitConfig:
        """With the method's own restart probability, and the learning rate of so long a run, where none was given.

        Args:
            method: the learning rule.
            refined: whether the energies have waymarks and have learned before.

        Raises:
            ArgumentError: if there are more stages than iterations.
        """
        if method == "multi_stage_nce" and self.stages > self.iterations:
            raise ArgumentError(f"stages: expected at most iterations = {self.iterations}, got {self.stages}.")
        restarted = 0.05 if method == "multi_stage_nce" else 0.3
        rate = 1e-3 * min(max(math.sqrt(2000 / self.iterations), 1.0), 3.0)
        if refined and method in LANGEVIN_METHODS:
            rate = 1e-4
        elif method == "denoising":
            rate = 2e-3
        return dataclasses.replace(
            self,
            restart_probability=restarted if self.restart_probability is None else self.restart_probability,
            learning_rate=rate if self.learning_rate is None else self.learning_rate,
            ema_decay=(0.999 if method == "denoising" else 0.99) if self.ema_decay is None else self.ema_decay,
        )


def check_method(method: str) -> Method:
    """The method, if there is such a one."""
    if method not in METHODS:
        raise ArgumentError(f"method: expected one of {METHODS}, got {shown(method)}.")
    return method


def count_from_zero(name: str, value: Any) -> int:
    """A whole number of at least 0, of any kind, as Python's own."""
    return check_count(name, value, least=0)


def _share(name: str, value: Any) -> float:
    number = real_number(value)
    if number is None or not 0 <= number <= 1:
        raise ArgumentError(f"{name}: expected a share in [0, 1], got {shown(value)}.")
    return number


def _decay(name: str, value: Any) -> float:
    number = real_number(value)
    if number is None or not 0 <= number < 1:
        raise ArgumentError(f"{name}: expected a number in [0, 1), got {shown(value)}.")
    return number
