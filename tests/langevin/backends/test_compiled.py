"""Compiled chains against the reference; what is compiled when, and what happens where that is not possible."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
import torch._dynamo.utils
import torch._inductor.compile_fx
import torch._inductor.config
from families import FamilyLadder
from ladders import LinearLadder, ScaleLadder
from small_priors import STEPS, N, conv, conv_of_few_operations, enliven, injected, lively, mlp, target_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from energy_prior import BackendWarning, ConvEnergy, DivergenceError, JointEBMPrior, ResidualVAE
from energy_prior._util import plain_normal
from energy_prior.conditionals import tensors_of
from energy_prior.langevin import ChainSettings, InjectedNoise, backends, sample_target
from energy_prior.langevin.backends import _compiler as compiler
from energy_prior.langevin.backends import _loops as loops
from energy_prior.langevin.backends import compiled as compiled_file
from energy_prior.langevin.backends.compiled import BACKEND
from energy_prior.langevin.chain import run_chain
from energy_prior.langevin.noise import CounterNoise
from energy_prior.langevin.step import StepConfig
from energy_prior.process import frozen
from energy_prior.topdown import Space


@pytest.fixture(autouse=True)
def _own_compiler() -> Iterator[None]:
    """And two cores, so that half of a batch goes to each."""
    cores = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(cores)
    torch._dynamo.reset()


CHAINS: dict[str, tuple[Callable[[], Any], str, dict[str, Any]]] = {
    "noise space": (mlp, "noise", {}),
    "latent space": (mlp, "latent", {"step_size": 0.1}),
    "convolutions, Euler, hot": (conv, "noise", {"scheme": "euler", "temperature": 1.3}),
    "adjusted, cut": (mlp, "noise", {"adjust": True, "max_drift": 0.05}),
    "layer 1 held, adaptive": (mlp, "noise", {"given": 1, "step_size": None}),
    "layer 2 held": (mlp, "noise", {"given": 2}),
    "no nets": (ScaleLadder, "latent", {"adjust": True, "step_size": 0.4}),
    "laplace, layer 1 held": (partial(FamilyLadder, "laplace"), "noise", {"given": 1}),
    **{f: (partial(FamilyLadder, f), "noise", {}) for f in ("laplace", "uniform", "affine", "multivariate")},
}


QUICK = "noise space"


@pytest.mark.parametrize("name", [n if n == QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CHAINS])
def test_compiled_steps_are_the_reference_steps(name: str) -> None:
    """Without graph breaks (a warning would be an error), and compiled once."""
    make, space, options = CHAINS[name]
    prior = lively(make(), space)
    options = {"steps": STEPS, "step_size": 0.3} | options
    held = options.pop("given", None)
    given = {held: torch.randn(N, *prior.generator.latent_shapes[held - 1]).double()} if held else None
    noise_of = [i for i in (1, 2) if i != held]
    noise = injected(prior, tuple(noise_of))
    reference = prior.sample_latents(N, given=given, noise=noise, backend="eager", **options)
    compiled = prior.sample_latents(N, given=given, noise=noise, backend="compiled", **options)
    for a, b in zip(compiled, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    prior.sample_latents(N, given=given, noise=injected(prior, tuple(noise_of)), backend="compiled", **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
def test_a_compiled_posterior_and_a_trajectory(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = lively(mlp())
    made: list[Any] = []
    original = compiler.CompileCache.call

    def spy(self: Any, function: Any, variant: Any, *arguments: Any, **more: Any) -> Any:
        made.append(function)
        return original(self, function, variant, *arguments, **more)

    monkeypatch.setattr(compiler.CompileCache, "call", spy)
    x, start = torch.rand(N, 6).double(), prior.sample_latents(N)
    noise = injected(prior)
    ends = [prior.sample_posterior(x, start=start, noise=noise, steps=STEPS, backend=b) for b in ("eager", "compiled")]
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    runs = [prior.trajectory(N, every=4, noise=noise, steps=STEPS, backend=b) for b in ("eager", "compiled")]
    for field in ("negative_energy", "acceptance", "drift_norm"):
        torch.testing.assert_close(getattr(runs[1], field), getattr(runs[0], field), rtol=1e-9, atol=1e-9)
    steps = made.count(loops.step)
    assert steps == 2 * (2 + STEPS // 4), "loops: while the step size adapts, after that, and from frame to frame"
    assert made.count(loops.init) == made.count(loops.finalize) == 2 * 2, "each half of the batch"
    assert len(made) == steps + 8


@pytest.mark.slow
@pytest.mark.parametrize("energies", ["of z_i", "of noise"])
def test_of_a_deep_model_layers_or_energies_are_compiled(energies: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, whatever the steps around them do."""
    monkeypatch.setattr(compiled_file, "_MANY_OPERATIONS", 10)
    torch._dynamo.utils.counters.clear()
    prior, graphs = (conv_of_few_operations(), 1) if energies == "of z_i" else (lively(conv()), 2)
    chains: list[dict[str, Any]] = [{}, {"adjust": True}]
    for options in chains:
        noise = injected(prior)
        ends = [prior.sample_latents(N, noise=noise, steps=STEPS, backend=b, **options) for b in ("eager", "compiled")]
        for a, b in zip(*ends, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "layer 2's part of the pass, or two energies"
    assert torch._dynamo.utils.counters["inductor"]["fxgraph_cache_bypass"] == 0, "what is compiled can be shared"
    with torch.no_grad(), frozen(prior, prior.generator):
        density = target_of(prior).density()
        assert BACKEND.workers(density, N) == (1, 0)
        monkeypatch.setattr(compiled_file, "_MANY_OPERATIONS", 10_000)
        assert BACKEND.workers(density, N) == (2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["laplace", "tanh, scaled", "sinh"])
def test_layers_that_are_not_normal_are_compiled(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conditional that a region gives is of the kind that the generator gives."""
    monkeypatch.setattr(compiled_file, "_MANY_OPERATIONS", 2)
    prior = lively(FamilyLadder(family))
    x, start = torch.randn(N, 1).double(), prior.sample_latents(N, steps=0)
    options: dict[str, Any] = {"start": start, "noise": injected(prior), "steps": STEPS, "step_size": 0.1}
    ends = [prior.sample_posterior(x, backend=b, **options) for b in ("eager", "compiled")]
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("space", ["noise", "latent"])
def test_posteriors_and_held_layers_of_deep_models(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_file, "_MANY_OPERATIONS", 10)
    prior = conv_of_few_operations(space)
    x, start = torch.rand(N, 1, 8, 8).double(), prior.sample_latents(N)
    noise = injected(prior)
    ends = [prior.sample_posterior(x, start=start, noise=noise, steps=STEPS, backend=b) for b in ("eager", "compiled")]
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    noise = injected(prior, (2,))
    ends = [prior.sample_latents(N, given={1: start[0]}, noise=noise, steps=STEPS, backend=b) for b in ("eager", "compiled")]
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_layers_that_are_alike_share_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """With their own parameters, and full precision after bf16 as before."""
    monkeypatch.setattr(compiled_file, "_MANY_OPERATIONS", 10)
    made: list[Any] = []
    original: Any = torch._inductor.compile_fx.compile_fx

    def compile_fx(graph: Any, *arguments: Any, **options: Any) -> Any:
        if options.get("config_patches"):  # it calls itself without them
            made.append(graph)
        return original(graph, *arguments, **options)

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    generator = ResidualVAE((1, 8, 8), groups=(5,), channels=8, latent_channels=2)
    prior = JointEBMPrior(generator, [ConvEnergy(shape) for shape in generator.latent_shapes]).double()
    for f in prior.energies:
        enliven(f)
    counts = []
    for precision in ("full", "bf16", "full"):
        if precision == "full":
            noise = injected(prior, (1, 2, 3, 4, 5))
            ends = [prior.sample_latents(N, noise=noise, steps=STEPS, backend=b) for b in ("eager", "compiled")]
            for a, b in zip(*ends, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        else:
            prior.sample_latents(N, steps=2, backend="compiled", precision="bf16")
        counts.append(len(made))
    assert 0 < counts[0] < 4, "there are four regions"
    assert counts[2] == counts[1]


class Scaled(LinearLadder):
    """It keeps a NumPy number."""

    factor = np.float64(1.25)

    def conditional(self, state: Tensor, layer: int) -> Any:
        c = super().conditional(state, layer)
        return plain_normal(self.factor * c.loc, c.scale)


class Checkpointed(LinearLadder):
    """It saves memory by itself, also under a compiler."""

    def descend(self, state: Tensor, z: Tensor, layer: int) -> Any:
        return checkpoint(super().descend, state, z, layer, use_reentrant=False)


@pytest.mark.slow
@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("family", [Scaled, Checkpointed])
def test_what_torch_func_refuses_is_compiled_by_regions(family: type[LinearLadder], cores: int) -> None:
    torch.set_num_threads(cores)
    prior = lively(family((3, 2), seed=1))
    noise = injected(prior)
    gc.disable()  # the compiler's errors hold open what it stopped in
    try:
        ends = [prior.sample_latents(N, noise=noise, steps=STEPS, backend=b) for b in ("eager", "compiled")]
    finally:
        gc.enable()
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
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


@pytest.mark.slow
def test_compiled_chains_count_their_noise() -> None:
    """In float32; the numbers are those of the reference, so one key is one chain, whoever makes which rows of it."""
    prior = lively(mlp()).float()
    target = target_of(prior)
    eager = backends.get("eager")
    for adjust, splits in ((False, (None, 1, 3)), (True, (None, 2))):
        config = StepConfig("crank_nicolson", adjust=adjust, measured=adjust)
        ends = []
        for cores in splits:
            torch.set_num_threads(cores or 2)
            torch.manual_seed(3)
            with torch.no_grad(), frozen(prior, prior.generator):
                if cores is None:
                    like = target.density().topdown.reference
                    noise = BACKEND.noise(target.shapes, like)
                    assert isinstance(noise, CounterNoise)
                    chain: dict[str, Any] = {"steps": STEPS, "step_size": 0.3, "noise": noise, "backend": eager}
                    ends.append(run_chain(target.density(), noise.normal(0), config, **chain).latents)
                else:
                    settings = ChainSettings(steps=STEPS, step_size=0.3, adjust=adjust, backend="compiled")
                    ends.append(sample_target(target, settings, default_step_size=0.3).latents)
        for latents in ends[1:]:
            for a, b in zip(latents, ends[0], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_noise_that_depends_on_its_order_keeps_the_batch_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 numbers come from torch's stream, so the rows of a batch are not made side by side, and a seed decides."""
    made: list[int] = []

    def init(self: Any, density: Any, config: Any, position: Any, step_size: Any) -> Any:
        made.append(density.topdown.batch_size)
        raise ZeroDivisionError

    monkeypatch.setattr(type(BACKEND), "init", init)
    prior = lively(mlp())
    for noise, sizes in ((None, {N}), (injected(prior), {N // 2})):
        made.clear()
        with pytest.raises(ZeroDivisionError):
            prior.sample_latents(N, steps=STEPS, noise=noise, backend="compiled")
        assert set(made) == sizes


@pytest.mark.slow
def test_many_settings_of_one_kind_are_all_compiled() -> None:
    """torch.compile gives up on code that it has compiled for a few sets of numbers; every configuration has its own."""

    def scaled(x: Tensor, temperature: float) -> Tensor:
        return x * temperature

    cache = compiler.CompileCache("a model", "a key")
    with torch._dynamo.config.patch(cache_size_limit=2), warnings.catch_warnings():
        warnings.simplefilter("error", BackendWarning)
        for temperature in (0.5, 0.7, 0.9):
            torch.testing.assert_close(
                cache.call(scaled, temperature, torch.ones(3), temperature), torch.full((3,), temperature)
            )
    assert "a key" not in compiler._failed


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_is_no_loop_is_compiled_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word, and to the same numbers."""

    def no_loop(*_: Any) -> Any:
        raise RuntimeError("no loops here")

    single = lively(mlp()).float()
    with torch.no_grad(), frozen(single, single.generator):
        density = target_of(single).density()
    seeded: dict[str, Any] = {"steps": STEPS, "backend": "compiled"}
    looped = single.sample_latents(N, rng=torch.Generator().manual_seed(1), **seeded)
    assert not compiler.failed(density, "loop")
    compiler._caches.clear()
    monkeypatch.setattr(loops, "while_loop", no_loop)
    stepwise = single.sample_latents(N, rng=torch.Generator().manual_seed(1), **seeded)
    torch.testing.assert_close(stepwise, looped, rtol=1e-4, atol=1e-4)
    assert compiler.failed(density, "loop")
    assert not compiler.failed(density, "call")
    assert BACKEND.workers(density, N) == (1, 0), "it is not tried again"
    assert BACKEND.span(density, StepConfig("euler"), injected(single), 9) == 4


class Shares(LinearLadder):
    """Hands down a state whose tensors, and those of its conditionals, are parts of one."""

    def start(self, batch_size: int) -> Any:
        return torch.linspace(-1, 1, 4, dtype=self.out.dtype).repeat(batch_size, 1).chunk(2, 1)

    def conditional(self, state: Any, layer: int) -> Any:
        return torch.distributions.Normal(state[0], 0.5 + state[1].sigmoid())

    def descend(self, state: Any, z: Tensor, layer: int) -> Any:
        return torch.cat([state[1] + z, state[0] * z], 1).tanh().chunk(2, 1)

    def likelihood(self, state: Any) -> Any:
        return super().likelihood(state[0])


@pytest.mark.slow
def test_tensors_in_one_memory_are_taken_apart_for_loops() -> None:
    prior = lively(Shares((2, 2, 2), seed=1))
    held = {3: torch.randn(N, 2).double()}
    compiler._caches.clear()
    noise = injected(prior, (1, 2))
    ends = [prior.sample_latents(N, given=held, noise=noise, steps=STEPS, backend=b) for b in ("eager", "compiled")]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-9)
    assert len(compiler._caches) == 1, "of loops alone"
    with torch.no_grad(), frozen(prior, prior.generator):
        density = target_of(prior, held=held).density()
    assert not compiler.failed(density, "loop")
    prepared = BACKEND.prepare(density)
    tensors = [*prepared.topdown.held.values(), *prepared.topdown._state, *tensors_of(prepared.topdown.top)]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


@pytest.mark.parametrize(
    ("rows", "cores", "expected"),
    [(100, 2, (2, 1)), (7, 2, (1, 2)), (100, 8, (5, 1)), (2, 16, (2, 8)), (6, 16, (6, 2)), (64, 1, (1, 1))],
)
def test_how_many_parts_side_by_side(rows: int, cores: int, expected: tuple[int, int]) -> None:
    assert loops.workers_for(rows, cores) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "options"),
    [(conv_of_few_operations, {"steps": 130}), (lambda: lively(mlp()), {"steps": 21, "every": 7, "max_drift": 0.5})],
    ids=["plain, convolutions", "cut, measured"],
)
def test_a_chain_of_many_calls_is_compiled_once(make: Any, options: dict[str, Any]) -> None:
    """Whatever comes in: at first what `init` gives, and then what the loop before has given."""
    prior = make().float()
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        run = prior.trajectory if "every" in options else prior.sample_latents
        run(N, step_size=0.3, backend="compiled", **options)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3, "the start, the loop and the end"


class Branches(LinearLadder):
    """Its code asks for values on the way down, which no compiler can follow."""

    def conditional(self, state: Tensor, layer: int) -> Any:
        if layer < self.layers and float(state.detach().sum()) > 1e9:
            raise RuntimeError
        return super().conditional(state, layer)


def told(caught: Any) -> list[str]:
    """Files that warnings of the library point at (the compiler warns of itself when it is first imported)."""
    return [warning.filename for warning in caught if warning.category is BackendWarning]


@pytest.mark.slow
def test_what_cannot_be_compiled_runs_in_eager_mode_with_one_warning() -> None:
    prior = lively(Branches((3, 2), seed=1))
    noise = injected(prior, (1, 2))
    here = re.escape(f"{__file__}:{Branches.conditional.__code__.co_firstlineno + 1}, in conditional: `if layer < self.layers")
    words = rf"Branches.*cannot be compiled and run in eager mode: .*(data-dependent|Tensor\.item).*{here}.*torch\.where"
    with pytest.warns(BackendWarning, match=words) as caught:
        compiled = prior.sample_latents(N, noise=noise, steps=STEPS, backend="compiled")
    assert told(caught) == [__file__]
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
    assert told(caught) == [__file__]
    for latents in seeded[1:]:
        torch.testing.assert_close(latents, seeded[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
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


# ------------------------------------------------------------------------------------------------- what the compiler is told


def test_biases_are_added_after_the_product() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    BiasesApart = pytest.importorskip("energy_prior.langevin.backends._passes", exc_type=ImportError).BiasesApart
    assert isinstance(compiler._cpu_options()["post_grad_custom_post_pass"], BiasesApart)

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
    compiler._cpu_options.cache_clear()
    assert compiler._cpu_options() == {"layout_optimization": False}
    compiler._cpu_options.cache_clear()


def test_the_library_is_imported_without_the_compiler() -> None:
    code = "import sys, energy_prior; assert 'energy_prior.langevin.backends._passes' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603
