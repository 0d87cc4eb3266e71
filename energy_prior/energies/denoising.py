"""Energies of deep layers: f(ε, t) along waymarks between the posterior's noise, t = 0, and the prior's, t = 1."""

from __future__ import annotations

__all__ = ["LAST_LEVEL", "DenoisingEnergy", "angle", "waymark"]

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from energy_prior._util import resized
from energy_prior.checks.settings import check_count, check_positive, check_shape
from energy_prior.energies.base import Energy
from energy_prior.energies.quadratic import Quadratic
from energy_prior.errors import ArgumentError

LAST_LEVEL = 0.995
"""Where training and sampling begin: at t = 1 itself the posterior's noise has no share."""

_FIRST_ANGLE = math.asin(0.15)
_FREQUENCIES = 16
_NORM_GROUPS = 8
_SMALLEST_MAP = 4


Level = TypeVar("Level", float, Tensor)


def angle(level: Level) -> Level:
    """θ of the waymark at t, in [0, π/2].

    Args:
        level: t in [0, 1]; a tensor may have any shape.

    Examples:
        >>> round(angle(0.0), 4), round(angle(1.0), 4)
        (0.1506, 1.5708)
    """
    return _FIRST_ANGLE + (math.pi / 2 - _FIRST_ANGLE) * level


def waymark(level: Tensor) -> tuple[Tensor, Tensor]:
    """α = cos θ and σ = sin θ of ε_t = α ε_q + σ n, n ~ N(0, I); θ from arcsin 0.15 at t = 0 evenly to π/2 at t = 1.

    At t = 0 the little noise that there is leaves a density that a network can follow; its 2 % of the variance hardly show.

    Args:
        level: t in [0, 1], (batch,), or a tensor of any other shape.

    Returns:
        α and σ, each in [0, 1] and of the shape of `level`, (batch,).

    Examples:
        >>> waymark(torch.tensor([0.0, 0.5]))
        (tensor([0.9887, 0.6519]), tensor([0.1500, 0.7583]))
    """
    theta = angle(level)
    return theta.cos(), theta.sin()


class DenoisingEnergy(Energy):
    """The energy of a layer of many units, which sees the noise ε_i of its layer and of those above, and the waymark t.

        f_i(ε_i, …, ε_L; t) = log N(ε_i; α m, α² C + σ² I) − log N(ε_i; 0, I) + h/√(1 + (h/s)²),
        h = (α/σ) ⟨ε_i, net(ε_i, …, ε_L, t)⟩

    The first part is closed: `fit` sets it from the posterior's noise. The second is learned, by
    `fit(method="denoising")`: Σ_i f_i(·; t) is the log ratio of the density of ε_t = α ε_q + σ n to N(0, I), so that the sum of
    the ratios between neighbouring waymarks is the ratio of the posterior's noise to the prior's (telescoping, Rhodes, Xu and
    Gutmann, NeurIPS 2020). At t = 1 it is 0.

    With ε_i = (z_i − μ_i(z_{>i}))/σ_i(z_{>i}) it is a function of z_i and of the layers above: f_i(z_i | z_{>i}), where the
    plain form has f_i(z_i). Layers depend on each other through it, and a chain in noise space never runs the generator.

    Args:
        latent_shape: shape of z_i without the batch.
        above: latent shapes of the layers above, z_{i+1}, …, z_L.
        channels: width of the network: its channels at the full size of a map, twice as many below, or its units/4 for vectors.
        saturation: s per unit of the layer, nats, > 0; the attribute is that of the whole layer.

    Raises:
        ArgumentError, ShapeError: if a setting is impossible, or it is called with other things than the noise of its layers.

    Shape: (ε_i, …, ε_L), (batch, *shape) each, and t, (batch,), () or None for 0 -> (batch,), nats.

    Examples:
        >>> f_1 = DenoisingEnergy((2, 4, 4), above=[(3,)], channels=8)
        >>> noise = torch.randn(5, 2, 4, 4), torch.randn(5, 3)  # ε_1, ε_2
        >>> f_1(noise, torch.tensor(0.5)).shape
        torch.Size([5])
    """

    reads_noise = True
    has_waymarks = True
    bounded: bool = False
    draws: int = 16_384

    def __init__(
        self,
        latent_shape: Sequence[int],
        above: Sequence[Sequence[int]] = (),
        channels: int = 32,
        saturation: float = 4.0,
    ) -> None:
        shape = check_shape("latent_shape", latent_shape)
        per_unit = check_positive("saturation", saturation)
        super().__init__(shape, per_unit * math.prod(shape))
        channels, shapes = check_count("channels", channels), [check_shape("above", s) for s in above]
        self.config: dict[str, Any] = {"above": [list(s) for s in shapes], "channels": channels, "saturation": per_unit}
        self.quadratic: Quadratic = Quadratic(shape)
        net = _MapNet if len(shape) == 3 and min(shape[1:]) > 1 else _VectorNet
        self.net: nn.Module = net(shape, shapes, channels)
        self._reads = 1 + len(shapes)

    def forward(self, noise: Sequence[Tensor], /, level: Tensor | None = None) -> Tensor:
        """f_i, (batch,), nats.

        Args:
            noise: (ε_i, …, ε_L), of its layer and of those above, (batch, *shape) each.
            level: waymark t in [0, 1], (batch,), or () for all rows; None: 0.
        """
        if isinstance(noise, Tensor) or len(noise) != self._reads:
            got = "one tensor" if isinstance(noise, Tensor) else f"{len(noise)}"
            raise ArgumentError(
                f"noise: expected the noise of {self._reads} layers, (ε_i, …, ε_L), got {got}. For latents, call "
                "prior.negative_energy(latents)."
            )
        own = noise[0]
        level = own.new_zeros(len(own)) if level is None else level.expand(len(own))
        alpha, sigma = waymark(level)
        g = (own * self.net(noise, level)).flatten(1).sum(1)
        return self.quadratic(own, alpha) + self._bounded(alpha / sigma * g)

    def _set_from(self, posterior: Sequence[Tensor], prior: Sequence[Tensor]) -> None:
        """Sets the closed part from the posterior's ε_i."""
        self.quadratic.set_moments(torch.cat([*posterior]))


