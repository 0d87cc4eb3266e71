"""Frames of a long chain."""

from __future__ import annotations

import pytest
import torch
from small_priors import STEPS, N, injected, lively, mlp, target_of

from energy_prior._util import not_none
from energy_prior.langevin import ChainSettings, Trajectory, sample_target
from energy_prior.langevin.cost import evaluation_cost
from energy_prior.process import frozen


def test_frames_are_where_chains_of_that_length_end() -> None:
    prior = lively(mlp())
    noise, held = injected(prior, (1,)), {2: torch.randn(N, 3).double()}
    run = prior.trajectory(N, steps=STEPS, every=4, step_size=0.3, noise=noise, given=held)
    assert run.steps.tolist() == [0, 4, 8]
    for frame, steps in enumerate((0, 4, 8)):
        z = prior.sample_latents(N, steps=steps, step_size=0.3, noise=noise, given=held)
        for layer, kept in zip(z, run.latents, strict=True):
            torch.testing.assert_close(kept[frame], layer)
        torch.testing.assert_close(run.negative_energy[frame], prior.negative_energy(z).detach())


def test_a_last_frame_that_is_not_the_end() -> None:
    run = lively(mlp()).trajectory(N, steps=STEPS, every=3)
    assert run.steps.tolist() == [0, 3, 6]
    assert run.acceptance.shape == run.drift_norm.shape == (3, N)
    assert ((run.acceptance > 0) & (run.acceptance <= 1)).all()


def test_the_drift_is_the_gradient_of_the_log_density() -> None:
    prior = lively(mlp(), "latent")
    run = prior.trajectory(N, steps=2, every=1, step_size=0.05)
    leaves = [z[1].clone().requires_grad_() for z in run.latents]
    gradient = torch.autograd.grad(prior.log_density(leaves).sum(), leaves)
    torch.testing.assert_close(run.drift_norm[1], torch.cat(gradient, 1).norm(dim=1))


@pytest.mark.parametrize("adjust", [False, True])
def test_a_trajectory_in_parts(adjust: bool) -> None:
    prior = lively(mlp())
    noise = injected(prior)
    with torch.no_grad(), frozen(prior, prior.generator):
        memory = 2.5 * evaluation_cost(target_of(prior, 2).density()).memory

        def run(memory: float) -> Trajectory:
            settings = ChainSettings(steps=STEPS, adjust=adjust, max_memory=memory)
            draw = sample_target(target_of(prior), settings, default_step_size=0.5, noise=noise, every=4)
            return not_none(not_none(draw.result).trajectory)

        whole, parts = run(1e9), run(memory)
    assert torch.equal(whole.steps, parts.steps)
    for field in ("negative_energy", "acceptance", "drift_norm"):
        torch.testing.assert_close(getattr(parts, field), getattr(whole, field), rtol=1e-10, atol=1e-10)
    for a, b in zip(parts.latents, whole.latents, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
