"""Adapters hold the contract on stand-ins of public models, carry their temperatures and clamps over, and load safely."""

from __future__ import annotations

import argparse
import io
import math
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stand_ins import NVAE, VDVAE, DeepVAE, perturbed
from torch import Tensor, nn

from energy_prior import ArgumentError, CheckpointError, GeneratorError, JointEBMPrior, LadderVAE, ResidualVAE, check_generator
from energy_prior.adapters import DeepVAEAdapter, NVAEAdapter, VDVAEAdapter, load_checkpoint, load_weights
from energy_prior.checkpoint import fingerprint
from energy_prior.checks.arguments import checked_infer
from energy_prior.langevin import InjectedNoise
from energy_prior.protocol import HierarchicalGenerator
from energy_prior.topdown import TopDown, inferred_descent

MAKERS: dict[str, Callable[[], Any]] = {
    "nvae": lambda: NVAEAdapter(perturbed(NVAE())),
    "nvae bernoulli": lambda: NVAEAdapter(perturbed(NVAE("bernoulli"))),
    "nvae normal, flows": lambda: NVAEAdapter(perturbed(NVAE("normal", flows=2))),
    "nvae plain posterior": lambda: NVAEAdapter(perturbed(NVAE(residual=False)), prior_temperature=0.7),
    "nvae one group": lambda: NVAEAdapter(perturbed(NVAE(vanilla=True))),
    "vdvae": lambda: VDVAEAdapter(perturbed(VDVAE())),
    "vdvae 5 bits": lambda: VDVAEAdapter(perturbed(VDVAE("ffhq_256")), prior_temperature=[0.9, 0.8, 0.7, 0.6, 0.5]),
    "deep vae": lambda: DeepVAEAdapter(perturbed(DeepVAE())),
    "deep vae without skips": lambda: DeepVAEAdapter(perturbed(DeepVAE("logistic", skips=False))),
    "ladder": lambda: DeepVAEAdapter(perturbed(DeepVAE("mixture", ladder=True))),
    "plain ladder, mixture": lambda: LadderVAE((3, 4, 4), (3, 2), hidden=8, likelihood="mixture").eval(),
    "residual": lambda: ResidualVAE((3, 8, 8), groups=(2, 1), channels=8, latent_channels=2).eval(),
    "residual gray, gaussian": lambda: ResidualVAE(
        (1, 8, 8), groups=(2,), channels=8, likelihood="gaussian", tower_cells=0
    ).eval(),
    "residual from the image's size": lambda: ResidualVAE((1, 4, 4), groups=(1, 2), downsample=0, channels=4).eval(),
}


def images(generator: Any, n: int = 3) -> Tensor:
    """On the grid of 8-bit images; 0 or 1 for Bernoulli likelihoods."""
    x = torch.randint(0, 256, (n, *generator.x_shape)) / 255
    base = generator.likelihood(TopDown(generator, 2).descend(ones(generator), "noise", to_observation=True).state)
    return (x > 0.5).float() if "Bernoulli" in repr(base) else x


def ones(generator: HierarchicalGenerator, n: int = 2) -> list[Tensor]:
    return [torch.ones(n, *shape) for shape in generator.latent_shapes]


@pytest.mark.parametrize("name", MAKERS)
def test_contract(name: str) -> None:
    generator = MAKERS[name]()
    assert len(check_generator(generator, images(generator))) == 8


@pytest.mark.parametrize("name", MAKERS)
def test_distributions_stay_in_full_precision_under_autocast(name: str) -> None:
    """What autocast makes bf16 inside the nets does not reach latents, log q or densities."""
    generator = MAKERS[name]()
    x = images(generator)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inferred = checked_infer(generator, x)
        descent = inferred_descent(generator, inferred)
        likelihood = generator.likelihood(descent.state).log_prob(x)
    kinds = {t.dtype for c in descent.conditionals for t in (c.loc, c.scale)}
    assert kinds | {t.dtype for t in (*inferred.latents, inferred.log_q, likelihood)} == {torch.float32}


