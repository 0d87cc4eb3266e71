"""A small model of our own with the interface of addtt/ladder-vae-pytorch: what the adapter calls, and its own passes.

Written against that interface, not from its code.
"""

from __future__ import annotations

__all__ = ["LadderVAE", "Ran", "crop_img_tensor"]

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from energy_prior.generators.likelihoods import DiscretizedLogisticMixture

WIDTH = 6


class Ran(NamedTuple):
    """What a pass gives: log q, log p and KL, z_1 first, each (batch,), and features below z_1 as large as the padded image."""

    log_q: list[Tensor]
    log_p: list[Tensor]
    kl: list[Tensor]
    features: Tensor


def total(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1)


def crop_img_tensor(x: Tensor, size: Sequence[int]) -> Tensor:
    """The middle of it; of an odd border the smaller part is before it. The repository has this from boilr."""
    first = [(n - m) // 2 for n, m in zip(x.shape[2:], size, strict=True)]
    return x[:, :, first[0] : first[0] + size[0], first[1] : first[1] + size[1]]


class LikelihoodModule(nn.Module):
    """A convolution that gives parameters, and log p(x | z) of them."""

    outputs = 0

    def __init__(self, colours: int) -> None:
        super().__init__()
        self.parameter_net = nn.Conv2d(WIDTH, self.outputs or colours * self.per_colour, 3, padding=1)

    per_colour = 1

    def forward(self, features: Tensor, x: Tensor | None) -> tuple[Tensor | None, dict[str, Any]]:
        parameters = self.distr_params(features)
        return None if x is None else self.log_likelihood(x, parameters), {"params": parameters}

    def distr_params(self, features: Tensor) -> Any:
        raise NotImplementedError

    def log_likelihood(self, x: Tensor, params: Any) -> Tensor:
        raise NotImplementedError


class BernoulliLikelihood(LikelihoodModule):
    def distr_params(self, features: Tensor) -> Tensor:
        return torch.sigmoid(self.parameter_net(features))

    def log_likelihood(self, x: Tensor, params: Tensor) -> Tensor:
        return total(x * params.log() + (1 - x) * (1 - params).log())


class GaussianLikelihood(LikelihoodModule):
    per_colour = 2

    def distr_params(self, features: Tensor) -> dict[str, Tensor]:
        mean, log_variance = self.parameter_net(features).chunk(2, 1)
        return {"mean": mean, "logvar": log_variance}

    def log_likelihood(self, x: Tensor, params: dict[str, Tensor]) -> Tensor:
        return total(Normal(params["mean"], (params["logvar"] / 2).exp()).log_prob(x))


class DiscretizedLogisticLikelihood(LikelihoodModule):
    per_colour, n_bins, double_precision = 2, 256, False

    def distr_params(self, features: Tensor) -> dict[str, Tensor]:
        mean, log_scale = self.parameter_net(features).chunk(2, 1)
        return {"mean": mean + 0.5, "logscale": (log_scale - 1).clamp(min=-7)}

    def log_likelihood(self, x: Tensor, params: dict[str, Tensor]) -> Tensor:
        n, mean, scale = self.n_bins, params["mean"], params["logscale"].exp()
        left = torch.floor((x * (255 / 256) + 1 / 512) * n) / n
        above = torch.where(left < (n - 1) / n, torch.sigmoid((left + 1 / n - mean) / scale), torch.ones_like(mean))
        below = torch.where(left >= 1 / n, torch.sigmoid((left - mean) / scale), torch.zeros_like(mean))
        return total((above - below + (1e-14 if self.double_precision else 1e-7)).log())


class DiscretizedLogisticMixLikelihood(LikelihoodModule):
    outputs = 20

    def distr_params(self, features: Tensor) -> dict[str, Any]:
        return {"mean": None, "all_params": self.parameter_net(features)}

    def log_likelihood(self, x: Tensor, params: dict[str, Any]) -> Tensor:
        return DiscretizedLogisticMixture.from_channels(params["all_params"], bottom=-0.999, top=0.999).log_prob(2 * x - 1)


class UnknownLikelihood(LikelihoodModule):
    pass


_LIKELIHOODS: dict[str, type[LikelihoodModule]] = {
    "bernoulli": BernoulliLikelihood,
    "gaussian": GaussianLikelihood,
    "discr_log": DiscretizedLogisticLikelihood,
    "discr_log_mix": DiscretizedLogisticMixLikelihood,
    "unknown": UnknownLikelihood,
}


class Stochastic(nn.Module):
    """Convolutions around a latent."""

    def __init__(self, units: int, top: bool) -> None:
        super().__init__()
        if not top:
            self.conv_in_p = nn.Conv2d(WIDTH, 2 * units, 1)
        self.conv_in_q, self.conv_out = nn.Conv2d(WIDTH, 2 * units, 1), nn.Conv2d(units, WIDTH, 1)


class Block(nn.Module):
    """Batch norm and dropout, and twice the resolution as often as asked for."""

    def __init__(self, doublings: int) -> None:
        super().__init__()
        self.norm, self.drop, self.conv = nn.BatchNorm2d(WIDTH), nn.Dropout2d(0.3), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.doublings = doublings

    def forward(self, h: Tensor) -> Tensor:
        h = h.repeat_interleave(2**self.doublings, 2).repeat_interleave(2**self.doublings, 3)
        return h + self.drop(self.conv(F.elu(self.norm(h))))


class Merge(nn.Module):
    """Two feature maps as one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2 * WIDTH, WIDTH, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer(torch.cat([x, y], 1))


class TopDownLayer(nn.Module):
    def __init__(self, units: int, doublings: int, skip: bool, top: tuple[int, int] | None) -> None:
        super().__init__()
        self.z_dim, self.stochastic_skip, self.is_top_layer = units, skip, top is not None
        self.stochastic, self.deterministic_block = Stochastic(units, top is not None), Block(doublings)
        if top is not None:
            self.top_prior_params = nn.Parameter(torch.linspace(-0.4, 0.4, 2 * units).view(1, -1, 1, 1).repeat(1, 1, *top))
        else:
            self.merge = Merge()
            if skip:
                self.skip_connection_merger = Merge()


class LadderVAE(nn.Module):
    """Three layers; its encoder halves the image once, and before each latent as often as `downsample` says."""

    def __init__(
        self,
        color_ch: int = 1,
        z_dims: Sequence[int] = (3, 2, 2),
        downsample: Sequence[int] = (0, 1, 1),
        img_shape: Sequence[int] = (6, 7),
        likelihood_form: str = "bernoulli",
        stochastic_skip: bool = True,
        analytical_kl: bool = False,
    ) -> None:
        super().__init__()
        self.color_ch, self.img_shape, self.downsample = color_ch, tuple(img_shape), list(downsample)
        self.analytical_kl = analytical_kl
        self.factor = 2 ** (1 + sum(downsample))
        self.padded = tuple(-(-n // self.factor) * self.factor for n in img_shape)
        top = self.padded[0] // self.factor, self.padded[1] // self.factor
        self.first_bottom_up = nn.Conv2d(color_ch, WIDTH, 3, padding=1, stride=2)
        self.bottom_up_layers = nn.ModuleList(nn.Sequential(nn.AvgPool2d(2**k), Block(0)) for k in downsample)
        self.top_down_layers = nn.ModuleList(
            TopDownLayer(units, k, stochastic_skip, top if i == len(z_dims) - 1 else None)
            for i, (units, k) in enumerate(zip(z_dims, downsample, strict=True))
        )
        self.final_top_down = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), Block(0))
        self.likelihood = _LIKELIHOODS[likelihood_form](color_ch)

    def pad_input(self, x: Tensor) -> Tensor:
        """Zeros around it, the smaller part of an odd border before it."""
        (rows, columns), (height, width) = self.padded, x.shape[2:]
        above, left = (rows - height) // 2, (columns - width) // 2
        return F.pad(x, [left, columns - width - left, above, rows - height - above])

    def bottomup_pass(self, x: Tensor) -> list[Tensor]:
        """Features for every layer, z_1's first."""
        found, h = [], self.first_bottom_up(x)
        for layer in self.bottom_up_layers:
            h = layer(h)
            found.append(h)
        return found

    def topdown_pass(
        self, bu_values: list[Tensor] | None = None, n_img_prior: int | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Features of the padded image, and the KL of every layer, z_1 first."""
        ran = self.run(bu_values, n_img_prior or 0)
        return ran.features, {"kl": ran.kl}

    def forward(self, x: Tensor) -> dict[str, Any]:
        """log p(x | z), and the KL in sum."""
        features, data = self.topdown_pass(self.bottomup_pass(self.pad_input(x)))
        return {"ll": self.likelihood(crop_img_tensor(features, x.shape[2:]), x)[0], "kl_sep": sum(data["kl"])}

    def run(self, below: list[Tensor] | None, n: int, given: Sequence[Tensor] | None = None) -> Ran:
        """A pass down from the encoder's features or from the prior, with its own draws or through latents, z_1 first."""
        log_q, log_p, kl, h = [], [], [], None
        for i in reversed(range(len(self.top_down_layers))):
            layer: Any = self.top_down_layers[i]
            if layer.is_top_layer:
                p = normal(layer.top_prior_params.expand(len(below[0]) if below else n, -1, -1, -1))
            else:
                p = normal(layer.stochastic.conv_in_p(h))
            q = p
            if below is not None:
                q = normal(layer.stochastic.conv_in_q(below[i] if layer.is_top_layer else layer.merge(below[i], h)))
            z = q.rsample() if given is None else given[i]
            log_q.insert(0, total(q.log_prob(z)))
            log_p.insert(0, total(p.log_prob(z)))
            kl.insert(0, total(kl_divergence(q, p)) if self.analytical_kl else log_q[0] - log_p[0])
            out = layer.stochastic.conv_out(z)
            out = layer.skip_connection_merger(out, h) if layer.stochastic_skip and not layer.is_top_layer else out
            h = layer.deterministic_block(out)
        return Ran(log_q, log_p, kl, self.final_top_down(h))


def normal(parameters: Tensor) -> Normal:
    mu, log_variance = parameters.chunk(2, 1)
    return Normal(mu, (log_variance / 2).exp())
