"""The generator's own training: ELBO = E_q[log p_β0(x|z) + w (log p_β(z) − log q_ω(z|x))], w rising from 0 to 1."""

from __future__ import annotations

__all__ = ["ElboConfig", "ElboResult", "elbo", "fit_elbo"]

import contextlib
import copy
import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from energy_prior._util import not_none
from energy_prior.checks.arguments import as_observations, check_dtype, checked_infer
from energy_prior.checks.generator import probe_generator
from energy_prior.checks.settings import check_count, check_not_negative, check_path, check_positive, check_settings
from energy_prior.errors import ArgumentError, DivergenceError, GeneratorError, TrainingWarning, warn
from energy_prior.process import claimed, evaluating, exclusive, reproducible, training_mode
from energy_prior.protocol import HierarchicalGenerator, unwrapped
from energy_prior.topdown import inferred_descent
from energy_prior.training.batches import Batches
from energy_prior.training.config import RunConfig, count_from_zero
from energy_prior.training.distributed import Engine
from energy_prior.training.loop import Callback, Group, check_callback, check_state_is_tensors, description, run_loop
from energy_prior.training.state import Either, named_like, number, whole
from energy_prior.training.turns import Turns, being_trained, plain_gradients

if TYPE_CHECKING:
    from accelerate import Accelerator

_VALIDATION_BATCH = 256
_VALIDATION_SEED = 20230619
_PATIENCE = 10  # updates in a row without a finite gradient, after which a run has diverged


@dataclasses.dataclass(frozen=True)
class ElboConfig(RunConfig):
    """Settings of `fit_elbo`.

    Attributes:
        iterations: updates, ≥ 1.
        batch_size: observations per update, process and accumulation step, ≥ 1; None: 128, or all of them if there are fewer.
        learning_rate: of AdamW, > 0, after a linear warm-up of 100 iterations, or a tenth of them if fewer, and with cosine
            decay to a tenth of it.
        weight_decay: of AdamW, ≥ 0.
        gradient_clip: largest norm of an update's gradient, > 0.
        accumulate: batches whose gradients are averaged into one update, ≥ 1.
        log_every: iterations between looks at the run: an entry in the history, a check that nothing has diverged and, from
            the end of the KL warm-up on, the validation ELBO, ≥ 1.
        checkpoint_every: iterations between checkpoints in `run_dir`, ≥ 1.
        tensorboard: write the history to `run_dir`/tensorboard as well (extra "train").
        progress: show how far the run is: a bar where standard error is a terminal, else a line every 10 seconds at most.
        kl_warmup: iterations over which the weight of the KL term rises linearly from 0 to 1, ≥ 0 and below `iterations`;
            None: 80% of the iterations.
        input_noise: standard deviation, in the data's units, of Gaussian noise on what the inference model sees in training,
            ≥ 0: keeps small data sets from being learned by heart.
        validation_draws: posterior draws per validation image and look, ≥ 1.

    Examples:
        >>> from energy_prior import LadderVAE, fit_elbo
        >>> config = ElboConfig(iterations=4, input_noise=0.1, progress=False)
        >>> vae = LadderVAE((4,), latent_dims=(3, 2), hidden=8)
        >>> fit_elbo(vae, torch.rand(32, 4), config=config).best_iteration
        4
    """

    iterations: int = 2500
    usual_batch: ClassVar[int] = 128
    learning_rate: float = 2e-3
    gradient_clip: float = 200.0
    log_every: int = 100
    checkpoint_every: int = 500
    kl_warmup: int | None = None
    input_noise: float = 0.0
    validation_draws: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._keep(check_positive, "learning_rate", "gradient_clip")
        self._keep(check_count, "validation_draws")
        self._keep_unless_none(count_from_zero, "kl_warmup")
        if self.kl_warmup is not None and self.kl_warmup >= self.iterations:
            raise ArgumentError(
                f"kl_warmup: expected fewer than iterations = {self.iterations}, so that training ends at KL weight 1, got "
                f"{self.kl_warmup}."
            )
        self._keep(check_not_negative, "input_noise")


