"""`BIVAAdapter`: every number against a stand-in's step-by-step pass, the order of its layers, models that it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_ins import DeepVAE, perturbed
from stand_ins_biva import DeepVae, ready
from torch import Tensor
from torch.distributions import Bernoulli

from energy_prior import ArgumentError, GeneratorError, JointEBMPrior, check_generator
from energy_prior.adapters import BIVAAdapter, load_weights
from energy_prior.checkpoint import fingerprint
from energy_prior.generators.likelihoods import DiscretizedLogisticMixture
from energy_prior.topdown import TopDown, inferred_descent

N = 4
RGB: dict[str, Any] = {"tensor_shp": (-1, 3, 4, 4), "features_out": 20}
VARIANTS: dict[str, dict[str, Any]] = {
    "biva, dense": {"dense": True},
    "biva, a given b": {"conditional_bu": True, **RGB},
    "biva, no skips, padded, transformed": {
        "no_skip": True,
        "padded": True,
        "tensor_shp": (-1, 1, 4, 2),
        "lambda_init": lambda x: 1 - 2 * x,
        "log_var_act": torch.tanh,
    },
    "biva of two stages": {"stages": 2},
    "lvae": {"Stage": "lvae", "dense": True},
    "lvae, no skips": {"Stage": "lvae", "no_skip": True, **RGB},
    "vae": {"Stage": "vae", **RGB},
    "vae, transformed": {"Stage": "vae", "dense": True, "lambda_init": lambda x: x - 0.5},
}
EVERY = pytest.mark.parametrize("name", VARIANTS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def made(name: str) -> tuple[DeepVae, BIVAAdapter, Tensor, Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """In float64: model, adapter, observations, what the model sees of them, and log p(x | z) of its output."""
    model = ready(DeepVae(**VARIANTS[name])).double()
    shape = N, *model.input_tensor_shape[1:]
    if "features_out" not in VARIANTS[name]:

        def of_logits(logits: Tensor, x: Tensor) -> Tensor:
            return Bernoulli(logits=logits).log_prob(x).flatten(1).sum(1)

        return model, BIVAAdapter(model, likelihood="bernoulli"), torch.rand(shape).round().double(), lambda x: x, of_logits

    def of_mixture(parameters: Tensor, x: Tensor) -> Tensor:
        return DiscretizedLogisticMixture.from_channels(parameters, bottom=-0.999, top=0.999).log_prob(2 * x - 1)

    x = ((torch.randint(0, 2, shape) * 255 + torch.rand(shape)) / 256).double()  # dequantised, at both edges
    return model, BIVAAdapter(model, likelihood="mixture"), x, lambda x: 2 * x - 1, of_mixture


@EVERY
def test_every_number(name: str) -> None:
    """log q and log p of every layer and log p(x | z) at one draw, which the model's own pass is taken through."""
    model, adapter, x, seen, log_p = made(name)
    with torch.no_grad():
        inferred = adapter.infer(x)
        descent = inferred_descent(adapter, inferred)
        expected = model.run(seen(x), N, inferred.latents)
        close: Any = {"rtol": 1e-10, "atol": 1e-10}
        torch.testing.assert_close(inferred.log_q, torch.stack(expected.log_q, 1), **close)
        torch.testing.assert_close(descent.log_priors(), torch.stack(expected.log_p, 1), **close)
        torch.testing.assert_close(adapter.likelihood(descent.state).log_prob(x), log_p(expected.parameters, x), **close)
        again = TopDown(adapter, N).descend(inferred.latents, "latent")
        torch.testing.assert_close(again.log_priors(), descent.log_priors(), **close)


@EVERY
def test_by_the_model_s_own_calls(name: str) -> None:
    """Its forward pass, its sampler and its list of KL terms, z_1 first, on the same noise."""
    model, adapter, x, seen, log_p = made(name)
    said = check_generator(
        adapter,
        x,
        reconstruct=lambda x: log_p(model(seen(x))["x_"], x),
        sample=lambda n: log_p(model.sample_from_prior(n)["x_"], x),
        kl=lambda x: model(seen(x))["kl"],
    )
    assert said[-1].startswith("kl: every layer agrees, to ")


