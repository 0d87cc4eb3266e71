"""A small model of our own with the interface of CAREamics' ladder VAE, its forward pass, its sampler and its likelihoods.

Written against that interface, not from its code; `docs/adapters.md` names the commit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal


class LogVariance:
    """σ² is 10⁻⁶ and either e^l or, above l = 0, 1 + l."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def get_std(self) -> Tensor:
        return (torch.where(self.values > 0, 1 + self.values, self.values.exp()) + 1e-6).sqrt()


def gaussian(parameters: Tensor, clip: float) -> tuple[Tensor, LogVariance, Normal]:
    """Mean, log σ² and N."""
    mean, values = parameters.chunk(2, 1)
    log_variance = LogVariance(values.clamp(max=clip))
    return mean, log_variance, Normal(mean, log_variance.get_std())


class Stochastic(nn.Module):
    """Features -> p, features -> q, a latent -> features."""

    def __init__(self, conv: Any, width: int, z: int, top: bool) -> None:
        super().__init__()
        self.conv_in_p = None if top else conv(width, 2 * z, 3, padding=1)
        self.conv_in_q, self.conv_out = conv(width, 2 * z, 3, padding=1), conv(z, width, 3, padding=1)

    def process_p_params(self, p_params: Tensor, var_clip_max: float) -> tuple[Tensor, LogVariance, Normal]:
        return gaussian(p_params if self.conv_in_p is None else self.conv_in_p(p_params), var_clip_max)

    def process_q_params(self, q_params: Tensor, var_clip_max: float) -> tuple[Tensor, LogVariance, Normal]:
        return gaussian(self.conv_in_q(q_params), var_clip_max)


class Merge(nn.Module):
    """Two maps of features -> one."""

    def __init__(self, conv: Any, width: int) -> None:
        super().__init__()
        self.layer = conv(2 * width, width, 1)

    def forward(self, *features: Tensor) -> Tensor:
        return torch.tanh(self.layer(torch.cat(features, 1)))