@dataclasses.dataclass(frozen=True)
class ElboResult:
    """What happened in a run of `fit_elbo`.

    Attributes:
        validation_elbo: the best mean ELBO on the validation set, at KL weight 1, nats per observation; None without one.
        best_iteration: the iteration whose weights were kept.
        history: "iteration", "elbo" (of the training batch, at the KL weight of the time), "gradient_norm_generator" (before
            clipping) and, where looked at, "validation_elbo".
        resumed_at: the iteration after which a run that had been stopped went on; None if it did not.
        skipped: updates left out because their batch gave no finite ELBO or gradient.

    Examples:
        >>> from energy_prior import LadderVAE, fit_elbo
        >>> vae = LadderVAE((4,), latent_dims=(3, 2), hidden=8)
        >>> result = fit_elbo(vae, torch.rand(32, 4), iterations=4, progress=False)
        >>> sorted(result.history[-1])
        ['elbo', 'gradient_norm_generator', 'iteration']
    """

    validation_elbo: float | None
    best_iteration: int
    history: list[dict[str, float]] = dataclasses.field(repr=False)
    resumed_at: int | None
    skipped: int


def elbo(generator: HierarchicalGenerator, x: Tensor, kl_weight: float = 1.0, input_noise: float = 0.0) -> Tensor:
    """One-draw estimate of E_q[log p_β0(x|z) + w (log p_β(z) − log q_ω(z|x))], (batch,), nats. Differentiable.

    Args:
        generator: a generator with `infer`.
        x: observations, (batch, *x_shape).
        kl_weight: w ≥ 0; the ELBO proper has w = 1.
        input_noise: standard deviation, in the data's units, of Gaussian noise on what the inference model sees, ≥ 0.
            Still a lower bound of log p(x), for z ~ q_ω(z | x + noise) (Im et al., AAAI 2017); the ELBO proper has 0.

    Examples:
        >>> from energy_prior import LadderVAE
        >>> vae = LadderVAE((1, 8, 8))
        >>> bound = elbo(vae, torch.rand(4, 1, 8, 8), kl_weight=0.5)
        >>> bound.shape
        torch.Size([4])
        >>> (-bound.mean()).backward()  # as training does
    """
    inferred = checked_infer(generator, x + input_noise * torch.randn_like(x) if input_noise else x)
    descent = inferred_descent(generator, inferred)
    kl = (inferred.log_q - descent.log_priors()).sum(1)
    return generator.likelihood(descent.state).log_prob(x) - kl_weight * kl


