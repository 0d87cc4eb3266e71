"""A run of `JointEBMPrior.fit`: checks, processes and the result; what an iteration does is in `rules.py`."""

from __future__ import annotations

__all__ = ["FitResult", "fit_energies"]

import contextlib
import copy
import dataclasses
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from energy_prior._util import first_line
from energy_prior.checkpoint import digest, fingerprint
from energy_prior.checks.settings import check_path, check_settings
from energy_prior.energies import denoising_energies
from energy_prior.errors import ArgumentError, CheckpointError, DivergenceError, GeneratorError, TrainingWarning, warn
from energy_prior.langevin import ChainSettings
from energy_prior.langevin.cost import evaluation_cost
from energy_prior.mismatch import CLASSIFIER_STEPS, LEAST_DRAWS, Mismatch, mismatch_of
from energy_prior.model import JointModel
from energy_prior.process import claimed, evaluating, exclusive, frozen, full_precision, reproducible, training_mode
from energy_prior.protocol import find_infer, have_waymarks, layer_energy
from energy_prior.topdown import TopDown
from energy_prior.training.batches import Batches
from energy_prior.training.chains import tuned_step_size
from energy_prior.training.config import JOINT_METHODS, LANGEVIN_METHODS, FitConfig, Method, check_method
from energy_prior.training.distributed import Engine
from energy_prior.training.hooks import FitHooks
from energy_prior.training.loop import Callback, check_callback, check_state_is_tensors, description, run_loop
from energy_prior.training.progress import say
from energy_prior.training.rules import FitTask
from energy_prior.training.turns import Turns, being_trained, plain_gradients, same_stream_after

if TYPE_CHECKING:
    from accelerate import Accelerator

