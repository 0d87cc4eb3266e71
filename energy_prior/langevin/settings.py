"""What users set about a chain, its safe defaults, and the step size that is tuned instead of guessed."""

from __future__ import annotations

__all__ = ["LARGEST_STEP", "USUAL_ACCEPTANCE", "ChainDraw", "ChainOptions", "ChainSettings", "sample_density", "tune_step_size"]

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from typing_extensions import TypedDict

from energy_prior.checks.arguments import check_count, check_positive, check_settings
from energy_prior.errors import ArgumentError, BackendWarning
from energy_prior.langevin.backends.compiled import Backend, chosen_backend, stepper_for
from energy_prior.langevin.backends.graph import why_not_graphed
from energy_prior.langevin.backends.triton import why_not_fused
from energy_prior.langevin.chain import ChainResult, StepCallback, run_chain, run_fused, run_graphed
from energy_prior.langevin.density import JointDensity, Precision, by_parts, latents_at, whole
from energy_prior.langevin.noise import InjectedNoise, NoiseSource, RandomNoise
from energy_prior.langevin.step import Rules, Scheme
from energy_prior.topdown import Space

USUAL_ACCEPTANCE = 0.95
"""What step sizes of unadjusted chains are tuned to: at larger steps their bias shows in what is learned from them."""
LARGEST_STEP = 1.0
"""Where tuning stops: with nothing to sample but N(0, I), every step size is accepted."""


class ChainOptions(TypedDict, total=False):
    """The keywords that every method running a chain accepts; see `ChainSettings` for their meaning."""

    steps: int
    step_size: float | None
    adjust: bool | None
    temperature: float
    scheme: Scheme | None
    taming: float | None
    backend: Backend
    precision: Precision
    max_memory: float


@dataclass(frozen=True)
class ChainSettings:
    """Settings of a Langevin chain.

    Attributes:
        steps: number of steps, ≥ 0; 0 gives the start, which is a draw of the generator's own prior unless one is passed.
        step_size: s > 0 of ε ← ε + ½ s² ∇log p̃ + s n. Public code with drift ½η and noise √η has s = √η, with drift η and
            noise √(2η) it has s = √(2η). None: the prior's own step size, which `fit` tunes; a chain that something
            below pulls on (an observation, a held layer with free ones above it) adapts its own over the first half
            of its steps, starting there.
        adjust: Metropolis–Hastings accept/reject (MALA), which makes the chain exact. None: only for those pulled-on
            chains, which are stiff; a plain prior chain is unadjusted, as in Cui, Wu and Han (CVPR 2023).
        temperature: T > 0 of the chain, which targets p̃^{1/T} in its own coordinates (with T ≠ 1, noise and latent space
            are two targets where some σ_i depends on the layers above); not a generator's own prior temperature.
        scheme: "crank_nicolson" (noise space only; N(0, I) is exactly invariant for f = 0) or "euler". None:
            Crank–Nicolson in noise space, Euler in latent space.
        taming: each layer's drift is cut to this multiple of the noise's length, > 0 (`energy_prior.langevin.step.tame`): a
            steep spot cannot throw an unadjusted chain off, at the price of a bias where it acts. None: never. Training
            has its own, on by default.
        backend: how steps are made. "eager": the reference, operation by operation. "compiled": the same step through
            `torch.compile`, compiled once per process and kind of chain, which takes seconds to minutes; for training and
            for repeated sampling. "graph": on a GPU, the compiled steps of a whole chain in one launch, for unadjusted
            chains of the prior. "triton": on a GPU, the whole chain in one kernel, for unadjusted chains of the prior
            in noise space on a `LadderVAE` of fully connected nets with `MLPEnergy`. "compiled" takes other chains than
            those, with a warning. "auto": compiled where one call is so long that it pays for that, else eager.
        precision: of the matrix products in the gradients; positions, densities and noise keep the latents' dtype. "full";
            "tf32" (CUDA only, about three digits); "bf16" (two to three digits), for unadjusted chains alone: densities
            of hundreds of nats are too coarse in it to accept or reject by. `docs/sampling.md` has its effect on samples.
        max_memory: bytes that a gradient evaluation may keep, > 0; larger batches are run in parts, which changes a chain by
            no more than rounding. Latents, their gradients and noise come on top, for the whole batch.

    Raises:
        ArgumentError: if a value is out of range.
    """

    steps: int = 60
    step_size: float | None = None
    adjust: bool | None = None
    temperature: float = 1.0
    scheme: Scheme | None = None
    taming: float | None = None
    backend: Backend = "auto"
    precision: Precision = "full"
    max_memory: float = 2.0**30

    def __post_init__(self) -> None:
        check_count("steps", self.steps, least=0)
        check_positive("temperature", self.temperature)
        check_positive("max_memory", self.max_memory)
        for name, kinds in (("backend", get_args(Backend)), ("precision", get_args(Precision))):
            if getattr(self, name) not in kinds:
                raise ArgumentError(f"{name}: expected one of {kinds}, got {getattr(self, name)!r}.")
        if self.step_size is not None:
            check_positive("step_size", self.step_size)
        if self.taming is not None:
            check_positive("taming", self.taming)
        if self.adjust not in (None, True, False):
            raise ArgumentError(f"adjust: expected True, False or None, got {self.adjust!r}.")
        if self.scheme is not None and self.scheme not in get_args(Scheme):
            raise ArgumentError(f"scheme: expected one of {get_args(Scheme)} or None, got {self.scheme!r}.")

    @classmethod
    def of(cls, options: ChainOptions) -> ChainSettings:
        """The settings that these keywords of a method give; an unknown one is an `ArgumentError` with the nearest name."""
        check_settings(cls, options, "an option of a chain (random numbers come from `rng`)")
        return cls(**options)

    def scheme_in(self, space: Space) -> Scheme:
        """The scheme to use in this space."""
        if self.scheme is None:
            return "crank_nicolson" if space == "noise" else "euler"
        if self.scheme == "crank_nicolson" and space == "latent":
            raise ArgumentError(
                'scheme: "crank_nicolson" needs space="noise", where the prior is N(0, I); use "euler" in latent space.'
            )
        return self.scheme


