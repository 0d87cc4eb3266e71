"""Reads μ and σ off the draws of `infer`: z of ε = 0, of ε = 1 and of a drawn ε."""

from __future__ import annotations

__all__ = ["Reading", "kl_terms", "read_off"]

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Laplace, MultivariateNormal, Normal, Uniform, kl_divergence

from energy_prior._util import plain_normal, sum_event
from energy_prior.checks.tolerance import gaussian_rounding, near, relative
from energy_prior.conditionals import Logistic, of_elements, to_latent
from energy_prior.process import reproducible
from energy_prior.protocol import HierarchicalGenerator, Inferred
from energy_prior.replay import Plan, Replay, Step
from energy_prior.topdown import inferred_descent

_AFFINE_FACTOR = 10.0  # over `relative`: of σ ε in z − μ


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
        before: layer -> the first sum that its noise goes through in `infer`, where a map follows that no such step shows.
        followed: layers whose z_i is such a step itself.
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
    before: dict[int, Step] = field(default_factory=dict)
    followed: set[int] = field(default_factory=set)
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
    drawn_by: dict[int, int] = {}
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
                reading.noise[i], drawn_by[i] = e.reshape(shape), d
                reading.z[i], reading.said[i] = own[i - 1], drawn.log_q.detach()[2 * n :, i - 1]
                loc, scale = zero[i - 1], one[i - 1] - zero[i - 1]
                if _is_affine(own[i - 1], loc, scale, reading.noise[i]):
                    reading.loc[i], reading.scale[i] = loc, scale
                    reading.q[i] = plain_normal(loc, scale.abs())
                else:
                    reading.q |= _of_another_family(i, zero[i - 1], one[i - 1], own[i - 1], reading.noise[i])
                if i not in reading.q:
                    reading.unread[i] = "its draw is not μ + σ ε, element by element (a flow, say)"
    _follow(generator, x, reading, drawn_by)
    for i in layers:
        if i not in assigned:
            reading.unread[i] = "no normal or uniform draw of torch's changes it"
    return reading


def _follow(generator: Any, x: Tensor, reading: Reading, drawn_by: Mapping[int, int]) -> None:
    """Steps that noise goes through in `infer` on its way to a z that is not μ + σ ε of it."""
    layers = [i for i in drawn_by if i not in reading.loc]
    if not layers:
        return
    with (
        torch.no_grad(),
        reproducible(torch.Generator().manual_seed(1), x.device),
        Replay(reading.noise, Plan({d: (i,) for i, d in drawn_by.items()})) as replay,
    ):
        generator.infer(x)
    for i in layers:
        shifted = [step for step in replay.steps.get(i, []) if step.shifted]
        if any(near(step.value, reading.inferred.latents[i - 1]) for step in shifted):
            reading.followed.add(i)
        elif shifted:
            reading.before[i] = shifted[0]


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


def _closed_kl(q: Distribution, p: Distribution) -> Tensor:
    """KL(q ‖ p) of a q of single elements and a p that may be of one event."""
    p = of_elements(p)
    if isinstance(p, MultivariateNormal) and isinstance(q, Normal):
        q = MultivariateNormal(q.loc, scale_tril=torch.diag_embed(q.scale), validate_args=False)
    return kl_divergence(q, p)


def _rounding_of_log_p(p: Distribution, z: Tensor, log_p: Tensor) -> Tensor:
    """What a last digit of z changes log p(z) by, (batch,), nats: much near the ends of a bounded support."""
    aside = [sum_event(p.log_prob(torch.nextafter(z, z.new_tensor(end)))) for end in (-math.inf, math.inf)]
    return 4 * torch.stack([(value - log_p).abs().nan_to_num(0.0, 0.0, 0.0) for value in aside]).amax(0)


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
                analytic[:, i - 1] = sum_event(_closed_kl(q, p))
            slack[:, i - 1] += reading.rounding(i)
        slack[:, i - 1] += _rounding_of_log_p(p, drawn.latents[i - 1].detach(), log_p[:, i - 1])
    return drawn.log_q.detach() - log_p, analytic, slack
