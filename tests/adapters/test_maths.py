"""Every number of the adapters against the published forward passes, written out step by step for the stand-ins."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stand_ins import NVAE, VDVAE, DeepVAE, perturbed
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Normal

from energy_prior import ResidualVAE
from energy_prior.adapters import DeepVAEAdapter, NVAEAdapter, VDVAEAdapter
from energy_prior.generators.likelihoods import DiscretizedLogisticMixture
from energy_prior.generators.pixels import PixelLikelihood
from energy_prior.topdown import TopDown, inferred_descent

N = 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def eight_bit(*shape: int) -> Tensor:
    """Of all levels, the lowest, the highest and the one below it among them."""
    x = torch.randint(0, 256, shape) / 255
    x.view(-1)[::7], x.view(-1)[1::7], x.view(-1)[2::7] = 0.0, 1.0, 254 / 255
    return x


def dequantised(*shape: int) -> Tensor:
    """(level + u)/256 with u uniform, as in JakobHavtorn/hvae-oodd; of the two levels at either end more than their share."""
    levels = torch.randint(0, 256, shape)
    for i, level in enumerate((0, 255, 1, 254)):
        levels.view(-1)[i::7] = level
    return (levels + torch.rand(shape)) / 256


IMAGES = pytest.mark.parametrize("observations", [eight_bit, dequantised])


def pixelcnn(
    logits: Tensor, means: Tensor, log_scales: Tensor, coefficients: Tensor, y: Tensor, bins: float = 255.0, top: float = 0.999
) -> Tensor:
    """PixelCNN++'s mixture (Salimans et al., ICLR 2017): logits (batch, M, …), the others (batch, 3, M, …), y in [−1, 1]."""
    y = y[:, :, None].double()
    logits, means, log_scales, c = (t.double() for t in (logits, means, log_scales, coefficients))
    green = means[:, 1] + c[:, 0] * y[:, 0]
    blue = means[:, 2] + c[:, 1] * y[:, 0] + c[:, 2] * y[:, 1]
    centred = y - torch.stack([means[:, 0], green, blue], 1)
    above = torch.sigmoid((centred + 1 / bins) / log_scales.exp())
    below = torch.sigmoid((centred - 1 / bins) / log_scales.exp())
    mass = torch.where(y < -0.999, above, torch.where(y > top, 1 - below, above - below))
    return torch.logsumexp(logits.log_softmax(1) + mass.log().sum(1), 1).sum((1, 2)).float()


