"""Chains recorded as graphs against the reference step: on a GPU CUDA's own, elsewhere one of ours with the same semantics."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from small_priors import enliven, target_of
from tapes import Tape, record_on_tapes
from torch import Tensor, nn

from energy_prior import BackendWarning, DivergenceError, JointEBMPrior, LadderVAE
from energy_prior.langevin import InjectedNoise
from energy_prior.langevin.backends import graph as graphs
from energy_prior.langevin.step import StepConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
STEPS, N = 7, 5


@pytest.fixture(autouse=True)
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Without a GPU, recordings are tapes of eager steps; all that were made."""
    if DEVICE == "cuda":
        return []
    monkeypatch.setattr(graphs.BACKEND, "fallback", "eager")
    return record_on_tapes(monkeypatch)


def lively(generator: Any, space: Any = "noise") -> JointEBMPrior:
    torch.manual_seed(0)
    prior = JointEBMPrior(generator, space=space).to(DEVICE)
    for f in prior.energies:
        enliven(f)
    return prior


def mlp() -> LadderVAE:
    return LadderVAE((6,), latent_dims=(4, 3, 2), hidden=16)


def noise(prior: JointEBMPrior, held: tuple[int, ...] = (), steps: int = STEPS) -> InjectedNoise:
    shapes = [s for i, s in enumerate(prior.generator.latent_shapes, 1) if i not in held]
    return InjectedNoise([torch.randn(steps + 1, N, *s, device=DEVICE) for s in shapes])


def both(prior: JointEBMPrior, **chain: Any) -> list[tuple[Tensor, ...]]:
    options: dict[str, Any] = {"step_size": 0.3} | chain
    return [prior.sample_latents(N, backend="graph", **options), prior.sample_latents(N, backend="eager", **options)]


def assert_same(prior: JointEBMPrior, **chain: Any) -> None:
    for a, b in zip(*both(prior, **chain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "options", "held"),
    [
        (mlp, {}, ()),
        (mlp, {"scheme": "euler", "temperature": 1.4, "max_drift": 0.05}, ()),
        (mlp, {"space": "latent", "step_size": 0.05}, ()),
        (mlp, {}, (3,)),
        (lambda: LadderVAE((1, 8, 8), latent_dims=(2, 3), hidden=4, depth=1, nets="conv"), {}, ()),
    ],
    ids=["plain", "Euler, hot, cut", "latent space", "the top held", "convolutions"],
)
def test_a_recorded_chain_is_the_reference(make: Any, options: dict[str, Any], held: tuple[int, ...]) -> None:
    """Also the second time, when nothing but the recording runs, with other noise and other held layers."""
    options = dict(options)
    prior = lively(make(), options.pop("space", "noise"))
    for _ in range(2):
        given = {i: torch.randn(N, *prior.generator.latent_shapes[i - 1], device=DEVICE) for i in held}
        assert_same(prior, given=given, noise=noise(prior, held), steps=STEPS, **options)


def test_long_chains_are_several_launches(monkeypatch: pytest.MonkeyPatch, recordings: list[Tape]) -> None:
    monkeypatch.setattr(graphs, "_LONGEST", 3)
    prior = lively(mlp())
    assert_same(prior, noise=noise(prior), steps=STEPS)
    if DEVICE == "cpu":
        assert len(recordings) == 2, "one of 3 steps, launched twice, and one of 1"


def test_parts_of_a_batch_and_what_is_recorded_again(recordings: list[Tape]) -> None:
    prior = lively(mlp())
    injected = noise(prior)
    assert_same(prior, noise=injected, steps=STEPS, max_memory=1.0)
    before = len(recordings)
    assert_same(prior, noise=noise(prior), steps=STEPS, step_size=0.1, max_memory=1.0)
    assert len(recordings) == before, "another step size and other noise are inputs"
    with torch.no_grad():
        for p in prior.energies.parameters():
            p.mul_(1.5)
    assert_same(prior, noise=injected, steps=STEPS, max_memory=1.0)
    assert len(recordings) == before, "new weights in the same place are read"


@pytest.mark.parametrize("name", ["factor", "_private", "several"])
def test_replaced_weights_and_changed_attributes_are_noticed(name: str) -> None:
    class Tempered(LadderVAE):
        factor, _private, several = 1.0, 1.0, (1.0, 1.0)

        def conditional(self, state: Any, layer: int) -> Any:
            p = super().conditional(state, layer)
            return type(p)(p.loc * self.factor * self._private * self.several[0], p.scale, validate_args=False)

    prior = lively(Tempered((6,), latent_dims=(4, 3), hidden=16))
    injected = noise(prior)
    first = both(prior, noise=injected, steps=STEPS)[0]
    generator: Any = prior.generator
    setattr(generator, name, (3.0, 1.0) if name == "several" else 3.0)
    assert_same(prior, noise=injected, steps=STEPS)
    assert not torch.allclose(both(prior, noise=injected, steps=STEPS)[0][0], first[0])
    linear = next(part for part in generator.prior.modules() if isinstance(part, nn.Linear))
    linear.weight = nn.Parameter(3 * linear.weight.detach())
    assert_same(prior, noise=injected, steps=STEPS)


