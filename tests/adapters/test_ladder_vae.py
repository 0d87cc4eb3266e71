"""`LadderVAEAdapter`: every number against the step-by-step pass of a stand-in, and models that it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stand_ins import DeepVAE, perturbed
from stand_ins_ladder_vae import LadderVAE, crop_img_tensor
from torch import Tensor
from zoo import likelihood_at_ones

from energy_prior import GeneratorError, JointEBMPrior, check_generator
from energy_prior.adapters import LadderVAEAdapter, load_weights
from energy_prior.checkpoint import fingerprint
from energy_prior.topdown import TopDown, inferred_descent

N = 4
VARIANTS: dict[str, dict[str, Any]] = {
    "bernoulli": {},
    "gaussian, no skips, analytic": {"likelihood_form": "gaussian", "stochastic_skip": False, "analytical_kl": True},
    "logistic": {"likelihood_form": "discr_log", "color_ch": 3, "img_shape": (5, 8), "downsample": (1, 2, 0)},
    "mixture": {"likelihood_form": "discr_log_mix", "color_ch": 3, "img_shape": (8, 8)},
    "one layer": {"z_dims": (3,), "downsample": (1,)},
}
EVERY = pytest.mark.parametrize("name", VARIANTS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def made(name: str) -> tuple[Any, LadderVAEAdapter, Tensor]:
    """In float64: model, adapter and observations, binary or dequantised, at both edges."""
    model: Any = perturbed(LadderVAE(**VARIANTS[name])).double()
    adapter = LadderVAEAdapter(model)
    x = torch.randint(0, 2, (N, *adapter.x_shape)).double()
    return (
        model,
        adapter,
        x if model.likelihood.per_colour == 1 and not model.likelihood.outputs else (255 * x + x.roll(1)) / 256,
    )


@EVERY
def test_every_number(name: str) -> None:
    """log q and log p of every layer and log p(x | z) at one draw, which the model's own pass is taken through."""
    model, adapter, x = made(name)
    with torch.no_grad():
        inferred = adapter.infer(x)
        descent = inferred_descent(adapter, inferred)
        expected = model.run(model.bottomup_pass(model.pad_input(x)), N, inferred.latents)
        log_p = model.likelihood(crop_img_tensor(expected.features, model.img_shape), x)[0]
        close: Any = {"rtol": 1e-9, "atol": 1e-9}
        torch.testing.assert_close(inferred.log_q, torch.stack(expected.log_q, 1), **close)
        torch.testing.assert_close(descent.log_priors(), torch.stack(expected.log_p, 1), **close)
        torch.testing.assert_close(adapter.likelihood(descent.state).log_prob(x), log_p, **close)
        again = TopDown(adapter, N).descend(inferred.latents, "latent")
        torch.testing.assert_close(again.log_priors(), descent.log_priors(), **close)


@EVERY
def test_by_the_model_s_own_calls(name: str) -> None:
    """Its forward pass, its sampler and its KL, per layer and in sum, on the same noise."""
    model, adapter, x = made(name)

    def sample(n: int) -> Tensor:
        return model.likelihood(crop_img_tensor(model.topdown_pass(n_img_prior=n)[0], model.img_shape), x)[0]

    for kl, words in (
        (lambda x: model(x)["kl_sep"], "the sum over layers" if len(adapter.latent_shapes) > 1 else "every layer"),
        (lambda x: model.topdown_pass(model.bottomup_pass(model.pad_input(x)))[1]["kl"], "every layer"),
    ):
        said = check_generator(adapter, x, reconstruct=lambda x: model(x)["ll"], sample=sample, kl=kl)
        assert said[-1].startswith(f"kl: {words} agrees, to ")


def test_means_are_observations() -> None:
    for name in VARIANTS:
        model, adapter, x = made(name)
        with torch.no_grad():
            descent = inferred_descent(adapter, adapter.infer(x))
            p: Any = adapter.likelihood(descent.state)
            features = model.final_top_down(descent.state.features)
            given = model.likelihood.distr_params(crop_img_tensor(features, model.img_shape))
        if isinstance(given, Tensor):
            torch.testing.assert_close(p.mean, given)
        elif "logvar" in given:
            torch.testing.assert_close(p.mean, given["mean"])
        elif "logscale" in given:
            torch.testing.assert_close(p.base.base_dist.loc, (given["mean"] - 1 / 512) * 256 / 255)
        else:
            torch.testing.assert_close(p.mean, (p.base.mean + 1) / 2)


def test_shapes() -> None:
    """Every layer below one that doubles the resolution has twice its size; z_1 is nearest the data."""
    adapter = LadderVAEAdapter(perturbed(LadderVAE(img_shape=(9, 30), downsample=(1, 2, 0))))
    assert [tuple(shape) for shape in adapter.latent_shapes] == [(3, 4, 8), (2, 1, 2), (2, 1, 2)]
    assert adapter.x_shape == (1, 9, 30)


def test_bernoulli_is_of_logits() -> None:
    """Where probabilities round to 1, log p stays finite and keeps its slope."""
    model: Any = perturbed(LadderVAE())
    with torch.no_grad():
        model.likelihood.parameter_net.bias.fill_(200.0)
        model.likelihood.parameter_net.weight.zero_()
    p = likelihood_at_ones(LadderVAEAdapter(model))
    torch.testing.assert_close(p.log_prob(torch.zeros(2, 1, 6, 7)), torch.full((2,), -200.0 * 42))


def test_double_precision_lowers_the_floor() -> None:
    model, adapter, x = made("logistic")
    with torch.no_grad():
        model.likelihood.parameter_net.bias.fill_(-6.0)
        state = inferred_descent(adapter, adapter.infer(x)).state
        features = crop_img_tensor(model.final_top_down(state.features), model.img_shape)
        found = []
        for double in (False, True):
            model.likelihood.double_precision = double
            found.append(adapter.likelihood(state).log_prob(x))
            torch.testing.assert_close(found[-1], model.likelihood(features, x)[0], rtol=1e-6, atol=1e-6)
    assert bool((found[1] < found[0] - 1).all())


def test_a_checkpoint_as_the_repository_writes_it(tmp_path: Path) -> None:
    """The state dict alone, in model_STEP.pt."""
    trained = perturbed(LadderVAE())
    torch.save(trained.state_dict(), tmp_path / "model_100000.pt")
    model = load_weights(LadderVAE(), tmp_path / "model_100000.pt").eval()
    prior = JointEBMPrior(LadderVAEAdapter(model))
    assert fingerprint(prior.generator) == fingerprint(LadderVAEAdapter(trained))
    assert prior.sample(2, steps=2).shape == (2, 1, 6, 7)


def test_models_that_are_refused() -> None:
    with pytest.raises(GeneratorError, match="training mode"):
        LadderVAEAdapter(LadderVAE())
    with pytest.raises(GeneratorError, match="ladder-vae-pytorch, but DeepVAE lacks top_down_layers, bottomup_pass"):
        LadderVAEAdapter(perturbed(DeepVAE()))
    with pytest.raises(GeneratorError, match="its likelihood module, UnknownLikelihood, is not known. Override `likelihood`"):
        likelihood_at_ones(LadderVAEAdapter(perturbed(LadderVAE(likelihood_form="unknown"))))