@pytest.mark.parametrize("name", MAKERS)
def test_a_prior_on_it(name: str, tmp_path: Path) -> None:
    generator = MAKERS[name]()
    x = images(generator, 8)
    prior = JointEBMPrior(generator)
    prior.fit(x, iterations=3, batch_size=4, progress=False)
    assert prior.sample(2, steps=2).shape == (2, *generator.x_shape)
    assert torch.isfinite(prior.sample(2, steps=2, decode="sample")).all()
    assert torch.isfinite(prior.llr_score(x, 1, steps=2, num_samples=1)).all()
    prior.save(tmp_path / "prior.safetensors")
    again = JointEBMPrior.load(tmp_path / "prior.safetensors", generator)
    z = prior.sample_latents(2, steps=0)
    assert torch.equal(again.negative_energy(z), prior.negative_energy(z))


@pytest.mark.parametrize("name", [name for name in MAKERS if not name.startswith(("deep", "plain"))])
def test_infer_hands_over_its_pass(name: str) -> None:
    """Where inference goes down through the generator, training sees the same terms without a second pass."""
    generator = MAKERS[name]()
    with torch.no_grad():
        inferred = generator.infer(images(generator))
        assert inferred.conditionals is not None
        here = inferred_descent(generator, inferred)
        there = TopDown(generator, 3).descend(inferred.latents, "latent", to_observation=True)
        torch.testing.assert_close(here.log_priors(), there.log_priors())
        x = images(generator)
        torch.testing.assert_close(
            generator.likelihood(here.state).log_prob(x), generator.likelihood(there.state).log_prob(x), rtol=1e-5, atol=1e-3
        )


