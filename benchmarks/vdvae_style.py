"""A model of our own with VDVAE's interface, blocks and sizes, which goes through `VDVAEAdapter`."""

from __future__ import annotations

__all__ = ["VDVAEStyle"]

from collections.abc import Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CIFAR10 = (
    (1, 1, None),
    (4, 1, 1),
    (4, 2, None),
    (8, 1, 4),
    (8, 5, None),
    (16, 1, 8),
    (16, 10, None),
    (32, 1, 16),
    (32, 21, None),
)
"""Blocks of its decoder for CIFAR-10: resolution, how many, and the resolution that the first mixes in; 43 in all."""
_ENCODER = ((32, 11), (16, 6), (8, 6), (4, 3), (1, 3))
_LATENTS, _MIXTURES = 16, 10


class VDVAEStyle(nn.Module):
    """A VDVAE for colour images of 32 × 32, under VDVAE's names.

    Args:
        width: of the features; the blocks' inner width is a quarter.
        blocks: of the decoder, as `CIFAR10` has them.
    """

    def __init__(self, width: int = 384, blocks: Sequence[tuple[int, int, int | None]] = CIFAR10) -> None:
        super().__init__()
        self.H = SimpleNamespace(dataset="cifar10", image_size=32, image_channels=3)
        self.encoder, self.decoder = _Encoder(width), _Decoder(width, blocks)


class _Bottleneck(nn.Module):
    """1 × 1 to an inner width, twice 3 × 3 (1 × 1 at small resolutions), 1 × 1 back; a GELU before each."""

    def __init__(self, source: int, inner: int, target: int, resolution: int, residual: bool) -> None:
        super().__init__()
        size = 3 if resolution > 2 else 1
        middle = (nn.Conv2d(inner, inner, size, padding=size // 2) for _ in range(2))
        convolutions = (nn.Conv2d(source, inner, 1), *middle, nn.Conv2d(inner, target, 1))
        self.net = nn.Sequential(*(part for c in convolutions for part in (nn.GELU(), c)))
        self.residual = residual

    def forward(self, features: Tensor) -> Tensor:
        h = self.net(features)
        return features + 0.1 * h if self.residual else h


class _Encoder(nn.Module):
    """Images with channels last -> features by resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(*(_Bottleneck(width, width // 4, width, resolution, True) for _ in range(count)))
            for resolution, count in _ENCODER
        )

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        features, found = self.enter(x.permute(0, 3, 1, 2)), {}
        for (resolution, _), stage in zip(_ENCODER, self.stages, strict=True):
            features = stage(F.avg_pool2d(features, features.shape[2] // resolution))
            found[resolution] = features
        return found


class _Block(nn.Module):
    """A block of the decoder at resolution `base`, features of `mixin` mixed in."""

    def __init__(self, width: int, base: int, mixin: int | None) -> None:
        super().__init__()
        self.base, self.mixin, self.zdim, self.widths = base, mixin, _LATENTS, {base: width}
        self.enc = _Bottleneck(2 * width, width // 4, 2 * _LATENTS, base, False)
        self.prior = _Bottleneck(width, width // 4, 2 * _LATENTS + width, base, False)
        self.z_proj, self.resnet = nn.Conv2d(_LATENTS, width, 1), _Bottleneck(width, width // 4, width, base, True)


class _Decoder(nn.Module):
    """Blocks, learned features, and what makes the image's parameters (channels last)."""

    def __init__(self, width: int, blocks: Sequence[tuple[int, int, int | None]]) -> None:
        super().__init__()
        each = [(base, mixin) for base, count, mixin in blocks for _ in range(count)]
        self.dec_blocks = nn.ModuleList(_Block(width, *block) for block in each)
        self.bias_xs = nn.ParameterList(
            nn.Parameter(torch.zeros(1, width, n, n)) for n in sorted({b for b, _ in each}) if n <= 8
        )
        self.gain = nn.Parameter(torch.ones(1, width, 1, 1))
        self.out_net = nn.Sequential(nn.Conv2d(width, 10 * _MIXTURES, 1), _ChannelsLast())

    def final_fn(self, features: Tensor) -> Tensor:
        """The features that the image's parameters are made of."""
        return features * self.gain


class _ChannelsLast(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features.permute(0, 2, 3, 1)
