"""Generators with known answers: a linear-Gaussian ladder (closed forms) and one whose scale depends on the layer above."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from energy_prior import Inferred


class QuadraticEnergy(nn.Module):
    """f(z) = −½ zᵀ Q z + hᵀ z + c."""

    def __init__(self, q: Tensor, h: Tensor, c: float = 0.0) -> None:
        super().__init__()
        self.q, self.h = nn.Parameter(q), nn.Parameter(h)
        self.c = nn.Parameter(torch.tensor(c, dtype=q.dtype))

    def forward(self, z: Tensor) -> Tensor:
        return -0.5 * ((z @ self.q) * z).sum(1) + z @ self.h + self.c


class LinearLadder(nn.Module):
    """z_L ~ N(0, I), z_i = A_i z_{i+1} + b_i + σ_i ε_i, x = B z_1 + τ η, and q(z_i | x) = N(W_i x, s_i²), all known.

    With quadratic energies the tilted prior, its conditionals, log Z, the posterior and L^{>k} are Gaussian integrals.
    """

    def __init__(self, dims: Sequence[int], x_dim: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.dims, self.layers, self.x_dim = tuple(dims), len(dims), x_dim
        self.latent_shapes = tuple(torch.Size((d,)) for d in dims)
        pairs = list(zip(dims[:-1], dims[1:], strict=True))
        self.a = nn.ParameterList([nn.Parameter((draw(d, up) * 0.8 / math.sqrt(up)).to(dtype)) for d, up in pairs])
        self.b = nn.ParameterList([nn.Parameter((draw(d) * 0.5).to(dtype)) for d, _ in pairs])
        self.s = nn.ParameterList([nn.Parameter((0.5 + torch.sigmoid(draw(d))).to(dtype)) for d, _ in pairs])
        self.out = nn.Parameter(draw(x_dim, dims[0]).to(dtype))
        self.tau = 0.7
        self.w = nn.ParameterList([nn.Parameter((0.4 * draw(d, x_dim)).to(dtype)) for d in dims])
        self.v = nn.ParameterList([nn.Parameter((0.3 + 0.3 * torch.sigmoid(draw(d))).to(dtype)) for d in dims])
        self.energies = [self._energy(d, draw, dtype) for d in dims]

    @staticmethod
    def _energy(d: int, draw: object, dtype: torch.dtype) -> QuadraticEnergy:
        m = draw(d, d)  # type: ignore[operator]
        return QuadraticEnergy((0.3 * m @ m.T / d + 0.2 * torch.eye(d)).to(dtype), (0.7 * draw(d)).to(dtype), 0.4)  # type: ignore[operator]

    def start(self, batch_size: int) -> Tensor:
        return self.out.new_zeros(batch_size, self.dims[-1])

    def conditional(self, state: Tensor, layer: int) -> Normal:
        if layer == self.layers:
            return Normal(state, torch.ones_like(state))
        loc = state @ self.a[layer - 1].T + self.b[layer - 1]
        return Normal(loc, self.s[layer - 1].expand_as(loc))

    def descend(self, state: Tensor, z: Tensor, layer: int) -> Tensor:
        return z

    def likelihood(self, state: Tensor) -> Independent:
        loc = state @ self.out.T
        return Independent(Normal(loc, torch.full_like(loc, self.tau)), 1)

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        latents, log_q = [], []
        for w, v in zip(self.w, self.v, strict=True):
            q = Normal(x @ w.T, v)
            z = q.loc + q.scale * torch.randn(q.loc.shape, generator=rng, dtype=x.dtype)
            latents.append(z)
            log_q.append(q.log_prob(z).sum(1))
        return Inferred(tuple(latents), torch.stack(log_q, 1))

    # ---------------------------------------------------------------- closed forms, float64, z stacked as (z_1, …, z_L)

    def blocks(self, layers: Sequence[int]) -> list[int]:
        """Indices of these layers in the stacked vector."""
        starts = np.concatenate([[0], np.cumsum(self.dims)])
        return [j for i in layers for j in range(starts[i - 1], starts[i])]

    def prior_form(self) -> tuple[Tensor, Tensor, float]:
        """(Λ, η, c) of log p_β(z) = −½ zᵀΛz + ηᵀz + c."""
        n = sum(self.dims)
        m, v = torch.eye(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
        for i in range(self.layers - 1):
            rows, cols = self.blocks([i + 1]), self.blocks([i + 2])
            inverse = torch.diag(1 / self.s[i].detach().double())
            m[np.ix_(rows, rows)] = inverse
            m[np.ix_(rows, cols)] = -inverse @ self.a[i].detach().double()
            v[rows] = inverse @ self.b[i].detach().double()
        constant = -0.5 * v @ v + torch.linalg.slogdet(m)[1] - 0.5 * n * math.log(2 * math.pi)
        return m.T @ m, m.T @ v, float(constant)

    def energy_form(self) -> tuple[Tensor, Tensor, float]:
        """(Q, h, c) of Σ f_i = −½ zᵀQz + hᵀz + c."""
        n = sum(self.dims)
        q, h, c = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64), 0.0
        for i in range(1, self.layers + 1):
            rows, f = self.blocks([i]), self.energies[i - 1]
            q[np.ix_(rows, rows)] = 0.5 * (f.q + f.q.T).detach().double()  # all that zᵀQz depends on
            h[rows] = f.h.detach().double()
            c += float(f.c.detach())
        return q, h, c

    def likelihood_form(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """(P, u, c) of log p(x | z) = −½ zᵀPz + uᵀz + c for one x."""
        n, rows, b = sum(self.dims), self.blocks([1]), self.out.detach().double()
        p, u = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
        p[np.ix_(rows, rows)] = b.T @ b / self.tau**2
        u[rows] = b.T @ x.double() / self.tau**2
        c = -0.5 * float(x.double() @ x.double()) / self.tau**2 - len(x) * (math.log(self.tau) + 0.5 * math.log(2 * math.pi))
        return p, u, c

    def tilted(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the joint prior, or of the posterior p(z | x)."""
        precision, eta, _ = self.prior_form()
        q, h, _ = self.energy_form()
        precision, eta = precision + q, eta + h
        if x is not None:
            p, u, _ = self.likelihood_form(x)
            precision, eta = precision + p, eta + u
        return torch.linalg.solve(precision, eta), torch.linalg.inv(precision)

    def log_z(self) -> float:
        """log Z = log E_{p_β}[exp Σ f_i]."""
        precision, eta, c = self.prior_form()
        q, h, fc = self.energy_form()
        precision, eta = precision + q, eta + h
        n = sum(self.dims)
        quadratic = 0.5 * eta @ torch.linalg.solve(precision, eta) - 0.5 * torch.linalg.slogdet(precision)[1]
        return float(quadratic) + c + fc + 0.5 * n * math.log(2 * math.pi)

    def conditional_moments(self, held: dict[int, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Of z_free | z_held: gain G and offset μ with mean = μ + G c, and covariance; c stacks the held values."""
        free = self.blocks([i for i in range(1, self.layers + 1) if i not in held])
        fixed = self.blocks(sorted(held))
        mean, covariance = self.tilted()
        precision = torch.linalg.inv(covariance)
        p_ff, p_fc = precision[np.ix_(free, free)], precision[np.ix_(free, fixed)]
        gain = -torch.linalg.solve(p_ff, p_fc)
        return mean[free] - gain @ mean[fixed], gain, torch.linalg.inv(p_ff)

    def log_joint(self, x: Tensor, k: int) -> float:
        """L^{>k}(x) in closed form."""
        n = sum(self.dims)
        mean, covariance = torch.zeros(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
        for i in range(1, self.layers + 1):
            rows = self.blocks([i])
            mean[rows] = self.w[i - 1].detach().double() @ x.double()
            covariance[np.ix_(rows, rows)] = torch.diag(self.v[i - 1].detach().double() ** 2)
        if k:
            free = self.blocks(range(1, k + 1))
            fixed = self.blocks(range(k + 1, self.layers + 1))
            offset, gain, cov_free = self.conditional_moments(dict.fromkeys(range(k + 1, self.layers + 1), x))
            mean[free] = offset + gain @ mean[fixed]
            covariance[np.ix_(free, free)] = gain @ covariance[np.ix_(fixed, fixed)] @ gain.T + cov_free
            cross = gain @ covariance[np.ix_(fixed, fixed)]
            covariance[np.ix_(free, fixed)], covariance[np.ix_(fixed, free)] = cross, cross.T
        total = 0.0
        for matrix, vector, constant in (self.prior_form(), self.energy_form(), self.likelihood_form(x)):
            second = covariance + torch.outer(mean, mean)
            total += float(-0.5 * (matrix * second).sum() + vector @ mean) + constant
        return total


class PairsLadder(LinearLadder):
    """The observations are the latents themselves, x = (z_1, z_2): posterior draws with a known distribution."""

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        """z = x, exactly."""
        latents = tuple(x.split(self.dims, dim=1))
        return Inferred(latents, x.new_zeros(len(x), self.layers))


class GaussianLadder(LinearLadder):
    """With q(z_2 | x) q(z_1 | z_2, x) of full covariance, which holds the exact posterior; it starts at that for f = 0."""

    def __init__(self, dims: Sequence[int], x_dim: int, seed: int) -> None:
        super().__init__(dims, x_dim=x_dim, seed=seed)
        mean, covariance = gaussian(self, tilted=False)
        d1, d2 = dims
        g2, l2, b2 = _conditional(mean, covariance, list(range(d1, d1 + d2)), list(range(d1 + d2, d1 + d2 + x_dim)))
        g1, l1, b1 = _conditional(mean, covariance, list(range(d1)), list(range(d1, d1 + d2 + x_dim)))
        self.q2 = nn.ParameterList([nn.Parameter(t) for t in (g2, l2, b2)])
        self.q1 = nn.ParameterList([nn.Parameter(t) for t in (g1, l1, b1)])

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        """A reparameterised draw, top-down."""
        z2, log_q2 = _draw(x, *self.q2)
        z1, log_q1 = _draw(torch.cat([z2, x], 1), *self.q1)
        return Inferred((z1, z2), torch.stack([log_q1, log_q2], 1))


def _draw(given: Tensor, gain: Tensor, root: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    noise = torch.randn(len(given), len(offset), dtype=given.dtype)
    lower = root.tril()
    log_q = -0.5 * (noise**2).sum(1) - lower.diagonal().abs().log().sum() - 0.5 * len(offset) * math.log(2 * math.pi)
    return given @ gain.T + offset + noise @ lower.T, log_q


def _conditional(mean: Tensor, covariance: Tensor, of: list[int], given: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Gain, lower Cholesky factor and offset of a Gaussian's conditional."""
    cross, inner = covariance[of][:, given], covariance[given][:, given]
    gain = torch.linalg.solve(inner, cross.T).T
    rest = covariance[of][:, of] - gain @ cross.T
    return gain, torch.linalg.cholesky(rest), mean[of] - gain @ mean[given]


def gaussian(ladder: LinearLadder, *, tilted: bool) -> tuple[Tensor, Tensor]:
    """Mean and covariance of (z, x) under the joint prior, or under the generator's own."""
    if tilted:
        mean, covariance = ladder.tilted()
    else:
        precision, eta, _ = ladder.prior_form()
        mean, covariance = torch.linalg.solve(precision, eta), torch.linalg.inv(precision)
    n, out = len(mean), ladder.out.detach().double()
    lift = torch.zeros(n + ladder.x_dim, n, dtype=torch.float64)
    lift[:n] = torch.eye(n, dtype=torch.float64)
    lift[n:, : ladder.dims[0]] = out
    noise = torch.zeros(n + ladder.x_dim, dtype=torch.float64)
    noise[n:] = ladder.tau**2
    return lift @ mean, lift @ covariance @ lift.T + torch.diag(noise)


def kl(p: tuple[Tensor, Tensor], q: tuple[Tensor, Tensor]) -> float:
    """KL(N_p ‖ N_q), nats; infinite where q is no density."""
    values = torch.linalg.eigvalsh(q[1])
    if not bool(torch.isfinite(values).all()) or float(values.min()) <= 0:
        return math.inf
    inverse, d = torch.linalg.inv(q[1]), q[0] - p[0]
    logs = torch.logdet(q[1]) - torch.logdet(p[1])
    return 0.5 * float((inverse @ p[1]).trace() + d @ inverse @ d - len(d) + logs)


class WildEnergy(nn.Module):
    """A non-quadratic, asymmetric f(z) = a tanh(z) + b cos(2z) − c z² of one dimension."""

    def __init__(self, a: float, b: float, c: float) -> None:
        super().__init__()
        self.abc = (a, b, c)

    def forward(self, z: Tensor) -> Tensor:
        a, b, c = self.abc
        return (a * torch.tanh(z) + b * torch.cos(2 * z) - c * z**2).sum(1)


class ScaleLadder(nn.Module):
    """z_2 ~ N(0, 1), z_1 | z_2 ~ N(a z_2, e^{2 b z_2}), x | z_1 ~ N(z_1, 1): the noise-space Jacobian varies with z_2."""

    latent_shapes = (torch.Size((1,)), torch.Size((1,)))

    def __init__(self, a: float = 0.8, b: float = 0.7) -> None:
        super().__init__()
        self.slope, self.spread = a, b
        self.dummy = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.energies = [WildEnergy(1.2, 0.6, 0.05), WildEnergy(-0.9, 0.5, 0.0)]

    def start(self, batch_size: int) -> Tensor:
        return self.dummy.new_zeros(batch_size, 1)

    def conditional(self, state: Tensor, layer: int) -> Normal:
        if layer == 2:
            return Normal(state, torch.ones_like(state))
        return Normal(self.slope * state, torch.exp(self.spread * state))

    def descend(self, state: Tensor, z: Tensor, layer: int) -> Tensor:
        return z

    def likelihood(self, state: Tensor) -> Independent:
        return Independent(Normal(state, torch.ones_like(state)), 1)

    def moments(self, held: dict[int, float] | None = None, x: float | None = None) -> Tensor:
        """E[z_1], E[z_2], E[z_1²], E[z_2²], E[z_1 z_2] of the joint prior or posterior by quadrature on a grid of ε."""
        held = held or {}
        grid = torch.linspace(-7, 7, 1401, dtype=torch.float64)
        e1, e2 = torch.meshgrid(grid, grid, indexing="ij")
        z2 = torch.full_like(e2, held[2]) if 2 in held else e2
        scale = torch.exp(self.spread * z2)
        z1 = torch.full_like(e1, held[1]) if 1 in held else self.slope * z2 + scale * e1
        log_weight = -0.5 * (e1**2 + e2**2)
        for layer, z in ((1, z1), (2, z2)):
            if layer not in held:
                log_weight = log_weight + self.energies[layer - 1](z.reshape(-1, 1)).reshape(z.shape)
        if 1 in held and 2 not in held:
            log_weight = log_weight + Normal(self.slope * z2, scale).log_prob(z1)
        if x is not None:
            log_weight = log_weight - 0.5 * (x - z1) ** 2
        weight = torch.softmax(log_weight.flatten(), 0).reshape(z1.shape)
        return torch.stack([(weight * t).sum() for t in (z1, z2, z1**2, z2**2, z1 * z2)])
