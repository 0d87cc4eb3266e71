"""Denoising: its loss against closed forms, and what a run of it learns."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from runs import Shifted
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from energy_prior import (
    ArgumentError,
    DenoisingEnergy,
    Inferred,
    JointEBMPrior,
    LadderVAE,
    MLPEnergy,
    denoising_energies,
    fit_elbo,
)
from energy_prior.energies import waymark
from energy_prior.energies.quadratic import Quadratic
from energy_prior.training.objectives import denoising

QUIET: dict[str, Any] = {"progress": False}
BRIEF: dict[str, Any] = QUIET | {"iterations": 2, "batch_size": 50, "step_size": 0.2}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 300) -> Tensor:
    """Blobs at two places, in [0, 1]."""
    rng = seeded(0)
    grid = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"))
    centre = torch.where(torch.rand(n, 1, generator=rng) < 0.5, torch.tensor([[2.0, 2.0]]), torch.tensor([[5.0, 5.0]]))
    centre = centre + 0.3 * torch.randn(n, 2, generator=rng)
    return torch.exp(-0.5 * (grid - centre[:, :, None, None]).square().sum(1, keepdim=True))


def two_modes() -> Tensor:
    """Images at ± the same ramp, (400, 1, 4, 4)."""
    torch.manual_seed(0)
    sign = torch.where(torch.rand(400, 1, 1, 1) < 0.5, 1.0, -1.0)
    return sign * torch.linspace(0.5, 2.0, 16).reshape(1, 1, 4, 4)


def small(data: Tensor) -> JointEBMPrior:
    torch.manual_seed(0)
    vae = LadderVAE((1, 8, 8), latent_dims=(2, 2), hidden=8, depth=1, nets="conv")
    fit_elbo(vae, data, iterations=20, batch_size=50, rng=seeded(1), **QUIET)
    return JointEBMPrior(vae, denoising_energies(vae.latent_shapes, channels=8))


class MapUnderVector(nn.Module):
    """z_2 is a vector, z_1 a map; its inference model is the prior, shifted by the image."""

    latent_shapes = (torch.Size([1, 4, 4]), torch.Size([3]))

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 16)

    def start(self, batch_size: int) -> Tensor:
        return self.net.weight.new_zeros(batch_size, 3)

    def conditional(self, state: Tensor, layer: int) -> Normal:
        loc = state if layer == 2 else self.net(state).reshape(-1, 1, 4, 4)
        return Normal(loc, torch.ones_like(loc))

    def descend(self, state: Tensor, z: Tensor, layer: int) -> Tensor:
        return z

    def likelihood(self, state: Tensor) -> Independent:
        return Independent(Normal(state, 0.5), 3)

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        q2 = Normal(x.mean((2, 3)).expand(-1, 3), 0.5)
        z2 = q2.rsample()
        q1 = Normal(self.net(z2).reshape(-1, 1, 4, 4) + x, 0.5)
        z1 = q1.rsample()
        return Inferred((z1, z2), torch.stack([q1.log_prob(z1).flatten(1).sum(1), q2.log_prob(z2).sum(1)], 1))


def test_loss_of_the_closed_form_is_the_least() -> None:
    """For ε_q ~ N(m, C) the least loss is tr[C (α² C + σ² I)⁻¹]/d, that of f = 0 is σ² E ε_q² + α², both per unit."""
    torch.manual_seed(0)
    n, variances, mean = 200_000, torch.tensor([4.0, 0.1]).double(), torch.tensor([0.5, -1.0]).double()
    clean = torch.randn(n, 2).double() * variances.sqrt() + mean
    added = torch.randn(n, 2).double()
    f = Quadratic((2,)).double()
    f.mean.copy_(mean)
    f.vectors.copy_(torch.eye(2))
    f.variances.copy_(variances)
    for angle in (0.2, 1.0, 1.5):
        alpha, sigma = (torch.full((n,), value).double() for value in (math.cos(angle), math.sin(angle)))

        def loss(scale: float, shift: float, alpha: Tensor = alpha, sigma: Tensor = sigma) -> float:
            noised = (alpha[:, None] * clean + sigma[:, None] * added).requires_grad_()
            (gradient,) = torch.autograd.grad(f(noised, alpha).sum(), noised)
            return float(denoising([scale * gradient + shift * alpha[:, None]], [clean], [added], alpha, sigma))

        a, s = math.cos(angle) ** 2, math.sin(angle) ** 2
        least = float((variances / (a * variances + s)).mean())
        untilted = float((s * (variances + mean.square()) + a).mean())
        assert loss(1.0, 0.0) == pytest.approx(least, rel=0.02)
        assert loss(0.0, 0.0) == pytest.approx(untilted, rel=0.02)
        assert min(loss(0.8, 0.0), loss(1.2, 0.0), loss(1.0, 0.2), loss(1.0, -0.2)) > loss(1.0, 0.0)


@pytest.mark.slow
def test_a_run_brings_prior_draws_to_posterior_draws() -> None:
    """The posterior's noise has two modes: the closed part gives its covariance, what is learned the modes."""
    data = two_modes()
    prior = JointEBMPrior(MapUnderVector())
    result = prior.fit(data, iterations=200, batch_size=64, step_size=0.2, rng=seeded(2), **QUIET)
    assert result.method == "denoising", "the default where energies have waymarks"
    assert result.warnings == []

    def along(latents: Any) -> Tensor:
        """ε_1 along the modes, which are at ±1."""
        mode = data[0].flatten().abs()
        return (prior.model.noise(latents)[0].detach().flatten(1) @ mode) / mode.square().sum()

    def share_between(which: Any) -> float:
        return float((along(prior.sample_latents(500, prior=which, rng=seeded(9))).abs() < 0.5).float().mean())

    def losses() -> list[float]:
        return [loss_at(prior, data, level) for level in (0.2, 0.5, 0.8)]

    assert share_between("joint") < 0.1 < 0.5 < share_between("generator")
    learned = losses()
    for f in prior.energies:
        torch.nn.init.zeros_(f.net.out.weight)  # type: ignore[union-attr, arg-type]
        torch.nn.init.zeros_(f.net.out.bias)  # type: ignore[union-attr, arg-type]
    assert share_between("joint") > 0.15, "the closed part alone has one mode"
    assert all(a < b - 0.005 for a, b in zip(learned, losses(), strict=True)), (learned, losses())


