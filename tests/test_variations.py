"""Observations between two, and observations that share layers with one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ladders import LinearLadder

from energy_prior import ArgumentError, ChainSettings, JointEBMPrior, LadderVAE, ShapeError
from energy_prior.variations import varied


def small() -> JointEBMPrior:
    torch.manual_seed(0)
    return JointEBMPrior(LadderVAE((1, 6, 6), latent_dims=(4, 3, 2), hidden=8).eval())


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


A, B = torch.rand(3, 1, 6, 6), torch.rand(3, 1, 6, 6)


def test_the_way_is_an_arc_in_noise() -> None:
    prior = small()
    with prior._computing(seeded()) as model:
        ends = [model.posterior_draw(x, ChainSettings()).latents for x in (A, B)]
        first, last = (model.noise(z) for z in ends)
    images = prior.interpolate(A, B, frames=4, steps=0, rng=seeded())
    assert images.shape == (3, 4, 1, 6, 6)
    angles = [math.pi / 6 * k for k in range(4)]
    for k, angle in enumerate(angles):
        noise = [math.cos(angle) * e + math.sin(angle) * f for e, f in zip(first, last, strict=True)]
        with prior._computing(None) as model:
            z = model.target(3).density().topdown.descend(tuple(noise), "noise").latents
        torch.testing.assert_close(images[:, k], prior.decode(z), rtol=1e-4, atol=1e-5)


def test_frames_between_are_moved_and_ends_are_not() -> None:
    prior = small()
    still, moved = (prior.interpolate(A, B, frames=5, steps=steps, step_size=0.5, rng=seeded()) for steps in (0, 3))
    torch.testing.assert_close(still[:, [0, 4]], moved[:, [0, 4]])
    changed = (still - moved).abs().flatten(2).amax(2)
    assert bool((changed[:, 1:4] > 1e-3).all())
    assert prior.interpolate(A, B, frames=2, rng=seeded()).shape == (3, 2, 1, 6, 6)


def test_large_batches_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    prior, batches = small(), list[int]()
    start = prior.generator.start

    def counted(batch_size: int) -> Any:
        batches.append(batch_size)
        return start(batch_size)

    monkeypatch.setattr(prior.generator, "start", counted)
    x = torch.rand(20, 1, 6, 6)
    parts = prior.interpolate(x, x.flip(0), frames=3, steps=0, max_memory=2000.0, rng=seeded())
    assert max(batches) <= 20
    torch.testing.assert_close(parts, prior.interpolate(x, x.flip(0), frames=3, steps=0, rng=seeded()))


def test_layers_are_drawn_from_their_conditional() -> None:
    """Of a linear ladder with known energies: the mean of p(z_1 | z_2) of one observation's posterior draw, decoded."""
    ladder = LinearLadder((3, 2))
    prior = JointEBMPrior(ladder, ladder.energies)
    x = torch.randn(1, 3).double()
    images = prior.vary(x, [1], 4000, steps=40, step_size=0.5, rng=seeded())
    z2 = prior.sample_posterior(x, method="infer", rng=seeded())[1]
    given = {2: z2.expand(4000, -1)}
    expected = prior.sample(4000, given=given, steps=40, step_size=0.5, rng=torch.Generator().manual_seed(1))
    torch.testing.assert_close(images[0].mean(0), expected.mean(0), rtol=0, atol=0.1)
    torch.testing.assert_close(images[0].std(0), expected.std(0), rtol=0.1, atol=0)


def test_layers_that_are_kept() -> None:
    prior = small()
    assert prior.vary(A, [2, 1], 5, steps=2).shape == (3, 5, 1, 6, 6)
    assert prior.vary(A.numpy(), (3,), steps=1, posterior={"steps": 2}).shape == (3, 8, 1, 6, 6)
    latents = prior.sample_latents(3, prior="generator")
    with prior._computing(None) as model:
        z = varied(model, latents, (1, 3), 2, ChainSettings(steps=2))
    assert torch.equal(z[1], latents[1].repeat_interleave(2, 0))
    assert all(not torch.equal(z[i], latents[i].repeat_interleave(2, 0)) for i in (0, 2))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda p: p.interpolate(A, B[:2]), ShapeError, "b: expected as many observations as a has, 3, got 2"),
        (lambda p: p.interpolate(A, B, frames=1), ArgumentError, "frames: expected a whole number of at least 2, got 1"),
        (lambda p: p.interpolate(A, B[:, :, 1:]), ShapeError, r"x: expected shape \(batch, 1, 6, 6\)"),
        (lambda p: p.vary(A, [0]), ArgumentError, r"layers: expected one or more different layers, .* to 3, got \[0\]"),
        (lambda p: p.vary(A, []), ArgumentError, "layers: expected one or more"),
        (lambda p: p.vary(A, [1, 1]), ArgumentError, "different layers"),
        (lambda p: p.vary(A, 1), ArgumentError, "layers: expected one or more different layers, .* got 1"),
        (lambda p: p.vary(A, [1], 0), ArgumentError, "n: expected a whole number of at least 1, got 0"),
    ],
)
def test_what_they_do_not_take(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(small())
