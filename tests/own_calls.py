"""The forward passes and samplers of the stand-ins, as the public models have theirs: draws where they come, no adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, Normal, kl_divergence

from energy_prior.generators.likelihoods import DiscretizedLogistic, DiscretizedLogisticMixture


class OwnCalls(NamedTuple):
    """What `check_generator` takes of a model, and one pass, down from what its encoder gives or, from None, from the prior."""

    reconstruct: Callable[[Tensor], Any]
    sample: Callable[[int], Any]
    kl: Callable[[Tensor], Any]
    run: Callable[[Any, int], tuple[Any, list[Tensor]]]

    def keywords(self) -> dict[str, Any]:
        return {"reconstruct": self.reconstruct, "sample": self.sample, "kl": self.kl}


def total(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1)


# ------------------------------------------------------------------------------------------------------------------ NVAE


def nvae_calls(model: Any, t: float = 1.0, as_density: bool = False) -> OwnCalls:
    """NVAE draws by normal_ on a copy of μ, with a jitted σ; it samples from the top, and counts KL from the top.

    Args:
        model: the stand-in.
        t: temperature of its sampler.
        as_density: log p(x | z) instead of the mean.
    """

    def normal(mu: Tensor, log_sigma: Tensor, factor: float = 1.0) -> Normal:
        mu, log_sigma = mu.div(5).tanh_().mul(5), log_sigma.div(5).tanh_().mul(5)
        return Normal(mu, (torch.exp(log_sigma) + 1e-2) * factor)

    def draw(d: Normal) -> Tensor:
        noise = d.loc.mul(0).normal_()
        return noise.mul_(d.scale).add_(d.loc)

    def run(x: Tensor | None, n: int) -> tuple[Tensor, list[Tensor]]:
        combiners: list[Any] = []
        kls: list[Tensor] = []
        if x is None:
            z = draw(normal(torch.zeros(n, *model.z0_size), torch.zeros(n, *model.z0_size), t))
            side = z
        else:
            side = model.stem(2 * x - 1)
            for cell in model.pre_process:
                side = cell(side)
            for cell in model.enc_tower:
                if cell.cell_type == "combiner_enc":
                    combiners.insert(0, (cell, side))
                else:
                    side = cell(side)
            side = model.enc0(side)
            mu, log_sigma = model.enc_sampler[0](side).chunk(2, 1)
            z = posterior(mu, log_sigma, torch.zeros_like(mu), torch.zeros_like(mu), side, 0, kls)
        s, group = model.prior_ftr0.expand(n, -1, -1, -1), 0
        for cell in model.dec_tower:
            if cell.cell_type != "combiner_dec":
                s = cell(s)
                continue
            if group:
                mu_p, log_sigma_p = model.dec_sampler[group - 1](s).chunk(2, 1)
                if x is None:
                    z = draw(normal(mu_p, log_sigma_p, t))
                else:
                    combine, below = combiners[group - 1]
                    side = combine(below, s)
                    mu, log_sigma = model.enc_sampler[group](side).chunk(2, 1)
                    if model.res_dist:
                        mu, log_sigma = mu_p + mu, log_sigma_p + log_sigma
                    z = posterior(mu, log_sigma, mu_p, log_sigma_p, side, group, kls)
            s, group = cell(s, z), group + 1
        if model.vanilla_vae:
            s = model.stem_decoder(z)
        for cell in model.post_process:
            s = cell(s)
        return model.image_conditional(s), kls

    def posterior(
        mu: Tensor, log_sigma: Tensor, mu_p: Tensor, log_sigma_p: Tensor, side: Tensor, group: int, kls: list[Tensor]
    ) -> Tensor:
        q, p = normal(mu, log_sigma), normal(mu_p, log_sigma_p)
        z = draw(q)
        log_q = q.log_prob(z)
        for flow in model.nf_cells[group * model.num_flows : (group + 1) * model.num_flows]:
            z, log_det = flow(z, side)
            log_q = log_q - log_det
        kls.append(total(log_q - p.log_prob(z) if model.num_flows else kl_divergence(q, p)))
        return z

    def image(logits: Tensor, x: Tensor | None) -> Any:
        edge = 2 if model.crop_output else 0
        logits = logits[..., edge : -edge or None, edge : -edge or None]
        output = model.decoder_output(logits)
        if isinstance(output, Bernoulli):
            return output if as_density else output.mean
        if model.decoder == "normal":
            d = Normal(output.dist.mu, output.dist.sigma)
            return total(d.log_prob(2 * x - 1)) if as_density and x is not None else ((d.mean + 1) / 2).clamp(0, 1)
        if as_density and x is not None:
            swapped = (part.transpose(1, 2) for part in (output.means, output.log_scales, output.coeffs))
            return DiscretizedLogisticMixture(output.logit_probs, *swapped, bottom=-0.999, top=0.99).log_prob(2 * x - 1)
        weights = output.logit_probs.softmax(1)  # its mean takes the parameters' averages, (batch, 3, height, width)
        loc, c = (torch.einsum("nmhw,ncmhw->nchw", weights, part) for part in (output.means, output.coeffs))
        red = loc[:, 0].clamp(-1, 1)
        green = (loc[:, 1] + c[:, 0] * red).clamp(-1, 1)
        blue = (loc[:, 2] + c[:, 1] * red + c[:, 2] * green).clamp(-1, 1)
        return (torch.stack([red, green, blue], 1) + 1) / 2

    def padded(x: Tensor) -> Tensor:
        return F.pad(x, (2,) * 4) if model.crop_output else x

    return OwnCalls(
        lambda x: image(run(padded(x), len(x))[0], x),
        lambda n: image(run(None, n)[0], None),
        lambda x: run(padded(x), len(x))[1][::-1],
        run,
    )


# ----------------------------------------------------------------------------------------------------------------- VDVAE


def vdvae_calls(
    model: Any, x: Tensor, t: Sequence[float] = (1.0,) * 5, mean: float = 120.63838, deviation: float = 64.16736
) -> OwnCalls:
    """VDVAE draws by normal_ on an empty tensor, updates its features in place, and counts KL per block, from the top.

    Args:
        model: the stand-in.
        x: observations of which the sampler says log p(x | z).
        t: temperature of every block, from the top.
        mean: of the pixels.
        deviation: of the pixels.
    """
    decoder = model.decoder
    bins = 31.0 if model.H.dataset == "ffhq_256" else 255.0

    def draw(mu: Tensor, log_sigma: Tensor) -> Tensor:
        return torch.exp(log_sigma) * torch.empty_like(mu).normal_(0.0, 1.0) + mu

    def run(activations: dict[int, Tensor] | None, n: int) -> tuple[Tensor, list[Tensor]]:
        xs = {b.shape[2]: b.repeat(n, 1, 1, 1) for b in decoder.bias_xs}
        kls = []
        for block, factor in zip(decoder.dec_blocks, t, strict=True):
            h = xs[block.base] if block.base in xs else torch.zeros(n, block.widths[block.base], block.base, block.base)
            if block.mixin is not None:
                h = h + F.interpolate(xs[block.mixin][:, : h.shape[1]], scale_factor=block.base // block.mixin)
            features = block.prior(h)
            mu_p, log_sigma_p = features[:, : block.zdim], features[:, block.zdim : 2 * block.zdim]
            if activations is None:
                z = draw(mu_p, log_sigma_p + torch.ones_like(log_sigma_p) * torch.tensor(factor).log())
            else:
                mu, log_sigma = block.enc(torch.cat([h, activations[block.base]], 1)).chunk(2, 1)
                z = draw(mu, log_sigma)
                spread = log_sigma.exp() ** 2 + (mu - mu_p) ** 2
                kls.append(-0.5 + log_sigma_p - log_sigma + 0.5 * spread / log_sigma_p.exp() ** 2)
            xs[block.base] = block.resnet(h + features[:, 2 * block.zdim :] + block.z_proj(z))
        return decoder.final_fn(xs[8]), kls

    def log_p(features: Tensor, x: Tensor) -> Tensor:
        parameters = decoder.out_net(features).permute(0, 3, 1, 2)
        level = 255 * x if bins == 255 else torch.floor((255 * x).round() / 8) * 8
        mixture = DiscretizedLogisticMixture.from_channels(parameters, levels=int(bins) + 1, bottom=-0.999, top=0.999)
        return mixture.log_prob(level / 127.5 - 1)

    def encoded(x: Tensor) -> dict[int, Tensor]:
        return model.encoder(((255 * x - mean) / deviation).permute(0, 2, 3, 1))

    return OwnCalls(
        lambda y: log_p(run(encoded(y), len(y))[0], y),
        lambda n: log_p(run(None, n)[0], x),
        lambda y: run(encoded(y), len(y))[1][::-1],
        run,
    )


# ------------------------------------------------------------------------------------------------------------- deep VAEs


def deep_calls(model: Any, as_density: bool = False) -> OwnCalls:
    """The deep VAEs draw by rsample, count log q − log p at the draw, z_1 first, and draw an observation on the way.

    Args:
        model: the stand-in.
        as_density: log p(x | z) instead of the mean, and for samples a draw of it.
    """

    def normal(stochastic: Any, mu: Tensor, sigma: Tensor) -> Normal:
        return Normal(mu, torch.clamp(sigma, min=stochastic.min_scale, max=stochastic.max_scale))

    def run(x: Tensor | None, n: int) -> tuple[Any, list[Tensor]]:
        found: list[Any] = []
        if x is not None:
            data = model.stages[0].IO(x=x if model.pad is None else F.pad(x, model.pad))
            for stage in model.stages:
                data, here = stage.infer(data)
                found.append(here)
        features: Any = None
        skips, kls = None, []
        for i in range(len(model.stages) - 1, -1, -1):
            stage = model.stages[i]
            if features is None:
                logits = stage.stochastic.prior_logits.expand(n, *stage.stochastic.prior_logits.shape)
                p = normal(stage.stochastic, *stage.stochastic.logits_to_mu_and_sigma(logits))
            else:
                p = normal(stage.stochastic, *stage.stochastic.compute_params(features, inference=False))
            if x is None:
                z = p.rsample()
            else:
                if hasattr(stage, "merge"):
                    merged = stage.merge(found[i].h, aux=features)
                    q = normal(stage.stochastic, *stage.stochastic.compute_params(merged, inference=True))
                    z = q.rsample()
                else:
                    q, z = found[i].dist, found[i].z
                kls.insert(0, total(q.log_prob(z) - p.log_prob(z)))
            features, skips = stage.p_deterministic(stage.p_projection(z), skips)
            skips = skips if model.skip_stochastic else None
        return likelihood(features if model.pad is None else F.pad(features, model.unpad)), kls

    def likelihood(features: Tensor) -> Any:
        module = model.likelihood
        if module.kind == "bernoulli":
            return Bernoulli(**module.get_distribution_kwargs(module.activation(features)))
        given = module.get_distribution_kwargs(features)
        if module.kind == "mixture":
            return Halved(DiscretizedLogisticMixture.from_channels(given["all_params"], bottom=-0.999, top=0.999))
        n = module.n_bins
        scale = given["logscale"].exp() * n / (n - 1)
        return DiscretizedLogistic((given["mean"] - 0.5 / n) * n / (n - 1), scale, n, floor=1e-7)

    def seen(x: Tensor) -> Tensor:
        return x if model.lambda_init is None else model.lambda_init(x)

    def reconstruct(x: Tensor) -> Any:
        p = run(seen(x), len(x))[0]
        p.sample()  # as the repository does, whether it is asked for or not
        return total(p.log_prob(seen(x)).reshape(len(x), -1)) if as_density else p.mean

    def sample(n: int) -> Any:
        p = run(None, n)[0]
        return p.sample() if as_density else p.mean

    return OwnCalls(reconstruct, sample, lambda x: run(seen(x), len(x))[1], run)


class Halved:
    """A mixture on [−1, 1], seen from [0, 1]."""

    def __init__(self, base: DiscretizedLogisticMixture) -> None:
        self.base = base

    @property
    def mean(self) -> Tensor:
        return (self.base.mean + 1) / 2

    def sample(self) -> Tensor:
        return (self.base.sample() + 1) / 2

    def log_prob(self, x: Tensor) -> Tensor:
        return self.base.log_prob(2 * x - 1)
