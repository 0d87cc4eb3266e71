"""What the five learning rules do in an iteration, and the running average that a prior keeps of it."""

from __future__ import annotations

__all__ = ["FitTask"]

import copy
import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from energy_prior.checkpoint import fingerprint
from energy_prior.checks import arguments as validate
from energy_prior.energies import Energy
from energy_prior.errors import ArgumentError, DivergenceError, TrainingWarning
from energy_prior.model import JointModel, PosteriorDraw
from energy_prior.process import frozen
from energy_prior.protocol import find_infer
from energy_prior.topdown import TopDown
from energy_prior.training import diagnostics
from energy_prior.training.batches import Batches
from energy_prior.training.chains import TrainingChains
from energy_prior.training.config import JOINT_METHODS, LANGEVIN_METHODS, FitConfig, Method
from energy_prior.training.distributed import Engine
from energy_prior.training.loop import Group
from energy_prior.training.objectives import (
    energy_penalty,
    energy_wall,
    generator_likelihood,
    maximum_likelihood,
    noise_contrastive,
)

if TYPE_CHECKING:
    from energy_prior.prior import JointEBMPrior

_STANDARDIZE_DRAWS = 2048
_SOUND_DRAWS = 64
_REFRESH = 10
_WALL = 0.1
_GAP_RATE = 0.1
_PENALTY_RATE = 0.05
_LARGEST_PENALTY = 0.1


