"""Densities of energies that read noise, and the way along their waymarks from N(0, I) to the joint prior."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_priors import N, enliven, lively, target_of
from torch import Tensor

from energy_prior import JointEBMPrior, LadderVAE, denoising_energies
from energy_prior._util import not_none, sum_event
from energy_prior.conditionals import tensors_of
from energy_prior.langevin import ChainSettings, sample_target
from energy_prior.langevin.waymarks import can_cross, cross
from energy_prior.process import frozen
from energy_prior.topdown import TopDown

UNITS = (4, 3, 2)


def noisy(space: Any = "noise", *, alive: bool = True) -> JointEBMPrior:
    """Three layers whose energies read noise, in float64."""
    torch.manual_seed(0)
    vae = LadderVAE((6,), latent_dims=UNITS, hidden=8)
    prior = JointEBMPrior(vae, denoising_energies(vae.latent_shapes, channels=4), space=space).double()
    for f in prior.energies if alive else ():
        enliven(f, 2.0)
    return prior


def at_random(layers: Any) -> tuple[Tensor, ...]:
    return tuple(torch.randn(N, UNITS[i - 1]).double() for i in layers)


@pytest.mark.parametrize("held", [(), (3,), (2, 3), (1,), (2,), (1, 3)])
def test_density_in_both_spaces_is_that_of_the_prior(held: tuple[int, ...]) -> None:
    """log p̃ is Σ f + log p_β of all layers, up to what no free layer changes and to the Jacobian, and its gradient fits."""
    noise, latent = noisy(), noisy("latent")
    z = noise.sample_latents(N, prior="generator")
    fixed = {i: z[i - 1] for i in held}
    free = [i for i in (1, 2, 3) if i not in held]
    with torch.no_grad(), frozen(noise, noise.generator, latent, latent.generator):
        moved = [list(z), [layer + (0.1 if i in free else 0.0) for i, layer in enumerate(z, start=1)]]
        log_prior = [noise.model.negative_energy(at).sum(1) + noise.model.log_prior(at).sum(1) for at in moved]
        for prior in (noise, latent):
            density = target_of(prior, held=fixed).density()
            values = []
            for at in moved:
                topdown = TopDown(prior.generator, N, fixed)
                position = topdown.position(at, prior.space)
                evaluated = density.evaluate(position)
                values.append(not_none(evaluated.log_density))
                if prior.space == "noise":  # − log σ of the free layers, which the change of coordinates takes away
                    conditionals = topdown.descend(position, "noise").conditionals
                    values[-1] = values[-1] - sum(sum_event(tensors_of(conditionals[i - 1])[1].log()) for i in free)
                f = prior.model.negative_energy(at)[:, [i - 1 for i in free]]
                torch.testing.assert_close(evaluated.negative_energy, f)
                slope = sum(2e-4 * g.sum(1) for g in evaluated.gradient)
                up, down = (density.evaluate([p + step for p in position]) for step in (1e-4, -1e-4))
                change = not_none(up.log_density) - not_none(down.log_density)
                if prior.space == "noise":  # the gradient is that of the part beside the Gaussian
                    change = change + sum(4e-4 * p.sum(1) / 2 for p in position)
                torch.testing.assert_close(slope, change, rtol=1e-3, atol=1e-7)
            torch.testing.assert_close(values[1] - values[0], log_prior[1] - log_prior[0])


def test_chains_of_all_layers_never_run_the_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = noisy()
    density = target_of(prior).density()
    monkeypatch.setattr(TopDown, "descend", None)
    density.evaluate(at_random((1, 2, 3)))


def refitted(shift: float) -> tuple[JointEBMPrior, list[Tensor]]:
    """A prior whose energies are the closed part alone, and the draws that it was set from."""
    prior = noisy(alive=False)
    torch.manual_seed(1)
    draws = [torch.randn(5000, u).double() @ torch.randn(u, u).double() / u**0.5 + shift for u in UNITS]
    for f, own in zip(prior.energies, draws, strict=True):
        f.set_from([own], [])  # type: ignore[operator]
    return prior, draws


def test_the_way_leads_to_the_moments_of_the_posterior() -> None:
    """With the closed part alone the flow is linear, and its end is N(α m, α² C + σ² I) of the first waymark."""
    prior, draws = refitted(0.7)
    n = 3000
    density = target_of(prior, n).density()
    assert can_cross(density)
    torch.manual_seed(2)
    start = [torch.randn(n, u).double() for u in UNITS]
    end = cross(density, start, 60)
    for own, drawn in zip(end, draws, strict=True):
        expected = (1 - 0.15**2) * torch.cov(drawn.T) + 0.15**2 * torch.eye(drawn.shape[1]).double()
        torch.testing.assert_close(torch.cov(own.T), expected, rtol=0.1, atol=0.12)
        torch.testing.assert_close(own.mean(0), (1 - 0.15**2) ** 0.5 * drawn.mean(0), rtol=0.05, atol=0.08)
    again = cross(density, [e[:7] for e in start], 60)
    torch.testing.assert_close(again[0], end[0][:7])


def test_twice_the_steps_have_a_quarter_of_the_error() -> None:
    density = target_of(refitted(0.7)[0], 300).density()
    torch.manual_seed(2)
    start = [torch.randn(300, u).double() for u in UNITS]
    exact, few, more = (cross(density, start, levels) for levels in (240, 20, 40))
    for end, coarse, fine in zip(exact, few, more, strict=True):
        error = (coarse - end).norm()
        assert error < 0.02 * end.norm()
        assert error > 3 * (fine - end).norm()


def test_only_free_chains_of_the_prior_cross() -> None:
    prior = noisy()
    z = prior.sample_latents(N, prior="generator")
    held = {3: z[2]}
    assert can_cross(target_of(prior, held=held).density())
    assert not can_cross(target_of(prior, held={1: z[0]}).density()), "a held layer below pulls"
    assert not can_cross(target_of(prior, x=torch.rand(N, 6).double()).density())
    assert not can_cross(target_of(lively(LadderVAE((6,), latent_dims=(4, 3), hidden=8))).density())
    with torch.no_grad(), frozen(prior, prior.generator):
        near, far = (
            sample_target(
                target_of(prior, held=held), ChainSettings(steps=1, step_size=1e-6, waymarks=w), default_step_size=0.1,
                start=None, noise=None,
            ).latents
            for w in (0, 5)
        )  # fmt: skip
    assert torch.equal(near[2], z[2])
    assert torch.equal(far[2], z[2])
    assert not torch.allclose(far[0], near[0], atol=0.01)


def test_samples_have_the_moments_that_the_posterior_has() -> None:
    prior, draws = refitted(-0.5)
    z = prior.sample_latents(2000, steps=20, step_size=0.2, rng=torch.Generator().manual_seed(0))
    noise = prior.model.noise(z)
    for own, drawn in zip(noise, draws, strict=True):
        torch.testing.assert_close(own.mean(0), drawn.mean(0), rtol=0.1, atol=0.1)
        torch.testing.assert_close(own.var(0), drawn.var(0), rtol=0.15, atol=0.05)
    untouched = prior.sample_latents(50, steps=0, rng=torch.Generator().manual_seed(0))
    own = prior.sample_latents(50, prior="generator", rng=torch.Generator().manual_seed(0))
    torch.testing.assert_close(untouched[0], own[0])
