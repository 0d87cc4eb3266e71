"""`QResVAEAdapter`: every number against the step-by-step pass of a stand-in, its own calls, and models that it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stand_ins_ladder_vae import LadderVAE
from stand_ins_qres import HierarchicalVAE, Ran, VariableRateLossyVAE, minus_log_mass, through, varied
from torch import Tensor, nn
from torch.distributions import Normal

from energy_prior import ArgumentError, ConvolvedNormal, GeneratorError, JointEBMPrior, ShapeError, check_generator
from energy_prior.adapters import QResVAEAdapter, load_weights
from energy_prior.checkpoint import fingerprint
from energy_prior.topdown import TopDown, inferred_descent

N = 3
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "fixed rate": (HierarchicalVAE, {"x_shape": (3, 8, 12), "variance": 1 / 256}),
    "fixed rate, grey, another variance": (lambda: HierarchicalVAE(8.0, 1), {"x_shape": (1, 12, 4), "variance": 0.5}),
    "lossless": (lambda: HierarchicalVAE(None), {"x_shape": (3, 4, 8)}),
    "variable rate, lowest": (VariableRateLossyVAE, {"x_shape": (3, 8, 4), "variance": 1 / 128, "lmb": 16}),
    "variable rate": (lambda: VariableRateLossyVAE(colours=1), {"x_shape": (1, 8, 8), "variance": 0.01, "lmb": 700.0}),
}
EVERY = pytest.mark.parametrize("name", VARIANTS)
CLOSE: Any = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def made(name: str) -> tuple[Any, QResVAEAdapter, Tensor]:
    """In float64: model, adapter and 8-bit observations."""
    build, settings = VARIANTS[name]
    model = varied(build()).double()
    adapter = QResVAEAdapter(model, **settings)
    return model, adapter, torch.randint(0, 256, (N, *adapter.x_shape)).double() / 255


def step_by_step(model: Any, adapter: QResVAEAdapter, x: Tensor | None, given: Any = None) -> Ran:
    """The model's own pass, of observations or of the prior, with its own draws or through z of every layer, z_1 first."""
    size = (N, adapter.x_shape[1] // 4, adapter.x_shape[2] // 4)
    given = None if given is None else given[::-1]
    if isinstance(model, HierarchicalVAE):
        found = None if x is None else model.encoder(model.preprocess_input(x))
        return through(model.decoder.dec_blocks, model.decoder.bias, size, None, found, given)
    emb = model._get_lmb_embedding(torch.full((N,), float(adapter.lmb or 0)).double(), N)
    found = None if x is None else model.encoder(model.preprocess_input(x), emb)[1]
    return through(model.dec_blocks, model.bias, size, emb, found, given)


def log_likelihood(model: Any, adapter: QResVAEAdapter, output: Tensor, x: Tensor) -> Tensor:
    if adapter.variance is not None:
        return Normal((output + 1) / 2, math.sqrt(adapter.variance)).log_prob(x).flatten(1).sum(1)
    scale = (F.softplus(model.out_net.conv_scale(output) + 16) - 16).exp()
    return -minus_log_mass(255 * x, 127.5 * (model.out_net.conv_mean(output) + 1), 127.5 * scale).flatten(1).sum(1)


@EVERY
def test_every_number(name: str) -> None:
    """log q and log p of every layer and log p(x | z) at one draw, which the model's own pass is taken through."""
    model, adapter, x = made(name)
    with torch.no_grad():
        inferred = adapter.infer(x)
        descent = inferred_descent(adapter, inferred)
        z = [ConvolvedNormal.from_pair(pair) for pair in inferred.latents]
        expected = step_by_step(model, adapter, x, z)
        columns = zip(inferred.latents, z, *(part[::-1] for part in expected[1:5]), strict=True)
        for i, (pair, z_i, loc, scale, q_loc, minus_log_p) in enumerate(columns):
            n, v = pair.chunk(2, 1)
            assert bool(((z_i - q_loc).abs() <= 0.5 + 1e-12).all())  # z is within the support of q, where log q(z) is 0
            joint = Normal(loc, scale).log_prob(n) + Normal(0.0, 1.0).log_prob(v)
            torch.testing.assert_close(descent.log_prior(i + 1), joint.flatten(1).sum(1), **CLOSE)
            torch.testing.assert_close(inferred.log_q[:, i], (joint + minus_log_p).flatten(1).sum(1), **CLOSE)
            torch.testing.assert_close(inferred.log_q[:, i] - descent.log_prior(i + 1), minus_log_p.flatten(1).sum(1), **CLOSE)
        found = adapter.likelihood(descent.state)
        torch.testing.assert_close(found.log_prob(x), log_likelihood(model, adapter, expected.output, x), **CLOSE)
        again = TopDown(adapter, N).descend(inferred.latents, "latent")
        torch.testing.assert_close(again.log_priors(), descent.log_priors(), **CLOSE)


def test_the_training_loss_of_the_model() -> None:
    """Pixels × (KL per pixel + λ × squared error) is −ELBO, but for a constant, at variance 1/(8 λ)."""
    model, adapter, x = made("fixed rate")
    with torch.no_grad():
        inferred = adapter.infer(x)
        descent = inferred_descent(adapter, inferred)
        elbo = adapter.likelihood(descent.state).log_prob(x) + (descent.log_priors() - inferred.log_q).sum(1)
        ran = step_by_step(model, adapter, x, [ConvolvedNormal.from_pair(pair) for pair in inferred.latents])
        rate = sum(kl.flatten(1).sum(1) for kl in ran.kl)
        distortion = model.out_net.forward_loss(ran.output, model.preprocess_target(x))[0] * x[0].numel()
    constant = 0.5 * x[0].numel() * math.log(2 * math.pi / 256)
    torch.testing.assert_close(-elbo - constant, rate + distortion, **CLOSE)


@EVERY
def test_by_the_model_s_own_calls(name: str) -> None:
    """Its training pass, its sampler and its KL, per layer and in sum, on the same noise."""
    model, adapter, x = made(name)

    def noisy(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        model.train()
        if isinstance(model, HierarchicalVAE):
            output, layers = model.decoder(model.encoder(model.preprocess_input(x)))
        else:
            output, layers = model.forward_end2end(x, torch.full((N,), float(adapter.lmb or 0)).double())
        model.eval()
        return output, [layer["kl"] for layer in layers][::-1]

    def sample(n: int) -> Tensor:
        size = (n, x.shape[2] // 4, x.shape[3] // 4)
        if isinstance(model, HierarchicalVAE):
            return log_likelihood(model, adapter, model.decoder.forward_uncond(size), x)
        return model.unconditional_sample(torch.full((n,), float(adapter.lmb or 0)).double(), size)

    model.process_output = lambda x: (x + 1) / 2  # which clamps
    for kl, words in (
        (lambda x: noisy(x)[1], "every layer"),
        (lambda x: torch.stack([one.flatten(1).sum(1) for one in noisy(x)[1]]).sum(0), "the sum over layers"),
    ):
        said = check_generator(
            adapter, x, reconstruct=lambda x: log_likelihood(model, adapter, noisy(x)[0], x), sample=sample, kl=kl
        )
        assert [line.partition(":")[0] for line in said[-3:]] == ["sample", "reconstruct", "kl"]
        assert said[-1].startswith(f"kl: {words} agrees, to ")


@EVERY
def test_the_check_finds_a_wrong_scale(name: str) -> None:
    """σ a per cent off parts in the samples and in the KL, though each layer's noise goes to two of the model's draws."""
    model, adapter, x = made(name)
    blocks = model.decoder.dec_blocks if isinstance(model, HierarchicalVAE) else model.dec_blocks

    def sample(n: int) -> Tensor:
        kept: list[Any] = [(b, b.transform_prior) for b in blocks if hasattr(b, "transform_prior")]
        for block, own in kept:
            change = math.log(1.01) if isinstance(model, HierarchicalVAE) else 0.0

            def off(*given: Tensor, own: Any = own, change: float = change) -> tuple[Tensor, Tensor, Tensor]:
                h, loc, scale = own(*given)
                return h, loc, scale + change if change else 1.01 * scale

            block.transform_prior = off
        try:
            return log_likelihood(model, adapter, step_by_step(model, adapter, None).output, x)
        finally:
            for block, _ in kept:
                del block.transform_prior

    with pytest.raises(GeneratorError, match="part below z_1"):
        check_generator(adapter, x, sample=sample)


def test_means_and_samples() -> None:
    """Of a squared error x̂ in [0, 1], not clamped; of the lossless model levels of 8-bit images."""
    model, adapter, x = made("fixed rate")
    with torch.no_grad():
        state = inferred_descent(adapter, adapter.infer(x)).state
        torch.testing.assert_close(adapter.likelihood(state).mean, (state.features + 1) / 2)
        model, adapter, x = made("lossless")
        state = inferred_descent(adapter, adapter.infer(x)).state
        p = adapter.likelihood(state)
        loc, scale = (model.out_net.conv_mean(state.features) + 1) / 2, model.out_net.conv_scale(state.features).exp() / 2
        torch.testing.assert_close(p.mean, loc)
        drawn = p.sample((2000,))
    torch.testing.assert_close(255 * drawn, (255 * drawn).round())
    torch.testing.assert_close(drawn.mean(0), loc, rtol=0, atol=0.2 * float(scale.max()))
    torch.testing.assert_close(drawn.std(0), scale, rtol=0.1, atol=0)


def test_shapes() -> None:
    """Twice the channels of the model's z; z_1 is nearest the data."""
    adapter = made("fixed rate")[1]
    assert [tuple(shape) for shape in adapter.latent_shapes] == [(4, 4, 6), (6, 2, 3), (6, 2, 3)]
    assert adapter.x_shape == (3, 8, 12)
    assert "variance=0.00390625, lmb=None" in repr(adapter)
    assert len(dict(adapter.named_parameters())) == len(dict(adapter.model.named_parameters()))


def test_the_input_may_carry_a_gradient() -> None:
    """The model's own check of its input refuses one, and values outside of [0, 1]."""
    _, adapter, x = made("fixed rate")
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(adapter.infer(1.5 * x).log_q.sum(), x)
    assert bool(gradient.any())


@pytest.mark.parametrize("file", ["last.pt", "last_ema.pt"])
def test_a_checkpoint_as_the_repository_writes_it(file: str, tmp_path: Path) -> None:
    """{"model": …} and what training needs beside it; that of the averaged weights has no optimizer."""
    trained = varied(HierarchicalVAE())
    saved: dict[str, Any] = {"model": trained.state_dict(), "epoch": 1.5, "iter": 1000, "results": {"loss": 0.3, "psnr": 30.0}}
    if file == "last.pt":
        optimizer = torch.optim.Adam(trained.parameters(), lr=1e-4)
        sum(p.sum() for p in trained.parameters()).backward()  # type: ignore[union-attr]
        weights = {name: value.clone() for name, value in trained.state_dict().items()}
        saved["model"] = weights
        optimizer.step()
        trained.load_state_dict(weights)
        saved |= {"optimizer": optimizer.state_dict(), "scaler": {}}
    torch.save(saved, tmp_path / file)
    model = load_weights(HierarchicalVAE(), tmp_path / file).eval()
    made = QResVAEAdapter(model, x_shape=(3, 8, 8), variance=1 / 256)
    assert fingerprint(made) == fingerprint(QResVAEAdapter(trained, x_shape=(3, 8, 8), variance=1 / 256))
    assert JointEBMPrior(made).sample(2, steps=2).shape == (2, 3, 8, 8)


class Gaussian(nn.Module):
    """A block of lvae.models.rd: it quantises nothing."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.transform_prior = block.transform_prior


def test_models_that_are_refused() -> None:
    settings: Any = {"x_shape": (3, 8, 8), "variance": 0.1}
    with pytest.raises(GeneratorError, match="training mode"):
        QResVAEAdapter(HierarchicalVAE(), **settings)
    with pytest.raises(GeneratorError, match="lossy-vae, but LadderVAE lacks encoder, im_shift"):
        QResVAEAdapter(LadderVAE().eval(), **settings)
    other: Any = varied(HierarchicalVAE())
    del other.out_net
    with pytest.raises(GeneratorError, match="HierarchicalVAE has neither decoder and out_net nor dec_blocks, bias"):
        QResVAEAdapter(other, **settings)
    of_rates: Any = varied(VariableRateLossyVAE())
    of_rates.dec_blocks[1] = Gaussian(of_rates.dec_blocks[1])
    with pytest.raises(GeneratorError, match=r"does not quantise its latents. Those of lvae.models.rd are Gaussian"):
        QResVAEAdapter(of_rates.eval(), **settings, lmb=16)
    other = varied(HierarchicalVAE())
    other.out_net = nn.Identity().eval()
    with pytest.raises(GeneratorError, match="its output, a Identity, is neither .* Override `likelihood`"):
        QResVAEAdapter(other, **settings)
    with pytest.raises(GeneratorError, match=r"makes observations of shape \(3, 8, 8\), not x_shape, \(1, 8, 8\)"):
        QResVAEAdapter(varied(HierarchicalVAE()), x_shape=(1, 8, 8), variance=0.1)


@pytest.mark.parametrize(
    ("build", "settings", "error", "said"),
    [
        (HierarchicalVAE, {"x_shape": (3, 8, 8)}, ArgumentError, r"variance: expected that of .* 1 / \(8 \* lmb\)"),
        (HierarchicalVAE, {"x_shape": (3, 8, 8), "variance": 0.0}, ArgumentError, "variance: expected a finite number above 0"),
        (HierarchicalVAE, {"x_shape": (3, 8, 8), "variance": 0.1, "lmb": 32}, ArgumentError, "lmb: expected None"),
        (
            HierarchicalVAE,
            {"x_shape": (3, 8, 10), "variance": 0.1},
            ShapeError,
            r"x_shape: .* multiples of 4, got \(3, 8, 10\)",
        ),
        (HierarchicalVAE, {"x_shape": (8, 8), "variance": 0.1}, ShapeError, "x_shape: expected"),
        (lambda: HierarchicalVAE(None), {"x_shape": (3, 8, 8), "variance": 0.1}, ArgumentError, "variance: expected None"),
        (VariableRateLossyVAE, {"x_shape": (3, 8, 8), "variance": 0.1}, ArgumentError, "lmb: .* from 16 to 2048, got None"),
        (VariableRateLossyVAE, {"x_shape": (3, 8, 8), "variance": 0.1, "lmb": 8}, ArgumentError, "lmb: .* got 8"),
        (VariableRateLossyVAE, {"x_shape": (3, 8, 8), "lmb": 64}, ArgumentError, "variance: expected that of"),
    ],
)
def test_arguments_that_are_refused(build: Any, settings: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        QResVAEAdapter(varied(build()), **settings)
