"""Learning as methods of the prior: `fit` by five rules, and the step size of its chains."""

from __future__ import annotations

__all__ = ["LearnMethods"]

import contextlib
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from energy_prior.checkpoint import fingerprint
from energy_prior.checks.arguments import check_count
from energy_prior.errors import ArgumentError
from energy_prior.langevin import tune_step_size
from energy_prior.langevin.settings import USUAL_ACCEPTANCE
from energy_prior.model import JointModel
from energy_prior.protocol import HierarchicalGenerator

if TYPE_CHECKING:
    from accelerate import Accelerator

    from energy_prior.prior import JointEBMPrior
    from energy_prior.training import FitConfig, FitResult, Method


class LearnMethods(nn.Module):
    """How `JointEBMPrior` learns."""

    generator: HierarchicalGenerator
    calibration: Tensor
    step_size: Tensor
    _fitted_on: str | None
    _quiet: Callable[[torch.Generator | None], contextlib.AbstractContextManager[JointModel]]

    def fit(
        self,
        data: Tensor | Iterable[Any],
        method: Method | str = "nce",
        *,
        config: FitConfig | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        accelerator: Accelerator | None = None,
        rng: torch.Generator | None = None,
        callback: Callable[[dict[str, float]], object] | None = None,
        **settings: Any,
    ) -> FitResult:
        """Learns the energies, and in the joint rules the generator too, then tunes `step_size` where the settings give none.

        Training again goes on where it stood. The rules, with z⁺ the posterior's draws and z⁻ the prior's:

            "nce"              one classifier of z⁺ ~ q_ω against z⁻ ~ p_β with logit Σ f_i (Aneja et al., NeurIPS 2021)
            "multi_stage_nce"  `stages` such estimates, each against draws of the prior before it; f is their sum
            "two_stage"        maximum likelihood, ∂/∂α_i = E[∂f_i(z⁺)] − E[∂f_i(z⁻)], with z⁺ ~ q_ω and z⁻ ~ p(z) by short
                               Langevin runs (Cui, Wu and Han, CVPR 2023, section 3.3)
            "variational"      the same, with the generator and its inference model learning too (joint training, z⁺ ~ q_ω)
            "joint"            the same, with z⁺ by Langevin on p(z | x): maximum likelihood of the whole model

        The first three leave the generator as it is. The last two train it in place, best from a pretrained one, and then
        `parameters()`, `state_dict()` and `save` hold it too.

        Other threads' calls run between two iterations. Scores of this prior that overlap its `fit` are of the weights of
        some iteration; the prior has the average of the weights when `fit` returns.

        Args:
            data: all observations, (n, *x_shape), a tensor or a floating-point array; or an iterable that can be run through
                again and again (a `DataLoader`) giving batches: tensors or arrays, tuples whose first entry is one, or dicts
                with one under "x", "image", "images", "pixel_values", "img", "data", "input" or "inputs", or with one alone
                of the right shape. Arrays are converted to the model's dtype and device.
            method: the learning rule.
            config: settings; None: the defaults of `energy_prior.training.FitConfig`.
            run_dir: folder for checkpoints of the whole run, TensorBoard and sample grids. The same call after a kill goes
                on from the last checkpoint, with the weights that it would have had. None: nothing is written.
            accelerator: an `accelerate.Accelerator`, for several processes, hosts, GPUs and bf16 (extra "train"; bf16 for
                generators that say `autocast = True`); None: this process alone.
            rng: random number generator.
            callback: called between two iterations, in every process, with a copy of every new entry of the history (every
                `log_every` iterations and at checkpoints). What it raises ends the run as Ctrl-C does: the prior holds its
                last good average.
            **settings: single settings of `FitConfig`, over those in `config`.

        Returns:
            The history of the run.

        Raises:
            ArgumentError, ShapeError: for impossible settings or data (empty, not finite, wrong shape or dtype, fewer than a
                batch), a `run_dir` that holds another run, energies that `save` could not write or "multi_stage_nce" not
                copy, or weights that another run trains now.
            GeneratorError: if the method cannot work with the generator.
            DivergenceError: if something stops being finite, |f| leaves `max_energy`, or built-in energies stay near their
                saturation; the prior then holds its last good average.
            DistributedError: if another process dies.
            OSError: if a checkpoint cannot be written; the one before is whole.
        """
        from energy_prior.training import FitHooks, fit_energies

        def learned() -> None:
            self.calibration.zero_()  # it was that of other energies
            self._fitted_on = fingerprint(self.generator)

        prior = cast("JointEBMPrior", self)
        hooks = FitHooks(
            started=self.train_jointly,
            learned=learned,
            save=prior.save,
            sample=lambda n, step_size: prior.sample(n, step_size=step_size),
        )
        result = fit_energies(
            prior.model,
            data,
            method,
            config,
            settings,
            x_shape=prior.x_shape,
            hooks=hooks,
            run_dir=run_dir,
            accelerator=accelerator,
            rng=rng,
            callback=callback,
        )
        self.step_size.fill_(result.step_size)
        return result

    def tune_step_size(
        self, *, target_acceptance: float = USUAL_ACCEPTANCE, batch_size: int = 64, rng: torch.Generator | None = None
    ) -> float:
        """Sets `step_size` to the one at which MALA on this prior accepts the share `target_acceptance`, and returns it."""
        if not 0 < target_acceptance < 1:
            raise ArgumentError(f"target_acceptance: expected a number between 0 and 1, got {target_acceptance!r}.")
        check_count("batch_size", batch_size)
        with self._quiet(rng) as model:
            density = model.density(batch_size)
            tuned = tune_step_size(density, start_step_size=model.step_size, target_acceptance=target_acceptance)
            self.step_size.fill_(tuned)
        return tuned

    @property
    def trained_jointly(self) -> bool:
        """Whether the generator belongs to what is learned and saved; the joint rules of `fit` switch it on."""
        return "generator" in self._modules

    def train_jointly(self) -> None:
        """Makes the generator, an `nn.Module`, part of the prior: `parameters()` and `state_dict()` hold it from now on."""
        if not self.trained_jointly:
            generator = self.__dict__.pop("generator")
            self.add_module("generator", generator)
