"""`EfficientVDVAEAdapter`: every number against the published formulas, written out, and the model's own pass and sampler."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stand_ins import perturbed
from stand_ins_efficient_vdvae import EfficientVDVAE, hyper_parameters, kl_of, log_p_of
from torch import Tensor, nn
from torch.distributions import Normal

from energy_prior import ArgumentError, GeneratorError, JointEBMPrior, check_generator
from energy_prior.adapters import EfficientVDVAEAdapter, load_checkpoint, load_weights
from energy_prior.checkpoint import fingerprint
from energy_prior.topdown import inferred_descent

LEVELS = (0.6, 0.8, 0.9)  # of the three levels, from the top; the middle one has two blocks
T = (0.9, 0.8, 0.8, 0.6)
VARIANTS: dict[str, dict[str, Any]] = {
    "softplus": {},
    "exp, residual": {"distribution_base": "logstd", "output_distribution_base": "logstd", "use_residual_distribution": True},
    "5 bits, residual, clamped": {"num_bits": 5.0, "use_residual_distribution": True, "min_mol_logscale": -0.5},
    "exp alone, clamped": {"output_distribution_base": "logstd", "min_mol_logscale": 0.1},
    "binary": {"dataset_source": "binarized_mnist"},
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def made(variant: str) -> tuple[Any, Any, Tensor]:
    """A model in double precision, its hyper-parameters, and observations with both ends of the range."""
    hparams = hyper_parameters(**VARIANTS[variant])
    model = perturbed(EfficientVDVAE(hparams)).double()
    if variant == "binary":
        return model, hparams, torch.randint(0, 2, (4, 1, 8, 8)).double()
    x = torch.randint(0, 256, (4, 3, 8, 8)).double() / 255
    x.view(-1)[::7], x.view(-1)[1::7], x.view(-1)[2::7] = 0.0, 1.0, 254 / 255
    return model, hparams, x


def seen(hparams: Any, x: Tensor) -> Tensor:
    """What the repository's loaders make of observations."""
    if hparams.data.dataset_source == "binarized_mnist":
        return F.pad(x, (2,) * 4)
    step = 2 ** (8 - hparams.data.num_bits)
    return (torch.floor((255 * x).round() / step) * step - 127.5) / 127.5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("t", [(1.0,) * 4, T])
def test_every_number(variant: str, t: tuple[float, ...]) -> None:
    """log q, log p and the KL of every layer, and log p(x | z), at one draw."""
    model, hparams, x = made(variant)
    adapter = EfficientVDVAEAdapter(model, hparams, prior_temperature=t)
    logarithmic, beta = hparams.model.distribution_base == "logstd", hparams.model.gradient_smoothing_beta

    def normal(mean: Tensor, spread: Tensor, factor: float = 1.0) -> Normal:
        return Normal(mean, factor * (torch.exp(beta * spread) if logarithmic else F.softplus(spread, beta=beta)))

    with torch.no_grad():
        inferred = adapter.infer(x)
        descent = inferred_descent(adapter, inferred)
        top, skips = model.top_down, model.bottom_up(seen(hparams, x))
        levels = zip(skips, top.levels_down_upsample, top.levels_down, strict=True)
        blocks = [(skip, block) for skip, first, others in levels for block in (first, *others)]
        y, log_q, log_p = top.trainable_h.expand(4, -1, -1, -1), [], []
        for (skip, block), z, factor in zip(blocks, inferred.latents[::-1], t[::-1], strict=True):
            if block.strides == 2:
                y = F.interpolate(F.leaky_relu(block.unpool.conv(y), 0.1), scale_factor=2) + block.unpool.scale_bias
            features = block.prior_net(y)
            mean_p, spread_p = block.prior_layer.projection(features[:, 6:]).chunk(2, 1)
            p = normal(mean_p, spread_p, factor)
            mean, spread = block.posterior_layer.projection(block.posterior_net(torch.cat([y, skip], 1))).chunk(2, 1)
            q = normal(mean, spread)
            if hparams.model.use_residual_distribution:
                plain = normal(mean_p, spread_p)
                q = Normal(mean_p + mean, q.scale * plain.scale)  # log σ adds up, or σ is multiplied: the same
            log_q.insert(0, q.log_prob(z).flatten(1).sum(1))
            log_p.insert(0, p.log_prob(z).flatten(1).sum(1))
            y = block.residual_block(y + features[:, :6] + block.z_projection(z))
        close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
        torch.testing.assert_close(inferred.log_q, torch.stack(log_q, 1), **close)
        torch.testing.assert_close(descent.log_priors(), torch.stack(log_p, 1), **close)
        found = adapter.likelihood(descent.state).log_prob(x)
        torch.testing.assert_close(found, log_p_of(hparams, top.output_conv(y), seen(hparams, x)), **close)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_models_own_calls(variant: str) -> None:
    """In double precision, where the check holds both sides to nine digits."""
    model, hparams, x = made(variant)

    def run(x: Tensor) -> Any:
        return model(seen(hparams, x))

    said = check_generator(
        EfficientVDVAEAdapter(model, hparams, prior_temperature=T),
        x,
        reconstruct=lambda x: log_p_of(hparams, run(x)[0], seen(hparams, x)),
        sample=lambda n: log_p_of(hparams, model.top_down.sample_from_prior(n, LEVELS)[0], seen(hparams, x)),
    )
    assert [line.partition(":")[0] for line in said][-2:] == ["sample", "reconstruct"]
    kl = check_generator(
        EfficientVDVAEAdapter(model, hparams),
        x,
        kl=lambda x: [kl_of(hparams, q, p) for q, p in zip(*run(x)[1:], strict=True)][::-1],
    )
    assert kl[-1].startswith("kl: every layer agrees, to ")


