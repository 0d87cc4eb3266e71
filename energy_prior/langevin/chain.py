"""One chain, from start to end: the loop over steps, in memory that does not grow with them, and the watch over it."""

from __future__ import annotations

__all__ = ["ChainResult", "run_chain"]

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from energy_prior._util import not_none
from energy_prior.errors import DivergenceError
from energy_prior.langevin._threads import Halt
from energy_prior.langevin.backends import Backend
from energy_prior.langevin.density import JointDensity, matrix_products
from energy_prior.langevin.noise import NoiseSource
from energy_prior.langevin.step import Draws, End, Info, StepConfig
from energy_prior.langevin.trajectory import Frame, Trajectory

_BLOCK = 64


@dataclass(frozen=True)
class ChainResult:
    """The end of a chain, one row per chain of the batch.

    Attributes:
        position: the free layers at the end, ascending, (batch, *shape) each: ε_i in noise space, z_i in latent space.
        latents: (z_1, …, z_L) at the end, the held layers included, (batch, *latent_shape) each.
        step_size: the step size s at the end, (batch,), in units of the position: of ε_i, or of z_i.
        acceptance: mean over the steps of the acceptance probability, (batch,), in [0, 1]; None if nothing asked for it.
        drift_norm: ‖∇ log p̃‖ over all free layers at the end, (batch,), nats per unit of the position; None as for
            `acceptance`.
        cut_share: share of the steps whose drift was cut, (batch,), in [0, 1]; None without `max_drift`.
        negative_energy: Σ_i f_i of the free layers at the start and after every step, (steps + 1, batch), nats; None if not
            traced.
        trajectory: the frames that were asked for; None if none were.

    Examples:
        >>> from energy_prior import ChainSettings, load_example
        >>> from energy_prior.langevin import sample_target
        >>> target = load_example().model.target(4)
        >>> result = sample_target(target, ChainSettings(steps=5), default_step_size=0.2, trace=True).result
        >>> result.step_size
        tensor([0.2000, 0.2000, 0.2000, 0.2000])
        >>> result.negative_energy.shape  # at the start and after each of the five steps
        torch.Size([6, 4])
    """

    position: tuple[Tensor, ...]
    latents: tuple[Tensor, ...]
    step_size: Tensor
    acceptance: Tensor | None = None
    drift_norm: Tensor | None = None
    cut_share: Tensor | None = None
    negative_energy: Tensor | None = None
    trajectory: Trajectory | None = None


def run_chain(
    density: JointDensity,
    start: Sequence[Tensor],
    config: StepConfig,
    *,
    steps: int,
    step_size: float | Tensor,
    noise: NoiseSource,
    backend: Backend,
    adapt_steps: int = 0,
    every: int | None = None,
    halt: Halt | None = None,
) -> ChainResult:
    """Runs one Langevin chain per row of the batch.

    An unadjusted step costs one gradient evaluation. The acceptance probability of every step is free except for one
    evaluation at the end, so it can be had of unadjusted chains too.

    During the first `adapt_steps` steps each chain adapts its own step size, log s += t^(−0.6) (min(1, α) −
    `config.target_acceptance`) (Robbins–Monro; Andrieu and Thoms, Statistics and Computing 2008), then keeps it: chains stay
    independent of the rest of the batch.

    Args:
        density: the target, as `backend.prepare` gives it.
        start: the free layers at the start, ascending, in the density's coordinates; (batch, *shape) each.
        config: static configuration of the steps; measured if anything else here or in it needs densities.
        steps: number of steps, ≥ 0.
        step_size: s > 0, of all chains, or one per chain, (batch,).
        noise: the chain's random numbers.
        backend: how steps are made.
        adapt_steps: number of first steps that adapt the step size.
        every: ≥ 1; record a frame at the start and after every `every` steps. None: no frames.
        halt: whether chains of other parts of the batch have failed.

    Raises:
        DivergenceError: if a density or gradient stops being finite; it names the layer and the step. Noted on the device in
            every step; on a CPU it is raised within 127 steps, elsewhere at the end, as the host never waits for a chain
            under way. A proposal of density zero (log density −∞) is not an error with `adjust`: it is rejected.
    """
    # `finalize` makes the last steps of an unmeasured chain: nothing needs the density where they arrive
    looped = steps if config.measured else steps - min(steps, backend.tail(steps))
    like, series = start[0], [float(t) ** -0.6 for t in range(1, adapt_steps + 1)]
    gains = torch.tensor(series, dtype=like.dtype, device=like.device)
    with matrix_products(config.precision):
        state, info = backend.init(density, config, start, step_size)
        sums, watch = _Sums(state.step_size), _FiniteWatch(density)
        watch.note(info)
        watch.fold(state.step_size)
        traced = [not_none(info.negative_energy)] if config.traced else []
        frames = [Frame.of(density, 0, state, torch.ones_like(state.step_size))] if every else []
        t = 0
        while t < looped:
            config = config._replace(adapt=t < adapt_steps)
            until = [looped - t, *([adapt_steps - t] if config.adapt else []), *([every - t % every] if every else [])]
            count = backend.span(density, config, noise, min(until))
            # every backend does what `energy_prior.langevin.step.step` does; `propose` there is the Langevin step
            state, info = backend.step(density, config, state, Draws(noise, t + 1, count, gains))
            t += count
            sums.add(info)
            watch.note(info)
            if config.traced:
                traced.append(not_none(info.negative_energy))
            if watch.full:
                _look(watch, state.step_size, t, halt)
            if every and t % every == 0:
                frames.append(Frame.of(density, t, state, sums.accepted_since() / every))
    end, info = backend.finalize(density, config, state, Draws(noise, looped + 1, steps - looped, gains))
    sums.add(info)
    watch.note(info)
    watch.finish(steps, end, state.step_size)
    share = max(steps, 1)
    return ChainResult(
        position=end.position,
        latents=end.latents,
        step_size=state.step_size,
        acceptance=sums.accepted / share if config.measured else None,
        drift_norm=density.drift_norm(state.position, state.gradient) if config.measured else None,
        cut_share=sums.cut / share if config.max_drift is not None else None,
        negative_energy=torch.cat(traced) if config.traced else None,
        trajectory=Trajectory.of(frames) if every else None,
    )


