"""Small models of our own with the interfaces of public hierarchical VAEs: what the adapters call, and nothing more.

They are written against those interfaces, not from their code; `docs/adapters.md` names the commits.
"""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal


class NVAEConv(nn.Conv2d):
    """Normalises its weights in every call, and keeps them."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.log_weight_norm = nn.Parameter(torch.zeros(self.out_channels, 1, 1, 1))
        self.weight_normalized = self.normalize_weight()

    def normalize_weight(self) -> Tensor:
        return self.log_weight_norm.exp() * self.weight / self.weight.square().sum((1, 2, 3), keepdim=True).sqrt()

    def forward(self, input: Tensor) -> Tensor:
        self.weight_normalized = self.normalize_weight()
        return F.conv2d(input, self.weight_normalized, self.bias, self.stride, self.padding)


class NVAECell(nn.Module):
    """A cell of NVAE: it says what it is, and changes the resolution where that asks for it."""

    def __init__(self, source: int, target: int, cell_type: str) -> None:
        super().__init__()
        self.cell_type = cell_type
        self.norm = nn.BatchNorm2d(source)
        self.conv = NVAEConv(source, target, 3, padding=1, stride=2 if "down" in cell_type else 1)
        self.combine = nn.Conv2d(source + 2, target, 1) if cell_type == "combiner_dec" else None
        self.onto = nn.Conv2d(source, target, 1) if cell_type == "combiner_enc" else None

    def forward(self, features: Tensor, other: Tensor | None = None) -> Tensor:
        if self.combine is not None:
            return self.combine(torch.cat([features, there(other)], 1))
        if self.onto is not None:
            return features + self.onto(there(other))
        if "up" in self.cell_type:
            features = F.interpolate(features, scale_factor=2)
        return self.conv(torch.tanh(self.norm(features)))


class NVAEFlow(nn.Module):
    """z -> a(features) z + b, with its log-determinant per element, as the flows of NVAE give it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Conv2d(width, 4, 1)

    def forward(self, z: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        log_a, b = self.net(features).chunk(2, 1)
        return z * log_a.exp() + b, log_a


class NVAE(nn.Module):
    """Two scales of two groups of 2 channels each, on images of 16 × 16 or another size, or one group alone."""

    def __init__(
        self, decoder: str = "mixture", flows: int = 0, residual: bool = True, vanilla: bool = False, side: int = 16
    ) -> None:
        super().__init__()
        width, self.decoder = 6, decoder
        colours, outputs = {"bernoulli": (1, 1), "normal": (3, 6), "mixture": (3, 20), "unknown": (3, 6)}[decoder]
        self.num_flows, self.res_dist, self.vanilla_vae, self.num_bits = flows, residual, vanilla, 8
        self.crop_output, self.input_size = decoder == "bernoulli", side
        self.z0_size = [2, side // 4, side // 4]
        self.stem = nn.Conv2d(colours, width, 3, padding=1)
        kinds = ["normal", "combiner_enc", "normal", "combiner_enc", "down", "normal", "combiner_enc", "normal"]
        pre = [NVAECell(width, width, "down_pre")]
        tower = [] if vanilla else [NVAECell(width, width, kind) for kind in kinds]
        self.pre_process = nn.ModuleList([*pre, NVAECell(width, width, "down_pre")] if vanilla else pre)
        self.enc_tower: Any = [] if vanilla else nn.ModuleList(tower)
        self.enc0 = nn.Sequential(nn.ELU(), nn.Conv2d(width, width, 1), nn.ELU())
        groups = 1 if vanilla else 4
        self.enc_sampler = nn.ModuleList(nn.Conv2d(width, 4, 3, padding=1) for _ in range(groups))
        self.dec_sampler = nn.ModuleList(nn.Conv2d(width, 4, 1) for _ in range(groups - 1))
        self.nf_cells = nn.ModuleList(NVAEFlow(width) for _ in range(groups * flows))
        kinds = ["combiner_dec", "normal", "combiner_dec", "up_dec", "normal", "combiner_dec", "normal", "combiner_dec"]
        self.dec_tower: Any = [] if vanilla else nn.ModuleList(NVAECell(width, width, kind) for kind in kinds)
        self.stem_decoder = nn.Conv2d(2, width, 1)
        self.prior_ftr0 = nn.Parameter(torch.rand(width, side // 4, side // 4))
        ups = 2 if vanilla else 1
        self.post_process = nn.ModuleList(NVAECell(width, width, "up_post") for _ in range(ups))
        self.image_conditional = nn.Sequential(nn.ELU(), nn.Conv2d(width, outputs, 3, padding=1))

    def decoder_output(self, logits: Tensor) -> Any:
        if self.decoder == "bernoulli":
            return Bernoulli(logits=logits)
        if self.decoder == "normal":
            mu, log_sigma = (5 * torch.tanh(p / 5) for p in logits.chunk(2, 1))
            return NormalDecoder(mu, log_sigma.exp() + 0.01)
        return DiscMixLogistic(logits) if self.decoder == "mixture" else SimpleNamespace()


class NormalDecoder:
    """Parameters of the Gaussian decoder, for images in [−1, 1]."""

    def __init__(self, mu: Tensor, sigma: Tensor) -> None:
        self.dist = SimpleNamespace(mu=mu, sigma=sigma)


class DiscMixLogistic:
    """Parameters of two discretised logistics, (batch, 3, 2, height, width)."""

    def __init__(self, parameters: Tensor) -> None:
        self.logit_probs, rest = parameters[:, :2], parameters[:, 2:].unflatten(1, (3, 6))
        self.means, self.log_scales, self.coeffs = rest[:, :, :2], rest[:, :, 2:4].clamp(min=-7), torch.tanh(rest[:, :, 4:])
        self.max_val = 255.0


class VDVAEBlock(nn.Module):
    """A block of VDVAE's decoder: resolution `base`, features of `mixin` mixed in."""

    def __init__(self, base: int, mixin: int | None) -> None:
        super().__init__()
        self.base, self.mixin, self.zdim, self.widths = base, mixin, 2, {1: 4, 4: 4, 8: 4}
        self.enc, self.prior = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.z_proj, self.resnet = nn.Conv2d(2, 4, 1), nn.Sequential(nn.GELU(), nn.Conv2d(4, 4, 1))


class VDVAE(nn.Module):
    """Five blocks at 1 × 1, 4 × 4 and 8 × 8, with learned features of the two lower resolutions."""

    def __init__(self, dataset: str = "cifar10") -> None:
        super().__init__()
        self.H = SimpleNamespace(dataset=dataset, image_size=8, image_channels=3)
        self.encoder = VDVAEEncoder()
        self.decoder = VDVAEDecoder()


class VDVAEEncoder(nn.Module):
    """Images with channels last -> features by resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        features = torch.tanh(self.conv(x.permute(0, 3, 1, 2)))
        return {8: features, 4: F.avg_pool2d(features, 2), 1: F.avg_pool2d(features, 8)}


class VDVAEDecoder(nn.Module):
    """Blocks, learned features, and what makes the image's parameters (channels last)."""

    def __init__(self) -> None:
        super().__init__()
        self.dec_blocks = nn.ModuleList(VDVAEBlock(*b) for b in ((1, None), (4, 1), (4, None), (8, 4), (8, None)))
        self.bias_xs = nn.ParameterList(nn.Parameter(torch.randn(1, 4, n, n)) for n in (1, 4))
        self.gain = nn.Parameter(torch.full((1, 4, 1, 1), 0.9))
        self.out_net = nn.Sequential(nn.Conv2d(4, 20, 1), ChannelsLast())

    def final_fn(self, features: Tensor) -> Tensor:
        return features * self.gain


class ChannelsLast(nn.Module):
    """(batch, channels, height, width) -> (batch, height, width, channels)."""

    def forward(self, features: Tensor) -> Tensor:
        return features.permute(0, 2, 3, 1)


IO = namedtuple("IO", ["x", "h"], defaults=[None, None])
Drawn = namedtuple("Drawn", ["z", "dist"])
Hidden = namedtuple("Hidden", ["h"])


class Stochastic(nn.Module):
    """A Gaussian stage: what it puts out, its prior if it is the top one, and its parameters from features."""

    def __init__(self, width: int, top: bool) -> None:
        super().__init__()
        self.out_shape, self.min_scale, self.max_scale = (3,), 1e-6, float("inf")
        self.q, self.p = nn.Linear(width, 6), nn.Linear(width, 6)
        if top:
            self.register_buffer("prior_logits", torch.linspace(-0.3, 0.3, 6))

    def logits_to_mu_and_sigma(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        mu, raw = logits.chunk(2, 1)
        return mu, F.softplus(raw)

    def compute_params(self, x: Tensor, inference: bool) -> tuple[Tensor, Tensor]:
        return self.logits_to_mu_and_sigma((self.q if inference else self.p)(torch.tanh(x)))


class Blocks(nn.Module):
    """Deterministic blocks, which take skip connections off the list that they are given and give back a new one."""

    def __init__(self, width: int, skips: bool) -> None:
        super().__init__()
        self.layers, self.skips = nn.ModuleList(nn.Linear(width, width) for _ in range(2)), skips

    def forward(self, x: Tensor, aux: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        found: list[Tensor] = []
        for layer in self.layers:
            x = torch.tanh(layer(x)) + (there(aux).pop() if self.skips else 0)
            found.insert(0, x)
        return x, found


class Stage(nn.Module):
    """One stage; with `ladder` its posterior is made on the way down."""

    IO = IO

    def __init__(self, width: int, top: bool, ladder: bool, skips: bool) -> None:
        super().__init__()
        self.stochastic = Stochastic(width, top)
        self.q_deterministic, self.lift = nn.Linear(width, width), nn.Linear(3, width)
        self.p_projection, self.p_deterministic = nn.Linear(3, width), Blocks(width, skips and not top)
        if ladder:
            self.merge = Merge(width)

    def infer(self, io: Any) -> tuple[Any, Any]:
        h = torch.tanh(self.q_deterministic(io.x.flatten(1))) + (0 if io.h is None else io.h)
        if hasattr(self, "merge"):
            return IO(x=h, h=h), Hidden(h)
        q = Normal(*self.stochastic.compute_params(h, inference=True))
        z = q.rsample()
        return IO(x=self.lift(z), h=h), Drawn(z, q)


class Merge(nn.Module):
    """Features from below with those from above, if there are any."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Linear(width, width)

    def forward(self, h: Tensor, aux: Tensor | None) -> Tensor:
        return h + (0 if aux is None else self.net(aux))


class PixelModule(nn.Module):
    """A likelihood module of these deep VAEs: a torch distribution, or one of the discretised ones."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind, self.activation, self.double_precision = kind, nn.LeakyReLU(), False
        self.distribution: Any = Bernoulli if kind == "bernoulli" else None
        if kind == "logistic":
            self.n_bins = 256
        self.net = nn.Linear(width, {"bernoulli": width, "logistic": 2 * width, "mixture": 20 * width // 3, "unknown": 1}[kind])

    def get_distribution_kwargs(self, x: Tensor) -> dict[str, Any]:
        found = self.net(x)
        if self.kind == "bernoulli":
            return {"logits": found}
        if self.kind == "logistic":
            mean, log_scale = found.chunk(2, 1)
            return {"mean": mean + 0.5, "logscale": log_scale - 1}
        return {"mean": None, "all_params": found.unflatten(1, (20, 2, 2))} if self.kind == "mixture" else {"mean": found}


class DeepVAE(nn.Module):
    """Three stages of 3 units on vectors of 10 (padded to 12), or on images of 3 × 2 × 2 for "mixture"."""

    def __init__(self, kind: str = "bernoulli", ladder: bool = False, skips: bool = True) -> None:
        super().__init__()
        width, image = 12, kind == "mixture"
        self.input_shape, self.skip_stochastic = ((3, 2, 2) if image else (10,)), skips
        self.pad, self.unpad = (None, None) if image else ([1, 1], [-1, -1])
        self.lambda_init: Any = None
        self.stages = nn.ModuleList(Stage(width, i == 2, ladder, skips) for i in range(3))
        self.likelihood = PixelModule(kind, width if image else 10)


def there(value: Any) -> Any:
    """A value that the interface promises."""
    assert value is not None
    return value


def perturbed(model: nn.Module) -> nn.Module:
    """In evaluation mode, with statistics of its norms that are not the trivial ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return model.eval()
