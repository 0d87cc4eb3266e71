"""The generator's own training: ELBO = E_q[log p_β0(x|z) + w (log p_β(z) − log q_ω(z|x))], w rising from 0 to 1."""

from __future__ import annotations

__all__ = ["ElboConfig", "ElboResult", "elbo", "fit_elbo"]

import copy
import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from energy_prior import validate
from energy_prior._util import check_count, check_positive, check_settings, evaluating, reproducible, training_mode, unvalidated
from energy_prior.errors import ArgumentError, DivergenceError, GeneratorError
from energy_prior.generator import HierarchicalGenerator
from energy_prior.topdown import TopDown
from energy_prior.training.data import endless_batches
from energy_prior.training.schedule import warmup_cosine


@dataclasses.dataclass(frozen=True)
class ElboConfig:
    """Settings of `fit_elbo`.

    Attributes:
        iterations: updates, ≥ 1.
        batch_size: observations per update, ≥ 1.
        learning_rate: of AdamW, > 0, after a linear warm-up and with cosine decay to a tenth of it.
        weight_decay: of AdamW, ≥ 0.
        kl_warmup: iterations over which the weight of the KL term rises linearly from 0 to 1, ≥ 0 and below `iterations`;
            None: 80% of the iterations.
        input_noise: standard deviation, in the data's units, of Gaussian noise on what the inference model sees in training,
            ≥ 0: keeps small data sets from being learned by heart.
        gradient_clip: largest norm of an update's gradient, > 0.
        validate_every: iterations between looks at the validation ELBO, ≥ 1.
        validation_draws: posterior draws per validation image and look, ≥ 1.
        progress: show a progress bar.
    """

    iterations: int = 2500
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    kl_warmup: int | None = None
    input_noise: float = 0.0
    gradient_clip: float = 200.0
    validate_every: int = 100
    validation_draws: int = 8
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "validate_every", "validation_draws"):
            check_count(name, getattr(self, name))
        if self.kl_warmup is not None and check_count("kl_warmup", self.kl_warmup, least=0) >= self.iterations:
            raise ArgumentError(
                f"kl_warmup: expected fewer than iterations = {self.iterations}, so that training ends at KL weight 1, got "
                f"{self.kl_warmup}."
            )
        for name in ("learning_rate", "gradient_clip"):
            check_positive(name, getattr(self, name))
        for name in ("weight_decay", "input_noise"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ArgumentError(f"{name}: expected a finite number of at least 0, got {getattr(self, name)!r}.")


@dataclasses.dataclass(frozen=True)
class ElboResult:
    """What happened in a run of `fit_elbo`.

    Attributes:
        validation_elbo: the best mean ELBO on the validation set, at KL weight 1, nats per observation; None without one.
        best_iteration: the iteration whose weights were kept.
        history: "iteration", "elbo" (of the training batch, KL weight 1) and, where looked at, "validation_elbo".
    """

    validation_elbo: float | None
    best_iteration: int
    history: list[dict[str, float]]


def elbo(generator: HierarchicalGenerator, x: Tensor, kl_weight: float = 1.0, input_noise: float = 0.0) -> Tensor:
    """One-draw estimate of E_q[log p_β0(x|z) + w (log p_β(z) − log q_ω(z|x))], (batch,), nats. Differentiable.

    Args:
        generator: a generator with `infer`.
        x: observations, (batch, *x_shape).
        kl_weight: w ≥ 0; the ELBO proper has w = 1.
        input_noise: standard deviation, in the data's units, of Gaussian noise on what the inference model sees, ≥ 0.
            Still a lower bound of log p(x), for z ~ q_ω(z | x + noise) (Im et al., AAAI 2017); the ELBO proper has 0.
    """
    inferred = validate.checked_infer(generator, x + input_noise * torch.randn_like(x) if input_noise else x)
    topdown = TopDown(generator, len(x))
    descent = topdown.descend(inferred.latents, "latent", to_observation=True)
    kl = (inferred.log_q - descent.log_priors()).sum(1)
    return topdown.likelihood(descent).log_prob(x) - kl_weight * kl


def fit_elbo(
    generator: HierarchicalGenerator,
    data: Tensor | Iterable[Any],
    *,
    validation: Tensor | None = None,
    config: ElboConfig | None = None,
    rng: torch.Generator | None = None,
    **settings: Any,
) -> ElboResult:
    """Trains a generator with `infer` by its ELBO, with KL warm-up, and keeps the weights of the best validation ELBO.

    Args:
        generator: an `nn.Module` that follows `HierarchicalGenerator` and has `infer`; trained in place.
        data: as in `JointEBMPrior.fit`.
        validation: observations kept out of training, (n, *x_shape); looked at from the end of the warm-up on, always at KL
            weight 1. None: the last weights are kept.
        config: settings; None: the defaults.
        rng: random number generator.
        **settings: single settings of `ElboConfig`, over those in `config`.

    Raises:
        ArgumentError, ShapeError, GeneratorError: for impossible settings or data, or a generator without `infer`.
        DivergenceError: if the ELBO stops being finite; the generator then holds its best weights so far.
    """
    if not isinstance(generator, nn.Module) or not callable(getattr(generator, "infer", None)):
        raise GeneratorError(f"generator: expected an nn.Module with infer(x), got {type(generator).__name__}.")
    check_settings(ElboConfig, settings, "a setting of fit_elbo")
    config = dataclasses.replace(config or ElboConfig(), **settings)
    with torch.no_grad(), evaluating(generator):
        probe = validate.probe_generator(generator)
    reference = probe.latents[0]
    if validation is not None:
        validate.check_observations("validation", validation, probe.x_shape, reference)
    batches = endless_batches(data, config.batch_size, probe.x_shape, reference)
    warmup = int(0.8 * config.iterations) if config.kl_warmup is None else config.kl_warmup
    optimizer = torch.optim.AdamW(generator.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    schedule = warmup_cosine(optimizer, min(100, config.iterations // 10), config.iterations)
    best: tuple[float | None, int, dict[str, Any]] = (None, 0, copy.deepcopy(generator.state_dict()))
    history: list[dict[str, float]] = []
    try:
        with reproducible(rng, reference.device), torch.enable_grad(), training_mode(generator), unvalidated():
            finite = torch.ones((), dtype=torch.bool, device=reference.device)
            bar = tqdm(range(1, config.iterations + 1), desc="fit ELBO", disable=not config.progress)
            for iteration in bar:
                weight = min(1.0, iteration / warmup) if warmup else 1.0
                try:
                    loss = -elbo(generator, next(batches), weight, config.input_noise).mean()
                except DivergenceError as error:  # from infer
                    raise _diverged(iteration, str(error)) from error
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(generator.parameters(), config.gradient_clip)
                finite &= torch.isfinite(norm) & torch.isfinite(loss.detach())
                optimizer.step()
                schedule.step()
                if iteration % config.validate_every and iteration != config.iterations:
                    continue
                value = -float(loss.detach())
                if not (math.isfinite(value) and bool(finite)):
                    raise _diverged(iteration, f"its ELBO is {value}, or a gradient before it was not finite.")
                entry = {"iteration": float(iteration), "elbo": value}
                if validation is None or iteration < warmup:
                    best = (None, iteration, copy.deepcopy(generator.state_dict()))
                else:
                    entry["validation_elbo"] = _validation_elbo(generator, validation, config)
                    if best[0] is None or entry["validation_elbo"] > best[0]:
                        best = (entry["validation_elbo"], iteration, copy.deepcopy(generator.state_dict()))
                history.append(entry)
                bar.set_postfix({name: f"{v:.4g}" for name, v in entry.items() if name != "iteration"}, refresh=False)
    finally:
        generator.zero_grad(set_to_none=True)
        generator.load_state_dict(best[2])
    return ElboResult(best[0], best[1], history)


def _diverged(iteration: int, what: str) -> DivergenceError:
    return DivergenceError(
        f"Training of the generator diverged by iteration {iteration}: {what} It holds its best weights so far. Lower "
        "learning_rate, or raise kl_warmup.",
        step=iteration,
    )


def _validation_elbo(generator: HierarchicalGenerator, validation: Tensor, config: ElboConfig) -> float:
    """Mean ELBO over the validation set, in batches."""
    total = 0.0
    with torch.no_grad(), evaluating(generator):
        for _ in range(config.validation_draws):
            for batch in validation.split(max(config.batch_size, 256)):
                total += float(elbo(generator, batch).sum())
    return total / (len(validation) * config.validation_draws)
