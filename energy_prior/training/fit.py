"""`JointEBMPrior.fit`: checks, processes and the run; what an iteration does is in `rules.py`."""

from __future__ import annotations

__all__ = ["FitResult", "fit_energies"]

import contextlib
import dataclasses
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from energy_prior.checkpoint import digest, fingerprint
from energy_prior.checks.arguments import check_settings
from energy_prior.errors import ArgumentError, CheckpointError, DivergenceError, GeneratorError
from energy_prior.process import training_mode, unvalidated
from energy_prior.protocol import find_infer
from energy_prior.training.batches import Batches
from energy_prior.training.config import JOINT_METHODS, FitConfig, Method, check_method
from energy_prior.training.distributed import Engine
from energy_prior.training.loop import description, run_loop
from energy_prior.training.rules import FitTask

if TYPE_CHECKING:
    from accelerate import Accelerator

    from energy_prior.prior import JointEBMPrior


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What happened in a run of `fit`.

    Attributes:
        method: the learning rule.
        config: its settings, with the method's own defaults filled in.
        history: one entry per look, every `config.log_every` iterations and at checkpoints; `docs/training.md` says what
            each figure means.
        clipped: share of the iterations whose gradient was clipped, in [0, 1], for "energies" and, in the joint rules,
            "generator".
        tamed: share of the prior's training chains' steps whose drift was cut, in [0, 1]; None without chains.
        warnings: what was warned of, in the order that it came.
        step_size: the tuned Langevin step size that the prior uses from now on.
        resumed_at: the iteration after which a run that had been stopped went on; None if it did not.
    """

    method: Method
    config: FitConfig
    history: list[dict[str, float]]
    clipped: dict[str, float]
    tamed: float | None
    warnings: list[str]
    step_size: float
    resumed_at: int | None


def fit_energies(
    prior: JointEBMPrior,
    data: Tensor | Iterable[Any],
    method: str,
    config: FitConfig | None,
    settings: dict[str, Any],
    run_dir: str | os.PathLike[str] | None = None,
    accelerator: Accelerator | None = None,
    seeded: bool = False,
) -> FitResult:
    """`JointEBMPrior.fit`, which documents it. Random numbers come from torch's global stream.

    With `seeded` that stream was seeded by the caller's `rng`, so that a run of another seed is another run.
    """
    rule = check_method(method)
    check_settings(FitConfig, settings, "a setting of fit")
    if config is not None and not isinstance(config, FitConfig):
        raise ArgumentError(f"config: expected a FitConfig or None, got {type(config).__name__}.")
    config = dataclasses.replace(config or FitConfig(), **settings).for_method(rule)
    engine = Engine(accelerator)
    seed = engine.objects(int(torch.randint(2**62, ())))[0]
    batches = Batches(
        data, config, prior.generator, prior.x_shape, prior.reference, rank=engine.rank, world=engine.world, seed=seed
    )
    if isinstance(data, Tensor):
        engine.agree("data", batches.fingerprint())
    if rule in JOINT_METHODS:
        _check_trainable(prior.generator, rule)
    start = fingerprint(prior.generator)
    engine.agree("generator", start)
    engine.agree("energies", digest(prior.energies.state_dict(), repr((rule, config.resumable(), float(prior.step_size)))))
    task = FitTask(prior, batches, rule, config, engine)
    identity = {
        "latents": [list(shape) for shape in prior.generator.latent_shapes],
        "space": prior.space,
        **({"seed": seed} if seeded else {}),
        **description(prior.energies, "energies"),
    }
    if rule not in JOINT_METHODS:
        identity["weights of the generator"] = start
    if isinstance(prior.generator, nn.Module):
        identity |= description(prior.generator, "generator")
    learning = [
        prior.energies,
        *([prior.generator] if isinstance(prior.generator, nn.Module) and rule in JOINT_METHODS else []),
    ]
    with torch.inference_mode(False), engine.own_stream(prior.reference.device), unvalidated(), contextlib.ExitStack() as stack:
        for module in learning:
            stack.enter_context(training_mode(module))
        try:
            progress = run_loop(task, batches, config, engine, run_dir=run_dir, identity=identity)
        except DivergenceError as error:
            task.keep_average()
            raise _keep_good(prior, error, run_dir, engine) from error
        finally:
            task.keep_average()
        step_size = prior.tune_step_size(target_acceptance=config.target_acceptance)
        if engine.world > 1:
            step_size = float(engine.mean([prior.step_size])[0])
            prior.step_size.fill_(step_size)
    return FitResult(
        method=rule,
        config=config,
        history=progress.history,
        clipped={name: count / config.iterations for name, count in progress.clipped.items()},
        tamed=None if rule == "nce" else task.tamed / config.iterations,
        warnings=list(task.warned.values()),
        step_size=step_size,
        resumed_at=progress.resumed_at,
    )


def _check_trainable(generator: Any, method: Method) -> None:
    """The joint rules train the generator, so it has to be a module with parameters; "variational" needs infer."""
    if not isinstance(generator, nn.Module) or not any(p.requires_grad for p in generator.parameters()):
        raise GeneratorError(
            f"generator: method={method!r} trains it too, but {type(generator).__name__} "
            + ("is no nn.Module." if not isinstance(generator, nn.Module) else "has no parameter that requires a gradient.")
            + ' Use "nce" or "two_stage", which leave it as it is.'
        )
    if method == "variational" and find_infer(generator) is None:
        raise GeneratorError(
            f'generator: method="variational" needs infer(x), which {type(generator).__name__} does not have; use "joint".'
        )


def _keep_good(
    prior: JointEBMPrior, error: DivergenceError, run_dir: str | os.PathLike[str] | None, engine: Engine
) -> DivergenceError:
    """The error with what was kept and where; the prior holds its last good average already."""
    kept = "The prior holds its last good average."
    if run_dir is not None and engine.main:
        path = os.path.join(os.fspath(run_dir), "last_good.safetensors")
        try:
            prior.save(path)
            kept = f"The prior holds its last good average, saved as {path!r} too."
        except (OSError, CheckpointError) as failure:
            kept += f" Saving it as {path!r} failed: {failure}."
    return DivergenceError(f"Training diverged in iteration {error.step}: {error} {kept}", layer=error.layer, step=error.step)
