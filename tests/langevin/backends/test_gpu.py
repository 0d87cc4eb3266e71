"""Chains on a GPU against the reference there, at sizes of use: `pytest -m gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_priors import conv, lively, mlp, target_of
from torch import Tensor

from energy_prior import JointEBMPrior
from energy_prior.langevin import InjectedNoise, RandomNoise
from energy_prior.langevin.backends.eager import Eager
from energy_prior.langevin.chain import run_chain
from energy_prior.langevin.step import StepConfig
from energy_prior.process import frozen

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.filterwarnings("error::energy_prior.BackendWarning"),  # a backend that falls back must not pass for itself
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROWS, LONG = 100, 230


def on_gpu(make: Any, space: Any = "noise") -> JointEBMPrior:
    return lively(make(), space).float().to("cuda")


def noise_for(prior: JointEBMPrior, steps: int) -> InjectedNoise:
    shapes = prior.generator.latent_shapes
    return InjectedNoise(
        [torch.randn(steps + 1, ROWS, *s, device="cuda") for s in shapes], torch.rand(steps + 1, ROWS, device="cuda")
    )


@pytest.mark.parametrize(
    ("backend", "make", "space", "options"),
    [
        ("graph", mlp, "noise", {}),
        ("graph", mlp, "latent", {"step_size": 0.02, "max_drift": 0.1}),
        ("graph", conv, "noise", {}),
        ("compiled", mlp, "noise", {"adjust": True, "steps": 20}),
        ("compiled", mlp, "noise", {}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_long_chain_is_that_of_the_reference(backend: str, make: Any, space: str, options: dict[str, Any]) -> None:
    """Twice: the second time with what was compiled or recorded the first time, and other noise."""
    prior = on_gpu(make, space)
    chain: dict[str, Any] = {"steps": LONG, "step_size": 0.1} | options
    for _ in range(2):
        noise = noise_for(prior, LONG)
        found = prior.sample_latents(ROWS, noise=noise, backend=backend, **chain)
        reference = prior.sample_latents(ROWS, noise=noise, backend="eager", **chain)
        for a, b in zip(found, reference, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


def test_a_seed_decides_what_a_launch_draws() -> None:
    prior = on_gpu(mlp)

    def draw(seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        return torch.cat(prior.sample_latents(ROWS, steps=LONG, step_size=0.2, backend="graph", rng=rng), 1)

    first = draw(1)
    assert torch.equal(first, draw(1))
    assert not torch.equal(first, draw(2))
    assert len(first.unique(dim=0)) == ROWS


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("options", [{}, {"adjust": True, "measured": True}, {"max_drift": 0.1}], ids=str)
def test_the_host_does_not_wait_between_start_and_end(options: dict[str, Any]) -> None:
    prior = on_gpu(mlp)
    target = target_of(prior, ROWS)

    class Watched(Eager):
        def init(self, density: Any, config: Any, position: Any, step_size: Any) -> Any:
            begun = super().init(density, config, position, step_size)
            torch.cuda.set_sync_debug_mode("error")
            return begun

        def finalize(self, density: Any, config: Any, state: Any, draws: Any) -> Any:
            torch.cuda.set_sync_debug_mode("default")
            return super().finalize(density, config, state, draws)

    try:
        with torch.no_grad(), frozen(prior, prior.generator):
            density = target.density()
            noise = RandomNoise(target.shapes, density.topdown.reference)
            config = StepConfig("crank_nicolson", **options)
            run_chain(density, noise.normal(0), config, steps=LONG, step_size=0.1, noise=noise, backend=Watched())
    finally:
        torch.cuda.set_sync_debug_mode("default")
