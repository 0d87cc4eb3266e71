"""One chain: what it reports, when it stops, and what it does not do."""

from __future__ import annotations

import functools
import gc
import math
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch
from small_priors import STEPS, N, injected, lively, mlp, target_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from energy_prior import DivergenceError, JointEBMPrior, LadderVAE
from energy_prior._util import not_none
from energy_prior.langevin import ChainSettings, RandomNoise, sample_target
from energy_prior.langevin import chain as chains
from energy_prior.langevin._threads import Halt
from energy_prior.langevin.backends.eager import Eager
from energy_prior.langevin.chain import run_chain
from energy_prior.langevin.step import StepConfig
from energy_prior.process import frozen


class Together(Eager):
    """The reference with several steps in a call."""

    def __init__(self, span: int) -> None:
        self.most = span

    def span(self, density: Any, config: Any, noise: Any, left: int) -> int:
        return min(self.most, left)


@pytest.mark.parametrize("span", [1, 4, 64])
@pytest.mark.parametrize("options", [{}, {"adjust": True}, {"adapt_steps": 71}, {"max_drift": 0.5}], ids=str)
def test_what_a_chain_reports_on_the_way(options: dict[str, Any], span: int) -> None:
    """Acceptance and f of a chain of 150 steps, longer than the block that is read at a time, however steps go together."""
    prior = lively(mlp())
    target = target_of(prior)
    names = ("adjust", "max_drift")
    config = StepConfig("crank_nicolson", measured=True, traced=True, **{k: v for k, v in options.items() if k in names})

    def run(span: int, every: int) -> Any:
        torch.manual_seed(5)
        with torch.no_grad(), frozen(prior, prior.generator):
            density = target.density()
            noise = RandomNoise(target.shapes, density.topdown.reference)
            return run_chain(
                density,
                noise.normal(0),
                config,
                steps=150,
                step_size=0.5,
                noise=noise,
                backend=Together(span),
                adapt_steps=options.get("adapt_steps", 0),
                every=every,
            )

    reference = run(1, 1)
    acceptance = not_none(reference.trajectory).acceptance[1:]
    assert len(acceptance) == 150
    assert 0.05 < float(acceptance.mean()) < 0.95
    result = run(span, 50)
    frames = result.trajectory
    assert frames.steps.tolist() == [0, 50, 100, 150]
    close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
    close(frames.acceptance[1:], acceptance.reshape(3, 50, N).mean(1))
    close(frames.acceptance[0], torch.ones(N).double())
    close(result.acceptance, acceptance.mean(0))
    close(result.negative_energy, not_none(reference.trajectory).negative_energy.sum(2))
    close(result.step_size, reference.step_size)
    close(result.latents, reference.latents)
    close(result.drift_norm, not_none(reference.trajectory).drift_norm[-1])
    if "max_drift" in options:
        assert 0.1 < float(result.cut_share.mean()) <= 1
        close(result.cut_share, reference.cut_share)
    else:
        assert result.cut_share is None
    assert not torch.equal(result.step_size, torch.full((N,), 0.5).double()) or "adapt_steps" not in options


class Explodes(nn.Module):
    """f grows without bound."""

    def forward(self, z: Tensor) -> Tensor:
        return (z**4).sum(1)


def test_a_chain_that_diverges_names_layer_and_step() -> None:
    """The step of the first state that is not finite, and the layer that was largest before."""
    prior = JointEBMPrior(mlp(), [Explodes(), nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))]).double()
    noise = injected(prior, steps=100)
    target, config = target_of(prior), StepConfig("crank_nicolson")
    with pytest.raises(DivergenceError, match="diverged at step") as error, torch.no_grad(), frozen(prior, prior.generator):
        run_chain(target.density(), noise.normal(0), config, steps=100, step_size=0.4, noise=noise, backend=Eager())
    assert error.value.layer == 1
    step = not_none(error.value.step)
    assert 1 < step < 64
    with torch.no_grad(), frozen(prior, prior.generator):  # one step less is a chain like any other
        density = target.density()
        run_chain(density, noise.normal(0), config, steps=step - 1, step_size=0.4, noise=noise, backend=Eager())


def test_the_end_is_looked_at_too() -> None:
    """Whose density nothing needs."""
    prior = lively(mlp())
    noise = injected(prior)
    noise._normals[1][STEPS] = math.nan
    with pytest.raises(DivergenceError, match="z_2 or its energy f_2") as error:
        prior.sample_latents(N, steps=STEPS, step_size=0.3, noise=noise)
    assert (error.value.step, error.value.layer) == (STEPS, 2)


