"""Small models of our own with the interface of duanzhiihao/lossy-vae: what the adapter calls, and their own passes.

Written against that interface, not from its code. They have the traps of the original: uniform noise in training mode and
rounding in evaluation mode, log σ in one model and σ in the other, features found by their height in one and by a name in the
other, a check of the input that refuses gradients, samples that are clamped, a λ of the default dtype in a batch of one, and
empty tables of an entropy coder in the state.
"""

from __future__ import annotations

__all__ = ["HierarchicalVAE", "Ran", "VariableRateLossyVAE", "varied"]

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from stand_ins import perturbed
from torch import Tensor, nn

WIDTH, STRIDE = 6, 4


class Ran(NamedTuple):
    """What a pass gives: z, μ and σ of p, μ of q and −log p(z) of every layer, from the top, and what the decoder makes."""

    z: list[Tensor]
    loc: list[Tensor]
    scale: list[Tensor]
    q_loc: list[Tensor]
    kl: list[Tensor]
    output: Tensor


def minus_log_mass(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """In the lower tail, where the difference keeps its digits."""
    upper, lower = (torch.erfc(((z - loc).abs() + side) / (scale * math.sqrt(2))) / 2 for side in (-0.5, 0.5))
    return -(upper - lower).log()


class Tables(nn.Module):
    """Of an entropy coder, empty until they are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_quantized_cdf", torch.zeros(0, dtype=torch.int32))

    def forward(self, z: Tensor, scales: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
        z = (z - means).round() + means
        return z, (-minus_log_mass(z, means, scales.clamp(min=0.11))).exp().clamp(min=1e-9)


class Cell(nn.Module):
    """A residual cell, which takes the embedding of λ if it is made with one."""

    def __init__(self, embedded: bool = False) -> None:
        super().__init__()
        self.conv, self.shift = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.Linear(4, WIDTH) if embedded else None
        self.requires_embedding = embedded

    def forward(self, h: Tensor, emb: Tensor | None = None) -> Tensor:
        shift = 0.0 if self.shift is None or emb is None else self.shift(emb)[..., None, None]
        return h + torch.tanh(self.conv(h) + shift)


class Latent(nn.Module):
    """What both kinds of block have."""

    def __init__(self, units: int, embedded: bool, source: int) -> None:
        super().__init__()
        self.in_channels = WIDTH
        self.resnet_front, self.resnet_end = Cell(embedded), Cell(embedded)
        self.prior, self.posterior = nn.Conv2d(WIDTH, 2 * units, 1), nn.Conv2d(source, units, 1)
        self.z_proj = nn.Conv2d(units, WIDTH, 1)
        self.discrete_gaussian = Tables()

    def drawn(self, loc: Tensor, scale: Tensor, q_loc: Tensor | None, given: Tensor | None) -> tuple[Tensor, Tensor]:
        """z and −log p(z): of the prior without `q_loc`; rounded in evaluation mode."""
        if given is not None:
            return given, minus_log_mass(given, loc, scale)
        if q_loc is None:
            z = loc + scale * torch.randn_like(loc) + torch.empty_like(loc).uniform_(-0.5, 0.5)
        elif self.training:
            z = q_loc + torch.empty_like(q_loc).uniform_(-0.5, 0.5)
        else:
            z, probability = self.discrete_gaussian(q_loc, scales=scale, means=loc)
            return z, -probability.log()
        return z, minus_log_mass(z, loc, scale)


class FixedBlock(Latent):
    """Of QRes-VAE: the posterior sees features beside those of the encoder, and the prior gives log σ."""

    def __init__(self, units: int) -> None:
        super().__init__(units, False, 2 * WIDTH)

    def transform_prior(self, feature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        feature = self.resnet_front(feature)
        loc, log_scale = self.prior(feature).chunk(2, 1)
        return feature, loc, F.softplus(log_scale + 2.3) - 2.3

    def run(self, h: Tensor, emb: None, found: Any, given: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        h, loc, log_scale = self.transform_prior(h)
        q_loc = None if found is None else self.posterior(torch.cat([h, found[h.shape[2]]], 1))
        z, kl = self.drawn(loc, log_scale.exp(), q_loc, given)
        return self.resnet_end(h + self.z_proj(z)), (z, loc, log_scale.exp(), loc if q_loc is None else q_loc, kl)


class VariableBlock(Latent):
    """Of QARV: everything sees the embedding of λ, and the prior gives σ."""

    def __init__(self, units: int, key: str) -> None:
        super().__init__(units, True, WIDTH)
        self.enc_key, self.merge = key, Cell(True)

    def transform_prior(self, feature: Tensor, lmb_embedding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        feature = self.resnet_front(feature, lmb_embedding)
        loc, log_scale = self.prior(feature).chunk(2, 1)
        return feature, loc, (F.softplus(log_scale + 2.3) - 2.3).exp()

    def transform_posterior(self, feature: Tensor, enc_feature: Tensor, lmb_embedding: Tensor) -> Tensor:
        return self.posterior(self.merge(feature * enc_feature, lmb_embedding))

    def run(self, h: Tensor, emb: Tensor, found: Any, given: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        h, loc, scale = self.transform_prior(h, emb)
        q_loc = None if found is None else self.transform_posterior(h, found[self.enc_key], emb)
        z, kl = self.drawn(loc, scale, q_loc, given)
        return self.resnet_end(h + self.z_proj(z), emb), (z, loc, scale, loc if q_loc is None else q_loc, kl)


class Images(nn.Module):
    """Sizes and units of images, which both models have."""

    def __init__(self) -> None:
        super().__init__()
        self.im_shift, self.im_scale, self.max_stride = -0.4, 2.5, STRIDE

    def preprocess_input(self, im: Tensor) -> Tensor:
        assert bool((im >= 0).all() and (im <= 1).all())
        assert not im.requires_grad
        return (im + self.im_shift) * self.im_scale

    def process_output(self, x: Tensor) -> Tensor:
        return (x.clamp(-1, 1) + 1) / 2


def through(blocks: Any, bias: Tensor, size: Sequence[int], emb: Any, found: Any, given: Sequence[Tensor] | None = None) -> Ran:
    """A whole pass down, of what the encoder found or from the prior, with its own draws or through z, from the top."""
    h = bias.expand(size[0], -1, size[1], size[2])
    left, seen = list(given or ()), []
    for block in blocks:
        if isinstance(block, Latent):
            h, numbers = block.run(h, emb, found, left.pop(0) if left else None)  # pyright: ignore[reportCallIssue]
            seen.append(numbers)
        else:
            h = block(h, emb) if getattr(block, "requires_embedding", False) else block(h)
    z, loc, scale, q_loc, kl = (list(column) for column in zip(*seen, strict=True))
    return Ran(z, loc, scale, q_loc, kl, h)


class Decoder(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.dec_blocks, self.bias = nn.ModuleList(blocks), nn.Parameter(torch.zeros(1, WIDTH, 1, 1))

    def forward(self, enc_features: dict[int, Tensor], get_latents: bool = False) -> tuple[Tensor, list[dict[str, Tensor]]]:
        top = enc_features[min(enc_features)]
        ran = through(self.dec_blocks, self.bias, (len(top), *top.shape[2:]), None, enc_features)
        return ran.output, [{"kl": kl, **({"z": z} if get_latents else {})} for kl, z in zip(ran.kl, ran.z, strict=True)]

    def forward_uncond(self, nhw_repeat: tuple[int, int, int] = (1, 1, 1), t: float = 1.0) -> Tensor:
        return through(self.dec_blocks, self.bias, nhw_repeat, None, None).output


class Encoder(nn.Module):
    """Features by their height."""

    def __init__(self, colours: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(colours, WIDTH, 2, 2), nn.Conv2d(WIDTH, WIDTH, 2, 2)

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        h = torch.tanh(self.first(x))
        below = torch.tanh(self.second(h))
        return {h.shape[2]: h, below.shape[2]: below}


class SquaredError(nn.Module):
    def __init__(self, mse_lmb: float) -> None:
        super().__init__()
        self.mse_lmb = mse_lmb

    def forward_loss(self, x_hat: Tensor, x_tgt: Tensor) -> tuple[Tensor, Tensor]:
        return self.mse_lmb * (x_hat - x_tgt).square().mean((1, 2, 3)), x_hat

    def mean(self, x_hat: Tensor) -> Tensor:
        return x_hat


class Lossless(nn.Module):
    """Probabilities of the levels of 8-bit images, in [−1, 1]."""

    def __init__(self, colours: int) -> None:
        super().__init__()
        self.conv_mean, self.conv_scale = nn.Conv2d(WIDTH, colours, 1), nn.Conv2d(WIDTH, colours, 1)

    def forward_loss(self, feature: Tensor, x_tgt: Tensor) -> tuple[Tensor, Tensor]:
        mean, scale = self.conv_mean(feature), (F.softplus(self.conv_scale(feature) + 16) - 16).exp()
        return minus_log_mass(127.5 * x_tgt, 127.5 * mean, 127.5 * scale).mean((1, 2, 3)), mean

    def mean(self, feature: Tensor) -> Tensor:
        return self.conv_mean(feature)


class HierarchicalVAE(Images):
    """Three layers on images of which height and width are multiples of 4; `lmb` is None for the lossless one."""

    def __init__(self, lmb: float | None = 32.0, colours: int = 3) -> None:
        super().__init__()
        last = [nn.Conv2d(WIDTH, WIDTH, 1)] if lmb is None else [nn.Conv2d(WIDTH, 4 * colours, 1), nn.PixelShuffle(2)]
        up = nn.Upsample(scale_factor=2)
        self.encoder = Encoder(colours)
        self.decoder = Decoder([FixedBlock(3), FixedBlock(3), up, FixedBlock(2), *last, *([up] if lmb is None else [])])
        self.out_net: Any = Lossless(colours) if lmb is None else SquaredError(lmb)

    def preprocess_target(self, im: Tensor) -> Tensor:
        return 2 * im - 1


class NamedEncoder(nn.Module):
    def __init__(self, colours: int) -> None:
        super().__init__()
        self.first, self.cell, self.second = nn.Conv2d(colours, WIDTH, 2, 2), Cell(True), nn.Conv2d(WIDTH, WIDTH, 2, 2)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        h = self.cell(torch.tanh(self.first(x)), emb)
        below = torch.tanh(self.second(h))
        return below, {"enc_s2": h, "enc_s4": below}


class VariableRateLossyVAE(Images):
    """Two layers, with cells of their own between them."""

    def __init__(self, lmb_range: tuple[float, float] = (16.0, 2048.0), colours: int = 3) -> None:
        super().__init__()
        self.lmb_range = lmb_range
        self.encoder = NamedEncoder(colours)
        blocks = [Cell(True), VariableBlock(3, "enc_s4"), nn.Upsample(scale_factor=2), Cell(True), VariableBlock(2, "enc_s2")]
        blocks += [Cell(True), nn.Conv2d(WIDTH, 4 * colours, 1), nn.PixelShuffle(2)]
        self.dec_blocks, self.bias = nn.ModuleList(blocks), nn.Parameter(torch.zeros(1, WIDTH, 1, 1))
        self.lmb_embedding = nn.Linear(2, 4)

    def _get_lmb_embedding(self, lmb: Tensor, n: int) -> Tensor:
        if lmb.numel() == 1:
            lmb = torch.full((n,), lmb.item())  # of the default dtype
        assert lmb.shape == (n,)
        angle = lmb.log() / math.log(8192)
        return self.lmb_embedding(torch.stack([angle.cos(), angle.sin()], 1))

    def forward_end2end(
        self, im: Tensor, lmb: Tensor, mode: str = "trainval", get_latent: bool = False
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        emb = self._get_lmb_embedding(lmb, len(im))
        _, found = self.encoder(self.preprocess_input(im), emb)
        size = (len(im), im.shape[2] // STRIDE, im.shape[3] // STRIDE)
        ran = through(self.dec_blocks, self.bias, size, emb, found)
        return ran.output, [{"kl": kl} for kl in ran.kl]

    def unconditional_sample(self, lmb: Tensor, bhw_repeat: tuple[int, int, int], t: float = 1.0) -> Tensor:
        emb = self._get_lmb_embedding(lmb, bhw_repeat[0])
        return self.process_output(through(self.dec_blocks, self.bias, bhw_repeat, emb, None).output)


def varied(model: Any) -> Any:
    """In evaluation mode, with weights of which μ and σ, from 0.15 to 5, differ from element to element."""
    perturbed(model)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, Latent):
                part.prior.weight.mul_(3)
                part.posterior.weight.mul_(3)
    return model