def test_nvae_clamps_and_temperature() -> None:
    """σ = exp(5 tanh(log σ/5)) + 0.01, times t; the top group too, where that is 1.01."""
    model = perturbed(NVAE())
    with torch.no_grad():
        model.dec_sampler[0].bias.copy_(torch.tensor([50.0, -50.0, 50.0, -50.0]))  # type: ignore[union-attr,operator]
    for t in (1.0, 0.6):
        adapter = NVAEAdapter(model, prior_temperature=t)
        top = adapter.conditional(adapter.start(2))
        torch.testing.assert_close(top.scale, torch.full_like(top.scale, 1.01 * t))
        with torch.no_grad():
            below = adapter.conditional(adapter.descend(adapter.start(2), torch.zeros(2, 2, 4, 4)))
        edge = 5 * math.tanh(10 - 0.01)  # the features move the bias of ±50 by less than 0.05
        torch.testing.assert_close(below.loc[:, 0], torch.full((2, 4, 4), edge), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(below.loc[:, 1], torch.full((2, 4, 4), -edge), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(below.scale[:, 0], torch.full((2, 4, 4), t * (math.exp(edge) + 0.01)), rtol=1e-4, atol=0)
        torch.testing.assert_close(below.scale[:, 1], torch.full((2, 4, 4), t * (math.exp(-edge) + 0.01)), rtol=1e-4, atol=0)


def test_nvae_keeps_normalised_weights_in_training_mode_only() -> None:
    """Its regularisation needs them there; elsewhere the same result comes without a write to the model."""
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


def test_a_wrapped_nvae_can_still_be_saved() -> None:
    model: Any = perturbed(NVAE())
    features = torch.randn(2, 6, 8, 8)
    expected = model.pre_process[0].conv(features)
    NVAEAdapter(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)  # a whole model, which this test has just written itself
    torch.testing.assert_close(again.pre_process[0].conv(features), expected)


@pytest.mark.parametrize(
    ("model", "make"),
    [
        (NVAE(), lambda m, t: NVAEAdapter(m, prior_temperature=t)),
        (VDVAE(), lambda m, t: VDVAEAdapter(m, prior_temperature=t)),
        (VDVAE(), lambda m, t: VDVAEAdapter(m, pixels=(100 * t, 60.0))),
    ],
)
def test_settings_of_an_adapter_tell_models_apart(model: nn.Module, make: Any) -> None:
    model.eval()
    assert fingerprint(make(model, 0.5)) == fingerprint(make(model, 0.5)) != fingerprint(make(model, 1.0))


@pytest.mark.parametrize("residual", [True, False])
def test_nvae_posterior_is_residual_before_the_clamp(residual: bool) -> None:
    model = perturbed(NVAE(residual=residual))
    adapter = NVAEAdapter(model)
    with torch.no_grad():
        state = adapter.descend(adapter.start(2), torch.randn(2, 2, 4, 4))
        features = torch.randn_like(state.features)
        q = adapter.posterior(state, features)
        mu, log_sigma = model.enc_sampler[1](features).chunk(2, 1)  # type: ignore[union-attr,index]
        if residual:
            mu_p, log_sigma_p = model.dec_sampler[0](state.features).chunk(2, 1)  # type: ignore[union-attr,index]
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


def test_nvae_border_and_bits() -> None:
    """Images of MNIST come without the border that NVAE pads; those of 5 bits are rounded down to its grid."""
    adapter = NVAEAdapter(perturbed(NVAE("bernoulli")))
    assert adapter.x_shape == (1, 12, 12)
    adapter = NVAEAdapter(perturbed(NVAE("normal")))
    adapter.model.num_bits = 5
    with torch.no_grad():
        state = TopDown(adapter, 1).descend(ones(adapter, 1), "noise", to_observation=True).state
        likelihood = adapter.likelihood(state)
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


@pytest.mark.parametrize("dataset", ["cifar10", "ffhq_256"])
def test_vdvae_against_a_plain_pass(dataset: str) -> None:
    """The model as its users run it: one dictionary of features, written in place."""
    model = perturbed(VDVAE(dataset))
    temperatures = (0.9, 0.8, 0.7, 0.6, 0.5)
    adapter = VDVAEAdapter(model, prior_temperature=temperatures)
    noise = [torch.randn(2, *shape) for shape in adapter.latent_shapes]
    features = {b.shape[2]: b.repeat(2, 1, 1, 1) for b in model.decoder.bias_xs}  # type: ignore[union-attr]
    with torch.no_grad():
        for block, eps, t in zip(model.decoder.dec_blocks, reversed(noise), temperatures, strict=True):  # type: ignore[union-attr]
            x = features.get(block.base, torch.zeros(2, 4, block.base, block.base))
            if block.mixin:
                x = x + F.interpolate(features[block.mixin], scale_factor=block.base // block.mixin)
            out = block.prior(x)
            z = out[:, :2] + torch.exp(out[:, 2:4] + math.log(t)) * eps
            features[block.base] = block.resnet(x + out[:, 4:] + block.z_proj(z))
        parameters = model.decoder.out_net(model.decoder.final_fn(features[8]))  # type: ignore[union-attr,operator]
        state = TopDown(adapter, 2).descend(noise, "noise", to_observation=True).state
        base = adapter.likelihood(state).base  # type: ignore[attr-defined]
    torch.testing.assert_close(base.logits, parameters[..., :2].permute(0, 3, 1, 2))
    assert base.levels == (32 if dataset == "ffhq_256" else 256)


def test_vdvae_pixels() -> None:
    """The encoder sees normalised images with channels last; the 5-bit likelihood sees x in steps of 8."""
    model = perturbed(VDVAE("ffhq_256"))
    adapter = VDVAEAdapter(model, pixels=(100.0, 50.0))
    seen: list[Tensor] = []
    model.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # type: ignore[union-attr]
    x = torch.randint(0, 256, (2, 3, 8, 8)) / 255
    with torch.no_grad():
        adapter.infer(x)
        likelihood = adapter.likelihood(TopDown(adapter, 2).descend(ones(adapter), "noise", to_observation=True).state)
        rounded = (x * 255 / 8 + 1e-4).floor() * 8 / 255
        torch.testing.assert_close(likelihood.log_prob(x), likelihood.log_prob(rounded))
        torch.testing.assert_close(likelihood.log_prob(x), likelihood.base.log_prob(2 * rounded - 1))  # type: ignore[attr-defined]
    torch.testing.assert_close(seen[0], (x.permute(0, 2, 3, 1) * 255 - 100) / 50)
    with pytest.raises(ArgumentError, match="pixels: expected"):
        VDVAEAdapter(perturbed(VDVAE("birds")))


def test_deep_vae_likelihood_units() -> None:
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
        state = adapter.descend(adapter.start(2), torch.ones(2, 3))
        first, second = (adapter.descend(state, torch.zeros(2, 3)) for _ in range(2))
    assert len(state.skips) == 2  # type: ignore[arg-type]
    torch.testing.assert_close(first.features, second.features)


@pytest.mark.parametrize("name", ["nvae", "vdvae", "ladder", "residual"])
def test_compiled(name: str, recwarn: pytest.WarningsRecorder) -> None:
    """One piece, no fallback, and the steps of the reference under the same noise."""
    prior = JointEBMPrior(MAKERS[name]())
    for p in prior.energies.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    noise = [torch.randn(3, 2, *shape) for shape in prior.generator.latent_shapes]
    start = prior.sample_latents(2, steps=0)
    runs = {}
    for backend in ("eager", "compiled"):
        runs[backend] = prior.sample_latents(
            2, steps=2, step_size=0.3, start=start, noise=InjectedNoise(noise), backend=backend
        )
    assert [str(w.message) for w in recwarn if "Backend" in w.category.__name__] == []
    for a, b in zip(runs["eager"], runs["compiled"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- bad input


def in_train_mode() -> Any:
    return NVAEAdapter(NVAE())


def mixed() -> Any:
    model = NVAE().eval()
    model.stem.double()
    return NVAEAdapter(model)


def two_latents() -> Any:
    model = DeepVAE().eval()
    del model.stages[1].stochastic
    return DeepVAEAdapter(model)


def unknown_decoder() -> Any:
    adapter = NVAEAdapter(perturbed(NVAE("unknown")))
    return adapter.likelihood(TopDown(adapter, 2).descend(ones(adapter), "noise", to_observation=True).state)


def unknown_module() -> Any:
    adapter = DeepVAEAdapter(perturbed(DeepVAE("unknown")))
    return adapter.likelihood(TopDown(adapter, 2).descend(ones(adapter), "noise", to_observation=True).state)


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (in_train_mode, GeneratorError, "training mode.*model.eval()"),
        (mixed, GeneratorError, "weights of one dtype on one device, got torch.float32 on cpu, torch.float64 on cpu"),
        (
            lambda: NVAEAdapter(nn.Linear(2, 2).eval()),
            GeneratorError,
            "expected an AutoEncoder of NVlabs/NVAE, but Linear lacks stem",
        ),
        (lambda: VDVAEAdapter("model.th"), GeneratorError, "an nn.Module, got str"),  # type: ignore[arg-type]
        (two_latents, GeneratorError, "a Stage has two latents per stage"),
        (unknown_decoder, GeneratorError, "decoder_output gives SimpleNamespace; expected Bernoulli"),
        (unknown_module, GeneratorError, "its likelihood module, PixelModule, is not known"),
        (lambda: NVAEAdapter(NVAE().eval(), prior_temperature=0), ArgumentError, "prior_temperature: expected a finite number"),
        (
            lambda: VDVAEAdapter(VDVAE().eval(), prior_temperature=[1.0]),
            ArgumentError,
            "prior_temperature: expected a number above 0, or 5",
        ),
        (
            lambda: VDVAEAdapter(VDVAE().eval(), prior_temperature=-1.0),
            ArgumentError,
            "prior_temperature: expected a number above 0, or 5",
        ),
    ],
)
def test_bad_models(act: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        act()


# ----------------------------------------------------------------------------------------------------------- checkpoints


def test_checkpoints_of_public_code(tmp_path: Path) -> None:
    """NVAE's: args in a Namespace, and a `weight_normalized` that its code makes anew; VDVAE's: "module." before names."""
    model, path = NVAE(), tmp_path / "checkpoint.pt"
    weights = {f"module.{k}": v for k, v in model.state_dict().items()}
    saved = {
        "epoch": 3,
        "state_dict": weights | {"module.stem.weight_normalized": torch.zeros(1)},
        "arch_instance": {"a": ["b"]},
    }
    torch.save(saved | {"args": argparse.Namespace(num_latent_scales=2)}, path)
    loaded = load_checkpoint(path)
    assert loaded["args"].num_latent_scales == 2
    other = NVAE()
    assert load_weights(other, path) is other
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert load_weights(NVAE(), loaded) is not None
    assert load_weights(NVAE(), {"model_state_dict": model.state_dict()}) is not None


@pytest.mark.parametrize("prefix", ["model.", "_orig_mod.", "module._orig_mod.", "model.module."])
def test_prefixes_of_wrappers_are_taken_off(prefix: str) -> None:
    model, other = NVAE(), NVAE()
    load_weights(other, {"state_dict": {prefix + k: v for k, v in model.state_dict().items()}})
    assert torch.equal(other.stem.weight, model.stem.weight)
    inside = nn.Module()
    inside.model = nn.Linear(2, 2)
    assert load_weights(inside, inside.state_dict()) is inside, "names that are the model's own stay"


def test_what_was_allowed_before_is_allowed_after(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(a=1)}, tmp_path / "a.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        load_checkpoint(tmp_path / "a.pt")
        assert torch.load(tmp_path / "a.pt")["args"].a == 1


class Harmful:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("touched"),))


def test_unsafe_checkpoints_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "extra": Harmful()}, "bad.pt")
    with pytest.raises(CheckpointError, match="'bad.pt' asks for getattr, .*more than tensors and plain values") as error:
        load_checkpoint("bad.pt")
    assert "weights_only" not in str(error.value), "torch's advice to switch its safety off is not passed on"
    assert not Path("touched").exists()


