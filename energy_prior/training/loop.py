"""The loop that every run of training shares: updates, looks, checkpoints; it goes on where a killed run stood."""

from __future__ import annotations

__all__ = [
    "Callback",
    "Group",
    "RunRecord",
    "Task",
    "check_callback",
    "check_state_is_tensors",
    "description",
    "run_loop",
]

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from energy_prior.checkpoint import digest
from energy_prior.checks.settings import require_extra
from energy_prior.errors import ArgumentError, DivergenceError, TrainingWarning, warn
from energy_prior.process import random_state, set_random_state
from energy_prior.training.batches import Batches
from energy_prior.training.config import RunConfig
from energy_prior.training.distributed import Engine
from energy_prior.training.progress import progress_bar
from energy_prior.training.run_dir import RunFolder
from energy_prior.training.schedule import warmup_cosine
from energy_prior.training.state import Each, Either, Given, Such, number, random_stream
from energy_prior.training.turns import Turns, same_stream_after

Callback = Callable[[dict[str, float]], object]
"""What a user wants to be told of a run: it is called with a copy of every entry of the history."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate.

    Attributes:
        name: what errors and the history call them.
        parameters: those that learn.
        learning_rate: its peak.
        weight_decay: of AdamW.
        clip: largest norm of an update's gradient; inf: any.
    """

    name: str
    parameters: Sequence[nn.Parameter]
    learning_rate: float
    weight_decay: float
    clip: float = math.inf


