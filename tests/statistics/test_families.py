"""Conditionals of other families than the normal one: chains and scores against quadrature over z."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from families import FAMILIES, FamilyLadder
from helpers import agrees, limit
from test_scale_ladder import z_scores
from torch import Tensor

from energy_prior import ArgumentError, ChainSettings, DivergenceError, Inferred, JointEBMPrior, denoising_energies
from energy_prior.scores import pass_terms
from energy_prior.topdown import ancestral
from energy_prior.training import Method

CHAINS = 4000
CASES = [(family, held) for family in FAMILIES for held in ({}, {2: 0.4})] + [("laplace", {1: 0.7}), ("sinh", {1: 0.7})]


@pytest.mark.parametrize(("family", "held"), CASES)
def test_chains_have_the_moments(family: str, held: dict[int, float]) -> None:
    ladder = FamilyLadder(family)
    prior = JointEBMPrior(ladder, ladder.energies)
    given = {layer: torch.full((CHAINS, 1), value, dtype=torch.float64) for layer, value in held.items()}
    step_size = None if 1 in held else 0.7
    rng = torch.Generator().manual_seed(3)
    z = prior.sample_latents(CHAINS, given=given, steps=100, step_size=step_size, adjust=True, rng=rng)
    assert agrees(z_scores([torch.asinh(t) for t in z], ladder.moments(held)))


@pytest.mark.parametrize("family", FAMILIES)
def test_posterior_chains_have_the_moments(family: str) -> None:
    ladder = FamilyLadder(family)
    prior = JointEBMPrior(ladder, ladder.energies)
    x = torch.full((CHAINS, 1), 1.3, dtype=torch.float64)
    z = prior.sample_posterior(x, steps=200, rng=torch.Generator().manual_seed(4))
    assert agrees(z_scores([torch.asinh(t) for t in z], ladder.moments(x=1.3)))


@pytest.mark.parametrize(
    ("family", "k"),
    [*((family, 1) for family in FAMILIES), *((family, k) for family in ("laplace", "uniform") for k in (0, 2))],
)
def test_log_joint(family: str, k: int) -> None:
    """L^{>k} against quadrature: draws of z_{>k} from q, and E over p(z_{<=k} | z_{>k})."""
    ladder = FamilyLadder(family)
    prior = JointEBMPrior(ladder, ladder.energies)
    x = torch.full((CHAINS, 1), 0.6, dtype=torch.float64)
    draws = prior.log_joint(x, k, steps=80, step_size=0.7, adjust=True, rng=torch.Generator().manual_seed(k))
    expected = ladder.log_joint(0.6, k)
    assert abs(float((draws.mean() - expected) / (draws.std() / CHAINS**0.5))) < limit(1)


class Tilted(FamilyLadder):
    """Its posterior's draws are those of p_β(z) exp(Σ f_i), by rejection, whatever x is: what the energies have to learn."""

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        n, found = len(x), []
        most = sum(float(f(torch.linspace(-50, 50, 4001)[:, None].to(x)).max()) for f in self.energies)
        while sum(map(len, found)) < n:
            z1, z2 = ancestral(self, 4 * n).latents
            kept = torch.rand(4 * n).to(x) < (self.energies[0](z1) + self.energies[1](z2) - most).exp()
            found.append(torch.cat([z1, z2], 1)[kept])
        z = torch.cat(found)[:n]
        return Inferred((z[:, :1], z[:, 1:]), x.new_zeros(n, 2))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["laplace", "uniform"])
def test_nce_learns_the_tilt(family: str) -> None:
    ladder = Tilted(family)
    prior = JointEBMPrior(ladder)
    with torch.no_grad():
        before = ladder.infer(torch.zeros(20_000, 1).double()).latents, prior.sample_latents(20_000, steps=0)
        spread = moments(before[0]) - ladder.moments()
        assert float(spread.abs().max()) < 0.05, "rejection draws what quadrature integrates"
        off = float((moments(before[1]) - ladder.moments()).abs().max())
    rng = torch.Generator().manual_seed(0)
    prior.fit(torch.randn(1000, 1).double(), "nce", iterations=600, batch_size=128, progress=False, rng=rng)
    z = prior.sample_latents(4000, steps=100, adjust=True, rng=torch.Generator().manual_seed(1))
    assert float((moments(z) - ladder.moments()).abs().max()) < 0.25 * off


