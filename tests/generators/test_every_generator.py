"""What holds for every generator and adapter of the library: the protocol, precision under autocast, devices, a prior on it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_priors import enliven
from torch import Tensor
from torch.distributions import Normal
from torch.utils._pytree import tree_flatten
from zoo import ADAPTERS, EVERY, images, likelihood_at_ones

from energy_prior import ConvEnergy, JointEBMPrior, MLPEnergy, check_generator
from energy_prior.checks.arguments import checked_infer
from energy_prior.conditionals import tensors_of
from energy_prior.generators.likelihoods import InModelUnits
from energy_prior.langevin import InjectedNoise
from energy_prior.langevin.backends import compiled
from energy_prior.topdown import TopDown, ancestral, inferred_descent


@pytest.mark.parametrize("name", EVERY)
def test_follows_the_protocol(name: str) -> None:
    generator = EVERY[name]()
    check_generator(generator, images(generator))


@pytest.mark.parametrize("name", EVERY)
def test_a_pass_keeps_the_states_it_is_given(name: str) -> None:
    """Every state on the way down is the same after a whole pass from it as before."""
    generator = EVERY[name]()
    layers = len(generator.latent_shapes)
    with torch.no_grad():
        state = generator.start(2)
        for layer in range(layers, 0, -1):
            before = [t.clone() for t in tensors(state)]
            below = state
            for lower in range(layer, 0, -1):
                below = generator.descend(below, torch.randn(2, *generator.latent_shapes[lower - 1]), lower)
            assert len(tensors(state)) == len(before)
            assert all(torch.equal(a, b) for a, b in zip(before, tensors(state), strict=True))
            state = generator.descend(state, torch.randn(2, *generator.latent_shapes[layer - 1]), layer)


def tensors(state: Any) -> list[Tensor]:
    """The tensors of a state, without those of conditionals."""
    return [leaf for leaf in tree_flatten(state)[0] if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EVERY)
def test_distributions_are_in_the_dtype_of_the_weights_under_autocast(name: str, dtype: torch.dtype) -> None:
    """What autocast makes bf16 inside the nets does not reach parameters of distributions, latents or densities."""
    generator = EVERY[name]().to(dtype)
    assert generator.autocast
    x = images(generator.float()).to(dtype)
    generator.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inferred = checked_infer(generator, x)
        descents = inferred_descent(generator, inferred), ancestral(generator, 3)
        topdown = TopDown(generator, 3)
        likelihood = generator.likelihood(topdown.descend(inferred.latents, "latent", to_observation=True).state)
        log_likelihood = likelihood.log_prob(x)
    found = [t for d in descents for c in d.conditionals for t in (*tensors_of(c), c.log_prob(tensors_of(c)[0]))]
    found += [*inferred.latents, inferred.log_q, log_likelihood, likelihood.sample(), *parameters_of(likelihood)]
    assert {t.dtype for t in found} == {dtype}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_draw_is_an_observation_that_the_model_counts_as_that_value(name: str) -> None:
    """Images of few bits lie on a grid of their own: what is drawn is on it."""
    torch.manual_seed(0)
    likelihood = likelihood_at_ones(ADAPTERS[name]())
    if not isinstance(likelihood, InModelUnits) or isinstance(getattr(likelihood.base, "base_dist", None), Normal):
        pytest.skip("its observations have no other units inside the model, or no levels")
    torch.manual_seed(1)
    x = likelihood.sample()
    torch.manual_seed(1)
    torch.testing.assert_close(likelihood.to_model(x), likelihood.base.sample(), rtol=0, atol=1e-5)


def parameters_of(distribution: Any) -> list[Tensor]:
    """The tensors that a distribution, or the one inside it, is made of."""
    while not (found := [v for v in vars(distribution).values() if isinstance(v, Tensor)]):
        distribution = distribution.base if hasattr(distribution, "base") else distribution.base_dist
    return found


@pytest.mark.parametrize("name", EVERY)
def test_another_default_device_changes_nothing(name: str) -> None:
    """torch.set_default_device is for new tensors of the user's; those of a model's calls are where the model is."""
    generator = EVERY[name]()
    x, runs = images(generator), []
    for device in ("cpu", "meta"):
        torch.set_default_device(device)
        try:
            torch.default_generator.manual_seed(3)
            with torch.no_grad():
                inferred = generator.infer(x, rng=torch.Generator("cpu").manual_seed(1))
                descent = TopDown(generator, 3).descend(inferred.latents, "latent", to_observation=True)
                likelihood = generator.likelihood(descent.state)
                runs.append([*inferred.latents, inferred.log_q, likelihood.log_prob(x), likelihood.sample()])
        finally:
            torch.set_default_device(None)
    for a, b in zip(*runs, strict=True):
        assert b.device.type == "cpu"
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", EVERY)
def test_a_prior_on_it(name: str, tmp_path: Path) -> None:
    generator = EVERY[name]()
    x = images(generator, 4)
    prior = JointEBMPrior(generator)
    for f in prior.energies:
        enliven(f, 0.1)
    assert prior.sample(2, steps=2).shape == (2, *generator.x_shape)
    assert torch.isfinite(prior.sample(2, steps=2, decode="sample")).all()
    assert torch.isfinite(prior.llr_score(x, 1, steps=2, num_samples=1)).all()
    prior.save(tmp_path / "prior.safetensors")
    again = JointEBMPrior.load(tmp_path / "prior.safetensors", generator)
    z = prior.sample_latents(2, steps=0)
    assert torch.equal(again.negative_energy(z), prior.negative_energy(z))


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_training_energies_on_it(name: str) -> None:
    generator = EVERY[name]()
    prior = JointEBMPrior(generator)
    before = [p.clone() for p in prior.energies.parameters()]
    result = prior.fit(images(generator, 8), iterations=3, batch_size=4, progress=False)
    assert math.isfinite(result.history[-1]["loss"])
    assert all(bool(torch.isfinite(p).all()) for p in prior.energies.parameters())
    assert not all(torch.equal(p, q) for p, q in zip(before, prior.energies.parameters(), strict=True))
    assert torch.isfinite(prior.sample(2, steps=2)).all()


@pytest.mark.parametrize("name", [name for name in EVERY if not name.startswith(("deep vae", "ladder"))])
def test_infer_hands_over_its_pass(name: str) -> None:
    """Where inference goes down through the generator, training sees the same terms without a second pass."""
    generator = EVERY[name]()
    x = images(generator)
    with torch.no_grad():
        inferred = generator.infer(x)
        assert inferred.conditionals is not None
        handed = inferred_descent(generator, inferred)
        again = TopDown(generator, 3).descend(inferred.latents, "latent", to_observation=True)
        torch.testing.assert_close(handed.log_priors(), again.log_priors())
        torch.testing.assert_close(
            generator.likelihood(handed.state).log_prob(x), generator.likelihood(again.state).log_prob(x), rtol=1e-5, atol=1e-3
        )


@pytest.mark.slow
@pytest.mark.parametrize("energies", ["default", "of z_i"])
@pytest.mark.parametrize(
    "name", ["nvae", "vdvae", "deep ladder, mixture", "addtt ladder, mixture", "efficient vdvae", "careamics", "residual"]
)
def test_compiled(name: str, energies: str, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """No fallback, and the steps of the reference under the same noise; with energies of z_i chains run through the model."""
    monkeypatch.setattr(compiled, "_MANY_OPERATIONS", 0)
    generator = EVERY[name]()
    own = [ConvEnergy(shape) if len(shape) == 3 else MLPEnergy(shape) for shape in generator.latent_shapes]
    prior = JointEBMPrior(generator, own if energies == "of z_i" else None).double()
    for p in prior.energies.parameters():
        p.data.add_(0.02 * torch.randn_like(p))
    noise = [torch.randn(3, 2, *shape).double() for shape in prior.generator.latent_shapes]
    start = prior.sample_latents(2, steps=0)
    runs = {
        backend: prior.sample_latents(2, steps=2, step_size=0.3, start=start, noise=InjectedNoise(noise), backend=backend)
        for backend in ("eager", "compiled")
    }
    assert [str(w.message) for w in recwarn if "Backend" in w.category.__name__] == []
    for a, b in zip(runs["eager"], runs["compiled"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert float(a.abs().max()) < 1e3


@pytest.mark.parametrize("name", ADAPTERS)
def test_settings_of_an_adapter_are_plain_numbers(name: str) -> None:
    adapter = EVERY[name]()
    assert all(type(n) is int for shape in (*adapter.latent_shapes, adapter.x_shape) for n in shape)
    assert likelihood_at_ones(adapter).event_shape == adapter.x_shape


@pytest.mark.parametrize("name", EVERY)
def test_the_calibrated_score_draws_nothing(name: str) -> None:
    """Every normal draw of `infer` is at its mean: seeds and batches change nothing, and an image has one score."""
    prior = JointEBMPrior(EVERY[name]())
    x = images(prior.generator, 12)
    prior.calibrate(x)
    one, other = (prior.anomaly_score(x, rng=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert torch.equal(one, other)
    terms, few = (prior.explain(part) for part in (x, x[4:6]))
    torch.testing.assert_close(few.reconstruction, terms.reconstruction[4:6], rtol=1e-2, atol=1e-2)
    assert bool(torch.isfinite(one).all())
