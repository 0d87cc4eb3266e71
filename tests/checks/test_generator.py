"""`check_generator` names the fault of every broken generator, refuses no sound one, and leaves no trace."""

from __future__ import annotations

import math
import random
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, FamilyLadder, SinhNormal
from faults import FAULTS, Case, Fault, N, SideLatent, SideLatentSetByData, correct_cases, deep, nvae, vdvae
from ladders import LinearLadder
from own_calls import deep_calls, nvae_calls, vdvae_calls
from torch import Tensor, nn
from torch.distributions import (
    AffineTransform,
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    Normal,
    StudentT,
    TanhTransform,
    TransformedDistribution,
    Uniform,
)

from energy_prior import (
    ArgumentError,
    DataWarning,
    GeneratorError,
    Inferred,
    JointEBMPrior,
    LadderVAE,
    ResidualVAE,
    check_generator,
)
from energy_prior.adapters import NVAEAdapter
from energy_prior.checks.generator import probe_generator
from energy_prior.process import exclusive
from energy_prior.topdown import TopDown, ancestral_noise

PROTOCOL, WITH_INFER, WITH_ALL = 9, 13, 16  # sentences of what was checked


def vae(**keywords: Any) -> LadderVAE:
    return LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8, **keywords).eval()


def build(kind: type[LadderVAE]) -> LadderVAE:
    return kind((1, 4, 4), latent_dims=(3, 2), hidden=8).eval()


X = torch.linspace(0, 1, 64).reshape(4, 1, 4, 4)


# ------------------------------------------------------------------------------------------ the planted faults of the issue


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_faults_are_found(fault: Fault) -> None:
    case = fault.make()
    with pytest.raises(GeneratorError, match=f"(?s){fault.says}"):
        check_generator(case.generator, case.x, **case.calls)


@pytest.mark.slow
def test_no_correct_generator_is_refused() -> None:
    for name, case in correct_cases():
        passed = check_generator(case.generator, case.x, **case.calls)
        infers = WITH_INFER if hasattr(case.generator, "infer") else PROTOCOL
        assert len(passed) == infers + sum(call is not None for call in case.calls.values()), name


@pytest.mark.parametrize(
    ("make", "sentences"),
    [
        (nvae, WITH_ALL),
        (vdvae, WITH_ALL),
        (deep, WITH_ALL),
        (lambda: Case(vae(), X, {}), WITH_INFER),
        (lambda: Case(vae().double(), X.double(), {}), WITH_INFER),
        (lambda: Case(SideLatent(), torch.randn(N, 6), {}), WITH_INFER),
    ],
)
def test_sound_generators_pass(make: Callable[[], Case], sentences: int) -> None:
    case = make()
    assert len(check_generator(case.generator, case.x, **case.calls)) == sentences


# --------------------------------------------------------------------------------------------------- faults of the protocol


class InPlace(LadderVAE):
    """descend writes into the state that it was given."""

    def start(self, batch_size: int) -> Any:
        return {"z": super().start(batch_size)}

    def conditional(self, state: Any, layer: int) -> Normal:
        return super().conditional(state["z"], layer)

    def descend(self, state: Any, z: Tensor, layer: int) -> Any:
        state["z"] = super().descend(state["z"], z, layer)
        return state

    def likelihood(self, state: Any) -> Distribution:
        return super().likelihood(state["z"])


class SharedBuffer(LadderVAE):
    """conditional gives out a buffer of the model, so that a second branch overwrites the first."""

    def conditional(self, state: Any, layer: int) -> Normal:
        c = super().conditional(state, layer)
        if layer == 2:
            return c
        if not hasattr(self, "shared") or self.shared.shape != c.loc.shape:
            self.shared = torch.empty_like(c.loc)
        self.shared.copy_(c.loc.detach())
        return Normal(self.shared, c.scale)


class KeptOnModel(LadderVAE):
    """A skip connection from z_3 to x that is kept on the model: right as long as one pass goes down at a time."""

    kept: Tensor

    def descend(self, state: Any, z: Tensor, layer: int) -> Any:
        if layer == 3:
            self.kept = z.mean(1, keepdim=True)
        return super().descend(state, z, layer)

    def likelihood(self, state: Any) -> Distribution:
        return super().likelihood(state + self.kept)


class KeptByInfer(LadderVAE):
    """The likelihood looks at what infer has seen last."""

    seen: Any = 0.0

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        self.seen = x[0].mean()
        return super().infer(x, rng=rng)

    def likelihood(self, state: Any) -> Distribution:
        return super().likelihood(state + self.seen)


class WithDropout(LadderVAE):
    def conditional(self, state: Any, layer: int) -> Normal:
        c = super().conditional(state, layer)
        return Normal(nn.functional.dropout(c.loc + 1, training=self.training), c.scale)


class WithBatchNorm(LadderVAE):
    def __init__(self) -> None:
        super().__init__((1, 4, 4), latent_dims=(3, 2), hidden=8)
        self.norm = nn.BatchNorm1d(3, momentum=0.5)

    def descend(self, state: Any, z: Tensor, layer: int) -> Any:
        return super().descend(state, self.norm(z) if layer == 1 else z, layer)


class Ignores(LadderVAE):
    """z_2 is never used."""

    def descend(self, state: Any, z: Tensor, layer: int) -> Any:
        return super().descend(state, torch.zeros_like(z) if layer == 2 else z, layer)


class SkipsObservation(LadderVAE):
    """z_1 does not reach x."""

    def likelihood(self, state: Any) -> Distribution:
        return super().likelihood(torch.zeros_like(state))


class Detached(LadderVAE):
    def descend(self, state: Any, z: Tensor, layer: int) -> Any:
        return super().descend(state, z.detach() if layer == 1 else z, layer)


class PerPixel(LadderVAE):
    """A likelihood over pixels instead of observations."""

    def likelihood(self, state: Any) -> Distribution:
        likelihood = super().likelihood(state)
        assert isinstance(likelihood, Independent)
        return likelihood.base_dist


class OverBatchSize(LadderVAE):
    """log_prob is divided by the number of observations."""

    def likelihood(self, state: Any) -> Distribution:
        likelihood: Any = super().likelihood(state)
        log_prob = likelihood.log_prob
        likelihood.log_prob = lambda x: log_prob(x) / len(x)
        return likelihood


class GrowingList(LadderVAE):
    """The usual slip of skip connections: one list shared by all branches, which grows."""

    def start(self, batch_size: int) -> Any:
        return (super().start(batch_size), [])

    def conditional(self, state: Any, layer: int) -> Normal:
        return super().conditional(state[0], layer)

    def descend(self, state: Any, z: Tensor, layer: int) -> Any:
        state[1].append(z)
        return (super().descend(state[0], z, layer), state[1])

    def likelihood(self, state: Any) -> Distribution:
        return super().likelihood(sum(s.sum(1, keepdim=True) for s in state[1]) + state[0])


class DecoderDropout(LadderVAE):
    def likelihood(self, state: Any) -> Distribution:
        return super().likelihood(nn.functional.dropout(state, training=self.training))


class NegativeScale(LadderVAE):
    def conditional(self, state: Any, layer: int) -> Normal:
        c = super().conditional(state, layer)
        return Normal(c.loc, -c.scale, validate_args=False)


class Discrete(LadderVAE):
    def conditional(self, state: Any, layer: int) -> Any:
        return Bernoulli(logits=super().conditional(state, layer).loc)