class FitTask:
    """One run: what learns, its running average, and the draws that it learns from."""

    def __init__(self, prior: JointEBMPrior, batches: Batches, method: Method, config: FitConfig, engine: Engine) -> None:
        self.prior, self.batches, self.config, self.engine = prior, batches, config, engine
        self.method: Method = method
        self.name = f"fit ({method})"
        self.joint = method in JOINT_METHODS
        self.model = prior.model
        self.chains = TrainingChains(self.model, config, float(prior.step_size))
        energies = [p for p in prior.energies.parameters() if p.requires_grad]
        if not energies:
            raise ArgumentError("energies: none of their parameters requires a gradient, so there is nothing to fit.")
        assert config.learning_rate is not None  # noqa: S101 (for_method has set it)
        self.groups: Sequence[Group] = [
            Group("energies", energies, config.learning_rate, config.weight_decay, config.gradient_clip)
        ]
        self.buffers = list(prior.energies.buffers())
        if self.joint and isinstance(prior.generator, nn.Module):
            inner = [p for p in prior.generator.parameters() if p.requires_grad]
            clip = config.generator_gradient_clip
            self.groups = [*self.groups, Group("generator", inner, config.generator_learning_rate, 0.0, clip)]
            self.buffers += list(prior.generator.buffers())
        self.weights = [p for group in self.groups for p in group.parameters]
        self.average = [w.detach().clone() for w in self.weights]
        self.good = self.latest = self._snapshot()
        self.stage = 0
        self.previous: nn.ModuleList | None = None
        self.warned: dict[str, str] = {}
        self.gaps: list[Tensor] = []
        self.learned = False
        self.tamed = 0.0
        self.gap = self.weights[0].new_zeros(())
        self.penalty = torch.full_like(self.gap, config.energy_penalty)

    def begin(self) -> None:
        """Standardises the energies and tunes the step size of the chains."""
        self._own_generator()
        try:
            self._standardize()
            if self.method in LANGEVIN_METHODS and self.config.step_size is None:
                self.chains.tune()
        except DivergenceError as error:
            raise DivergenceError(str(error), layer=error.layer, step=0) from error

    def loss(self, x: Tensor, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Objective plus penalty of one batch, and figures."""
        try:
            return self._loss(x, iteration)
        except DivergenceError as error:  # of a chain, or of infer
            raise DivergenceError(str(error), layer=error.layer, step=iteration) from error

    def updated(self, iteration: int) -> None:
        """Takes the weights into their running average, and the gap into the penalty's weight."""
        self._hold_back(torch.stack(self.gaps).mean())
        self.gaps = []
        decay = min(self.config.ema_decay, (1 + iteration) / (10 + iteration))
        with torch.no_grad():
            for average, weight in zip(self.average, self.weights, strict=True):
                average.lerp_(weight, 1 - decay)

    def look(self, first: int, figures: dict[str, Tensor]) -> dict[str, float]:
        """Stops at the first iteration that is not sound, else remembers the average as good; warns of what is coming."""
        diagnostics.check_sound(figures, first, self.method, self.config)
        self.engine.share(self.buffers)
        # the figures are of weights before the window's last update: what was latest until now is known to be good
        self.good, self.latest = self.latest, self._snapshot()
        self.learned = True
        entry = diagnostics.entry(figures, self.chains)
        self.tamed += entry.get("tamed", 0.0) * len(figures["loss"])
        for kind, message in diagnostics.forebodings(entry, self.config).items():
            if kind not in self.warned:
                self.warned[kind] = f"Iteration {first + len(figures['loss']) - 1} of {self.name}: {message}"
                warnings.warn(self.warned[kind], TrainingWarning, stacklevel=2)
        return entry

    def finish(self) -> None:
        """Takes the last average as good, once its energies are seen to be sound on draws of the generator's prior."""
        _copy([*self.weights, *self.buffers], self.latest)
        with torch.random.fork_rng(devices=[self.gap.device] if self.gap.device.type == "cuda" else []):
            z = self.chains.ancestral(_SOUND_DRAWS)
        with torch.no_grad(), frozen(*self.model.energies):
            f = self.model.negative_energy(z)
        figures = diagnostics.energy_figures(self.prior.energies, [f])
        last = {name: value[None] for name, value in figures.items()}
        diagnostics.check_sound(last, self.config.iterations, self.method, self.config)
        self.good = self.latest

    def picture(self) -> Tensor | None:
        """64 samples of the averaged prior, as images."""
        if len(self.prior.x_shape) != 3 or self.prior.x_shape[0] not in (1, 3):
            return None
        now = [w.detach().clone() for w in self.weights]
        _copy(self.weights, self.average)
        try:
            x = self.prior.sample(64, step_size=self.chains.step_size)
        finally:
            _copy(self.weights, now)
        low, high = float(x.min()), float(x.max())
        return x if low >= 0 and high <= 1 else (x - low) / max(high - low, 1e-12)

    def state(self) -> dict[str, Any]:
        """Running average, buffers, chains, stage and what was warned of."""
        state: dict[str, Any] = {
            "average": self.average,
            "good": self.good,
            "buffers": self.buffers,
            "chains": self.chains.state(),
            "stage": self.stage,
            "tamed": self.tamed,
            "warned": self.warned,
            "gap": self.gap,
            "penalty": self.penalty,
        }
        if self.previous is not None:
            state["previous"] = dict(self.previous.state_dict())
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from such a state."""
        _copy([*self.average, *self.buffers], [*state["average"], *state["buffers"]])
        self._own_generator()
        self.good, self.latest = state["good"], self._snapshot()
        self.chains.load_state(state["chains"])
        self.warned = dict(state["warned"])
        self.tamed, self.learned = state["tamed"], True
        self.stage, self.gap, self.penalty = state["stage"], state["gap"], state["penalty"]
        if "previous" in state:
            self._set_previous()
            assert self.previous is not None  # noqa: S101
            self.previous.load_state_dict(state["previous"])

    def keep_average(self) -> None:
        """Puts the last good running average in place of the weights, also after an error or Ctrl-C."""
        _copy([*self.weights, *self.buffers], self.good)
        if self.learned:
            self.prior.calibration.zero_()  # it was that of other energies
            self.prior._fitted_on = fingerprint(self.prior.generator)

    def _own_generator(self) -> None:
        """The joint rules train the generator: from now on it belongs to the prior."""
        if self.joint:
            self.prior.train_jointly()

    def _snapshot(self) -> list[Tensor]:
        """The running average of the weights, and the buffers as they are."""
        return [t.detach().clone() for t in (*self.average, *self.buffers)]

    def _loss(self, x: Tensor, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        self._enter_stage(iteration)
        draw = self._posterior(x)
        positive, negative = draw.latents, self._prior_draws(len(x))
        f_positive, f_negative = self.model.negative_energy(positive), self.model.negative_energy(negative)
        total_positive, total_negative = f_positive.sum(1), f_negative.sum(1)
        figures: dict[str, Tensor] = {}
        if self.method in LANGEVIN_METHODS:
            loss = maximum_likelihood(total_positive, total_negative)
        else:
            logits = total_positive, total_negative
            if self.previous is not None:
                before = JointModel(self.model.generator, list(self.previous), self.model.space, self.model.step_size)
                logits = tuple(t - before.negative_energy(z).sum(1) for t, z in zip(logits, (positive, negative)))
            loss = noise_contrastive(*logits)
            figures["weight_ess"] = diagnostics.weight_share(logits[1].detach())
        if self.joint:
            topdown = TopDown(self.prior.generator, len(x))
            descent = topdown.descend(positive, "latent", to_observation=True)
            log_likelihood = topdown.likelihood(descent).log_prob(x)
            below = self.model.log_prior(negative).sum(1)
            loss = loss + generator_likelihood(log_likelihood, descent.log_priors().sum(1), below, draw.log_q)
            figures["log_likelihood"] = log_likelihood.mean()
        if positive[0].requires_grad:  # the penalties are the energies' alone, not the inference model's
            f_positive = self.model.negative_energy([z.detach() for z in positive])
        self.gaps.append((total_positive.mean() - total_negative.mean()).detach())
        penalty = self.penalty * energy_penalty(f_positive.sum(1), total_negative)
        penalty = penalty + _WALL * energy_wall(f_positive, f_negative, self.config.energy_bound)
        figures |= diagnostics.energy_figures(self.prior.energies, (f_positive, f_negative))
        figures |= {"loss": loss, "energy_posterior": total_positive.mean(), "energy_prior": total_negative.mean()}
        if self.method in LANGEVIN_METHODS:
            figures["penalty"] = self.penalty
        return loss + penalty, figures | self.chains.figures()

    def _hold_back(self, gap: Tensor) -> None:
        """Raises the penalty while Langevin draws lag behind f, and lets it fall back after; all on the device."""
        if self.method not in LANGEVIN_METHODS:
            return
        least, limit = self.config.energy_penalty, self.config.gap_limit
        self.gap = torch.lerp(self.gap, gap.to(self.gap.dtype), _GAP_RATE)
        factor = torch.exp(_PENALTY_RATE * (self.gap / limit - 1).clamp(-1, 1))
        self.penalty = (self.penalty * factor).clamp(least, max(least, _LARGEST_PENALTY))

    def _posterior(self, x: Tensor) -> PosteriorDraw:
        """Posterior draws as the method has them: Langevin ("joint"), reparameterised ("variational"), or plain."""
        generator = self.prior.generator
        if self.method == "joint" or find_infer(generator) is None:
            return PosteriorDraw(self.chains.posterior(x), None)
        if self.method == "variational":
            inferred = validate.checked_infer(generator, x)
            return PosteriorDraw(inferred.latents, inferred.log_q.sum(1))
        with torch.no_grad(), frozen(generator):
            return PosteriorDraw(validate.checked_infer(generator, x).latents, None)

    def _prior_draws(self, n: int) -> tuple[Tensor, ...]:
        """Draws of the generator's prior, of the stage before (NCE), or of the joint prior now (maximum likelihood)."""
        config = self.config
        if self.method in LANGEVIN_METHODS:
            return self.chains.prior(n, config.steps)
        if self.previous is None:
            return self.chains.ancestral(n)
        return self.chains.prior(n, config.steps if config.persistent == 0 else max(2, config.steps // _REFRESH))

    def _enter_stage(self, iteration: int) -> None:
        """Begins the next stage of "multi_stage_nce": f as it is becomes the prior that the next estimate corrects."""
        if self.method != "multi_stage_nce":
            return
        stage = (iteration - 1) * self.config.stages // self.config.iterations
        if stage == self.stage:
            return
        self.stage = stage
        _copy(self.weights, self.average)
        self._set_previous()
        self.chains.bank = None

    def _set_previous(self) -> None:
        """Freezes a copy of the energies as the stage before; chains then run on it."""
        self.previous = copy.deepcopy(self.prior.energies).requires_grad_(False).eval()
        self.chains.model = dataclasses.replace(self.model, energies=list(self.previous))

    def _standardize(self) -> None:
        """Tells built-in energies the scale of their layer, from posterior and prior draws in equal parts."""
        if all(not isinstance(f, Energy) or bool(f.standardized) for f in self.prior.energies):
            return
        draws: list[tuple[Tensor, ...]] = []
        while sum(len(z[0]) for z in draws) < _STANDARDIZE_DRAWS:
            x = next(self.batches)
            with torch.no_grad(), frozen(self.prior.generator, self.prior.energies):
                draws.append(self._posterior(x).latents)
            draws.append(self.chains.ancestral(len(x)))
        for energy, z in zip(self.prior.energies, zip(*draws, strict=True), strict=True):
            if isinstance(energy, Energy):
                energy.standardize(torch.cat([part.detach() for part in z]))
                if self.engine.world > 1:
                    _copy([energy.shift, energy.scale], self.engine.mean([energy.shift, energy.scale]))


@torch.no_grad()
def _copy(to: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for here, value in zip(to, values, strict=True):
        here.copy_(value)
