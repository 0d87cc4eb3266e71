"""Two-stage learning: the generator stays as it is, the energies learn, and the prior uses their running average."""

from __future__ import annotations

__all__ = ["FitResult", "fit_energies"]

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from energy_prior._util import check_settings, frozen, training_mode
from energy_prior.energies import Energy
from energy_prior.errors import ArgumentError, DivergenceError
from energy_prior.langevin import ChainSettings, ChainState
from energy_prior.langevin.settings import LARGEST_STEP
from energy_prior.topdown import ancestral
from energy_prior.training.config import FitConfig, Method, check_method
from energy_prior.training.data import endless_batches
from energy_prior.training.objectives import energy_penalty, maximum_likelihood, noise_contrastive
from energy_prior.training.schedule import warmup_cosine

if TYPE_CHECKING:
    from energy_prior.prior import JointEBMPrior

_OBJECTIVES = {"nce": noise_contrastive, "two_stage": maximum_likelihood}
_STANDARDIZE_DRAWS = 2048
_STEP_GAIN = 0.1


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What happened in a run of `fit`.

    Attributes:
        method: the learning rule.
        config: its settings.
        history: one entry per `config.log_every` iterations, with "iteration", "loss", "gap" (mean Σf on posterior minus
            prior draws, nats), "max_energy" (largest |f_i| since the entry before, nats), "gradient_norm" (before clipping)
            and, for "two_stage", "step_size" and "acceptance" of the training chains.
        clipped: share of the iterations whose gradient was clipped, in [0, 1].
        step_size: the tuned Langevin step size that the prior uses from now on.
    """

    method: Method
    config: FitConfig
    history: list[dict[str, float]]
    clipped: float
    step_size: float


def fit_energies(
    prior: JointEBMPrior, data: Tensor | Iterable[Any], method: str, config: FitConfig | None, settings: dict[str, Any]
) -> FitResult:
    """`JointEBMPrior.fit`, which documents it. Random numbers come from torch's global stream."""
    rule = check_method(method)
    check_settings(FitConfig, settings, "a setting of fit")
    if config is not None and not isinstance(config, FitConfig):
        raise ArgumentError(f"config: expected a FitConfig or None, got {type(config).__name__}.")
    config = dataclasses.replace(config or FitConfig(), **settings)
    run = _Run(prior, endless_batches(data, config.batch_size, prior.x_shape, prior.reference), rule, config)
    with torch.inference_mode(False), torch.enable_grad(), training_mode(prior.energies):
        try:
            run.learn()
        finally:
            run.keep_average()
    step_size = prior.tune_step_size(target_acceptance=config.target_acceptance)
    return FitResult(rule, config, run.history, run.clipped / config.iterations, step_size)