def loss_at(prior: JointEBMPrior, data: Tensor, level: float) -> float:
    """The loss of "denoising" at one waymark, over several draws for each image."""
    torch.manual_seed(4)
    many = data.repeat(10, 1, 1, 1)
    clean = [e.detach() for e in prior.model.noise(prior.generator.infer(many).latents)]  # type: ignore[attr-defined]
    added = [torch.randn_like(e) for e in clean]
    levels = torch.full((len(many),), level)
    alpha, sigma = waymark(levels)
    noised = [(alpha[0] * e + sigma[0] * n).requires_grad_() for e, n in zip(clean, added, strict=True)]
    gradient = torch.autograd.grad(prior.model.energies_at(noised, levels).sum(), noised)
    return float(denoising(gradient, clean, added, alpha, sigma))


def test_the_closed_part_is_set_once_and_not_trained() -> None:
    data = images()
    prior = small(data)
    prior.fit(data, "denoising", rng=seeded(2), **BRIEF)
    first = [f.quadratic.mean.clone() for f in prior.energies if isinstance(f, DenoisingEnergy)]
    assert len(first) == 2
    assert all(bool(mean.any()) for mean in first)
    prior.fit(data.flip(0) * 0.5, "denoising", rng=seeded(3), **BRIEF)
    assert all(torch.equal(m, f.quadratic.mean) for m, f in zip(first, prior.energies) if isinstance(f, DenoisingEnergy))