def fit_elbo(
    generator: HierarchicalGenerator,
    data: Tensor | Iterable[Any],
    *,
    validation: Any = None,
    config: ElboConfig | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    accelerator: Accelerator | None = None,
    rng: torch.Generator | None = None,
    callback: Callback | None = None,
    **settings: Any,
) -> ElboResult:
    """Trains a generator with `infer` by its ELBO, with KL warm-up, and keeps the weights of the best validation ELBO.

    An update whose batch gives no finite ELBO or gradient is left out, with a `TrainingWarning` for the first (VDVAE's training
    leaves out those of a very large gradient: Child, ICLR 2021). After ten in a row, or if the first batch of all gives no
    finite ELBO, the run has diverged.

    Args:
        generator: an `nn.Module` that follows `HierarchicalGenerator` and has `infer`; trained in place.
        data: observations, (n, *x_shape), or an iterable of batches, as in `JointEBMPrior.fit`.
        validation: observations kept out of training, (n, *x_shape), a tensor on any device or an array; looked at from the
            end of the warm-up on, always at KL weight 1. None: the last weights are kept.
        config: settings; None: the defaults.
        run_dir: folder for checkpoints; the same call goes on from the last one. None: nothing is written.
        accelerator: as in `JointEBMPrior.fit`.
        rng: random number generator.
        callback: as in `JointEBMPrior.fit`.
        **settings: single settings of `ElboConfig`, over those in `config`.

    Raises:
        ArgumentError, ShapeError, GeneratorError: for impossible settings or data, or a generator without `infer`, of half
            precision, inside of a wrapper such as `DataParallel`, or that another run trains now.
        DivergenceError: if the ELBO, or its gradient, stops being finite; the generator then holds its best weights so far.
        CheckpointError: if the last checkpoint in `run_dir` is damaged; the generator is as it was.

    Examples:
        >>> from energy_prior import LadderVAE
        >>> x = torch.rand(48, 4)
        >>> vae = LadderVAE((4,), latent_dims=(3, 2), hidden=8)
        >>> fit_elbo(vae, x[:32], validation=x[32:], iterations=10, progress=False)  # doctest: +ELLIPSIS
        ElboResult(validation_elbo=..., best_iteration=10, resumed_at=None, skipped=0)
    """
    generator = unwrapped(generator)
    if not isinstance(generator, nn.Module) or not callable(getattr(generator, "infer", None)):
        raise GeneratorError(f"generator: expected an nn.Module with infer(x), got {type(generator).__name__}.")
    for name, weight in generator.named_parameters():
        if weight.is_floating_point():
            check_dtype(name, weight.dtype)
    check_settings(ElboConfig, settings, "a setting of fit_elbo")
    if config is not None and not isinstance(config, ElboConfig):
        raise ArgumentError(f"config: expected an ElboConfig or None, got {type(config).__name__}.")
    config = dataclasses.replace(config or ElboConfig(), **settings)
    check_callback(callback)
    if run_dir is not None:
        run_dir = check_path("run_dir", run_dir)
        check_state_is_tensors(generator, "generator", GeneratorError)
    engine = Engine(accelerator)
    engine.check_mixed_precision(generator)
    with claimed(rng), contextlib.ExitStack() as stack:
        with exclusive():  # scores of other threads freeze parameters while they run
            weights = [p for p in generator.parameters() if p.requires_grad]
            if not weights:
                raise GeneratorError("generator: none of its parameters requires a gradient, so there is nothing to fit.")
            stack.enter_context(being_trained("generator", weights))
            stack.enter_context(plain_gradients(weights[0].device))
            with torch.no_grad(), evaluating(generator):
                probe = probe_generator(generator)
            x_shape, reference = probe.x_shape, probe.latents[0]
            if validation is not None:
                place = reference.to(validation.device if isinstance(validation, Tensor) else "cpu")
                validation = as_observations("validation", validation, x_shape, place, generator)
            engine.agree("generator", [float(p.detach().double().sum()) for p in generator.parameters()])
            engine.agree("settings", config.resumable())
            turns = Turns(engine, rng, reference.device)
            seed = turns.seed
            batches = Batches(data, config, generator, x_shape, reference, rank=engine.rank, world=engine.world, seed=seed)
            if batches.whole is not None:
                engine.agree("data", batches.fingerprint())
            stack.enter_context(training_mode(generator))
            with turns.turn():
                task = _ElboTask(generator, validation, config, engine)
            identity = description(generator, "generator") | ({"seed": seed} if rng is not None else {})
        try:
            record = run_loop(task, batches, config, engine, turns, run_dir=run_dir, identity=identity, callback=callback)
        finally:
            with turns.turn():
                generator.load_state_dict(task.best_weights)
    return ElboResult(task.best_elbo, task.best_iteration, record.history, record.resumed_at, task.skipped)


