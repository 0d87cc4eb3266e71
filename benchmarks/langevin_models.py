"""The models of the Langevin benchmark: the published two-layer setting, a deep convolutional ladder, a stiff linear ladder."""

from __future__ import annotations

__all__ = ["DeepConv", "Published", "StiffLadder", "weights_of"]

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from energy_prior import Inferred


def _leaky_mlp(*widths: int, flat: bool = False) -> nn.Sequential:
    """Linear layers with LeakyReLU 0.2 between them; `flat`: (batch,) comes out."""
    layers: list[nn.Module] = []
    for a, b in zip(widths[:-2], widths[1:-1], strict=True):
        layers += [nn.Linear(a, b), nn.LeakyReLU(0.2)]
    layers.append(nn.Linear(widths[-2], widths[-1]))
    return nn.Sequential(*layers, nn.Flatten(0)) if flat else nn.Sequential(*layers)


def weights_of(*nets: nn.Module) -> list[Tensor]:
    """The matrices of all linear layers."""
    return [m.weight.detach() for net in nets for m in net.modules() if isinstance(m, nn.Linear)]


class Published(nn.Module):
    """L = 2 as in Cui, Wu and Han (CVPR 2023): z_1 of 128, z_2 of 100, prior net 200 wide × 4; x | z_1 is a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.latent_shapes = (torch.Size((128,)), torch.Size((100,)))
        self.prior = _leaky_mlp(100, 200, 200, 200, 200, 256)
        self.decoder = nn.Linear(128, 32)
        self.encoder = nn.Linear(32, 456)

    @staticmethod
    def energies() -> list[nn.Sequential]:
        """200 wide × 3 and 100 wide × 2, with a spread of a few nats."""
        nets = [_leaky_mlp(128, 200, 200, 200, 1, flat=True), _leaky_mlp(100, 100, 100, 1, flat=True)]
        for net in nets:
            nn.init.normal_(net[-2].weight, std=1.0)  # type: ignore[arg-type]
        return nets

    def start(self, batch_size: int) -> Tensor:
        """Above z_2."""
        return self.decoder.weight.new_zeros(batch_size, 100)

    def conditional(self, state: Tensor, layer: int) -> Normal:
        """p(z_2), or p(z_1 | z_2)."""
        if layer == 2:
            return Normal(state, torch.ones_like(state), validate_args=False)
        loc, log_scale = self.prior(state).chunk(2, 1)
        return Normal(loc, log_scale.exp(), validate_args=False)

    def descend(self, state: Tensor, z: Tensor, layer: int) -> Tensor:
        """The state is the last z."""
        return z

    def likelihood(self, state: Tensor) -> Independent:
        """N(W z_1, 0.3²)."""
        return Independent(Normal(self.decoder(state), 0.3, validate_args=False), 1, validate_args=False)

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        """A reparameterised draw."""
        loc1, scale1, loc2, scale2 = self.encoder(x).split([128, 128, 100, 100], 1)
        latents, log_q = [], []
        for loc, scale in ((loc1, scale1), (loc2, scale2)):
            q = Normal(loc, scale.exp(), validate_args=False)
            latents.append(loc + q.scale * torch.randn(loc.shape, generator=rng, dtype=loc.dtype, device=loc.device))
            log_q.append(q.log_prob(latents[-1]).sum(1))
        return Inferred(tuple(latents), torch.stack(log_q, 1))


class DeepConv(nn.Module):
    """Eight layers of latents for 32×32 images, four of 4×8×8 above four of 4×16×16, and a decoder tower at 32×32.

    A running feature map goes down; p(z_i | z_{>i}) is a convolution of it, and a residual cell takes z_i in.
    """

    def __init__(self, width: int = 32, channels: int = 4) -> None:
        super().__init__()
        sizes = [16] * 4 + [8] * 4
        self.latent_shapes = tuple(torch.Size((channels, s, s)) for s in sizes)
        self.top = nn.Parameter(torch.randn(1, width, 8, 8))
        self.parameters_of = nn.ModuleList(nn.Conv2d(width, 2 * channels, 3, padding=1) for _ in sizes)
        self.cells = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width + channels, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in sizes
        )
        self.tower = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, 3, 3, padding=1),
        )  # fmt: skip

    def start(self, batch_size: int) -> Tensor:
        """The learned map above z_8."""
        return self.top.expand(batch_size, -1, -1, -1)

    def conditional(self, state: Tensor, layer: int) -> Normal:
        """p(z_i | z_{>i})."""
        loc, log_scale = self.parameters_of[layer - 1](state).chunk(2, 1)
        return Normal(loc, torch.exp(torch.tanh(log_scale)), validate_args=False)

    def descend(self, state: Tensor, z: Tensor, layer: int) -> Tensor:
        """A residual cell; twice as large below z_5."""
        h = state + self.cells[layer - 1](torch.cat([state, z], 1))
        return nn.functional.interpolate(h, scale_factor=2.0) if layer == 5 else h

    def likelihood(self, state: Tensor) -> Independent:
        """The image tower runs here."""
        mean = torch.sigmoid(self.tower(nn.functional.interpolate(state, scale_factor=2.0)))
        return Independent(Normal(mean, 0.1, validate_args=False), 3, validate_args=False)


class StiffLadder(nn.Module):
    """z_3 ~ N(0, I), z_2 | z_3 ~ N(A z_3, 0.1²), z_1 | z_2 ~ N(B z_2, 0.01²), of four dimensions each, x | z_1 ~ N(z_1, 0.1²).

    With the energies `Tilt` the joint prior is Gaussian: `tilted` has its moments in noise coordinates.
    """

    SIGMAS = (0.01, 0.1, 1.0)
    DIM = 4

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.latent_shapes = (torch.Size((self.DIM,)),) * 3
        self.maps = nn.ParameterList(nn.Parameter(torch.randn(self.DIM, self.DIM, generator=g) / 2) for _ in range(2))
        self.energies = [Tilt(torch.randn(self.DIM, generator=g), curvature) for curvature in (1.0, 0.5, 0.5)]

    def start(self, batch_size: int) -> Tensor:
        """Above z_3."""
        return self.maps[0].new_zeros(batch_size, self.DIM)

    def conditional(self, state: Tensor, layer: int) -> Normal:
        """N(μ_i, σ_i²); the state is μ_i."""
        return Normal(state, torch.full_like(state, self.SIGMAS[layer - 1]), validate_args=False)

    def descend(self, state: Tensor, z: Tensor, layer: int) -> Tensor:
        """A linear map."""
        return z if layer == 1 else z @ self.maps[layer - 2].T

    def likelihood(self, state: Tensor) -> Independent:
        """N(z_1, 0.1²)."""
        return Independent(Normal(state, 0.1, validate_args=False), 1, validate_args=False)

    def tilted(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of ε = (ε_1, ε_2, ε_3) under the joint prior."""
        d, (b, a) = self.DIM, (m.detach() for m in self.maps)
        t = torch.zeros(3 * d, 3 * d)
        for row in range(3):
            t[row * d : (row + 1) * d, row * d : (row + 1) * d] = self.SIGMAS[row] * torch.eye(d)
        t[d : 2 * d, 2 * d :] = a
        t[:d, d : 2 * d], t[:d, 2 * d :] = self.SIGMAS[1] * b, b @ a
        curvature = torch.cat([torch.full((d,), f.curvature) for f in self.energies])
        slope = torch.cat([f.slope for f in self.energies])
        covariance = torch.linalg.inv(torch.eye(3 * d) + t.T @ (curvature[:, None] * t))
        return covariance @ t.T @ slope, covariance


class Tilt(nn.Module):
    """f(z) = hᵀ z − ½ κ ‖z‖²."""

    slope: Tensor

    def __init__(self, slope: Tensor, curvature: float) -> None:
        super().__init__()
        self.register_buffer("slope", slope)
        self.curvature = curvature

    def forward(self, z: Tensor) -> Tensor:
        """(batch, d) -> (batch,)."""
        return z @ self.slope - 0.5 * self.curvature * z.square().sum(1)
