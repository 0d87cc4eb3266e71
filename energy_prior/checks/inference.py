"""Checks of `infer`: its draws, their gradients, and log q, which is held to μ and σ read off the draws themselves."""

from __future__ import annotations

__all__ = ["Reading", "check_gradients_of_infer", "check_infer", "check_log_q", "check_support", "read_off"]

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Laplace, Uniform, kl_divergence

from energy_prior._util import plain_normal, sum_event
from energy_prior.checks.arguments import checked_infer
from energy_prior.checks.tolerance import gaussian_rounding, near, relative, same_conditional, same_log_density
from energy_prior.conditionals import Logistic, tensors_of, to_latent
from energy_prior.process import reproducible
from energy_prior.protocol import HierarchicalGenerator, Inferred
from energy_prior.replay import Replay
from energy_prior.topdown import TopDown, inferred_descent

_MOST_LAYERS = 16  # whose gradients are looked at, from the top to the bottom
_AFFINE_FACTOR = 10.0  # over `relative`: of σ ε in z − μ


# ------------------------------------------------------------------------------------------------------------------- draws


def check_infer(generator: HierarchicalGenerator, x: Tensor) -> str | None:
    """Types, shapes, seeds, rows, and the pass that `infer` may hand over."""
    with torch.enable_grad():
        checked_infer(generator, x)
    first, again, other = (_seeded(generator, x, seed) for seed in (1, 1, 2))
    pairs = list(zip(first.latents, again.latents, strict=True))
    if not all(near(a, b) for a, b in pairs):
        return (
            "infer: two draws under one seed of torch's random streams differ. Draw from torch (not numpy), and call "
            "generator.eval()."
        )
    for layer, (a, b) in enumerate(zip(first.latents, other.latents, strict=True), start=1):
        if torch.equal(a, b):
            return (
                f"infer: different seeds give the same draw of z_{layer}. It must draw z ~ q(z | x) from torch's random "
                "stream, neither return a mean nor set a seed of its own."
            )
        same = torch.equal(first.log_q[:, layer - 1], other.log_q[:, layer - 1])
        if same and not isinstance(read_off(generator, x).q.get(layer), Uniform):
            return f"infer: log_q of layer {layer} is the same for different draws. It must be log q at the drawn z_{layer}."
    copies = _seeded(generator, x[:1].expand(x.shape), 1)
    for layer, (a, b) in enumerate(zip(first.latents, copies.latents, strict=True), start=1):
        if not near(a[:1], b[:1]) or not near(first.log_q[:1, layer - 1], copies.log_q[:1, layer - 1]):
            return (
                "infer: the latents of an observation, or their log q, change with the rest of its batch (seen at layer "
                f"{layer}). Is there batch norm in train mode? Call generator.eval()."
            )
        if torch.equal(b[:1].expand(b.shape), b):
            return f"infer: equal observations of one batch get the same z_{layer}. Draw noise of shape (batch, …) for it."
    if first.conditionals is not None:
        return _same_pass(generator, first, x)
    return None


def _seeded(generator: Any, x: Tensor, seed: int) -> Inferred:
    with torch.enable_grad(), reproducible(torch.Generator().manual_seed(seed), x.device):  # as the library calls it
        return generator.infer(x)


def _same_pass(generator: HierarchicalGenerator, inferred: Inferred, x: Tensor) -> str | None:
    """What `infer` met on its way down is what the generator gives for its latents."""
    with torch.enable_grad():
        descent = TopDown(generator, len(x)).descend(inferred.latents, "latent", to_observation=True)
    pairs = list(enumerate(zip(inferred.conditionals or (), descent.conditionals, strict=True), start=1))
    for layer, (a, b) in reversed(pairs):
        if not same_conditional(a, b):
            return f"infer: conditionals[{layer - 1}] is not that of z_{layer} at its latents; they go from z_1 to z_L."
    for layer, (a, b) in pairs:
        if _followed(b) and not _followed(a):
            return f"infer: conditionals[{layer - 1}] carries no gradient, so that no training could reach that prior."
    here, there = (generator.likelihood(state).log_prob(x) for state in (inferred.state, descent.state))
    if not near(here, there):
        return "infer: its state does not give the likelihood of its latents; it must be the state below z_1."
    return None


def _followed(conditional: Distribution) -> bool:
    return any(t.requires_grad for t in tensors_of(conditional))


