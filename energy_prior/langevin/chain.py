"""Langevin chains: y_{t+1} = c₀ y_t + c₁ ∇ + τ n_t, unadjusted or MALA, in memory that does not grow with the steps."""

from __future__ import annotations

__all__ = ["ChainResult", "StepCallback", "run_chain"]

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from energy_prior.errors import DivergenceError
from energy_prior.langevin.density import ChainState, JointDensity
from energy_prior.langevin.noise import NoiseSource
from energy_prior.langevin.step import Scheme, coefficients, log_acceptance, propose, tame

StepCallback = Callable[[int, ChainState, Tensor], None]
"""Called with (step, state, acceptance probability of that step, (batch,)) after every step, and at step 0 with ones."""

_CHECK_EVERY = 32


@dataclass(frozen=True)
class ChainResult:
    """The end of a chain.

    Attributes:
        position: the free layers at the end, ascending, in the density's coordinates.
        step_size: the step size at the end, one per chain, (batch,).
        state: density and gradient at the end; None if nothing asked for the acceptance, which needs them.
        acceptance: mean over the steps of the acceptance probability, (batch,); None as for `state`.
        tamed: share of the steps whose drift was cut, (batch,); None without `taming`.
    """

    position: tuple[Tensor, ...]
    step_size: Tensor
    state: ChainState | None = None
    acceptance: Tensor | None = None
    tamed: Tensor | None = None


def run_chain(
    density: JointDensity,
    start: Sequence[Tensor],
    *,
    steps: int,
    step_size: float | Tensor,
    noise: NoiseSource,
    scheme: Scheme,
    adjust: bool = False,
    temperature: float = 1.0,
    adapt_steps: int = 0,
    target_acceptance: float = 0.7,
    taming: float | None = None,
    measure: bool = False,
    on_step: StepCallback | None = None,
) -> ChainResult:
    """Runs one Langevin chain per row of the batch.

    An unadjusted step costs one gradient evaluation. The acceptance probability of every step is free except for one
    evaluation at the end, so it is there (`on_step`) for unadjusted chains too.

    During the first `adapt_steps` steps each chain adapts its own step size, log s += t^(−0.6) (min(1, α) −
    `target_acceptance`) (Robbins–Monro; Andrieu and Thoms, Statistics and Computing 2008), then keeps it: chains stay
    independent of the rest of the batch.

    Args:
        density: the log density and its coordinates.
        start: the free layers at the start, ascending, in the density's coordinates; (batch, *shape) each.
        steps: number of steps, ≥ 0.
        step_size: s > 0, a number or one per chain, (batch,).
        noise: the chain's random numbers.
        scheme: "crank_nicolson" or "euler".
        adjust: Metropolis–Hastings accept/reject after every step (MALA; Roberts and Tweedie, Bernoulli 1996).
        temperature: T > 0; the chain targets p̃^{1/T}.
        adapt_steps: number of first steps that adapt the step size.
        target_acceptance: acceptance that the adaptation aims at, in (0, 1).
        taming: longest drift, as a multiple of the noise's length, > 0 (`tame`); None: the drift as it is.
        measure: report `state` and `acceptance` of an unadjusted chain too.
        on_step: called after every step.

    Raises:
        DivergenceError: if a density or gradient stops being finite; it names the layer and the step. Checked on the
            device in every step and read by the host every 32 steps and at the end. A proposal of density zero
            (log density −∞) is not an error under `adjust`: it is rejected.
    """
    batch = start[0].shape[0]
    s = torch.as_tensor(step_size, dtype=start[0].dtype, device=start[0].device).expand(batch).clone()
    watch = _FiniteWatch(density, s, adjust)
    state = density.evaluate(start)
    watch.look(0, state, at_start=True)
    measured = measure or adjust or adapt_steps > 0 or on_step is not None
    accepted, cut = torch.zeros_like(s), torch.zeros_like(s)
    if on_step is not None:
        on_step(0, state, torch.ones_like(s))
    c = coefficients(s, scheme, density.space, temperature)
    tamed: tuple[ChainState, Tensor] | None = None  # of `state`, where the step before has it already
    for step in range(1, steps + 1):
        n = noise.normal(step)
        here = state
        if taming is not None:
            here, was_cut = tamed or tame(state, c, taming)
            cut += was_cut
        proposal = propose(here, c, n)
        if step == steps and not measured:
            watch.finish(step, proposal)
            return ChainResult(proposal, s, tamed=None if taming is None else cut / steps)
        new = density.evaluate(proposal)
        watch.look(step, new)
        if measured:
            tamed = None if taming is None else tame(new, c, taming)
            log_alpha = log_acceptance(here, tamed[0] if tamed else new, c, n, temperature)
            acceptance = log_alpha.exp().clamp(max=1.0)
            accepted += acceptance
            if adjust:
                new = _select(noise.uniform(step).log() < log_alpha, new, state)
                tamed = None
            if step <= adapt_steps:
                s = s * torch.exp(step**-0.6 * (acceptance - target_acceptance))
                s = s.clamp(max=2 * math.sqrt(temperature)) if scheme == "crank_nicolson" else s
                watch.step_size = s
                c, tamed = coefficients(s, scheme, density.space, temperature), None
            if on_step is not None:
                on_step(step, new, acceptance)
        state = new
    watch.finish(steps, state.position)
    share = max(steps, 1)
    return ChainResult(state.position, s, state, accepted / share, None if taming is None else cut / share)


