"""One update: gradients averaged, clipped and decayed; callbacks between iterations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import X, make, seeded, weights
from torch import Tensor, nn

from energy_prior import ArgumentError, TrainingWarning, fit_elbo
from energy_prior.training import RunConfig
from energy_prior.training.distributed import Engine
from energy_prior.training.loop import Group, run_loop
from energy_prior.training.turns import Turns


class Line:
    """A task whose loss is slope · mean(x) · w: its gradient is known."""

    name = "line"

    def __init__(self, slope: float, clip: float = 1e9, decay: float = 0.0) -> None:
        self.weight, self.slope = nn.Parameter(torch.tensor([2.0])), slope
        self.lost: dict[str, float] | None = None
        self.groups = [Group("line", [self.weight], 0.1, decay, clip)]

    def loss(self, x: Tensor, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.slope * x.mean() * self.weight.sum()
        return loss, {"loss": loss}

    def look(self, first: int, figures: dict[str, Tensor]) -> dict[str, float]:
        return {"gradient_norm_line": float(figures["gradient_norm_line"][-1])}

    def begin(self) -> None: ...
    def updated(self, iteration: int) -> None: ...
    def finish(self) -> None: ...
    def picture(self) -> None: ...
    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None: ...


def gradients(task: Line, config: RunConfig, batches: Any, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the optimiser was given in each update."""
    seen: list[float] = []
    original = torch.optim.AdamW.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert task.weight.grad is not None
        seen.append(float(task.weight.grad))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run_loop(task, batches, config, Engine(), Turns(Engine(), None, torch.device("cpu")))  # type: ignore[arg-type]
    return seen


def numbers(*values: float) -> Iterator[Tensor]:
    yield from (torch.tensor([v]) for v in values)


def test_gradients_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(iterations=2, progress=False, log_every=1)
    assert gradients(Line(100.0, clip=3.0), config, numbers(1.0, 0.01), monkeypatch) == pytest.approx([3.0, 1.0])


def test_accumulated_gradients_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(iterations=2, accumulate=2, progress=False)
    assert gradients(Line(1.0), config, numbers(1.0, 3.0, 5.0, 9.0), monkeypatch) == pytest.approx([2.0, 7.0])


def test_weights_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Line(0.0, decay=0.5)
    gradients(task, RunConfig(iterations=1, progress=False), numbers(1.0), monkeypatch)
    assert float(task.weight.detach()) == pytest.approx(2.0 * (1 - 0.1 * 0.5))


# -------------------------------------------------------------------------------------------------------------- callbacks


def test_a_callback_gets_a_copy_of_every_entry(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    def callback(entry: dict[str, float]) -> None:
        seen.append(dict(entry))
        entry.clear()

    options: dict[str, Any] = {"iterations": 9, "log_every": 4, "checkpoint_every": 6, "batch_size": 16, "progress": False}
    result = make().fit(X, **options, run_dir=tmp_path, callback=callback)
    assert [entry["iteration"] for entry in seen] == [4, 6, 8, 9]
    assert seen == result.history


def test_a_callback_changes_nothing() -> None:
    found = []
    for callback in (None, lambda entry: torch.rand(3)):
        prior = make()
        prior.fit(X, iterations=8, log_every=2, batch_size=16, step_size=0.3, progress=False, rng=seeded(), callback=callback)
        found.append(weights(prior))
    assert torch.equal(*found)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_error_in_a_callback_ends_the_run_and_the_average_is_kept(error: type[BaseException]) -> None:
    prior = make()
    before = weights(prior)

    def stops(entry: dict[str, float]) -> None:
        if entry["iteration"] == 6:
            raise error

    prior.calibration.count.fill_(1)
    with pytest.raises(error):
        prior.fit(X, iterations=20, log_every=2, batch_size=16, step_size=0.3, progress=False, rng=seeded(), callback=stops)
    kept = make()
    kept.fit(X, iterations=20, log_every=2, batch_size=16, step_size=0.3, progress=False, rng=seeded())
    assert not torch.equal(weights(prior), before)
    assert not torch.equal(weights(prior), weights(kept))
    assert not prior.calibration.is_set, "it was that of other energies"
    assert all(p.grad is None and p.requires_grad for p in prior.parameters())


def test_a_callback_has_to_be_callable() -> None:
    with pytest.raises(ArgumentError, match="callback: expected a function of an entry of the history, or None, got int"):
        make().fit(X, callback=3)  # type: ignore[arg-type]
    vae = make().generator
    with pytest.raises(ArgumentError, match="callback: expected a function"):
        fit_elbo(vae, X, callback="print")  # type: ignore[arg-type]


def test_warnings_point_at_the_line_that_called() -> None:
    with pytest.warns(TrainingWarning) as caught:
        make().fit(X, "two_stage", iterations=2, step_size=50.0, steps=3, log_every=1, progress=False)
    assert {warning.filename for warning in caught} == {__file__}