class ChainDraw(NamedTuple):
    """All latents (z_1, …, z_L) at the end of a chain, and what the chain says of itself (None: every layer was held)."""

    latents: tuple[Tensor, ...]
    result: ChainResult | None


def sample_density(
    density: JointDensity | Sequence[JointDensity],
    settings: ChainSettings,
    *,
    default_step_size: float,
    start: Sequence[Tensor] | None = None,
    noise: NoiseSource | None = None,
    measure: bool = False,
    trace: bool = False,
    on_step: StepCallback | None = None,
    every: int = 1,
) -> ChainDraw:
    """Runs a chain on `density` and returns all latents (z_1, …, z_L) at its end, the held ones included.

    Args:
        density: the target; several: of consecutive parts of the batch, as `run_chain` has them.
        settings: the chain's settings.
        default_step_size: what to use where `settings.step_size` is None.
        start: (z_1, …, z_L) to start from (entries of held layers are not read); None: ancestral, ε ~ N(0, I).
        noise: the chain's random numbers; None: torch's global stream.
        measure: report the acceptance of an unadjusted chain too.
        trace: report f after every step too.
        on_step: called at the start, and after every `every` steps.
        every: ≥ 1.
    """
    parts = [density] if isinstance(density, JointDensity) else list(density)
    topdown, space = parts[0].topdown, parts[0].space
    if not topdown.free:
        return ChainDraw(latents_at(parts, ()), None)
    adjust = parts[0].informed if settings.adjust is None else settings.adjust
    _check_precision(settings, parts[0], adjust)
    with torch.autocast(topdown.reference.device.type, enabled=False):  # the chain's precision is its own setting
        batch = sum(part.topdown.batch_size for part in parts)
        shapes = [(batch, *shape[1:]) for shape in topdown.shapes]
        adaptive = settings.step_size is None and parts[0].informed
        backend, at_once = settings.backend, None
        if backend in ("triton", "graph"):
            watched = measure or trace or on_step is not None
            against = _why_not_plain(settings, adjust or adaptive, watched, noise) or _why_not_at_once(settings, parts[0])
            if against is None:
                at_once = backend
            else:
                warnings.warn(
                    f'backend="{backend}" cannot run this chain, and "compiled" takes it: {against}.', BackendWarning, 2
                )
            backend = "compiled"
        made = "eager" if at_once == "triton" else chosen_backend(backend, parts[0], batch, settings.steps)
        stepper = stepper_for(made, parts[0], at_once=at_once is not None)
        parts = stepper.parts(parts)
        source = stepper.noise(parts[0], shapes) if noise is None else noise
        if not hasattr(source, "normal"):
            raise ArgumentError(f"noise: expected an InjectedNoise or another NoiseSource, got {type(noise).__name__}.")
        if isinstance(source, InjectedNoise):
            source.check(shapes, topdown.reference, settings.steps, adjust)
        if start is None:
            position = _ancestral_start(parts, source)
        else:
            pairs = zip(parts, by_parts(parts, start), strict=True)
            position = whole([part.topdown.position(own, space) for part, own in pairs])
        if settings.steps == 0 and not (measure or trace or on_step):
            return ChainDraw(latents_at(parts, position), None)
        step_size = settings.step_size or default_step_size
        scheme = settings.scheme_in(space)
        if at_once:
            rules = Rules(scheme, settings.temperature, taming=settings.taming, precision=settings.precision)
            plain: dict[str, Any] = {"steps": settings.steps, "step_size": step_size}
            plain["noise"] = noise if isinstance(noise, InjectedNoise) else None
            if at_once == "triton":
                result = run_fused(parts, position, rules, max_memory=settings.max_memory, **plain)
            else:
                result = run_graphed(parts, position, rules, stepper=stepper, **plain)
            if result is not None:
                return ChainDraw(result.latents, result)
        result = run_chain(
            parts,
            position,
            steps=settings.steps,
            step_size=step_size,
            noise=source,
            scheme=scheme,
            adjust=adjust,
            temperature=settings.temperature,
            adapt_steps=settings.steps // 2 if adaptive else 0,
            taming=settings.taming,
            precision=settings.precision,
            measure=measure,
            trace=trace,
            on_step=on_step,
            every=every,
            stepper=stepper,
        )
        return ChainDraw(result.latents, result)


