"""What the adapters share: models of another kind, in another mode or inside a wrapper, and settings in fingerprints."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from stand_ins import NVAE, VDVAE, DeepVAE, perturbed
from stand_ins_biva import DeepVae, ready
from stand_ins_ladder_vae import LadderVAE
from torch import nn

from energy_prior import GeneratorError
from energy_prior.adapters import BIVAAdapter, DeepVAEAdapter, LadderVAEAdapter, NVAEAdapter, VDVAEAdapter
from energy_prior.checkpoint import fingerprint

EVERY = pytest.mark.parametrize(
    ("adapt", "make"),
    [
        (NVAEAdapter, NVAE),
        (VDVAEAdapter, VDVAE),
        (DeepVAEAdapter, DeepVAE),
        (partial(BIVAAdapter, likelihood="bernoulli"), lambda: ready(DeepVae())),
        (LadderVAEAdapter, LadderVAE),
    ],
    ids=["nvae", "vdvae", "deep vae", "biva", "ladder vae"],
)


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


@pytest.mark.slow
@EVERY
def test_a_compiled_model_is_the_model_inside(adapt: Any, make: Callable[[], nn.Module]) -> None:
    model = perturbed(make())
    wrapped, plain = adapt(torch.compile(model)), adapt(model)
    assert wrapped.model is model
    assert fingerprint(wrapped) == fingerprint(plain)
    x = torch.rand(2, *plain.x_shape).round()
    with torch.no_grad():
        a, b = (adapter.infer(x, rng=torch.Generator().manual_seed(1)).log_q for adapter in (wrapped, plain))
    assert torch.equal(a, b)


@EVERY
def test_of_a_data_parallel_model_the_one_inside_is_asked_for(adapt: Any, make: Callable[[], nn.Module]) -> None:
    with pytest.raises(GeneratorError, match="DataParallel lacks .*It is a wrapper: pass the model inside, model.module"):
        adapt(nn.DataParallel(perturbed(make())))


def mixed() -> Any:
    model = NVAE().eval()
    model.stem.double()
    return NVAEAdapter(model)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: NVAEAdapter(NVAE()), "training mode.*model.eval()"),
        (mixed, "weights of one dtype on one device, got torch.float32 on cpu, torch.float64 on cpu"),
        (
            lambda: NVAEAdapter(nn.Linear(2, 2).eval()),
            "expected an AutoEncoder of NVlabs/NVAE, but Linear lacks stem",
        ),
        (lambda: VDVAEAdapter("model.th"), "an nn.Module, got str"),  # type: ignore[arg-type]
    ],
)
def test_models_that_cannot_be_wrapped(act: Callable[[], Any], words: str) -> None:
    with pytest.raises(GeneratorError, match=words):
        act()
