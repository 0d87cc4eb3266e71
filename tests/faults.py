"""Sixteen faults planted in correct adapters, one each, what `check_generator` must say of them, and correct generators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from ladders import LinearLadder, ScaleLadder
from own_calls import deep_calls, nvae_calls, vdvae_calls
from runs import TwoLayers
from stand_ins import NVAE, VDVAE, DeepVAE, perturbed
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from energy_prior import Inferred, LadderVAE, ResidualVAE
from energy_prior.adapters import DeepVAEAdapter, NVAEAdapter, VDVAEAdapter
from energy_prior.generators.likelihoods import InModelUnits

N = 4


class Case(NamedTuple):
    """A generator, observations of it, and the model's own calls that go with it."""

    generator: Any
    x: Tensor
    calls: dict[str, Any]


class Fault(NamedTuple):
    """What was planted, where, and what must be said.

    Attributes:
        name: of the fault.
        make: a generator that has it.
        says: a regular expression that the message must match, the layer at fault in it where there is one.
    """

    name: str
    make: Callable[[], Case]
    says: str


def eight_bit(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape) / 255


def nvae(kind: type[NVAEAdapter] = NVAEAdapter, decoder: str = "normal", own: bool = True, **keywords: Any) -> Case:
    model = perturbed(NVAE(decoder, **keywords))
    generator = kind(model)
    x = eight_bit(N, *generator.x_shape)
    x = (x > 0.5).float() if decoder == "bernoulli" else x
    return Case(generator, x, nvae_calls(model).keywords() if own else {})


def vdvae(kind: type[VDVAEAdapter] = VDVAEAdapter, own: bool = True) -> Case:
    model, x = perturbed(VDVAE()), eight_bit(N, 3, 8, 8)
    return Case(kind(model), x, vdvae_calls(model, x).keywords() if own else {})


def deep(
    kind: type[DeepVAEAdapter] = DeepVAEAdapter,
    likelihood: str = "bernoulli",
    ladder: bool = False,
    own: bool = True,
    **more: Any,
) -> Case:
    model = perturbed(DeepVAE(likelihood, ladder, **more))
    generator = kind(model)
    x = eight_bit(N, *generator.x_shape)
    x = (x > 0.5).float() if likelihood == "bernoulli" else x
    return Case(generator, x, deep_calls(model).keywords() if own else {})


# ---------------------------------------------------------------------------------------------- without the model's calls


class StateInPlace(VDVAEAdapter):
    """descend writes into the features that it is given, as the repository's own code does."""

    def descend(self, state: Any, z: Tensor, layer: int) -> Any:
        block = self._block(layer)
        state.by_resolution[block.base] = block.resnet(state.after + block.z_proj(z))
        return self._above(layer - 1, state.by_resolution)


class FromTheTop(NVAEAdapter):
    """latent_shapes as the decoder meets them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.latent_shapes = self.latent_shapes[::-1]

    def conditional(self, state: Tensor, layer: int) -> Normal:
        if layer < len(self.latent_shapes):
            return super().conditional(state, layer)
        zero = state.new_zeros(len(state), *self.model.z0_size)
        return self._normal(zero, zero, 1.0)


class BatchMean(DeepVAEAdapter):
    """log_prob is the batch's mean, as in the repository's training loss."""

    def likelihood(self, state: Any) -> Distribution:
        return _MeanOverBatch(super().likelihood(state))


class _MeanOverBatch(InModelUnits):
    def __init__(self, base: Distribution) -> None:
        super().__init__(base, lambda x: x, lambda x: x)

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value).mean().expand(len(value))


class DetachedLatent(NVAEAdapter):
    """z_2 goes on without its gradient."""

    def descend(self, state: Tensor, z: Tensor, layer: int) -> Tensor:
        return super().descend(state, z.detach() if layer == 2 else z, layer)


class EncoderWithoutGradient(VDVAEAdapter):
    """The encoder runs under no_grad; the rest of the posterior does not, so that every z carries some gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        encode = self.model.encoder.forward
        self.model.encoder.forward = torch.no_grad()(encode)


class KeptOnModel(DeepVAEAdapter):
    """The skip connections are kept on the adapter, not in the state."""

    kept: Any = None

    def descend(self, state: Any, z: Tensor, layer: int) -> Any:
        below = super().descend(state._replace(skips=self.kept if state.skips else None), z, layer)
        self.kept = below.skips
        return below


