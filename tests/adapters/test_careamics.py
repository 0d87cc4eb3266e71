"""`CAREamicsAdapter`: every number against the published formulas, written out, and the model's own pass and sampler."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_ins import perturbed
from stand_ins_careamics import (
    CAREamicsLadder,
    GaussianLikelihood,
    Noise,
    NoiseModelLikelihood,
    mixed,
    mixed_laterally,
    noise_likelihood,
    sample_from_prior,
)
from torch import Tensor, nn
from torch.distributions import Normal

from energy_prior import ArgumentError, GeneratorError, JointEBMPrior, check_generator
from energy_prior.adapters import CAREamicsAdapter, load_checkpoint, load_weights
from energy_prior.checkpoint import fingerprint
from energy_prior.topdown import inferred_descent

Made = tuple[Any, Any, Any]
"""A model, keywords of the adapter besides, and log p(x | z) of the model's output, (batch,)."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def total(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1)


def predicted(lower_bound: float | None, **keywords: Any) -> Made:
    def log_p(out: Tensor, x: Tensor) -> Tensor:
        mean, log_variance = out.chunk(2, 1)
        log_variance = log_variance if lower_bound is None else log_variance.clamp(min=lower_bound)
        return total(Normal(mean, torch.exp(log_variance / 2)).log_prob(x))

    return CAREamicsLadder(**keywords), {"likelihood": GaussianLikelihood("pixelwise", lower_bound)}, log_p


def squared_error(likelihood: Any) -> Made:
    def log_p(out: Tensor, x: Tensor) -> Tensor:
        return total(-0.5 * (out - x) ** 2 / 0.3 - 0.5 * math.log(2 * math.pi * 0.3))

    return CAREamicsLadder(predict_logvar=None), {"likelihood": likelihood, "variance": 0.3}, log_p


def noisy(channels: int, predict_logvar: str | None = None) -> Made:
    likelihood: Any = noise_likelihood(channels)

    def log_p(out: Tensor, x: Tensor) -> Tensor:
        return total(likelihood(out[:, :channels], x)[0])

    keywords = {"likelihood": likelihood, "encoder_input": mixed}
    return CAREamicsLadder(target_ch=channels, predict_logvar=predict_logvar), keywords, log_p


def lateral() -> Made:
    model, keywords, log_p = predicted(None, target_ch=2, scales=2)
    return model, keywords | {"encoder_input": mixed_laterally}, log_p


VARIANTS: dict[str, Callable[[], Made]] = {
    "predicted variance": lambda: predicted(0.0),
    "no lower bound, 3 layers, divided": lambda: predicted(None, image_size=(16, 16), z_dims=(2, 3, 4), factor=0.7),
    "squared error": lambda: squared_error(None),
    "squared error by its likelihood": lambda: squared_error(GaussianLikelihood(None)),
    "noise model": lambda: noisy(1),
    "noise models of 2 channels": lambda: noisy(2),
    "noise model besides a predicted variance": lambda: noisy(2, "pixelwise"),
    "lateral": lateral,
    "3D": lambda: predicted(-1.0, image_size=(3, 8, 8)),
}


def made(variant: str) -> tuple[Any, CAREamicsAdapter, Callable[[Tensor], Tensor], Any, Tensor]:
    """A model in double precision, its adapter, the encoder's input of x, log p of an output, and observations."""
    built, keywords, log_p = VARIANTS[variant]()
    model: Any = perturbed(built).double()
    with torch.no_grad():
        for layer in model.top_down_layers:  # log σ² on both sides of 0, where the formula changes
            layer.stochastic.conv_in_q.bias.normal_()
    adapter = CAREamicsAdapter(model, **keywords)
    x = torch.randn(4, *adapter.x_shape, dtype=torch.float64)
    return model, adapter, keywords.get("encoder_input") or (lambda x: x), log_p, x


