"""Chains for a whole batch: split it, choose a backend, run every part from start to end, join; and tune the step size."""

from __future__ import annotations

__all__ = [
    "LARGEST_STEP",
    "USUAL_ACCEPTANCE",
    "ChainDraw",
    "choose_backend",
    "crossed",
    "sample_target",
    "tune_step_size",
    "warn_if_stuck",
]

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from energy_prior._util import not_none
from energy_prior.errors import ArgumentError, BackendWarning, ChainWarning, warn
from energy_prior.langevin import backends
from energy_prior.langevin._threads import Halt, side_by_side
from energy_prior.langevin.backends import Backend
from energy_prior.langevin.chain import ChainResult, run_chain
from energy_prior.langevin.cost import equal_parts, evaluation_cost
from energy_prior.langevin.density import JointDensity, Target
from energy_prior.langevin.noise import CounterNoise, InjectedNoise, NoiseSource, RandomNoise
from energy_prior.langevin.settings import ChainSettings
from energy_prior.langevin.step import StepConfig
from energy_prior.langevin.trajectory import Trajectory
from energy_prior.langevin.waymarks import can_cross, cross
from energy_prior.process import full_precision

USUAL_ACCEPTANCE = 0.95
"""What step sizes of unadjusted chains are tuned to: at larger steps their bias shows in what is learned from them."""
LARGEST_STEP = 1.0
"""Where tuning stops: with nothing to sample but N(0, I), every step size is accepted."""
_HARDLY_MOVES = 0.05
_LOOK, _LEAST_LOOKS, _MOST_LOOKS, _AGREE, _CLOSE = 10, 6, 15, 3, 0.1  # tuning: steps at a time; how many agree, in log s


class ChainDraw(NamedTuple):
    """Where a chain has arrived.

    Attributes:
        latents: (z_1, …, z_L) at the end, (batch, *latent_shape) each.
        result: what the chain says of itself; None: no chain was needed.

    Examples:
        >>> from energy_prior import ChainSettings, load_example
        >>> from energy_prior.langevin import sample_target
        >>> draw = sample_target(load_example().model.target(4), ChainSettings(steps=2), default_step_size=0.2)
        >>> [tuple(z.shape) for z in draw.latents]
        [(4, 16), (4, 8)]
    """

    latents: tuple[Tensor, ...]
    result: ChainResult | None


def sample_target(
    target: Target,
    settings: ChainSettings,
    *,
    default_step_size: float,
    start: Sequence[Tensor] | None = None,
    noise: NoiseSource | None = None,
    measure: bool = False,
    trace: bool = False,
    every: int | None = None,
) -> ChainDraw:
    """Runs chains on `target` and returns all latents (z_1, …, z_L) at their end, the held ones included.

    A batch that does not fit into `settings.max_memory` is run in parts, one after another. On a CPU a backend may divide
    every part among the cores; these run side by side. Callers freeze the modules and choose the random stream.

    Args:
        target: what to draw from.
        settings: the chains' settings.
        default_step_size: what to use where `settings.step_size` is None.
        start: (z_1, …, z_L) to start from, (batch, *latent_shape) each (entries of held layers are not read); None: ancestral,
            ε ~ N(0, I).
        noise: the chains' random numbers; None: torch's global stream.
        measure: report the acceptance of unadjusted chains too.
        trace: report f after every step too, and all that `measure` does; its memory grows with the steps.
        every: ≥ 1; report the frames at the start and after every `every` steps (`ChainResult.trajectory`). None: none.

    Raises:
        ArgumentError, ShapeError: if the settings or the noise do not fit the target.
        DivergenceError: if a chain diverges; it names the layer and the step.

    Examples:
        >>> from energy_prior import ChainSettings, load_example
        >>> target = load_example().model.target(4, held={2: torch.zeros(4, 8)})  # p(z_1 | z_2 = 0)
        >>> z_1, z_2 = sample_target(target, ChainSettings(steps=3), default_step_size=0.2).latents
        >>> z_1.shape, z_2.abs().max()
        (torch.Size([4, 16]), tensor(0.))
    """
    if not target.free:
        return ChainDraw(tuple(target.held[layer] for layer in sorted(target.held)), None)
    with full_precision(target.device):  # the chain's precision is its own setting
        probe = target.rows(slice(0, 2)).density()
        like = probe.topdown.reference
        adjust = target.informed if settings.adjust is None else settings.adjust
        adapt_steps = settings.steps // 2 if settings.step_size is None and target.informed else 0
        _check_precision(settings, like.device.type, adjust)
        config = StepConfig(
            settings.scheme_in(target.space),
            settings.temperature,
            adjust=adjust,
            adapt=adapt_steps > 0,
            max_drift=settings.max_drift,
            measured=measure or trace or adjust or adapt_steps > 0 or every is not None,
            traced=trace,
            precision=settings.precision,
        )
        backend = _chosen(settings, probe, target.batch_size, config, noise)
        source = backend.noise(target.shapes, like) if noise is None else noise
        _check_noise(source, target, like, settings.steps, adjust)
        beginning = tuple(source.normal(0)) if start is None else tuple(start)
        parts = split_batch(target, probe, settings.max_memory)

        def draw_rows(rows: slice, halt: Halt | None = None) -> ChainDraw:
            """The chains of one part of the batch, from start to end."""
            density = backend.prepare(target.rows(rows).density())
            waymarks = settings.waymarks if settings.steps else 0
            position = _position(density, [t[rows] for t in beginning], from_noise=start is None, waymarks=waymarks)
            if not (settings.steps or measure or trace or every):
                return ChainDraw(density.topdown.descend(position, target.space).latents, None)
            result = run_chain(
                density,
                position,
                config,
                steps=settings.steps,
                step_size=settings.step_size or default_step_size,
                noise=source if rows == slice(0, target.batch_size) else source.rows(rows),
                backend=backend,
                adapt_steps=adapt_steps,
                every=every,
                halt=halt,
            )
            return ChainDraw(result.latents, result)

        return join_batch(_run_parts(draw_rows, parts, backend, probe, source))