def truncated(path: Path) -> Any:
    torch.save(NVAE().state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])
    return load_weights(NVAE(), path)


def another(path: Path) -> Any:
    torch.save(NVAE(residual=False, vanilla=True).state_dict(), path)
    return load_weights(NVAE(), path)


def no_weights(path: Path) -> Any:
    torch.save({"epoch": 3}, path)
    return load_weights(NVAE(), path)


def a_text(path: Path) -> Any:
    path.write_text("hello")
    return load_checkpoint(path)


def an_empty_file(path: Path) -> Any:
    path.write_bytes(b"")
    return load_checkpoint(path)


def a_folder(path: Path) -> Any:
    path.mkdir()
    (path / "weights.pt").write_bytes(b"")
    return load_checkpoint(path)


def a_zip(path: Path) -> Any:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "text")
    return load_checkpoint(path)


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (truncated, CheckpointError, "is not a whole checkpoint|is damaged"),
        (another, CheckpointError, "does not fit this NVAE: .*is missing.*Build the model with the settings"),
        (no_weights, CheckpointError, "holds no state dict"),
        (a_zip, CheckpointError, "is not a whole checkpoint"),
        (load_checkpoint, FileNotFoundError, "No checkpoint at"),
        (a_text, CheckpointError, "is not a whole checkpoint of torch.save"),
        (an_empty_file, CheckpointError, "is not a whole checkpoint of torch.save .EOFError"),
        (a_folder, FileNotFoundError, "It is a folder; give one of the files in it: weights.pt"),
    ],
)
def test_bad_checkpoints(act: Callable[[Path], Any], error: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=re.compile(words)):
        act(tmp_path / "model.pt")