class Unknown(LadderVAE):
    """No map from noise is known of it."""

    def conditional(self, state: Any, layer: int) -> Any:
        c = super().conditional(state, layer)
        return StudentT(4.0, c.loc, c.scale)


class OneWay(SinhNormal):
    """Noise does not come back."""

    def to_noise(self, value: Tensor) -> Tensor:
        return super().to_noise(value) + 0.2


class ManyToOne(LadderVAE):
    def conditional(self, state: Any, layer: int) -> Any:
        c = super().conditional(state, layer)
        return OneWay(c.loc, c.scale)


class WrongDensity(SinhNormal):
    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) + self.scale.log()  # forgets the scale's part of the determinant


class WithoutDeterminant(LadderVAE):
    def conditional(self, state: Any, layer: int) -> Any:
        c = super().conditional(state, layer)
        return WrongDensity(c.loc, 2 * c.scale)


class Narrow(LadderVAE):
    """A prior that is narrower than the posterior can be."""

    def conditional(self, state: Any, layer: int) -> Any:
        c = super().conditional(state, layer)
        return Uniform(c.loc - 0.01, c.loc + 0.01)


class Shapeless(LinearLadder):
    """latent_shapes of numbers instead of shapes."""

    def __init__(self) -> None:
        super().__init__((3, 2), dtype=torch.float32)
        self.latent_shapes = (3, 2)  # type: ignore[assignment]


class Reversed(LinearLadder):
    """latent_shapes from the top down."""

    def __init__(self) -> None:
        super().__init__((3, 2), dtype=torch.float32)
        self.latent_shapes = self.latent_shapes[::-1]


class CountedFromTheTop(LadderVAE):
    """Takes layer 1 for the top."""

    def conditional(self, state: Any, layer: int) -> Normal:
        return super().conditional(state, 3 - layer)


class ZeroInitialised(LadderVAE):
    """As many public models are before training."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        nn.init.zeros_(self.prior[0][-2].weight)  # type: ignore[index,arg-type]


# ------------------------------------------------------------------------------------------------------- faults of `infer`


class Infer(LadderVAE):
    """With something done to what infer gives."""

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        return self.changed(super().infer(x, rng=rng))

    def changed(self, drawn: Inferred) -> Inferred:
        return drawn


class InferReversed(Infer):
    def changed(self, drawn: Inferred) -> Inferred:
        return Inferred(drawn.latents[::-1], drawn.log_q)


class InferSummed(Infer):
    def changed(self, drawn: Inferred) -> Inferred:
        return Inferred(drawn.latents, drawn.log_q.sum(1))


class InferDetached(Infer):
    def changed(self, drawn: Inferred) -> Inferred:
        return Inferred(tuple(z.detach() for z in drawn.latents), drawn.log_q)


class LogQDetached(Infer):
    """log q of one layer has lost its gradient; stacked with the other it still says that it has one."""

    def changed(self, drawn: Inferred) -> Inferred:
        return Inferred(drawn.latents, torch.stack([drawn.log_q[:, 0], drawn.log_q[:, 1].detach()], 1))


class ConstantLogQ(Infer):
    def changed(self, drawn: Inferred) -> Inferred:
        return Inferred(drawn.latents, torch.zeros_like(drawn.log_q))


class NotFinite(Infer):
    def changed(self, drawn: Inferred) -> Inferred:
        return Inferred(drawn.latents, drawn.log_q * float("inf"))


class InferNumpy(LadderVAE):
    """Draws from a stream that torch does not know."""

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        torch.default_generator.manual_seed(int(np.random.default_rng().integers(2**31)))
        return super().infer(x)


class InferMean(LadderVAE):
    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        return super().infer(x, rng=torch.Generator().manual_seed(0))


class SharedNoise(LinearLadder):
    """One draw of noise for the whole batch."""

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        latents = [x @ w.T + v * torch.randn(len(v), dtype=x.dtype) for w, v in zip(self.w, self.v, strict=True)]
        pairs = zip(latents, self.w, self.v, strict=True)
        return Inferred(tuple(latents), torch.stack([Normal(x @ w.T, v).log_prob(z).sum(1) for z, w, v in pairs], 1))


class InferBatchNorm(LadderVAE):
    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        return super().infer(nn.functional.batch_norm(x, None, None, training=self.training), rng=rng)


class InferGlobal(LadderVAE):
    """Ignores rng: sound, as the library calls it under a seeded stream."""

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        return super().infer(x)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Reversed, "layer order: latent_shapes runs from the top; it must run from z_1"),
        (lambda: build(CountedFromTheTop), "layer order: .*take layer 1 for the top; the top is layer 2"),
        (lambda: build(InPlace), "descend: one state at layer 2, taken down twice"),
        (lambda: build(SharedBuffer), "from layer 1 on.*kept on the model"),
        (
            lambda: KeptOnModel((1, 4, 4), latent_dims=(3, 2, 2), hidden=8).eval(),
            "a pass comes out otherwise where another one goes down between its calls, from layer x on.*kept on the model",
        ),
        (lambda: build(KeptByInfer), "from layer x on.*kept on the model"),
        (lambda: build(WithDropout).train(), "two calls on one state differ at layer 2.* dropout"),
        (lambda: WithBatchNorm().train(), "changes with the rest of its batch.*batch norm in train mode"),
        (lambda: build(Ignores), "changing z_2 does not change any layer below it or the observation"),
        (lambda: build(SkipsObservation), "changing z_1 does not change the observation"),
        (lambda: build(ZeroInitialised), "changing z_2 does not change .*zero-initialised layers.*check a trained one"),
        (lambda: build(Detached), "the observation changes with z_1, but autograd gives no gradient.* Is the latent detached"),
        (lambda: build(PerPixel), r"batch_shape \(2,\) .* got \(2, 1, 4, 4\).*Independent\(…, 3\)"),
        (lambda: build(OverBatchSize), "likelihood: that of an observation changes with the rest of its batch.*averaged"),
        (lambda: build(GrowingList), "descend: one state at layer [12], taken down twice"),
        (lambda: build(DecoderDropout).train(), "likelihood: two calls on one state differ.* dropout"),
        (Shapeless, r"latent_shapes: expected a shape per layer, .* got \(3, 2\)"),
        (lambda: build(NegativeScale), "scale of layer 2 must be above 0"),
        (lambda: build(Discrete), "for layer 2 expected .*Normal, MultivariateNormal.* got Bernoulli, which is discrete"),
        (lambda: build(Unknown), r"for layer 2 expected .* got StudentT\. Give it from_noise"),
        (lambda: build(ManyToOne), "the OneWay of layer 2 takes noise of -1.0 .* back to -0.8. .* the same noise"),
        (
            lambda: build(WithoutDeterminant),
            r"log_prob of layer 2, a WrongDensity, says .* at z = T.*log-determinant left out",
        ),
        (lambda: build(Narrow), r"infer: [0-9]+ values of z_2 are where p\(z_2 \| z_\(>2\)\), a Uniform, cannot be"),
        (lambda: build(InferReversed), "expected latents .z_1 first. of shapes"),
        (lambda: build(InferSummed), r"log_q of shape \(batch, L\)"),
        (lambda: build(InferDetached), r"infer: z_2 carries no gradient to inference\.[01]\."),
        (lambda: build(LogQDetached), r"infer: log_q of layer 2 carries no gradient to inference\."),
        (lambda: build(InferNumpy), "two draws under one seed of torch's random streams differ. Draw from torch .not numpy."),
        (lambda: build(InferMean), "different seeds give the same draw of z_1"),
        (lambda: SharedNoise((3, 2)), "equal observations of one batch get the same z_1"),
        (lambda: build(NotFinite), "infer: its draws, or their log q, are not finite"),
        (lambda: build(ConstantLogQ), "log_q of layer 1 is the same for different draws"),
        (
            lambda: build(InferBatchNorm).train(),
            "infer: the latents of an observation, or their log q, change with the rest of its batch .seen at layer 1",
        ),
    ],
)
def test_each_fault_is_named(make: Callable[[], Any], words: str) -> None:
    generator = make()
    x = torch.randn(4, 3, dtype=generator.out.dtype) if isinstance(generator, LinearLadder) else X
    with pytest.raises(GeneratorError, match=f"(?s){words}"):
        check_generator(generator, x)


def test_an_infer_that_ignores_rng_is_sound() -> None:
    assert len(check_generator(build(InferGlobal), X)) == WITH_INFER


def test_an_independent_of_too_few_dimensions() -> None:
    """The advice counts from the distribution per element, whatever it is wrapped in already."""

    class Rows(LadderVAE):
        def likelihood(self, state: Any) -> Distribution:
            return Independent(super().likelihood(state).base_dist, 1)  # type: ignore[attr-defined]

    with pytest.raises(GeneratorError, match=r"Independent\(…, 3\)"):
        check_generator(build(Rows), X)


def test_gray_images_under_bernoulli_pixels() -> None:
    """Torch's own check of a Bernoulli's support is not the protocol's: cross entropies of gray images are in use."""

    class Plain(LadderVAE):
        def likelihood(self, state: Any) -> Distribution:
            return Independent(Bernoulli(logits=self.decoder(state)), 3)

    assert check_generator(build(Plain), X)


