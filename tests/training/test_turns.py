"""Runs beside other calls: seeded numbers are those alone, locks are held for an iteration, no two runs train the same."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from runs import X, make, seeded, weights
from torch import Tensor
from torch.distributions import Distribution

from energy_prior import ArgumentError, JointEBMPrior, LadderVAE, fit_elbo
from energy_prior.process import exclusive
from energy_prior.training import FitResult

SHORT: dict[str, Any] = {"iterations": 30, "log_every": 10, "batch_size": 16, "steps": 3, "progress": False}
FEW: dict[str, Any] = SHORT | {"iterations": 5}
PATIENCE = 60.0


@contextlib.contextmanager
def meanwhile(call: Callable[[], object]) -> Iterator[list[object]]:
    """Another thread makes this call again and again while the code inside runs; what the calls gave, or raised."""
    stop, seen = threading.Event(), []

    def work() -> None:
        while not stop.is_set():
            try:
                seen.append(call())
            except Exception as error:
                seen.append(error)
                return

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def score(prior: JointEBMPrior) -> Tensor:
    return prior.llr_score(X[:8], 1, num_samples=1, steps=3, step_size=0.2, rng=seeded(5))


def fitted(prior: JointEBMPrior, **settings: Any) -> tuple[Tensor, FitResult]:
    result = prior.fit(X, "two_stage", **SHORT, **settings, rng=seeded())
    return weights(prior.energies), result


def test_a_seeded_fit_and_seeded_scores_of_another_prior_beside_it_are_those_alone() -> None:
    other = make(seed=7)
    expected = score(other)
    alone, result = fitted(make())
    prior = make()  # drawing weights from the global stream is not for two threads at once
    with meanwhile(lambda: score(other)) as seen:
        beside, again = fitted(prior)
    assert torch.equal(alone, beside)
    assert again.history == result.history
    assert again.step_size == result.step_size
    assert len(seen) >= 3, "scores do not wait for the end of the run"
    assert all(isinstance(s, Tensor) and torch.equal(s, expected) for s in seen)
    assert all(p.requires_grad for p in other.parameters())


@pytest.mark.slow
def test_draws_from_the_global_stream_do_not_reach_a_seeded_fit() -> None:
    other = make(seed=7)
    alone, _ = fitted(make())
    prior = make()
    with meanwhile(lambda: other.sample(2, steps=1)):
        beside, _ = fitted(prior)
    assert torch.equal(alone, beside)


def test_scores_of_the_prior_that_is_trained_are_finite_and_leave_the_run_alone() -> None:
    alone, _ = fitted(make())
    prior = make()
    with meanwhile(lambda: score(prior)) as seen:
        beside, _ = fitted(prior)
    assert torch.equal(alone, beside)
    assert len(seen) >= 3
    assert all(isinstance(s, Tensor) and bool(torch.isfinite(s).all()) for s in seen)
    assert any(not torch.equal(s, seen[0]) for s in seen), "they are of weights on their way"  # type: ignore[arg-type]
    assert all(p.requires_grad for p in prior.parameters())


def test_a_fit_leaves_the_global_stream_as_it_was() -> None:
    prior = make()
    state = torch.get_rng_state()
    prior.fit(X, **SHORT, rng=seeded())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seeded_elbo_run_beside_seeded_scores_is_that_alone() -> None:
    settings: dict[str, Any] = {"iterations": 20, "kl_warmup": 4, "log_every": 5, "batch_size": 16, "progress": False}
    other, models = make(seed=7), [make().generator for _ in range(2)]
    expected, seen = score(other), [[], []]
    contexts = contextlib.nullcontext(seen[0]), meanwhile(lambda: score(other))
    for i, context in enumerate(contexts):
        with context as seen[i]:
            fit_elbo(models[i], X, validation=X[:16], rng=seeded(), **settings)
    assert torch.equal(*map(weights, models))  # type: ignore[arg-type]
    assert len(seen[1]) >= 3
    assert all(isinstance(s, Tensor) and torch.equal(s, expected) for s in seen[1])


def test_a_callback_runs_while_other_calls_can() -> None:
    """The callback waits for another thread's score, which would wait for ever if the run held its lock."""
    other, found = make(seed=7), []

    def waits(entry: dict[str, float]) -> None:
        thread = threading.Thread(target=lambda: found.append(score(other)), daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert Distribution._validate_args, "torch.distributions checks again between two turns"

    make().fit(X, **SHORT, callback=waits)
    assert len(found) == 3


def test_a_waiting_thread_is_next() -> None:
    """A thread that gives the lock back and takes it again does not overtake one that waits."""
    order: list[str] = []
    waiting = threading.Event()

    def other() -> None:
        waiting.set()
        with exclusive():
            order.append("other")

    thread = threading.Thread(target=other)
    with exclusive():
        thread.start()
        waiting.wait(PATIENCE)
        threading.Event().wait(0.2)  # until it is at the lock
    for _ in range(3):
        with exclusive():
            order.append("run")
    thread.join(PATIENCE)
    assert order[0] == "other"


# ------------------------------------------------------------------------------------------------------ two runs of the same


def inside(run: Callable[[Any], object], other: Callable[[], object]) -> None:
    """Starts another run in the callback of a first one."""
    run(lambda entry: other())


@pytest.mark.slow
def test_two_runs_cannot_train_the_same() -> None:
    prior = make()
    vae = prior.generator
    assert isinstance(vae, LadderVAE)
    second = JointEBMPrior(vae)
    short: dict[str, Any] = SHORT | {"iterations": 2, "log_every": 1}
    elbo: dict[str, Any] = {"iterations": 2, "kl_warmup": 0, "log_every": 1, "batch_size": 16, "progress": False}
    busy = "another run of training has not ended"
    with pytest.raises(ArgumentError, match=f"energies: {busy}"):
        inside(lambda c: prior.fit(X, **short, callback=c), lambda: prior.fit(X, **short))
    with pytest.raises(ArgumentError, match=f"energies: {busy}"):  # the same modules in another prior
        inside(lambda c: prior.fit(X, **short, callback=c), lambda: JointEBMPrior(vae, prior.energies).fit(X, **short))
    with pytest.raises(ArgumentError, match=f"generator: {busy}"):
        inside(lambda c: prior.fit(X, "variational", **short, callback=c), lambda: second.fit(X, "variational", **short))
    with pytest.raises(ArgumentError, match=f"generator: {busy}"):
        inside(lambda c: prior.fit(X, "variational", **short, callback=c), lambda: fit_elbo(vae, X, **elbo))
    with pytest.raises(ArgumentError, match=f"generator: {busy}"):
        inside(lambda c: fit_elbo(vae, X, **elbo, callback=c), lambda: fit_elbo(vae, X, **elbo))
    inside(lambda c: prior.fit(X, **short, callback=c), lambda: second.fit(X, **short))  # the generator only stands by


def test_a_random_generator_in_use_is_refused_elsewhere() -> None:
    rng, errors = seeded(), []
    other = make(seed=7)

    def use() -> None:
        try:
            other.sample(2, steps=1, rng=rng)
        except ArgumentError as error:
            errors.append(str(error))

    def in_a_thread(entry: dict[str, float]) -> None:
        thread = threading.Thread(target=use)
        thread.start()
        thread.join(PATIENCE)

    make().fit(X, **FEW, rng=rng, callback=in_a_thread)
    assert len(errors) == 1
    assert "rng: another thread's call uses this torch.Generator" in errors[0]


# ------------------------------------------------------------------------------------------------------- the caller's switches


@pytest.mark.slow
@pytest.mark.parametrize(
    "switch",
    [lambda: torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad, torch.inference_mode],
    ids=["autocast", "no_grad", "inference"],
)
def test_a_fit_inside_a_switch_of_the_callers_learns_the_same(switch: Callable[[], Any]) -> None:
    plain, inside = make(), make()
    for prior, context in ((plain, contextlib.nullcontext()), (inside, switch())):
        with context:
            prior.fit(X, "variational", **FEW, rng=seeded())
    assert torch.equal(weights(plain), weights(inside))
    assert torch.equal(plain.step_size, inside.step_size)


def test_weights_are_not_old_ones_in_the_callers_autocast() -> None:
    """Autocast keeps bf16 copies of weights until the outermost one ends."""
    prior = make()
    vae = prior.generator
    assert isinstance(vae, LadderVAE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vae.decoder(torch.ones(1, 3))
        prior.fit(X, "variational", **FEW, generator_learning_rate=0.1)
        inside = vae.decoder(torch.ones(1, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vae.decoder(torch.ones(1, 3)), inside)