def crossed(target: Target, settings: ChainSettings) -> tuple[Tensor, ...]:
    """Where chains on `target` start that cross the waymarks of its energies.

    Args:
        target: what to draw from.
        settings: of these chains; `waymarks` are crossed, in parts that need `max_memory`.

    Returns:
        (z_1, …, z_L), (batch, *latent_shape) each.

    Examples:
        >>> from energy_prior import ChainSettings, JointEBMPrior, LadderVAE, denoising_energies
        >>> prior = JointEBMPrior(LadderVAE((4,), latent_dims=(3, 2), hidden=8), denoising_energies([(3,), (2,)], channels=8))
        >>> [tuple(z.shape) for z in crossed(prior.model.target(4), ChainSettings())]
        [(4, 3), (4, 2)]
    """
    with full_precision(target.device):
        probe = target.rows(slice(0, 2)).density()
        noise = RandomNoise(target.shapes, probe.topdown.reference).normal(0)
        parts = []
        for rows in split_batch(target, probe, settings.max_memory):
            density = target.rows(rows).density()
            position = _position(density, [e[rows] for e in noise], from_noise=True, waymarks=settings.waymarks)
            parts.append(density.topdown.descend(position, target.space).latents)
    return _joined(parts)


def tune_step_size(
    target: Target,
    *,
    start_step_size: float,
    target_acceptance: float = USUAL_ACCEPTANCE,
    max_memory: float = 2.0**30,
) -> float:
    """The step size at which MALA on `target` accepts the share a = `target_acceptance` of the proposals, at most 1.

    Chains from an ancestral start make 10 steps at a time, and look at what they accepted: 1 − a grows like s³ (Roberts and
    Rosenthal, JRSS B 1998), so that s · ((1 − a)/(1 − accepted))^{1/3}, at most e times as large or small, is where they try
    next. After 60 steps, as old as samples are, it ends when three in a row agree within a tenth, or with 150 steps, with
    their geometric mean; it ends at once where three in a row are 1. Unadjusted chains at that step have little bias: what
    MALA would accept is what they get right.

    Args:
        target: what to draw from; as many chains as it has, or as fit into `max_memory`.
        start_step_size: where to begin, > 0.
        target_acceptance: in (0, 1).
        max_memory: bytes that a gradient evaluation may keep, > 0.

    Examples:
        >>> from energy_prior import JointEBMPrior, LadderVAE
        >>> prior = JointEBMPrior(LadderVAE((4,), latent_dims=(3, 2), hidden=8))
        >>> round(tune_step_size(prior.model.target(8), start_step_size=0.3), 2)  # of f = 0 every step is accepted
        1.0
    """
    settings = ChainSettings()
    config = StepConfig(settings.scheme_in(target.space), adjust=True, measured=True)
    with full_precision(target.device):
        rows, *_ = split_batch(target, target.rows(slice(0, 2)).density(), max_memory)
        density = target.rows(rows).density()
        source = RandomNoise(density.topdown.shapes, density.topdown.reference)
        backend = _automatic(density, rows.stop, 0, config, None)
        density = backend.prepare(density)
        position = _position(density, source.normal(0), from_noise=True, waymarks=settings.waymarks)
        log_step, tried = math.log(start_step_size), list[float]()
        while len(tried) < _MOST_LOOKS:
            result = run_chain(
                density, position, config, steps=_LOOK, step_size=math.exp(log_step), noise=source, backend=backend
            )
            position = result.position
            rejected = max(1 - float(not_none(result.acceptance).mean()), 1e-9)
            log_step += min(max(math.log((1 - target_acceptance) / rejected) / 3, -1.0), 1.0)
            log_step = min(log_step, math.log(LARGEST_STEP))
            tried.append(log_step)
            last = tried[-_AGREE:]
            agree = len(last) == _AGREE and max(last) - min(last) < _CLOSE
            if agree and (len(tried) >= _LEAST_LOOKS or min(last) == math.log(LARGEST_STEP)):
                break
    return math.exp(statistics.fmean(tried[-_AGREE:]))