def test_means_and_draws_are_observations() -> None:
    _, adapter, x, _, _ = made("biva, a given b")
    with torch.no_grad():
        p = adapter.likelihood(inferred_descent(adapter, adapter.infer(x)).state)
        base: Any = p
        torch.testing.assert_close(p.mean, (base.base.mean + 1) / 2)
        draws = p.sample() * 255
    torch.testing.assert_close(draws, draws.round())
    assert float(draws.min()) >= 0
    assert 100 < float(draws.max()) <= 255


def test_layers_of_a_stage() -> None:
    """The bottom-up latent of a stage is below its top-down one, which reaches it only where the model has that condition."""
    for conditional in (True, False):
        adapter = BIVAAdapter(ready(DeepVae(conditional_bu=conditional)), likelihood="bernoulli")
        assert [shape[0] for shape in adapter.latent_shapes] == [3, 3, 2, 2, 3]
        with torch.no_grad():
            state = adapter.descend(adapter.start(2), torch.randn(2, *adapter.latent_shapes[4]), 5)
            found = [adapter.conditional(adapter.descend(state, torch.full((2, 2, 4, 4), v), 4), 3).loc for v in (-1.0, 1.0)]
        assert torch.equal(*found) != conditional


def test_two_descents_from_one_state() -> None:
    """The blocks empty the list of skip connections that they are given; the state must not notice."""
    adapter = BIVAAdapter(ready(DeepVae("vae")), likelihood="bernoulli")
    with torch.no_grad():
        state = adapter.descend(adapter.start(2), torch.ones(2, 3, 4, 4), 3)
        first, second = (adapter.descend(state, torch.zeros(2, 2, 4, 4), 2) for _ in range(2))
    assert state.skips is not None
    assert len(state.skips) == 2
    torch.testing.assert_close(first.features, second.features)


def test_a_checkpoint_as_the_repository_writes_it(tmp_path: Path) -> None:
    """`save_model`: the state dict alone, into model.pth; a model that has never run takes it."""
    trained = ready(DeepVae())
    torch.save(trained.state_dict(), tmp_path / "model.pth")
    model = DeepVae().eval()
    with pytest.raises(GeneratorError, match=r"\d+ of its layers, such as stages.0.q_convs.own, will set their weights"):
        BIVAAdapter(model, likelihood="bernoulli")
    prior = JointEBMPrior(BIVAAdapter(load_weights(model, tmp_path / "model.pth"), likelihood="bernoulli"))
    assert fingerprint(prior.generator) == fingerprint(BIVAAdapter(trained, likelihood="bernoulli"))
    assert prior.sample(2, steps=2).shape == (2, 1, 4, 4)


def test_models_that_are_refused() -> None:
    with pytest.raises(GeneratorError, match="training mode"):
        BIVAAdapter(DeepVae(), likelihood="bernoulli")
    with pytest.raises(GeneratorError, match="biva-pytorch, but DeepVAE lacks projection, input_tensor_shape"):
        BIVAAdapter(perturbed(DeepVAE()), likelihood="bernoulli")
    model = ready(DeepVae())
    del model.stages[1].bu_stochastic, model.stages[1].td_stochastic
    with pytest.raises(GeneratorError, match="its stage 2, a OneStage, is none of it"):
        BIVAAdapter(model, likelihood="bernoulli")


def test_the_likelihood_must_be_said() -> None:
    model = ready(DeepVae(**RGB))
    with pytest.raises(ArgumentError, match='likelihood: expected "bernoulli" or "mixture", got None'):
        BIVAAdapter(model, likelihood=None)  # type: ignore[arg-type]
    adapter = BIVAAdapter(model, likelihood="bernoulli")
    assert fingerprint(adapter) != fingerprint(BIVAAdapter(model, likelihood="mixture"))
    with pytest.raises(GeneratorError, match=r'shape \(20, 4, 4\).*observation, \(3, 4, 4\).*say likelihood="mixture"'):
        JointEBMPrior(adapter).sample(1, steps=0)
