"""Checks of the generator's top-down calls: start, conditional, descend, likelihood."""

from __future__ import annotations

__all__ = [
    "check_density",
    "check_deterministic",
    "check_likelihood",
    "check_nothing_kept",
    "check_reaches",
    "check_round_trip",
    "check_rows",
    "check_states",
    "log_likelihood",
]

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Normal

from energy_prior._util import normal_like, sum_event
from energy_prior.checks import arguments as validate
from energy_prior.checks.tolerance import near, same_conditional, same_log_density, same_tensors
from energy_prior.conditionals import of_elements, tensors_of, to_latent
from energy_prior.protocol import HierarchicalGenerator, find_infer
from energy_prior.topdown import Descent, TopDown, ancestral, ancestral_noise, decode_state

_MOST_BRANCHES = 16
_MOST_UNITS = 1024  # of a layer whose whole Jacobian is taken
_DETERMINISTIC = (
    "It must be deterministic: is there dropout, or batch norm, in train mode? Call generator.eval(); draw no random numbers "
    "inside it."
)


def check_likelihood(generator: HierarchicalGenerator, x: Tensor) -> str | None:
    """The likelihood is one of observations like x, with one finite log_prob each."""
    descent = _pass(generator, ancestral(generator, len(x)).latents)
    likelihood = generator.likelihood(descent.state)
    validate.check_observations("x", x, x.shape[1:], descent.latents[0])
    outside = validate.range_fault(x, generator)
    if outside is not None:
        return f"x: {outside}"
    if likelihood.event_shape != x.shape[1:]:
        return (
            f"x or likelihood: an observation has shape {tuple(x.shape[1:])}, but the likelihood's event_shape is "
            f"{tuple(likelihood.event_shape)}. If x is as it should be (channels first, as many as the model has), wrap the "
            "likelihood in torch.distributions.Independent with the number of dimensions of one observation."
        )
    log_prob = log_likelihood(generator, descent.state, x)
    if log_prob.shape != (len(x),):
        return (
            f"likelihood: log_prob of {len(x)} observations has shape {tuple(log_prob.shape)}, expected ({len(x)},), nats each."
        )
    if not torch.isfinite(log_prob).all() and not _finite_where_inferred(generator, x):
        return "likelihood: log_prob of the observations is not finite. Are they in the range that the model was trained on?"
    if isinstance(of_elements(likelihood), Bernoulli) and (float(x.min()) < 0 or float(x.max()) > 1):
        return (
            f"x: values from {float(x.min()):.3g} to {float(x.max()):.3g}, but the likelihood is a Bernoulli, of numbers in "
            "[0, 1]. Rescale them."
        )
    try:
        decode_state(generator, descent.state)
    except NotImplementedError:  # how torch.distributions says so
        return f"likelihood: {type(likelihood).__name__} has neither a mean nor sample(), so nothing to decode by."
    if torch.equal(log_prob, log_prob[:1].expand_as(log_prob)) and not torch.equal(x, x[:1].expand_as(x)):
        return (
            "likelihood: log_prob gives the same number for different observations. It is a mean or a sum over the batch; it "
            "must be log p(x | z) of each observation, summed over that observation's elements, (batch,), nats."
        )
    return None


def _finite_where_inferred(generator: HierarchicalGenerator, x: Tensor) -> bool:
    """A draw of the prior may make x impossible; one of the posterior may not."""
    infer = find_infer(generator)
    if infer is None:
        return False
    with torch.no_grad():
        return bool(torch.isfinite(log_likelihood(generator, _pass(generator, infer(x).latents).state, x)).all())


def check_deterministic(generator: HierarchicalGenerator, x: Tensor) -> str | None:
    """conditional and likelihood say the same when they are asked twice."""
    with torch.no_grad():
        state = generator.start(len(x))
        for layer in range(len(generator.latent_shapes), 0, -1):
            conditional = generator.conditional(state, layer)
            if not same_conditional(conditional, generator.conditional(state, layer)):
                return f"conditional: two calls on one state differ at layer {layer}. {_DETERMINISTIC}"
            state = generator.descend(state, _draw(conditional), layer)
        if not near(log_likelihood(generator, state, x), log_likelihood(generator, state, x)):
            return f"likelihood: two calls on one state differ. {_DETERMINISTIC}"
    return None