def _why_not_plain(settings: ChainSettings, adjusted: bool, watched: bool, noise: NoiseSource | None) -> str | None:
    """In words, why a chain is not one that runs from start to end with nothing to look at in between; None if it is."""
    if adjusted:
        return "it is for unadjusted chains of a fixed step size"
    if watched:
        return "it shows nothing of a chain but its end"
    if settings.precision == "bf16":
        return "it has no bf16"
    if noise is not None and not isinstance(noise, InjectedNoise):
        return "it takes no NoiseSource but InjectedNoise"
    return None


def _why_not_at_once(settings: ChainSettings, density: JointDensity) -> str | None:
    """In words, why the backend that was asked for cannot make all steps of a plain chain at once; None if it can."""
    if settings.backend == "graph":
        return why_not_graphed(density)
    return "it has no taming" if settings.taming is not None else why_not_fused(density)


def _check_precision(settings: ChainSettings, density: JointDensity, adjust: bool) -> None:
    device = density.topdown.reference.device.type
    if settings.precision == "tf32" and device != "cuda":
        raise ArgumentError(f'precision: "tf32" needs a CUDA device, and the generator is on {device}; use "full" or "bf16".')
    if settings.precision == "bf16" and adjust:
        raise ArgumentError(
            'precision: "bf16" is for unadjusted chains, and this one accepts or rejects by its density; use "full", or pass '
            "adjust=False and a step_size."
        )


def tune_step_size(
    density: JointDensity,
    *,
    start_step_size: float,
    target_acceptance: float = USUAL_ACCEPTANCE,
    steps: int = 150,
) -> float:
    """The step size at which MALA on `density` accepts the share `target_acceptance`, at most 1.

    Every chain of the batch adapts its own from an ancestral start; the result is their geometric mean. Unadjusted
    chains at that step have little bias: what MALA would accept is what they get right.
    """
    source = RandomNoise(density.topdown.shapes, density.topdown.reference)
    result = run_chain(
        density,
        _ancestral_start([density], source),
        steps=steps,
        step_size=start_step_size,
        noise=source,
        scheme=ChainSettings().scheme_in(density.space),
        adjust=True,
        adapt_steps=steps,
        target_acceptance=target_acceptance,
    )
    return float(result.step_size.log().mean().exp().clamp(max=LARGEST_STEP))


def _ancestral_start(parts: Sequence[JointDensity], source: NoiseSource) -> tuple[Tensor, ...]:
    """ε ~ N(0, I) for the free layers, in the coordinates of the density."""
    noise = source.normal(0)
    if parts[0].space == "noise":
        return noise
    latents = [part.topdown.descend(own, "noise").latents for part, own in zip(parts, by_parts(parts, noise), strict=True)]
    return whole([part.topdown.position(own, "latent") for part, own in zip(parts, latents, strict=True)])
