"""`check_generator`: tests an implementation of `HierarchicalGenerator` and names what is wrong in words."""

from __future__ import annotations

__all__ = ["Probe", "check_generator", "probe_generator"]

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from energy_prior.checks import arguments as validate
from energy_prior.errors import EnergyPriorError, GeneratorError
from energy_prior.process import reproducible, unvalidated
from energy_prior.protocol import HierarchicalGenerator, Inferred, find_infer
from energy_prior.topdown import Descent, TopDown, ancestral, check_conditional, parameters, to_latent

_PROBE_BATCH = 2
_SEED = 20230423
_DETERMINISTIC = (
    "It must be deterministic: is there dropout, or batch norm, in train mode? Call generator.eval(); draw no random numbers "
    "inside it."
)


@dataclass(frozen=True)
class Probe:
    """What one pass of a generator showed: its latents (batch of 2) and the shape of an observation."""

    latents: tuple[Tensor, ...]
    x_shape: torch.Size


def probe_generator(generator: Any) -> Probe:
    """One pass with a batch of 2 and no random numbers, checking types and shapes on the way.

    Raises:
        GeneratorError: names the call at fault, what was expected and what came.
    """
    validate.check_calls(generator)
    try:
        return _probe(generator)
    except EnergyPriorError:
        raise
    except Exception as error:
        raise GeneratorError(
            f"generator: {type(generator).__name__} raised {type(error).__name__} in a plain top-down pass: {error}. "
            "energy_prior.check_generator(generator, x) looks for the cause."
        ) from error


def _probe(generator: Any) -> Probe:
    shapes = tuple(torch.Size(s) for s in generator.latent_shapes)
    if not shapes:
        raise GeneratorError("generator.latent_shapes: expected the shape of at least one layer, got none.")
    state = generator.start(_PROBE_BATCH)
    latents: list[Tensor] = []
    for layer in range(len(shapes), 0, -1):
        conditional = generator.conditional(state, layer)
        check_conditional(conditional, layer, shapes[layer - 1], _PROBE_BATCH)
        first = parameters(conditional)[0]
        validate.check_dtype(first.dtype)
        if latents and (first.dtype, first.device) != (latents[0].dtype, latents[0].device):
            raise GeneratorError(
                f"generator.conditional: layer {layer} is {first.dtype} on {first.device}, the layer above "
                f"{latents[0].dtype} on {latents[0].device}; all layers must agree."
            )
        latents.insert(0, to_latent(conditional, torch.full_like(first, 0.5)))
        state = generator.descend(state, latents[0], layer)
    likelihood = generator.likelihood(state)
    if not isinstance(likelihood, Distribution):
        raise GeneratorError(
            f"generator.likelihood: expected a torch.distributions.Distribution, got {type(likelihood).__name__}."
        )
    if likelihood.batch_shape != (_PROBE_BATCH,):
        dims = len(likelihood.batch_shape) + len(likelihood.event_shape) - 1
        raise GeneratorError(
            f"generator.likelihood: expected batch_shape ({_PROBE_BATCH},) for {_PROBE_BATCH} observations, got "
            f"{tuple(likelihood.batch_shape)} with event_shape {tuple(likelihood.event_shape)}. One observation is one event: "
            f"torch.distributions.Independent(…, {dims}) of a distribution per element."
        )
    return Probe(tuple(latents), likelihood.event_shape)