class _ElboTask:
    """One run: the generator, and the best of it so far."""

    name = "fit ELBO"

    def __init__(self, generator: Any, validation: Tensor | None, config: ElboConfig, engine: Engine) -> None:
        self.generator, self.validation, self.config, self.engine = generator, validation, config, engine
        weights = [p for p in generator.parameters() if p.requires_grad]
        self.groups: Sequence[Group] = [
            Group("generator", weights, config.learning_rate, config.weight_decay, config.gradient_clip)
        ]
        self.kl_warmup = int(0.8 * config.iterations) if config.kl_warmup is None else config.kl_warmup
        self.best_elbo: float | None = None
        self.best_iteration = 0
        self.best_weights = self.latest = copy.deepcopy(generator.state_dict())
        self.seen: Tensor | None = None
        self.lost: dict[str, float] | None = {"elbo": math.nan}
        self.skipped = self.in_a_row = 0

    def begin(self) -> None:
        """Nothing to prepare."""

    def loss(self, x: Tensor, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Minus the mean ELBO of a batch, at the KL weight of this iteration."""
        weight = min(1.0, iteration / self.kl_warmup) if self.kl_warmup else 1.0
        self.seen = x
        try:
            loss = -elbo(self.generator, x, weight, self.config.input_noise).mean()
        except DivergenceError as error:  # from infer
            raise self._diverged(iteration, str(error)) from error
        if not bool(torch.isfinite(loss)):
            raise self._diverged(iteration, f"its ELBO is {-float(loss.detach()):.4g}.")
        return loss, {"elbo": -loss}

    def updated(self, iteration: int) -> None:
        """Nothing follows an update."""

    def look(self, first: int, figures: dict[str, Tensor]) -> dict[str, float]:
        """Counts what was left out of a window, looks at the validation ELBO after the warm-up; remembers the best weights."""
        finite = torch.isfinite(figures["gradient_norm_generator"])
        for row, sound in enumerate(finite.tolist()):
            if not (sound or self.skipped):
                warn(
                    f"The update of iteration {first + row} was left out, as its batch gave no finite ELBO or gradient; the "
                    "result's `skipped` counts such updates. If there are more than a few, lower learning_rate.",
                    TrainingWarning,
                )
            self.skipped += not sound
            self.in_a_row = 0 if sound else self.in_a_row + 1
            if self.in_a_row == _PATIENCE:
                self._give_up(first + row)
        iteration = first + len(finite) - 1
        rows = finite if bool(finite.any()) else torch.ones_like(finite)
        entry = {name: float(value[rows][-1]) for name, value in figures.items()}
        self.engine.share(list(self.generator.buffers()))
        if self.validation is None or iteration < self.kl_warmup:
            # the figures are of the weights before the window's last update: those of the last look are the good ones
            if not self.in_a_row:
                self.best_iteration, self.best_weights = first - 1, self.latest
                self.latest = copy.deepcopy(self.generator.state_dict())
            return entry
        entry["validation_elbo"] = value = self._validation_elbo()
        if not math.isfinite(value):
            raise self._diverged(
                iteration, f"its validation ELBO is {value:.4g}; are all validation images in the model's range?"
            )
        if self.best_elbo is None or value > self.best_elbo:
            self.best_elbo, self.best_iteration = value, iteration
            self.best_weights = copy.deepcopy(self.generator.state_dict())
        return entry

    def finish(self) -> None:
        """Without a validation set: takes the last weights, once a batch has shown that they are sound."""
        if self.skipped == self.config.iterations:
            self._give_up(self.config.iterations)
        if self.validation is not None:
            return
        if self.seen is not None:
            with torch.no_grad(), evaluating(self.generator), _fixed_draws(self.seen.device):
                value = float(elbo(self.generator, self.seen).mean())
            if not math.isfinite(value):
                raise self._diverged(self.config.iterations, f"the ELBO after the last update is {value:.4g}.")
        self.best_iteration, self.best_weights = self.config.iterations, copy.deepcopy(self.generator.state_dict())

    def picture(self) -> Tensor | None:
        """No grids: they belong to the prior."""

    def state(self) -> dict[str, Any]:
        """The buffers, and the best weights so far."""
        best = {"elbo": self.best_elbo, "iteration": self.best_iteration, "weights": dict(self.best_weights)}
        skipped = {"skipped": self.skipped, "in_a_row": self.in_a_row}
        return {"buffers": list(self.generator.buffers()), "best": best, **skipped}

    def state_like(self) -> dict[str, Any]:
        """The pattern of such a state."""
        best = {"elbo": Either((None, number)), "iteration": whole(), "weights": named_like(self.generator)}
        return {"buffers": list(self.generator.buffers()), "best": best, "skipped": whole(), "in_a_row": whole()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from such a state."""
        with torch.no_grad():
            for here, saved in zip(self.generator.buffers(), state["buffers"], strict=True):
                here.copy_(saved)
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        best = state["best"]
        self.best_elbo, self.best_iteration, self.best_weights = best["elbo"], best["iteration"], best["weights"]
        self.latest = copy.deepcopy(self.generator.state_dict())

    def _validation_elbo(self) -> float:
        """Mean ELBO over the validation set, in batches; always with the same draws, and none of the training's."""
        validation, device = not_none(self.validation), self.groups[0].parameters[0].device
        total = torch.zeros((), dtype=torch.float64, device=device)
        with torch.no_grad(), evaluating(self.generator), _fixed_draws(device):
            for _ in range(self.config.validation_draws):
                for batch in validation.split(_VALIDATION_BATCH):
                    total += elbo(self.generator, batch.to(device)).sum()
        return float(self.engine.mean([total])[0]) / (len(validation) * self.config.validation_draws)

    def _give_up(self, iteration: int) -> None:
        raise self._diverged(iteration, f"its ELBO, or its gradient, was not finite in {self.in_a_row} updates in a row.")

    @staticmethod
    def _diverged(iteration: int, what: str) -> DivergenceError:
        return DivergenceError(
            f"Training of the generator diverged in iteration {iteration}: {what} It holds its best weights so far. Lower "
            "learning_rate, or raise kl_warmup. In iteration 1: is q where p(z_i | z_(>i)) cannot be? check_generator tells.",
            step=iteration,
        )


def _fixed_draws(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Inside, the random stream of every look at the weights: looks are compared, and do not change what is learned."""
    return reproducible(torch.Generator(device="cpu").manual_seed(_VALIDATION_SEED), device)