def _select(accept: Tensor, new: ChainState, old: ChainState) -> ChainState:
    """Row by row the new state where accepted, the old one elsewhere."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(accept.reshape(-1, *([1] * (a.ndim - 1))), a, b)

    return ChainState(
        position=tuple(map(pick, new.position, old.position)),
        negative_energy=pick(new.negative_energy, old.negative_energy),
        log_density=pick(new.log_density, old.log_density),
        gradient=tuple(map(pick, new.gradient, old.gradient)),
    )


class _FiniteWatch:
    """Notes on the device, step by step, what stopped being finite; tells the host every few steps."""

    def __init__(self, density: JointDensity, step_size: Tensor, adjust: bool) -> None:
        self.step_size = step_size
        self._density = density
        self._free = density.topdown.free
        self._adjust = adjust
        self._pending: list[tuple[int, Tensor]] = []
        self._largest = [0.0] * len(self._free)

    def look(self, step: int, state: ChainState, *, at_start: bool = False) -> None:
        """A row of three flags or figures per layer (energy bad, gradient bad, largest |f|), and one flag for the density."""
        energy, log_density, gradient = state.negative_energy, state.log_density, state.gradient
        zero_density = torch.isneginf(log_density) & (self._adjust and not at_start)
        bad_energy = (~torch.isfinite(energy) & ~zero_density[:, None]).any(0)
        bad_gradient = torch.stack([(~torch.isfinite(g)).flatten(1).any(1) & ~zero_density for g in gradient], 1).any(0)
        bad_density = (~torch.isfinite(log_density) & ~zero_density).any()[None]
        flags = torch.cat([bad_energy, bad_gradient, bad_density]).to(energy.dtype)
        self._pending.append((step, torch.cat([flags, energy.abs().amax(0)])))
        if at_start or len(self._pending) >= _CHECK_EVERY:
            self._read()

    def finish(self, step: int, position: Sequence[Tensor]) -> None:
        """Reads what is left and looks at the last state of all, whose density was not needed."""
        self._read()
        energy = self._density.negative_energy(position)
        sound = [bool(torch.isfinite(p).all() and torch.isfinite(energy[:, i]).all()) for i, p in enumerate(position)]
        if not all(sound):
            layer = self._worst([not s for s in sound])
            self._fail(step, layer, f"z_{layer} or its energy f_{layer} at the end of layer {layer} is not finite")

    def _read(self) -> None:
        if not self._pending:
            return
        table = torch.stack([row for _, row in self._pending]).tolist()
        steps, self._pending = [step for step, _ in self._pending], []
        n = len(self._free)
        for step, row in zip(steps, table, strict=True):
            for flags, what in ((row[:n], "the energy f_{0}(z_{0})"), (row[n : 2 * n], "the gradient")):
                if any(flags):
                    layer = self._worst([bool(f) for f in flags])
                    self._fail(step, layer, f"{what.format(layer)} of layer {layer} is not finite")
            if row[2 * n]:
                self._fail(step, None, "the log density (log p_β or the likelihood) is not finite")
            self._largest = row[2 * n + 1 :]

    def _worst(self, bad: Sequence[bool]) -> int:
        """Of the layers that are bad, the one whose |f| was largest just before: one explosion drags the others along."""
        candidates = [i for i, is_bad in enumerate(bad) if is_bad]
        return self._free[max(candidates, key=lambda i: self._largest[i])]

    def _fail(self, step: int, layer: int | None, what: str) -> None:
        raise DivergenceError(
            f"The Langevin chain diverged at step {step}: {what}. Use a smaller step_size (it was "
            f"{float(self.step_size.median()):.3g}; prior.tune_step_size() finds one) or adjust=True; if it is not finite at "
            "step 0 already, the energy or "
            "the generator itself is at fault.",
            layer=layer,
            step=step,
        )
