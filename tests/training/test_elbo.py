"""Training of the generator by its ELBO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import X, make, seeded, weights
from torch import Tensor, nn

from energy_prior import DivergenceError, GeneratorError, LadderVAE, fit_elbo
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

    options: dict[str, Any] = {"kl_warmup": 0, "log_every": 2, "batch_size": 16, "warmup": 0, "progress": False}
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