def _look(watch: _FiniteWatch, step_size: Tensor, step: int, halt: Halt | None) -> None:
    """Lets the watch look, tells the chains of other parts what it finds, and ends with them."""
    try:
        watch.fold(step_size)
    except DivergenceError:
        if halt is not None:
            halt.request(step)
        raise
    if halt is not None:
        halt.check(step)


class _Sums:
    """Acceptance probabilities, and steps with a cut drift, of every chain so far, (batch,)."""

    def __init__(self, like: Tensor) -> None:
        self._accepted = self._since = self.cut = torch.zeros_like(like)

    def add(self, info: Info) -> None:
        """Takes the next steps in."""
        self._since = self._since if info.accepted is None else self._since + info.accepted
        self.cut = self.cut if info.cut is None else self.cut + info.cut

    def accepted_since(self) -> Tensor:
        """The sum of the acceptance probabilities since the last time this was asked for."""
        since = self._since
        self._accepted, self._since = self._accepted + since, torch.zeros_like(since)
        return since

    @property
    def accepted(self) -> Tensor:
        """The sum of all acceptance probabilities."""
        return self._accepted + self._since


class _FiniteWatch:
    """Remembers on the device the first step where something was not finite, and the one before, in constant memory."""

    def __init__(self, density: JointDensity) -> None:
        self._free = density.topdown.free
        self._early = density.topdown.reference.device.type == "cpu"  # where reading waits for nothing
        self._rows: list[Tensor] = []
        self._folded = 0  # number of rows in the record; the first row is step 0
        self._record: Tensor | None = None  # step (−1: none yet), its check, the one before, the latest

    @property
    def full(self) -> bool:
        """Whether it is time to `fold`."""
        return sum(map(len, self._rows)) >= _BLOCK

    def note(self, info: Info) -> None:
        """Takes the finite checks of consecutive steps in."""
        if info.finite_check is not None:
            self._rows.append(info.finite_check)

    def fold(self, step_size: Tensor) -> None:
        """Takes the rows since the last time into the record; no host waits, on a CPU it is read."""
        self._record_rows()
        if self._early:
            self._read(step_size)

    def finish(self, steps: int, end: End, step_size: Tensor) -> None:
        """Reads what is left, and looks at the last position of all, whose density may not have been needed."""
        self._record_rows()
        self._read(step_size)
        bad = [not math.isfinite(value) for value in end.finite_check.tolist()]
        if any(bad):
            layers = len(self._free)
            latest = [0.0] * layers if self._record is None else self._record[1:].reshape(3, -1)[2].tolist()
            layer = self._worst([bad[i] or bad[layers + i] for i in range(layers)], latest)
            self._fail(steps, layer, f"z_{layer} or its energy f_{layer} at the end of layer {layer} is not finite", step_size)

    def _record_rows(self) -> None:
        if not self._rows:
            return
        rows = torch.cat(self._rows)
        before = rows.new_zeros(1, rows.shape[1]) if self._record is None else self._record[None, -rows.shape[1] :]
        bad = ~torch.isfinite(rows).all(1)
        at = bad.to(torch.int64).argmax()
        step = torch.where(bad.any(), (at + self._folded).to(rows.dtype), -1.0)
        row, previous = (table.index_select(0, at[None])[0] for table in (rows, torch.cat([before, rows])))
        found = torch.cat([step[None], row, previous, rows[-1]])
        self._record = found if self._record is None else torch.where(self._record[0] >= 0, self._record, found)
        self._rows, self._folded = [], self._folded + len(rows)

    def _read(self, step_size: Tensor) -> None:
        if self._record is None:
            return
        step, *values = self._record.tolist()
        if step < 0:
            return
        width, layers = len(values) // 3, len(self._free)
        broken, before = [not math.isfinite(value) for value in values[:width]], values[width : 2 * width]
        for flags, what in ((broken[:layers], "the energy f_{0}(z_{0})"), (broken[layers : 2 * layers], "the gradient")):
            if any(flags):
                layer = self._worst(flags, before)
                self._fail(int(step), layer, f"{what.format(layer)} of layer {layer} is not finite", step_size)
        self._fail(int(step), None, "the log density (log p_β or the likelihood) is not finite", step_size)

    def _worst(self, bad: Sequence[bool], before: Sequence[float]) -> int:
        """Of the layers that are bad, the one whose |f| was largest just before: one explosion drags the others along."""
        candidates = [i for i, is_bad in enumerate(bad) if is_bad]
        return self._free[max(candidates, key=lambda i: before[i])]

    def _fail(self, step: int, layer: int | None, what: str, step_size: Tensor) -> None:
        remedy = (
            f"Use a smaller step_size (it was {float(step_size.median()):.3g}; prior.tune_step_size() finds one) or "
            "adjust=True."
            if step
            else "That is where chains start, so no step_size is at fault: the energy or the generator is not finite there, or "
            "a layer that is held, or was drawn by infer, is where its prior cannot be (energy_prior.check_generator)."
        )
        raise DivergenceError(
            f"The Langevin chain diverged at step {step}: {what}. {remedy}",
            layer=layer,
            step=step,
        )
