"""`check_generator` passes sound generators and names the fault of each broken one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ladders import LinearLadder
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal

from energy_prior import DataWarning, GeneratorError, Inferred, JointEBMPrior, LadderVAE, ResidualVAE, check_generator


def vae(**keywords: Any) -> LadderVAE:
    return LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8, **keywords).eval()


X = torch.linspace(0, 1, 64).reshape(4, 1, 4, 4)


@pytest.mark.parametrize(
    ("generator", "x"),
    [
        (vae(), X),
        (vae(nets="conv"), X),
        (vae(likelihood="bernoulli"), X),
        (LinearLadder((3, 2, 2)), torch.randn(3, 3, dtype=torch.float64)),
        (vae().double(), X.double()),
    ],
)
def test_sound_generators_pass(generator: Any, x: Tensor) -> None:
    assert len(check_generator(generator, x)) == 8


class Reversed(LinearLadder):
    """latent_shapes from the top down."""

    def __init__(self) -> None:
        super().__init__((3, 2), dtype=torch.float32)
        self.latent_shapes = self.latent_shapes[::-1]


class InPlace(LadderVAE):
    """descend writes into the state that it was given."""

    def start(self, batch_size: int) -> Any:
        return {"state": super().start(batch_size)}

    def conditional(self, state: Any) -> Normal:
        return super().conditional(state["state"])

    def descend(self, state: Any, z: Tensor) -> Any:
        state["state"] = super().descend(state["state"], z)
        return state

    def likelihood(self, state: Any) -> Distribution:
        return super().likelihood(state["state"])


class SharedBuffer(LadderVAE):
    """descend stores on the model, so that a second branch overwrites the first."""

    def descend(self, state: Any, z: Tensor) -> Any:
        new = super().descend(state, z)
        if new.layer == 1 and new.conditional is not None:
            if not hasattr(self, "shared") or self.shared.shape != new.conditional.loc.shape:
                self.shared = torch.empty_like(new.conditional.loc)
            self.shared.copy_(new.conditional.loc.detach())
            return new._replace(conditional=Normal(self.shared, new.conditional.scale))
        return new


class KeptOnModel(LadderVAE):
    """A skip connection from z_3 to x that is kept on the model: right as long as one pass goes down at a time."""

    kept: Tensor

    def descend(self, state: Any, z: Tensor) -> Any:
        if state.layer == 3:
            self.kept = z.mean(1, keepdim=True)
        return super().descend(state, z)

    def likelihood(self, state: Any) -> Distribution:
        return super().likelihood(state._replace(z=state.z + self.kept))


class WithDropout(LadderVAE):
    def conditional(self, state: Any) -> Normal:
        c = super().conditional(state)
        return Normal(nn.functional.dropout(c.loc + 1, training=self.training), c.scale)


class WithBatchNorm(LadderVAE):
    def __init__(self) -> None:
        super().__init__((1, 4, 4), latent_dims=(3, 2), hidden=8)
        self.norm = nn.BatchNorm1d(3, momentum=0.5)

    def descend(self, state: Any, z: Tensor) -> Any:
        return super().descend(state, self.norm(z) if state.layer == 1 else z)


class Ignores(LadderVAE):
    """z_2 is never used."""

    def descend(self, state: Any, z: Tensor) -> Any:
        return super().descend(state, torch.zeros_like(z) if state.layer == 2 else z)


class SkipsObservation(LadderVAE):
    """z_1 does not reach x."""

    def likelihood(self, state: Any) -> Distribution:
        return super().likelihood(state._replace(z=torch.zeros_like(state.z)))


class Detached(LadderVAE):
    def descend(self, state: Any, z: Tensor) -> Any:
        return super().descend(state, z.detach() if state.layer == 1 else z)


class PerPixel(LadderVAE):
    """A likelihood over pixels instead of observations."""

    def likelihood(self, state: Any) -> Distribution:
        likelihood = super().likelihood(state)
        assert isinstance(likelihood, Independent)
        return likelihood.base_dist


class InferReversed(LadderVAE):
    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        inferred = super().infer(x, rng=rng)
        return Inferred(inferred.latents[::-1], inferred.log_q, inferred.factorization)


class InferSummed(LadderVAE):
    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        inferred = super().infer(x, rng=rng)
        return Inferred(inferred.latents, inferred.log_q.sum(1), inferred.factorization)


class InferDetached(LadderVAE):
    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        inferred = super().infer(x, rng=rng)
        return Inferred(tuple(z.detach() for z in inferred.latents), inferred.log_q, inferred.factorization)


class InferGlobal(LadderVAE):
    """Ignores rng: sound, as the library calls it under a seeded stream."""

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        return super().infer(x)


class InferNumpy(LadderVAE):
    """Draws from a stream that torch does not know."""

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        torch.default_generator.manual_seed(int(np.random.default_rng().integers(2**31)))
        return super().infer(x)


class InferMean(LadderVAE):
    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        return super().infer(x, rng=torch.Generator().manual_seed(0))


class InferConstantLogQ(LadderVAE):
    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        inferred = super().infer(x, rng=rng)
        return Inferred(inferred.latents, torch.zeros_like(inferred.log_q), inferred.factorization)


class InferBatchNorm(LadderVAE):
    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        return super().infer(nn.functional.batch_norm(x, None, None, training=self.training), rng=rng)


class GrowingList(LadderVAE):
    """The usual slip of skip connections: one list shared by all branches, which grows."""

    def start(self, batch_size: int) -> Any:
        return (super().start(batch_size), [])

    def conditional(self, state: Any) -> Normal:
        return super().conditional(state[0])

    def descend(self, state: Any, z: Tensor) -> Any:
        state[1].append(z)
        return (super().descend(state[0], z), state[1])

    def likelihood(self, state: Any) -> Distribution:
        return super().likelihood(state[0]._replace(z=sum(s.sum(1, keepdim=True) for s in state[1]) + state[0].z))


class DecoderDropout(LadderVAE):
    def likelihood(self, state: Any) -> Distribution:
        return super().likelihood(state._replace(z=nn.functional.dropout(state.z, training=self.training)))


class Shapeless(LinearLadder):
    """latent_shapes of numbers instead of shapes."""

    def __init__(self) -> None:
        super().__init__((3, 2), dtype=torch.float32)
        self.latent_shapes = (3, 2)  # type: ignore[assignment]


class NotFinite(LadderVAE):
    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        inferred = super().infer(x, rng=rng)
        return Inferred(inferred.latents, inferred.log_q * float("inf"), inferred.factorization)


class NegativeScale(LadderVAE):
    def conditional(self, state: Any) -> Normal:
        c = super().conditional(state)
        return Normal(c.loc, -c.scale, validate_args=False)


class NotNormal(LadderVAE):
    def conditional(self, state: Any) -> Any:
        return Independent(super().conditional(state), 1)


def build(kind: type[LadderVAE]) -> LadderVAE:
    return kind((1, 4, 4), latent_dims=(3, 2), hidden=8).eval()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Reversed, "layer order: .* from z_1"),
        (lambda: build(InPlace), "descend: one state at layer 2, taken down twice"),
        (lambda: build(SharedBuffer), "descend: one state at layer 2, taken down twice"),
        (
            lambda: KeptOnModel((1, 4, 4), latent_dims=(3, 2, 2), hidden=8).eval(),
            "a pass comes out otherwise where another one goes down between its calls, from layer x on.*kept on the model",
        ),
        (lambda: build(WithDropout).train(), "two calls on one state differ .* dropout"),
        (lambda: WithBatchNorm().train(), "changes with the rest of its batch.*batch norm in train mode"),
        (lambda: build(Ignores), "changing z_2 does not change any layer below it"),
        (lambda: build(SkipsObservation), "changing z_1 does not change the observation"),
        (lambda: build(Detached), "no gradient for it. Is the latent detached"),
        (lambda: build(PerPixel), r"batch_shape \(2,\) .* got \(2, 1, 4, 4\).*Independent\(…, 3\)"),
        (lambda: build(InferReversed), "expected latents .z_1 first. of shapes"),
        (lambda: build(InferSummed), r"log_q of shape \(batch, L\)"),
        (lambda: build(InferDetached), "z_1 carries no gradient"),
        (lambda: build(InferNumpy), "two draws under one seed of torch's random streams differ. Draw from torch .not numpy."),
        (lambda: build(InferMean), "different seeds give the same draw"),
        (lambda: build(NotFinite), "infer: its draws, or their log q, are not finite"),
        (lambda: build(InferConstantLogQ), "log_q of layer 1 is the same for different draws"),
        (
            lambda: build(InferBatchNorm).train(),
            "infer: the latents of an observation, or their log q, change with the rest of its batch",
        ),
        (lambda: build(GrowingList), "descend: one state at layer 1, taken down twice"),
        (lambda: build(DecoderDropout).train(), "likelihood: two calls on one state differ.* dropout"),
        (Shapeless, r"latent_shapes: expected a shape per layer, .* got \(3, 2\)"),
        (lambda: build(NegativeScale), "scale of layer 2 must be above 0"),
        (lambda: build(NotNormal), "expected a torch.distributions.Normal for layer 2, got Independent"),
    ],
)
def test_each_fault_is_named(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(GeneratorError, match=f"(?s){words}"):
        check_generator(make(), X)


def test_observations_of_another_shape() -> None:
    with pytest.raises(GeneratorError, match=r"an observation has shape \(1, 5, 5\), but .* event_shape is \(1, 4, 4\)"):
        check_generator(vae(), torch.rand(4, 1, 5, 5))
    with pytest.raises(GeneratorError, match=r"two or more observations, .* got shape \(1, 1, 4, 4\)"):
        check_generator(vae(), X[:1])
    with pytest.raises(GeneratorError, match=r"expected a torch.Tensor, got ndarray; torch.as_tensor makes one"):
        check_generator(vae(), X.numpy())  # type: ignore[arg-type]


def test_an_independent_of_too_few_dimensions() -> None:
    """The advice counts from the distribution per element, whatever it is wrapped in already."""

    class Rows(LadderVAE):
        def likelihood(self, state: Any) -> Distribution:
            return Independent(super().likelihood(state).base_dist, 1)  # type: ignore[attr-defined]

    with pytest.raises(GeneratorError, match=r"Independent\(…, 3\)"):
        check_generator(build(Rows), X)


def test_a_check_changes_nothing_and_claims_nothing_that_it_did_not_test() -> None:
    model = WithBatchNorm()
    assert model.training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(GeneratorError):
        check_generator(model, X)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    without = vae()
    without.infer = None  # type: ignore[assignment,method-assign]
    assert not any("infer" in sentence for sentence in check_generator(without, X))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (X.double(), "x: expected torch.float32"),
        ((255 * X).to(torch.uint8), "x: expected torch.float32.*scale it"),
        (X / 0, "x: expected finite"),
    ],
)
def test_observations_of_the_wrong_kind(x: Tensor, words: str) -> None:
    with pytest.raises(GeneratorError, match=f"(?s){words}"):
        check_generator(vae(), x)


def test_missing_calls_are_named() -> None:
    class Half(nn.Module):
        latent_shapes = (torch.Size((2,)),)

        def start(self, batch_size: int) -> None: ...

    with pytest.raises(GeneratorError, match="lacks conditional, descend, likelihood"):
        check_generator(Half(), X)  # type: ignore[arg-type]


def test_an_exception_inside_the_generator_is_told() -> None:
    class Breaks(LadderVAE):
        def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
            raise KeyError("encoder")

    with pytest.raises(GeneratorError, match=r"while checking that infer gives .* raised KeyError: 'encoder'"):
        check_generator(build(Breaks), X)


def test_leaves_the_global_stream_alone() -> None:
    generator = vae()
    before = torch.get_rng_state()
    check_generator(generator, X)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.rand(4, 1, 4, 4) * 255, "values from .* to .*, but the generator was made for 0 to 1"),
        (torch.rand(4, 1, 4, 4) - 0.5, "values from -.* but the generator was made for 0 to 1"),
    ],
)
def test_observations_outside_the_range(x: Tensor, words: str) -> None:
    with pytest.raises(GeneratorError, match=words):
        check_generator(vae(), x)
    prior = JointEBMPrior(vae())
    with pytest.warns(DataWarning, match=f"x: {words}"):
        prior.anomaly_score(x, num_samples=1)
    with pytest.warns(DataWarning, match=f"data: {words}"):
        prior.fit(x, iterations=2, progress=False)
    with pytest.warns(DataWarning, match=f"data \\(a batch of it\\): {words}"):
        prior.fit([x], iterations=2, progress=False)


def test_images_from_zero_for_a_symmetric_model() -> None:
    generator = vae()
    generator.x_range = (-1.0, 1.0)
    with pytest.raises(GeneratorError, match="no value is below 0 .* made for -1 to 1. If they are in \\[0, 1\\], rescale"):
        check_generator(generator, torch.rand(4, 1, 4, 4))
    assert check_generator(generator, 2 * torch.rand(4, 1, 4, 4) - 1)


class Flow(LadderVAE):
    """Posterior draws of z_1 doubled by a flow, whose log-determinant `infer` counts `share` of."""

    share = 1.0

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        drawn = super().infer(x, rng=rng)
        log_det = drawn.latents[0][0].numel() * math.log(2)
        log_q = drawn.log_q - self.share * torch.tensor([log_det, 0.0])
        return Inferred((2 * drawn.latents[0], drawn.latents[1]), log_q, "bottom_up")

    def posterior_log_prob(self, x: Tensor, latents: tuple[Tensor, ...]) -> Tensor:
        below, terms = x, []
        for layer, (net, z) in enumerate(zip(self.inference, latents, strict=True)):
            base = z / 2 if layer == 0 else z
            loc, raw = net(below).chunk(2, dim=1)
            terms.append(Normal(loc, (5 * torch.tanh(raw / 5)).exp()).log_prob(base).sum(1))
            below = base
        return torch.stack(terms, 1) - torch.tensor([latents[0].shape[1] * math.log(2), 0.0])


@pytest.mark.parametrize("share", [1.0, 0.0, -1.0])
def test_log_determinants(share: float) -> None:
    generator = Flow((1, 4, 4), latent_dims=(3, 2), hidden=8).eval()
    generator.share = share
    if share == 1.0:
        check_generator(generator, torch.rand(4, 1, 4, 4))
        return
    with pytest.raises(GeneratorError, match="log q of layer 1: infer says .*log-determinant of a flow left out"):
        check_generator(generator, torch.rand(4, 1, 4, 4))


class TopDownInference(ResidualVAE):
    """Hands over a pass with something wrong in it."""

    wrong = ""

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        found = super().infer(x, rng=rng)
        assert found.conditionals is not None
        if self.wrong == "order":
            return replace(found, conditionals=found.conditionals[::-1])
        if self.wrong == "detached":
            detached = tuple(Normal(p.loc.detach(), p.scale.detach()) for p in found.conditionals)
            return replace(found, conditionals=detached)
        if self.wrong == "short":
            return replace(found, conditionals=found.conditionals[:1])
        if self.wrong == "no state":
            return replace(found, state=None)
        if self.wrong == "log q":
            return replace(found, log_q=found.log_q.mean(0, keepdim=True).expand_as(found.log_q))
        return replace(found, state=found.state._replace(features=found.state.features + 1)) if self.wrong == "state" else found


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("order", "conditionals\\[0\\] is not that of z_1"),
        ("state", "its state does not give"),
        ("detached", "conditionals\\[0\\] carries no gradient"),
        ("short", "expected Inferred.conditionals, .* got shapes .* Leave both out"),
        ("no state", "and the state below z_1, got .* state of type NoneType"),
        ("log q", "or their log q, change with the rest of its batch"),
    ],
)
def test_a_pass_that_is_handed_over(wrong: str, words: str) -> None:
    generator = TopDownInference((1, 4, 4), groups=(2,), channels=4, downsample=0).eval()
    assert check_generator(generator, torch.rand(4, 1, 4, 4))
    generator.wrong = wrong
    with pytest.raises(GeneratorError, match=words):
        check_generator(generator, torch.rand(4, 1, 4, 4))


def test_an_infer_that_ignores_rng_is_sound() -> None:
    check_generator(InferGlobal((1, 4, 4), latent_dims=(3, 2), hidden=8).eval(), torch.rand(4, 1, 4, 4))


def test_gray_images_under_bernoulli_pixels() -> None:
    """Torch's own check of a Bernoulli's support is not the protocol's: cross entropies of gray images are in use."""

    class Plain(LadderVAE):
        def likelihood(self, state: Any) -> Distribution:
            return Independent(Bernoulli(logits=self.decoder(state.z)), 3)

    assert check_generator(Plain((1, 4, 4), latent_dims=(3, 2), hidden=8).eval(), torch.rand(4, 1, 4, 4))
