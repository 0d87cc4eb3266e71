"""A model of our own with NVAE's interface and cells, which goes through `NVAEAdapter`."""

from __future__ import annotations

__all__ = ["NVAEStyle"]

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MIXTURES = 10


class NVAEStyle(nn.Module):
    """An NVAE for colour images, two scales of latents, under NVAE's names; residual posteriors, no flows.

    Args:
        groups: groups of latents at each scale, ≥ 1.
        channels: of the features at the image's size; doubled with every halving.
        latents: channels of every z_i.
        blocks: halvings between the image and the finer scale of latents.
        cells: cells of the image towers per resolution.
        side: height and width of an image, a multiple of 2^(blocks + 1).
    """

    res_dist, vanilla_vae, crop_output, num_flows = True, False, False, 0

    def __init__(
        self, groups: int, channels: int = 32, latents: int = 20, blocks: int = 2, cells: int = 3, side: int = 32
    ) -> None:
        super().__init__()
        self.input_size = side
        self.stem = Conv(3, channels, 3, padding=1)
        self.pre_process, self.enc_tower, self.enc_sampler = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.dec_tower, self.dec_sampler, self.post_process, self.nf_cells = (nn.ModuleList() for _ in range(4))
        width = channels
        for cell in range(blocks * cells):
            down = cell % cells == cells - 1
            self.pre_process.append(EncoderCell(width, 2 * width if down else width, "down_pre" if down else "normal_pre"))
            width *= 2 if down else 1
        for group in range(2 * groups):  # from z_1 to z_L
            if group == groups:
                self.enc_tower.append(EncoderCell(width, 2 * width, "down_enc"))
                width *= 2
            self.enc_tower.append(EncoderCell(width, width, "normal_enc"))
            if group < 2 * groups - 1:
                self.enc_tower.append(EncoderCombiner(width))
        self.enc0 = nn.Sequential(nn.ELU(), Conv(width, width, 1), nn.ELU())
        coarse = side // 2 ** (blocks + 1)
        self.z0_size = [latents, coarse, coarse]
        self.prior_ftr0 = nn.Parameter(torch.randn(width, coarse, coarse))
        for group in range(2 * groups):  # from z_L to z_1
            if group == groups:
                self.dec_tower.append(Cell(width, width // 2, "up_dec"))
                width //= 2
            self.enc_sampler.append(Conv(width, 2 * latents, 3, padding=1))
            if group:
                self.dec_tower.append(Cell(width, width, "normal_dec"))
                self.dec_sampler.append(nn.Sequential(nn.ELU(), Conv(width, 2 * latents, 1)))
            self.dec_tower.append(Combiner(width, latents))
        for cell in range(blocks * cells):
            up = cell % cells == 0
            self.post_process.append(Cell(width, width // 2 if up else width, "up_post" if up else "normal_post"))
            width = width // 2 if up else width
        self.image_conditional = nn.Sequential(nn.ELU(), Conv(width, 10 * _MIXTURES, 3, padding=1))

    def decoder_output(self, parameters: Tensor) -> Any:
        """The mixture of these parameters."""
        logits, rest = parameters[:, :_MIXTURES], parameters[:, _MIXTURES:].unflatten(1, (3, 3 * _MIXTURES))
        means, log_scales, coefficients = rest.chunk(3, dim=2)
        return DiscMixLogistic(logits, means, log_scales.clamp(min=-7), torch.tanh(coefficients))


class DiscMixLogistic(NamedTuple):
    """Parameters of ten discretised logistics, under NVAE's name."""

    logit_probs: Tensor
    means: Tensor
    log_scales: Tensor
    coeffs: Tensor
    max_val: float = 255.0


class Conv(nn.Conv2d):
    """As NVAE's: it normalises its weights in every call."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.log_weight_norm = nn.Parameter(self.weight.square().sum((1, 2, 3), keepdim=True).sqrt().log())

    def normalize_weight(self) -> Tensor:
        """The weights that it convolves with."""
        return self.log_weight_norm.exp() * self.weight / self.weight.square().sum((1, 2, 3), keepdim=True).sqrt()

    def forward(self, input: Tensor) -> Tensor:
        """The convolution."""
        return F.conv2d(input, self.normalize_weight(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class Cell(nn.Module):
    """A cell of NVAE's decoder: 1 × 1 to a larger width, 5 × 5 per channel, 1 × 1 back, norms, squeeze and excite.

    Between groups the width is six times as large, in the image tower three times, as in NVAE.
    """

    def __init__(self, source: int, target: int, cell_type: str) -> None:
        super().__init__()
        self.cell_type, wide = cell_type, (3 if "post" in cell_type else 6) * source
        self.skip = Conv(source, target, 1) if "up" in cell_type else nn.Identity()
        self.norms = nn.ModuleList(_norm(n) for n in (source, wide, wide, target))
        self.expand, self.shrink = Conv(source, wide, 1, bias=False), Conv(wide, target, 1, bias=False)
        self.depthwise = Conv(wide, wide, 5, padding=2, groups=wide, bias=False)
        self.gate = SqueezeExcite(target)

    def forward(self, features: Tensor) -> Tensor:
        """Features, at twice the resolution where it goes up."""
        if "up" in self.cell_type:
            features = F.interpolate(features, scale_factor=2)
        h = F.silu(self.norms[1](self.expand(self.norms[0](features))))
        h = self.norms[3](self.shrink(F.silu(self.norms[2](self.depthwise(h)))))
        return self.skip(features) + 0.1 * self.gate(h)


class EncoderCell(nn.Module):
    """A cell of NVAE's encoder: twice norm, swish and 3 × 3, then squeeze and excite."""

    def __init__(self, source: int, target: int, cell_type: str) -> None:
        super().__init__()
        self.cell_type, stride = cell_type, 2 if "down" in cell_type else 1
        self.skip = Conv(source, target, 1, stride=2) if stride == 2 else nn.Identity()
        self.norms = nn.ModuleList((_norm(source), _norm(target)))
        self.first, self.second = Conv(source, target, 3, stride, padding=1), Conv(target, target, 3, padding=1)
        self.gate = SqueezeExcite(target)

    def forward(self, features: Tensor) -> Tensor:
        """Features, at half the resolution where it goes down."""
        h = self.second(F.silu(self.norms[1](self.first(F.silu(self.norms[0](features))))))
        return self.skip(features) + 0.1 * self.gate(h)


class SqueezeExcite(nn.Module):
    """Channels scaled by a small net of their means."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = max(width // 16, 4)
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.Sigmoid())

    def forward(self, features: Tensor) -> Tensor:
        """The same shape."""
        return features * self.net(features.mean((2, 3)))[:, :, None, None]


class Combiner(nn.Module):
    """Where a group's z enters the features."""

    cell_type = "combiner_dec"

    def __init__(self, width: int, latents: int) -> None:
        super().__init__()
        self.conv = Conv(width + latents, width, 1)

    def forward(self, features: Tensor, z: Tensor) -> Tensor:
        """Features with z in them."""
        return self.conv(torch.cat([features, z], 1))


class EncoderCombiner(nn.Module):
    """Where the decoder's features meet the encoder's, for a posterior."""

    cell_type = "combiner_enc"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv(width, width, 1)

    def forward(self, encoded: Tensor, features: Tensor) -> Tensor:
        """Features of both."""
        return encoded + self.conv(features)


def _norm(width: int) -> nn.Module:
    return nn.BatchNorm2d(width, momentum=0.05)