def moments(latents: Sequence[Tensor]) -> Tensor:
    """Those of `FamilyLadder.moments`, of draws."""
    z1, z2 = (torch.asinh(z[:, 0]) for z in latents)
    return torch.stack([z1, z2, z1**2, z2**2, z1 * z2], 1).mean(0)


class Outside(FamilyLadder):
    """q reaches beyond p's support."""

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        z = torch.randn(len(x), 1, generator=rng, dtype=x.dtype) + 3
        return Inferred((z, z), x.new_zeros(len(x), 2))


def test_draws_outside_the_support_are_named() -> None:
    """In scores, in what compares posterior and prior, and in latents that are given."""
    prior = JointEBMPrior(Outside("uniform"), denoising_energies(Outside.latent_shapes).double())
    x = torch.randn(40, 1).double()
    with pytest.raises(DivergenceError, match="log p_β of layer 1 is not.*outside the support of the prior"):
        prior.log_joint(x)
    with pytest.raises(DivergenceError, match=r"values of z_1 are outside the support of p\(z_1 \| z_\(>1\)\), a Uniform"):
        prior.mismatch(x)


class OutsideAtLast(FamilyLadder):
    """q reaches beyond p's support in the last row of a batch alone."""

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        z = 0.1 + 0.8 * torch.rand(len(x), 1, generator=rng, dtype=x.dtype)
        z[-1] += 3
        return Inferred((z, z), x.new_zeros(len(x), 2))


@pytest.mark.parametrize("method", ["nce", "multi_stage_nce", "two_stage", "variational"])
def test_fit_stops_at_the_first_draw_outside_the_support(method: Method) -> None:
    prior = JointEBMPrior(OutsideAtLast("uniform"))
    with pytest.raises(DivergenceError, match="in iteration 1: [0-9]+ values of z_[12] are outside the support"):
        prior.fit(torch.randn(40, 1).double(), method, iterations=3, step_size=0.3, progress=False)


@pytest.mark.parametrize("call", ["sample", "sample_latents", "trajectory"])
def test_a_given_z_outside_the_support_is_refused(call: str) -> None:
    prior = JointEBMPrior(FamilyLadder("uniform"))
    more = {"every": 1} if call == "trajectory" else {}
    given = {2: torch.full((2, 1), 90.0).double()}
    with pytest.raises(ArgumentError, match=r"^given\[2\]: 2 values of z_2 are where p\(z_2 \| z_\(>2\)\) cannot be: log p"):
        getattr(prior, call)(2, given=given, steps=2, **more)
    with pytest.raises(DivergenceError, match="at step 0: .* a layer that is held, .* is where its prior cannot be"):
        getattr(prior, call)(2, given={1: 45 * given[2]}, steps=2, **more)
    assert prior.sample_latents(2, given={2: torch.full((2, 1), 1.9).double()}, steps=2)[1][0] == pytest.approx(1.9)


def test_latent_space_needs_all_real_numbers() -> None:
    with pytest.raises(ArgumentError, match=r'space: expected "noise" for this generator, got "latent": z_2, a Uniform'):
        JointEBMPrior(FamilyLadder("uniform"), space="latent")
    assert JointEBMPrior(FamilyLadder("laplace"), space="latent").space == "latent"


def test_one_pass_at_the_means_of_uniform_draws() -> None:
    """The score "tails" depends on no seed where q is uniform either."""

    class Fixed(FamilyLadder):
        def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
            u = torch.rand(len(x), 2, generator=rng, dtype=x.dtype)
            return Inferred((u[:, :1] - 0.5, u[:, 1:] - 0.5), x.new_zeros(len(x), 2))

    prior = JointEBMPrior(Fixed("uniform"))
    terms = [pass_terms(prior.model, torch.ones(3, 1).double(), ChainSettings()) for _ in range(2)]
    assert torch.equal(terms[0].rate, terms[1].rate)
