"""`NVAEAdapter`: clamps, temperature, residual posteriors, flows, and what wrapping does to the model."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from stand_ins import NVAE, perturbed
from zoo import likelihood_at_ones

from energy_prior import ArgumentError, GeneratorError, JointEBMPrior
from energy_prior.adapters import NVAEAdapter
from energy_prior.generators.likelihoods import DiscretizedLogisticMixture


def test_clamps_and_temperature() -> None:
    """σ = exp(5 tanh(log σ/5)) + 0.01, times t; z_4, the top, too, where that is 1.01."""
    model = perturbed(NVAE())
    with torch.no_grad():
        model.dec_sampler[0].bias.copy_(torch.tensor([50.0, -50.0, 50.0, -50.0]))  # type: ignore[union-attr,operator]
    for t in (1.0, 0.6):
        adapter = NVAEAdapter(model, prior_temperature=t)
        top = adapter.conditional(adapter.start(2), 4)
        torch.testing.assert_close(top.scale, torch.full_like(top.scale, 1.01 * t))
        with torch.no_grad():
            below = adapter.conditional(adapter.descend(adapter.start(2), torch.zeros(2, 2, 4, 4), 4), 3)
        edge = 5 * math.tanh(10 - 0.01)  # the features move the bias of ±50 by less than 0.05
        torch.testing.assert_close(below.loc[:, 0], torch.full((2, 4, 4), edge), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(below.loc[:, 1], torch.full((2, 4, 4), -edge), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(below.scale[:, 0], torch.full((2, 4, 4), t * (math.exp(edge) + 0.01)), rtol=1e-4, atol=0)
        torch.testing.assert_close(below.scale[:, 1], torch.full((2, 4, 4), t * (math.exp(-edge) + 0.01)), rtol=1e-4, atol=0)


def test_it_stores_normalised_weights_in_training_mode_only() -> None:
    """Its regularisation needs them there; elsewhere the result is the same without a write to the model."""
    model = perturbed(NVAE())
    conv, features = model.pre_process[0].conv, torch.randn(2, 6, 8, 8)  # type: ignore[union-attr,index]
    expected = conv(features)
    NVAEAdapter(model)
    kept = conv.weight_normalized
    torch.testing.assert_close(conv(features), expected)
    assert conv.weight_normalized is kept
    model.train()
    torch.testing.assert_close(conv(features), expected)
    assert conv.weight_normalized is not kept


def test_a_wrapped_model_can_still_be_saved() -> None:
    model: Any = perturbed(NVAE())
    features = torch.randn(2, 6, 8, 8)
    expected = model.pre_process[0].conv(features)
    NVAEAdapter(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)  # a whole model, which this test has just written itself
    torch.testing.assert_close(again.pre_process[0].conv(features), expected)


@pytest.mark.parametrize("residual", [True, False])
def test_posterior_is_residual_before_the_clamp(residual: bool) -> None:
    model = perturbed(NVAE(residual=residual))
    adapter = NVAEAdapter(model)
    with torch.no_grad():
        state = adapter.descend(adapter.start(2), torch.randn(2, 2, 4, 4), 4)
        features = torch.randn_like(state)
        q = adapter.posterior(state, features, 3)
        mu, log_sigma = model.enc_sampler[1](features).chunk(2, 1)  # type: ignore[union-attr,index]
        if residual:
            mu_p, log_sigma_p = model.dec_sampler[0](state).chunk(2, 1)  # type: ignore[union-attr,index]
            mu, log_sigma = mu + mu_p, log_sigma + log_sigma_p
    torch.testing.assert_close(q.loc, 5 * torch.tanh(mu / 5))
    torch.testing.assert_close(q.scale, torch.exp(5 * torch.tanh(log_sigma / 5)) + 0.01)


def test_flows_change_log_q_by_their_log_determinant() -> None:
    """z -> 2 z + 1 of every element: log q falls by log 2 for each."""
    model = NVAE("normal", flows=1, vanilla=True).eval()
    with torch.no_grad():
        flow = model.nf_cells[0].net  # type: ignore[union-attr]
        flow.weight.zero_()  # type: ignore[union-attr,operator]
        flow.bias.zero_()  # type: ignore[union-attr,operator]
        adapter, x = NVAEAdapter(model), torch.rand(2, 3, 16, 16)
        plain = adapter.infer(x, rng=torch.Generator().manual_seed(1))
        flow.bias.copy_(torch.tensor([math.log(2), math.log(2), 1.0, 1.0]))  # type: ignore[union-attr,operator]
        moved = adapter.infer(x, rng=torch.Generator().manual_seed(1))
    torch.testing.assert_close(moved.latents[0], 2 * plain.latents[0] + 1)
    torch.testing.assert_close(moved.log_q, plain.log_q - 32 * math.log(2), rtol=1e-5, atol=1e-4)


def test_border_and_bits() -> None:
    """Images of MNIST come without the border that NVAE pads; those of 5 bits are rounded down to its grid."""
    adapter = NVAEAdapter(perturbed(NVAE("bernoulli")))
    assert adapter.x_shape == (1, 12, 12)
    adapter = NVAEAdapter(perturbed(NVAE("normal")))
    adapter.model.num_bits = 5
    with torch.no_grad():
        likelihood = likelihood_at_ones(adapter, 1)
        levels = [torch.full((1, 3, 16, 16), v / 255) for v in (8.0, 15.0, 16.0)]
        a, b, c = (likelihood.log_prob(x) for x in levels)
    assert torch.equal(a, b)
    assert not torch.equal(b, c)
    logits = likelihood.base.base_dist  # type: ignore[attr-defined]
    expected = logits.log_prob(2 * torch.full((1, 3, 16, 16), 1 / 31) - 1).sum((1, 2, 3))
    torch.testing.assert_close(a, expected)


def test_langevin_leaves_the_image_tower_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = perturbed(NVAE())
    prior = JointEBMPrior(NVAEAdapter(model))
    monkeypatch.setattr(model.image_conditional, "forward", pytest.fail)
    prior.sample_latents(2, steps=3)


def test_unknown_decoders_and_temperatures_are_refused() -> None:
    with pytest.raises(GeneratorError, match="decoder_output gives SimpleNamespace; expected Bernoulli"):
        likelihood_at_ones(NVAEAdapter(perturbed(NVAE("unknown"))))
    for value in (0, "0.7", True, float("nan")):
        with pytest.raises(ArgumentError, match="prior_temperature: expected a finite number"):
            NVAEAdapter(NVAE().eval(), prior_temperature=value)  # type: ignore[arg-type]


def test_the_mean_of_a_mixture_is_that_of_nvaes_samples() -> None:
    """Averages of the components first, then the colours one after the other."""
    torch.manual_seed(0)
    likelihood = likelihood_at_ones(NVAEAdapter(perturbed(NVAE())))
    base = likelihood.base
    weights = base.logits.softmax(1)[:, :, None]
    red, green, blue = (base.loc * weights).sum(1).unbind(1)
    c1, c2, c3 = (base.coefficients * weights).sum(1).unbind(1)
    red = red.clamp(-1, 1)
    green = (green + c1 * red).clamp(-1, 1)
    blue = (blue + c2 * red + c3 * green).clamp(-1, 1)
    torch.testing.assert_close(likelihood.mean, torch.stack([red, green, blue], 1) / 2 + 0.5)
    exact = DiscretizedLogisticMixture(base.logits, base.loc, base.log_scale, base.coefficients).mean / 2 + 0.5
    assert float((likelihood.mean - exact).detach().abs().max()) > 1e-4