def choose_backend(name: str, target: Target, evaluations: int) -> str:
    """The backend for chains that are measured, as in training: `name`, or what "auto" stands for.

    Args:
        name: "auto", or a backend's name.
        target: of the chains.
        evaluations: gradient evaluations of the batch that are to come.

    Examples:
        >>> from energy_prior import load_example
        >>> choose_backend("auto", load_example().model.target(4), evaluations=100)
        'eager'
    """
    if name != "auto":
        return backends.get(name).name
    config = StepConfig(ChainSettings().scheme_in(target.space), measured=True)
    with full_precision(target.device):
        return _automatic(target.rows(slice(0, 2)).density(), target.batch_size, evaluations, config, None).name


def warn_if_stuck(result: ChainResult | None) -> None:
    """Warns of chains that accepted hardly any step.

    Args:
        result: the end of the chains; None: there were none.

    Examples:
        >>> import warnings
        >>> from energy_prior.langevin import ChainResult
        >>> z = torch.zeros(2, 3)
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn_if_stuck(ChainResult((z,), (z,), step_size=torch.ones(2), acceptance=torch.tensor([0.0, 0.02])))
        >>> str(caught[0].message).partition(" of the")[0]
        'Metropolis–Hastings accepted 1.0%'
    """
    accepted = None if result is None or result.acceptance is None else float(result.acceptance.mean())
    if accepted is not None and accepted < _HARDLY_MOVES:
        warn(
            f"Metropolis–Hastings accepted {accepted:.1%} of the chains' steps, so they are hardly away from where they "
            "started. Use a smaller step_size or more steps; if it is as low at every step_size, an energy is too steep to "
            "sample.",
            ChainWarning,
        )


# --------------------------------------------------------------------------------------------------------- parts of a batch


def split_batch(target: Target, probe: JointDensity, max_memory: float) -> list[slice]:
    """The rows of each part: as few equal ones as an evaluation of each needs to keep at most `max_memory` bytes."""
    return equal_parts(target.batch_size, evaluation_cost(probe).memory, max_memory)


def join_batch(parts: Sequence[ChainDraw]) -> ChainDraw:
    """The draw of the whole batch, from those of its parts."""
    if len(parts) == 1:
        return parts[0]
    results = [part.result for part in parts if part.result is not None]
    latents = _joined([part.latents for part in parts])
    if not results:
        return ChainDraw(latents, None)

    def each(name: str, dim: int = 0) -> Tensor | None:
        values = [getattr(result, name) for result in results]
        return None if values[0] is None else torch.cat(values, dim)

    frames = [result.trajectory for result in results if result.trajectory is not None]
    result = ChainResult(
        position=_joined([result.position for result in results]),
        latents=latents,
        step_size=torch.cat([result.step_size for result in results]),
        acceptance=each("acceptance"),
        drift_norm=each("drift_norm"),
        cut_share=each("cut_share"),
        negative_energy=each("negative_energy", 1),
        trajectory=Trajectory.joined(frames) if frames else None,
    )
    return ChainDraw(latents, result)