def check_nothing_kept(generator: HierarchicalGenerator, x: Tensor) -> str | None:
    """A pass must not notice that another one goes down between its calls, nor that `infer` is called there."""
    one, other = (ancestral(generator, len(x)).latents for _ in range(2))
    alone = _pass(generator, one)
    expected = [[t.clone() for t in tensors_of(c)] for c in alone.conditionals]  # which may be buffers of the model
    likelihood = log_likelihood(generator, alone.state, x)
    infer = find_infer(generator)
    fault = (
        "descend: a pass comes out otherwise where another one goes down between its calls, from layer {0} on. Something that "
        "belongs in the state is kept on the model; put it into what start and descend return."
    )
    layer = len(one)
    try:
        with torch.no_grad():
            state, there = generator.start(len(x)), generator.start(len(x))
            for layer in range(len(one), 0, -1):
                here = generator.conditional(state, layer)
                generator.conditional(there, layer)
                if not same_tensors(tensors_of(here), expected[layer - 1]):
                    return fault.format(layer)
                state = generator.descend(state, one[layer - 1], layer)
                there = generator.descend(there, other[layer - 1], layer)
            if infer is not None:
                with contextlib.suppress(Exception):  # its own checks say what is wrong with it
                    infer(x.flip(0))
            if not near(log_likelihood(generator, state, x), likelihood):
                return fault.format("x")
    except RuntimeError as error:  # what was kept has the shape of another layer
        return fault.format(layer) + f" (It raised: {error})"
    return None