def test_missing_calls_are_named() -> None:
    class Half(nn.Module):
        latent_shapes = (torch.Size((2,)),)

        def start(self, batch_size: int) -> None: ...

    with pytest.raises(GeneratorError, match="lacks conditional, descend, likelihood"):
        check_generator(Half(), X)  # type: ignore[arg-type]


def test_the_earlier_protocol_is_named() -> None:
    class Earlier(LadderVAE):
        def conditional(self, state: Any) -> Any:  # type: ignore[override]
            return super().conditional(state, 1)

    class EarlierDescent(LadderVAE):
        def descend(self, state: Any, z: Tensor) -> Any:  # type: ignore[override]
            return z

    class EarlierInferred(Infer):
        def changed(self, drawn: Inferred) -> Inferred:
            return Inferred(drawn.latents, drawn.log_q, "top_down")  # type: ignore[arg-type]

    with pytest.raises(GeneratorError, match=r"expected conditional\(state, layer\), got conditional\(state.*earlier form"):
        probe_generator(build(Earlier))
    with pytest.raises(GeneratorError, match=r"expected descend\(state, z, layer\), got descend\(state.*earlier form"):
        probe_generator(build(EarlierDescent))
    with pytest.raises(GeneratorError, match="factorisation is no longer asked for"):
        check_generator(build(EarlierInferred), X)


def test_an_exception_inside_the_generator_is_told() -> None:
    class Breaks(LadderVAE):
        def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
            raise KeyError("encoder")

    with pytest.raises(GeneratorError, match=r"while checking that infer gives .* raised KeyError: 'encoder'"):
        check_generator(build(Breaks), X)


# ------------------------------------------------------------------------------------------------------------ observations


def test_the_call_that_fails_is_named() -> None:
    class Failing(LadderVAE):
        def conditional(self, state: Any, layer: int) -> Normal:
            if layer == 1:
                raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
            return super().conditional(state, layer)

    words = r"generator.conditional\(state, layer=1\) raised .*Does it take layer 2 for the top and 1 for the layer nearest"
    with pytest.raises(GeneratorError, match=words):
        check_generator(build(Failing), X)


def test_observations_of_another_shape() -> None:
    with pytest.raises(GeneratorError, match=r"an observation has shape \(1, 5, 5\), but .* event_shape is \(1, 4, 4\)"):
        check_generator(vae(), torch.rand(4, 1, 5, 5))
    with pytest.raises(ArgumentError, match=r"two or more observations, .* got shape \(1, 1, 4, 4\)"):
        check_generator(vae(), X[:1])
    with pytest.raises(ArgumentError, match=r"expected a torch.Tensor or a numpy array, got list"):
        check_generator(vae(), X.tolist())
    with pytest.raises(ArgumentError, match=r"a dense tensor with values, got a torch.strided one on meta"):
        check_generator(vae(), X.to("meta"))
    unsaid = vae(likelihood="bernoulli")
    unsaid.x_range = None  # type: ignore[assignment]
    with pytest.raises(GeneratorError, match="values from 0 to 255, but the likelihood is a Bernoulli, of numbers in"):
        check_generator(unsaid, 255 * X)


def test_arrays_are_converted_to_the_model() -> None:
    generator = vae()
    assert check_generator(generator, X.numpy()) == check_generator(generator, X.double().numpy())
    with torch.inference_mode():
        assert len(check_generator(generator, X.clone())) == WITH_INFER


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


# ------------------------------------------------------------------------------------------------------------------- log q


class Flow(LadderVAE):
    """Posterior draws of z_1 doubled by a flow, whose log-determinant `infer` counts `share` of."""

    share = 1.0

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        drawn = super().infer(x, rng=rng)
        log_det = drawn.latents[0][0].numel() * math.log(2)
        log_q = drawn.log_q - self.share * torch.tensor([log_det, 0.0])
        return Inferred((2 * drawn.latents[0], drawn.latents[1]), log_q)


class CurvedFlow(LadderVAE):
    """Draws of z_1 through sinh, which no μ and σ can be read off."""

    share = 1.0

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        drawn = super().infer(x, rng=rng)
        z = drawn.latents[0]
        log_det = torch.stack([z.cosh().log().sum(1), z.new_zeros(len(z))], 1)
        return Inferred((z.sinh(), drawn.latents[1]), drawn.log_q - self.share * log_det)

    def posterior_log_prob(self, x: Tensor, latents: tuple[Tensor, ...]) -> Tensor:
        below, terms = x, []
        for layer, (net, z) in enumerate(zip(self.inference, latents, strict=True)):
            base = z.asinh() if layer == 0 else z
            loc, raw = net(below).chunk(2, dim=1)
            terms.append(Normal(loc, (5 * torch.tanh(raw / 5)).exp()).log_prob(base).sum(1))
            below = base
        return torch.stack(terms, 1) - torch.stack([latents[0].asinh().cosh().log().sum(1), torch.zeros(len(x))], 1)


@pytest.mark.parametrize("kind", [Flow, CurvedFlow])
@pytest.mark.parametrize("share", [1.0, 0.0, -1.0])
def test_log_determinants(kind: type[LadderVAE], share: float) -> None:
    """Of a flow that is affine, by μ and σ of its draws; of another, by the model's own `posterior_log_prob`."""
    generator: Any = build(kind)
    generator.share = share
    if share == 1.0:
        said = " ".join(check_generator(generator, X))
        assert ("not in 1: layer 1: its draw is not μ + σ ε" in said) is (kind is CurvedFlow)
        assert ("posterior_log_prob gives the same in every layer" in said) is (kind is CurvedFlow)
        return
    with pytest.raises(GeneratorError, match="log q of layer 1: infer says .*log-determinant of a flow"):
        check_generator(generator, X)