def check_support(generator: HierarchicalGenerator, x: Tensor) -> str | None:
    """Every z of `infer` is one that the prior can draw."""
    latents = _seeded(generator, x, 1).latents
    with torch.no_grad():
        descent = TopDown(generator, len(x)).descend(latents, "latent")
        noise = descent.noise()
    outside = [i for i, e in enumerate(noise, start=1) if not bool(torch.isfinite(e).all())]
    if not outside:
        return None
    i = outside[-1]
    return (
        f"infer: {int((~torch.isfinite(noise[i - 1])).sum())} values of z_{i} are where p(z_{i} | z_(>{i})), a "
        f"{type(descent.conditionals[i - 1]).__name__}, cannot be: log p is −∞ there, and no noise gives them. q and p must "
        "have one support: take a p that reaches all that q does, or draw q as p does, from noise."
    )


# --------------------------------------------------------------------------------------------------------------- gradients


def check_gradients_of_infer(generator: Any, x: Tensor) -> str | None:
    """What changes with a parameter carries its gradient: every z_i, and every log q."""
    if not isinstance(generator, nn.Module):
        return None
    learnable = {name: p for name, p in generator.named_parameters() if p.requires_grad}
    drawn = _seeded(generator, x, 1)
    layers = len(drawn.latents)
    for layer in range(layers, 0, -math.ceil(layers / _MOST_LAYERS)):
        for said, of in ((f"z_{layer}", _z), (f"log_q of layer {layer}", _log_q)):
            name = _without_gradient(generator, x, drawn, of, layer, learnable)
            if name is not None:
                return (
                    f"infer: {said} carries no gradient to {name}, on which it depends. Draw it reparameterised (rsample), and "
                    "take log q of it, without detach() and outside torch.no_grad(): training reaches q by them."
                )
    return None


def _without_gradient(
    generator: Any,
    x: Tensor,
    drawn: Inferred,
    of: Callable[[Inferred, int], Tensor],
    layer: int,
    learnable: Mapping[str, nn.Parameter],
) -> str | None:
    """A parameter that a value depends on, but carries no gradient to."""
    before = of(drawn, layer)
    unreached = _unreached(before, learnable)

    def changed_by(chosen: Mapping[str, nn.Parameter]) -> bool:
        off = (of(_with_changed(generator, x, chosen), layer) - before.detach()).abs()
        return bool((off > 64 * torch.finfo(off.dtype).eps * before.detach().abs().max()).any())

    if not unreached or not changed_by(unreached):
        return None
    return next((name for name, p in unreached.items() if changed_by({name: p})), "the parameters")


def _z(drawn: Inferred, layer: int) -> Tensor:
    return drawn.latents[layer - 1]


def _log_q(drawn: Inferred, layer: int) -> Tensor:
    return drawn.log_q[:, layer - 1]