def gaussian(parameters: Tensor) -> Normal:
    mean, raw = parameters.chunk(2, 1)
    raw = raw.clamp(max=20)
    return Normal(mean, (torch.where(raw > 0, 1 + raw, torch.exp(raw)) + 1e-6).sqrt())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_number(variant: str) -> None:
    """log q and log p of every layer, and log p(x | z), at one draw."""
    model, adapter, to_input, log_p_of, x = made(variant)
    with torch.no_grad():
        inferred = adapter.infer(x)
        descent = inferred_descent(adapter, inferred)
        found = model.bottomup_pass(to_input(x))
        above, log_q, log_p = None, [], []
        for layer, below, z in zip(model.top_down_layers[::-1], found[::-1], inferred.latents[::-1], strict=True):
            part = layer.stochastic
            if above is None:
                p, merged = gaussian(layer.top_prior_params), below
            else:
                p, merged = gaussian(part.conv_in_p(above)), layer.merge(below, above)
            q = gaussian(part.conv_in_q(merged / layer.normalize_latent_factor))
            log_q.insert(0, total(q.log_prob(z)))
            log_p.insert(0, total(p.log_prob(z)))
            out = part.conv_out(z)
            out = out if above is None else layer.skip_connection_merger(out, above)
            if layer.latent_shape is not None and out.shape[-1] == layer.latent_shape[-1]:
                out = out[..., 2:-2, 2:-2]
            above = layer.deterministic_block(out)
        close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
        torch.testing.assert_close(inferred.log_q, torch.stack(log_q, 1), **close)
        torch.testing.assert_close(descent.log_priors(), torch.stack(log_p, 1), **close)
        output = model.output_layer(model.final_top_down(above))
        torch.testing.assert_close(adapter.likelihood(descent.state).log_prob(x), log_p_of(output, x), **close)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_models_own_calls(variant: str) -> None:
    """In double precision, where the check holds both sides to nine digits."""
    model, adapter, to_input, log_p, x = made(variant)
    said = check_generator(
        adapter,
        x,
        reconstruct=lambda x: log_p(model(to_input(x))[0], x),
        sample=lambda n: log_p(sample_from_prior(model, n), x),
        kl=lambda x: model(to_input(x))[1]["kl"],
    )
    assert [line.partition(":")[0] for line in said][-3:] == ["sample", "reconstruct", "kl"]
    with pytest.raises(TypeError, match="NoneType"):  # the repository's sampler as it is
        model.topdown_pass(None, n_img_prior=2)


def test_means_and_draws_of_a_noise_model() -> None:
    """Draws have the signal as their mean, and the mixture's spread, in the units of the observations."""
    _, adapter, _, _, x = made("noise models of 2 channels")
    noise: Any = adapter.observation
    with torch.no_grad():
        likelihood = adapter.likelihood(inferred_descent(adapter, adapter.infer(x)).state)
        signal = likelihood.mean
        drawn = likelihood.sample(torch.Size([4000]))
        for channel in range(2):
            model = getattr(noise.noiseModel, f"nmodel_{channel}")
            raw = signal[:, channel] * 30.0 + 100.0
            low, high, narrow, wide, share, rest = model.get_gaussian_parameters(raw)
            spread = share * (narrow**2 + (low - raw) ** 2) + rest * (wide**2 + (high - raw) ** 2)
            standardised = (drawn[:, :, channel] - signal[:, channel]) / (spread.sqrt() / 30.0)
            assert float(standardised.mean().abs()) < 0.01
            assert float(standardised.square().mean()) == pytest.approx(1.0, abs=0.02)
            excess = (standardised**4).mean(0) / standardised.square().mean(0) ** 2
            fourth = share * (3 * narrow**4 + 6 * narrow**2 * (low - raw) ** 2 + (low - raw) ** 4)
            fourth = fourth + rest * (3 * wide**4 + 6 * wide**2 * (high - raw) ** 2 + (high - raw) ** 4)
            assert float((excess - fourth / spread**2).mean()) == pytest.approx(0.0, abs=0.05)  # one component per pixel
    assert drawn.shape == (4000, *x.shape)


def test_any_value_is_in_range() -> None:
    """Normalised microscopy data have no bounds: no warning, which would be an error here."""
    _, adapter, _, _, x = made("predicted variance")
    assert torch.isfinite(JointEBMPrior(adapter).log_joint(30 * x, steps=0)).all()


