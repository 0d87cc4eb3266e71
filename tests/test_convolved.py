"""`ConvolvedNormal`: its density against quadrature, the pair (n, v) against its definition, far out and in both precisions."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor
from torch.distributions import Normal

from energy_prior import ConvolvedNormal

SCALES = (0.01, 0.1, 0.3, 1.0, 5.0, 300.0)
OFFSETS = (0.0, 1e-3, 0.4, -0.5, 1.0, -3.0, 12.0, -40.0)


def grid(dtype: torch.dtype, farthest: float = math.inf) -> tuple[Tensor, Tensor, Tensor]:
    """z, μ and σ of every offset and scale, (cases, 1)."""
    cases = [(offset, scale) for scale in SCALES for offset in OFFSETS if abs(offset) <= farthest * scale]
    offset, scale = torch.tensor(cases, dtype=torch.float64).unbind(1)
    loc = torch.linspace(-2, 2, len(cases), dtype=torch.float64)
    return ((loc + offset)[:, None]).to(dtype), loc[:, None].to(dtype), scale[:, None].to(dtype)


def exact_log_mass(z: float, loc: float, scale: float) -> float:
    with mpmath.workdps(60):
        m, h = abs(mpmath.mpf(z) - mpmath.mpf(loc)) / mpmath.mpf(scale), mpmath.mpf(0.5) / mpmath.mpf(scale)
        tails = [mpmath.erfc((m + side * h) / mpmath.sqrt(2)) / 2 for side in (-1, 1)]
        return float(mpmath.log(tails[0] - tails[1]))


@pytest.mark.parametrize(("dtype", "tight"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_log_prob_far_out(dtype: torch.dtype, tight: float) -> None:
    """Thousands of σ out, for σ far below and far above the noise; against 60 digits."""
    z, loc, scale = grid(dtype)
    expected = [exact_log_mass(*case) for case in torch.cat([z, loc, scale], 1).double().tolist()]
    found = ConvolvedNormal(loc, scale).log_prob(z).double()[:, 0]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=tight, atol=tight)


@pytest.mark.parametrize("scale", [0.1, 0.7, 3.0])
def test_density_is_the_marginal_of_the_pair(scale: float) -> None:
    """p(z) = ∫ N(z − Φ(v) + ½; μ, σ²) N(v; 0, 1) dv, by quadrature."""
    for z in (-2.0, 0.1, 0.45, 3.0):

        def joint(v: float, z: float = z) -> float:
            return float(stats.norm.pdf(z - stats.norm.cdf(v) + 0.5, 0.3, scale) * stats.norm.pdf(v))

        found, _ = integrate.quad(joint, -9, 9, epsabs=0, epsrel=1e-11, limit=500)
        loc, sigma = torch.tensor([[0.3], [scale]], dtype=torch.float64)
        p = ConvolvedNormal(loc, sigma)
        assert float(p.log_prob(torch.tensor([z], dtype=torch.float64))) == pytest.approx(math.log(found), abs=1e-9)


def test_moments_and_draws() -> None:
    p = ConvolvedNormal(torch.tensor([0.5, -1.0]), torch.tensor([0.2, 2.0]))
    torch.manual_seed(1)
    pair = ConvolvedNormal(p.loc.expand(40_000, 2), p.scale).pair().sample()
    for drawn in (p.sample((40_000,)), ConvolvedNormal.from_pair(pair)):
        torch.testing.assert_close(drawn.mean(0), p.mean, rtol=0, atol=0.04)
        torch.testing.assert_close(drawn.var(0), p.variance, rtol=0.03, atol=0)
        for i in range(2):
            one = drawn[:, i].numpy()
            scale = float(p.scale[i])
            assert stats.kstest(one, lambda v, i=i, s=scale: cdf(v, float(p.loc[i]), s)).pvalue > 1e-3
    assert p.rsample((3,)).shape == (3, 2)


def cdf(z: Any, loc: float, scale: float) -> Any:
    """∫_{−½}^{½} Φ((z − u − μ)/σ) du, by the antiderivative t Φ(t) + φ(t)."""
    ends = [(z + side - loc) / scale for side in (0.5, -0.5)]
    upper, lower = (t * stats.norm.cdf(t) + stats.norm.pdf(t) for t in ends)
    return scale * (upper - lower)


@pytest.mark.parametrize(("dtype", "tight"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize("noise", [-5.0, -1.0, -1e-3, 0.0, 0.5, 4.0])
def test_pair(dtype: torch.dtype, tight: float, noise: float) -> None:
    """z comes back, n is in [z − ½, z + ½], P(v' ≤ v | z) = Φ(ε), and all of it is finite, hundreds of σ out."""
    z, loc, scale = grid(dtype, 400)
    pair, log_p = ConvolvedNormal(loc, scale).to_pair(z, torch.full_like(z, noise))
    n, v = pair.chunk(2, 1)
    assert bool(torch.isfinite(pair).all() and torch.isfinite(log_p).all())
    eps = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(ConvolvedNormal.from_pair(pair), z, rtol=eps, atol=eps)
    assert bool(((n - z).abs() <= 0.5 + eps * (1 + z.abs())).all())
    for i in range(len(z)):
        with mpmath.workdps(60):
            m, s, e, b = (mpmath.mpf(float(t)) for t in (z[i] - loc[i], scale[i], noise, v[i]))
            if noise > 0:  # the other end, where digits are not lost
                m, e, b = -m, -e, -b
            end = (m + 0.5) / s
            inside = exact_mass(end - mpmath.ncdf(b) / s, end) / exact_mass(end - 1 / s, end)
            off = abs(mpmath.log(inside) - mpmath.log(mpmath.ncdf(e)))
            rate = mpmath.npdf(b) * mpmath.npdf(end - mpmath.ncdf(b) / s) / s / exact_mass(end - mpmath.ncdf(b) / s, end)
            assert float(off / rate) < tight * 10 * (1 + abs(float(v[i]))), (i, float(v[i]))  # in v


def exact_mass(low: Any, high: Any) -> Any:
    return mpmath.ncdf(high) - mpmath.ncdf(low) if low < 0 else mpmath.ncdf(-low) - mpmath.ncdf(-high)


def test_log_density_of_the_pair() -> None:
    """log p(n, v) − log p(n, v | z) = log p(z): the identity that keeps the model's KL."""
    z, loc, scale = grid(torch.float64, 400)
    p = ConvolvedNormal(loc, scale)
    pair, log_p = p.to_pair(z, torch.linspace(-4, 4, len(z)).double()[:, None])
    n, v = pair.chunk(2, 1)
    joint = Normal(loc, scale).log_prob(n) + Normal(0.0, 1.0).log_prob(v)
    torch.testing.assert_close(p.pair().log_prob(pair).sum(1, keepdim=True), joint, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(joint - log_p, p.log_prob(z), rtol=1e-12, atol=1e-12)


def test_draws_of_the_pair_are_of_p_given_z() -> None:
    """(n, v) of z ~ p(z) is a draw of p(n, v) again: v ~ N(0, 1), and n ~ N(μ, σ²) independent of it."""
    torch.manual_seed(2)
    loc, scale = torch.full((20_000, 1), 0.4).double(), torch.full((20_000, 1), 0.3).double()
    p = ConvolvedNormal(loc, scale)
    pair, _ = p.to_pair(p.sample(), torch.randn(20_000, 1).double())
    n, v = pair.unbind(1)
    for values in ((n - 0.4) / 0.3, v):
        assert stats.kstest(values.numpy(), "norm").pvalue > 1e-3
    assert abs(float(torch.corrcoef(torch.stack([n, v]))[0, 1])) < 0.03
    assert abs(float(torch.corrcoef(torch.stack([(n - 0.4).square(), v.square()]))[0, 1])) < 0.03


def test_gradients() -> None:
    """Of first and second order, in every argument, by finite differences."""
    g = torch.Generator().manual_seed(3)
    z, loc, log_scale, noise = (torch.randn(6, 2, 2, generator=g, dtype=torch.float64) for _ in range(4))
    arguments = [t.requires_grad_() for t in (2 * z, loc, 1.5 * log_scale, 1.5 * noise)]

    def made(z: Tensor, loc: Tensor, log_scale: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        p = ConvolvedNormal(loc, log_scale.exp())
        return *p.to_pair(z, noise), p.log_prob(z), ConvolvedNormal.from_pair(torch.cat([z, noise], 1))

    assert torch.autograd.gradcheck(made, arguments)
    assert torch.autograd.gradgradcheck(made, arguments)


def test_gradient_of_the_pair_in_the_tails() -> None:
    """dv/dz at fixed ε where Φ(v) is 1e-7: bounded, and the same in float32 as in float64."""
    found = []
    for dtype in (torch.float32, torch.float64):
        z = torch.tensor([[0.2], [3.0]], dtype=dtype, requires_grad=True)
        p = ConvolvedNormal(torch.zeros_like(z), torch.full_like(z, 0.25))
        pair, _ = p.to_pair(z, torch.tensor([[-5.2], [-5.2]], dtype=dtype))
        (slope,) = torch.autograd.grad(pair[:, 1].sum(), z)
        found.append(slope.double())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=0)


def test_shapes_and_arguments() -> None:
    """Channels may have any shape behind them; μ and σ are broadcast."""
    p = ConvolvedNormal(torch.zeros(3, 2, 1, 5), torch.ones(()))
    pair, log_p = p.to_pair(torch.zeros(3, 2, 1, 5), torch.zeros(3, 2, 1, 5))
    assert pair.shape == p.pair().batch_shape == (3, 4, 1, 5)
    assert log_p.shape == p.batch_shape == (3, 2, 1, 5)
    with pytest.raises(ValueError, match="scale"):
        ConvolvedNormal(torch.zeros(2), -torch.ones(2))