def _unreached(value: Tensor, learnable: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Parameters that the value carries no gradient to, or 0: that of a column of log_q that was stacked from detached ones."""
    if not value.requires_grad or not learnable:
        return dict(learnable)
    gradients = torch.autograd.grad(value.sum(), list(learnable.values()), allow_unused=True, retain_graph=True)
    return {name: p for (name, p), g in zip(learnable.items(), gradients, strict=True) if g is None or not bool(g.any())}


def _with_changed(generator: Any, x: Tensor, chosen: Mapping[str, nn.Parameter]) -> Inferred:
    """The same draw with these parameters a little off."""
    kept = [p.detach().clone() for p in chosen.values()]
    try:
        for p in chosen.values():
            p.data.add_(0.01 * p.data.abs() + 0.003)  # .data: the graph of the first draw stays valid
        with torch.no_grad(), reproducible(torch.Generator().manual_seed(1), x.device):
            return generator.infer(x)
    finally:
        for p, value in zip(chosen.values(), kept, strict=True):
            p.data.copy_(value)


# ------------------------------------------------------------------------------------------------------- μ and σ of a draw


@dataclass
class Reading:
    """One draw of `infer` on known numbers, with what could be read off it.

    Attributes:
        inferred: the draw.
        noise: layer -> the ε that it was made from, (batch, *latent_shape).
        z: layer -> the draw beside which μ and σ were read, and `said`, the log q that `infer` gave for it.
        loc: layer -> μ of the Gaussian that z_i is drawn from.
        scale: layer -> its σ.
        q: layer -> the distribution that z_i is drawn from, a Gaussian or another with a known quantile function.
        order: layers in the order in which they are drawn.
        unread: layer -> why there is no such distribution of it.
    """

    inferred: Inferred
    noise: dict[int, Tensor] = field(default_factory=dict)
    z: dict[int, Tensor] = field(default_factory=dict)
    said: dict[int, Tensor] = field(default_factory=dict)
    loc: dict[int, Tensor] = field(default_factory=dict)
    scale: dict[int, Tensor] = field(default_factory=dict)
    q: dict[int, Distribution] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    unread: dict[int, str] = field(default_factory=dict)

    def log_q(self, layer: int) -> Tensor:
        """log q(z_i) of the distribution that it is drawn from, (batch,), nats."""
        return sum_event(self.q[layer].log_prob(self.z[layer]))

    def rounding(self, layer: int) -> Tensor:
        """What that may be off by, (batch,), nats."""
        if layer in self.loc:
            return gaussian_rounding(self.z[layer], self.loc[layer], self.scale[layer])
        return self.z[layer].new_zeros(())


def read_off(generator: Any, x: Tensor) -> Reading:
    """Runs `infer` with ε = 0, ε = 1 and a drawn ε, one draw after another and all else held: z is μ, μ + σ and μ + σ ε.

    What a draw changes first is its own layer; those drawn later follow. So layers are told apart whatever their order.
    """
    n, layers = len(x), range(1, len(generator.latent_shapes) + 1)
    run: Callable[[Tensor, Mapping[int, Tensor]], tuple[Inferred, Replay]] = lambda y, given: _run(generator, y, given)  # noqa: E731
    base, replay = run(x, {})
    reading = Reading(base)
    numbers = {d: shape for d, shape in enumerate(replay.drawn) if len(shape) > 0 and shape[0] == n}
    noise = {d: _numbers(d, shape, x) for d, shape in numbers.items()}
    reading.inferred, _ = run(x, noise)
    tripled = torch.cat([x, x, x])
    everywhere = {d: torch.cat([e, e, e]) for d, e in noise.items()}
    still = [z.detach().chunk(3) for z in run(tripled, everywhere)[0].latents]
    rounding = [(of_zero - of_one).abs() for of_zero, of_one, _ in still]  # of the same numbers in other rows
    assigned: set[int] = set()
    for d in reversed(noise):
        e = noise[d]
        drawn, _ = run(tripled, everywhere | {d: torch.cat([torch.zeros_like(e), torch.ones_like(e), e])})
        zero, one, own = ([z.detach().chunk(3)[part] for z in drawn.latents] for part in range(3))
        changed = {i for i in layers if _is_changed(zero[i - 1], one[i - 1], rounding[i - 1])} - assigned
        assigned |= changed
        for i in changed:
            reading.order.insert(0, i)
            shape = reading.inferred.latents[i - 1].shape
            if len(changed) > 1:
                reading.unread[i] = "one draw is its noise and that of other layers"
            elif e.numel() != shape.numel():
                reading.unread[i] = f"its noise has shape {tuple(e.shape)}"
            else:
                reading.noise[i] = e.reshape(shape)
                reading.z[i], reading.said[i] = own[i - 1], drawn.log_q.detach()[2 * n :, i - 1]
                loc, scale = zero[i - 1], one[i - 1] - zero[i - 1]
                if _is_affine(own[i - 1], loc, scale, reading.noise[i]):
                    reading.loc[i], reading.scale[i] = loc, scale
                    reading.q[i] = plain_normal(loc, scale.abs())
                else:
                    reading.q |= _of_another_family(i, zero[i - 1], one[i - 1], own[i - 1], reading.noise[i])
                if i not in reading.q:
                    reading.unread[i] = "its draw is not μ + σ ε, element by element (a flow, say)"
    for i in layers:
        if i not in assigned:
            reading.unread[i] = "no normal or uniform draw of torch's changes it"
    return reading


def _of_another_family(layer: int, zero: Tensor, one: Tensor, own: Tensor, noise: Tensor) -> dict[int, Distribution]:
    """The distribution of which z is the quantile at Φ(ε): loc + scale Q(Φ(ε)); {} if it is none of those known."""
    unit = torch.ones_like(zero)
    for family in _FAMILIES:
        standard = family(0 * unit, unit)
        at = [to_latent(standard, value) for value in (0 * unit, unit, noise)]
        scale = (one - zero) / (at[1] - at[0])
        loc = zero - scale * at[0]
        if _is_affine(own, loc, scale, at[2]):
            return {layer: family(torch.minimum(loc, loc + scale) if family is _uniform else loc, scale.abs())}
    return {}


def _uniform(low: Tensor, width: Tensor) -> Uniform:
    return Uniform(low, low + width, validate_args=False)


_FAMILIES: tuple[Callable[[Tensor, Tensor], Distribution], ...] = (
    _uniform,
    partial(Laplace, validate_args=False),
    partial(Logistic, validate_args=False),
)


def _run(generator: Any, x: Tensor, given: Mapping[int, Tensor]) -> tuple[Inferred, Replay]:
    with torch.no_grad(), reproducible(torch.Generator().manual_seed(1), x.device), Replay(given=given) as replay:
        return generator.infer(x), replay


def _numbers(draw: int, shape: torch.Size, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(draw + 1)
    return torch.randn(shape, generator=generator).to(x)  # of single precision, which any model keeps


def _is_changed(zero: Tensor, one: Tensor, rounding: Tensor) -> bool:
    """By more than rounding, which may be another one in another row: a vector's last elements are computed by themselves."""
    return bool(((zero - one).abs() > 2 * rounding).any())


def _is_affine(z: Tensor, loc: Tensor, scale: Tensor, noise: Tensor) -> bool:
    r, eps = relative(z.dtype), 16 * torch.finfo(z.dtype).eps
    allowed = _AFFINE_FACTOR * r * scale.abs() * (1 + noise.abs()) + eps * (loc.abs() + z.abs()) * (1 + noise.abs())
    return bool(((z - loc - scale * noise).abs() <= allowed).all()) and bool((scale != 0).all())


def check_log_q(generator: Any, x: Tensor, reading: Reading) -> str | None:
    """log q of every layer is that of the Gaussian that its z is drawn from, and that of `posterior_log_prob`."""
    drawn = reading.inferred
    read = {i: reading.log_q(i) for i in reading.q}
    sizes = {i: drawn.latents[i - 1][0].numel() for i in read}

    def fits(layer: int, values: Tensor) -> bool:
        return same_log_density(reading.said[layer], values, sizes[layer], reading.rounding(layer))

    wrong = [i for i in sorted(read, reverse=True) if not fits(i, read[i])]
    if wrong:
        first = wrong[0]
        other = next((j for j in read if j != first and fits(first, read[j])), None)
        said, expected = float(reading.said[first][0]), float(read[first][0])
        ratio = reading.said[first] / read[first]
        kind = "Gaussian" if first in reading.loc else type(reading.q[first]).__name__
        if other is not None:
            why = f"It is that of z_{other}: the columns of log_q go from z_1 to z_L, as the latents do."
        elif near(ratio, ratio[:1].expand_as(ratio), floor=0.0):
            why = (
                f"It is 1/{float(1 / ratio[0]):.6g} of that, and a z_{first} has {sizes[first]} elements: log q is their sum, "
                "not their mean, in nats."
            )
        else:
            why = "Is it at another z, of another σ, or is the log-determinant of a flow left out, or its sign wrong?"
        return (
            f"log q of layer {', '.join(map(str, wrong))}: infer says {said:.6g} for the first observation at layer {first}, "
            f"but its z_{first} is drawn from a {kind} of which log q is {expected:.6g}. {why}"
        )
    if callable(getattr(generator, "posterior_log_prob", None)):
        return _same_as_given(generator, x, drawn)
    return None


def _same_as_given(generator: Any, x: Tensor, drawn: Inferred) -> str | None:
    """log q of `infer` is that of `posterior_log_prob` at the same latents, layer by layer."""
    with torch.no_grad():
        log_q = generator.posterior_log_prob(x, drawn.latents)
    if log_q.shape != drawn.log_q.shape:
        return f"posterior_log_prob: expected shape (batch, L) = {tuple(drawn.log_q.shape)}, got {tuple(log_q.shape)}."
    for layer in range(1, log_q.shape[1] + 1):
        ours, theirs = log_q[:, layer - 1], drawn.log_q[:, layer - 1]
        if not same_log_density(ours, theirs, drawn.latents[layer - 1][0].numel()):
            one, two = float(theirs[0].detach()), float(ours[0])
            return (
                f"log q of layer {layer}: infer says {one:.6g} for the first observation, posterior_log_prob {two:.6g} at "
                "the same latents. Is the log-determinant of a flow left out, or its sign wrong?"
            )
    return None


def kl_terms(generator: HierarchicalGenerator, reading: Reading) -> tuple[Tensor, Tensor, Tensor]:
    """Per layer, (batch, L): log q − log p at the draw, KL(q ‖ p) where μ and σ could be read off (else NaN), and rounding."""
    drawn = reading.inferred
    with torch.no_grad():
        descent = inferred_descent(generator, drawn)
        log_p = descent.log_priors()
    analytic, slack = torch.full_like(log_p, float("nan")), torch.zeros_like(log_p)
    for i, p in enumerate(descent.conditionals, start=1):
        elements = drawn.latents[i - 1][0].numel()
        slack[:, i - 1] = relative(log_p.dtype) * (elements + log_p[:, i - 1].abs() + drawn.log_q[:, i - 1].abs())
        if i in reading.q:
            q = reading.q[i]
            with contextlib.suppress(NotImplementedError):  # no closed form for this pair
                analytic[:, i - 1] = sum_event(kl_divergence(q, p))
            slack[:, i - 1] += reading.rounding(i)
    return drawn.log_q.detach() - log_p, analytic, slack
