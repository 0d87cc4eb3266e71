"""`ResidualVAE`: shapes, posteriors relative to the prior, temperature, checkpointing and learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.utils.checkpoint import checkpoint

from energy_prior import (
    ArgumentError,
    CheckpointError,
    ConvEnergy,
    JointEBMPrior,
    ResidualVAE,
    ShapeError,
    fit_elbo,
)
from energy_prior.checkpoint import fingerprint
from energy_prior.cli.demo import load_demo_data
from energy_prior.conditionals import tensors_of
from energy_prior.topdown import TopDown
from energy_prior.training.elbo import elbo


def small(**keywords: Any) -> ResidualVAE:
    return ResidualVAE((1, 8, 8), **({"groups": (2, 1), "channels": 8, "latent_channels": 2, "levels": 17} | keywords))


def test_layers_from_the_finest_scale_up() -> None:
    vae = ResidualVAE((3, 16, 32), groups=(1, 3, 2), channels=4, latent_channels=5, downsample=1)
    sizes = [(8, 16), (4, 8), (4, 8), (4, 8), (2, 4), (2, 4)]
    assert vae.latent_shapes == tuple(torch.Size((5, *size)) for size in sizes)
    assert vae.top.shape == (1, 16, 2, 4)


def test_posterior_relative_to_the_prior() -> None:
    """With Δμ = a and Δ = log b everywhere, KL(q ‖ p) = ½(b² + a² − 1) − log b per unit, whatever the prior is."""
    vae = small().double().eval()
    a, b = 0.7, 0.4
    with torch.no_grad():
        for head in vae.posterior:
            head[1].weight.zero_()  # type: ignore[index]
            head[1].bias[:2] = a  # type: ignore[index]
            head[1].bias[2:] = 5 * torch.atanh(torch.tensor(b, dtype=torch.float64).log() / 5)  # type: ignore[index]
        for head in vae.prior:
            head[1].bias.normal_()  # type: ignore[index]
        x = torch.rand(200, 1, 8, 8, dtype=torch.float64)
        drawn = vae.infer(x)
        descent = TopDown(vae, 200).descend(drawn.latents, "latent")
        for i, z in enumerate(drawn.latents):
            p: Any = descent.conditionals[i]
            q = Normal(p.loc + p.scale * a, p.scale * b)
            torch.testing.assert_close(drawn.log_q[:, i], q.log_prob(z).flatten(1).sum(1))
            torch.testing.assert_close(
                kl_divergence(q, p), torch.full_like(z, 0.5 * (b * b + a * a - 1)) - torch.tensor(b, dtype=torch.float64).log()
            )


def test_temperature_scales_the_prior_alone() -> None:
    torch.manual_seed(1)
    cold, warm = small(prior_temperature=0.5).eval(), small().eval()
    warm.load_state_dict(cold.state_dict())
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        a, b = (vae.infer(x, rng=torch.Generator().manual_seed(2)) for vae in (cold, warm))
        torch.testing.assert_close(a.log_q[:, 1:], b.log_q[:, 1:])
        for z, w in zip(a.latents, b.latents, strict=True):
            torch.testing.assert_close(z, w)
        p, q = (TopDown(vae, 3).descend(a.latents, "latent").conditionals for vae in (cold, warm))
        for c, w in zip(map(tensors_of, p), map(tensors_of, q), strict=True):
            torch.testing.assert_close(c[0], w[0])
            torch.testing.assert_close(c[1], 0.5 * w[1])


def test_checkpointing_changes_no_gradient() -> None:
    torch.manual_seed(1)
    plain, kept = small(), small(checkpointing=True)
    kept.load_state_dict(plain.state_dict())
    x = torch.rand(3, 1, 8, 8)
    for vae in (plain, kept):
        torch.manual_seed(5)
        elbo(vae, x).mean().backward()
    for a, b in zip(plain.parameters(), kept.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, while it traces
def test_compiled_towers_change_nothing_but_rounding() -> None:
    """Values and gradients; and chains compile on top of them."""
    torch.manual_seed(1)
    plain, compiled = (small(groups=(1,), downsample=0, tower_cells=1) for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    compiled.compile()
    x = torch.rand(3, 1, 8, 8)
    for vae in (plain, compiled):
        torch.manual_seed(5)
        elbo(vae, x).mean().backward()
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    z, w = (
        JointEBMPrior(v).sample_latents(2, steps=1, rng=torch.Generator().manual_seed(1), backend="eager")
        for v in (plain, compiled)
    )
    for a, b in zip(z, w, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", ["mixture", "gaussian", "bernoulli", "discretized_logistic"])
def test_learns_digits(likelihood: Any) -> None:
    data = load_demo_data(9, 0)
    vae = small(likelihood=likelihood)
    with torch.no_grad():
        before = float(elbo(vae, data.validation).mean())
    result = fit_elbo(vae, data.train, validation=data.validation, iterations=40, log_every=10, progress=False)
    assert result.validation_elbo is not None
    assert result.validation_elbo > before + (3 if likelihood == "bernoulli" else 20)
    assert JointEBMPrior(vae).sample(2, steps=2).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"x_shape": (8, 8)}, ShapeError, "x_shape: expected \\(channels, height, width\\)"),
        ({"x_shape": (3, 12, 12), "groups": (1, 1, 1)}, ShapeError, "multiples of 8 for 3 scales"),
        ({"groups": ()}, ArgumentError, "groups: expected the groups of at least one scale"),
        ({"groups": (2, 0)}, ArgumentError, "groups: expected a whole number"),
        ({"latent_channels": 0}, ArgumentError, "latent_channels: expected"),
        ({"x_shape": (2, 8, 8)}, ShapeError, 'likelihood="mixture" needs'),
        ({"prior_temperature": 0.0}, ArgumentError, "prior_temperature: expected a finite number above 0"),
        ({"mixtures": 0}, ArgumentError, "mixtures: expected"),
        ({"likelihood": "cauchy"}, ArgumentError, "likelihood: expected one of"),
        ({"x_shape": "388"}, ShapeError, "x_shape: expected one or more positive sizes"),
        ({"groups": "44"}, ArgumentError, "groups: expected a sequence of whole numbers"),
        ({"groups": 4}, ArgumentError, "groups: expected a sequence of whole numbers"),
        ({"channels": 8.0}, ArgumentError, "channels: expected a whole number"),
        ({"downsample": -1}, ArgumentError, "downsample: expected a whole number of at least 0"),
        ({"checkpointing": "no"}, ArgumentError, "checkpointing: expected True or False"),
        ({"prior_temperature": "1"}, ArgumentError, "prior_temperature: expected a finite number above 0"),
    ],
)
def test_bad_arguments(keywords: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ResidualVAE(**({"x_shape": (3, 8, 8)} | keywords))


def test_settings_of_any_kind_of_number() -> None:
    """Python's own numbers are stored, whatever kind came."""
    plain = small(prior_temperature=0.5, x_range=(-1.0, 1.0))
    given: dict[str, Any] = {
        "x_shape": np.array([1, 8, 8]),
        "groups": (n for n in (2, 1)),
        "latent_channels": np.int64(2),
        "channels": torch.tensor(8),
        "cells": np.uint8(1),
        "tower_cells": np.int32(2),
        "downsample": torch.tensor(1),
        "x_range": torch.tensor([-1.0, 1.0]),
        "levels": np.int16(17),
        "mixtures": np.int16(5),
        "prior_temperature": np.float32(0.5),
        "checkpointing": np.bool_(False),
    }
    other = ResidualVAE(**given)
    assert repr(other) == repr(plain)
    assert (other.latent_shapes, other.x_range) == (plain.latent_shapes, (-1.0, 1.0))
    assert {type(n) for shape in (other.x_shape, *other.latent_shapes) for n in shape} == {int}
    assert [type(value) for value in (*other.x_range, other.prior_temperature)] == [float] * 3
    other.load_state_dict(plain.state_dict())
    assert fingerprint(other) == fingerprint(plain)


