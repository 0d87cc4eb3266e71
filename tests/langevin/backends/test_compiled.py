"""Every way to make a Langevin step against the reference, what decides between them, and what a chain does not do."""

from __future__ import annotations

import contextvars
import functools
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._dynamo.utils
import torch._inductor.config
from ladders import LinearLadder, ScaleLadder, State
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from energy_prior import ArgumentError, DivergenceError, JointEBMPrior, LadderVAE
from energy_prior.errors import BackendWarning
from energy_prior.langevin import ChainSettings, InjectedNoise, RandomNoise, backends, chain, loops
from energy_prior.langevin.backends.compiled import STEPPERS, pays_to_compile, stepper_for
from energy_prior.langevin.cost import Cost, evaluation_cost
from energy_prior.langevin.noise import CounterNoise, counted_normal, counted_uniform, threefry
from energy_prior.topdown import TopDown

STEPS, N = 8, 6


@pytest.fixture(autouse=True)
def _own_compiler() -> Iterator[None]:
    """And two cores, so that half of a batch goes to each."""
    cores = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(cores)
    torch._dynamo.reset()


def lively(generator: Any, space: Any = "noise") -> JointEBMPrior:
    """A prior in float64 whose energies are not 0."""
    energies = getattr(generator, "energies", None)
    prior = JointEBMPrior(generator, energies, space=space).double()
    for f in prior.energies if energies is None else ():
        nn.init.normal_(f.net[-1].weight, std=0.5)  # type: ignore[union-attr, operator]
    return prior


def mlp() -> LadderVAE:
    return LadderVAE((6,), latent_dims=(4, 3), hidden=16)


def conv() -> LadderVAE:
    return LadderVAE((1, 8, 8), latent_dims=(2, 3), hidden=4, depth=1, nets="conv")


def injected(prior: JointEBMPrior, free: tuple[int, ...]) -> InjectedNoise:
    shapes = [prior.generator.latent_shapes[i - 1] for i in free]
    return InjectedNoise([torch.randn(STEPS + 1, N, *s).double() for s in shapes], torch.rand(STEPS + 1, N).double())


CHAINS: dict[str, tuple[Callable[[], Any], str, dict[str, Any]]] = {
    "noise space": (mlp, "noise", {}),
    "latent space": (mlp, "latent", {"step_size": 0.1}),
    "convolutions, Euler, hot": (conv, "noise", {"scheme": "euler", "temperature": 1.3}),
    "adjusted, tamed": (mlp, "noise", {"adjust": True, "taming": 0.05}),
    "layer 1 held, adaptive": (mlp, "noise", {"given": 1, "step_size": None}),
    "layer 2 held": (mlp, "noise", {"given": 2}),
    "no nets": (ScaleLadder, "latent", {"adjust": True, "step_size": 0.4}),
}