def test_only_the_ends_have_open_tails() -> None:
    """Of a value just inside the range, as in dequantised images, the model counts the bin around it."""
    model, hparams, x = made("softplus")
    x = x.clamp(0.0002, 0.9998)
    adapter = EfficientVDVAEAdapter(model, hparams)
    with torch.no_grad():
        torch.manual_seed(1)
        state = inferred_descent(adapter, adapter.infer(x)).state
        torch.manual_seed(1)
        expected = log_p_of(hparams, model(2 * x - 1)[0], 2 * x - 1)
        torch.testing.assert_close(adapter.likelihood(state).log_prob(x), expected, rtol=1e-9, atol=1e-9)


def test_samples_of_fewer_bits_stay_below_the_highest_level() -> None:
    model, hparams, _ = made("5 bits, residual, clamped")
    with torch.no_grad():
        x = JointEBMPrior(EfficientVDVAEAdapter(model, hparams)).sample(20, steps=0, decode="sample")
    assert float(x.max()) == pytest.approx(248 / 255)
    assert float(x.min()) == 0.0


def test_settings_are_in_the_fingerprint() -> None:
    model, hparams, _ = made("softplus")
    prints = {fingerprint(EfficientVDVAEAdapter(model, hparams, prior_temperature=t)) for t in (1.0, 0.5)}
    for name, value in (("distribution_base", "logstd"), ("use_residual_distribution", True), ("num_bits", 5.0)):
        prints.add(fingerprint(EfficientVDVAEAdapter(model, hyper_parameters(**{name: value}))))
    assert len(prints) == 5


def lacking() -> Any:
    hparams = hyper_parameters()
    del hparams.loss.min_mol_logscale
    return hparams


@pytest.mark.parametrize(
    ("hparams", "words"),
    [
        (lacking(), "loss.min_mol_logscale is missing"),
        (SimpleNamespace(), "model.distribution_base is missing"),
        (hyper_parameters(distribution_base="var"), 'model.distribution_base to be "std" or "logstd", got \'var\''),
        (hyper_parameters(output_distribution_base="var"), "model.output_distribution_base to be"),
    ],
)
def test_hyper_parameters_that_say_too_little(hparams: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        EfficientVDVAEAdapter(EfficientVDVAE(hyper_parameters()).eval(), hparams)


def test_models_that_cannot_be_wrapped() -> None:
    hparams = hyper_parameters()
    with pytest.raises(GeneratorError, match="training mode"):
        EfficientVDVAEAdapter(EfficientVDVAE(hparams), hparams)
    with pytest.raises(GeneratorError, match="expected a UniversalAutoEncoder of Efficient-VDVAE, but Linear lacks bottom_up"):
        EfficientVDVAEAdapter(nn.Linear(2, 2).eval(), hparams)
    with pytest.raises(GeneratorError, match="never been run"):
        EfficientVDVAEAdapter(EfficientVDVAE(hparams, run=False).eval(), hparams)
    with pytest.raises(ArgumentError, match="prior_temperature: expected a number above 0, or 4 of them"):
        EfficientVDVAEAdapter(EfficientVDVAE(hparams).eval(), hparams, prior_temperature=LEVELS)


def write_checkpoint(path: Path, model: nn.Module, average: nn.Module) -> None:
    """As the repository's training script writes one: both sets of weights, the optimiser's and the schedule's state."""
    optimizer = torch.optim.Adamax(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    schedule.step()
    torch.save(
        {
            "global_step": 10,
            "model_state_dict": model.state_dict(),
            "ema_model_state_dict": average.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "scheduler_state_dict": schedule.state_dict() | {"last_epoch": torch.tensor(10)},
        },
        path,
    )


def test_from_a_checkpoint_to_samples(tmp_path: Path) -> None:
    """With the averaged weights, which the repository samples with."""
    hparams = hyper_parameters()
    average = EfficientVDVAE(hparams)
    write_checkpoint(tmp_path / "checkpoints-name", EfficientVDVAE(hparams), average)
    checkpoint = load_checkpoint(tmp_path / "checkpoints-name")
    model = load_weights(EfficientVDVAE(hparams), checkpoint["ema_model_state_dict"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), average.parameters(), strict=True))
    assert JointEBMPrior(EfficientVDVAEAdapter(model.eval(), hparams)).sample(2, steps=0).shape == (2, 3, 8, 8)
