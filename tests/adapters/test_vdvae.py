"""`VDVAEAdapter`: the repository's pass, its pixels, and temperatures of layers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stand_ins import VDVAE, perturbed
from torch import Tensor
from zoo import likelihood_at_ones

from energy_prior import ArgumentError
from energy_prior.adapters import VDVAEAdapter
from energy_prior.topdown import TopDown

T = (0.5, 0.6, 0.7, 0.8, 0.9)


@pytest.mark.parametrize("dataset", ["cifar10", "ffhq_256"])
def test_against_a_plain_pass(dataset: str) -> None:
    """The model as its users run it: one dictionary of features, written in place."""
    model = perturbed(VDVAE(dataset))
    adapter = VDVAEAdapter(model, prior_temperature=T)
    noise = [torch.randn(2, *shape) for shape in adapter.latent_shapes]
    features = {b.shape[2]: b.repeat(2, 1, 1, 1) for b in model.decoder.bias_xs}  # type: ignore[union-attr]
    with torch.no_grad():
        for block, eps, t in zip(model.decoder.dec_blocks, reversed(noise), reversed(T), strict=True):  # type: ignore[union-attr]
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


def test_pixels() -> None:
    """The encoder sees normalised images with channels last; the 5-bit likelihood sees x in steps of 8."""
    model = perturbed(VDVAE("ffhq_256"))
    adapter = VDVAEAdapter(model, pixels=(100.0, 50.0))
    seen: list[Tensor] = []
    model.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # type: ignore[union-attr]
    x = torch.randint(0, 256, (2, 3, 8, 8)) / 255
    with torch.no_grad():
        adapter.infer(x)
        likelihood = likelihood_at_ones(adapter)
        rounded = (x * 255 / 8 + 1e-4).floor() * 8 / 255
        torch.testing.assert_close(likelihood.log_prob(x), likelihood.log_prob(rounded))
        torch.testing.assert_close(likelihood.log_prob(x), likelihood.base.log_prob(2 * rounded - 1))  # type: ignore[attr-defined]
    torch.testing.assert_close(seen[0], (x.permute(0, 2, 3, 1) * 255 - 100) / 50)
    with pytest.raises(ArgumentError, match="pixels: expected"):
        VDVAEAdapter(perturbed(VDVAE("birds")))


def test_temperatures_run_from_z_1() -> None:
    """Layer i has the i-th factor, as `latent_shapes` has its i-th shape; the model's own list runs from the top."""
    model = perturbed(VDVAE())
    with torch.no_grad():
        latents = [torch.zeros(1, *shape) for shape in VDVAEAdapter(model).latent_shapes]
        plain, cooled = (
            TopDown(VDVAEAdapter(model, prior_temperature=t), 1).descend(latents, "latent").conditionals for t in (1.0, T)
        )
    for p, q, factor in zip(plain, cooled, T, strict=True):
        torch.testing.assert_close(q.scale, factor * p.scale)  # type: ignore[attr-defined]
        torch.testing.assert_close(q.loc, p.loc)  # type: ignore[attr-defined]


KINDS: list[Any] = [0.7, np.float32(0.7), torch.tensor(0.7), np.array(0.7)]
KINDS += [list(T), np.array(T), torch.tensor(T), iter(T), (np.float64(t) for t in T)]


@pytest.mark.parametrize("given", KINDS)
def test_temperatures_of_any_kind_of_number(given: Any) -> None:
    found = VDVAEAdapter(perturbed(VDVAE()), prior_temperature=given).prior_temperature
    assert [type(t) for t in found] == [float] * 5
    assert found == pytest.approx((0.7,) * 5) or found == pytest.approx(T)


def test_pixels_of_any_kind_of_number() -> None:
    for given in ((100, 50), np.array([100.0, 50.0]), torch.tensor([100, 50]), iter([np.float32(100), 50])):
        found = VDVAEAdapter(perturbed(VDVAE("birds")), pixels=given).pixels  # type: ignore[arg-type]
        assert found == (100.0, 50.0)
        assert [type(n) for n in found] == [float, float]


@pytest.mark.parametrize(
    "given", [[1.0], -1.0, 0, [1, 1, 0, 1, 1], "12345", ["1"] * 5, [True] * 5, float("inf"), None, (*T, 1.0)]
)
def test_impossible_temperatures(given: Any) -> None:
    with pytest.raises(ArgumentError, match="prior_temperature: expected a number above 0, or 5 of them"):
        VDVAEAdapter(VDVAE().eval(), prior_temperature=given)


@pytest.mark.parametrize("given", [(100.0,), (100.0, 0.0), (float("nan"), 50.0), "ab", 100.0, (1.0, 2.0, 3.0)])
def test_impossible_pixels(given: Any) -> None:
    with pytest.raises(ArgumentError, match="pixels: expected .mean, standard deviation > 0."):
        VDVAEAdapter(VDVAE().eval(), pixels=given)