@pytest.mark.parametrize("name", CHAINS)
def test_compiled_steps_are_the_reference_steps(name: str) -> None:
    """Without graph breaks (a warning would be an error), and compiled once."""
    make, space, options = CHAINS[name]
    prior = lively(make(), space)
    options = {"steps": STEPS, "step_size": 0.3} | options
    held = options.pop("given", None)
    given = {held: torch.randn(N, *prior.generator.latent_shapes[held - 1]).double()} if held else None
    noise = injected(prior, tuple(i for i in (1, 2) if i != held))
    reference = prior.sample_latents(N, given=given, noise=noise, backend="eager", **options)
    compiled = prior.sample_latents(N, given=given, noise=noise, backend="compiled", **options)
    for a, b in zip(compiled, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    prior.sample_latents(N, given=given, backend="compiled", **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_a_compiled_posterior_and_a_trajectory(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = lively(mlp())
    made: list[str] = []
    original = backends._Kind.call

    def spy(self: Any, function: Any, variant: Any, *arguments: Any, **more: Any) -> Any:
        made.append(function.__name__)
        return original(self, function, variant, *arguments, **more)

    monkeypatch.setattr(backends._Kind, "call", spy)
    x, start = torch.rand(N, 6).double(), prior.sample_latents(N)
    noise = injected(prior, (1, 2))
    ends = [prior.sample_posterior(x, start=start, noise=noise, steps=STEPS, backend=b) for b in ("eager", "compiled")]
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    runs = [prior.trajectory(N, every=4, noise=noise, steps=STEPS, backend=b) for b in ("eager", "compiled")]
    for field in ("negative_energy", "acceptance", "drift_norm"):
        torch.testing.assert_close(getattr(runs[1], field), getattr(runs[0], field), rtol=1e-9, atol=1e-9)
    assert made.count("walk") == 2 * (2 + STEPS // 4), "loops: while the step size adapts, after that, and from frame to frame"
    assert made.count("begin") == made.count("finish") == 2 * 2, "each half of the batch"
    assert len(made) == made.count("walk") + 8


def test_of_a_deep_model_one_step_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, whatever made the state before it; its start and end, which each chain has one of, are made eagerly."""
    monkeypatch.setattr(backends, "_MANY_OPERATIONS", 10)
    torch._dynamo.utils.counters.clear()
    prior = lively(conv())
    noise = injected(prior, (1, 2))
    ends = [prior.sample_latents(N, noise=noise, steps=STEPS, backend=b) for b in ("eager", "compiled")]
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert stepper_for("compiled", prior.model.density(N)) is STEPPERS["compiled_steps"]
    monkeypatch.undo()
    assert stepper_for("compiled", prior.model.density(N)).workers == 2


def test_new_weights_are_used_by_what_was_compiled() -> None:
    prior = lively(mlp())
    noise = injected(prior, (1, 2))
    before = prior.sample_latents(N, noise=noise, steps=STEPS, backend="compiled")
    with torch.no_grad():
        for p in prior.parameters():
            p.mul_(1.5)
    after = prior.sample_latents(N, noise=noise, steps=STEPS, backend="compiled")
    reference = prior.sample_latents(N, noise=noise, steps=STEPS, backend="eager")
    torch.testing.assert_close(after[0], reference[0], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(after[0], before[0])


def test_compiled_chains_count_their_noise() -> None:
    """In float32; the numbers are those of the reference, so one key is one chain, whoever makes which rows of it."""
    prior = lively(mlp()).float()
    density = prior.model.density(N)
    shapes, like = density.topdown.shapes, density.topdown.reference
    assert isinstance(stepper_for("compiled", density).noise(density, shapes), CounterNoise)
    for adjust, splits in ((False, (None, 1, 3)), (True, (None, 2))):
        ends = []
        for cores in splits:
            torch.manual_seed(3)
            if cores is not None:
                torch.set_num_threads(cores)
            stepper = STEPPERS["eager"] if cores is None else stepper_for("compiled", density)
            parts = stepper.parts([density])
            assert [d.topdown.batch_size for d in parts] == [N // (cores or 1)] * (cores or 1)
            noise = CounterNoise(shapes, like)
            options: dict[str, Any] = {"noise": noise, "step_size": 0.3, "scheme": "crank_nicolson", "stepper": stepper}
            with torch.no_grad():
                ends.append(chain.run_chain(parts, noise.normal(0), steps=STEPS, adjust=adjust, **options).latents)
        for latents in ends[1:]:
            for a, b in zip(latents, ends[0], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [slice(0, 3), slice(3, 10)], ids=str)
def test_counted_noise_belongs_to_rows(rows: slice) -> None:
    noise = CounterNoise([(10, 3), (10, 2, 2)], torch.empty(()))
    step, n = torch.tensor(7, dtype=torch.int32), rows.stop - rows.start
    own = counted_normal(noise.counters(rows.start), step, [(n, 3), (n, 2, 2)])
    for a, b in zip(own, noise.normal(7), strict=True):
        assert torch.equal(a, b[rows])
    assert torch.equal(counted_uniform(noise.counters(rows.start), step, n), noise.uniform(7)[rows])


def test_threefry_is_the_published_one() -> None:
    """Known answers of the Random123 distribution (Salmon et al., SC 2011), for 2×32 bits and 20 rounds."""

    def words(*values: int) -> list[Tensor]:
        return [torch.tensor(value - 2**32 if value >= 2**31 else value, dtype=torch.int32) for value in values]

    for key, counter, answer in (
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((2**32 - 1, 2**32 - 1), (2**32 - 1, 2**32 - 1), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ):
        assert threefry(torch.stack(words(*key)), *words(*counter)) == tuple(words(*answer))


def test_counted_noise_is_standard_normal_and_never_repeats() -> None:
    torch.manual_seed(0)
    noise = CounterNoise([(4000, 3), (4000, 2, 2)], torch.empty(()))
    flat = torch.cat([torch.cat([n.flatten(1) for n in noise.normal(step)], 1) for step in range(1, 6)], 1)
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.01, 0.99, 99))
    torch.testing.assert_close(flat.flatten().quantile(torch.linspace(0.01, 0.99, 99)), quantiles, rtol=0, atol=0.03)
    uniform = torch.stack([noise.uniform(step) for step in range(1, 6)], 1)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    levels = torch.linspace(0.01, 0.99, 99)
    torch.testing.assert_close(uniform.flatten().quantile(levels), levels, rtol=0, atol=0.02)
    both = torch.cat([flat, uniform], 1)
    assert float((both.T.corrcoef() - torch.eye(40)).abs().max()) < 0.08, "between layers and steps"
    assert float((both.abs().T.corrcoef() - torch.eye(40)).abs().max()) < 0.08
    assert len(flat.flatten().unique()) > 0.99 * flat.numel()
    assert len(uniform.unique()) > 0.99 * uniform.numel()
    pair = CounterNoise([(4000, 2)], torch.empty(()))
    radius = torch.cat(pair.normal(1)).norm(dim=1)
    assert abs(float(torch.stack([radius, pair.uniform(1)]).corrcoef()[0, 1])) < 0.08, (
        "an accept test is not a part of its move"
    )
    torch.manual_seed(0)
    again = CounterNoise([(4000, 3), (4000, 2, 2)], torch.empty(()))
    assert torch.equal(again.normal(3)[1], noise.normal(3)[1]), "whatever was asked for before"
    assert not torch.equal(noise.normal(1)[0], CounterNoise([(4000, 3)], torch.empty(())).normal(1)[0]), "another key"
    assert CounterNoise.reaches([(2**20, 2**11)])
    assert not CounterNoise.reaches([(2**20, 2**12)])


def test_many_settings_of_one_kind_are_all_compiled() -> None:
    """torch.compile gives up on code that it has compiled for a few sets of numbers; every set of rules has its own."""

    def scaled(x: Tensor, temperature: float) -> Tensor:
        return x * temperature

    kind = backends._Kind("a model", None)
    with torch._dynamo.config.patch(cache_size_limit=2), warnings.catch_warnings():
        warnings.simplefilter("error")
        for temperature in (0.5, 0.7, 0.9):
            torch.testing.assert_close(
                kind.call(scaled, temperature, torch.ones(3), temperature), torch.full((3,), temperature)
            )
    assert not kind.failed


@pytest.mark.parametrize("span", [1, 4])
@pytest.mark.parametrize("options", [{}, {"adjust": True}, {"adapt_steps": 71}], ids=str)
def test_what_a_chain_reports_on_the_way(options: dict[str, Any], span: int) -> None:
    """Acceptance and f of a chain of 150 steps, longer than the block that is read at a time, whoever asks and how often."""
    prior = lively(mlp())
    density = prior.model.density(N)
    noise = RandomNoise(density.topdown.shapes, density.topdown.reference)
    start = noise.normal(0)

    def run(span: int, **more: Any) -> Any:
        torch.manual_seed(5)
        stepper = STEPPERS["eager"]._replace(span=lambda _, left, adjust: span if span <= left and not adjust else 1)
        chain_options: dict[str, Any] = {"step_size": 0.5, "noise": noise, "scheme": "crank_nicolson"} | options | more
        with torch.no_grad():
            return chain.run_chain(density, start, steps=150, stepper=stepper, **chain_options)

    each: list[tuple[int, Tensor, Tensor]] = []
    reference = run(1, on_step=lambda step, state, a: each.append((step, state.negative_energy.sum(1), a)))
    assert [step for step, *_ in each] == list(range(151))
    acceptance = torch.stack([a for *_, a in each])[1:]
    assert 0.05 < float(acceptance.mean()) < 0.95
    frames: list[tuple[int, Tensor]] = []
    result = run(span, every=50, on_step=lambda step, _, a: frames.append((step, a)), trace=True)
    assert [step for step, _ in frames] == [0, 50, 100, 150]
    close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
    close(torch.stack([a for _, a in frames])[1:], acceptance.reshape(3, 50, N).mean(1))
    close(result.acceptance, acceptance.mean(0))
    close(result.energy, torch.stack([f for _, f, _ in each]))
    close(result.step_size, reference.step_size)
    close(result.latents, reference.latents)


def test_a_compiled_chain_that_diverges_says_so_as_the_reference_does() -> None:
    class Explodes(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return (z**4).sum(1)

    prior = JointEBMPrior(mlp(), [Explodes(), Explodes()]).double()
    noise = InjectedNoise([torch.randn(80, N, d).double() * 0.5 for d in (4, 3)])
    said = []
    for backend in ("eager", "compiled"):
        with pytest.raises(DivergenceError, match="diverged at step") as error:
            prior.sample_latents(N, noise=noise, steps=79, step_size=0.2, backend=backend)
        said.append(error.value)
    assert (said[0].step, said[0].layer) == (said[1].step, said[1].layer)
    assert (said[0].step or 0) > 1


def test_what_is_no_loop_is_compiled_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word, and to the same numbers."""

    def no_loop(*_: Any) -> Any:
        raise RuntimeError("no loops here")

    single = lively(mlp()).float()
    seeded: dict[str, Any] = {"steps": STEPS, "backend": "compiled"}
    looped = single.sample_latents(N, rng=torch.Generator().manual_seed(1), **seeded)
    backends._kinds.clear()
    monkeypatch.setattr(loops, "while_loop", no_loop)
    stepwise = single.sample_latents(N, rng=torch.Generator().manual_seed(1), **seeded)
    torch.testing.assert_close(stepwise, looped, rtol=1e-4, atol=1e-4)
    assert any(kind.failed for kind in backends._kinds.values())
    assert stepper_for("compiled", single.model.density(N)) is STEPPERS["compiled"], "it is not tried again"


class Shares(LinearLadder):
    """Hands down a state whose tensors, and those of its conditionals, are parts of one."""

    def start(self, batch_size: int) -> Any:
        return torch.linspace(-1, 1, 4, dtype=self.out.dtype).repeat(batch_size, 1).chunk(2, 1)

    def conditional(self, state: Any) -> Any:
        return torch.distributions.Normal(state[0], 0.5 + state[1].sigmoid())

    def descend(self, state: Any, z: Tensor) -> Any:
        return torch.cat([state[1] + z, state[0] * z], 1).tanh().chunk(2, 1)

    def likelihood(self, state: Any) -> Any:
        return super().likelihood(State(0, state[0], len(state[0])))


def test_tensors_in_one_memory_are_taken_apart_for_loops() -> None:
    prior = lively(Shares((2, 2, 2), seed=1))
    held = {3: torch.randn(N, 2).double()}
    backends._kinds.clear()
    noise = injected(prior, (1, 2))
    ends = [prior.sample_latents(N, given=held, noise=noise, steps=STEPS, backend=b) for b in ("eager", "compiled")]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-9)
    assert len(backends._kinds) == 1
    assert not any(kind.failed for kind in backends._kinds.values())


@pytest.mark.parametrize(
    ("rows", "cores", "expected"),
    [(100, 2, (2, 1)), (7, 2, (1, 2)), (100, 8, (5, 1)), (2, 16, (2, 8)), (6, 16, (6, 2)), (64, 1, (1, 1))],
)
def test_how_many_parts_side_by_side(rows: int, cores: int, expected: tuple[int, int]) -> None:
    assert loops.workers_for(rows, cores) == expected


def test_threads_of_chains_leave_those_of_others_alone() -> None:
    cores = torch.get_num_threads()
    assert loops.side_by_side(3, 1, lambda _: torch.get_num_threads(), range(6)) == [1] * 6
    with ThreadPoolExecutor(1) as others:
        assert others.submit(torch.get_num_threads).result() == torch.get_num_threads() == cores
    mode = contextvars.ContextVar("mode", default="")
    mode.set("of the caller")
    assert loops.side_by_side(2, 1, lambda _: mode.get(), range(2)) == ["of the caller"] * 2
    running: list[int] = []

    def fails_first(n: int) -> None:
        if not n:
            raise ZeroDivisionError
        running.append(n)
        time.sleep(0.2)
        running.remove(n)

    with pytest.raises(ZeroDivisionError):
        loops.side_by_side(3, 1, fails_first, range(3))
    assert not running, "what an error has left running has ended"


def test_threads_that_begin_together_leave_the_cores_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cores, made = torch.get_num_threads(), []

    class Slow(ThreadPoolExecutor):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            made.append(self)
            time.sleep(0.1)
            super().__init__(*arguments, **more)

    monkeypatch.setattr(loops, "ThreadPoolExecutor", Slow)
    loops._pool.cache_clear()
    with ThreadPoolExecutor(8) as callers:
        list(callers.map(lambda _: loops.side_by_side(2, 1, lambda _: None, range(2)), range(8)))
        assert set(callers.map(lambda _: torch.get_num_threads(), range(64))) == {cores}
    assert torch.get_num_threads() == cores
    assert len(made) == 1


@pytest.mark.parametrize(
    ("make", "options"),
    [(conv, {"steps": 130}), (mlp, {"steps": 21, "every": 7, "taming": 0.5})],
    ids=["plain, convolutions", "tamed, measured"],
)
def test_a_chain_of_many_calls_is_compiled_once(make: Any, options: dict[str, Any]) -> None:
    """Whatever comes in: at first what `begin` gives, and then what the loop before has given."""
    prior = lively(make()).float()
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        run = prior.trajectory if "every" in options else prior.sample_latents
        run(N, step_size=0.3, backend="compiled", **options)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3, "the start, the loop and the end"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    loops.side_by_side(2, 1, lambda _: None, range(2))
    child = os.fork()
    if not child:
        signal.alarm(60)  # waiting for threads that are not there would have no end
        os._exit(0 if loops.side_by_side(2, 1, lambda n: n, range(2)) == [0, 1] else 1)
    assert os.waitpid(child, 0)[1] == 0


class Branches(LinearLadder):
    """Its code asks for values on the way down, which no compiler can follow."""

    def conditional(self, state: Any) -> Any:
        if state.z is not None and float(state.z.detach().sum()) > 1e9:
            raise RuntimeError
        return super().conditional(state)


def test_what_cannot_be_compiled_runs_in_eager_mode_with_one_warning() -> None:
    prior = lively(Branches((3, 2), seed=1))
    noise = injected(prior, (1, 2))
    words = r"Branches.*cannot be compiled and run in eager mode: .*(data-dependent|Tensor\.item)"
    with pytest.warns(BackendWarning, match=words) as caught:
        compiled = prior.sample_latents(N, noise=noise, steps=STEPS, backend="compiled")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = prior.sample_latents(N, noise=noise, steps=STEPS, backend="compiled")
    reference = prior.sample_latents(N, noise=noise, steps=STEPS, backend="eager")
    for z in (compiled, again):
        torch.testing.assert_close(z[0], reference[0], rtol=1e-12, atol=1e-12)
    single = lively(Branches((3, 2), seed=1)).float()
    with pytest.warns(BackendWarning) as caught:
        seeded = [
            single.sample_latents(N, steps=STEPS, rng=torch.Generator().manual_seed(0), backend="compiled") for _ in range(3)
        ]
    assert len(caught) == 1
    for latents in seeded[1:]:
        torch.testing.assert_close(latents, seeded[0], rtol=1e-4, atol=1e-4)


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    prior = lively(mlp())
    missing = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with missing, pytest.warns(BackendWarning, match="run in eager mode"):
        z = prior.sample_latents(N, steps=2, backend="compiled", rng=torch.Generator().manual_seed(0))
    reference = prior.sample_latents(N, steps=2, rng=torch.Generator().manual_seed(0))
    torch.testing.assert_close(z[0], reference[0], rtol=1e-12, atol=1e-12)
    single = lively(mlp()).float()
    with missing, pytest.warns(BackendWarning, match="run in eager mode"):
        assert single.sample_latents(N, steps=6, backend="compiled")[0].dtype == torch.float32
    torch._dynamo.utils.counters.clear()
    single.sample_latents(N, steps=6, backend="compiled")
    assert not torch._dynamo.utils.counters["stats"], "it is not tried again"


def test_auto_compiles_where_it_pays_and_depends_on_counts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = Cost(1e4, 5e5, 60), Cost(1e6, 1e9, 80)
    assert not pays_to_compile(small, 64, 2500)
    assert pays_to_compile(small, 64, 1_000_000)
    assert pays_to_compile(large, 256, 2000)
    asked: list[str] = []

    def never(*arguments: Any) -> Any:
        asked.append("compiled")
        raise AssertionError

    monkeypatch.setattr("energy_prior.langevin.backends._Kind", never)
    lively(mlp()).sample(64)
    assert not asked, "short runs stay eager"
    monkeypatch.setattr("energy_prior.langevin.backends.pays_to_compile", lambda *_: True)
    with pytest.raises(AssertionError):
        lively(mlp()).sample_latents(2, steps=60)


def test_the_cost_of_an_evaluation_is_counted() -> None:
    """Products: 2·(4·128 + 128·128 + 128) and 2·(3·128 + …) of the energies, 2·(3·16 + 16·16 + 16·8) of p(z_1 | z_2), twice."""
    prior = lively(mlp())
    with torch.no_grad():
        cost = evaluation_cost(prior.model.density(2))
    products = sum(d * 128 + 128 * 128 + 128 for d in (4, 3)) + 3 * 16 + 16 * 16 + 16 * 8
    assert cost.flops == 2 * 2 * products
    assert cost.memory > 8 * 4 * 128
    assert cost.operations > 20


def test_a_batch_in_parts_makes_the_same_draws() -> None:
    prior = lively(mlp())
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    with torch.no_grad():
        memory = 10 * evaluation_cost(prior.model.density(2)).memory
    assert [d.topdown.batch_size for d in prior.model.parts(50, memory)] == [10] * 5
    for options in (
        {},
        {"given": {1: torch.randn(50, 4).double()}},
        {"adjust": True, "taming": 0.1},
        {"backend": "compiled"},
    ):
        whole = prior.sample_latents(50, steps=STEPS, rng=seeds[0], **options)  # type: ignore[arg-type]
        parts = prior.sample_latents(50, steps=STEPS, rng=seeds[1], max_memory=memory, **options)  # type: ignore[arg-type]
        for a, b in zip(parts, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    x = torch.rand(50, 6).double()
    scores = [prior.llr_score(x, 1, steps=STEPS, rng=torch.Generator().manual_seed(1), max_memory=m) for m in (1e9, memory)]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-10, atol=1e-10)
    latent = lively(mlp(), "latent")
    ends = [
        latent.sample_latents(50, steps=STEPS, step_size=0.05, rng=torch.Generator().manual_seed(2), max_memory=m)
        for m in (1e9, memory)
    ]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-10, atol=1e-10)


def test_a_trajectory_in_parts() -> None:
    prior = lively(mlp())
    runs = [prior.trajectory(40, steps=STEPS, every=4, rng=torch.Generator().manual_seed(3), max_memory=m) for m in (1e9, 1e4)]
    assert len(prior.model.parts(40, 1e4)) > 1
    for field in ("negative_energy", "acceptance", "drift_norm"):
        torch.testing.assert_close(getattr(runs[0], field), getattr(runs[1], field), rtol=1e-10, atol=1e-10)


def test_decoding_in_parts_gives_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = lively(conv())
    sizes: list[int] = []
    original = LadderVAE.likelihood

    def spy(self: LadderVAE, state: Any) -> Any:
        sizes.append(len(state.z))
        return original(self, state)

    monkeypatch.setattr(LadderVAE, "likelihood", spy)
    images = []
    for memory in (1e9, 2e4):
        sizes.clear()
        images.append(prior.sample(40, steps=3, rng=torch.Generator().manual_seed(3), max_memory=memory))
    torch.testing.assert_close(*images, rtol=1e-10, atol=1e-10)
    assert max(sizes) < 40, "the last call decoded in parts"


def test_a_step_runs_only_the_layers_that_are_free() -> None:
    """No image is decoded, held layers are passed through once, however many steps there are."""
    calls: list[str] = []

    class Counted(LadderVAE):
        def conditional(self, state: Any) -> Any:
            calls.append(f"conditional {state.layer}")
            return super().conditional(state)

        def descend(self, state: Any, z: Tensor) -> Any:
            calls.append(f"descend {state.layer}")
            return super().descend(state, z)

        def likelihood(self, state: Any) -> Any:
            calls.append("likelihood")
            return super().likelihood(state)

    prior = lively(Counted((6,), latent_dims=(2, 3, 2, 2), hidden=8))
    given = {i: torch.randn(N, *prior.generator.latent_shapes[i - 1]).double() for i in (2, 3, 4)}

    def of(steps: int, **options: Any) -> dict[str, int]:
        calls.clear()
        prior.sample_latents(N, steps=steps, **options)
        return {name: calls.count(name) for name in sorted(set(calls))}

    more, few = of(20, given=given), of(10, given=given)
    assert {name for name in more if more[name] > few.get(name, 0)} <= {"conditional 1"}
    assert "likelihood" not in of(10)
    assert "descend 1" not in of(10), "the decoder below z_1"


def test_the_host_never_waits_for_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where reading a value would wait for the device, none is read before the end."""
    prior = lively(mlp())
    reads: list[int] = []
    made = [0]

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                reads.append(made[0])
            return func(*args, **(kwargs or {}))

    class OnDevice(chain._FiniteWatch):
        def __init__(self, density: Any) -> None:
            super().__init__(density)
            self._early = False

        def note(self, traces: Any) -> None:
            made[0] += 1
            super().note(traces)

    monkeypatch.setattr(chain, "_FiniteWatch", OnDevice)
    for options in ({}, {"adjust": True}, {"taming": 0.1}):
        made[0] = 0
        reads.clear()
        with torch.no_grad(), Reads():
            model = prior.model  # reads the step size
            reads.clear()
            settings = {"steps": 200, "step_size": 0.3, **options}
            model.run(model.parts(N, 1e9), ChainSettings(**settings))  # type: ignore[arg-type]
        assert not [step for step in reads if step < 199]


def test_bf16_is_near_the_full_precision_and_refuses_to_accept_or_reject() -> None:
    prior = JointEBMPrior(LadderVAE((6,), latent_dims=(4, 3), hidden=16))
    for f in prior.energies:
        nn.init.normal_(f.net[-1].weight, std=0.5)  # type: ignore[union-attr]
    full, coarse = (
        prior.sample_latents(200, steps=20, rng=torch.Generator().manual_seed(0), precision=p) for p in ("full", "bf16")
    )
    difference = float((full[0] - coarse[0]).abs().mean())
    assert 0 < difference < 0.02
    assert coarse[0].dtype == torch.float32
    with pytest.raises(ArgumentError, match='precision: "bf16" is for unadjusted chains'):
        prior.sample_latents(4, steps=2, adjust=True, precision="bf16")
    with pytest.raises(ArgumentError, match='precision: "bf16" is for unadjusted chains'):
        prior.sample_posterior(torch.rand(4, 6), steps=2, precision="bf16")
    with pytest.raises(ArgumentError, match='precision: "tf32" needs a CUDA device'):
        prior.sample_latents(4, steps=2, precision="tf32")


def test_chains_are_as_exact_inside_the_users_own_autocast() -> None:
    prior = lively(mlp())
    noise = injected(prior, (1, 2))
    exact = prior.sample_latents(N, steps=4, noise=noise)
    prior.float()
    rounded = InjectedNoise([n.float() for n in noise._normals])
    with torch.autocast("cpu", torch.bfloat16):
        inside = prior.sample_latents(N, steps=4, noise=rounded)
    for a, b in zip(inside, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_the_adaptation_of_the_step_size_dies_away() -> None:
    """With f = 0 Crank–Nicolson is always accepted: log s grows by 0.3 t^(−0.6) in each of the first steps, then rests."""
    density = JointEBMPrior(mlp().double()).model.density(N)
    noise = RandomNoise(density.topdown.shapes, density.topdown.reference)
    start = noise.normal(0)
    options: dict[str, Any] = {"step_size": 0.1, "noise": noise, "scheme": "crank_nicolson"}
    with torch.no_grad():
        result = chain.run_chain(density, start, steps=9, adapt_steps=5, **options)
    expected = 0.1 * math.exp(0.3 * sum(t**-0.6 for t in range(1, 6)))
    torch.testing.assert_close(result.step_size, torch.full((N,), expected).double())


@pytest.mark.parametrize(("name", "value"), [("backend", "fast"), ("precision", "half"), ("max_memory", 0)])
def test_bad_options(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"{name}: expected"):
        lively(mlp()).sample_latents(2, **{name: value})


@pytest.mark.parametrize("method", ["sample", "trajectory", "sample_posterior", "held layers"])
def test_topdown_of_the_whole_batch_is_never_built(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = TopDown.__init__

    def spy(self: TopDown, generator: Any, batch_size: int, *more: Any) -> None:
        sizes.append(batch_size)
        original(self, generator, batch_size, *more)

    prior, n = lively(mlp()), 1000
    chain: dict[str, Any] = {"steps": 2, "max_memory": 1e5}
    monkeypatch.setattr(TopDown, "__init__", spy)
    if method == "sample":
        prior.sample(n, **chain)
    elif method == "trajectory":
        prior.trajectory(n, every=1, **chain)
    elif method == "sample_posterior":
        prior.sample_posterior(torch.rand(n, 6).double(), **chain)
    else:
        prior.sample_latents(n, given={1: torch.randn(n, 4).double()}, **chain)
    assert sizes
    assert max(sizes) < 100


# ------------------------------------------------------------------------------------------------- what the compiler is told


def test_biases_are_added_after_the_product() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    BiasesApart = pytest.importorskip("energy_prior.langevin.backends._passes", exc_type=ImportError).BiasesApart
    assert isinstance(backends._cpu_options()["post_grad_custom_post_pass"], BiasesApart)

    def twice(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.addmm(bias, a, b) + torch.addmm(bias, a, b, beta=2.0)

    inputs = torch.randn(5), torch.randn(3, 4), torch.randn(4, 5)
    traced = make_fx(twice)(*inputs)
    BiasesApart()(traced.graph)
    traced.graph.lint()
    traced.recompile()
    aten = torch.ops.aten
    products = [n.target for n in traced.graph.nodes if n.target in (aten.addmm.default, aten.mm.default)]
    assert products == [aten.mm.default, aten.addmm.default]
    torch.testing.assert_close(traced(*inputs), twice(*inputs))


def test_an_older_torch_without_graph_passes_compiles_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "energy_prior.langevin.backends._passes", raising=False)
    monkeypatch.setitem(sys.modules, "torch._inductor.custom_graph_pass", None)
    backends._cpu_options.cache_clear()
    assert backends._cpu_options() == {"layout_optimization": False}
    backends._cpu_options.cache_clear()


def test_the_library_is_imported_without_the_compiler() -> None:
    code = "import sys, energy_prior; assert 'energy_prior.langevin.backends._passes' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603