def test_settings_are_in_the_fingerprint() -> None:
    model = perturbed(CAREamicsLadder(predict_logvar=None))
    other, wide = noise_likelihood(), noise_likelihood()
    wide.set_data_stats(wide.data_mean, 2 * wide.data_std)
    adapters = [CAREamicsAdapter(model, variance=v) for v in (0.1, 0.2)]
    adapters += [CAREamicsAdapter(model, likelihood) for likelihood in (other, wide)]
    full = perturbed(CAREamicsLadder())
    adapters += [CAREamicsAdapter(full, GaussianLikelihood("pixelwise", b)) for b in (None, -1.0)]
    assert len({fingerprint(adapter) for adapter in adapters}) == 6


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: CAREamicsAdapter(CAREamicsLadder().eval()),
            "the model was built with predict_logvar='pixelwise', the likelihood",
        ),
        (
            lambda: CAREamicsAdapter(CAREamicsLadder(predict_logvar=None).eval(), GaussianLikelihood()),
            "built with predict_logvar=None, the likelihood with 'pixelwise'",
        ),
        (lambda: CAREamicsAdapter(CAREamicsLadder().eval(), nn.MSELoss()), "a likelihood module of CAREamics, got MSELoss"),
        (lambda: CAREamicsAdapter(CAREamicsLadder(predict_logvar=None).eval()), "variance: the model was trained by a squared"),
        (
            lambda: CAREamicsAdapter(CAREamicsLadder(predict_logvar=None).eval(), variance=0.0),
            "variance: expected a finite number above 0, got 0.0",
        ),
        (
            lambda: CAREamicsAdapter(CAREamicsLadder().eval(), GaussianLikelihood(), variance=0.1),
            "variance: the likelihood has one of its own",
        ),
        (
            lambda: CAREamicsAdapter(CAREamicsLadder().eval(), NoiseModelLikelihood(Noise(1))),
            "lacks the data's mean and standard deviation",
        ),
        (
            lambda: CAREamicsAdapter(CAREamicsLadder(target_ch=2).eval(), GaussianLikelihood()),
            "encoder_input: the model has 2 output channels",
        ),
        (
            lambda: CAREamicsAdapter(CAREamicsLadder(scales=2).eval(), GaussianLikelihood()),
            "1 output channels and 2 input.s. of different resolution",
        ),
    ],
)
def test_arguments_that_say_too_little(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        make()


def squeezed() -> nn.Module:
    model = CAREamicsLadder(image_size=(3, 8, 8)).eval()
    model._squish3d = True
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (CAREamicsLadder(), "training mode"),
        (nn.Linear(2, 2).eval(), "expected a LadderVAE of CAREamics, but Linear lacks bottomup_pass"),
        (squeezed(), "its encoder is 3D and its decoder 2D"),
        (CAREamicsLadder(image_size=(12, 12)).eval(), "its latents, z_1 first, have widths 6, 3"),
    ],
)
def test_models_that_cannot_be_wrapped(model: nn.Module, words: str) -> None:
    with pytest.raises(GeneratorError, match=words):
        CAREamicsAdapter(model, GaussianLikelihood())


class Training(nn.Module):
    """The parts of CAREamics' Lightning module that have weights."""

    def __init__(self) -> None:
        super().__init__()
        self.model = perturbed(CAREamicsLadder(predict_logvar=None))
        self.noise_model_likelihood = noise_likelihood()
        self.noise_model = self.noise_model_likelihood.noiseModel


def test_from_a_checkpoint_to_samples(tmp_path: Path) -> None:
    """A file of Lightning's: weights of model and noise model, with states of optimisers, loops and callbacks."""
    trained = Training()
    trained.noise_model.nmodel_0.width.data.fill_(7.0)  # type: ignore[union-attr]
    optimizer = torch.optim.Adam(trained.model.parameters())
    best = {"monitor": "val_loss", "best_model_score": torch.tensor(0.3), "best_model_path": "last.ckpt", "kth_value": None}
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    torch.save(
        {
            "epoch": 3,
            "global_step": 12,
            "pytorch-lightning_version": "2.6.6",
            "state_dict": trained.state_dict(),
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4, "completed": 3}}}},
            "callbacks": {"ModelCheckpoint{'monitor': 'val_loss'}": best},
            "optimizer_states": [optimizer.state_dict()],
            "lr_schedulers": [schedule.state_dict()],
        },
        tmp_path / "last.ckpt",
    )
    checkpoint = load_checkpoint(tmp_path / "last.ckpt")
    model = load_weights(CAREamicsLadder(predict_logvar=None), checkpoint).eval()
    likelihood = load_weights(noise_likelihood(), checkpoint)
    assert float(likelihood.noiseModel.nmodel_0.width) == 7.0  # type: ignore[union-attr,arg-type]
    ours, theirs = (CAREamicsAdapter(m, noise_likelihood()).model.state_dict() for m in (model, trained.model))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert JointEBMPrior(CAREamicsAdapter(model, likelihood)).sample(2, steps=0, decode="sample").shape == (2, 1, 8, 8)


def test_the_bounds_of_variances() -> None:
    """σ² is never below 10⁻⁶, and log σ², here 1 + log σ² for σ², never above 20."""
    model = perturbed(CAREamicsLadder())
    with torch.no_grad():
        model.top_down_layers[-1].top_prior_params[:, 3:].copy_(torch.tensor([-90.0, 50.0, 0.0])[:, None, None])  # type: ignore[index]
    adapter = CAREamicsAdapter(model, GaussianLikelihood())
    scale = adapter.conditional(adapter.start(2), 2).scale
    for channel, expected in enumerate((1e-3, math.sqrt(21), 1.0)):
        torch.testing.assert_close(scale[:, channel], torch.full_like(scale[:, channel], expected))
