"""The unadjusted chain: what it leaves invariant, the variance that theory gives it, and the order of its bias."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import agrees, moment_table
from ladders import LinearLadder
from torch import Tensor, nn

from energy_prior import JointEBMPrior, LadderVAE, MLPEnergy
from energy_prior.langevin import Evaluation, JointDensity, Scheme, coefficients, propose
from energy_prior.process import frozen
from energy_prior.topdown import TopDown

CHAINS = 20_000


def untrained() -> JointEBMPrior:
    """Small energies that are 0 everywhere, so that the target in noise space is N(0, I)."""
    vae = LadderVAE((4,), latent_dims=(2, 1), hidden=8).double()
    return JointEBMPrior(vae, [MLPEnergy(shape, hidden=(4,)).double() for shape in vae.latent_shapes])


@pytest.mark.parametrize(("scheme", "adjust"), [("crank_nicolson", False), ("crank_nicolson", True), ("euler", True)])
@pytest.mark.parametrize("step_size", [0.3, 1.2])
def test_normal_is_invariant_for_f_zero(scheme: Scheme, adjust: bool, step_size: float) -> None:
    prior = untrained()
    z = prior.sample_latents(
        CHAINS, steps=20, step_size=step_size, scheme=scheme, adjust=adjust, rng=torch.Generator().manual_seed(0)
    )
    noise = TopDown(prior.generator, CHAINS).position(z, "noise")
    assert agrees(moment_table(torch.cat([n.detach() for n in noise], 1), torch.zeros(3).double(), torch.eye(3).double()))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_euler_has_the_variance_of_theory(temperature: float) -> None:
    """T / (1 − s²/(4T)): at s = 0.9, T = 1 that is 1.254, far outside the sampling error around 1."""
    s = 0.9
    prior = untrained()
    z = prior.sample_latents(
        CHAINS, steps=60, step_size=s, scheme="euler", temperature=temperature, rng=torch.Generator().manual_seed(0)
    )
    noise = torch.cat([n.detach() for n in TopDown(prior.generator, CHAINS).position(z, "noise")], 1)
    variance = temperature / (1 - s**2 / (4 * temperature))
    assert agrees(moment_table(noise, torch.zeros(3).double(), variance * torch.eye(3).double()))
    assert not agrees(moment_table(noise, torch.zeros(3).double(), temperature * torch.eye(3).double()))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("step_size", [0.1, 0.7, 1.5])
def test_coefficients_have_the_stationary_variance_of_theory(step_size: float, temperature: float) -> None:
    s = torch.tensor(step_size, dtype=torch.float64)
    for scheme, expected in (
        ("crank_nicolson", temperature),
        ("euler", temperature / (1 - step_size**2 / (4 * temperature))),
    ):
        c = coefficients(s, scheme, "noise", temperature)  # type: ignore[arg-type]
        if abs(float(c.c0)) < 1:
            assert float(c.tau**2 / (1 - c.c0**2)) == pytest.approx(expected, rel=1e-12)


def stationary_covariance(ladder: LinearLadder, space: str, scheme: Scheme, s: float) -> Tensor:
    """Exact stationary covariance of the unadjusted chain in latent coordinates: its step is y' = K y + k + τ n."""
    n = sum(ladder.dims)

    def split(y: Tensor) -> list[Tensor]:
        return list(y.split(ladder.dims, 1))

    with torch.no_grad(), frozen(ladder, *ladder.energies):
        density = JointDensity(TopDown(ladder, n + 1), ladder.energies, space)  # type: ignore[arg-type]
        y = torch.cat([torch.eye(n), torch.zeros(1, n)]).double()
        c = coefficients(torch.tensor(s, dtype=torch.float64), scheme, space)  # type: ignore[arg-type]
        moved = torch.cat(propose(split(y), density.evaluate(split(y)).gradient, c, split(torch.zeros_like(y))), 1)
        k = (moved[:n] - moved[n]).T
        covariance = torch.zeros(n, n, dtype=torch.float64)
        power, term = k, float(c.tau) ** 2 * torch.eye(n).double()
        for _ in range(40):  # Σ = Σ_m K^m τ² (K^m)ᵀ by doubling
            covariance = term
            term = term + power @ term @ power.T
            power = power @ power
        if space == "latent":
            return covariance
        basis = density.topdown.descend(split(y), "noise").latents
        jacobian = (torch.cat(basis, 1)[:n] - torch.cat(basis, 1)[n]).T
        return jacobian @ covariance @ jacobian.T


@pytest.mark.parametrize(("space", "scheme"), [("noise", "crank_nicolson"), ("noise", "euler"), ("latent", "euler")])
def test_bias_falls_with_the_square_of_the_step(space: str, scheme: Scheme) -> None:
    """Weak order one in the step h = s²/2 of the diffusion (Roberts and Tweedie 1996), so bias ∝ s²: no sampling error here."""
    ladder = LinearLadder((3, 2), seed=2)
    _, exact = ladder.tilted()
    steps = [0.2, 0.1, 0.05]
    bias = [float((stationary_covariance(ladder, space, scheme, s) - exact).norm()) for s in steps]
    orders = [math.log(a / b) / math.log(2) for a, b in zip(bias[:-1], bias[1:], strict=True)]
    assert orders == pytest.approx([2.0, 2.0], abs=0.05)
    assert bias[-1] < 0.01 * float(exact.norm())


def test_a_state_that_is_stationary_for_a_linear_tilt() -> None:
    """f(ε) = h·ε tilts N(0, I) to N(h, I): Crank–Nicolson's fixed point is h at every step size."""

    class Linear(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return 0.6 * z.sum(1)

    ladder = LinearLadder((2,), seed=1)
    density = JointDensity(TopDown(ladder, 1), [Linear()])
    at = torch.full((1, 2), 0.6, dtype=torch.float64)
    state: Evaluation = density.evaluate([at])
    for s in (0.1, 1.0, 1.9):
        c = coefficients(torch.tensor(s, dtype=torch.float64), "crank_nicolson", "noise")
        torch.testing.assert_close(propose(state.position, state.gradient, c, [torch.zeros_like(at)])[0], at)