def test_every_launch_draws_its_own_noise() -> None:
    """Seeded by `rng`, and recording uses up no random number: the first call and the second give the same draws."""
    prior = lively(mlp())
    assert_same(prior, noise=noise(prior), steps=STEPS)  # injected noise is another recording

    def draw(seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        return prior.sample_latents(N, steps=STEPS, step_size=0.3, backend="graph", rng=rng)[0]

    first = draw(1)
    assert torch.equal(first, draw(1))
    assert not torch.equal(first, draw(2))
    if DEVICE == "cpu":  # where the tape draws from the stream that the reference draws from
        rng = torch.Generator().manual_seed(1)
        reference = prior.sample_latents(N, steps=STEPS, step_size=0.3, backend="eager", rng=rng)[0]
        torch.testing.assert_close(first, reference, rtol=1e-4, atol=1e-5)


def test_a_divergence_is_named_by_layer_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_LONGEST", 3)
    prior = lively(mlp())
    injected = noise(prior)
    injected._normals[1][5] = torch.nan
    with pytest.raises(DivergenceError) as reference:
        prior.sample_latents(N, noise=injected, steps=STEPS, step_size=0.3, backend="eager")
    with pytest.raises(DivergenceError) as error:
        prior.sample_latents(N, noise=injected, steps=STEPS, step_size=0.3, backend="graph")
    assert (error.value.step, error.value.layer) == (reference.value.step, reference.value.layer)


def test_code_that_cannot_be_recorded_runs_step_by_step_with_one_warning() -> None:
    """Other chains go on as before: what was recorded draws what its seed says."""

    class Asking(LadderVAE):
        def descend(self, state: Any, z: Tensor, layer: int) -> Any:
            return super().descend(state, z if z.sum().item() < 1e9 else 0 * z, layer)

    other, prior = lively(mlp()), lively(Asking((6,), latent_dims=(4, 3), hidden=16))

    def draw() -> Tensor:
        rng = torch.Generator().manual_seed(1)
        return other.sample_latents(N, steps=STEPS, step_size=0.3, backend="graph", rng=rng)[0]

    before, injected = draw(), noise(prior)
    with pytest.warns(BackendWarning, match="cannot be recorded as a CUDA graph"):
        assert_same(prior, noise=injected, steps=STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(prior, noise=injected, steps=STEPS)
    assert torch.randn(3, device=DEVICE).isfinite().all()
    for _ in range(2):
        torch.testing.assert_close(draw(), before)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"adjust": True}, "unadjusted chains of a fixed step size"), ({"precision": "bf16"}, "it has no bf16")],
)
def test_other_chains_are_for_the_compiled_backend(options: dict[str, Any], words: str) -> None:
    prior = lively(mlp())
    with pytest.warns(BackendWarning, match=words):
        prior.sample_latents(N, steps=2, step_size=0.3, backend="graph", **options)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (StepConfig("euler"), None),
        (StepConfig("euler", adjust=True, measured=True), "it is for unadjusted chains of a fixed step size"),
        (StepConfig("euler", adapt=True, measured=True), "it is for unadjusted chains of a fixed step size"),
        (StepConfig("euler", measured=True), "it shows nothing of a chain but its end"),
        (StepConfig("euler", precision="bf16"), "it has no bf16"),
    ],
)
def test_chains_that_run_from_start_to_end(config: StepConfig, why: str | None) -> None:
    assert graphs.BACKEND.refusal(target_of(lively(mlp())).density(), config, None) == why


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "DEVICES", ("another",))
    prior = lively(mlp())
    with pytest.warns(BackendWarning, match=f"needs a CUDA device, and the generator is on {DEVICE}"):
        prior.sample_latents(N, steps=2, step_size=0.3, backend="graph")


def test_a_generator_that_is_no_module_is_not_recorded() -> None:
    class Plain:
        """The calls of a ladder, and no more."""

        def __init__(self, inner: Any) -> None:
            self.latent_shapes, self.x_shape = inner.latent_shapes, inner.x_shape
            self.start, self.conditional, self.descend = inner.start, inner.conditional, inner.descend
            self.likelihood = inner.likelihood

    prior = JointEBMPrior(Plain(mlp().to(DEVICE))).to(DEVICE)
    with pytest.warns(BackendWarning, match="not an nn.Module"):
        prior.sample_latents(N, steps=2, step_size=0.3, backend="graph")