def test_a_reading_is_not_faulted_for_what_it_cannot_read() -> None:
    """log q of draws of another family is not held to anything; that is said."""

    class Exponential(LinearLadder):
        def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
            latents, log_q = [], []
            for w, v in zip(self.w, self.v, strict=True):
                e = torch.empty(len(x), len(v), dtype=x.dtype).exponential_()
                latents.append(x @ w.T + v * e)
                log_q.append((-e - v.log()).sum(1))
            return Inferred(tuple(latents), torch.stack(log_q, 1))

    said = check_generator(Exponential((3, 2)), torch.randn(4, 3).double())
    assert "no layer; not in 1, 2: layer 2: no normal or uniform draw of torch's changes it" in said[-1]


class Quantiles(LinearLadder):
    """q draws z as torch's distributions of other families do."""

    def __init__(self, family: str, error: float = 0.0) -> None:
        super().__init__((3, 2))
        self.family, self.error = FAMILIES[family], error

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        drawn = [self.family(x @ w.T, v.expand(len(x), -1)) for w, v in zip(self.w, self.v, strict=True)]
        latents = tuple(q.rsample() for q in drawn)
        log_q = [q.log_prob(z).sum(1) + self.error for q, z in zip(drawn, latents, strict=True)]
        return Inferred(latents, torch.stack(log_q, 1))


@pytest.mark.parametrize("family", ["laplace", "uniform", "logistic"])
def test_log_q_of_other_families(family: str) -> None:
    """It is read off the draws, as that of a Gaussian is."""
    x = torch.randn(4, 3).double()
    said = check_generator(Quantiles(family), x)
    assert said[-1] == "log q of every layer is that of the distribution that infer draws it from"
    with pytest.raises(GeneratorError, match=f"log q of layer 2, 1: .* a {family.capitalize()} of which log q is"):
        check_generator(Quantiles(family, error=0.01), x)


@pytest.mark.parametrize("off", [0.0, 2e-5])
def test_how_near_the_two_sides_are_is_said(off: float) -> None:
    """Relative, of the observation and of the KL."""
    model = Handmade()
    calls: dict[str, Any] = {
        "reconstruct": lambda x: model(x) * (1 + off),
        "kl": lambda x: model.kl(x) * (1 + off),
    }
    *_, reconstruct, kl = check_generator(model, HAND_X, **calls)
    for line in (reconstruct, kl):
        assert float(line.rpartition(" to ")[2]) == pytest.approx(off, rel=0.5, abs=1e-6)


class Levels(LadderVAE):
    """A categorical likelihood: its mean is NaN by definition, and its draws are whole numbers."""

    def likelihood(self, state: Any) -> Distribution:
        mean = super().likelihood(state).mean
        return Independent(Categorical(logits=torch.stack([mean, 1 - mean], -1)), 3)


class OnlyDensity(Distribution):
    """No mean, and no draws."""

    def __init__(self, base: Distribution) -> None:
        self.base = base
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base.log_prob(value)


class WithMean(OnlyDensity):
    @property
    def mean(self) -> Tensor:
        return self.base.mean


class OfDensity(LadderVAE):
    kind: type[OnlyDensity] = OnlyDensity

    def likelihood(self, state: Any) -> Distribution:
        return self.kind(super().likelihood(state))


class OfMean(OfDensity):
    kind = WithMean


class Scaled(LadderVAE):
    """A transform whose parameter is as long as the batch."""

    def conditional(self, state: Any, layer: int) -> Any:
        c = super().conditional(state, layer)
        width = c.loc.shape[1]
        return TransformedDistribution(c, [AffineTransform(torch.linspace(0, 1, width), 2.0)])


@pytest.mark.parametrize("batch", [2, 3, 4])
def test_parameters_without_rows_are_not_taken_for_rows(batch: int) -> None:
    """Layers have 3 and 2 units."""
    assert len(check_generator(build(Scaled), X[:batch])) == WITH_INFER


@pytest.mark.parametrize(("loc", "scale"), [(100.0, 1e-3), (1.0, 1e-5), (1000.0, 0.01)])
def test_log_q_of_narrow_posteriors_is_read(loc: float, scale: float) -> None:
    """However small σ is beside μ: an error of log q is found in float32."""

    class Fine(LadderVAE):
        def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
            drawn = [Normal(loc + torch.zeros(len(x), d), scale) for d in (3, 2)]
            latents = [q.rsample() for q in drawn]
            log_q = [q.log_prob(z).sum(1) + error[0] for q, z in zip(drawn, latents, strict=True)]
            return Inferred(tuple(latents), torch.stack(log_q, 1))

    error = [0.0]
    generator = build(Fine)
    assert "log q" in check_generator(generator, X)[-1]
    error[0] = 5.0
    with pytest.raises(GeneratorError, match="log q of layer 2, 1: infer says"):
        check_generator(generator, X)


def test_what_a_likelihood_decodes_by() -> None:
    """Draws where there is no mean, in whole numbers too; a mean alone is enough, with the model's own calls as well."""
    levels, x = build(Levels), X.round()
    assert JointEBMPrior(levels).sample(2).unique().tolist() == [0.0, 1.0]
    said = check_generator(levels, x, sample=lambda n: levels.likelihood(levels_state(levels, n)).sample().float())
    assert said[-1].startswith("sample: every z agrees") or "agrees" in said[-1]
    generator = build(OfDensity)
    with pytest.raises(GeneratorError, match="likelihood: OnlyDensity has neither a mean nor sample"):
        check_generator(generator, X)
    generator = build(OfMean)
    drawn = "the observation agrees"
    assert drawn in check_generator(generator, X, sample=lambda n: generator.likelihood(levels_state(generator, n)).mean)[-1]


def levels_state(generator: Any, n: int) -> Any:
    """The state below z_1 of a draw of the generator's prior."""
    return TopDown(generator, n).descend(ancestral_noise(TopDown(generator, n)), "noise", to_observation=True).state


@pytest.mark.parametrize("family", FAMILIES)
def test_conditionals_of_other_families_pass(family: str) -> None:
    assert len(check_generator(FamilyLadder(family), torch.randn(4, 1).double())) == WITH_INFER


@pytest.mark.parametrize("family", ["laplace", "logistic", "uniform", "tanh, scaled", "log-normal"])
def test_own_calls_of_other_families(family: str) -> None:
    """Model and generator draw on the same noise, also where torch draws uniform numbers; an error in a sampler is seen."""

    def sample(n: int, off: float = 0.0) -> Tensor:
        zero = torch.zeros(n, 1, dtype=torch.float64)
        z2 = FAMILIES[family](zero, zero + 1).rsample()
        t = torch.tanh(z2)
        z1 = FAMILIES[family](0.8 * t + off, torch.exp(0.7 * t)).rsample()
        return torch.asinh(z1)

    ladder, x = FamilyLadder(family), torch.randn(4, 1).double()
    assert "the observation agrees" in check_generator(ladder, x, sample=sample)[-1]
    with pytest.raises(GeneratorError, match="sample: "):
        check_generator(ladder, x, sample=partial(sample, off=0.01))