class _MapNet(nn.Module):
    """Residual blocks at the full size, one half, … and back, over the maps of all its layers, as in a U-Net."""

    def __init__(self, shape: Sequence[int], above: Sequence[Sequence[int]], width: int) -> None:
        super().__init__()
        maps = [s for s in (shape, *above) if len(s) == 3]
        self._map = [len(s) == 3 for s in (shape, *above)]
        vectors = sum(math.prod(s) for s in above if len(s) != 3)
        self._size = (int(shape[1]), int(shape[2]))
        embedded = 4 * width
        self.embed = _Embedding(embedded, vectors)
        self.enter = nn.Conv2d(sum(s[0] for s in maps), width, 3, padding=1)
        sizes = [self._size]
        while min(sizes[-1]) >= 2 * _SMALLEST_MAP - 1 and len(sizes) < 3:
            sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
        widths = [width * min(2**n, 2) for n in range(len(sizes))]
        self.down_blocks = nn.ModuleList(_Block(w, embedded) for w in widths)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, 2, padding=1) for a, b in zip(widths, widths[1:]))
        self.whole = _Whole(widths[-1], sizes[-1])
        self.up = nn.ModuleList(nn.Conv2d(b, a, 3, padding=1) for a, b in zip(widths, widths[1:]))
        self.up_blocks = nn.ModuleList(_Block(w, embedded) for w in widths)
        self.out = _zero(nn.Conv2d(width, shape[0], 3, padding=1))

    def forward(self, noise: Sequence[Tensor], level: Tensor) -> Tensor:
        maps = [resized(e, self._size) for e, is_map in zip(noise, self._map) if is_map]
        rest = [e.flatten(1) for e, is_map in zip(noise, self._map) if not is_map]
        embedded = self.embed(level, rest)
        h, kept = self.enter(torch.cat(maps, 1)), []
        for block, down in zip(self.down_blocks, [*self.down, None]):
            h = block(h, embedded)
            if down is not None:
                kept.append(h)
                h = down(h)
        h = self.up_blocks[-1](self.whole(h), embedded)
        for block, up in zip([*self.up_blocks][-2::-1], [*self.up][::-1]):
            skip = kept.pop()
            h = block(skip + up(resized(h, (skip.shape[2], skip.shape[3]))), embedded)
        return self.out(F.silu(h))


class _VectorNet(nn.Module):
    """Residual blocks over the units of all its layers."""

    def __init__(self, shape: Sequence[int], above: Sequence[Sequence[int]], width: int) -> None:
        super().__init__()
        width = 4 * width
        self._shape = tuple(shape)
        self.embed = _Embedding(width)
        self.enter = nn.Linear(sum(math.prod(s) for s in (shape, *above)), width)
        self.blocks = nn.ModuleList(_Block(width, width, maps=False) for _ in range(3))
        self.out = _zero(nn.Linear(width, math.prod(shape)))

    def forward(self, noise: Sequence[Tensor], level: Tensor) -> Tensor:
        embedded = self.embed(level, ())
        h = self.enter(torch.cat([e.flatten(1) for e in noise], 1))
        for block in self.blocks:
            h = block(h, embedded)
        return self.out(F.silu(h)).reshape(-1, *self._shape)


class _Embedding(nn.Module):
    """Of the waymark, in sines, and of layers that are vectors beside maps."""

    frequencies: Tensor

    def __init__(self, width: int, vectors: int = 0) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.linspace(0.0, math.log(200.0), _FREQUENCIES)), persistent=False)
        self.net = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.vectors = nn.Linear(vectors, width) if vectors else None

    def forward(self, level: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        angles = level[:, None] * self.frequencies
        embedded = self.net(torch.cat([angles.sin(), angles.cos()], 1))
        return embedded if self.vectors is None else embedded + self.vectors(torch.cat([*vectors], 1))


class _Block(nn.Module):
    """h + g(h; embedding), where g is 0 at first."""

    def __init__(self, width: int, embedded: int, maps: bool = True) -> None:
        super().__init__()

        def layer() -> nn.Module:
            return nn.Conv2d(width, width, 3, padding=1) if maps else nn.Linear(width, width)

        groups = math.gcd(width, _NORM_GROUPS)
        self.first_norm, self.first = nn.GroupNorm(groups, width), layer()
        self.second_norm, self.second = nn.GroupNorm(groups, width), _zero(layer())
        self.modulate = _zero(nn.Linear(embedded, 2 * width))

    def forward(self, h: Tensor, embedded: Tensor) -> Tensor:
        scale, shift = self.modulate(embedded).reshape(len(h), -1, *[1] * (h.ndim - 2)).chunk(2, 1)
        g = self.second_norm(self.first(F.silu(self.first_norm(h))))
        return h + self.second(F.silu(g * (1 + scale) + shift))


class _Whole(nn.Module):
    """h + a fully connected net of all of a small map: what every place knows of every other one."""

    def __init__(self, width: int, size: Sequence[int]) -> None:
        super().__init__()
        units = width * math.prod(size)
        self.first, self.second = nn.Linear(units, 2 * width), _zero(nn.Linear(2 * width, units))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.second(F.silu(self.first(h.flatten(1)))).reshape(h.shape)


def _zero(layer: nn.Module) -> nn.Module:
    """A layer that gives 0 at first."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
