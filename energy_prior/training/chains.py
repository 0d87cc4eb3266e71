"""The chains of a run: prior and posterior draws, with step sizes tuned by their acceptance, and chains that persist."""

from __future__ import annotations

__all__ = ["TrainingChains"]

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from energy_prior.checks import arguments as validate
from energy_prior.errors import ArgumentError
from energy_prior.langevin import (
    LARGEST_STEP,
    ChainResult,
    ChainSettings,
    choose_backend,
    sample_target,
    tune_step_size,
)
from energy_prior.model import JointModel
from energy_prior.process import frozen
from energy_prior.protocol import find_infer
from energy_prior.topdown import TopDown, ancestral
from energy_prior.training.config import FitConfig

_STEP_GAIN = 0.1
_SMALLEST_STEP = 1e-4
_TUNING_BATCH = 64
_BANK = 4


class TrainingChains:
    """Draws of the joint prior and of the posterior, as their model is now.

    The prior's step size is nudged after every chain, log s += 0.1 (acceptance − target); the posterior's chains adapt
    their own, and the next ones start from the mean of where they ended.

    Args:
        model: generator and energies.
        config: settings of the run.
        step_size: where the prior's step size starts.
    """

    def __init__(self, model: JointModel, config: FitConfig, step_size: float) -> None:
        self.model, self.config = model, config
        with torch.no_grad(), frozen(model.generator):
            self.device = TopDown(model.generator, 1).reference.device
        self.step_size = config.step_size or step_size
        self.posterior_step_size = step_size
        self.backend: str | None = None
        self.bank: tuple[Tensor, ...] | None = None
        self.last: ChainResult | None = None
        self.last_posterior: ChainResult | None = None
        self.drift_norm = torch.zeros(())

    def tune(self) -> None:
        """Starts both step sizes at the one with the target acceptance on the prior as it is."""
        model = self.model
        with self._full_precision(), torch.no_grad(), frozen(model.generator, *model.energies):
            self.step_size = tune_step_size(
                model.target(_TUNING_BATCH), start_step_size=self.step_size, target_acceptance=self.config.target_acceptance
            )
        self.posterior_step_size = self.step_size

    def ancestral(self, n: int) -> tuple[Tensor, ...]:
        """Draws of the generator's own prior, (z_1, …, z_L)."""
        with self._full_precision(), torch.no_grad(), frozen(self.model.generator):
            return ancestral(self.model.generator, n).latents

    def prior(self, n: int, steps: int) -> tuple[Tensor, ...]:
        """Draws of the joint prior after `steps` Langevin steps: of persistent chains, or from an ancestral start."""
        self._choose_backend(n, steps)
        persistent = _BANK * n if self.config.persistent is None else self.config.persistent
        if not persistent:
            return self.run(self.ancestral(n), steps)
        if n > persistent:
            raise ArgumentError(f"persistent: expected 0 or at least as many chains as a batch has, {n}, got {persistent}.")
        missing = persistent - (0 if self.bank is None else len(self.bank[0]))
        if missing > 0:  # all of them at first; some, where a loader's first batch was its small last one
            fresh = self.run(self.ancestral(missing), self.config.steps)
            self.bank = fresh if self.bank is None else tuple(torch.cat(pair) for pair in zip(self.bank, fresh, strict=True))
        assert self.bank is not None  # noqa: S101 (missing was positive if it was)
        total = len(self.bank[0])
        rows = torch.randperm(total, device=self.bank[0].device)[:n]
        again = torch.rand(n, device=rows.device) < (self.config.restart or 0.0)
        start = [
            torch.where(again.reshape(-1, *([1] * (old.ndim - 1))), new, old[rows])
            for new, old in zip(self.ancestral(n), self.bank, strict=True)
        ]
        draws = self.run(start, steps)
        for kept, z in zip(self.bank, draws, strict=True):
            kept[rows] = z
        return draws

    def posterior(self, x: Tensor) -> tuple[Tensor, ...]:
        """Langevin draws of p(z | x), from a draw of q_ω where there is one, else ancestral."""
        model = self.model
        self._choose_backend(len(x), self.config.posterior_steps)
        with self._full_precision(), torch.no_grad(), frozen(model.generator, *model.energies):
            start = validate.checked_infer(model.generator, x).latents if find_infer(model.generator) else None
            settings = ChainSettings(
                steps=self.config.posterior_steps, max_drift=self.config.taming, backend=self.backend or "eager"
            )
            target = model.target(len(x), x=x)
            draw = sample_target(target, settings, default_step_size=self.posterior_step_size, start=start)
        self.last_posterior = draw.result
        if draw.result is not None:
            mean = float(draw.result.step_size.log().mean().exp())
            self.posterior_step_size = min(max(mean, _SMALLEST_STEP), LARGEST_STEP)
        return draw.latents

    def run(self, start: Sequence[Tensor], steps: int) -> tuple[Tensor, ...]:
        """A short prior chain from `start`; nudges the step size towards the target acceptance."""
        model, config = self.model, self.config
        with self._full_precision(), torch.no_grad(), frozen(model.generator, *model.energies):
            settings = ChainSettings(
                steps=steps,
                step_size=self.step_size,
                max_drift=config.taming,
                backend=self.backend or "eager",
            )
            target = model.target(len(start[0]))
            draw = sample_target(target, settings, default_step_size=self.step_size, start=start, trace=True)
            if draw.result is not None and draw.result.drift_norm is not None:
                size = sum(y[0].numel() for y in draw.result.position)
                self.drift_norm = draw.result.drift_norm.mean() / math.sqrt(size)
        self.last = draw.result
        if config.step_size is None and draw.result is not None and draw.result.acceptance is not None:
            accepted = float(draw.result.acceptance.mean())
            grown = self.step_size * math.exp(_STEP_GAIN * (accepted - config.target_acceptance))
            self.step_size = min(max(grown, _SMALLEST_STEP), LARGEST_STEP)
        return draw.latents

    def _full_precision(self) -> AbstractContextManager[Any]:
        """No mixed precision in chains: densities of hundreds of nats and their differences do not fit in bf16."""
        return torch.autocast(self.device.type, enabled=False)

    def _choose_backend(self, rows: int, steps: int) -> None:
        """How this run's chains make their steps, by the first of them; kept in checkpoints: a resumed run does not switch."""
        if self.backend is None:
            with self._full_precision(), torch.no_grad(), frozen(self.model.generator, *self.model.energies):
                target = self.model.target(rows)
                self.backend = choose_backend(self.config.backend, target, self.config.iterations * steps)

    def figures(self) -> dict[str, Tensor]:
        """Of the last chains: acceptance, share of tamed steps, and drift norm per √dimension."""
        figures: dict[str, Tensor] = {}
        if self.last is not None and self.last.acceptance is not None:
            figures["acceptance"] = self.last.acceptance.mean()
            figures["drift_norm"] = self.drift_norm
            if self.last.cut_share is not None:
                figures["tamed"] = self.last.cut_share.mean()
        if self.last_posterior is not None and self.last_posterior.acceptance is not None:
            figures["posterior_acceptance"] = self.last_posterior.acceptance.mean()
            if self.last_posterior.cut_share is not None:
                figures["posterior_tamed"] = self.last_posterior.cut_share.mean()
        return figures

    def state(self) -> dict[str, Any]:
        """Step sizes and persistent chains."""
        steps: dict[str, Any] = {"step_size": self.step_size, "posterior_step_size": self.posterior_step_size}
        steps["backend"] = self.backend
        return steps | ({"bank": list(self.bank)} if self.bank is not None else {})

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from such a state."""
        self.step_size, self.posterior_step_size = state["step_size"], state["posterior_step_size"]
        self.backend = state["backend"]
        self.bank = tuple(state["bank"]) if "bank" in state else None