def test_a_chain_ends_with_those_of_other_parts() -> None:
    """Not before the step at which the other one failed: it may have failed earlier."""
    prior = lively(mlp())
    noise = injected(prior, steps=300)
    halt = Halt()
    halt.request(100)
    halt.request(200)
    made: list[int] = []

    class Counted(Eager):
        def step(self, density: Any, config: Any, state: Any, draws: Any) -> Any:
            made.append(draws.first)
            return super().step(density, config, state, draws)

    chain: dict[str, Any] = {"step_size": 0.3, "noise": noise, "backend": Counted(), "halt": halt}
    with torch.no_grad(), frozen(prior, prior.generator):
        density = target_of(prior).density()
        with pytest.raises(CancelledError):
            run_chain(density, noise.normal(0), StepConfig("euler"), steps=300, **chain)
    assert 100 <= max(made) < 164


def test_a_step_runs_only_the_layers_that_are_free() -> None:
    """No image is decoded, held layers are passed through once, however many steps there are."""
    calls: list[str] = []

    class Counted(LadderVAE):
        def conditional(self, state: Any, layer: int) -> Any:
            calls.append(f"conditional {layer}")
            return super().conditional(state, layer)

        def descend(self, state: Any, z: Tensor, layer: int) -> Any:
            calls.append(f"descend {layer}")
            return super().descend(state, z, layer)

        def likelihood(self, state: Any) -> Any:
            calls.append("likelihood")
            return super().likelihood(state)

    prior = lively(Counted((6,), latent_dims=(2, 3, 2, 2), hidden=8))
    given = {i: torch.randn(N, *prior.generator.latent_shapes[i - 1]).double() for i in (2, 3, 4)}

    def of(steps: int, **options: Any) -> dict[str, int]:
        calls.clear()
        prior.sample_latents(N, steps=steps, **options)
        return {name: calls.count(name) for name in sorted(set(calls))}

    for held, each_step in (((2, 3, 4), set()), ((3, 4), {"descend 2", "conditional 1"})):
        fixed = {i: given[i] for i in held}
        more, few = of(20, given=fixed), of(10, given=fixed)
        assert {name for name in more if more[name] > few.get(name, 0)} == each_step
    assert "likelihood" not in of(10)
    assert "descend 1" not in of(10), "the decoder below z_1"


def test_an_unmeasured_chain_evaluates_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The density at the end is computed only where something asks for it."""
    prior = lively(mlp())
    made: list[int] = []

    class Counted(Eager):
        def init(self, density: Any, config: Any, position: Any, step_size: Any) -> Any:
            made.append(1)
            return super().init(density, config, position, step_size)

        def step(self, density: Any, config: Any, state: Any, draws: Any) -> Any:
            made.append(draws.steps)
            return super().step(density, config, state, draws)

    monkeypatch.setattr("energy_prior.langevin.backends.get", lambda _: Counted())
    prior.sample_latents(N, steps=STEPS, step_size=0.3)
    assert sum(made) == STEPS
    made.clear()
    prior.sample_latents(N, steps=STEPS, step_size=0.3, adjust=True)
    assert sum(made) == STEPS + 1


@pytest.mark.parametrize("options", [{}, {"adjust": True}, {"max_drift": 0.1}], ids=str)
def test_the_host_never_waits_for_a_chain(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where reading a value would wait for the device, none is read before the end."""
    prior = lively(mlp())
    reads: list[int] = []
    noted = [0]
    as_list = Tensor.tolist

    def read(tensor: Tensor) -> Any:
        reads.append(noted[0])
        return as_list(tensor)

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                reads.append(noted[0])
            return func(*args, **(kwargs or {}))

    class OnDevice(chains._FiniteWatch):
        def __init__(self, density: Any) -> None:
            super().__init__(density)
            self._early = False

        def note(self, info: Any) -> None:
            noted[0] += 1
            super().note(info)

    monkeypatch.setattr(chains, "_FiniteWatch", OnDevice)
    monkeypatch.setattr(Tensor, "tolist", read)
    settings = ChainSettings(steps=200, step_size=0.3, **options)
    with torch.no_grad(), frozen(prior, prior.generator), Reads():
        sample_target(target_of(prior), settings, default_step_size=0.3)
    assert noted[0] > 199
    assert reads
    assert not [step for step in reads if 0 < step < 200]


@pytest.mark.parametrize("options", [{}, {"adjust": True, "max_drift": 1.0}], ids=str)
def test_memory_does_not_grow_with_the_steps(options: dict[str, Any]) -> None:
    """The number of tensors that a chain holds on to is bounded, whatever its length."""
    prior = lively(mlp())
    target, alive = target_of(prior, 2), [0]

    class Looks(Eager):
        def finalize(self, density: Any, config: Any, state: Any, draws: Any) -> Any:
            gc.collect()
            alive.append(sum(type(o) is Tensor for o in gc.get_objects()))
            return super().finalize(density, config, state, draws)

    config = StepConfig("crank_nicolson", measured="adjust" in options, **options)
    for steps in (40, 320):
        with torch.no_grad(), frozen(prior, prior.generator):
            density = target.density()
            noise = RandomNoise(target.shapes, density.topdown.reference)
            run_chain(density, noise.normal(0), config, steps=steps, step_size=0.3, noise=noise, backend=Looks())
    assert alive[2] - alive[1] < 70, "finite checks of at most a block of steps"
