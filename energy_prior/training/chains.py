"""The chains of a run: prior and posterior draws, with step sizes tuned by their acceptance, and chains that persist."""

from __future__ import annotations

__all__ = ["TrainingChains", "tuned_step_size"]

import contextlib
import math
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from energy_prior._util import not_none, per_row
from energy_prior.checks.arguments import checked_infer
from energy_prior.errors import ArgumentError
from energy_prior.langevin import (
    LARGEST_STEP,
    USUAL_ACCEPTANCE,
    ChainResult,
    ChainSettings,
    backends,
    choose_backend,
    crossed,
    sample_target,
    tune_step_size,
)
from energy_prior.model import JointModel
from energy_prior.process import frozen, full_precision
from energy_prior.protocol import find_infer, have_waymarks
from energy_prior.topdown import ancestral
from energy_prior.training.config import FitConfig
from energy_prior.training.state import Either, Optional, Such, positive

_STEP_GAIN = 0.1
_SMALLEST_STEP = 1e-8  # a posterior is as narrow as its likelihood
_LEAST_TUNING, _MOST_TUNING = 8, 64  # chains, and one for every two thousand of the run's draws in between
_TUNING_SHARE = 2000
_USUAL_PERSISTENT = 4  # batches


class TrainingChains:
    """Draws of the joint prior and of the posterior, as their model is now.

    The prior's step size is nudged after every chain, log s += 0.1 (acceptance − target); the posterior's chains adapt
    their own, and the next ones start from the mean of where they ended.

    Args:
        model: generator and energies; its step size is where those of the chains start.
        config: settings of the run.
        reference: a tensor with the dtype and device of the latents.

    Attributes:
        persistent: latents (z_1, …, z_L) of the chains that are kept from update to update, (chains, *latent_shape) each;
            None before the first draw.
        last: of the prior's last chain: what it says of itself.
        last_posterior: the same of the posterior's.
    """

    def __init__(self, model: JointModel, config: FitConfig, reference: Tensor) -> None:
        self.model = model
        self.config = config
        self._device = reference.device
        self.step_size: float = config.step_size or model.step_size
        self.posterior_step_size: float = model.step_size
        self.backend: str | None = None
        self.persistent: tuple[Tensor, ...] | None = None
        self.last: ChainResult | None = None
        self.last_posterior: ChainResult | None = None
        self._drift_norm = reference.new_zeros(())

    def tune(self) -> None:
        """Starts both step sizes at the one with the target acceptance on the prior as it is."""
        self.step_size = tuned_step_size(self.model, self.step_size, self.config, self._device)
        self.posterior_step_size = self.step_size

    def ancestral(self, n: int) -> tuple[Tensor, ...]:
        """Draws of the generator's own prior, (z_1, …, z_L)."""
        with _fixed(self.model, self._device):
            return ancestral(self.model.generator, n).latents

    def starts(self, n: int) -> tuple[Tensor, ...]:
        """Where chains start, (z_1, …, z_L): ancestral draws, across the waymarks of energies that have some."""
        if not have_waymarks(self.model.energies):
            return self.ancestral(n)
        with _fixed(self.model, self._device):
            return crossed(self.model.target(n), ChainSettings())

    def prior(self, n: int, steps: int) -> tuple[Tensor, ...]:
        """Draws of the joint prior after `steps` Langevin steps: of persistent chains, or from where chains start."""
        self._choose_backend(n, steps)
        total = _USUAL_PERSISTENT * n if self.config.persistent is None else self.config.persistent
        if not total:
            return self.run(self.starts(n), steps)
        if n > total:
            raise ArgumentError(f"persistent: expected 0 or at least as many chains as a batch has, {n}, got {total}.")
        missing = total - (0 if self.persistent is None else len(self.persistent[0]))
        if missing > 0:  # all of them at first; some, where a loader's first batch was its small last one
            new = self.run(self.starts(missing), self.config.steps)
            old = self.persistent
            self.persistent = new if old is None else tuple(torch.cat(pair) for pair in zip(old, new, strict=True))
        kept = not_none(self.persistent)
        rows = torch.randperm(len(kept[0]), device=self._device)[:n]
        again = torch.rand(n, device=self._device) < (self.config.restart_probability or 0.0)
        draws = self.run(self._restarted([old[rows] for old in kept], again), steps)
        for old, z in zip(kept, draws, strict=True):
            old[rows] = z
        return draws

    def _restarted(self, latents: list[Tensor], again: Tensor) -> Sequence[Tensor]:
        """These latents, those of the rows `again`, (n,), from where chains start."""
        if not have_waymarks(self.model.energies):
            return [torch.where(per_row(again, z), new, z) for new, z in zip(self.ancestral(len(again)), latents, strict=True)]
        rows = again.nonzero().squeeze(1)  # these alone: a crossing costs as much as a chain
        if len(rows):
            for z, new in zip(latents, self.starts(len(rows)), strict=True):
                z[rows] = new
        return latents

    def posterior(self, x: Tensor) -> tuple[Tensor, ...]:
        """Langevin draws of p(z | x), from a draw of q_ω where there is one, else ancestral."""
        model = self.model
        self._choose_backend(len(x), self.config.posterior_steps)
        with _fixed(model, self._device):
            start = checked_infer(model.generator, x).latents if find_infer(model.generator) else None
            settings = ChainSettings(steps=self.config.posterior_steps, backend=self.backend or "eager")
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
        with _fixed(model, self._device):
            settings = ChainSettings(steps=steps, step_size=self.step_size, backend=self.backend or "eager")
            target = model.target(len(start[0]))
            draw = sample_target(target, settings, default_step_size=self.step_size, start=start, trace=True)
            if draw.result is not None and draw.result.drift_norm is not None:
                size = sum(y[0].numel() for y in draw.result.position)
                self._drift_norm = draw.result.drift_norm.mean() / math.sqrt(size)
        self.last = draw.result
        if config.step_size is None and draw.result is not None and draw.result.acceptance is not None:
            accepted = float(draw.result.acceptance.mean())
            grown = self.step_size * math.exp(_STEP_GAIN * (accepted - USUAL_ACCEPTANCE))
            self.step_size = min(max(grown, _SMALLEST_STEP), LARGEST_STEP)
        return draw.latents

    def figures(self) -> dict[str, Tensor]:
        """Of the last chains: acceptance, and drift norm per √dimension."""
        figures: dict[str, Tensor] = {}
        if self.last is not None and self.last.acceptance is not None:
            figures["acceptance"] = self.last.acceptance.mean()
            figures["drift_norm"] = self._drift_norm
        if self.last_posterior is not None and self.last_posterior.acceptance is not None:
            figures["posterior_acceptance"] = self.last_posterior.acceptance.mean()
        return figures

    def state(self) -> dict[str, Any]:
        """Step sizes, backend and persistent chains."""
        state: dict[str, Any] = {"step_size": self.step_size, "posterior_step_size": self.posterior_step_size}
        state["backend"] = self.backend
        return state | ({"persistent": list(self.persistent)} if self.persistent is not None else {})

    def state_like(self) -> dict[str, Any]:
        """The pattern of such a state."""
        shapes = self.model.generator.latent_shapes
        dtype = self._drift_norm.dtype

        def are_chains(value: Any) -> bool:
            tensors = isinstance(value, list) and len(value) == len(shapes) and all(isinstance(z, Tensor) for z in value)
            return tensors and len({z.shape[:1] for z in value}) == 1 and all(map(are_latents, value, shapes))

        def are_latents(z: Tensor, shape: torch.Size) -> bool:
            return len(z) > 0 and z.shape[1:] == shape and z.dtype == dtype and bool(torch.isfinite(z).all())

        return {
            "step_size": positive,
            "posterior_step_size": positive,
            "backend": Either((None, *backends.available())),
            "persistent": Optional(Such(are_chains, "latents of every layer")),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from such a state."""
        self.step_size, self.posterior_step_size = state["step_size"], state["posterior_step_size"]
        self.backend = state["backend"]
        self.persistent = tuple(state["persistent"]) if "persistent" in state else None

    def _choose_backend(self, rows: int, steps: int) -> None:
        """How this run's chains make their steps, by the first of them; kept in checkpoints: a resumed run does not switch."""
        if self.backend is None:
            with _fixed(self.model, self._device):
                target = self.model.target(rows)
                self.backend = choose_backend(self.config.backend, target, self.config.iterations * steps)


def tuned_step_size(model: JointModel, start: float, config: FitConfig, device: torch.device) -> float:
    """The Langevin step size at which MALA on a model's joint prior accepts 95% of its steps, searched for from `start`.

    By 8 to 64 chains, the more the longer the run is and the larger its batches: a small part of what the run costs.
    """
    size = config.batch_size or config.usual_batch
    chains = min(_MOST_TUNING, max(_LEAST_TUNING, min(size, config.iterations * size // _TUNING_SHARE)))
    with _fixed(model, device):
        return tune_step_size(model.target(chains), start_step_size=start)


@contextlib.contextmanager
def _fixed(model: JointModel, device: torch.device) -> Generator[None]:
    """Inside, nothing of the model learns, and it computes in full precision: draws leave mixed precision."""
    with full_precision(device), torch.no_grad(), frozen(model.generator, *model.energies):
        yield
