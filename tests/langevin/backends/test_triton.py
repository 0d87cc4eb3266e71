"""The kernel that runs whole chains against the reference step; without a GPU in Triton's interpreter."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from energy_prior import BackendWarning, DivergenceError, JointEBMPrior, LadderVAE, MLPEnergy
from energy_prior.langevin import InjectedNoise
from energy_prior.langevin.backends.triton import BACKEND

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
STEPS, N = 6, 18


def lively(activation: str = "silu", dims: tuple[int, ...] = (5, 3), hidden: tuple[int, ...] = (40, 70)) -> JointEBMPrior:
    torch.manual_seed(0)
    generator = LadderVAE((4,), latent_dims=dims, hidden=33)
    with torch.no_grad():
        for net in generator.prior:
            net[-2].weight.mul_(3)  # type: ignore[index, union-attr, operator]
    energies = [MLPEnergy((d,), hidden, activation, saturation=None if d == 3 else 2.0) for d in dims]
    for f in energies:
        f.set_from([1 + 2 * torch.randn(50, *f.latent_shape)], [torch.randn(50, *f.latent_shape)])
        nn.init.normal_(f.net[-1].weight, std=0.5)  # type: ignore[arg-type]
    return JointEBMPrior(generator, energies).to(DEVICE)


@pytest.mark.parametrize(
    ("prior", "held"),
    [
        pytest.param(lively(), (), marks=pytest.mark.slow),
        pytest.param(lively("gelu", (4, 3, 2), (20,)), (), marks=pytest.mark.slow),
        pytest.param(lively("tanh", (4, 3, 2)), (3,), marks=pytest.mark.slow),
        pytest.param(lively("softplus", (70,)), (), marks=pytest.mark.slow),
    ],
    ids=["two layers", "three layers", "the top one held", "one wide layer"],
)
def test_one_launch_makes_the_reference_steps(prior: JointEBMPrior, held: tuple[int, ...]) -> None:
    shapes = prior.generator.latent_shapes
    given = {i: torch.randn(N, *shapes[i - 1], device=DEVICE) for i in held}
    free = [s for i, s in enumerate(shapes, 1) if i not in held]
    noise = InjectedNoise([torch.randn(STEPS + 1, N, *s, device=DEVICE) for s in free])
    for options in ({"step_size": 0.4}, {"step_size": 0.3, "scheme": "euler", "temperature": 1.5}):
        chain: dict[str, Any] = {"steps": STEPS, "given": given, "noise": noise} | options
        fused = prior.sample_latents(N, backend="triton", **chain)
        reference = prior.sample_latents(N, backend="eager", **chain)
        for a, b in zip(fused, reference, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_its_own_noise_is_standard_normal_and_follows_the_seed() -> None:
    """With f = 0 the chain of Crank–Nicolson keeps N(0, I) at any step size; at s = 2 one step forgets where it began."""
    prior = JointEBMPrior(LadderVAE((4,), latent_dims=(5, 3), hidden=8)).to(DEVICE)
    start = tuple(torch.full((600, d), 3.0, device=DEVICE) for d in (5, 3))
    draws = []
    for steps, seed in ((1, 0), (1, 0), (1, 1), (2, 0)):
        options: dict[str, Any] = {"start": start, "steps": steps, "rng": torch.Generator().manual_seed(seed)}
        draws.append(prior.sample_latents(600, backend="triton", step_size=2.0, **options)[1])
    assert torch.equal(draws[0], draws[1])
    for other in draws[2:]:
        assert abs(float(torch.stack([draws[0].flatten(), other.flatten()]).corrcoef()[0, 1])) < 0.1
    for z in (draws[0], draws[3]):
        assert abs(float(z.mean())) < 4 / math.sqrt(1800)
        assert abs(float(z.var()) - 1) < 4 * math.sqrt(2 / 1800)
        assert float((z.T.corrcoef() - torch.eye(3, device=DEVICE)).abs().max()) < 0.2
        assert len(z.unique()) > 1790, "every chain has numbers of its own"


@pytest.mark.slow
def test_parts_of_the_batch_and_decoding() -> None:
    """However a batch is split, in parts or in launches, every chain has the same noise."""
    prior = lively()
    for noise in (None, InjectedNoise([torch.randn(STEPS + 1, N, d, device=DEVICE) for d in (5, 3)])):
        whole, parts = (
            prior.sample_latents(
                N, noise=noise, steps=STEPS, backend="triton", max_memory=memory, rng=torch.Generator().manual_seed(1)
            )
            for memory in (1e9, 1e4)
        )
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    assert prior.sample(3, steps=2, backend="triton").shape == (3, 4)


def with_net(change: Any) -> Any:
    """Changes the net of p(z_1 | z_2)."""

    def changed(prior: Any) -> Any:
        change(prior.generator.prior[0])
        return prior

    return changed


def with_energy(make: Any) -> Any:
    """Puts another f_1 in."""
    return lambda prior: JointEBMPrior(prior.generator, [make().to(DEVICE), prior.energies[1]])


@pytest.mark.parametrize(
    ("change", "options", "why"),
    [
        (lambda p: p.double(), {}, "it works in float32, and the latents are torch.float64"),
        (lambda p: p, {"adjust": True}, "unadjusted chains"),
        (lambda p: p, {"max_drift": 1.0}, "no max_drift"),
        (lambda p: p, {"precision": "bf16"}, "no bf16"),
        (with_net(lambda net: net.insert(2, nn.Dropout(0.1))), {}, "as it was built"),
        (with_net(lambda net: net.__setitem__(2, nn.ReLU())), {}, "as it was built"),
        (with_net(lambda net: net.__setitem__(2, nn.Softplus(beta=2))), {}, "as it was built"),
        (with_net(lambda net: weight_norm(net[1])), {}, "as it was built"),
        (with_net(lambda net: net[1].register_forward_hook(lambda *_: None)), {}, "as it was built"),
        (lambda p: JointEBMPrior(p.generator, p.energies, space="latent"), {}, "in noise space"),
        (with_energy(lambda: MLPEnergy((5,), spectral_norm=True)), {}, "spectral_norm"),
        (with_energy(lambda: nn.Sequential(nn.Linear(5, 1), nn.Flatten(0))), {}, "MLPEnergy"),
        (lambda p: JointEBMPrior(LadderVAE((1, 4, 4), latent_dims=(2,), hidden=4, nets="conv")).to(DEVICE), {}, "LadderVAE"),
    ],
    ids=[
        *(
            "float64",
            "adjusted",
            "max_drift",
            "bf16",
            "dropout",
            "relu",
            "another softplus",
            "weight norm",
            "hook",
            "latent space",
        ),
        *("spectral norm", "own energies", "convolutions"),
    ],
)
def test_what_it_cannot_run_is_told_and_run_compiled(
    change: Any, options: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BACKEND, "fallback", "eager")  # nothing is compiled
    prior = change(lively())
    with pytest.warns(BackendWarning, match=f'"triton" cannot run this chain, and "eager" takes it: .*{why}'):
        z = prior.sample_latents(4, steps=2, backend="triton", step_size=0.1, **options)
    assert z[0].shape[0] == 4


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
def test_a_chain_that_explodes_is_an_error() -> None:
    prior = lively()  # of its layers the second does not saturate
    with torch.no_grad():
        prior.energies[1].net[-1].weight.mul_(1e38)  # type: ignore[union-attr, operator]
    with pytest.raises(DivergenceError, match="layer"):
        prior.sample_latents(4, steps=4, backend="triton", step_size=0.5)


@pytest.mark.slow
def test_the_kernel_compiles_for_a_gpu_that_is_not_here() -> None:
    """To machine code for an H100."""
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from energy_prior.langevin.backends import _kernels as kernels

types = {"program": "*i64", "seed": "i64"} | dict.fromkeys(("memory", "weights", "noise"), "*fp32")
types |= dict.fromkeys(("keep", "drift", "scale"), "fp32")
sizes = {"ROWS": kernels.ROWS, "COLUMNS": kernels.COLUMNS, "INPUTS": kernels.INPUTS, "OUTPUTS": kernels.OUTPUTS}
for fixed in ({"injected": False, "precision": "ieee"}, {"injected": True, "precision": "tf32"}):
    fixed |= sizes
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in kernels.run_chains.arg_names}
    made = triton.compile(ASTSource(kernels.run_chains, signature, constexprs=fixed), target=GPUTarget("cuda", 90, 32))
    assert len(made.asm["cubin"]) > 1000
"""
    there = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=there, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