_SHORT = 100  # iterations: what fewer gained is not worth the draws
_LEAST_COMPARED, _MOST_COMPARED = 512, 2048  # draws of posterior and prior, and the numbers that they hold in between
_NUMBERS, _MOST_NUMBERS = 2**19, 2**25  # beyond which they are fewer than the least
_ONE_IN = 40  # of the run's posterior draws so many are compared, unless that is less than the least
_LEAST_STEPS = 40  # of a classifier
_LEAST_JOINT = 128  # draws of the joint prior that show anything, and what they may cost: a share of the run, or operations
_JOINT_SHARE, _JOINT_FLOPS = 0.03, 1e11


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What happened in a run of `fit`.

    Attributes:
        method: the learning rule.
        config: its settings, with the method's own defaults filled in.
        history: one entry per look, every `config.log_every` iterations and at checkpoints; `docs/training.md` says what
            each figure means.
        warnings: what was warned of, in the order that it came.
        step_size: the Langevin step size that the prior uses from now on: tuned, or that of the settings.
        resumed_at: the iteration after which a run that had been stopped went on; None if it did not.
        mismatch: how far the posterior is from the generator's prior and from what was learned, on at most 2,048
            observations of the data (`JointEBMPrior.mismatch` takes others), of fewer where a layer's latents are large;
            without `joint_accuracy` where its chains would cost more than a few per cent of the run; None for runs of fewer
            than 100 iterations or on fewer than 32 observations, and where the comparison fails, which a warning says.

    Examples:
        >>> from energy_prior import JointEBMPrior, LadderVAE
        >>> prior = JointEBMPrior(LadderVAE((4,), latent_dims=(3, 2), hidden=8))
        >>> result = prior.fit(torch.rand(32, 4), "nce", iterations=4, step_size=0.3, progress=False)
        >>> result.method, result.step_size, sorted(result.history[-1])[:4]
        ('nce', 0.3, ['energy_posterior', 'energy_prior', 'gap', 'gradient_norm_energies'])
    """

    method: Method
    config: FitConfig
    history: list[dict[str, float]] = dataclasses.field(repr=False)
    warnings: list[str]
    step_size: float
    resumed_at: int | None
    mismatch: Mismatch | None


def fit_energies(
    model: JointModel,
    data: Tensor | Iterable[Any],
    method: str | None,
    config: FitConfig | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    x_shape: Sequence[int],
    hooks: FitHooks,
    run_dir: str | os.PathLike[str] | None = None,
    accelerator: Accelerator | None = None,
    rng: torch.Generator | None = None,
    callback: Callback | None = None,
) -> FitResult:
    """Trains the energies of a model in place, and in the joint rules its generator.

    `JointEBMPrior.fit` documents the rules, the data, the errors and the arguments that are not named here.

    Args:
        model: generator and energies; its step size is where the chains' starts.
        data: observations, (n, *x_shape), or batches of them.
        method: the learning rule; None: one that fits the energies and how far the posterior is.
        config: settings; None: the defaults.
        settings: single settings, over those in `config`.
        x_shape: shape of an observation.
        hooks: what the run asks of the object that holds the model.
        run_dir: folder for checkpoints; None: nothing is written.
        accelerator: an `accelerate.Accelerator`; None: this process alone.
        rng: random number generator.
        callback: called between two iterations with a copy of every new entry of the history.

    Examples:
        >>> from energy_prior import JointEBMPrior, LadderVAE
        >>> from energy_prior.training import FitHooks
        >>> prior = JointEBMPrior(LadderVAE((4,), latent_dims=(3, 2), hidden=8))
        >>> own = {"save": prior.save, "sample": lambda n, s: prior.sample(n), "tuned": prior.step_size.fill_}
        >>> hooks = FitHooks(started=lambda: None, learned=lambda: None, **own)
        >>> settings = {"iterations": 4, "step_size": 0.3, "progress": False}
        >>> fit_energies(prior.model, torch.rand(32, 4), "nce", settings=settings, x_shape=(4,), hooks=hooks).method
        'nce'
    """
    rule = check_method(("denoising" if have_waymarks(model.energies) else "nce") if method is None else method)
    settled = _settings(config, settings or {})
    config = settled.for_method(rule, refined=_denoised(model.energies))
    check_callback(callback)
    folder = None if run_dir is None else check_path("run_dir", run_dir)
    engine, begun = Engine(accelerator), time.monotonic()
    generator, energies, exchanged = model.generator, nn.ModuleList(model.energies), False
    with claimed(rng), contextlib.ExitStack() as stack:
        with exclusive():  # scores of other threads freeze parameters while they run
            _check_learnable(generator, energies, rule)
            engine.check_mixed_precision(generator)
            learning = [energies, *([generator] if rule in JOINT_METHODS and isinstance(generator, nn.Module) else [])]
            for what, module in zip(("energies", "generator"), learning):
                stack.enter_context(being_trained(what, _trainable(module)))
            stack.enter_context(plain_gradients(_trainable(energies)[0].device))
            with torch.no_grad(), evaluating(generator):
                reference = TopDown(generator, 1).reference
            turns = Turns(engine, rng, reference.device)
            batches = Batches(
                data, config, generator, x_shape, reference, rank=engine.rank, world=engine.world, seed=turns.seed
            )
            if batches.whole is not None:
                engine.agree("data", batches.fingerprint())
            with turns.turn():
                if method is None and not have_waymarks(energies) and _is_far(model, batches, settled, engine):
                    rule = "multi_stage_nce"
                    if hooks.exchange is not None and _is_zero(model, reference.device):
                        rule, energies = "denoising", _denoising(model, engine)
                        stack.enter_context(being_trained("energies", _trainable(energies)))
                        model, learning[0], exchanged = dataclasses.replace(model, energies=energies), energies, True
                    config = settled.for_method(rule)
                start = fingerprint(generator)
                if rule == "multi_stage_nce":
                    _check_copies(energies, generator.latent_shapes, reference)
                task = FitTask(model, batches, rule, config, engine, hooks, reference, exchanged=exchanged)
                state = digest(energies.state_dict(), repr((rule, config.resumable(), model.step_size)))
            engine.agree("generator", start)
            engine.agree("energies", state)
            identity = {
                "latents": [list(shape) for shape in generator.latent_shapes],
                "space": model.space,
                **({"seed": turns.seed} if rng is not None else {}),
                **description(energies, "energies"),
            }
            if rule not in JOINT_METHODS:
                identity["weights of the generator"] = start
            if isinstance(generator, nn.Module):
                identity |= description(generator, "generator")
            for module in learning:
                stack.enter_context(training_mode(module))
        try:
            record = run_loop(task, batches, config, engine, turns, run_dir=folder, identity=identity, callback=callback)
        except BaseException as error:
            with turns.turn():
                task.keep_average()
                if isinstance(error, DivergenceError):
                    raise _with_what_was_kept(error, hooks, folder if engine.main else None) from error
            raise
        with turns.turn():
            task.keep_average()
            shown = config.progress and engine.main
            if config.step_size is None:
                say(f"{task.name}: tuning the step size", begun, shown=shown)
            step_size = config.step_size or _tuned(model, config, engine, reference)
            hooks.tuned(step_size)
            learned, mismatch = dataclasses.replace(model, step_size=step_size), None
            if config.iterations >= _SHORT:
                say(f"{task.name}: comparing draws of posterior and prior", begun, shown=shown)
                mismatch, failed = _compared(learned, batches, config, engine, rule)
                if said := _what_went_wrong(rule, mismatch, failed):
                    task.warned["mismatch"] = f"{task.name}: {said}"
                    warn(task.warned["mismatch"], TrainingWarning)
    return FitResult(
        method=rule,
        config=config,
        history=record.history,
        warnings=list(task.warned.values()),
        step_size=step_size,
        resumed_at=record.resumed_at,
        mismatch=mismatch,
    )


def _settings(config: Any, settings: Mapping[str, Any]) -> FitConfig:
    check_settings(FitConfig, settings, "a setting of fit")
    if config is not None and not isinstance(config, FitConfig):
        raise ArgumentError(f"config: expected a FitConfig or None, got {type(config).__name__}.")
    return dataclasses.replace(config or FitConfig(), **settings)


def _check_learnable(generator: Any, energies: nn.ModuleList, method: Method) -> None:
    """What learns can learn and be saved: in the joint rules that is the generator too, and "variational" needs infer."""
    for layer, energy in enumerate(energies, start=1):
        check_state_is_tensors(energy, f"energies (f_{layer})", ArgumentError)
    if not _trainable(energies):
        raise ArgumentError("energies: none of their parameters requires a gradient, so there is nothing to fit.")
    if method == "denoising" and not have_waymarks(energies):
        layer = next(i for i, energy in enumerate(energies, start=1) if not have_waymarks([energy]))
        raise ArgumentError(
            f'method: "denoising" needs energies with waymarks, and f_{layer} is {type(energies[layer - 1]).__name__}. Build '
            "the prior with energies=denoising_energies(generator.latent_shapes), or use another rule."
        )
    if method not in JOINT_METHODS:
        return
    if not isinstance(generator, nn.Module) or not _trainable(generator):
        raise GeneratorError(
            f"generator: method={method!r} trains it too, but {type(generator).__name__} "
            + ("is no nn.Module." if not isinstance(generator, nn.Module) else "has no parameter that requires a gradient.")
            + ' Use "nce" or "two_stage", which leave it as it is.'
        )
    if method == "variational" and find_infer(generator) is None:
        raise GeneratorError(
            f'generator: method="variational" needs infer(x), which {type(generator).__name__} does not have; use "joint".'
        )
    check_state_is_tensors(generator, "generator", GeneratorError)


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _check_copies(energies: nn.ModuleList, shapes: Sequence[torch.Size], reference: Tensor) -> None:
    """Each stage of "multi_stage_nce" needs a copy of the energies as they are after an update."""
    for layer, energy in enumerate(energies, start=1):
        with evaluating(energy):
            zeros = [reference.new_zeros(2, *s) for s in shapes]
            layer_energy(energy, layer, zeros, zeros)  # some modules keep what they computed last, which cannot be copied
        try:
            copy.deepcopy(energy)
        except Exception as error:
            raise ArgumentError(
                'energies: method="multi_stage_nce" keeps a copy of the energies at every stage, and copy.deepcopy of '
                f"f_{layer} ({type(energy).__name__}) fails ({first_line(error)}). Use the weight_norm of "
                "torch.nn.utils.parametrizations for that of torch.nn.utils, keep locks and open files out of the module or "
                'give it a __deepcopy__, or use method="nce" or "two_stage".'
            ) from error


def _tuned(model: JointModel, config: FitConfig, engine: Engine, reference: Tensor) -> float:
    """The step size for what was learned, the same in every process."""
    tuned = tuned_step_size(model, model.step_size, config, reference.device)
    return tuned if engine.world == 1 else float(engine.mean([reference.new_tensor(tuned)])[0])


def _is_far(model: JointModel, batches: Batches, config: FitConfig, engine: Engine) -> bool:
    """Whether the estimate of "nce" would be saturated; not asked for runs that are shorter than there are stages."""
    if config.iterations < config.stages:
        return False
    state = batches.state()
    found = engine.objects(_measured(model, batches, config))[0]
    batches.load_state(state)
    return found is not None and found.far


def _is_zero(model: JointModel, device: torch.device) -> bool:
    """Whether f has not been learned: it is 0."""
    with torch.no_grad(), frozen(model.generator, *model.energies), same_stream_after(device):
        return not bool(model.negative_energy(model.ancestral(2)).any())


def _denoised(energies: nn.ModuleList) -> bool:
    """Whether these have waymarks and have learned before."""
    return have_waymarks(energies) and all(bool(getattr(energy, "is_set", True)) for energy in energies)


def _denoising(model: JointModel, engine: Engine) -> nn.ModuleList:
    """Energies for a posterior that is far, the same in every process, where those of the model are."""
    energies = denoising_energies(model.generator.latent_shapes).to(_trainable(model.energies)[0])
    energies.train(model.energies[0].training)
    if engine.world > 1:
        state = {name: value.cpu() for name, value in energies.state_dict().items()}
        energies.load_state_dict(engine.objects(state if engine.main else None)[0])
    return energies


def _compared(
    model: JointModel, batches: Batches, config: FitConfig, engine: Engine, rule: Method
) -> tuple[Mismatch | None, str]:
    """How far the posterior is after a run, the same in every process; where that fails, None and why: the run stands."""
    try:
        found, failed = _measured(model, batches, config, rule), ""
    except Exception as error:
        found, failed = None, first_line(error)
    return engine.objects((found, failed))[0]


def _measured(model: JointModel, batches: Batches, config: FitConfig, learned_by: Method | None = None) -> Mismatch | None:
    """How far the posterior of some observations is, always the same ones of a tensor; None of too few.

    Args:
        model: generator and energies.
        batches: the observations.
        config: settings of the run.
        learned_by: the rule that has learned the joint prior; None: the generator's own prior alone is compared with.
    """
    rng = torch.Generator(device="cpu").manual_seed(0)
    units = sum(shape.numel() for shape in model.generator.latent_shapes)
    size = config.batch_size or config.usual_batch
    wanted = min(_MOST_COMPARED, max(_LEAST_COMPARED, _NUMBERS // units))
    wanted = min(wanted, max(_LEAST_JOINT, config.iterations * size // _ONE_IN), max(LEAST_DRAWS, _MOST_NUMBERS // units))
    if batches.whole is not None:
        rows = torch.randperm(len(batches.whole), generator=rng, device="cpu")[:wanted]
        x = batches.whole[rows.to(batches.whole.device)].to(batches.device)
    else:
        several = [next(batches)]
        size = len(several[0])
        while sum(map(len, several)) < min(wanted, max(LEAST_DRAWS, 2 * size)):
            several.append(next(batches))
        x = torch.cat(several)[:wanted]
    if len(x) < LEAST_DRAWS:
        return None
    of_posterior = ChainSettings(steps=config.posterior_steps)
    with reproducible(rng, x.device), full_precision(x.device), torch.no_grad(), frozen(model.generator, *model.energies):
        draws = 0 if learned_by is None else min(len(x), _affordable_draws(model, config, size, learned_by))
        of_joint = ChainSettings() if draws >= min(_LEAST_JOINT, len(x)) else None
        steps = min(CLASSIFIER_STEPS, max(_LEAST_STEPS, config.iterations // 10))
        return mismatch_of(model, x, of_posterior, of_joint, size, draws, steps)


def _what_went_wrong(rule: Method, found: Mismatch | None, failed: str) -> str:
    """What the comparison after a run says, with what to do; "" where nothing did."""
    if failed:
        return f"draws of posterior and prior could not be compared ({failed}), and the result has no mismatch."
    if found is None or not found.worse:
        return ""
    if rule == "denoising" and not found.far:
        remedy = (
            'The posterior is near, and "denoising" is for those that are far: build the prior with energies=[MLPEnergy(shape) '
            'for shape in generator.latent_shapes] (ConvEnergy for maps) and use "nce".'
        )
    else:
        remedy = "Train for more iterations, or with a smaller learning_rate, from new energies."
    return (
        "it made the prior worse. A classifier tells posterior draws from the joint prior's in "
        f"{found.joint_accuracy:.1%}, from the generator's own in {found.accuracy:.1%}. {remedy} "
        'prior.sample(n, prior="generator") gives the generator\'s own samples.'
    )


def _affordable_draws(model: JointModel, config: FitConfig, batch_size: int, method: Method) -> int:
    """Draws of the joint prior that cost little beside the run, or little at all."""
    settings = ChainSettings()
    evaluations = settings.steps + (settings.waymarks if have_waymarks(model.energies) else 0)
    flops = evaluation_cost(model.target(2).density()).flops
    of_an_update = 2 + (config.steps if method in LANGEVIN_METHODS else 0)
    share = _JOINT_SHARE * of_an_update * config.iterations * batch_size / evaluations
    return int(max(share, _JOINT_FLOPS / max(flops * evaluations, 1.0)))


def _with_what_was_kept(error: DivergenceError, hooks: FitHooks, folder: Path | None) -> DivergenceError:
    """The error with what was kept and where; the prior holds its last good average already."""
    kept = "The prior holds its last good average."
    if folder is not None:
        path = folder / "last_good.safetensors"
        try:
            hooks.save(path)
            kept = f"The prior holds its last good average, saved as {str(path)!r} too."
        except (OSError, CheckpointError) as failure:
            kept += f" Saving it as {str(path)!r} failed: {failure}."
    return DivergenceError(f"Training diverged in iteration {error.step}: {error} {kept}", layer=error.layer, step=error.step)
