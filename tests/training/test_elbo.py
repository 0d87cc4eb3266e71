"""Training of the generator by its ELBO."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import X, make, seeded, weights
from torch import Tensor, nn

from energy_prior import DivergenceError, GeneratorError, LadderVAE, TrainingWarning, fit_elbo
from energy_prior._util import not_none
from energy_prior.protocol import Inferred
from energy_prior.training import ElboConfig
from energy_prior.training.distributed import Engine
from energy_prior.training.elbo import _ElboTask, elbo


def test_kl_warmup_and_input_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8)
    task = _ElboTask(vae, None, ElboConfig(iterations=20, kl_warmup=10, input_noise=0.5), Engine())
    for iteration, weight in ((5, 0.5), (10, 1.0), (15, 1.0)):
        torch.manual_seed(1)
        loss, _ = task.loss(X, iteration)
        torch.manual_seed(1)
        torch.testing.assert_close(-loss, elbo(vae, X, weight, 0.5).mean())
    seen: list[Tensor] = []
    original = LadderVAE.infer
    monkeypatch.setattr(LadderVAE, "infer", lambda self, x, rng=None: (seen.append(x), original(self, x))[1])
    elbo(vae, X, 1.0, 0.5)
    assert float((seen[0] - X).std().detach()) == pytest.approx(0.5, rel=0.1)


def test_validation_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8)
    task = _ElboTask(vae, X, ElboConfig(iterations=2, kl_warmup=0, validation_draws=3), Engine())
    seen: list[int] = []
    original = LadderVAE.infer
    monkeypatch.setattr(LadderVAE, "infer", lambda self, x, rng=None: (seen.append(len(x)), original(self, x))[1])
    state = torch.get_rng_state()
    first, second = task._validation_elbo(), task._validation_elbo()
    assert first == second, "looks are compared with one another"
    assert torch.equal(torch.get_rng_state(), state), "and do not touch the stream that training draws from"
    assert seen == [64] * 6


def test_checkpoints_do_not_change_what_is_learned(tmp_path: Path) -> None:
    weights = []
    for folder in (None, tmp_path / "run"):
        torch.manual_seed(0)
        vae = LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8)
        options: dict[str, Any] = {"iterations": 14, "log_every": 3, "checkpoint_every": 5, "kl_warmup": 13, "batch_size": 16}
        fit_elbo(vae, X, validation=X, run_dir=folder, progress=False, rng=seeded(), **options)
        weights.append(torch.cat([p.detach().flatten() for p in vae.parameters()]))
    assert torch.equal(*weights)


def test_a_validation_elbo_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ElboTask, "_validation_elbo", lambda self: float("nan"))
    vae = LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8)
    with pytest.raises(DivergenceError, match="validation ELBO is nan"):
        fit_elbo(vae, X, validation=X, iterations=4, kl_warmup=0, log_every=2, progress=False)


class Stray(LadderVAE):
    """A generator whose batches of these numbers, from 1 on, have no finite loss, gradient or draws."""

    seen = 0
    strays: tuple[int, ...] = ()
    kind = "gradient"

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        inferred = super().infer(x, rng=rng)
        self.seen += self.training
        if not self.astray or self.kind == "elbo":
            return inferred
        if self.kind == "draws":
            return dataclasses.replace(inferred, log_q=inferred.log_q / 0)
        steep = inferred.log_q.sum() * 0
        return dataclasses.replace(inferred, log_q=inferred.log_q + (steep.sqrt() if self.kind == "gradient" else steep.log()))

    @property
    def astray(self) -> bool:
        return self.training and self.seen in self.strays

    def likelihood(self, state: Any) -> Any:
        p = super().likelihood(state)
        if not (self.astray and self.kind == "elbo"):
            return p
        return SimpleNamespace(log_prob=lambda x: p.log_prob(x) - math.inf)  # of a finite gradient


def stray(kind: str, strays: Sequence[int]) -> Stray:
    torch.manual_seed(0)
    vae = Stray((1, 4, 4), latent_dims=(3, 2), hidden=8)
    vae.kind, vae.strays = kind, tuple(strays)
    return vae


@pytest.mark.parametrize("kind", ["gradient", "draws", "elbo"])
def test_an_update_without_a_finite_gradient_is_left_out(kind: str) -> None:
    vae, after = stray(kind, (3, 4)), list[Tensor]()

    def keep(entry: dict[str, float]) -> None:
        after.append(weights(vae).clone())

    options: dict[str, Any] = {"iterations": 6, "batch_size": 64, "progress": False, "rng": seeded()}
    with pytest.warns(TrainingWarning, match="update of iteration 3 was left out") as said:
        result = fit_elbo(vae, X, validation=X, kl_warmup=5, log_every=1, callback=keep, **options)
    assert len(said) == 1
    assert result.skipped == 2
    same = [torch.equal(a, b) for a, b in zip(after, after[1:], strict=False)]
    assert same == [False, True, True, False, False]
    assert math.isfinite(not_none(result.validation_elbo))
    with pytest.warns(TrainingWarning, match="iteration 3"):
        history = fit_elbo(stray(kind, (3, 4)), X, validation=X, kl_warmup=5, log_every=4, **options).history
    assert all(math.isfinite(value) for entry in history for value in entry.values()), "of the updates that were made"


def test_a_run_that_goes_on_counts_what_was_left_out_before(tmp_path: Path) -> None:
    def stops(entry: dict[str, float]) -> None:
        if entry["iteration"] == 4:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"iterations": 14, "log_every": 1, "checkpoint_every": 4, "batch_size": 64, "progress": False}
    options |= {"run_dir": tmp_path, "rng": seeded()}
    with pytest.warns(TrainingWarning), pytest.raises(KeyboardInterrupt):
        fit_elbo(stray("gradient", (3, 4)), X, **options, callback=stops)
    options["rng"] = seeded()
    with pytest.raises(DivergenceError, match="iteration 12: .* in 10 updates in a row"):
        fit_elbo(stray("gradient", range(1, 10)), X, **options)


def test_ten_such_updates_in_a_row_are_divergence() -> None:
    options: dict[str, Any] = {"iterations": 30, "log_every": 4, "batch_size": 64, "progress": False}
    with pytest.warns(TrainingWarning):
        assert fit_elbo(stray("gradient", range(3, 12)), X, **options).skipped == 9
    vae = stray("gradient", range(3, 13))
    with (
        pytest.warns(TrainingWarning),
        pytest.raises(DivergenceError, match="iteration 12: its ELBO, or its gradient, was not finite in 10 updates in a row"),
    ):
        fit_elbo(vae, X, **options)
    assert all(bool(torch.isfinite(p).all()) for p in vae.parameters())


def test_a_first_batch_without_finite_draws_is_divergence() -> None:
    with pytest.raises(DivergenceError, match=r"iteration 1: generator\.infer: its draws"):
        fit_elbo(stray("draws", [1]), X, iterations=3, progress=False)


def test_a_run_without_any_update_is_divergence() -> None:
    with pytest.warns(TrainingWarning), pytest.raises(DivergenceError, match="not finite in 3 updates in a row"):
        fit_elbo(stray("gradient", [1, 2, 3]), X, iterations=3, batch_size=64, progress=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_half_precision_are_refused(dtype: torch.dtype) -> None:
    vae = LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8).to(dtype)
    with pytest.raises(GeneratorError, match=rf"in torch.float32 or torch.float64, got {dtype}.*model.float\(\)"):
        fit_elbo(vae, X.to(dtype), iterations=2, progress=False)


def test_wrappers() -> None:
    """A compiled model is trained as the model inside; one that has the model in `module` is refused."""
    options: dict[str, Any] = {"iterations": 3, "batch_size": 16, "progress": False}
    plain, inside = (make().generator for _ in range(2))
    fit_elbo(plain, X, **options, rng=seeded())
    fit_elbo(torch.compile(inside), X, **options, rng=seeded())  # type: ignore[arg-type]
    assert torch.equal(weights(plain), weights(inside))  # type: ignore[arg-type]
    with pytest.raises(GeneratorError, match=r"DataParallel.*\.module"):
        fit_elbo(nn.DataParallel(inside), X, **options)  # type: ignore[arg-type]


def test_a_callback_and_a_short_repr() -> None:
    seen: list[dict[str, float]] = []
    vae = make().generator
    result = fit_elbo(vae, X, iterations=5, log_every=2, batch_size=16, progress=False, callback=seen.append)
    assert seen == result.history
    assert [entry["iteration"] for entry in seen] == [2, 4, 5]
    assert "history" not in repr(result)


def test_an_error_in_a_callback_keeps_the_best_weights() -> None:
    def stops(entry: dict[str, float]) -> None:
        if entry["iteration"] == 6:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"kl_warmup": 0, "log_every": 2, "batch_size": 16, "progress": False}
    best, stopped = make().generator, make().generator
    fit_elbo(best, X, **options, iterations=12, validation=X[:8], rng=seeded(), learning_rate=1e-9)
    with pytest.raises(KeyboardInterrupt):
        fit_elbo(stopped, X, **options, iterations=12, validation=X[:8], rng=seeded(), callback=stops)
    assert isinstance(stopped, nn.Module)
    assert not torch.equal(weights(stopped), weights(best))  # type: ignore[arg-type]
    assert all(p.requires_grad and p.grad is None for p in stopped.parameters())


def test_validation_sets_that_are_arrays() -> None:
    options: dict[str, Any] = {"iterations": 4, "kl_warmup": 0, "log_every": 2, "batch_size": 16, "progress": False}
    found = [
        fit_elbo(make().generator, data, validation=validation, **options, rng=seeded()).validation_elbo
        for data, validation in ((X, X[:8]), (X.double().numpy(), X[:8].numpy()))
    ]
    assert found[0] == found[1]
