"""Checks of `infer`: its draws, their gradients, and log q, which is held to μ and σ read off the draws themselves."""

from __future__ import annotations

__all__ = ["check_gradients_of_infer", "check_infer", "check_log_q", "check_support", "has_posterior_log_prob"]

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Uniform

from energy_prior.checks.arguments import checked_infer
from energy_prior.checks.reading import Reading, read_off
from energy_prior.checks.tolerance import near, same_conditional, same_log_density
from energy_prior.conditionals import tensors_of, to_noise
from energy_prior.process import reproducible
from energy_prior.protocol import HierarchicalGenerator, Inferred
from energy_prior.topdown import TopDown

_MOST_LAYERS = 16  # whose gradients are looked at, from the top to the bottom


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
                "stream, neither return a mean nor set a seed of its own, nor be rounded to the end of its range."
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
    z = latents[i - 1].detach()
    p = descent.conditionals[i - 1]
    inside = [to_noise(p, torch.nextafter(z, z.new_tensor(end))) for end in (-math.inf, math.inf)]
    if bool((torch.isfinite(noise[i - 1]) | torch.isfinite(inside[0]) | torch.isfinite(inside[1])).all()):
        return (
            f"infer: {int((~torch.isfinite(noise[i - 1])).sum())} values of z_{i} are rounded to the end of what "
            f"p(z_{i} | z_(>{i})), a {type(p).__name__}, can be: log p is −∞ there. In {z.dtype} q is too near to that end: "
            "keep its draws inside, by a clamp of the noise or of μ and σ."
        )
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


# ------------------------------------------------------------------------------------------------------------------- log q


def has_posterior_log_prob(generator: Any) -> bool:
    """Whether it gives log q of given latents."""
    return callable(getattr(generator, "posterior_log_prob", None))


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
    if has_posterior_log_prob(generator):
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