def check_generator(generator: HierarchicalGenerator, x: Tensor) -> tuple[str, ...]:
    """Tests a generator as it stands (in its present train/eval mode) on a few observations.

    Args:
        generator: the generator, or an adapter of yours.
        x: two or more observations of the kind it was trained on, (batch, *x_shape).

    Returns:
        What was checked and found right, a sentence each. The values of log q are not among it: only their shape, that they are
        finite, and that they change with the draw.

    Raises:
        GeneratorError: with every fault found, in words, and what to do about it.

    Example:
        >>> import energy_prior as ep
        >>> vae = ep.LadderVAE((1, 8, 8)).eval()
        >>> ep.check_generator(vae, torch.rand(4, 1, 8, 8))[0]
        'shapes, types and layer order agree with latent_shapes'
    """
    if not isinstance(x, Tensor):
        raise GeneratorError(f"x: expected a torch.Tensor, got {type(x).__name__}; torch.as_tensor makes one.")
    if x.ndim < 2 or len(x) < 2:
        raise GeneratorError(f"x: expected two or more observations, (batch, *x_shape), got shape {tuple(x.shape)}.")
    checks: dict[str, Callable[[HierarchicalGenerator, Tensor], str | None]] = {
        "shapes, types and layer order agree with latent_shapes": _shapes,
        "likelihood fits the observations": _likelihood,
        "conditionals are deterministic": _deterministic,
        "descend leaves its state untouched": _pure,
        "a batch row does not depend on the others": _rows_independent,
        "every latent reaches the layers below it and the observation, with gradients": _reaches,
        "noise -> latents -> noise round-trips": _round_trip,
        "infer gives latents and log q of the right shapes, finite, reproducible, row by row": _infer,
    }
    if find_infer(generator) is None:
        checks.popitem()
    passed, faults = [], []
    with reproducible(torch.Generator().manual_seed(_SEED), x.device), _same_buffers(generator), unvalidated():
        for what, check in checks.items():
            try:
                fault = check(generator, x)
            except EnergyPriorError as error:
                fault = str(error)
            except Exception as error:
                fault = f"while checking that {what}, the generator raised {type(error).__name__}: {error}"
            if fault is None:
                passed.append(what)
            else:
                faults.append(fault)
                if check in (_shapes, _likelihood, _deterministic, _pure):
                    break  # what follows would only repeat it
    if faults:
        raise GeneratorError(f"{type(generator).__name__} breaks the generator protocol:\n- " + "\n- ".join(faults))
    return tuple(passed)


def _shapes(generator: HierarchicalGenerator, x: Tensor) -> str | None:
    validate.check_calls(generator)
    shapes = tuple(torch.Size(s) for s in generator.latent_shapes)
    with torch.no_grad():
        top = generator.conditional(generator.start(2), len(generator.latent_shapes))
        shape = getattr(getattr(top, "loc", None), "shape", torch.Size())[1:]
        if shape != shapes[-1] and shape == shapes[0]:
            return (
                f"layer order: start() leads to a layer of shape {tuple(shape)}, which is latent_shapes[0]; latent_shapes must "
                "run "
                "from z_1 (nearest the data) to z_L (the top). Reverse it, and the latents that infer returns if they run that "
                "way too."
            )
        probe_generator(generator)
    return None


def _deterministic(generator: HierarchicalGenerator, x: Tensor) -> str | None:
    for layer, state, z in _walk(generator, len(x)):
        if not _same(generator.conditional(state, layer), generator.conditional(state, layer)):
            return f"conditional: two calls on one state differ at layer {layer}. {_DETERMINISTIC}"
        if layer == 1:
            below = generator.descend(state, z, layer)
            if not torch.equal(_log_likelihood_at(generator, below, x), _log_likelihood_at(generator, below, x)):
                return f"likelihood: two calls on one state differ. {_DETERMINISTIC}"
    return None


def _pure(generator: HierarchicalGenerator, x: Tensor) -> str | None:
    """One state branched twice must agree with itself, whatever the other branch does below it; so must two passes."""
    for layer, state, z in _walk(generator, len(x)):
        try:
            sound, raised = _branches_agree(generator, state, layer, z, x), ""
        except RuntimeError as error:  # a list that grew, a dict that was overwritten: the shapes no longer fit
            sound, raised = False, f" (it raised: {error})"
        if not sound:
            return (
                f"descend: one state at layer {layer}, taken down twice, does not agree with itself{raised}. descend must "
                "return a new state and leave the given one as it was: copy dicts and lists before writing to "
                "them, no in-place "
                "operations, nothing stored on the model; no dropout or batch norm in train mode."
            )
    return _side_by_side(generator, x)