class TopDownLayer(nn.Module):
    """A layer of the decoder; the top one has the parameters of its prior."""

    top_prior_params: Any

    def __init__(self, model: Any, conv: Any, index: int, z: int, factor: float) -> None:
        super().__init__()
        width, dimensions, top = model.width, len(model.image_size), index == model.n_layers - 1
        self.is_top_layer, self.stochastic_skip, self.normalize_latent_factor = top, True, factor
        self.retain_spatial_dims = model._multiscale_count > 1
        self.latent_shape = model.image_size if self.retain_spatial_dims else None
        self.stochastic = Stochastic(conv, width, z, top)
        if top:
            halvings = model.n_layers + 1 - model._multiscale_count
            size = [n // 2**halvings for n in model.image_size[-2:]]
            self.top_prior_params = nn.Parameter(0.5 * torch.randn(1, 2 * z, *model.image_size[:-2], *size))
        else:
            self.merge, self.skip_connection_merger = Merge(conv, width), Merge(conv, width)
        up = nn.Upsample(scale_factor=(1, 2, 2) if dimensions == 3 else 2)
        norm = nn.BatchNorm3d(width) if dimensions == 3 else nn.BatchNorm2d(width)
        self.deterministic_block = nn.Sequential(up, norm, nn.ELU(), conv(width, width, 3, padding=1), nn.Dropout(0.1))

    def forward(self, above: Tensor | None, found: Any, n_img_prior: int | None, clip: float) -> tuple[Tensor, Any]:
        """With `found` of the encoder, or without it from the prior, where it divides nothing, as the repository does."""
        p_params = above
        if above is None:
            n = len(found) if n_img_prior is None else n_img_prior
            p_params = self.top_prior_params.expand(n, *self.top_prior_params.shape[1:])
        assert p_params is not None
        q_params: Any = found if found is None or self.is_top_layer else self.merge(found, p_params)
        if self.normalize_latent_factor:
            q_params = q_params / self.normalize_latent_factor
        p = self.stochastic.process_p_params(p_params, clip)[2]
        q = p if q_params is None else self.stochastic.process_q_params(q_params, clip)[2]
        z = q.rsample()
        out = self.stochastic.conv_out(z)
        if above is not None:
            out = self.skip_connection_merger(out, above)
        if self.latent_shape is not None and out.shape[-1] > (size := self.latent_shape[-1] // 2):
            edge = (out.shape[-1] - size) // 2
            out = out[..., edge:-edge, edge:-edge]
        kl = (q.log_prob(z) - p.log_prob(z)).flatten(1).sum(1)
        return self.deterministic_block(out), (z, kl)


class CAREamicsLadder(nn.Module):
    """`model(x)` gives parameters of p(x | z), and KL and z of every layer, z_1 first.

    Args:
        image_size: two or three sizes.
        z_dims: channels of z_1, …, z_L.
        target_ch: output channels.
        scales: inputs of different resolution.
        predict_logvar: "pixelwise" or None.
        factor: that q's parameters are divided by.
    """

    def __init__(
        self,
        image_size: tuple[int, ...] = (8, 8),
        z_dims: tuple[int, ...] = (2, 3),
        target_ch: int = 1,
        scales: int = 1,
        predict_logvar: str | None = "pixelwise",
        factor: float = 1.0,
    ) -> None:
        super().__init__()
        conv: Any = nn.Conv3d if len(image_size) == 3 else nn.Conv2d
        self.image_size, self.n_layers, self.width = image_size, len(z_dims), 6
        self.target_ch, self.predict_logvar, self._multiscale_count = target_ch, predict_logvar, scales
        self._var_clip_max, self._squish3d = 20, False
        self.first_bottom_up = conv(1, self.width, 3, padding=1)
        self.lateral = nn.ModuleList(conv(1, self.width, 3, padding=1) for _ in range(scales - 1))
        self.steps = nn.ModuleList(conv(self.width, self.width, 3, padding=1) for _ in z_dims)
        self.top_down_layers = nn.ModuleList(TopDownLayer(self, conv, i, z, factor) for i, z in enumerate(z_dims))
        self.final_top_down = nn.Sequential(nn.ELU(), conv(self.width, self.width, 1))
        self.output_layer = conv(self.width, target_ch * (1 if predict_logvar is None else 2), 3, padding=1)

    def bottomup_pass(self, inp: Tensor) -> list[Tensor]:
        x, found = torch.tanh(self.first_bottom_up(inp[:, :1])), []
        for i, step in enumerate(self.steps):
            x = torch.tanh(step(x))
            wider = i < len(self.lateral)  # a coarser map of a wider view has the same size
            x = x + self.lateral[i](inp[:, i + 1 : i + 2]) if wider else x[..., ::2, ::2]
            found.append(x)
        return found

    def topdown_pass(self, bu_values: list[Tensor] | None, n_img_prior: int | None = None) -> tuple[Tensor, dict[str, Any]]:
        out, drawn = None, []
        for i in range(self.n_layers - 1, -1, -1):
            out, data = self.top_down_layers[i](
                out, None if bu_values is None else bu_values[i], n_img_prior, self._var_clip_max
            )
            drawn.insert(0, data)
        return self.final_top_down(out), {"z": [z for z, _ in drawn], "kl": [kl for _, kl in drawn]}

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        out, data = self.topdown_pass(self.bottomup_pass(x))
        return self.output_layer(out), data


def sample_from_prior(model: CAREamicsLadder, n: int) -> Tensor:
    """The model's own sampler, with nothing to divide."""
    factors = [layer.normalize_latent_factor for layer in model.top_down_layers]
    for layer in model.top_down_layers:
        layer.normalize_latent_factor = 0  # type: ignore[assignment]
    out = model.output_layer(model.topdown_pass(None, n_img_prior=n)[0])
    for layer, factor in zip(model.top_down_layers, factors, strict=True):
        layer.normalize_latent_factor = factor
    return out


class GaussianLikelihood(nn.Module):
    """`likelihood(output, x)` gives log p of every pixel first; without a predicted variance, half a squared error."""

    def __init__(self, predict_logvar: str | None = "pixelwise", logvar_lowerbound: float | None = -1.0) -> None:
        super().__init__()
        self.predict_logvar, self.logvar_lowerbound = predict_logvar, logvar_lowerbound

    def get_mean_lv(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.predict_logvar is None:
            return x, None
        mean, log_variance = x.chunk(2, 1)
        return mean, log_variance if self.logvar_lowerbound is None else log_variance.clamp(min=self.logvar_lowerbound)

    def forward(self, input_: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        mean, log_variance = self.get_mean_lv(input_)
        if log_variance is None:
            return -0.5 * (mean - x) ** 2, {}
        return -0.5 * ((x - mean) ** 2 / log_variance.exp() + log_variance + math.log(2 * math.pi)), {}


class OneNoise(nn.Module):
    """A mixture of two Gaussians whose mean is the signal, wider the stronger that is."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = nn.Parameter(torch.tensor(width), requires_grad=False)

    def get_gaussian_parameters(self, signals: Tensor) -> list[Tensor]:
        scale = self.width * (1 + signals.abs() / 100)
        share = 0.3 + 0.2 * torch.sigmoid(signals / 100)
        return [signals - 3 * (1 - share), signals + 3 * share, scale, 2 * scale, share, 1 - share]

    def likelihood(self, observations: Tensor, signals: Tensor) -> Tensor:
        low, high, narrow, wide, share, rest = self.get_gaussian_parameters(signals)
        narrower, wider = (Normal(m, s).log_prob(observations).exp() for m, s in ((low, narrow), (high, wide)))
        return share * narrower + rest * wider + 1e-10


class Noise(nn.Module):
    """One noise model per channel, by name."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for i in range(channels):
            self.add_module(f"nmodel_{i}", OneNoise(4.0 + 2 * i))

    def likelihood(self, obs: Tensor, signal: Tensor) -> Tensor:
        parts = zip(self.children(), obs.split(1, 1), signal.split(1, 1), strict=True)
        return torch.cat([model.likelihood(o, s) for model, o, s in parts], 1)  # type: ignore[operator]


class NoiseModelLikelihood(nn.Module):
    """log p of every pixel under a noise model, which is one of the raw data."""

    def __init__(self, noise: nn.Module) -> None:
        super().__init__()
        self.noiseModel = noise
        self.data_mean: Any = None
        self.data_std: Any = None

    def set_data_stats(self, data_mean: Any, data_std: Any) -> None:
        self.data_mean, self.data_std = torch.as_tensor(data_mean), torch.as_tensor(data_std)

    def log_likelihood(self, x: Tensor, params: dict[str, Any]) -> Tensor:
        raw, signal = (v * self.data_std + self.data_mean for v in (x, params["mean"]))
        return self.noiseModel.likelihood(raw, signal).log()  # type: ignore[operator]

    def forward(self, input_: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return self.log_likelihood(x, {"mean": input_}), {}


def noise_likelihood(channels: int = 1) -> NoiseModelLikelihood:
    """With the statistics of 8-bit data."""
    likelihood = NoiseModelLikelihood(Noise(channels))
    likelihood.set_data_stats(torch.full((1, channels, 1, 1), 100.0), torch.full((1, channels, 1, 1), 30.0))
    return likelihood


def mixed(x: Tensor) -> Tensor:
    """The mean of an observation's channels, as the encoder of a model that splits them sees it."""
    return x.mean(1, keepdim=True)


def mixed_laterally(x: Tensor) -> Tensor:
    """The same, and the like for a wider view, which the test makes up."""
    return torch.cat([mixed(x), mixed(x).flip(2)], 1)