def test_layers_of_different_kinds_learn_together() -> None:
    """A map below a vector, as in a pyramid."""
    torch.manual_seed(0)
    prior = JointEBMPrior(MapUnderVector())
    assert all(isinstance(f, DenoisingEnergy) for f in prior.energies)
    result = prior.fit(torch.rand(40, 1, 4, 4), iterations=3, batch_size=20, step_size=0.2, rng=seeded(1), **QUIET)
    assert result.method == "denoising"
    assert prior.sample(3, steps=2).shape == (3, 1, 4, 4)
    assert prior.llr_scores(torch.rand(3, 1, 4, 4), steps=2).shape == (3, 2)


def test_other_energies_are_refused_and_learn_by_nce() -> None:
    data = images()
    vae = small(data).generator
    plain = JointEBMPrior(vae, [MLPEnergy(shape, hidden=(8,)) for shape in vae.latent_shapes])
    with pytest.raises(ArgumentError, match='"denoising" needs energies with waymarks, and f_1 is MLPEnergy'):
        plain.fit(data, "denoising", **BRIEF)
    assert plain.fit(data, **BRIEF).method == "nce"


@pytest.mark.slow
def test_maximum_likelihood_goes_on_from_it() -> None:
    """By chains that start across the waymarks: the gap stays near 0, and the prior comes closer."""
    data = two_modes()
    prior = JointEBMPrior(MapUnderVector())
    before = prior.fit(data, "denoising", iterations=300, batch_size=64, rng=seeded(2), **QUIET).mismatch
    result = prior.fit(data, "two_stage", iterations=100, batch_size=64, rng=seeded(3), **QUIET)
    assert before is not None
    assert result.mismatch is not None
    assert before.joint_accuracy is not None
    assert result.mismatch.joint_accuracy is not None
    assert result.mismatch.joint_accuracy < before.joint_accuracy - 0.02
    assert all(abs(entry["gap"]) < 10 for entry in result.history)


def test_maximum_likelihood_takes_small_steps_after_it_alone() -> None:
    torch.manual_seed(0)
    prior, data = JointEBMPrior(MapUnderVector()), images(100)[:, :, 2:6, 2:6]
    assert prior.fit(data, "two_stage", steps=2, **BRIEF).config.learning_rate == 3e-3
    prior = JointEBMPrior(MapUnderVector())
    prior.fit(data, "denoising", **BRIEF)
    assert prior.fit(data, "two_stage", steps=2, **BRIEF).config.learning_rate == 1e-4


@pytest.mark.filterwarnings("ignore::energy_prior.TrainingWarning")
@pytest.mark.parametrize("method", ["nce", "two_stage"])
def test_large_values_of_the_closed_part_are_no_divergence(method: str) -> None:
    """f of more than a thousand nats at draws of the prior, where a layer has 40 units and the posterior is 8 σ away."""
    torch.manual_seed(0)
    prior, data = JointEBMPrior(Shifted(8.0, 40), denoising_energies([(40,)], channels=8)), torch.zeros(300, 1)
    prior.fit(data, "denoising", **BRIEF)
    history = prior.fit(data, method, **BRIEF).history
    assert history[-1]["max_energy"] > 1000


def test_a_run_says_what_its_posterior_chains_accept() -> None:
    """Where the generator has no inference model."""
    torch.manual_seed(0)
    prior = JointEBMPrior(MapUnderVector())
    assert "posterior_acceptance" not in prior.fit(images(100)[:, :, 2:6, 2:6], "denoising", **BRIEF).history[-1]
    without = JointEBMPrior(type("NoInfer", (MapUnderVector,), {"infer": None})())
    assert "posterior_acceptance" in without.fit(images(100)[:, :, 2:6, 2:6], "denoising", **BRIEF).history[-1]
