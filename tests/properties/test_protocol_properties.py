"""Property tests over layer counts, shapes, dtypes, k and held layers."""

from __future__ import annotations

from typing import Any, get_args

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from energy_prior import JointEBMPrior, LadderVAE
from energy_prior.generators.ladder import Nets
from energy_prior.topdown import Space, TopDown, ancestral


@st.composite
def priors(draw: st.DrawFn) -> JointEBMPrior:
    """A small VAE of any depth, kind and dtype with energies that are not 0."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    layers = draw(st.integers(1, 5))
    dims = tuple(draw(st.integers(1, 3)) for _ in range(layers))
    nets = draw(st.sampled_from(get_args(Nets)))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    space = draw(st.sampled_from(get_args(Space)))
    vae = LadderVAE(shape, dims, hidden=4, depth=1, nets=nets).to(dtype)
    prior = JointEBMPrior(vae, space=space)
    for p in prior.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    return prior


common = settings(max_examples=25, deadline=None, derandomize=True)


@common
@given(prior=priors(), batch=st.integers(1, 3), data=st.data())
def test_held_layers_stay_and_the_rest_has_the_right_shape(prior: JointEBMPrior, batch: int, data: st.DataObject) -> None:
    shapes, reference = prior.generator.latent_shapes, prior.step_size
    numbers = range(1, len(shapes) + 1)
    held = data.draw(st.sets(st.sampled_from(numbers)))
    values = {i: torch.randn(batch, *shapes[i - 1], dtype=reference.dtype) for i in held}
    adjust = data.draw(st.sampled_from([None, True]))
    z = prior.sample_latents(batch, given=values, steps=2, step_size=0.05, adjust=adjust)
    for i in numbers:
        assert z[i - 1].shape == (batch, *shapes[i - 1])
        assert z[i - 1].dtype == reference.dtype
        assert torch.isfinite(z[i - 1]).all()
        if i in held:
            assert torch.equal(z[i - 1], values[i])


@common
@given(prior=priors(), batch=st.integers(1, 3), data=st.data())
def test_noise_to_latents_and_back_with_any_layers_held(prior: JointEBMPrior, batch: int, data: st.DataObject) -> None:
    shapes, reference = prior.generator.latent_shapes, prior.step_size
    held = data.draw(st.sets(st.sampled_from(range(1, len(shapes) + 1))))
    with torch.no_grad():
        values = {i: torch.randn(batch, *shapes[i - 1], dtype=reference.dtype) for i in held}
        topdown = TopDown(prior.generator, batch, values)
        noise = [torch.randn(s, dtype=reference.dtype) for s in topdown.shapes]
        latents = topdown.descend(noise, "noise").latents
        tolerance = 1e-3 if reference.dtype == torch.float32 else 1e-9
        for a, b in zip(noise, topdown.position(latents, "noise"), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        free = topdown.descend(topdown.position(latents, "latent"), "latent").latents
        assert all(torch.equal(a, b) for a, b in zip(latents, free, strict=True))


@common
@given(prior=priors(), data=st.data())
def test_scores_of_every_k(prior: JointEBMPrior, data: st.DataObject) -> None:
    layers = len(prior.generator.latent_shapes)
    k = data.draw(st.integers(0, layers))
    x = torch.rand(2, *prior.x_shape, dtype=prior.step_size.dtype)
    seeds = [torch.Generator().manual_seed(3) for _ in range(3)]
    options: dict[str, Any] = {"num_samples": 1, "steps": 2, "step_size": 0.1}
    llr = prior.llr_score(x, k, rng=seeds[0], **options)
    assert llr.shape == (2,)
    assert torch.isfinite(llr).all()
    if k == 0:
        assert torch.equal(llr, torch.zeros_like(llr))
    elif k < layers:  # L^{>L} draws no posterior, so that its random numbers are others
        same_draw = prior.log_joint(x, 0, rng=seeds[1], **options) - prior.log_joint(x, k, rng=seeds[2], **options)
        torch.testing.assert_close(llr, same_draw, rtol=1e-3, atol=1e-3)


@common
@given(prior=priors(), batch=st.integers(1, 3))
def test_log_density_is_the_sum_of_its_parts(prior: JointEBMPrior, batch: int) -> None:
    with torch.no_grad():
        descent = ancestral(prior.generator, batch)
        energy = prior.negative_energy(descent.latents)
        assert energy.shape == (batch, len(prior.generator.latent_shapes))
        total = energy.sum(1) + descent.log_priors().sum(1)
        torch.testing.assert_close(prior.log_density(descent.latents), total)
