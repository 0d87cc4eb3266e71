"""What the six learning rules do in an iteration, and the running average that a prior keeps of it."""

from __future__ import annotations

__all__ = ["FitTask"]

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from energy_prior._util import not_none, per_row
from energy_prior.checks.arguments import checked_infer
from energy_prior.energies import LAST_LEVEL, DenoisingEnergy, Energy, waymark
from energy_prior.errors import DivergenceError, TrainingWarning, warn
from energy_prior.model import JointModel, PosteriorDraw
from energy_prior.process import frozen, full_precision
from energy_prior.protocol import find_infer, have_waymarks, reads_noise
from energy_prior.topdown import TopDown
from energy_prior.training import diagnostics
from energy_prior.training.batches import Batches
from energy_prior.training.chains import TrainingChains
from energy_prior.training.config import JOINT_METHODS, LANGEVIN_METHODS, FitConfig, Method
from energy_prior.training.distributed import Engine
from energy_prior.training.hooks import FitHooks
from energy_prior.training.loop import Group
from energy_prior.training.objectives import (
    denoising,
    generator_likelihood,
    maximum_likelihood,
    noise_contrastive,
    without_affine_force,
)
from energy_prior.training.recorded import RecordedLoss
from energy_prior.training.state import Each, Optional, Such, named_like, number, whole
from energy_prior.training.turns import same_stream_after

_LEAST_DRAWS = 2048  # for what is not learned, unless a hundredth of the run's are fewer; but always so many:
_FEWEST_DRAWS = 256
_SOUND_DRAWS = 64
_REFRESH = 10  # persistent chains of a stage run on by this part of `steps`: their target stands still
_PICTURES = 64
_LOOKED_AT = 16
_SMALL_LAYER = 128  # units; `max_energy` is for layers up to this, and is wider for larger ones
_NUMBERS = 2**28  # that draws for it hold at most, unless fewer than the least draws fit


