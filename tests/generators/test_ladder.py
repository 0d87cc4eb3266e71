"""`LadderVAE`: every net and likelihood, any image shape, the protocol, and learning by the ELBO."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from energy_prior import ArgumentError, LadderVAE, ShapeError, check_generator, fit_elbo
from energy_prior.checkpoint import fingerprint
from energy_prior.generators.ladder import _Resize
from energy_prior.training import elbo


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "discretized_logistic"])
@pytest.mark.parametrize(
    ("x_shape", "latent_dims", "nets"),
    [
        ((1, 8, 8), (4,), "mlp"),
        ((1, 8, 8), (4, 3), "conv"),
        ((3, 17, 5), (4, 3, 2), "conv"),
        ((3, 9, 7), (5, 4, 3, 2), "mlp"),
        ((6,), (3, 2), "mlp"),
        ((1, 1, 3), (2, 2, 2), "conv"),
    ],
)
def test_every_shape_follows_the_protocol(x_shape: Any, latent_dims: Any, nets: Any, likelihood: Any) -> None:
    vae = LadderVAE(x_shape, latent_dims, hidden=8, depth=1, nets=nets, likelihood=likelihood).eval()
    x = torch.rand(3, *x_shape)
    check_generator(vae, x)
    value = elbo(vae, x)
    assert value.shape == (3,)
    value.sum().backward()
    assert all(p.grad is not None for p in vae.parameters() if p.requires_grad)


@pytest.mark.parametrize("likelihood", ["gaussian", "discretized_logistic"])
def test_sigma_fixed_or_learned(likelihood: Any) -> None:
    learned = LadderVAE((4,), (2,), likelihood=likelihood)
    fixed = LadderVAE((4,), (2,), likelihood=likelihood, sigma=0.3)
    assert learned.pixels.log_sigma.requires_grad
    assert not fixed.pixels.log_sigma.requires_grad
    assert float(fixed.pixels.log_sigma.exp()) == pytest.approx(0.3)


def test_x_range_bounds_the_mean() -> None:
    vae = LadderVAE((4,), (2,), x_range=(-1.0, 1.0))
    state = vae.descend(vae.start(100), 50 * torch.randn(100, 2), 1)
    mean = vae.likelihood(state).mean
    assert float(mean.detach().min()) >= -1
    assert float(mean.detach().max()) <= 1
    assert float(mean.detach().min()) < 0


def test_log_prob_is_nats_per_observation() -> None:
    vae = LadderVAE((1, 3, 3), (2,), sigma=0.5)
    likelihood = vae.likelihood(vae.descend(vae.start(2), torch.zeros(2, 2), 1))
    x = torch.rand(2, 1, 3, 3)
    residual = (x - likelihood.mean).detach() / 0.5
    expected = -0.5 * residual.square().sum((1, 2, 3)) - 9 * math.log(0.5 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(likelihood.log_prob(x).detach(), expected)


@pytest.mark.slow
def test_fit_elbo_learns_digits_and_keeps_the_best() -> None:
    digits = torch.tensor(load_digits(return_X_y=True)[0].reshape(-1, 8, 8) / 16, dtype=torch.float32)[:, None]
    vae = LadderVAE((1, 8, 8), (8, 4), hidden=64)
    with torch.no_grad():
        before = float(elbo(vae, digits[:300]).mean())
    result = fit_elbo(
        vae, digits[300:], validation=digits[:300], iterations=300, kl_warmup=100, progress=False, rng=torch.Generator()
    )
    assert result.validation_elbo is not None
    assert result.validation_elbo > before + 20
    looked = [h["validation_elbo"] for h in result.history if "validation_elbo" in h]
    assert result.validation_elbo == max(looked)
    assert result.best_iteration > 100
    assert vae.training


def test_input_noise_reaches_the_inference_model_alone() -> None:
    torch.manual_seed(0)
    vae = LadderVAE((4,), (2,), hidden=8)
    x = torch.rand(4000, 4)
    seen: list[torch.Tensor] = []
    infer = vae.infer
    vae.infer = lambda x: (seen.append(x), infer(x))[1]  # type: ignore[assignment,method-assign]
    assert elbo(vae, x, input_noise=0.5).shape == (4000,)
    assert float((seen[0] - x).std()) == pytest.approx(0.5, rel=0.05)
    elbo(vae, x)
    assert torch.equal(seen[1], x)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: LadderVAE((1, 8, 8), nets="resnet"), ArgumentError, "nets: expected one of"),  # type: ignore[arg-type]
        (lambda: LadderVAE((1, 8, 8), likelihood="cauchy"), ArgumentError, "likelihood: expected one of"),  # type: ignore[arg-type]
        (lambda: LadderVAE((8,), nets="conv"), ShapeError, r"x_shape: nets=\"conv\" needs"),
        (lambda: LadderVAE((1, 0, 8)), ShapeError, "x_shape: expected one or more positive sizes"),
        (lambda: LadderVAE((8,), latent_dims=()), ArgumentError, "latent_dims: expected the size of at least one"),
        (lambda: LadderVAE((8,), latent_dims=(0,)), ArgumentError, "latent_dims: expected a whole number"),
        (lambda: LadderVAE((8,), sigma=0.0), ArgumentError, "sigma: expected a finite number above 0"),
        (lambda: LadderVAE((8,), x_range=(1.0, 0.0)), ArgumentError, "x_range: expected"),
        (lambda: LadderVAE((8,), likelihood="bernoulli", x_range=(-1.0, 1.0)), ArgumentError, "x_range: likelihood"),
        (lambda: LadderVAE((8,)).infer(torch.zeros(2, 9)), ShapeError, r"x: expected shape \(batch, 8\), got \(2, 9\)"),
        (lambda: LadderVAE("88"), ShapeError, "x_shape: expected one or more positive sizes, got '88'"),  # type: ignore[arg-type]
        (lambda: LadderVAE((8,), "16"), ArgumentError, "latent_dims: expected a sequence"),  # type: ignore[arg-type]
        (lambda: LadderVAE((8,), 16), ArgumentError, "latent_dims: expected a sequence"),  # type: ignore[arg-type]
        (lambda: LadderVAE((8,), torch.tensor(16)), ArgumentError, "latent_dims: expected a sequence"),  # type: ignore[arg-type]
        (lambda: LadderVAE((8,), [2.5]), ArgumentError, "latent_dims: expected a whole number"),  # type: ignore[list-item]
        (lambda: LadderVAE((8,), hidden="16"), ArgumentError, "hidden: expected a whole number"),  # type: ignore[arg-type]
        (lambda: LadderVAE((8,), depth=True), ArgumentError, "depth: expected a whole number"),
        (lambda: LadderVAE((8,), x_range="01"), ArgumentError, "x_range: expected .lowest, highest."),  # type: ignore[arg-type]
        (lambda: LadderVAE((8,), x_range=(0.0, float("nan"))), ArgumentError, "x_range: expected .lowest, highest."),
        (lambda: LadderVAE((8,), x_range=1.0), ArgumentError, "x_range: expected .lowest, highest."),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_settings_of_any_kind_of_number() -> None:
    """Python's own numbers are stored, whatever kind came."""
    plain = LadderVAE((1, 8, 8), (4, 2), hidden=16, depth=1, sigma=0.5, x_range=(-1.0, 1.0), levels=16)
    given: list[dict[str, Any]] = [
        {
            "x_shape": np.array([1, 8, 8]),
            "latent_dims": np.array([4, 2]),
            "hidden": np.int32(16),
            "depth": torch.tensor(1),
            "sigma": np.float32(0.5),
            "x_range": np.array([-1.0, 1.0]),
            "levels": np.int64(16),
        },
        {
            "x_shape": (n for n in (1, 8, 8)),
            "latent_dims": torch.tensor([4, 2]),
            "hidden": torch.tensor(16),
            "depth": np.uint8(1),
            "sigma": torch.tensor(0.5),
            "x_range": iter((np.float32(-1), np.int64(1))),
            "levels": torch.tensor(16),
        },
    ]
    for settings in given:
        other = LadderVAE(**settings)
        assert repr(other) == repr(plain)
        assert (other.x_shape, other.latent_shapes, other.x_range) == (plain.x_shape, plain.latent_shapes, plain.x_range)
        assert {type(n) for shape in (other.x_shape, *other.latent_shapes) for n in shape} == {int}
        assert {type(n) for n in other.x_range} == {float}
        assert {type(m.out_features) for m in other.modules() if isinstance(m, torch.nn.Linear)} == {int}
        other.load_state_dict(plain.state_dict())
        assert fingerprint(other) == fingerprint(plain)


@pytest.mark.parametrize(
    ("source", "target"), [((8, 8), (4, 4)), ((8, 6), (4, 6)), ((4, 4), (8, 12)), ((7, 7), (4, 4)), ((4, 4), (7, 7))]
)
def test_resizing_by_whole_factors_is_area_averaging(source: tuple[int, int], target: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *source)
    torch.testing.assert_close(_Resize(target)(x), torch.nn.functional.interpolate(x, target, mode="area"))
