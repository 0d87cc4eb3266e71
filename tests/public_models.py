"""The stand-ins with the forward passes and samplers that the public models have, under the names that they have there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from own_calls import deep_calls, nvae_calls, vdvae_calls
from stand_ins import NVAE, VDVAE, DeepVAE, VDVAEDecoder
from torch import Tensor, nn

from energy_prior.generators.likelihoods import DiscretizedLogisticMixture


class PublicNVAE(NVAE):
    """`model(x)` gives logits first and the KL of every group, from the top, fourth; here without padding, and binary."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__("bernoulli", **keywords)
        self.crop_output = False

    def forward(self, x: Tensor) -> tuple[Tensor, None, None, list[Tensor]]:
        logits, kl = nvae_calls(self).run(x, len(x))
        return logits, None, None, kl

    def sample(self, n: int, t: float) -> Tensor:
        return nvae_calls(self, t).run(None, n)[0]


class PublicVDVAE(VDVAE):
    """`model.decoder(activations)` gives features and a dict per block, from the top; `out_net.nll` is per dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = _Decoder(self)
        self.decoder.out_net = _OutNet(self.decoder.out_net)


class _Decoder(VDVAEDecoder):
    def __init__(self, model: VDVAE) -> None:
        super().__init__()
        self.of = [model]  # a list: the model is no part of its decoder

    def forward(self, activations: dict[int, Tensor]) -> tuple[Tensor, list[dict[str, Tensor]]]:
        features, kl = vdvae_calls(self.of[0], torch.empty(0)).run(activations, len(activations[8]))
        return features, [{"kl": block} for block in kl]

    def forward_uncond(self, n: int) -> Tensor:
        return vdvae_calls(self.of[0], torch.empty(0)).run(None, n)[0]


class _OutNet(nn.Sequential):
    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__(*layers)

    def nll(self, features: Tensor, target: Tensor) -> Tensor:
        parameters, x = self(features).permute(0, 3, 1, 2), target.permute(0, 3, 1, 2)
        mixture = DiscretizedLogisticMixture.from_channels(parameters, levels=256, bottom=-0.999, top=0.999)
        return -mixture.log_prob(x) / x[0].numel()


def vdvae_inputs(x: Tensor) -> Tensor:
    """What its `set_up_data` makes of 8-bit images in [0, 1] for the encoder: CIFAR-10's mean and deviation, channels last."""
    return ((255 * x - 120.63838) / 64.16736).permute(0, 2, 3, 1)


def vdvae_targets(x: Tensor) -> Tensor:
    """And for the likelihood: [−1, 1], channels last."""
    return (2 * x - 1).permute(0, 2, 3, 1)


class PublicDeepVAE(DeepVAE):
    """`model(x)` gives what has a likelihood, and a stage with its KL per layer, z_1 first."""

    def forward(self, x: Tensor) -> tuple[Any, list[Any]]:
        likelihood, kl = deep_calls(self).run(x, len(x))
        stages = [SimpleNamespace(loss=SimpleNamespace(kl_samplewise=k)) for k in kl]
        return SimpleNamespace(likelihood=likelihood), stages

    def generate(self, x: Tensor, n_prior_samples: int) -> tuple[Any, None]:
        return SimpleNamespace(likelihood=deep_calls(self).run(None, n_prior_samples)[0]), None