def _side_by_side(generator: HierarchicalGenerator, x: Tensor) -> str | None:
    """A pass must not notice that another one goes down between its calls."""
    one, other = (ancestral(generator, len(x)).latents for _ in range(2))
    alone = _pass(generator, one)
    likelihood = _log_likelihood(generator, alone, x)
    fault = (
        "descend: a pass comes out otherwise where another one goes down between its calls, from layer {0} on. Something that "
        "belongs in the state is kept on the model; put it into what start and descend return."
    )
    with torch.no_grad():
        state, there = generator.start(len(x)), generator.start(len(x))
        for layer in range(len(one), 0, -1):
            here = generator.conditional(state, layer)
            generator.conditional(there, layer)
            expected = alone.conditionals[layer - 1]
            if not (_close(here.loc, expected.loc) and _close(here.scale, expected.scale)):
                return fault.format(layer)
            state, there = generator.descend(state, one[layer - 1], layer), generator.descend(there, other[layer - 1], layer)
        if not _close(_log_likelihood_at(generator, state, x), likelihood):
            return fault.format("x")
    return None


def _branches_agree(generator: HierarchicalGenerator, state: Any, layer: int, z: Tensor, x: Tensor) -> bool:
    before = generator.conditional(state, layer)
    loc, scale = before.loc.clone(), before.scale.clone()
    first = generator.descend(state, z, layer)
    after = generator.conditional(state, layer)
    if not (torch.equal(loc, after.loc) and torch.equal(scale, after.scale)):
        return False
    expected = _below(generator, first, layer, x)
    _below(generator, generator.descend(state, z + 1.0, layer), layer, x)
    kept = _below(generator, first, layer, x)
    again = _below(generator, generator.descend(state, z, layer), layer, x)
    return _close(expected, kept) and _close(expected, again)


def _rows_independent(generator: HierarchicalGenerator, x: Tensor) -> str | None:
    """The first row must not notice that the others change."""
    latents = ancestral(generator, len(x)).latents
    here = _pass(generator, latents)
    there = _pass(generator, [torch.cat([z[:1], 2 * z[1:] + 1]) for z in latents])
    what = None
    for layer, (a, b) in enumerate(zip(here.conditionals, there.conditionals, strict=True), start=1):
        if not _close(a.loc[:1], b.loc[:1]) or not _close(a.scale[:1], b.scale[:1]):
            what = f"conditional: layer {layer} of an observation"
    if what is None and not _close(_log_likelihood(generator, here, x)[:1], _log_likelihood(generator, there, x)[:1]):
        what = "likelihood: that of an observation"
    if what is None:
        return None
    return f"{what} changes with the rest of its batch. Is there batch norm in train mode? Call generator.eval()."


def _likelihood(generator: HierarchicalGenerator, x: Tensor) -> str | None:
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
    log_prob = _log_likelihood(generator, descent, x)
    if log_prob.shape != (len(x),):
        return (
            f"likelihood: log_prob of {len(x)} observations has shape {tuple(log_prob.shape)}, expected ({len(x)},), nats each."
        )
    if not torch.isfinite(log_prob).all():
        return "likelihood: log_prob of the observations is not finite. Are they in the range that the model was trained on?"
    return None