def check_states(generator: HierarchicalGenerator, x: Tensor) -> str | None:
    """One state taken down twice must agree with itself, whatever the other branch does below it."""
    layers = len(generator.latent_shapes)
    latents = ancestral(generator, len(x)).latents
    every = -(-layers // _MOST_BRANCHES)
    with torch.no_grad():
        state = generator.start(len(x))
        for layer in range(layers, 0, -1):
            if (layers - layer) % every == 0:
                try:
                    sound, raised = _branches_agree(generator, state, layer, latents, x), ""
                except RuntimeError as error:  # a list that grew, a dict that was overwritten: the shapes no longer fit
                    sound, raised = False, f" (it raised: {error})"
                if not sound:
                    return (
                        f"descend: one state at layer {layer}, taken down twice, does not agree with itself{raised}. descend "
                        "must return a new state and leave the given one as it was: copy dicts and lists before writing to "
                        "them, no in-place operations, nothing stored on the model; no dropout or batch norm in train mode."
                    )
            if layer > 1:
                state = generator.descend(state, latents[layer - 1], layer)
    return None


def _branches_agree(generator: HierarchicalGenerator, state: Any, layer: int, latents: Sequence[Tensor], x: Tensor) -> bool:
    kept = [t.clone() for t in tensors_of(generator.conditional(state, layer))]
    first = _outcome(generator, state, layer, latents, x)
    below = generator.descend(state, latents[layer - 1], layer)
    if not all(near(a, b, 0.0) for a, b in zip(kept, tensors_of(generator.conditional(state, layer)), strict=True)):
        return False
    _outcome(generator, state, layer, [z + 1.0 for z in latents], x)
    again = _outcome(generator, state, layer, latents, x)
    branch = _outcome(generator, below, layer - 1, latents, x)
    pairs = [*zip(first, again, strict=True), *zip(first[len(kept) :] if layer > 1 else first[-1:], branch, strict=True)]
    return all(near(a, b) for a, b in pairs)


def _outcome(generator: HierarchicalGenerator, state: Any, layer: int, latents: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """What a state above `layer` leads to on the way down with these latents."""
    found: list[Tensor] = []
    for i in range(layer, 0, -1):
        found += [t.clone() for t in tensors_of(generator.conditional(state, i))]
        state = generator.descend(state, latents[i - 1], i)
    return [*found, log_likelihood(generator, state, x)]


def check_rows(generator: HierarchicalGenerator, x: Tensor) -> str | None:
    """The first row must not notice that the others change."""
    latents = ancestral(generator, len(x)).latents
    here = _pass(generator, latents)
    there = _pass(generator, [torch.cat([z[:1], 2 * z[1:] + 1]) for z in latents])
    what = None
    for layer, (p, q) in enumerate(zip(here.conditionals, there.conditionals, strict=True), start=1):
        if not all(near(a[:1], b[:1], 0.01) for a, b in zip(_rows(p), _rows(q), strict=True)):
            what = f"conditional: layer {layer} of an observation"
    if what is None:
        likelihood = log_likelihood(generator, here.state, x)
        twice = _pass(generator, [torch.cat([z, z]) for z in latents])
        others = log_likelihood(generator, there.state, torch.cat([x[:1], x[1:].flip(0)]))
        same_size = near(likelihood[:1], others[:1])
        if not same_size or not near(likelihood, log_likelihood(generator, twice.state, torch.cat([x, x]))[: len(x)]):
            what = "likelihood: that of an observation"
    if what is None:
        return None
    return (
        f"{what} changes with the rest of its batch. Is there batch norm in train mode? Call generator.eval(). Or is something "
        "averaged over the batch?"
    )


def check_reaches(generator: HierarchicalGenerator, x: Tensor) -> str | None:
    """Each z_i must move a conditional below it or log p(x | z), and autograd must see what it moves."""
    topdown = TopDown(generator, len(x))
    noise = [torch.randn_like(z) for z in ancestral(generator, len(x)).latents]

    def outcome(values: Sequence[Tensor]) -> tuple[list[Tensor], Descent]:
        descent = topdown.descend(values, "noise", to_observation=True)
        lower = [torch.cat([t.flatten(1) for t in _rows(c)], 1) for c in descent.conditionals]
        return [log_likelihood(generator, descent.state, x), *lower], descent

    leaves = [n.clone().requires_grad_() for n in noise]
    with torch.enable_grad():
        results, descent = outcome(leaves)
    for layer in range(1, len(noise) + 1):
        step = _large_step(descent, layer)
        with torch.no_grad():
            moved, _ = outcome([n + (step if i == layer - 1 else 0.0) for i, n in enumerate(noise)])
        changed = [j for j in range(layer) if not torch.equal(moved[j], results[j].detach())]
        looked_at = (changed or list(range(layer)))[:: -(-layer // _MOST_BRANCHES)]
        gradients = {j: _gradient(results[j], leaves[layer - 1]) for j in looked_at}
        unseen = [j for j, gradient in gradients.items() if gradient is None and changed]
        if not unseen and changed and not any(bool((g != 0).any()) for g in gradients.values() if g is not None):
            unseen = changed
        if unseen:
            what = "the observation" if unseen[-1] == 0 else f"layer {unseen[-1]}, below it,"
            return (
                f"gradients: {what} changes with z_{layer}, but autograd gives no gradient for it. Is the latent detached, or "
                "is there a torch.no_grad() on the way down? Langevin needs the gradient."
            )
        if not changed and not any(g is not None and bool((g != 0).any()) for g in gradients.values()):
            targets = "any layer below it or the observation" if layer > 1 else "the observation"
            return (
                f"dependence: changing z_{layer} does not change {targets}. Does descend use the z that it is given? (A model "
                "with zero-initialised layers shows this before training: check a trained one.)"
            )
    return None


def _large_step(descent: Descent, layer: int) -> Tensor:
    """A change of ε_i that moves z_i by half its scale and by enough to be seen, however small that scale is."""
    with torch.no_grad():
        conditional, z = descent.conditionals[layer - 1], descent.latents[layer - 1]
        unit = to_latent(conditional, torch.ones_like(z)) - to_latent(conditional, torch.zeros_like(z))
        least = torch.finfo(z.dtype).eps * (z.abs() + 1)
        return 0.5 + 0.05 * float(z.abs().max()) / torch.maximum(unit.abs(), least)


def _gradient(result: Tensor, leaf: Tensor) -> Tensor | None:
    if not result.requires_grad:
        return None
    return torch.autograd.grad(result.sum(), leaf, retain_graph=True, allow_unused=True)[0]


def check_round_trip(generator: HierarchicalGenerator, x: Tensor) -> str | None:
    """noise -> latents -> noise gives the noise again, up to the rounding of latents."""
    with torch.no_grad():
        topdown = TopDown(generator, len(x))
        noise = [torch.randn_like(z) for z in ancestral(generator, len(x)).latents]
        descent = topdown.descend(noise, "noise")
        back = topdown.descend(topdown.position(descent.latents, "noise"), "noise").latents
    for layer, (a, b) in enumerate(zip(descent.latents, back, strict=True), start=1):
        if not near(a, b, floor=0.01):
            return (
                f"noise -> latents -> noise is off by {float((a - b).abs().max()):.2g} in z_{layer}: the conditionals are not "
                "the same when the same latents are taken in again."
            )
    return None


def check_density(generator: HierarchicalGenerator, x: Tensor) -> str | None:
    """log p(z_i | z_{>i}) is log N(ε; 0, I) − log |det ∂z_i/∂ε| at z_i = T(ε); of Normals it is by their form."""
    topdown = TopDown(generator, len(x))
    with torch.no_grad():
        descent = topdown.descend(ancestral_noise(topdown), "noise")
    for layer in range(len(descent.latents), 0, -1):
        conditional, size = descent.conditionals[layer - 1], descent.latents[layer - 1][0].numel()
        if isinstance(conditional, Normal) or size > _MOST_UNITS:
            continue
        noise = 0.7 * torch.randn_like(descent.latents[layer - 1])

        def first(row: Tensor, conditional: Distribution = conditional, noise: Tensor = noise) -> Tensor:
            return to_latent(conditional, torch.cat([row[None], noise[1:]]))[0]

        with torch.enable_grad():
            jacobian: Any = torch.autograd.functional.jacobian(first, noise[0])
        with torch.no_grad():
            said = sum_event(conditional.log_prob(to_latent(conditional, noise)))[:1]
            log_det = torch.linalg.slogdet(jacobian.reshape(size, size))[1]
            expected = sum_event(Normal(0.0, 1.0).log_prob(noise))[:1] - log_det
        if not same_log_density(said, expected, 10 * size):
            return (
                f"conditional: log_prob of layer {layer}, a {type(conditional).__name__}, says {float(said):.6g} at z = T(ε) "
                f"for the first observation, but N(0, I) by its own map has {float(expected):.6g} there. Is a log-determinant "
                "left out, or is from_noise not that of this distribution?"
            )
    return None


def log_likelihood(generator: HierarchicalGenerator, state: Any, x: Tensor) -> Tensor:
    """log p(x | z) at the state below z_1."""
    return generator.likelihood(state).log_prob(x)


def _rows(conditional: Distribution) -> list[Tensor]:
    """What says where an observation's z is, and how wide: tensors (batch, …)."""
    if isinstance(conditional, Normal):
        return tensors_of(conditional)
    unit = tensors_of(conditional)[0].new_ones((*conditional.batch_shape, *conditional.event_shape))
    return [to_latent(conditional, 0 * unit), to_latent(conditional, unit)]


def _draw(conditional: Distribution) -> Tensor:
    noise = normal_like((*conditional.batch_shape, *conditional.event_shape), tensors_of(conditional)[0])
    return to_latent(conditional, noise)


def _pass(generator: HierarchicalGenerator, latents: Sequence[Tensor]) -> Descent:
    with torch.no_grad():
        return TopDown(generator, len(latents[0])).descend(tuple(latents), "latent", to_observation=True)
