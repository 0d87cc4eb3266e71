"""Public calls from several threads: seeded numbers are those alone, and nothing shared stays changed."""

from __future__ import annotations

import contextvars
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from energy_prior import ArgumentError, BackendWarning, DivergenceError, JointEBMPrior, LadderVAE
from energy_prior.errors import called_from, origin, warn
from energy_prior.process import RandomStream, claimed, exclusive, reproducible

X = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make() -> JointEBMPrior:
    torch.manual_seed(3)
    prior = JointEBMPrior(LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8))
    for p in prior.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return prior


def everything(prior: JointEBMPrior, seed: int) -> Tensor:
    """Several kinds of calls, with a seed, as one tensor."""
    parts = [
        prior.llr_score(X, 1, num_samples=1, steps=3, rng=seeded(seed)),
        prior.sample(2, steps=3, rng=seeded(seed)).flatten(),
        prior.log_density(prior.sample_latents(2, steps=2, rng=seeded(seed))).detach(),
        prior.reconstruct(X, rng=seeded(seed)).flatten(),
    ]
    return torch.cat(parts)


def shared(priors: list[JointEBMPrior]) -> list[Any]:
    """What all calls share."""
    modules = [m for prior in priors for root in (prior, prior.generator) for m in root.modules()]  # type: ignore[union-attr]
    flags = [(m.training, *(p.requires_grad for p in m.parameters(recurse=False))) for m in modules]
    return [flags, Distribution._validate_args, torch.get_rng_state().tolist(), torch.is_inference_mode_enabled()]


def test_overlapping_calls_of_several_priors_give_what_they_give_alone() -> None:
    one = make()
    priors = [one, JointEBMPrior(one.generator), make()]  # the first two share a generator
    jobs = [(priors[i % 3], i) for i in range(24)]
    alone = [everything(*job) for job in jobs]
    before = shared(priors)
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda job: everything(*job), jobs))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert shared(priors) == before


def test_calls_that_fail_leave_nothing_changed() -> None:
    good, bad = make(), make()
    with torch.no_grad():
        next(bad.energies[0].parameters()).fill_(float("nan"))
    alone, before = everything(good, 1), shared([good, bad])

    def fail(seed: int) -> str:
        with pytest.raises(DivergenceError):
            bad.sample(2, rng=seeded(seed))
        return "failed"

    with ThreadPoolExecutor(4) as pool:
        failures = [pool.submit(fail, i) for i in range(12)]
        scores = [pool.submit(everything, good, 1) for _ in range(4)]
        assert [f.result() for f in failures] == ["failed"] * 12
        assert all(torch.equal(alone, s.result()) for s in scores)
    assert shared([good, bad]) == before


def test_a_generator_used_by_two_calls_at_once_is_refused() -> None:
    rng, inside, leave = seeded(0), threading.Event(), threading.Event()

    class Waits(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            inside.set()
            assert leave.wait(30)
            return z.sum(1)

    vae = LadderVAE((1, 4, 4), latent_dims=(2,), hidden=4)
    leave.set()
    slow, other = JointEBMPrior(vae, [Waits()]), make()
    leave.clear()
    inside.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(slow.sample, 2, steps=1, rng=rng)
        assert inside.wait(30)
        with pytest.raises(ArgumentError, match="rng: another thread's call uses this torch.Generator now"):
            other.sample(2, rng=rng)
        leave.set()
        first.result()
    assert other.sample(2, steps=1, rng=rng).shape == (2, 1, 4, 4), "free again"


def test_a_generator_may_be_used_by_nested_calls() -> None:
    rng = seeded(0)
    with claimed(rng), claimed(rng), reproducible(rng, torch.device("cpu")):
        pass
    with ThreadPoolExecutor(1) as pool, claimed(rng):
        refused = pool.submit(lambda: claimed(rng).__enter__()).exception()
    assert isinstance(refused, ArgumentError)


def test_threads_that_work_for_a_call_never_wait_for_it() -> None:
    """They run in a copy of its context; any other thread waits."""

    def enter() -> str:
        with exclusive():
            return "in"

    with ThreadPoolExecutor(2) as pool:
        with exclusive():
            own = contextvars.copy_context()
            assert pool.submit(own.run, enter).result(timeout=30) == "in"
            waits = pool.submit(enter)
            assert not waits.done()
        assert waits.result(timeout=30) == "in"
        late = pool.submit(own.run, enter)  # the call has ended: this context holds nothing any more
        with exclusive():
            pass
        assert late.result(timeout=30) == "in"


def test_a_stream_goes_on_where_it_stood() -> None:
    device = torch.device("cpu")
    with RandomStream(5, device).active():
        expected = torch.randn(6)
    stream, outer = RandomStream(5, device), torch.get_rng_state()
    parts = []
    for _ in range(3):
        with stream.active():
            parts.append(torch.randn(2))
        torch.randn(3)
        torch.set_rng_state(outer)
    assert torch.equal(torch.cat(parts), expected)
    assert torch.equal(torch.get_rng_state(), outer)


def test_a_device_without_a_stream_of_its_own_is_refused() -> None:
    state = torch.get_rng_state()
    with pytest.raises(ArgumentError, match="rng: devices of type 'meta' have no random stream"):
        reproducible(seeded(0), torch.device("meta")).__enter__()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_the_parents_threads() -> None:
    with ThreadPoolExecutor(1) as pool:
        held, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with exclusive():
                held.set()
                leave.wait(30)

        pool.submit(hold)
        assert held.wait(30)
        child = os.fork()
        if child == 0:
            threading.Timer(20, lambda: os._exit(1)).start()
            with exclusive():
                os._exit(0)
        leave.set()
    assert os.waitpid(child, 0)[1] == 0


def test_warnings_point_at_the_users_line() -> None:
    prior = make()
    with pytest.warns(UserWarning, match="x: values from") as caught:
        prior.anomaly_score(10 * X, num_samples=1)
    assert caught[0].filename == __file__
    with pytest.warns(BackendWarning, match="seen") as caught:
        warn("seen", BackendWarning)
    assert caught[0].filename != ""


def test_warnings_of_a_working_thread_point_at_the_line_that_started_it() -> None:
    context = contextvars.copy_context()
    context.run(origin.set, called_from())
    with pytest.warns(BackendWarning) as caught, ThreadPoolExecutor(1) as pool:
        pool.submit(context.run, warn, "slow", BackendWarning).result()
    assert caught[0].lineno == context[origin].line  # type: ignore[union-attr]
