"""`DeepVAEAdapter`: skip connections, and the likelihood modules in their own units."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from stand_ins import DeepVAE, perturbed
from zoo import likelihood_at_ones, ones

from energy_prior import GeneratorError
from energy_prior.adapters import DeepVAEAdapter
from energy_prior.topdown import TopDown


def test_likelihood_units() -> None:
    """The discretised logistic of bins in the middle of [0, 1]/n, and what `lambda_init` does to x."""
    model = perturbed(DeepVAE("logistic"))
    adapter = DeepVAEAdapter(model)
    x = torch.randint(0, 256, (2, 10)) / 255
    with torch.no_grad():
        state = TopDown(adapter, 2).descend(ones(adapter), "noise", to_observation=True).state
        found = adapter.likelihood(state).log_prob(x)
        p = model.likelihood.get_distribution_kwargs(F.pad(state.features, model.unpad))  # type: ignore[union-attr,operator]
    left = torch.floor((x * 255 / 256 + 1 / 512) * 256) / 256
    s = p["logscale"].exp()
    upper = torch.where(left < 255 / 256, torch.sigmoid((left + 1 / 256 - p["mean"]) / s), torch.ones(()))
    lower = torch.where(left > 0, torch.sigmoid((left - p["mean"]) / s), torch.zeros(()))
    torch.testing.assert_close(found, torch.log(upper - lower + 1e-7).sum(1), rtol=1e-4, atol=1e-4)
    adapter.model.lambda_init = lambda x: 1 - x
    with torch.no_grad():
        torch.testing.assert_close(adapter.likelihood(state).log_prob(1 - x), found, rtol=1e-4, atol=1e-4)


def test_two_descents_from_one_state() -> None:
    """The blocks of these models empty the list of skip connections that they are given; the state must not notice."""
    adapter = DeepVAEAdapter(perturbed(DeepVAE()))
    with torch.no_grad():
        state = adapter.descend(adapter.start(2), torch.ones(2, 3), 3)
        first, second = (adapter.descend(state, torch.zeros(2, 3), 2) for _ in range(2))
    assert len(state.skips) == 2  # type: ignore[arg-type]
    torch.testing.assert_close(first.features, second.features)


def test_models_of_another_kind_are_refused() -> None:
    model = DeepVAE().eval()
    del model.stages[1].stochastic
    with pytest.raises(GeneratorError, match="a Stage has two latents per stage"):
        DeepVAEAdapter(model)
    with pytest.raises(GeneratorError, match="its likelihood module, PixelModule, is not known"):
        likelihood_at_ones(DeepVAEAdapter(perturbed(DeepVAE("unknown"))))