class TopDownInference(ResidualVAE):
    """Hands over a pass with something wrong in it."""

    wrong = ""

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        found = super().infer(x, rng=rng)
        assert found.conditionals is not None
        if self.wrong == "order":
            return replace(found, conditionals=found.conditionals[::-1])
        if self.wrong == "detached":
            detached = tuple(Normal(p.loc.detach(), p.scale.detach()) for p in found.conditionals)  # type: ignore[attr-defined]
            return replace(found, conditionals=detached)
        if self.wrong == "short":
            return replace(found, conditionals=found.conditionals[:1])
        if self.wrong == "discrete":
            return replace(found, conditionals=tuple(Bernoulli(logits=p.loc) for p in found.conditionals))  # type: ignore[attr-defined]
        if self.wrong == "no state":
            return replace(found, state=None)
        if self.wrong == "log q":
            return replace(found, log_q=found.log_q.mean(0, keepdim=True).expand_as(found.log_q))
        return replace(found, state=found.state + 1) if self.wrong == "state" else found


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("order", "conditionals\\[1\\] is not that of z_2"),
        ("state", "its state does not give"),
        ("detached", "conditionals\\[0\\] carries no gradient"),
        ("short", "expected Inferred.conditionals, .* got Normal of shapes .* Leave both out"),
        ("discrete", r"as `conditional` gives them, of shapes .* got Bernoulli of shapes"),
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


# ----------------------------------------------------------------------------------------------------- the model's own calls