class FitTask:
    """One run: what learns, its running average, and the draws that it learns from.

    Args:
        model: generator and energies.
        batches: the observations.
        method: the learning rule.
        config: its settings, with the method's own defaults filled in.
        engine: the processes of the run.
        hooks: what the run asks of the object that holds the model.
        reference: a tensor with the dtype and device of the latents.
        exchanged: the model's energies take the place of others when the run begins.
    """

    def __init__(
        self,
        model: JointModel,
        batches: Batches,
        method: Method,
        config: FitConfig,
        engine: Engine,
        hooks: FitHooks,
        reference: Tensor,
        *,
        exchanged: bool = False,
    ) -> None:
        self.model = model
        self.batches = batches
        self.config = config
        self.engine = engine
        self.hooks = hooks
        self.method: Method = method
        self.name = f"fit ({method})"
        self.joint: bool = method in JOINT_METHODS
        self.exchanged = exchanged
        self.energies: nn.ModuleList = nn.ModuleList(model.energies)
        self.chains: TrainingChains = TrainingChains(model, config, reference)
        energies = [p for p in self.energies.parameters() if p.requires_grad]
        rate = not_none(config.learning_rate)
        self.lost: dict[str, float] | None = None
        self.groups: Sequence[Group] = [Group("energies", energies, rate, config.weight_decay)]
        self.buffers: list[Tensor] = list(self.energies.buffers())
        if self.joint and isinstance(model.generator, nn.Module):
            inner = [p for p in model.generator.parameters() if p.requires_grad]
            rate = config.generator_learning_rate
            self.groups = [*self.groups, Group("generator", inner, rate, 0.0)]
            self.buffers += list(model.generator.buffers())
        self.weights: list[nn.Parameter] = [p for group in self.groups for p in group.parameters]
        self.average: list[Tensor] = [w.detach().clone() for w in self.weights]
        self.good: list[Tensor] = self._snapshot()
        self.latest: list[Tensor] = self.good
        self.stage: int = 0
        self.previous: nn.ModuleList | None = None
        self.warned: dict[str, str] = {}
        self.told_apart: list[float] = [0.0, 0.0]
        self.learned: bool = False
        recordable = self.method == "denoising" and all(map(_recordable, self.energies))
        self._waymark_loss = RecordedLoss(self._of_noise, self.weights) if recordable else self._of_noise

    @property
    def _size(self) -> float:
        """Of the largest layer, for limits in nats: 1 up to 128 units."""
        units = max(shape.numel() for shape in self.model.generator.latent_shapes)
        return max(units, _SMALL_LAYER) / _SMALL_LAYER

    @property
    def _watched(self) -> FitConfig:
        """The settings with `max_energy` for a layer of this size.

        That of energies with waymarks is per unit: their closed part alone may be of hundreds of nats.
        """
        size = self._size * (_SMALL_LAYER if have_waymarks(self.energies) else 1)
        return dataclasses.replace(self.config, max_energy=self.config.max_energy * size)

    def begin(self) -> None:
        """Sets what is not learned of the energies, and tunes the step size of the chains."""
        self._start()
        try:
            self._set_energies()
            if self.method in LANGEVIN_METHODS and self.config.step_size is None:
                self.chains.tune()
        except DivergenceError as error:
            raise DivergenceError(str(error), layer=error.layer, step=0) from error

    def loss(self, x: Tensor, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Objective of one batch, and figures."""
        try:
            return self._loss(x, iteration)
        except DivergenceError as error:  # of a chain, or of infer
            raise DivergenceError(str(error), layer=error.layer, step=iteration) from error

    def updated(self, iteration: int) -> None:
        """Takes the weights into their running average."""
        decay = min(not_none(self.config.ema_decay), (1 + iteration) / (10 + iteration))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.weights, 1 - decay)  # type: ignore[attr-defined]

    def look(self, first: int, figures: dict[str, Tensor]) -> dict[str, float]:
        """Stops at the first iteration that is not sound, else remembers the average as good; warns of what is coming."""
        diagnostics.check_sound(figures, first, self.method, self._watched)
        self.engine.share(self.buffers)
        # the figures are of weights before the window's last update: what was latest until now is known to be good
        self.good, self.latest = self.latest, self._snapshot()
        self.learned = True
        entry = diagnostics.history_entry(figures, self.chains, self.told_apart)
        gap = (figures["energy_posterior"] - figures["energy_prior"]).mean() if self.method in LANGEVIN_METHODS else 0.0
        for kind, message in diagnostics.early_warnings(entry, self._watched, float(gap) / self._size).items():
            if kind not in self.warned:
                self.warned[kind] = f"Iteration {first + len(figures['loss']) - 1} of {self.name}: {message}"
                warn(self.warned[kind], TrainingWarning)
        return entry

    def finish(self) -> None:
        """Takes the last average as good, once its energies are seen to be sound on draws of the generator's prior."""
        _copy([*self.weights, *self.buffers], self.latest)
        with same_stream_after(self.weights[0].device):
            z = self.chains.ancestral(min(_SOUND_DRAWS, self.config.batch_size or self.config.usual_batch))
        with torch.no_grad(), frozen(*self.model.energies):
            f = self.model.negative_energy(z)
        figures = diagnostics.energy_figures(self.energies, [f])
        last = {name: value[None] for name, value in figures.items()}
        diagnostics.check_sound(last, self.config.iterations, self.method, self._watched)
        self.good = self.latest

    def picture(self) -> Tensor | None:
        """64 samples of the averaged prior, as images."""
        shape = self.batches.x_shape
        if len(shape) != 3 or shape[0] not in (1, 3):
            return None
        now = [w.detach().clone() for w in self.weights]
        _copy(self.weights, self.average)
        try:
            x = self.hooks.sample(_PICTURES, self.chains.step_size)
        finally:
            _copy(self.weights, now)
        low, high = float(x.min()), float(x.max())
        return x if low >= 0 and high <= 1 else (x - low) / max(high - low, 1e-12)

    def state(self) -> dict[str, Any]:
        """Running average, buffers, chains, stage, what was told apart and what was warned of."""
        state: dict[str, Any] = {
            "average": self.average,
            "good": self.good,
            "buffers": self.buffers,
            "chains": self.chains.state(),
            "stage": self.stage,
            "warned": self.warned,
            "told_apart": self.told_apart,
        }
        if self.previous is not None:
            state["previous"] = dict(self.previous.state_dict())
        return state

    def state_like(self) -> dict[str, Any]:
        """The pattern of such a state."""
        return {
            "average": self.average,
            "good": [*self.average, *self.buffers],
            "buffers": self.buffers,
            "chains": self.chains.state_like(),
            "stage": whole(self.config.stages),
            "warned": Each(dict, Such(lambda v: isinstance(v, str), "text")),
            "told_apart": Each(list, number, least=2),
            "previous": Optional(named_like(self.energies)),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from such a state."""
        _copy([*self.average, *self.buffers], [*state["average"], *state["buffers"]])
        self._start()
        self.good, self.latest = state["good"], self._snapshot()
        self.chains.load_state(state["chains"])
        self.warned, self.stage, self.told_apart = dict(state["warned"]), state["stage"], list(state["told_apart"])
        self.learned = True
        if "previous" in state:
            self._previous_stage().load_state_dict(state["previous"])

    def keep_average(self) -> None:
        """Puts the last good running average in place of the weights, also after an error or Ctrl-C."""
        _copy([*self.weights, *self.buffers], self.good)
        if self.learned:
            self.hooks.learned()

    def _start(self) -> None:
        if self.joint:
            self.hooks.started()
        if self.exchanged and self.hooks.exchange is not None:
            self.hooks.exchange(self.model.energies)

    def _snapshot(self) -> list[Tensor]:
        """The running average of the weights, and the buffers as they are."""
        return [t.detach().clone() for t in (*self.average, *self.buffers)]

    def _loss(self, x: Tensor, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        if self.method == "denoising":
            return self._denoise(x)
        self._enter_stage(iteration)
        draw = self._posterior(x)
        if iteration == 1:
            with full_precision(x.device), torch.no_grad(), frozen(self.model.generator):
                self.model.noise([z.detach() for z in draw.latents])  # raises where q leaves the support of p
        z_posterior, z_prior = draw.latents, self._prior_draws(len(x))
        learns_q = draw.log_q is not None
        f_posterior = self.model.negative_energy(without_affine_force(z_posterior) if learns_q else z_posterior)
        f_prior = self.model.negative_energy(z_prior)
        total_posterior, total_prior = f_posterior.sum(1), f_prior.sum(1)
        figures: dict[str, Tensor] = {}
        if self.method in LANGEVIN_METHODS:
            loss = maximum_likelihood(total_posterior, total_prior)
        else:
            logit_posterior, logit_prior = total_posterior, total_prior
            if self.previous is not None:
                before = dataclasses.replace(self.model, energies=list(self.previous))
                logit_posterior = logit_posterior - before.negative_energy(z_posterior).sum(1)
                logit_prior = logit_prior - before.negative_energy(z_prior).sum(1)
            loss = noise_contrastive(logit_posterior, logit_prior)
            figures["weight_ess"] = diagnostics.weight_share(logit_prior.detach())
            figures["told_apart"] = diagnostics.told_apart(logit_posterior.detach(), logit_prior.detach())
            figures["told_apart_draws"] = loss.new_tensor(2.0 * len(x))
        if self.joint:
            topdown = TopDown(self.model.generator, len(x))
            descent = topdown.descend(z_posterior, "latent", to_observation=True)
            log_likelihood = topdown.likelihood(descent).log_prob(x)
            log_prior = self.model.log_prior(z_prior).sum(1)
            loss = loss + generator_likelihood(log_likelihood, descent.log_priors().sum(1), log_prior, draw.log_q)
            figures["log_likelihood"] = log_likelihood.mean()
        figures |= diagnostics.energy_figures(self.energies, (f_posterior, f_prior))
        figures |= {"loss": loss, "energy_posterior": total_posterior.mean(), "energy_prior": total_prior.mean()}
        return loss, figures | self.chains.figures()

    def _denoise(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of "denoising" and figures, of posterior draws."""
        with full_precision(x.device), torch.no_grad(), frozen(self.model.generator):
            clean = self.model.noise(self._posterior(x).latents)
        loss, figures = self._waymark_loss(clean)
        return loss, figures | self.chains.figures()

    def _of_noise(self, clean: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of "denoising" and figures, f at the first waymark of a few draws; `clean`: noise of posterior draws."""
        added = [torch.randn_like(e) for e in clean]
        spread = torch.arange(len(clean[0]), device=clean[0].device).to(clean[0]) / len(clean[0])  # evenly
        level = LAST_LEVEL * (torch.rand_like(spread[0]) + spread).remainder(1)
        alpha, sigma = waymark(level)
        noised = tuple(
            (per_row(alpha, e) * e + per_row(sigma, e) * n).requires_grad_() for e, n in zip(clean, added, strict=True)
        )
        tilt = self.model.energies_at(noised, level).sum()
        gradient = torch.autograd.grad(tilt, noised, create_graph=True, materialize_grads=True)  # 0 of layers without an energy
        loss = denoising(gradient, clean, added, alpha, sigma)
        few = slice(0, _LOOKED_AT)
        with torch.no_grad():
            zero = level[few] * 0
            f_posterior = self.model.energies_at([e[few] for e in clean], zero)
            f_prior = self.model.energies_at([n[few] for n in added], zero)
        figures = diagnostics.energy_figures(self.energies, (f_posterior, f_prior))
        means = {"energy_posterior": f_posterior.sum(1).mean(), "energy_prior": f_prior.sum(1).mean()}
        return loss, figures | {"loss": loss} | means

    def _posterior(self, x: Tensor) -> PosteriorDraw:
        """Posterior draws as the method has them: Langevin ("joint"), reparameterised ("variational"), or plain."""
        generator = self.model.generator
        if self.method == "joint" or find_infer(generator) is None:
            return PosteriorDraw(self.chains.posterior(x), None)
        if self.method == "variational":
            inferred = checked_infer(generator, x)
            return PosteriorDraw(inferred.latents, inferred.log_q.sum(1))
        with full_precision(x.device), torch.no_grad(), frozen(generator):
            return PosteriorDraw(checked_infer(generator, x).latents, None)

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
        self._previous_stage()
        self.chains.persistent = None

    def _previous_stage(self) -> nn.ModuleList:
        """A frozen copy of the energies, from now on those of the stage before, which chains run on."""
        self.previous = copy.deepcopy(self.energies).requires_grad_(False).eval()
        self.chains.model = dataclasses.replace(self.model, energies=list(self.previous))
        return self.previous

    def _set_energies(self) -> None:
        """Lets built-in energies set what is not learned, from posterior and prior draws in equal parts."""
        waiting = [f for f in self.energies if isinstance(f, Energy) and not bool(f.is_set)]
        if not waiting:
            return
        units = sum(shape.numel() for shape in self.model.generator.latent_shapes)
        wanted = min(max(f.draws for f in waiting), max(_LEAST_DRAWS, _NUMBERS // units))
        batch = self.config.batch_size or self.config.usual_batch
        wanted = min(wanted, max(_FEWEST_DRAWS, self.config.iterations * batch // 50))
        posterior: list[list[Tensor]] = []
        prior: list[list[Tensor]] = []
        with torch.no_grad(), frozen(self.model.generator, self.energies):
            while sum(len(batch[0]) for batch in (*posterior, *prior)) < wanted:
                x = next(self.batches)
                posterior.append(self._read(self._posterior(x).latents))
                prior.append(self._read(self.chains.ancestral(len(x))))
        for layer, energy in enumerate(self.energies):
            if isinstance(energy, Energy):
                energy.set_from([batch[layer] for batch in posterior], [batch[layer] for batch in prior])
                _copy(energy.buffers(), self.engine.objects([b.cpu() for b in energy.buffers()])[0])

    def _read(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """Of every layer what its energy reads: z_i, or ε_i."""
        noise = self.model.noise(latents) if any(map(reads_noise, self.energies)) else latents
        return [e if reads_noise(f) else z for f, z, e in zip(self.energies, latents, noise, strict=True)]


def _recordable(energy: nn.Module) -> bool:
    """Whether it is ours and without hooks: Python of others would not run again."""
    parts = [part for module in energy.modules() for part in (module, *module.parameters(recurse=False))]
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return type(energy) is DenoisingEnergy and not any(getattr(part, name, None) for part in parts for name in names)


@torch.no_grad()
def _copy(to: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for here, value in zip(to, values, strict=True):
        here.copy_(value)
