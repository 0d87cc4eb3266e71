"""What users set about a chain, and its safe defaults."""

from __future__ import annotations

__all__ = ["ChainOptions", "ChainSettings"]

from dataclasses import dataclass
from typing import Any, get_args

from typing_extensions import TypedDict

from energy_prior.checks.settings import check_count, check_flag, check_positive, check_settings
from energy_prior.errors import ArgumentError
from energy_prior.langevin import backends
from energy_prior.langevin.density import Precision
from energy_prior.langevin.proposal import Scheme
from energy_prior.topdown import Space


class ChainOptions(TypedDict, total=False):
    """The keywords that every method running a chain accepts; `ChainSettings` says more of each.

    Attributes:
        steps: number of steps, ≥ 0.
        step_size: s > 0; None: the prior's own, or one that adapts.
        adjust: Metropolis–Hastings accept/reject; None: where the chain is stiff.
        temperature: T > 0 of the chain.
        scheme: "crank_nicolson" or "euler"; None: that of the space.
        max_drift: longest drift as a multiple of the noise's length, > 0; None: no limit.
        waymarks: ≥ 0, crossed before the first step.
        backend: "auto", or the name of one.
        precision: "full", "tf32" or "bf16".
        max_memory: bytes that an evaluation may keep, > 0.

    Examples:
        >>> from energy_prior import load_example
        >>> options: ChainOptions = {"steps": 10, "adjust": True}
        >>> load_example().sample(4, **options).shape
        torch.Size([4, 1, 8, 8])
    """

    steps: int
    step_size: float | None
    adjust: bool | None
    temperature: float
    scheme: Scheme | None
    max_drift: float | None
    waymarks: int
    backend: str
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
        max_drift: each layer's drift is cut to this multiple of the noise's length, > 0 (`energy_prior.langevin.cut_drift`): a
            steep spot cannot throw an unadjusted chain off, at the price of a bias where it acts. None: never. Training
            has its own, on by default.
        waymarks: ≥ 0; where energies have waymarks (`DenoisingEnergy`), a chain that starts ancestrally crosses this many of
            them first, from N(0, I) to the joint prior, each at the cost of a step; 0: none. Not with steps=0.
        backend: how steps are made. "eager": the reference, operation by operation. "compiled": the same step through
            `torch.compile`, compiled once per process and kind of chain, which takes seconds to minutes; for training and
            for repeated sampling. "graph": on a GPU, the kernels of a whole chain recorded and launched together, for
            unadjusted chains of the prior; "compiled" takes other chains, with a warning. "auto": compiled where one call
            is so long that it pays for that, else eager.
            (`energy_prior.langevin.backends.available()` names what there is.)
        precision: of the matrix products in the gradients; positions, densities and noise keep the latents' dtype. "full";
            "tf32" (CUDA only, about three digits); "bf16" (two to three digits), for unadjusted chains alone: densities
            of hundreds of nats are too coarse in it to accept or reject by. On a CPU without units for bf16 it is slower than
            "full" (`energy-prior info` says whether yours has them). `docs/sampling.md` has its effect on samples.
        max_memory: bytes that a gradient evaluation, or a pass for scores, may keep, > 0. A larger batch is run in parts, each
            from start to end, as few as that takes: with an `rng` draws are reproducible for the same batch and `max_memory`,
            with injected noise parts change a chain by no more than rounding. The latents of the whole batch come on top.

    Raises:
        ArgumentError: if a value is out of range.

    Examples:
        >>> settings = ChainSettings(steps=100, adjust=True)
        >>> settings.scheme_in("noise"), settings.scheme_in("latent")
        ('crank_nicolson', 'euler')
    """

    steps: int = 60
    step_size: float | None = None
    adjust: bool | None = None
    temperature: float = 1.0
    scheme: Scheme | None = None
    max_drift: float | None = None
    waymarks: int = 20
    backend: str = "auto"
    precision: Precision = "full"
    max_memory: float = 2.0**30

    def __post_init__(self) -> None:
        def keep(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)  # numbers of any kind, as Python's own

        keep("steps", check_count("steps", self.steps, least=0))
        keep("waymarks", check_count("waymarks", self.waymarks, least=0))
        for name in ("temperature", "max_memory"):
            keep(name, check_positive(name, getattr(self, name)))
        for name in ("step_size", "max_drift"):
            if getattr(self, name) is not None:
                keep(name, check_positive(name, getattr(self, name)))
        if self.adjust is not None:
            keep("adjust", check_flag("adjust", self.adjust))
        if self.backend not in ("auto", *backends.available()):
            raise ArgumentError(f"backend: expected one of {('auto', *backends.available())}, got {self.backend!r}.")
        if self.precision not in get_args(Precision):
            raise ArgumentError(f"precision: expected one of {get_args(Precision)}, got {self.precision!r}.")
        if self.scheme is not None and self.scheme not in get_args(Scheme):
            raise ArgumentError(f"scheme: expected one of {get_args(Scheme)} or None, got {self.scheme!r}.")

    @classmethod
    def of(cls, options: ChainOptions) -> ChainSettings:
        """The settings that keywords of a method give.

        Args:
            options: the keywords.

        Raises:
            ArgumentError: if one is unknown, with the nearest name, or has an impossible value.
        """
        check_settings(cls, options, "an option of a chain (random numbers come from `rng`)")
        return cls(**options)

    def scheme_in(self, space: Space) -> Scheme:
        """The scheme to use.

        Args:
            space: coordinates of the chain.

        Raises:
            ArgumentError: if the scheme that is set is for the other space.
        """
        if self.scheme is None:
            return "crank_nicolson" if space == "noise" else "euler"
        if self.scheme == "crank_nicolson" and space == "latent":
            raise ArgumentError(
                'scheme: "crank_nicolson" needs space="noise", where the prior is N(0, I); use "euler" in latent space.'
            )
        return self.scheme