class Handmade(nn.Module):
    """A model of three layers of one shape, with its own forward pass and sampler that draw as they are told."""

    latent_shapes = (torch.Size((2,)),) * 3

    def __init__(self, draws: str = "top down") -> None:
        super().__init__()
        self.p: Any = nn.ModuleList(nn.Linear(2, 4) for _ in range(2))
        self.q: Any = nn.ModuleList(nn.Linear(6, 4) for _ in range(3))
        self.out, self.draws = nn.Linear(2, 6), draws

    def split(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = parameters.chunk(2, 1)
        return loc, raw.exp()

    def start(self, batch_size: int) -> Tensor:
        return self.out.weight.new_zeros(batch_size, 2)

    def conditional(self, state: Tensor, layer: int) -> Normal:
        return Normal(state, torch.ones_like(state)) if layer == 3 else Normal(*self.split(self.p[layer - 1](state)))

    def descend(self, state: Tensor, z: Tensor, layer: int) -> Tensor:
        return z

    def likelihood(self, state: Tensor) -> Distribution:
        return Independent(Normal(self.out(state), 0.5), 1)

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        q = [Normal(*self.split(net(x))) for net in self.q]
        latents = tuple(d.rsample() for d in q)
        return Inferred(latents, torch.stack([d.log_prob(z).sum(1) for d, z in zip(q, latents, strict=True)], 1))

    def noise(self, n: int) -> list[Tensor]:
        """ε of z_1, z_2, z_3, drawn in one of several ways."""
        if self.draws == "at once":
            return list(torch.randn(n, 6).chunk(3, 1))
        if self.draws == "stacked":
            return list(torch.randn(3, n, 2).unbind())
        if self.draws == "twice":  # a draw of the prior beside every one of the posterior
            return [
                torch.randn(2, n, 2)[0] if False else pair[0]
                for pair in [(torch.randn(n, 2), torch.randn(n, 2)) for _ in "123"]
            ]
        drawn = [torch.randn(n, 2) for _ in "123"]
        return drawn if self.draws == "bottom up" else drawn[::-1]

    def forward(self, x: Tensor) -> Tensor:
        draws = zip((net(x) for net in self.q), self.noise(len(x)), strict=True)
        z = [loc + scale * e for (loc, scale), e in ((self.split(parameters), e) for parameters, e in draws)]
        return self.out(z[0])

    def sample(self, n: int) -> Tensor:
        e = self.noise(n)
        z = e[2]
        for layer in (2, 1):
            loc, scale = self.split(self.p[layer - 1](z))
            z = loc + scale * e[layer - 1]
        return self.out(z)

    def kl(self, x: Tensor) -> Tensor:
        """KL(q ‖ p), (batch, 3)."""
        z, terms = self.noise(len(x)), []
        q = [self.split(net(x)) for net in self.q]
        z = [loc + scale * e for (loc, scale), e in zip(q, z, strict=True)]
        for layer in (1, 2, 3):
            p = self.conditional(z[layer] if layer < 3 else self.start(len(x)), layer)
            terms.append(torch.distributions.kl_divergence(Normal(*q[layer - 1]), p).sum(1))
        return torch.stack(terms, 1)


HAND_X = torch.linspace(-1, 1, 24).reshape(4, 6)


@pytest.mark.parametrize("draws", ["top down", "bottom up", "at once", "stacked", "twice"])
def test_draws_are_aligned_whatever_their_order(draws: str) -> None:
    model = Handmade(draws)
    said = check_generator(model, HAND_X, reconstruct=model, sample=model.sample, kl=model.kl)
    assert len(said) == WITH_ALL
    model.p[0].weight.data[0, 0] += 0.05  # seen by both sides
    wrong = Handmade(draws)
    wrong.load_state_dict(model.state_dict())
    wrong.p[1].bias.data[3] += 0.01  # σ of z_2, second element, 1 % larger
    with pytest.raises(GeneratorError, match=r"sample: .*" + ("" if draws in ("at once", "stacked") else "part at layer 2")):
        check_generator(wrong, HAND_X, sample=model.sample)


@pytest.mark.parametrize(("of", "layer"), [("q", 1), ("q", 2), ("q", 3), ("p", 1), ("p", 2)])
def test_one_percent_of_a_scale_is_found_at_its_layer(of: str, layer: int) -> None:
    """By each of the calls that can see it."""
    model = Handmade()
    wrong = Handmade()
    wrong.load_state_dict(model.state_dict())
    getattr(wrong, of)[layer - 1].bias.data[2:] += 0.01
    words = f"kl: it parts at layer [0-9, ]*{layer}[.,]" + (
        f".*draws part first at layer {layer}: .*1.01005" if of == "q" else ""
    )
    with pytest.raises(GeneratorError, match=words):
        check_generator(wrong, HAND_X, kl=model.kl)
    name, call = ("sample", model.sample) if of == "p" else ("reconstruct", model)
    with pytest.raises(GeneratorError, match=f"{name}: .*first part at layer {layer}: .*generator's σ is 1.01005 times"):
        check_generator(wrong, HAND_X, **{name: call})  # type: ignore[arg-type]


def own_terms(model: Handmade, x: Tensor, analytic: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """log p(x | z), and Σ KL(q ‖ p) or Σ (log q − log p) at the draw, by layer; (batch,), nats."""
    q = [Normal(*model.split(net(x))) for net in model.q]
    z = [d.loc + d.scale * e for d, e in zip(q, model.noise(len(x)), strict=True)]
    p = [model.conditional(z[layer] if layer < 3 else model.start(len(x)), layer) for layer in (1, 2, 3)]
    terms = [
        torch.distributions.kl_divergence(q_i, p_i).sum(1) if exact else (q_i.log_prob(z_i) - p_i.log_prob(z_i)).sum(1)
        for q_i, p_i, z_i, exact in zip(q, p, z, analytic, strict=True)
    ]
    return model.likelihood(z[0]).log_prob(x), torch.stack(terms).sum(0)


def own_elbo(model: Handmade, x: Tensor, analytic: Sequence[bool] = (True, True, True)) -> Tensor:
    """log p(x | z) − KL(q ‖ p), (batch,), nats."""
    log_p, kl = own_terms(model, x, analytic)
    return log_p - kl


@pytest.mark.parametrize("analytic", [(False, False, False), (True, True, True), (False, False, True)])
def test_an_elbo_alone_proves_a_generator(analytic: tuple[bool, ...]) -> None:
    """Per image, or their mean; what is wrong in q, in p or below z_1 is seen."""
    model = Handmade()
    elbo = lambda x: own_elbo(model, x, analytic)  # noqa: E731
    for call in (elbo, lambda x: elbo(x).mean(), lambda x: float(elbo(x).mean()), lambda x: elbo(x).numpy()):
        said = check_generator(model, HAND_X, elbo=call)
        assert len(said) == WITH_INFER + 1
        assert said[-1].startswith("elbo: it agrees with the model's own, to ")
    for of in ("p", "q"):
        wrong = Handmade()
        wrong.load_state_dict(model.state_dict())
        getattr(wrong, of)[1].bias.data[2:] += 0.01
        for call in (elbo, lambda x: elbo(x).mean()):
            words = r"elbo: the model says .*log p\(x \| z\) = .*log q − log p = .*KL" + (
                ".*draws part first at layer 2: .*1.01005" if of == "q" else ""
            )
            with pytest.raises(GeneratorError, match=words):
                check_generator(wrong, HAND_X, elbo=call)


@pytest.mark.parametrize("kind", ["independent", "multivariate"])
def test_analytic_kl_of_conditionals_that_are_one_event(kind: str) -> None:
    class Events(Handmade):
        def conditional(self, state: Tensor, layer: int) -> Any:
            p = super().conditional(state, layer)
            if kind == "independent":
                return Independent(p, 1)
            return torch.distributions.MultivariateNormal(p.loc, scale_tril=torch.diag_embed(p.scale))

    model, plain = Events(), Handmade()
    plain.load_state_dict(model.state_dict())
    calls: dict[str, Any] = {"kl": plain.kl, "elbo": lambda x: own_elbo(plain, x)}
    assert len(check_generator(model, HAND_X, **calls)) == WITH_INFER + 2


class Wide(Handmade):
    """A likelihood so sharp that it hides what an error in q changes: log p(x | z) is of the order of −10⁵ nats."""

    def likelihood(self, state: Tensor) -> Distribution:
        return Independent(Normal(self.out(state), 0.004), 1)


def test_an_error_that_only_the_draws_show() -> None:
    """The number agrees within what rounding may do; μ and σ of the draws do not."""
    model, wrong = Wide(), Wide()
    wrong.load_state_dict(model.state_dict())
    wrong.q[1].bias.data[2:] += 0.01
    fails = r"elbo: .*draws part first at layer 2: the generator's σ is 1.01005 times"
    with pytest.raises(GeneratorError, match=fails):
        check_generator(wrong, HAND_X, elbo=lambda x: own_elbo(model, x).mean())


def weighted(weights: tuple[float, float], log_p: Tensor, kl: Tensor) -> Tensor:
    return weights[0] * log_p - weights[1] * kl


def test_a_loss_is_no_elbo() -> None:
    model = Handmade()
    for factor, words in (
        (-1.0, r"its sign is the other. Multiply it by -1\."),
        (1 / 6, r"it is divided by the 6 elements of x. Multiply it by 6\."),
        (-1 / 6, r"its sign is the other and it is divided by the 6 elements of x. Multiply it by -6\."),
        (-1 / math.log(2), r"its sign is the other and it is in bits. Multiply it by -0.69"),
        (1 / (6 * math.log(2)), r"it is in bits per dimension. Multiply it by 4.15"),
    ):
        for reduce in (lambda t: t, lambda t: t.mean()):
            with pytest.raises(GeneratorError, match=f"elbo: .*agree but for the unit: {words}"):
                check_generator(model, HAND_X, elbo=lambda x: factor * reduce(own_elbo(model, x)))  # noqa: B023
    with pytest.raises(GeneratorError, match="its sign is the other and it is summed over the batch. Multiply it by -0.25"):
        check_generator(model, HAND_X, elbo=lambda x: -own_elbo(model, x).sum())
    with pytest.raises(GeneratorError, match="kl: .*it is in bits. Multiply it by 0.69"):
        check_generator(model, HAND_X, kl=lambda x: model.kl(x) / math.log(2))
    terms: Any = lambda x: own_terms(model, x, (True, True, True))  # noqa: E731
    for weights, words in (((1 / 6, 1), r"log p\(x \| z\) is a mean over the 6 elements"), ((1, 2), "Its KL has the weight 2")):
        with pytest.raises(GeneratorError, match=f"elbo: .*{words}"):
            check_generator(model, HAND_X, elbo=lambda x: weighted(weights, *terms(x)))  # noqa: B023
    for got, words in ((torch.zeros(4, 3), r"torch.float32 of shape \(4, 3\)"), ("-3 nats", "str"), (torch.tensor(3), "int64")):
        with pytest.raises(ArgumentError, match=rf"elbo: expected \(4,\), nats .* Got .*{words}"):
            check_generator(model, HAND_X, elbo=lambda x: got)  # noqa: B023


class Squashed(Handmade):
    """q draws z = tanh of a Gaussian, so that no μ and σ of z can be read off."""

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        drawn = super().infer(x)
        slopes = torch.stack([torch.log1p(-(z.tanh() ** 2)).sum(1) for z in drawn.latents], 1)
        return Inferred(tuple(z.tanh() for z in drawn.latents), drawn.log_q - slopes)

    def forward(self, x: Tensor) -> Tensor:
        loc, scale = self.split(self.q[0](x))
        return self.out((loc + scale * self.noise(len(x))[0]).tanh())


def test_draws_behind_a_map_are_followed_up_to_it() -> None:
    """Nothing is said to part where no step can be seen; an error before the map is named."""
    model = Squashed()
    assert len(check_generator(model, HAND_X, reconstruct=model)) == WITH_INFER + 1
    with pytest.raises(GeneratorError) as raised:
        check_generator(model, HAND_X, kl=lambda x: model.kl(x) + 1)
    assert "kl: it parts" in str(raised.value)
    assert "draws part" not in str(raised.value)
    wrong = Squashed()
    wrong.load_state_dict(model.state_dict())
    wrong.q[0].bias.data[2:] += 0.01
    with pytest.raises(GeneratorError, match="reconstruct: .*first part at layer 1: .*generator's σ is 1.01005 times"):
        check_generator(wrong, HAND_X, reconstruct=model)


class Bounded(LinearLadder):
    """p and q are tanh of Gaussians; in single precision q reaches 1."""

    shift = 0.0

    def conditional(self, state: Any, layer: int) -> Any:
        return TransformedDistribution(super().conditional(state, layer), [TanhTransform()])

    def gaussians(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """u_i with z_i = tanh u_i, and the log densities that they are drawn from, (batch, 2), nats."""
        drawn = super().infer(x)
        return (drawn.latents[0] + self.shift, drawn.latents[1]), drawn.log_q

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        u, log_q = self.gaussians(x)
        slopes = [2 * (math.log(2) - v - nn.functional.softplus(-2 * v)).sum(1) for v in u]
        return Inferred((u[0].tanh(), u[1].tanh()), log_q - torch.stack(slopes, 1))

    def own_kl(self, x: Tensor) -> Tensor:
        """log q − log p at the draw, of u, where both are Gaussian: the slope of tanh is in both, (batch, 2), nats."""
        u, log_q = self.gaussians(x)
        state = self.start(len(x))
        terms = []
        for layer in (2, 1):
            terms.insert(0, super().conditional(state, layer).log_prob(u[layer - 1]).sum(1))
            state = self.descend(state, u[layer - 1].tanh(), layer)
        return log_q - torch.stack(terms, 1)


def test_draws_rounded_to_an_end_of_their_range() -> None:
    x, ladder = torch.randn(4, 3), Bounded((3, 2), dtype=torch.float32)
    assert check_generator(ladder, x)
    ladder.shift = 9.0
    with pytest.raises(GeneratorError, match=r"values of z_1 are rounded to the end of what p\(z_1 .* keep its draws inside"):
        check_generator(ladder, x)


def test_what_a_last_digit_of_z_changes_is_allowed() -> None:
    """Near 1, where a digit of z is much of its u; and an error beyond it is seen."""
    x, ladder = torch.randn(4, 3), Bounded((3, 2), dtype=torch.float32)
    ladder.shift = 5.5
    assert check_generator(ladder, x, kl=ladder.own_kl)
    with pytest.raises(GeneratorError, match="kl: it parts at layer 1"):
        check_generator(ladder, x, kl=lambda x: ladder.own_kl(x) + torch.tensor([3.0, 0.0]))


def test_parts_of_two_passes_are_no_elbo() -> None:
    model = Handmade()
    two: Any = lambda x: own_terms(model, x, (True,) * 3)[0] - own_terms(model, x, (False,) * 3)[1]  # noqa: E731
    with pytest.raises(GeneratorError, match="elbo: .*The call draws 2 times what one pass does"):
        check_generator(model, HAND_X, elbo=two)


def test_a_wrong_map_of_a_layer_is_not_said_to_agree() -> None:
    """The Gaussian that a map starts from is followed, what becomes of it is not."""

    class Mapped(Handmade):
        def conditional(self, state: Tensor, layer: int) -> Any:
            p = super().conditional(state, layer)
            return TransformedDistribution(p, [TanhTransform()]) if layer == 1 else p

        def sample(self, n: int) -> Tensor:
            e = self.noise(n)
            loc, scale = self.split(self.p[1](e[2]))
            loc, scale = self.split(self.p[0](loc + scale * e[1]))
            return self.out(loc + scale * e[0])

    model = Mapped()
    with pytest.raises(GeneratorError, match=r"sample: .* a layer whose draw could not be followed \(1\); the others agree"):
        check_generator(model, HAND_X, sample=model.sample)


def test_what_the_calls_may_give() -> None:
    """Means, draws, log densities, distributions; KL in sum, as a tensor, or as a list of anything over a batch."""
    model = Handmade()

    def likelihood(x: Tensor) -> Independent:
        return Independent(Normal(model(x), 0.5), 1)

    spread: Any = lambda x: [term.unsqueeze(1).expand(-1, 4) / 4 for term in model.kl(x).unbind(1)]  # noqa: E731
    for reconstruct in (
        model,
        likelihood,
        lambda x: likelihood(x).log_prob(x),
        lambda x: likelihood(x).sample(),
        lambda x: likelihood(x).base_dist,
        lambda x: model(x).numpy(),
    ):
        assert len(check_generator(model, HAND_X, reconstruct=reconstruct)) == WITH_INFER + 1
    for kl in (model.kl, spread, lambda x: model.kl(x).sum(1), lambda x: list(model.kl(x).unbind(1))):
        assert len(check_generator(model, HAND_X, kl=kl)) == WITH_INFER + 1


def test_what_the_calls_may_not_give() -> None:
    model = Handmade()
    for keywords, words in (
        (
            {"reconstruct": lambda x: model(x)[:, :3]},
            r"reconstruct: expected observations \(4, 6\).*Got torch.float32 of shape \(4, 3\)",
        ),
        ({"sample": lambda n: "images"}, "sample: expected observations .* Got str"),
        ({"kl": lambda x: model.kl(x)[:, :2]}, r"kl: expected \(4, 3\), nats .* Got torch.float32 of shape \(4, 2\)"),
        ({"kl": lambda x: [model.kl(x)]}, r"kl: expected .* Got list of 1: torch.float32 of shape \(4, 3\)"),
        ({"sample": lambda n: model.sample(n) * math.nan}, "sample: expected numbers, got 24 NaN among 24 values"),
        ({"elbo": lambda: 1.0}, r"elbo: called with x, \(4, 6\), it raised TypeError"),
        ({"sample": 3}, "sample: expected a function, got int"),
        (
            {"sample": lambda n: model.out(torch.rand(n, 2))},
            r"draws numbers of shapes \[\(4, 2\)\], which are not those of the layers",
        ),
    ):
        with pytest.raises(ArgumentError, match=words):
            check_generator(model, HAND_X, **keywords)  # type: ignore[arg-type]
    model.infer = None  # type: ignore[assignment,method-assign]
    with pytest.raises(ArgumentError, match="kl: it needs a generator with infer, to compare with; Handmade has none"):
        check_generator(model, HAND_X, kl=model.kl)


def test_observations_drawn_from_other_numbers_are_not_compared() -> None:
    """A sampler's own pixel noise cannot be replayed; its layers can."""
    model = Handmade()
    said = check_generator(model, HAND_X, sample=lambda n: model.sample(n) + torch.rand(n, 6).logit())
    assert "every z agrees with the model's own; its observation is drawn" in said[-1]


def test_kl_in_the_other_order_and_latents_exchanged() -> None:
    model = Handmade()
    with pytest.raises(GeneratorError, match="kl: it parts at layer 3, 1.* The model has that at layer 1"):
        check_generator(model, HAND_X, kl=lambda x: model.kl(x).flip(1))

    class Exchanged(Handmade):
        def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
            drawn = super().infer(x)
            z, q = drawn.latents, drawn.log_q
            return Inferred((z[1], z[0], z[2]), q[:, [1, 0, 2]])

    wrong = Exchanged()
    wrong.load_state_dict(model.state_dict())
    assert len(check_generator(wrong, HAND_X)) == WITH_INFER  # nothing in the protocol says so
    with pytest.raises(GeneratorError, match="it is what infer has as z_1: are z_2 and z_1 swapped in its latents"):
        check_generator(wrong, HAND_X, reconstruct=model)


def test_draws_of_torchscript_are_replayed() -> None:
    """NVAE and VDVAE draw inside scripted functions, below what a TorchFunctionMode sees."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")

        @torch.jit.script
        def draw(mu: Tensor, sigma: Tensor) -> Tensor:
            noise = mu.mul(0).normal_()
            return noise.mul_(sigma).add_(mu)

    model = Handmade()

    def sample(n: int, factor: float = 1.0) -> Tensor:
        z = draw(torch.zeros(n, 2), torch.ones(n, 2))
        for layer in (2, 1):
            loc, scale = model.split(model.p[layer - 1](z))
            z = draw(loc, scale * (factor if layer == 1 else 1.0))
        return model.out(z)

    assert len(check_generator(model, HAND_X, sample=sample)) == WITH_INFER + 1
    with pytest.raises(GeneratorError, match="first part at layer 1: .*σ is 1.0101 times the model's"):
        check_generator(model, HAND_X, sample=lambda n: sample(n, 0.99))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 4, 5])
def test_planted_faults_are_found_at_other_weights(seed: int) -> None:
    for fault in FAULTS:
        torch.manual_seed(seed)
        case = fault.make()
        with pytest.raises(GeneratorError, match=f"(?s){fault.says}"):
            check_generator(case.generator, case.x, **case.calls)
    for make, own in ((nvae, nvae_calls), (deep, deep_calls)):
        case = make()
        assert check_generator(case.generator, case.x, **own(case.generator.model).keywords())
    case = vdvae()
    assert check_generator(case.generator, case.x, **vdvae_calls(case.generator.model, case.x).keywords())


# ---------------------------------------------------------------------------------------------------------------- no trace


def everything(generator: nn.Module) -> dict[str, Any]:
    """What a check could change, by value."""
    found: dict[str, Any] = {name: value.clone() for name, value in generator.state_dict().items()}
    found |= {f"grad of {n}": None if p.grad is None else p.grad.clone() for n, p in generator.named_parameters()}
    found |= {f"requires_grad of {n}": p.requires_grad for n, p in generator.named_parameters()}
    for name, module in generator.named_modules():
        found |= {f"{name}.{key}": id(value) for key, value in module.__dict__.items()}
        found[f"training of {name}"] = module.training
    found |= {"python": random.getstate(), "numpy": np.random.get_state()[1].copy(), "torch": torch.get_rng_state()}  # type: ignore[index]
    return found | {"validation": Distribution._validate_args, "gradients": torch.is_grad_enabled()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        return bool(np.array_equal(x, y)) if isinstance(x, Tensor | np.ndarray) else x == y

    return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)


class Untidy(LadderVAE):
    """Writes on the model, draws from every stream, and collects gradients, in ways that are no fault of the protocol."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.seen: list[Tensor] = []
        self.counts = {"infer": 0}
        self.register_buffer("calls", torch.zeros(()))

    def likelihood(self, state: Any) -> Distribution:
        self.last = state
        self.calls += 1
        return super().likelihood(state)

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        _ = random.random(), np.random.random()  # noqa: S311
        self.seen.append(x)
        self.counts["infer"] += 1
        return super().infer(x, rng=rng)


@pytest.mark.parametrize("kind", [Untidy, LadderVAE])
@pytest.mark.parametrize("fails", [False, True])
def test_a_check_leaves_no_trace(kind: type[LadderVAE], fails: bool) -> None:
    generator = build(kind)
    generator.inference[0].train()
    generator.prior[0][1].weight.requires_grad_(False)  # type: ignore[union-attr,index,operator]
    generator.decoder[1].bias.grad = torch.ones_like(generator.decoder[1].bias)  # type: ignore[arg-type]
    before = everything(generator)

    def sample(n: int) -> Tensor:
        with torch.enable_grad():
            generator.decoder(torch.randn(n, 3)).sum().backward()
        generator.eval()
        generator.extra = torch.ones(1)  # type: ignore[assignment]
        if fails:
            raise KeyboardInterrupt
        return generator.decoder(torch.zeros(n, 3))

    with pytest.raises(KeyboardInterrupt if fails else (GeneratorError, ArgumentError)):
        check_generator(generator, X, sample=sample)
    assert same(everything(generator), before)


def test_a_model_that_only_the_calls_know_is_left_alone_too() -> None:
    """Behind a partial, another function, and a closure."""
    generator, own = Handmade(), nn.BatchNorm1d(6)
    before = everything(own)

    def run(n: int) -> Tensor:
        return own(torch.randn(n, 6))

    def sample(unused: str, n: int) -> Tensor:
        return generator.sample(n) + 0 * run(n)

    assert len(check_generator(generator, HAND_X, sample=partial(sample, "unused"))) == WITH_INFER + 1
    assert same(everything(own), before)


def test_running_statistics_stay_and_nothing_is_claimed_that_was_not_tested() -> None:
    model = WithBatchNorm()
    assert model.training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(GeneratorError):
        check_generator(model, X)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    without = vae()
    without.infer = None  # type: ignore[assignment,method-assign]
    assert not any("infer" in sentence for sentence in check_generator(without, X))


def test_a_model_that_its_first_batch_sets() -> None:
    """It is set by its own forward for the check, put back, and the user told; one without shapes yet is refused."""
    model = SideLatentSetByData()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="set by the first batch.*Run the model once"):
        assert len(check_generator(model, torch.randn(N, 6))) == WITH_INFER
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    lazy = SideLatent()
    lazy.out = nn.LazyLinear(6)  # type: ignore[assignment]
    with pytest.raises(GeneratorError, match="parameter out.weight has no shape yet.*Run the model once by its own forward"):
        check_generator(lazy, torch.randn(N, 6))


def test_other_calls_wait() -> None:
    entered = threading.Event()

    def other() -> None:
        with exclusive():
            entered.set()

    class Watched(LadderVAE):
        def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
            if not threads:
                threads.append(threading.Thread(target=other))
                threads[0].start()
            assert not entered.wait(0.01)
            return super().infer(x, rng=rng)

    threads: list[threading.Thread] = []
    assert check_generator(build(Watched), X)
    threads[0].join()
    assert entered.is_set()


# --------------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_in_words(dtype: torch.dtype) -> None:
    class Half(SideLatent):
        def conditional(self, state: Any, layer: int) -> Normal:
            c = super().conditional(state, layer)
            return Normal(c.loc.to(dtype), c.scale.to(dtype))

        def descend(self, state: Any, z: Tensor, layer: int) -> Any:
            return super().descend(state, z.float(), layer)

    for generator in (vae().to(dtype), Half()):
        with pytest.raises(GeneratorError, match=re.escape(str(dtype)) + r".*hundreds of nats.*model\.float\(\)"):
            probe_generator(generator)


def test_autocast_changes_nothing() -> None:
    case = nvae()
    with torch.autocast("cpu", torch.bfloat16):
        assert len(check_generator(case.generator, case.x, **case.calls)) == WITH_ALL
        assert probe_generator(Handmade()).latents[0].dtype == torch.float32


def test_single_precision_is_judged_as_such_and_double_by_its_own_rounding() -> None:
    """An error of 3e-6 of σ is rounding in float32, and an error in float64; noise may be drawn in single precision there."""
    model = Handmade()

    def sample(n: int) -> Tensor:
        e = model.noise(n)
        z = e[2].to(model.out.weight.dtype)
        for layer in (2, 1):
            loc, scale = model.split(model.p[layer - 1](z))
            z = loc + (1 + 3e-6) * scale * e[layer - 1].to(z)
        return model.out(z)

    assert check_generator(model, HAND_X, sample=sample)
    model.double()
    with pytest.raises(GeneratorError, match="sample: .*first part at layer 2"):
        check_generator(model, HAND_X.double(), sample=sample)


def test_a_narrow_posterior_is_no_fault() -> None:
    """σ of 1e-6 beside a mean of 3: log q is known to what rounding leaves of it."""

    class Narrow(Handmade):
        def split(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
            loc, scale = super().split(parameters)
            return loc + 3, 1e-6 * scale

    assert len(check_generator(Narrow(), HAND_X)) == WITH_INFER


def test_adapters_of_nvae_keep_their_convolutions() -> None:
    """The model's own forward keeps normalised weights on it; after a check they are those of before."""
    case = nvae()
    convolutions = [part for part in case.generator.model.modules() if hasattr(part, "weight_normalized")]
    before = [part.weight_normalized for part in convolutions]
    assert isinstance(case.generator, NVAEAdapter)
    check_generator(case.generator, case.x, **case.calls)
    assert all(part.weight_normalized is kept for part, kept in zip(convolutions, before, strict=True))