class Task(Protocol):
    """What a run learns. The loop calls these, each in a turn of the run.

    `figures` are scalars on the device, those named "largest_…" maxima. `lost`: figures of an update that is left out, because
    its batch gives no finite gradient; what to make of several is for `look`. None: such an update is not left out.
    """

    name: str
    lost: dict[str, float] | None
    groups: Sequence[Group]

    def begin(self) -> None:
        """Before the first iteration of a new run."""

    def loss(self, x: Tensor, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch, whose gradient is taken, and figures to look at; "loss" among them."""
        ...

    def updated(self, iteration: int) -> None:
        """After every update."""

    def look(self, first: int, figures: dict[str, Tensor]) -> dict[str, float]:
        """A window of iterations from `first` on, each figure (iterations,): raises `DivergenceError`, or gives the entry."""
        ...

    def finish(self) -> None:
        """After the last iteration: raises `DivergenceError` if what was learned last is not sound."""

    def picture(self) -> Tensor | None:
        """A grid's worth of samples in [0, 1], (n, c, h, w), or None if the data are no images."""
        ...

    def state(self) -> dict[str, Any]:
        """What it needs to go on."""
        ...

    def state_like(self) -> Any:
        """The pattern of such a state, as for `energy_prior.training.state.unlike`."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from such a state."""


@dataclasses.dataclass
class RunRecord:
    """What the loop itself knows of a run.

    Attributes:
        history: an entry for every look.
        resumed_at: the iteration after which a run that had been stopped went on; None if it did not.
    """

    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    resumed_at: int | None = None


def check_callback(callback: Any) -> None:
    """Something that can be called, or None."""
    if callback is not None and not callable(callback):
        raise ArgumentError(
            f"callback: expected a function of an entry of the history, or None, got {type(callback).__name__}."
        )


def run_loop(
    task: Task,
    batches: Batches,
    config: RunConfig,
    engine: Engine,
    turns: Turns,
    *,
    run_dir: str | os.PathLike[str] | None = None,
    identity: dict[str, Any] | None = None,
    callback: Callback | None = None,
) -> RunRecord:
    """Runs the iterations of `config`, from the last checkpoint in `run_dir` if there is one.

    Args:
        task: what is learned.
        batches: its data.
        config: settings of the run.
        engine: the processes that share it.
        turns: when it computes: an iteration is a turn.
        run_dir: folder for checkpoints, TensorBoard and sample grids; None: nothing is written.
        identity: what else a run must keep to go on, beside its settings and data.
        callback: called between two turns with a copy of every new entry of the history; None: nothing is.

    Returns:
        The history, and where it went on.
    """
    if run_dir is None and (config.tensorboard or getattr(config, "sample_every", 0)):
        raise ArgumentError("run_dir: expected a folder, as tensorboard or sample_every asks for files in it, got None.")
    if getattr(config, "sample_every", 0):
        require_extra("matplotlib.figure", "examples")
    folder = None
    if run_dir is not None:
        known = {"task": task.name, "data": batches.fingerprint(), **config.resumable(), **(identity or {})}
        folder = RunFolder(run_dir, engine, known)
    with folder.held() if folder else contextlib.nullcontext():
        return _Loop(task, batches, config, engine, turns, folder).run(callback)


def description(module: nn.Module, name: str) -> dict[str, Any]:
    """What a run must find again in a module, beside the weights that it learns: its parts, their settings and parameters."""
    parts = {f"{name}.{key}".rstrip("."): f"{type(p).__name__}({p.extra_repr()})" for key, p in module.named_modules()}
    learned = {f"{name}.{key}": [list(p.shape), str(p.dtype), p.requires_grad] for key, p in module.named_parameters()}
    fixed = {key: p for key, p in module.named_parameters() if not p.requires_grad}
    return parts | learned | ({f"{name} (parameters that do not learn)": digest(fixed)} if fixed else {})


def check_state_is_tensors(module: nn.Module, what: str, error: type[Exception]) -> None:
    """Raises `error` unless everything in a module's `state_dict()` is a tensor: nothing else can be written to a file.

    Args:
        module: what is learned.
        what: the argument that it is, for the message.
        error: the kind of error.
    """
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            owner = name.rpartition(".")[0]
            part = module.get_submodule(owner)
            raise error(
                f"{what}: the state of {type(part).__name__}"
                + (f" ({owner})" if owner else "")
                + f" holds a {type(value).__name__} under {name!r}, which a checkpoint cannot keep. Make it a tensor "
                "(register_buffer, or a get_extra_state that gives one)."
            )


class _Loop:
    """One run: the optimiser, the record, and what is due after an update."""

    def __init__(
        self, task: Task, batches: Batches, config: RunConfig, engine: Engine, turns: Turns, folder: RunFolder | None
    ) -> None:
        self.task, self.batches, self.config, self.engine = task, batches, config, engine
        self.turns, self.folder = turns, folder
        self.weights = [p for group in task.groups for p in group.parameters]
        self.device = self.weights[0].device
        self.optimizer = torch.optim.AdamW(
            [{"params": list(g.parameters), "lr": g.learning_rate, "weight_decay": g.weight_decay} for g in task.groups]
        )
        self.record = RunRecord()
        self.window: list[dict[str, Tensor]] = []
        self.writer: Any = None

    def run(self, callback: Callback | None) -> RunRecord:
        """All iterations that are left. The objective is `task.loss`: in `rules.py` for `fit`, in `elbo.py` for `fit_elbo`."""
        config, total = self.config, self.config.iterations
        with self.turns.turn():
            done = self._resume()
            if done is None:
                self.task.begin()
                done = 0
        if config.tensorboard and self.engine.main and self.folder is not None:
            tensorboard = require_extra("torch.utils.tensorboard", "train")
            self.writer = tensorboard.SummaryWriter(str(self.folder.path / "tensorboard"), purge_step=done + 1)
        bar = progress_bar(self.task.name, total, done, shown=config.progress and self.engine.main)
        try:
            for iteration in range(done + 1, total + 1):
                with self.turns.turn():
                    entry = self._iterate(iteration)
                bar.advance(entry)
                if entry is not None and callback is not None:
                    callback(dict(entry))
            with self.turns.turn():
                self.task.finish()
        finally:
            bar.close()
            self.optimizer.zero_grad(set_to_none=True)
            if self.writer is not None:
                self.writer.close()
        return self.record

    def _iterate(self, iteration: int) -> dict[str, float] | None:
        """An update and what is due after it; the new entry of the history, if there is one."""
        config = self.config
        self.window.append(self._update(iteration))
        every = getattr(config, "sample_every", 0)
        last = iteration == config.iterations
        saves = self.folder is not None and (iteration % config.checkpoint_every == 0 or last)
        pictured = bool(every) and self.folder is not None and iteration % every == 0
        if not (saves or pictured or iteration % config.log_every == 0 or last):
            return None
        entry = self._look(iteration)
        if pictured:
            self._picture(iteration)
        if saves:
            self._save(iteration)
        return entry

    def _update(self, iteration: int) -> dict[str, Tensor]:
        """One iteration: the gradient averaged over batches and processes, and clipped where a group asks for it; a step."""
        config, task = self.config, self.task
        total: list[Tensor] | None = None
        figures: list[dict[str, Tensor]] = []
        failure: DivergenceError | None = None
        try:
            for _ in range(config.accumulate):
                with self.engine.autocast():
                    loss, seen = task.loss(next(self.batches), iteration)
                gradient = torch.autograd.grad(loss, self.weights, allow_unused=True, materialize_grads=True)
                total = list(gradient) if total is None else [a + b for a, b in zip(total, gradient, strict=True)]
                figures.append({name: value.detach() for name, value in seen.items()})
        except DivergenceError as error:
            failure = error
        if failure is not None and task.lost is not None and iteration > 1:  # the first one's is no stray batch
            total = [torch.full_like(w, torch.nan, requires_grad=False) for w in self.weights]
            figures = [{name: total[0].new_tensor(value) for name, value in task.lost.items()}]
            failure = None
        total = [torch.zeros_like(w) for w in self.weights] if failure or total is None else total
        self._share(iteration, [g / config.accumulate for g in total] if config.accumulate > 1 else total, failure)
        merged = {name: _merge(name, torch.stack([f[name] for f in figures])) for name in figures[0]}
        for group in task.groups:
            merged[f"gradient_norm_{group.name}"] = nn.utils.clip_grad_norm_(group.parameters, group.clip).detach()
        norms = [merged[f"gradient_norm_{group.name}"] for group in task.groups]
        if task.lost is None or bool(torch.stack(norms).isfinite().all()):
            self._step(iteration)
        self.optimizer.zero_grad(set_to_none=True)
        task.updated(iteration)
        return merged

    def _step(self, iteration: int) -> None:
        """The optimiser's step, at the learning rates of this iteration."""
        config = self.config
        factor = warmup_cosine(iteration - 1, config.iterations)
        for settings, group in zip(self.optimizer.param_groups, self.task.groups, strict=True):
            settings["lr"] = group.learning_rate * factor
        # older torch makes AdamW's count of steps, at the first one, on the default device; it belongs on the CPU
        with contextlib.nullcontext() if self.optimizer.state else torch.device("cpu"):
            self.optimizer.step()

    def _share(self, iteration: int, gradient: list[Tensor], failure: DivergenceError | None) -> None:
        """Averages the gradients over the processes; where one of them has diverged, all stop."""
        failed = torch.full_like(gradient[0].flatten()[:1], float(failure is not None))
        *gradient, failures = self.engine.mean([*gradient, failed])
        if failure is not None:
            raise failure
        if self.engine.world > 1 and bool(failures > 0):
            raise DivergenceError("another process has diverged; its own error says where.", step=iteration)
        for weight, g in zip(self.weights, gradient, strict=True):
            weight.grad = g

    def _look(self, iteration: int) -> dict[str, float]:
        """Reads the window, the worst over the processes, so that all of them stop or none; the entry of the history."""
        window, self.window = self.window, []
        names = list(window[0])
        table = torch.stack([torch.stack([row[name].to(torch.float64) for name in names]) for row in window])
        everywhere = self.engine.stacked(table)
        figures = {name: _merge(name, everywhere[:, :, i]) for i, name in enumerate(names)}
        entry = {"iteration": float(iteration), **self.task.look(iteration - len(window) + 1, figures)}
        self.record.history.append(entry)
        if self.writer is not None:
            for name, value in entry.items():
                self.writer.add_scalar(f"{self.task.name}/{name}", value, iteration)
        return entry

    def _picture(self, iteration: int) -> None:
        """A grid of samples. Pictures do not change a run."""
        if not self.engine.main or self.folder is None:
            return
        try:
            with same_stream_after(self.device):
                images = self.task.picture()
        except DivergenceError as error:  # of a sampler's longer chains: no reason to stop
            warn(f"No samples drawn after iteration {iteration}: {error}", TrainingWarning)
            return
        if images is None:
            return
        from energy_prior import plots

        out = self.folder.path / "samples"
        out.mkdir(exist_ok=True)
        plots.image_panels(out / f"{iteration:08d}.png", {f"joint prior, iteration {iteration}": images})
        if self.writer is not None:
            self.writer.add_images(f"{self.task.name}/samples", images.clamp(0, 1), iteration)

    def _save(self, iteration: int) -> None:
        if self.folder is None:
            return
        optimizer = [self.optimizer.state[p] for p in self.weights]
        state = {
            "weights": [p.detach() for p in self.weights],
            "optimizer": [dict(s) for s in optimizer],
            "task": self.task.state(),
            "data": self.batches.state(),
            "random": random_state(self.device),
            "history": self.record.history,
        }
        self.folder.save(iteration, state)

    def _state_like(self) -> dict[str, Any]:
        """The pattern of what `_save` writes."""
        step = Such(lambda t: isinstance(t, Tensor) and t.ndim == 0 and 0 <= float(t) < math.inf, "a number of steps")
        optimizer = [Either(({}, {"step": step, "exp_avg": w, "exp_avg_sq": w})) for w in self.weights]
        return {
            "weights": self.weights,
            "optimizer": optimizer,
            "task": self.task.state_like(),
            "data": self.batches.state_like(),
            "random": Given({"cpu": random_stream}),
            "history": Each(list, Each(dict, number), least=1),
        }

    def _resume(self) -> int | None:
        """Goes back to the last checkpoint; the iteration that it was taken after, or None if there is none."""
        found = None if self.folder is None else self.folder.load(self.device, self._state_like())
        if found is None:
            return None
        iteration, state = found
        with torch.no_grad():
            for weight, saved in zip(self.weights, state["weights"], strict=True):
                weight.copy_(saved)
        for weight, saved in zip(self.weights, state["optimizer"], strict=True):
            self.optimizer.state[weight] = saved | ({"step": saved["step"].cpu()} if "step" in saved else {})
        self.task.load_state(state["task"])
        self.batches.load_state(state["data"])
        self.record.history[:] = state["history"]
        self.record.resumed_at = iteration
        set_random_state(state["random"], self.device)
        return iteration


def _merge(name: str, values: Tensor) -> Tensor:
    """Over the first dimension: the maximum of figures named "largest_…", the mean of others; NaN stays NaN."""
    return values.amax(0) if name.startswith("largest_") else values.mean(0)
