"""A small model of our own with the interface of Efficient-VDVAE, its forward pass, its sampler and its losses.

Written against that interface, not from its code; `docs/adapters.md` names the commit.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from stand_ins import there
from torch import Tensor, nn
from torch.distributions import Bernoulli

BETA = math.log(2)


def hyper_parameters(**changed: Any) -> Any:
    """The values of its `hparams` that such a model depends on, in their sections."""
    model: dict[str, Any] = {"distribution_base": "std", "output_distribution_base": "std", "use_residual_distribution": False}
    model |= {"gradient_smoothing_beta": BETA, "output_gradient_smoothing_beta": 0.9}
    sections = {"model": model, "loss": {"min_mol_logscale": -250.0}, "data": {"num_bits": 8.0, "dataset_source": "cifar-10"}}
    for section in sections.values():
        section |= {name: changed.pop(name) for name in list(changed) if name in section}
    assert not changed
    return SimpleNamespace(**{name: SimpleNamespace(**section) for name, section in sections.items()})


class LatentLayer(nn.Module):
    """Features -> a draw and its statistics, or the statistics alone: μ, and σ or log σ/β."""

    def __init__(self, hparams: Any, width: int, variates: int) -> None:
        super().__init__()
        self.hparams, self.projection = hparams, nn.Conv2d(width, 2 * variates, 1)
        self.softplus = nn.Softplus(beta=hparams.model.gradient_smoothing_beta)

    def forward(self, x: Tensor, temperature: float | None = None, prior_stats: Any = None, return_sample: bool = True) -> Any:
        mean, spread = self.projection(x).chunk(2, 1)
        logarithmic = self.hparams.model.distribution_base == "logstd"
        spread = spread if logarithmic else self.softplus(spread)
        if prior_stats is not None:
            mean, spread = mean + prior_stats[0], spread + prior_stats[1] if logarithmic else spread * prior_stats[1]
        if not return_sample:
            return [mean, spread]
        std = torch.exp(self.softplus.beta * spread) if logarithmic else spread
        std = std if temperature is None else std * temperature
        return torch.empty_like(mean).normal_(0.0, 1.0) * std + mean, [mean, spread]


class Unpool(nn.Module):
    """Twice the size, with a bias that the first call makes."""

    scale_bias: nn.Parameter | None

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 1)
        self.register_parameter("scale_bias", None)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(F.leaky_relu(self.conv(x), 0.1), scale_factor=2)
        if self.scale_bias is None:
            self.scale_bias = nn.Parameter(torch.randn(1, *x.shape[1:]))
        return x + self.scale_bias


class DownBlock(nn.Module):
    """A block of the decoder with its latent."""

    def __init__(self, hparams: Any, width: int, strides: int, variates: int) -> None:
        super().__init__()
        self.hparams, self.strides = hparams, strides
        if strides > 1:
            self.unpool = Unpool(width)
        self.residual_block = nn.Sequential(nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.posterior_net = nn.Sequential(nn.SiLU(), nn.Conv2d(2 * width, width, 1))
        self.prior_net = nn.Sequential(nn.SiLU(), nn.Conv2d(width, 2 * width, 1))
        self.prior_layer, self.posterior_layer = (LatentLayer(hparams, width, variates) for _ in range(2))
        self.z_projection = nn.Conv2d(variates, width, 1)

    def forward(self, y: Tensor, skip: Tensor | None, temperature: float | None = None) -> tuple[Tensor, Any, Any, Tensor]:
        """From the encoder's features, or without them from the prior."""
        y = self.unpool(y) if self.strides > 1 else y
        residual, prior = self.prior_net(y).chunk(2, 1)
        posterior = None
        if skip is None:
            z, stats = self.prior_layer(prior, temperature=temperature)
        else:
            stats = self.prior_layer(prior, return_sample=False)
            known = stats if self.hparams.model.use_residual_distribution else None
            z, posterior = self.posterior_layer(self.posterior_net(torch.cat([y, skip], 1)), prior_stats=known)
        return self.residual_block(y + residual + self.z_projection(z)), posterior, stats, z


