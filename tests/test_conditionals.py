"""How noise becomes z, and z noise, under each kind of conditional."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import FAMILIES
from scipy import stats
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Independent,
    Laplace,
    Normal,
    SigmoidTransform,
    TransformedDistribution,
    Uniform,
)

from energy_prior import Logistic
from energy_prior.conditionals import gaussian_part, is_bounded, is_conditional, rebuilt, tensors_of, to_latent, to_noise

FAR = torch.cat([torch.linspace(-30, 30, 241, dtype=torch.float64), torch.tensor([0.0, 1e-9, -1e-9], dtype=torch.float64)])


def of(family: str, *shape: int, dtype: torch.dtype = torch.float64) -> Any:
    """A conditional with parameters that differ from element to element."""
    g = torch.Generator().manual_seed(0)
    loc, scale = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    return FAMILIES[family](loc.to(dtype), (0.3 * scale).exp().to(dtype))


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_and_density(family: str) -> None:
    """T⁻¹(T(ε)) = ε, and log p(T(ε)) = log N(ε) − log |dT/dε|."""
    conditional = of(family, 500, 1)
    noise = (2 * torch.randn(500, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).clamp(-4, 4)
    noise.requires_grad_()
    z = to_latent(conditional, noise)
    assert z.shape == noise.shape
    torch.testing.assert_close(to_noise(conditional, z), noise, rtol=1e-9, atol=1e-9)
    (slope,) = torch.autograd.grad(z.sum(), noise)
    expected = stats.norm.logpdf(noise.detach()) - slope.log().numpy()
    torch.testing.assert_close(conditional.log_prob(z).detach().reshape(500, 1), torch.tensor(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_both_ways(family: str) -> None:
    noise = torch.tensor([[-2.0], [-0.4], [0.3], [1.7]], dtype=torch.float64, requires_grad=True)
    conditional = of(family, 4, 1)
    z = to_latent(conditional, noise).detach().requires_grad_()
    for function, at in ((to_latent, noise), (to_noise, z)):
        assert torch.autograd.gradcheck(lambda v, function=function: function(conditional, v), (at,))
        assert torch.autograd.gradgradcheck(lambda v, function=function: function(conditional, v), (at,))


@pytest.mark.parametrize(
    ("distribution", "reference"), [(Laplace, stats.laplace), (Logistic, stats.logistic)], ids=["laplace", "logistic"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantiles_far_out(distribution: Any, reference: Any, dtype: torch.dtype) -> None:
    """Against SciPy's survival functions, where Φ(ε) itself would be 1; and back, with their slopes."""
    conditional = distribution(torch.zeros(len(FAR), dtype=dtype), torch.ones(len(FAR), dtype=dtype))
    noise = FAR.to(dtype, copy=True).requires_grad_()
    z = to_latent(conditional, noise)
    near = FAR.abs() < 30 - 1e-6  # SciPy's own tails end at 38
    expected = -torch.sign(FAR) * torch.tensor(reference.ppf(stats.norm.cdf(-FAR.abs().numpy())))
    tight = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(z[near].double(), expected[near], rtol=tight, atol=tight)
    back = to_noise(conditional, z)
    torch.testing.assert_close(back.double(), FAR, rtol=10 * tight, atol=10 * tight)
    there = z.detach().requires_grad_()
    (up,), (down,) = (
        torch.autograd.grad(values.sum(), at) for values, at in ((z, noise), (to_noise(conditional, there), there))
    )
    torch.testing.assert_close(up * down, torch.ones_like(up), rtol=1e3 * tight, atol=0)


def test_uniform_to_its_ends() -> None:
    """Precision at the lower end, an open upper end that is never reached, and a way back from a z that was rounded to one."""
    conditional = Uniform(torch.zeros(5), torch.ones(5), validate_args=True)
    noise = torch.tensor([-12.0, -5.0, 0.0, 5.0, 12.0])
    z = to_latent(conditional, noise)
    torch.testing.assert_close(z[:4].double(), torch.tensor(stats.norm.cdf(noise[:4].double())), rtol=2e-5, atol=0)
    assert bool(torch.isfinite(conditional.log_prob(z)).all())
    torch.testing.assert_close(to_noise(conditional, z)[:3], noise[:3], rtol=1e-5, atol=1e-6)
    ends = to_noise(conditional, torch.tensor([0.0, 1.0, 0.5, 0.25, 0.75]))
    assert bool(torch.isfinite(ends).all())
    assert float(ends[0]) < -5
    assert float(ends[1]) > 5
    assert bool(to_noise(conditional, torch.tensor([-0.1, 1.1, 0.5, 0.5, 0.5]))[:2].isnan().all())