def _joined(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(layer) for layer in zip(*parts, strict=True))


def _run_parts(
    draw_rows: Callable[..., ChainDraw], parts: list[slice], backend: Backend, probe: JointDensity, noise: NoiseSource
) -> list[ChainDraw]:
    """`draw_rows` of every part, in their order or side by side."""
    workers, cores = 1, 0
    if isinstance(noise, CounterNoise | InjectedNoise):  # other numbers depend on the order in which they are asked for
        workers, cores = backend.workers(probe, parts[0].stop)
    if workers > 1:
        parts = [piece for rows in parts for piece in _divided(rows, workers)]
    if len(parts) > 1 and not hasattr(noise, "rows"):
        raise ArgumentError(
            f"noise: this batch is run in {len(parts)} parts, and {type(noise).__name__} has no rows(slice), which gives the "
            "random numbers of one. Add it, or raise max_memory."
        )
    return [draw_rows(rows) for rows in parts] if workers == 1 else side_by_side(workers, cores, draw_rows, parts)


def _divided(rows: slice, workers: int) -> list[slice]:
    """These rows in equal pieces, at most `workers`."""
    n = rows.stop - rows.start
    size = n // max(count for count in range(1, workers + 1) if n % count == 0)
    return [slice(first, first + size) for first in range(rows.start, rows.stop, size)]


def _position(density: JointDensity, beginning: Sequence[Tensor], *, from_noise: bool, waymarks: int) -> tuple[Tensor, ...]:
    """Where chains start, in the density's coordinates: at (z_1, …, z_L), or from ε ~ N(0, I) of the free layers.

    From noise they cross so many waymarks first, where the energies have some.
    """
    if not from_noise:
        return density.topdown.position(beginning, density.space)
    if waymarks and can_cross(density):
        beginning = cross(density, beginning, waymarks)
    if density.space == "noise":
        return tuple(beginning)
    return density.topdown.position(density.topdown.descend(beginning, "noise").latents, "latent")


# ------------------------------------------------------------------------------------------------------- backend and checks


def _chosen(settings: ChainSettings, probe: JointDensity, rows: int, config: StepConfig, noise: NoiseSource | None) -> Backend:
    """The backend that makes these chains, with a warning if it is not the one that was asked for."""
    if settings.backend == "auto":
        return _automatic(probe, rows, settings.steps, config, noise)
    asked = backends.get(settings.backend)
    why = asked.refusal(probe, config, noise)
    if why is None:
        return asked
    there = asked.fallback in backends.available()
    taker = backends.get(str(asked.fallback)) if there else _automatic(probe, rows, settings.steps, config, noise)
    warn(f'backend="{asked.name}" cannot run this chain, and "{taker.name}" takes it: {why}.', BackendWarning)
    return taker


def _automatic(probe: JointDensity, rows: int, evaluations: int, config: StepConfig, noise: NoiseSource | None) -> Backend:
    """The first that pays, else the one that runs every chain, else any that can run this one."""
    there = [backends.get(name) for name in backends.available()]
    refusals = {backend.name: backend.refusal(probe, config, noise) for backend in there}
    able = [backend for backend in there if refusals[backend.name] is None]
    if not able:
        said = "; ".join(f'"{name}": {why}' for name, why in refusals.items())
        raise ArgumentError(f"backend: none can run this chain ({said}).")
    cost = evaluation_cost(probe)
    ranked = sorted(able, key=lambda backend: (not backend.pays(cost, rows, evaluations), backend.fallback is not None))
    return ranked[0]


def _check_precision(settings: ChainSettings, device: str, adjust: bool) -> None:
    if settings.precision == "tf32" and device != "cuda":
        raise ArgumentError(f'precision: "tf32" needs a CUDA device, and the generator is on {device}; use "full" or "bf16".')
    if settings.precision == "bf16" and adjust:
        raise ArgumentError(
            'precision: "bf16" is for unadjusted chains, and this one accepts or rejects by its density; use "full", or pass '
            "adjust=False and a step_size."
        )


def _check_noise(noise: NoiseSource, target: Target, like: Tensor, steps: int, adjust: bool) -> None:
    if not hasattr(noise, "normal"):
        raise ArgumentError(f"noise: expected an InjectedNoise or another NoiseSource, got {type(noise).__name__}.")
    if isinstance(noise, InjectedNoise):
        noise.check(target.shapes, like, steps, adjust)