class BottomUp(nn.Module):
    """Images -> features, those of the lowest resolution first."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.input_conv = nn.Conv2d(channels, width, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = torch.tanh(self.input_conv(x))
        return [F.avg_pool2d(features, 4), F.avg_pool2d(features, 2), features]


class TopDown(nn.Module):
    """Three levels, the middle one of two blocks."""

    def __init__(self, hparams: Any, width: int, side: int, outputs: int) -> None:
        super().__init__()
        bits = int(hparams.data.num_bits)
        self.max_pix_value = (256 - 2 ** (8 - bits)) / 127.5 - 1
        self.trainable_h = nn.Parameter(torch.randn(1, width, side // 4, side // 4))
        self.levels_down_upsample = nn.ModuleList(DownBlock(hparams, width, *p) for p in ((1, 3), (2, 2), (2, 4)))
        extra = [[], [DownBlock(hparams, width, 1, 2)], []]
        self.levels_down = nn.ModuleList(nn.ModuleList(blocks) for blocks in extra)
        self.output_conv = nn.Conv2d(width, outputs, 1)

    def forward(self, skips: list[Tensor]) -> tuple[Tensor, list[Any], list[Any]]:
        y, posteriors, priors = self.trainable_h.repeat(len(skips[0]), 1, 1, 1), [], []
        for skip, first, others in zip(skips, self.levels_down_upsample, self.levels_down, strict=True):
            for block in (first, *others):  # type: ignore[misc]
                y, posterior, prior, _ = block(y, skip)
                posteriors.append(posterior)
                priors.append(prior)
        return self.output_conv(y), posteriors, priors

    def sample_from_prior(self, batch_size: int, temperatures: list[float]) -> tuple[Tensor, list[Tensor]]:
        y, drawn = self.trainable_h.repeat(batch_size, 1, 1, 1), []
        for first, others, t in zip(self.levels_down_upsample, self.levels_down, temperatures, strict=True):
            for block in (first, *others):  # type: ignore[misc]
                y, _, _, z = block(y, None, t)
                drawn.append(z)
        return self.output_conv(y), drawn


class EfficientVDVAE(nn.Module):
    """Four latents on images of 3 × 8 × 8, or of 1 × 12 × 12 with a border of 2; run once, as it has to be."""

    def __init__(self, hparams: Any, *, run: bool = True) -> None:
        super().__init__()
        binary = hparams.data.dataset_source == "binarized_mnist"
        channels, side = (1, 12) if binary else (3, 8)
        self.bottom_up, self.top_down = BottomUp(channels, 6), TopDown(hparams, 6, side, 1 if binary else 20)
        if run:
            self(torch.zeros(1, channels, side, side))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Any], list[Any]]:
        return self.top_down(self.bottom_up(x))


def kl_of(hparams: Any, q: list[Tensor], p: list[Tensor]) -> Tensor:
    """KL of two Gaussians, element by element, from the statistics that the model gives."""
    if hparams.model.distribution_base == "logstd":
        q, p = ([mean, torch.exp(hparams.model.gradient_smoothing_beta * s)] for mean, s in (q, p))
    ratio = q[1] / p[1]
    return 0.5 * (((q[0] - p[0]) / p[1]) ** 2 + ratio**2) - 0.5 - torch.log(ratio)


def log_p_of(hparams: Any, logits: Tensor, y: Tensor) -> Tensor:
    """log p(x | z), (batch,), of y = 2 x − 1 on the grid of levels, or of padded binary images, from the model's output."""
    if hparams.data.dataset_source == "binarized_mnist":
        inside = (..., slice(2, -2), slice(2, -2))
        return Bernoulli(logits=logits[inside]).log_prob(y[inside]).flatten(1).sum(1)
    bins = 2**hparams.data.num_bits - 1
    top = (256 - 2 ** (8 - hparams.data.num_bits)) / 127.5 - 1
    rest = logits[:, 2:].reshape(len(logits), 3, 6, *logits.shape[2:])
    means, raw, c = rest[:, :, :2], rest[:, :, 2:4], torch.tanh(rest[:, :, 4:])
    least = hparams.loss.min_mol_logscale
    if hparams.model.output_distribution_base == "std":
        scales = F.softplus(raw, beta=hparams.model.output_gradient_smoothing_beta).clamp(min=math.exp(least))
    else:
        scales = torch.exp(hparams.model.output_gradient_smoothing_beta * raw.clamp(min=least))
    y = y[:, :, None]
    green, blue = means[:, 1] + c[:, 0] * y[:, 0], means[:, 2] + c[:, 1] * y[:, 0] + c[:, 2] * y[:, 1]
    centred = y - torch.stack([means[:, 0], green, blue], 1)
    above, below = torch.sigmoid((centred + 1 / bins) / scales), torch.sigmoid((centred - 1 / bins) / scales)
    lowest, highest = (y + 1).abs() < 1e-5, (y - top).abs() < 1e-5
    mass = torch.where(lowest, above, torch.where(highest, 1 - below, above - below))
    return torch.logsumexp(logits[:, :2].log_softmax(1) + mass.log().sum(1), 1).flatten(1).sum(1)


class MixtureLoss:
    """The loss of the repository: first of what it gives, −log p(x | z) over everything in the batch, as a mean."""

    def __init__(self, hparams: Any) -> None:
        self.hparams = hparams

    def __call__(self, targets: Tensor, logits: Tensor, global_batch_size: int) -> tuple[Tensor, None]:
        return -log_p_of(self.hparams, logits, targets).sum() / (global_batch_size * targets[0].numel()), None


def std_loss(p: list[Tensor], q: list[Tensor]) -> Tensor:
    """The KL of the repository for statistics with σ: of p, there the posterior, from q, the prior."""
    return kl_of(hyper_parameters(), there(p), there(q))