def test_logistic_is_torchs_own() -> None:
    loc, scale = torch.tensor([0.5, -1.0]), torch.tensor([0.7, 2.0])
    ours = Logistic(loc, scale)
    theirs = TransformedDistribution(Uniform(0.0, 1.0), [SigmoidTransform().inv, AffineTransform(loc, scale)])
    x = torch.tensor([[0.1, -3.0], [4.0, 2.0]])
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
    draws = ours.rsample((200_000,))
    torch.testing.assert_close(draws.mean(0), ours.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(draws.var(0), ours.variance, rtol=0.03, atol=0)
    torch.testing.assert_close(ours.expand((3, 2)).log_prob(x[0]), theirs.expand([3, 2]).log_prob(x[0]))
    with pytest.raises(ValueError, match="scale"):
        Logistic(loc, -scale, validate_args=True)


def test_multivariate_and_independent() -> None:
    """Whole factors, and event dimensions that are only said."""
    factor = torch.tensor([[1.0, 0.0], [0.6, 0.5]], dtype=torch.float64)
    conditional = torch.distributions.MultivariateNormal(torch.zeros(3, 2, dtype=torch.float64), scale_tril=factor)
    noise = torch.randn(3, 2, dtype=torch.float64)
    z = to_latent(conditional, noise)
    torch.testing.assert_close(z, noise @ factor.T)
    torch.testing.assert_close(to_noise(conditional, z), noise)
    single = torch.distributions.MultivariateNormal(torch.zeros(3, 2), scale_tril=factor.float())
    with torch.autocast("cpu", torch.bfloat16):  # of networks; z is no feature of one
        z = to_latent(single, noise.float())
    torch.testing.assert_close(z, noise.float() @ factor.float().T)
    base = Normal(torch.zeros(3, 2), 2 * torch.ones(3, 2))
    torch.testing.assert_close(to_latent(Independent(base, 1), torch.ones(3, 2)), 2 * torch.ones(3, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_rebuilt_is_the_same_of_other_tensors(family: str) -> None:
    conditional = of(family, 3, 1)
    noise = torch.randn(3, 1, dtype=torch.float64)
    z = to_latent(conditional, noise)
    to_noise(conditional, z)  # transforms keep their inverse
    copied = rebuilt(conditional, torch.clone)
    assert not {t.data_ptr() for t in tensors_of(copied)} & {t.data_ptr() for t in tensors_of(conditional)}
    torch.testing.assert_close(to_latent(copied, noise), z, rtol=0, atol=0)
    torch.testing.assert_close(to_noise(copied, z), to_noise(conditional, z), rtol=0, atol=0)
    torch.testing.assert_close(copied.log_prob(z), conditional.log_prob(z), rtol=0, atol=0)
    shifted = rebuilt(conditional, lambda t: t + 0.5)
    assert not torch.allclose(to_latent(shifted, noise), z)


def test_rebuilt_leaves_what_pytrees_do_not_know() -> None:
    class Own(dict[str, Tensor]):
        pass

    class WithFields:
        _fields = ("a",)

    for value in (Own(a=torch.zeros(1)), WithFields()):
        assert rebuilt({"x": value}, lambda t: t + 1)["x"] is value


def test_a_transforms_tensors_come_after_those_of_its_base() -> None:
    base = Normal(torch.zeros(2, 3), torch.ones(2, 3))
    shifted = TransformedDistribution(base, [AffineTransform(torch.zeros(3).double(), 2.0)])
    assert [t.dtype for t in tensors_of(shifted)] == [torch.float32, torch.float32, torch.float64]


def test_rebuilt_goes_into_containers() -> None:
    one = torch.zeros(2)
    state = {"a": [one, (one, "text")], "p": Normal(one, one + 1)}
    found: Any = rebuilt(state, lambda t: t + 1)
    assert torch.equal(found["a"][1][0], one + 1)
    assert found["a"][1][1] == "text"
    assert torch.equal(found["p"].scale, one + 2)
    assert torch.equal(state["p"].scale, one + 1)  # type: ignore[union-attr]


@pytest.mark.parametrize("family", FAMILIES)
def test_kinds(family: str) -> None:
    conditional = of(family, 2, 1)
    assert is_conditional(conditional)
    assert is_bounded(conditional) is (family in ("uniform", "log-normal", "tanh, scaled"))
    assert (gaussian_part(conditional) is not None) is (family in ("log-normal", "tanh, scaled"))


def test_bounds_of_torchs_logistic() -> None:
    loc = torch.zeros(2)
    logit = TransformedDistribution(Uniform(loc, loc + 1), [SigmoidTransform().inv])
    assert not is_bounded(logit)
    shifted = TransformedDistribution(Uniform(loc, loc + 1), [AffineTransform(loc, 2.0)])
    assert is_bounded(shifted)


def test_logistic_of_known_values() -> None:
    t = torch.tensor([0.0, 2.0], dtype=torch.float64)
    expected: Tensor = torch.tensor([math.log(0.25), -2 - 2 * math.log1p(math.exp(-2.0))], dtype=torch.float64)
    torch.testing.assert_close(Logistic(torch.zeros_like(t), torch.ones_like(t)).log_prob(t), expected)