def _reaches(generator: HierarchicalGenerator, x: Tensor) -> str | None:
    """Each ε_i must move log p(x | z), and each z_i some conditional below it, and autograd must see both."""
    topdown = TopDown(generator, len(x))
    noise = [torch.randn_like(z) for z in ancestral(generator, len(x)).latents]

    def outcome(values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        descent = topdown.descend(values, "noise", to_observation=True)
        lower = [torch.cat([c.loc.flatten(1), c.scale.flatten(1)], 1) for c in descent.conditionals]
        return (_log_likelihood(generator, descent, x), *lower)

    leaves = [n.clone().requires_grad_() for n in noise]
    with torch.enable_grad():
        results = outcome(leaves)
    for layer in range(1, len(noise) + 1):
        moved = outcome([n + (0.5 if i == layer - 1 else 0.0) for i, n in enumerate(noise)])
        for targets, what in ((range(1, layer), "a layer below it"), (range(1), "the observation")):
            gradient = any(_has_gradient(results[j], leaves[layer - 1]) for j in targets)
            if gradient or not targets:
                continue
            if any(not torch.equal(moved[j].detach(), results[j].detach()) for j in targets):
                return (
                    f"gradients: {what} changes with z_{layer}, but autograd gives no gradient for it. Is the latent detached, "
                    "or is there a torch.no_grad() on the way down? Langevin needs the gradient."
                )
            return (
                f"dependence: changing z_{layer} does not change {what.replace('a layer', 'any layer')}. Does descend use the "
                "z that it is given? (A model with zero-initialised layers shows this before training: check a trained one.)"
            )
    return None


def _round_trip(generator: HierarchicalGenerator, x: Tensor) -> str | None:
    topdown = TopDown(generator, len(x))
    noise = [torch.randn_like(z) for z in ancestral(generator, len(x)).latents]
    latents = topdown.descend(noise, "noise").latents
    for layer, (a, b) in enumerate(zip(noise, topdown.position(latents, "noise"), strict=True), start=1):
        if not torch.allclose(a, b, rtol=0, atol=1e-2 if a.dtype == torch.float32 else 1e-6):
            return (
                f"noise -> latents -> noise is off by {float((a - b).abs().max()):.2g} at layer {layer}: the conditionals are "
                "not the same when the same latents are taken in again, or a scale is too small for the dtype."
            )
    return None


def _infer(generator: HierarchicalGenerator, x: Tensor) -> str | None:
    with torch.enable_grad():
        inferred = validate.checked_infer(generator, x)
    for layer, z in enumerate(inferred.latents, start=1):
        learnable = isinstance(generator, nn.Module) and any(p.requires_grad for p in generator.parameters())
        if learnable and not z.requires_grad:
            return f"infer: z_{layer} carries no gradient. Draw it reparameterised (rsample), not detached."

    def draw(seed: int, observations: Tensor = x) -> Inferred:
        with reproducible(torch.Generator().manual_seed(seed), x.device):  # as the library calls it
            return generator.infer(observations)  # type: ignore[attr-defined]

    with torch.enable_grad():
        first, again, other = (draw(seed) for seed in (1, 1, 2))
    if not all(torch.equal(a, b) for a, b in zip(first.latents, again.latents, strict=True)):
        return (
            "infer: two draws under one seed of torch's random streams differ. Draw from torch (not numpy), and call "
            "generator.eval()."
        )
    if all(torch.equal(a, b) for a, b in zip(first.latents, other.latents, strict=True)):
        return "infer: different seeds give the same draw. It must draw z ~ q(z | x), not return a mean."
    for layer in range(1, len(first.latents) + 1):
        if torch.equal(first.log_q[:, layer - 1], other.log_q[:, layer - 1]):
            return f"infer: log_q of layer {layer} is the same for different draws. It must be log q at the drawn z_{layer}."
    among_copies = draw(1, x[:1].expand(x.shape))
    pairs = zip((*first.latents, first.log_q), (*among_copies.latents, among_copies.log_q), strict=True)
    if not all(_close(a[:1], b[:1]) for a, b in pairs):
        return (
            "infer: the latents of an observation, or their log q, change with the rest of its batch. Is there batch norm in "
            "train mode? Call generator.eval()."
        )
    if first.conditionals is not None:
        fault = _same_pass(generator, first, x)
        if fault is not None:
            return fault
    if callable(getattr(generator, "posterior_log_prob", None)):
        return _same_log_q(generator, (first, other), x)
    return None


def _same_pass(generator: HierarchicalGenerator, inferred: Inferred, x: Tensor) -> str | None:
    """What `infer` met on its way down is what the generator gives for its latents."""
    with torch.enable_grad():
        descent = TopDown(generator, len(x)).descend(inferred.latents, "latent", to_observation=True)
    pairs = list(enumerate(zip(inferred.conditionals or (), descent.conditionals, strict=True), start=1))
    for layer, (a, b) in pairs:
        if not (_close(a.loc, b.loc) and _close(a.scale, b.scale)):
            return f"infer: conditionals[{layer - 1}] is not that of z_{layer} at its latents; they go from z_1 to z_L."
    for layer, (a, b) in pairs:
        if b.loc.requires_grad and not a.loc.requires_grad:
            return f"infer: conditionals[{layer - 1}] carries no gradient, so that no training could reach that prior."
    if not _close(_log_likelihood_at(generator, inferred.state, x), _log_likelihood(generator, descent, x)):
        return "infer: its state does not give the likelihood of its latents; it must be the state below z_1."
    return None


def _same_log_q(generator: Any, draws: Sequence[Inferred], x: Tensor) -> str | None:
    """log q of `infer` is that of `posterior_log_prob` at the same latents, layer by layer."""
    for drawn in draws:
        with torch.no_grad():
            log_q = generator.posterior_log_prob(x, drawn.latents)
        if log_q.shape != drawn.log_q.shape:
            return f"posterior_log_prob: expected shape (batch, L) = {tuple(drawn.log_q.shape)}, got {tuple(log_q.shape)}."
        for layer in range(1, log_q.shape[1] + 1):
            ours, theirs = log_q[:, layer - 1], drawn.log_q[:, layer - 1]
            if not _close(ours, theirs):
                one, two = float(theirs[0].detach()), float(ours[0])
                return (
                    f"log q of layer {layer}: infer says {one:.6g} for the first observation, posterior_log_prob {two:.6g} at "
                    "the same latents. Is the log-determinant of a flow left out, or its sign wrong?"
                )
    return None


def _walk(generator: HierarchicalGenerator, batch: int) -> Iterator[tuple[int, Any, Tensor]]:
    """(layer, state above it, a draw of its z), from the top, without gradients."""
    with torch.no_grad():
        state = generator.start(batch)
        for layer in range(len(generator.latent_shapes), 0, -1):
            conditional = generator.conditional(state, layer)
            z = to_latent(conditional, torch.randn_like(parameters(conditional)[0]))
            yield layer, state, z
            if layer > 1:
                state = generator.descend(state, z, layer)


def _below(generator: HierarchicalGenerator, state: Any, layer: int, x: Tensor) -> Tensor:
    """What a state below `layer` leads to, as one tensor."""
    with torch.no_grad():
        if layer > 1:
            return torch.stack(parameters(generator.conditional(state, layer - 1)))
        return _log_likelihood_at(generator, state, x)


def _log_likelihood_at(generator: HierarchicalGenerator, state: Any, x: Tensor) -> Tensor:
    return generator.likelihood(state).log_prob(x)


@contextlib.contextmanager
def _same_buffers(generator: Any) -> Iterator[None]:
    """Running statistics and the like are put back: a check must not change the model."""
    buffers = list(generator.buffers()) if isinstance(generator, nn.Module) else []
    kept = [b.clone() for b in buffers]
    try:
        yield
    finally:
        for b, value in zip(buffers, kept, strict=True):
            b.copy_(value)


def _pass(generator: HierarchicalGenerator, latents: Sequence[Tensor]) -> Descent:
    with torch.no_grad():
        return TopDown(generator, len(latents[0])).descend(tuple(latents), "latent", to_observation=True)


def _log_likelihood(generator: HierarchicalGenerator, descent: Descent, x: Tensor) -> Tensor:
    return _log_likelihood_at(generator, descent.state, x)


def _has_gradient(result: Tensor, leaf: Tensor) -> bool:
    if not result.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(result.sum(), leaf, retain_graph=True, allow_unused=True)
    return gradient is not None and bool((gradient != 0).any())


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a.loc, b.loc) and torch.equal(a.scale, b.scale)


def _close(a: Tensor, b: Tensor) -> bool:
    scale = float(a.detach().abs().max()) + 1.0
    return bool(torch.allclose(a, b, rtol=1e-4, atol=(1e-5 if a.dtype == torch.float32 else 1e-10) * scale))