class FixedSeed(NVAEAdapter):
    """infer has a seed of its own."""

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        return super().infer(x, rng=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------- with reconstruct, sample


class WithoutScaling(NVAEAdapter):
    """The decoder's units, [−1, 1], for those of the data."""

    def likelihood(self, state: Tensor) -> Distribution:
        base: Any = super().likelihood(state)
        return base.base


class ExpForSoftplus(DeepVAEAdapter):
    """σ = exp(raw) in p, where the model has softplus(raw)."""

    def conditional(self, state: Any, layer: int) -> Normal:
        p = super().conditional(state, layer)
        return Normal(p.loc, p.scale.expm1())  # softplus(raw) = log(1 + exp(raw))


class DroppedResidual(VDVAEAdapter):
    """The features that block 4 gives beside its prior are left out."""

    def descend(self, state: Any, z: Tensor, layer: int) -> Any:
        return super().descend(state._replace(after=state.before) if layer == 4 else state, z, layer)


class WrongSkip(DeepVAEAdapter):
    """Skip connections are handed down in the wrong order."""

    def descend(self, state: Any, z: Tensor, layer: int) -> Any:
        skips = None if state.skips is None else state.skips[::-1]
        return super().descend(state._replace(skips=skips), z, layer)


class OnePercent(NVAEAdapter):
    """σ of layer 2 is off by 1 %."""

    def conditional(self, state: Tensor, layer: int) -> Normal:
        p = super().conditional(state, layer)
        return Normal(p.loc, 1.01 * p.scale) if layer == 2 else p


class RootOfScale(VDVAEAdapter):
    """log σ is taken for a log variance."""

    def conditional(self, state: Any, layer: int) -> Normal:
        p = super().conditional(state, layer)
        return Normal(p.loc, p.scale.sqrt())


class SwappedLayers(NVAEAdapter):
    """Layers 1 and 2, of one shape, have each other's parts."""

    def _index(self, layer: int) -> int:
        return super()._index({1: 2, 2: 1}.get(layer, layer))


# -------------------------------------------------------------------------------------------------------------- with kl, q


class MeanLogQ(VDVAEAdapter):
    """log q of layer 3, of 2 × 4 × 4 elements, is divided by 16."""

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        drawn = super().infer(x, rng=rng)
        share = torch.ones(drawn.log_q.shape[1])
        share[2] = 1 / 16
        return Inferred(drawn.latents, drawn.log_q * share, drawn.conditionals, drawn.state)


class PermutedLogQ(DeepVAEAdapter):
    """log q from the top down, latents from the bottom up."""

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        drawn = super().infer(x, rng=rng)
        return Inferred(drawn.latents, drawn.log_q.flip(1), drawn.conditionals, drawn.state)


FAULTS = (
    Fault("state changed in place", lambda: vdvae(StateInPlace, own=False), "descend: one state at layer 5, taken down twice"),
    Fault("layers reversed", lambda: nvae(FromTheTop, own=False), "layer order: latent_shapes runs from the top"),
    Fault(
        "batch-mean likelihood",
        lambda: deep(BatchMean, own=False),
        "log_prob gives the same number .*mean or a sum over the batch",
    ),
    Fault("detached z", lambda: nvae(DetachedLatent, own=False), "changes with z_2, but autograd gives no gradient.*detached"),
    Fault(
        "q without gradient",
        lambda: vdvae(EncoderWithoutGradient, own=False),
        r"infer: z_\d carries no gradient to model.encoder.conv.weight",
    ),
    Fault("state kept on the model", lambda: deep(KeptOnModel, own=False), "from layer 1 on.*kept on the model"),
    Fault("fixed seed", lambda: nvae(FixedSeed, own=False), "different seeds give the same draw.*seed of its own"),
    Fault(
        "missing scale",
        lambda: nvae(WithoutScaling),
        r"part below z_1.*2 times the model's − 1 \(data scaling",
    ),
    Fault("exp for softplus", lambda: deep(ExpForSoftplus), "first part at layer 3.*exp where the model has softplus"),
    Fault("dropped residual", lambda: vdvae(DroppedResidual), r"first part at layer 3.*z_5 … z_4 agree.*layer=4"),
    Fault("wrong skip", lambda: deep(WrongSkip), r"first part at layer 1.*z_3 … z_2 agree.*layer=2"),
    Fault("σ off by 1 %", lambda: nvae(OnePercent), "first part at layer 2.*σ is 1.01 times the model's"),
    Fault("√σ for σ", lambda: vdvae(RootOfScale), "first part at layer 5.*square root of the model's"),
    Fault("two layers of one shape swapped", lambda: nvae(SwappedLayers), "first part at layer 2.*z_2 and z_1 swapped"),
    Fault("log q over 16", lambda: vdvae(MeanLogQ), "log q of layer 3: .*1/16 of that, and a z_3 has 32 elements"),
    Fault("log q permuted over layers", lambda: deep(PermutedLogQ), "log q of layer 3, 1: .*at layer 3.*It is that of z_1"),
)


# ------------------------------------------------------------------------------------------------------- correct generators


class SideLatent(nn.Module):
    """As in BIVA: z_2 reaches the observation, and no layer below it."""

    latent_shapes = (torch.Size((3,)), torch.Size((2,)), torch.Size((2,)))

    def __init__(self) -> None:
        super().__init__()
        self.p2, self.p1, self.out = nn.Linear(2, 4), nn.Linear(2, 6), nn.Linear(5, 6)
        self.q = nn.ModuleList(nn.Linear(6, 2 * shape[0]) for shape in self.latent_shapes)

    def start(self, batch_size: int) -> tuple[Tensor, ...]:
        return (self.out.weight.new_zeros(batch_size, 2),)

    def conditional(self, state: tuple[Tensor, ...], layer: int) -> Normal:
        if layer == 3:
            return Normal(state[0], torch.ones_like(state[0]))
        loc, raw = (self.p2 if layer == 2 else self.p1)(state[0]).chunk(2, 1)
        return Normal(loc, raw.exp())

    def descend(self, state: tuple[Tensor, ...], z: Tensor, layer: int) -> tuple[Tensor, ...]:
        return (z,) if layer == 3 else (*state, z)

    def likelihood(self, state: tuple[Tensor, ...]) -> Distribution:
        return Independent(Normal(self.out(torch.cat(state[1:], 1)), 0.3), 1)

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        latents, log_q = [], []
        for net in self.q:
            loc, raw = net(x).chunk(2, 1)
            z = loc + raw.exp() * torch.randn(loc.shape, generator=rng, dtype=x.dtype)
            latents.append(z)
            log_q.append(Normal(loc, raw.exp()).log_prob(z).sum(1))
        return Inferred(tuple(latents), torch.stack(log_q, 1))


class TinyScale(LinearLadder):
    """Conditionals far narrower than the rounding of single precision beside their mean would have it."""

    def conditional(self, state: Tensor, layer: int) -> Normal:
        p = super().conditional(state, layer)
        return p if layer == self.layers else Normal(p.loc + 3, 1e-6 * p.scale)


class CurvedFlow(LadderVAE):
    """Draws of z_1 through sinh: no Gaussian, so that log q cannot be read off."""

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        drawn = super().infer(x, rng=rng)
        z = drawn.latents[0]
        log_det = torch.stack([z.cosh().log().sum(1), *(z.new_zeros(len(z)) for _ in drawn.latents[1:])], 1)
        return Inferred((z.sinh(), *drawn.latents[1:]), drawn.log_q - log_det)


class SetByData(nn.Module):
    """A layer that takes its scale and shift from the first batch that it sees."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialized:
            self.scale.data = 1 / (x.detach().std(0) + 0.1)
            self.shift.data = -x.detach().mean(0) * self.scale.data
            self.initialized = torch.tensor(True)
        return x * self.scale + self.shift


class SideLatentSetByData(SideLatent):
    """With such a layer before the observation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = SetByData(6)

    def likelihood(self, state: tuple[Tensor, ...]) -> Distribution:
        return Independent(Normal(self.norm(self.out(torch.cat(state[1:], 1))), 0.3), 1)


def plain(generator: Any, x: Tensor) -> Case:
    return Case(generator, x, {})


def correct_cases() -> Iterator[tuple[str, Case]]:
    """Names and correct generators of every kind, those of public models with the models' own calls."""
    for decoder, flows, residual, vanilla, density in (
        ("mixture", 0, True, False, False),
        ("normal", 0, True, False, True),
        ("normal", 2, True, False, False),
        ("bernoulli", 1, False, False, True),
        ("normal", 1, True, True, False),
        ("mixture", 0, False, False, True),
    ):
        case = nvae(decoder=decoder, flows=flows, residual=residual, vanilla=vanilla)
        own = nvae_calls(case.generator.model, as_density=density).keywords()
        yield f"NVAE {decoder}, {flows} flows, residual {residual}, one group {vanilla}", case._replace(calls=own)
    cool = perturbed(NVAE("normal"))
    own = nvae_calls(cool, t=0.7).keywords() | {"kl": None}  # the model's own KL is of temperature 1
    yield "NVAE at 0.7", Case(NVAEAdapter(cool, prior_temperature=0.7), eight_bit(N, 3, 16, 16), own)
    for dataset, pixels in (("cifar10", (120.63838, 64.16736)), ("ffhq_256", (112.8666757481, 69.84780273))):
        for t in ((1.0,) * 5, (0.5, 0.6, 0.7, 0.8, 0.9)):
            model, x = perturbed(VDVAE(dataset)), eight_bit(N, 3, 8, 8)
            own = vdvae_calls(model, x, t, *pixels).keywords() | ({} if t[0] == 1 else {"kl": None})
            yield f"VDVAE {dataset} at {t[0]:g}", Case(VDVAEAdapter(model, prior_temperature=t[::-1]), x, own)
    for likelihood, ladder, skips in product(("bernoulli", "logistic", "mixture"), (False, True), (False, True)):
        case = deep(likelihood=likelihood, ladder=ladder, skips=skips)
        own = deep_calls(case.generator.model, as_density=skips).keywords()
        yield f"{'LVAE' if ladder else 'VAE'} {likelihood}, skips {skips}", case._replace(calls=own)
    exact = deep(likelihood="logistic", ladder=True)
    yield "LVAE in float64", Case(exact.generator.double(), exact.x.double(), deep_calls(exact.generator.model).keywords())
    image: dict[str, Any] = {"hidden": 8}
    for likelihood in ("gaussian", "bernoulli", "discretized_logistic", "mixture"):
        vae = LadderVAE((3, 4, 4), (3, 2), likelihood=likelihood, **image)  # type: ignore[arg-type]
        yield f"LadderVAE {likelihood}", plain(vae.eval(), (eight_bit(N, 3, 4, 4) > 0.5).float())
    yield (
        "LadderVAE of convolutions",
        plain(LadderVAE((1, 6, 5), (3, 2, 2), nets="conv", **image).eval(), torch.rand(N, 1, 6, 5)),
    )
    yield "LadderVAE of one layer", plain(LadderVAE((1, 4, 4), (3,), **image).eval(), torch.rand(N, 1, 4, 4))
    yield "LadderVAE in float64", plain(LadderVAE((1, 4, 4), (3, 2), **image).double().eval(), torch.rand(N, 1, 4, 4).double())
    yield "LadderVAE with a curved flow", plain(CurvedFlow((1, 4, 4), (3, 2), **image).eval(), torch.rand(N, 1, 4, 4))
    small: dict[str, Any] = {"channels": 8, "latent_channels": 2}
    yield "ResidualVAE", plain(ResidualVAE((3, 8, 8), groups=(2, 1), **small).eval(), eight_bit(N, 3, 8, 8))
    cool_vae = ResidualVAE((1, 8, 8), groups=(2,), likelihood="gaussian", prior_temperature=0.7, checkpointing=True, **small)
    yield "ResidualVAE at 0.7", plain(cool_vae.eval(), torch.rand(N, 1, 8, 8))
    yield "README's two layers", plain(TwoLayers(), torch.randn(N, 8))
    yield "linear ladder", plain(LinearLadder((3, 2, 2)), torch.randn(N, 3).double())
    yield "linear ladder in float32", plain(LinearLadder((3, 2, 2), dtype=torch.float32), torch.randn(N, 3))
    yield "one linear layer", plain(LinearLadder((2,)), torch.randn(N, 3).double())
    yield "ladder of scales, without infer", plain(ScaleLadder(), torch.randn(N, 1).double())
    yield "BIVA's side latents", plain(SideLatent(), torch.randn(N, 6))
    yield "tiny scales", plain(TinyScale((3, 2, 2), dtype=torch.float32), torch.randn(N, 3))
    waiting = SideLatentSetByData()
    waiting.norm(torch.randn(N, 6))
    yield "set by its first batch, and run once", plain(waiting, torch.randn(N, 6))