def from_channels(parameters: Tensor, mixtures: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The layout of PixelCNN++: logits, then for every colour M means, M log scales and M coefficients."""
    rest = parameters[:, mixtures:].reshape(len(parameters), 3, 3 * mixtures, *parameters.shape[2:])
    log_scales = rest[:, :, mixtures : 2 * mixtures].clamp(min=-7)
    return parameters[:, :mixtures], rest[:, :, :mixtures], log_scales, torch.tanh(rest[:, :, 2 * mixtures :])


def total(log_prob: Tensor) -> Tensor:
    return log_prob.flatten(1).sum(1)


def assert_layers(adapter: Any, x: Tensor, reference: Callable[[Sequence[Tensor]], Any]) -> Distribution:
    """log q, log p of each layer and log p(x | z) at one draw; the reference takes and gives z_L first; returns p(x | z)."""
    with torch.no_grad():
        inferred = adapter.infer(x)
        descent = inferred_descent(adapter, inferred)
        likelihood: Distribution = adapter.likelihood(descent.state)
        log_q, log_p, log_likelihood = reference(inferred.latents[::-1])
        torch.testing.assert_close(inferred.log_q, torch.stack(log_q[::-1], 1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(descent.log_priors(), torch.stack(log_p[::-1], 1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(likelihood.log_prob(x), log_likelihood, rtol=1e-4, atol=1e-3)
    return likelihood


# ------------------------------------------------------------------------------------------------------------------ NVAE


def nvae_forward(model: Any, x: Tensor, z: Sequence[Tensor], t: float) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """log q and log p of every group from the top, and what the image's parameters are made of."""

    def normal(mu: Tensor, log_sigma: Tensor, factor: float = 1.0) -> Normal:
        mu, log_sigma = 5 * torch.tanh(mu / 5), 5 * torch.tanh(log_sigma / 5)
        return Normal(mu, (torch.exp(log_sigma) + 0.01) * factor)

    s = model.stem(2 * x - 1)
    for cell in model.pre_process:
        s = cell(s)
    combiners: list[Any] = []
    for cell in model.enc_tower:
        if cell.cell_type == "combiner_enc":
            combiners.insert(0, (cell, s))
        else:
            s = cell(s)
    side = model.enc0(s)
    mu, log_sigma = model.enc_sampler[0](side).chunk(2, 1)
    q, p = normal(mu, log_sigma), normal(torch.zeros_like(mu), torch.zeros_like(mu), t)
    log_q, log_p = [], []

    def account(group: int) -> None:
        value, log_det = z[group], torch.zeros(len(x))
        for flow in reversed(model.nf_cells[group * model.num_flows : (group + 1) * model.num_flows]):
            log_a, b = flow.net(side).chunk(2, 1)
            value, log_det = (value - b) / log_a.exp(), log_det + total(log_a)
        log_q.append(total(q.log_prob(value)) - log_det)
        log_p.append(total(p.log_prob(z[group])))

    if model.vanilla_vae:
        account(0)
        s = model.stem_decoder(z[0])
    else:
        s, group = model.prior_ftr0.expand(len(x), -1, -1, -1), 0
        for cell in model.dec_tower:
            if cell.cell_type != "combiner_dec":
                s = cell(s)
                continue
            if group:
                mu_p, log_sigma_p = model.dec_sampler[group - 1](s).chunk(2, 1)
                combine, below = combiners[group - 1]
                side = combine(below, s)
                mu, log_sigma = model.enc_sampler[group](side).chunk(2, 1)
                p = normal(mu_p, log_sigma_p, t)
                q = normal(mu_p + mu, log_sigma_p + log_sigma) if model.res_dist else normal(mu, log_sigma)
            account(group)
            s, group = cell(s, z[group]), group + 1
    for cell in model.post_process:
        s = cell(s)
    return log_q, log_p, model.image_conditional(s)


@pytest.mark.parametrize("t", [1.0, 0.7])
@pytest.mark.parametrize(
    ("flows", "residual", "vanilla"), [(0, True, False), (2, True, False), (1, False, False), (1, True, True)]
)
def test_nvae(flows: int, residual: bool, vanilla: bool, t: float) -> None:
    model = perturbed(NVAE("normal", flows, residual, vanilla))
    x, mean = eight_bit(N, 3, 16, 16), []

    def reference(z: Sequence[Tensor]) -> Any:
        log_q, log_p, parameters = nvae_forward(model, x, z, t)
        mu, log_sigma = (5 * torch.tanh(v / 5) for v in parameters.chunk(2, 1))
        mean.append(((mu + 1) / 2).clamp(0, 1))
        return log_q, log_p, total(Normal(mu, log_sigma.exp() + 0.01).log_prob(2 * x - 1))

    likelihood = assert_layers(NVAEAdapter(model, prior_temperature=t), x, reference)
    torch.testing.assert_close(likelihood.mean, mean[0], rtol=1e-4, atol=1e-5)


@IMAGES
@pytest.mark.parametrize("bits", [8, 5])
def test_nvae_mixture(bits: int, observations: Callable[..., Tensor]) -> None:
    """Its highest bin starts at 0.99, which takes in the level below the highest of 8 bits."""
    model: Any = perturbed(NVAE("mixture"))
    original = model.decoder_output

    def decoder_output(parameters: Tensor) -> Any:
        found = original(parameters)
        found.max_val = 2.0**bits - 1
        return found

    model.num_bits, model.decoder_output = bits, decoder_output
    x = observations(N, 3, 16, 16)
    seen = x if bits == 8 else torch.floor(x * 255 / 8) / 31

    def reference(z: Sequence[Tensor]) -> Any:
        log_q, log_p, parameters = nvae_forward(model, seen, z, 1.0)
        rest = parameters[:, 2:].unflatten(1, (3, 6))
        mixture = parameters[:, :2], rest[:, :, :2], rest[:, :, 2:4].clamp(min=-7), torch.tanh(rest[:, :, 4:])
        return log_q, log_p, pixelcnn(*mixture, 2 * seen - 1, bins=2.0**bits - 1, top=0.99)

    assert_layers(NVAEAdapter(model), x, reference)


def test_nvae_bernoulli() -> None:
    model = perturbed(NVAE("bernoulli"))
    x = (torch.rand(N, 1, 12, 12) > 0.5).float()
    padded = F.pad(x, (2, 2, 2, 2))

    def reference(z: Sequence[Tensor]) -> Any:
        log_q, log_p, logits = nvae_forward(model, padded, z, 1.0)
        return log_q, log_p, total(Bernoulli(logits=logits).log_prob(padded)[:, :, 2:14, 2:14])

    assert_layers(NVAEAdapter(model), x, reference)


# ----------------------------------------------------------------------------------------------------------------- VDVAE


@pytest.mark.parametrize(
    ("dataset", "mean", "deviation", "bins"),
    [("cifar10", 120.63838, 64.16736, 255.0), ("ffhq_256", 112.8666757481, 69.84780273, 31.0)],
)
@pytest.mark.parametrize("t", [(1.0,) * 5, (0.9, 0.8, 0.7, 0.6, 0.5)])
@IMAGES
def test_vdvae(
    dataset: str, mean: float, deviation: float, bins: float, t: tuple[float, ...], observations: Callable[..., Tensor]
) -> None:
    """Temperatures here are in the order of the model's blocks, from the top."""
    model: Any = perturbed(VDVAE(dataset))
    x = observations(N, 3, 8, 8)

    def reference(z: Sequence[Tensor]) -> Any:
        activations = model.encoder(((255 * x - mean) / deviation).permute(0, 2, 3, 1))
        xs = {b.shape[2]: b.expand(N, -1, -1, -1) for b in model.decoder.bias_xs}
        log_q, log_p = [], []
        for block, value, factor in zip(model.decoder.dec_blocks, z, t, strict=True):
            h = xs[block.base] if block.base in xs else torch.zeros(N, block.widths[block.base], block.base, block.base)
            if block.mixin is not None:
                h = h + F.interpolate(xs[block.mixin][:, : h.shape[1]], scale_factor=block.base // block.mixin, mode="nearest")
            mu_q, log_sigma_q = block.enc(torch.cat([h, activations[block.base]], 1)).chunk(2, 1)
            features = block.prior(h)
            mu_p, log_sigma_p = features[:, : block.zdim], features[:, block.zdim : 2 * block.zdim]
            log_q.append(total(Normal(mu_q, log_sigma_q.exp()).log_prob(value)))
            log_p.append(total(Normal(mu_p, factor * log_sigma_p.exp()).log_prob(value)))
            xs[block.base] = block.resnet(h + features[:, 2 * block.zdim :] + block.z_proj(value))
        parameters = model.decoder.out_net(model.decoder.final_fn(xs[8])).permute(0, 3, 1, 2)
        level = 255 * x if bins == 255 else torch.floor((255 * x).round() / 8) * 8
        mixture = from_channels(parameters, parameters.shape[1] // 10)
        return log_q, log_p, pixelcnn(*mixture, level / 127.5 - 1, bins=bins)

    adapter = VDVAEAdapter(model, prior_temperature=t[::-1])
    likelihood = assert_layers(adapter, x, reference)
    base: Any = likelihood
    torch.testing.assert_close(likelihood.mean, ((base.base.mean + 1) / 2).clamp(0, 1))


# ------------------------------------------------------------------------------------------------------------- deep VAEs


@pytest.mark.parametrize("ladder", [False, True])
@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize(
    ("kind", "observations"),
    [
        ("bernoulli", lambda *shape: (torch.rand(shape) > 0.5).float()),
        ("logistic", eight_bit),
        ("logistic", dequantised),
        ("mixture", eight_bit),
        ("mixture", dequantised),
    ],
)
def test_deep_vae(kind: str, observations: Callable[..., Tensor], skips: bool, ladder: bool) -> None:
    """Clamped scales, observations that are transformed first, padding, and every likelihood module written out."""
    model: Any = perturbed(DeepVAE(kind, ladder, skips))
    for stage in model.stages:
        stage.stochastic.min_scale, stage.stochastic.max_scale = 0.6, 0.8
    model.lambda_init = lambda x: 1 - x
    x = observations(N, *((3, 2, 2) if kind == "mixture" else (10,)))
    if kind == "logistic":  # in double precision, and so sharp that the floor of 1e-7 under every probability counts
        model, x = model.double(), x.double()
        with torch.no_grad():
            model.likelihood.net.weight.mul_(20)

    def reference(z: Sequence[Tensor]) -> Any:
        log_q, log_p = [], []
        top = model.stages[2].stochastic
        features, aux = None, None
        changed, h, hidden = (1 - x if model.pad is None else F.pad(1 - x, [1, 1])).flatten(1), 0, []
        for i in range(3):  # bottom-up; without a ladder through the draws
            h = torch.tanh(model.stages[i].q_deterministic(changed)) + h
            hidden.append(h)
            changed = h if ladder else model.stages[i].lift(z[2 - i])
        mu, sigma = top.logits_to_mu_and_sigma(top.prior_logits.expand(N, 6))
        for i in (2, 1, 0):
            stage, value = model.stages[i], z[2 - i]
            log_p.append(total(Normal(mu, sigma.clamp(0.6, 0.8)).log_prob(value)))
            if ladder:
                hidden[i] = stage.merge(hidden[i], aux=features)
            mu_q, sigma_q = stage.stochastic.compute_params(hidden[i], inference=True)
            log_q.append(total(Normal(mu_q, sigma_q.clamp(0.6, 0.8) if ladder else sigma_q).log_prob(value)))
            features, aux = stage.p_deterministic(stage.p_projection(value), None if aux is None else list(aux))
            aux = aux if skips else None
            if i:
                mu, sigma = model.stages[i - 1].stochastic.compute_params(features, inference=False)
        h = features if model.pad is None else features[:, 1:-1]
        module, y = model.likelihood, 1 - x
        if kind == "bernoulli":
            return log_q, log_p, total(Bernoulli(logits=module.net(F.leaky_relu(h))).log_prob(y))
        raw = module.net(h)
        if kind == "mixture":
            return log_q, log_p, pixelcnn(*from_channels(raw.unflatten(1, (20, 2, 2)), 2), 2 * y - 1)
        loc, log_scale = raw.chunk(2, 1)
        loc, scale = loc + 0.5, (log_scale - 1).exp()
        left = torch.floor((y * (255 / 256) + 1 / 512) * 256) / 256  # the left edge of the bin that y is in
        upper = torch.where(left < 255 / 256, torch.sigmoid((left + 1 / 256 - loc) / scale), torch.ones_like(loc))
        lower = torch.where(left >= 1 / 256, torch.sigmoid((left - loc) / scale), torch.zeros_like(loc))
        return log_q, log_p, total((upper - lower + 1e-7).log())

    assert_layers(DeepVAEAdapter(model), x, reference)


# --------------------------------------------------------------------------------------------------- our own likelihoods


def test_channels_of_a_mixture_are_those_of_pixelcnn() -> None:
    parameters = 2 * torch.randn(N, 50, 3, 2)
    parameters[:, 5:] -= 4.0  # log scales on both sides of −7
    found = DiscretizedLogisticMixture.from_channels(parameters)
    logits, means, log_scales, coefficients = from_channels(parameters, 5)
    torch.testing.assert_close(found.logits, logits)
    torch.testing.assert_close(found.loc.transpose(1, 2), means)
    torch.testing.assert_close(found.log_scale.transpose(1, 2), log_scales)
    assert bool((log_scales == -7).any())
    assert found.coefficients is not None
    torch.testing.assert_close(found.coefficients.transpose(1, 2), coefficients)


@IMAGES
@pytest.mark.parametrize("top", [0.999, 0.99])
def test_mixture_with_published_edges(top: float, observations: Callable[..., Tensor]) -> None:
    """The tails open below −0.999, and above 0.999 or, in NVAE, 0.99."""
    parameters, y = torch.randn(N, 50, 6, 5), 2 * observations(N, 3, 6, 5) - 1
    ours = DiscretizedLogisticMixture.from_channels(parameters, bottom=-0.999, top=top).log_prob(y)
    torch.testing.assert_close(ours, pixelcnn(*from_channels(parameters, 5), y, top=top), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["mixture", "discretized_logistic", "gaussian"])
def test_pixels_in_another_range(name: Any) -> None:
    """x in [−1, 1] has the probabilities of (x + 1)/2 in [0, 1]; densities halve with the unit."""
    x = eight_bit(N, 3, 4, 4)
    here = PixelLikelihood((3, 4, 4), name, sigma=None if name == "mixture" else 0.1)
    wide = PixelLikelihood((3, 4, 4), name, sigma=None if name == "mixture" else 0.2, x_range=(-1.0, 1.0))
    parameters = torch.randn(N, here.channels, 4, 4)
    halved = 48 * math.log(2) if name == "gaussian" else 0.0
    a, b = here(parameters), wide(parameters)
    torch.testing.assert_close(a.log_prob(x), b.log_prob(2 * x - 1) + halved, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(2 * a.mean - 1, b.mean, rtol=1e-5, atol=1e-5)


def test_residual_vae_in_another_range() -> None:
    """The encoder sees x in [−1, 1], whatever the range is."""
    keywords: dict[str, Any] = {"groups": (2, 1), "channels": 8, "latent_channels": 2, "levels": 256}
    here, wide = (ResidualVAE((3, 8, 8), **keywords, x_range=r).eval() for r in ((0.0, 1.0), (-1.0, 1.0)))
    wide.load_state_dict(here.state_dict())
    x = eight_bit(N, 3, 8, 8)
    seen: list[Tensor] = []
    here.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        a = here.infer(x, rng=torch.Generator().manual_seed(1))
        b = wide.infer(2 * x - 1, rng=torch.Generator().manual_seed(1))
        for z, w in zip(a.latents, b.latents, strict=True):
            torch.testing.assert_close(z, w, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen[0], 2 * x - 1)
        pair = [
            vae.likelihood(TopDown(vae, N).descend(a.latents, "latent", to_observation=True).state).log_prob(y)
            for vae, y in ((here, x), (wide, 2 * x - 1))
        ]
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-2)