def test_bad_calls() -> None:
    vae = small()
    with pytest.raises(ShapeError, match="x: expected shape \\(batch, 1, 8, 8\\)"):
        vae.infer(torch.rand(2, 3, 8, 8))


@pytest.mark.slow
def test_compiled_chains_with_checkpointing(recwarn: pytest.WarningsRecorder) -> None:
    """Nothing is checkpointed in them, and checkpointing works after them as before."""
    vae = small(groups=(1, 1), checkpointing=True).eval()
    prior = JointEBMPrior(vae)
    ends = [
        prior.sample_latents(2, steps=2, step_size=0.1, backend=backend, rng=torch.Generator().manual_seed(0))
        for backend in ("eager", "compiled", "eager")
    ]
    assert torch.equal(ends[0][0], ends[2][0])
    assert ends[1][0].shape == ends[0][0].shape
    assert [str(w.message) for w in recwarn if "Backend" in w.category.__name__] == []


@pytest.mark.slow
def test_a_compiler_that_fails_leaves_autograd_as_it_was(recwarn: pytest.WarningsRecorder) -> None:
    """Checkpointing inside a generator stops the compiler in torch.func, which must not cost other chains their hooks."""

    class Checkpoints(ResidualVAE):
        def _through(self, part: torch.nn.Module, features: torch.Tensor) -> torch.Tensor:
            return checkpoint(part, features, use_reentrant=False)  # type: ignore[no-any-return]

    vae = Checkpoints((1, 8, 8), groups=(1, 1), channels=8, latent_channels=2).eval()
    energies = [ConvEnergy(shape) for shape in vae.latent_shapes]  # of z_i: a chain passes through the generator for them
    prior = JointEBMPrior(vae, energies)
    ends = [
        prior.sample_latents(2, steps=2, step_size=0.1, backend=backend, rng=torch.Generator().manual_seed(0))
        for backend in ("eager", "compiled", "eager")
    ]
    assert torch.equal(ends[0][0], ends[2][0])
    assert ends[1][0].shape == ends[0][0].shape
    assert [str(w.message) for w in recwarn if "Backend" in w.category.__name__] == [], "layer by layer it can be compiled"


def test_settings_belong_to_the_model_that_energies_were_fitted_on(tmp_path: Path) -> None:
    cold, warm = small(prior_temperature=0.5).eval(), small().eval()
    warm.load_state_dict(cold.state_dict())
    JointEBMPrior(cold).save(tmp_path / "prior.safetensors")
    JointEBMPrior.load(tmp_path / "prior.safetensors", cold)
    with pytest.raises(CheckpointError, match="generator"):
        JointEBMPrior.load(tmp_path / "prior.safetensors", warm)