class _Run:
    """One run: the weights, their running average, and the draws that they learn from."""

    def __init__(self, prior: JointEBMPrior, batches: Iterator[Tensor], method: Method, config: FitConfig) -> None:
        self.prior, self.batches, self.method, self.config = prior, batches, method, config
        self.model = prior.model
        self.weights = [p for p in prior.energies.parameters() if p.requires_grad]
        if not self.weights:
            raise ArgumentError("energies: none of their parameters requires a gradient, so there is nothing to fit.")
        self.optimizer = torch.optim.AdamW(self.weights, config.learning_rate, weight_decay=config.weight_decay)
        self.schedule = warmup_cosine(self.optimizer, config.warmup, config.iterations)
        self.average = [w.detach().clone() for w in self.weights]
        self.good = self._snapshot()
        self.history: list[dict[str, float]] = []
        self.clipped = 0
        self.step_size = config.step_size or float(prior.step_size)
        self.acceptance = math.nan
        self.bank: tuple[Tensor, ...] | None = None

    def learn(self) -> None:
        """All iterations."""
        self._standardize()
        self.good = self._snapshot()
        if self.method == "two_stage" and self.config.step_size is None:
            self.step_size = self.prior.tune_step_size(target_acceptance=self.config.target_acceptance)
        window: list[Tensor] = []
        bar = tqdm(range(1, self.config.iterations + 1), desc=f"fit ({self.method})", disable=not self.config.progress)
        for iteration in bar:
            window.append(self._update())
            if len(window) == self.config.log_every or iteration == self.config.iterations:
                table = torch.stack(window)
                self._check(iteration - len(window) + 1, table)
                self._log(iteration, table, bar)
                window = []

    def keep_average(self) -> None:
        """Puts the last good running average in place of the weights, also after an error or Ctrl-C."""
        with torch.no_grad():
            for now, good in zip((*self.weights, *self.prior.energies.buffers()), self.good, strict=True):
                now.copy_(good)

    def _snapshot(self) -> list[Tensor]:
        """The running average of the weights, and the buffers as they are."""
        return [t.detach().clone() for t in (*self.average, *self.prior.energies.buffers())]

    def _update(self) -> Tensor:
        """One iteration; returns (loss, gap, gradient norm, largest |f_1|, …, largest |f_L|)."""
        positive = self._posterior()
        negative = self._prior_draws(len(positive[0]))
        f_positive, f_negative = self.model.negative_energy(positive), self.model.negative_energy(negative)
        total_positive, total_negative = f_positive.sum(1), f_negative.sum(1)
        loss = _OBJECTIVES[self.method](total_positive, total_negative)
        penalty = self.config.energy_penalty * energy_penalty(total_positive, total_negative)
        gradient = torch.autograd.grad(loss + penalty, self.weights, allow_unused=True, materialize_grads=True)
        for weight, g in zip(self.weights, gradient, strict=True):
            weight.grad = g
        norm = nn.utils.clip_grad_norm_(self.weights, self.config.gradient_clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()
        largest = torch.cat([f_positive, f_negative]).detach().abs().amax(0)
        gap = (total_positive.mean() - total_negative.mean()).detach()
        return torch.cat([torch.stack([loss.detach(), gap, norm.detach()]), largest])

    def _average(self) -> None:
        done = self.schedule.last_epoch
        decay = min(self.config.ema_decay, (1 + done) / (10 + done))
        with torch.no_grad():
            for average, weight in zip(self.average, self.weights, strict=True):
                average.lerp_(weight, 1 - decay)

    def _posterior(self) -> tuple[Tensor, ...]:
        """Posterior draws of the next batch: q_ω, or Langevin where the generator has no inference model."""
        with torch.no_grad(), frozen(self.prior.generator, self.prior.energies):
            x = next(self.batches)
            if self.method == "two_stage" and 0 < self.config.persistent < len(x):
                raise ArgumentError(
                    f"persistent: expected 0 or at least as many chains as a batch has, {len(x)}, got {self.config.persistent}."
                )
            return self.model.posterior_draw(x).latents

    def _ancestral(self, n: int) -> tuple[Tensor, ...]:
        with torch.no_grad(), frozen(self.prior.generator):
            return ancestral(self.prior.generator, n).latents

    def _prior_draws(self, n: int) -> tuple[Tensor, ...]:
        """Draws of the generator's prior (NCE), or of the joint prior as it is now (maximum likelihood)."""
        if self.method == "nce":
            return self._ancestral(n)
        if not self.config.persistent:
            return self._chain(self._ancestral(n))
        if self.bank is None:
            self.bank = self._chain(self._ancestral(self.config.persistent))
        rows = torch.randperm(len(self.bank[0]), device=self.bank[0].device)[:n]
        again = torch.rand(n, device=rows.device) < self.config.restart
        start = [
            torch.where(again.reshape(-1, *([1] * (old.ndim - 1))), new, old[rows])
            for new, old in zip(self._ancestral(n), self.bank, strict=True)
        ]
        draws = self._chain(start)
        for kept, z in zip(self.bank, draws, strict=True):
            kept[rows] = z
        return draws

    def _chain(self, start: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A short chain from `start`; nudges the step size towards the target acceptance."""
        accepted: list[Tensor] = []

        def note(step: int, state: ChainState, acceptance: Tensor) -> None:
            accepted.append(acceptance.mean())

        with torch.no_grad(), frozen(self.prior.generator, self.prior.energies):
            settings = ChainSettings(steps=self.config.steps, step_size=self.step_size)
            density = self.model.prior_density(len(start[0]))
            draws = self.model.run(density, settings, start=start, on_step=note)
        self.acceptance = float(torch.stack(accepted[1:]).mean())
        if self.config.step_size is None:
            grown = self.step_size * math.exp(_STEP_GAIN * (self.acceptance - self.config.target_acceptance))
            self.step_size = min(grown, LARGEST_STEP)
        return draws

    def _standardize(self) -> None:
        """Tells built-in energies the scale of their layer, from posterior and prior draws in equal parts."""
        if all(not isinstance(f, Energy) or bool(f.standardized) for f in self.prior.energies):
            return
        draws: list[tuple[Tensor, ...]] = []
        while sum(len(z[0]) for z in draws) < _STANDARDIZE_DRAWS:
            draws.append(self._posterior())
            draws.append(self._ancestral(len(draws[-1][0])))
        for energy, z in zip(self.prior.energies, zip(*draws, strict=True), strict=True):
            if isinstance(energy, Energy):
                energy.standardize(torch.cat(z))

    def _check(self, first: int, window: Tensor) -> None:
        """Reads a window of iterations; stops at the first that is not sound, else remembers the average as good."""
        self.clipped += int((window[:, 2] > self.config.gradient_clip).sum())
        sound = torch.isfinite(window).all(1) & (window[:, 3:] <= self.config.max_energy).all(1)
        if bool(sound.all()):
            self.good = self._snapshot()
            return
        row = window[int((~sound).nonzero()[0])]
        iteration = first + int((~sound).nonzero()[0])
        excess = ~(row[3:] <= self.config.max_energy)
        layer = int(excess.nonzero()[0]) + 1 if bool(excess.any()) else None
        at = "the loss" if layer is None else f"f_{layer}, the energy of layer {layer},"
        value = float(row[0] if layer is None else row[2 + layer])
        raise DivergenceError(
            f"Training diverged at iteration {iteration}: {at} reached {value:.3g} (max_energy is {self.config.max_energy:g}). "
            "The "
            "energies hold their last good average. Lower learning_rate or raise energy_penalty; with custom energies, use a "
            "smooth activation and start from f = 0.",
            layer=layer,
            step=iteration,
        )

    def _log(self, iteration: int, window: Tensor, bar: Any) -> None:
        loss, gap, norm = window[-1, :3].tolist()
        entry = {"loss": loss, "gap": gap, "max_energy": float(window[:, 3:].max()), "gradient_norm": norm}
        if self.method == "two_stage":
            entry |= {"step_size": self.step_size, "acceptance": self.acceptance}
        bar.set_postfix({name: f"{value:.3g}" for name, value in entry.items()}, refresh=False)
        self.history.append({"iteration": iteration, **entry})
