"""`check_generator`: tests an implementation of `HierarchicalGenerator` and names what is wrong in words."""

from __future__ import annotations

__all__ = ["Probe", "check_generator", "probe_generator"]

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from energy_prior.checks.arguments import as_observations, is_array
from energy_prior.checks.decoder import (
    check_density,
    check_deterministic,
    check_likelihood,
    check_nothing_kept,
    check_reaches,
    check_round_trip,
    check_rows,
    check_states,
)
from energy_prior.checks.inference import (
    check_gradients_of_infer,
    check_infer,
    check_log_q,
    check_support,
    has_posterior_log_prob,
)
from energy_prior.checks.own_calls import compare_reconstruct, compare_sample
from energy_prior.checks.own_terms import compare_elbo, compare_kl
from energy_prior.checks.probe import Probe, probe_generator
from energy_prior.checks.reading import Reading, read_off
from energy_prior.checks.untouched import Snapshot, untouched
from energy_prior.errors import ArgumentError, EnergyPriorError, GeneratorError, warn
from energy_prior.process import exclusive, full_precision, reproducible, unvalidated
from energy_prior.protocol import HierarchicalGenerator, find_infer
from energy_prior.topdown import inferred_descent

_SEED = 20230423


def check_generator(
    generator: HierarchicalGenerator,
    x: Any,
    *,
    reconstruct: Callable[[Tensor], Any] | None = None,
    sample: Callable[[int], Any] | None = None,
    kl: Callable[[Tensor], Any] | None = None,
    elbo: Callable[[Tensor], Any] | None = None,
) -> tuple[str, ...]:
    """Tests a generator as it stands (in its present train/eval mode) on a few observations, and leaves no trace on it.

    By itself a generator is held to the protocol, and log q of `infer` to the μ and σ of the draws that it makes. With the
    model's own calls, which must not go through the generator, it is held to the model: both sides run on the same noise, and
    the first layer at which they part is named. The noise is handed to the model's own normal draws, whatever their order, so
    the calls need no seed. What is compared is exact up to rounding: relative 1e-4 in float32, 1e-9 in float64.

    Args:
        generator: the generator, or an adapter of yours.
        x: two or more observations of the kind it was trained on, (batch, *x_shape); a tensor, or a numpy array.
        reconstruct: of x: the model's forward pass: the mean of p(x | z) at a draw z ~ q(z | x), (batch, *x_shape) in the units
            of x; or log p(x | z), (batch,), nats; or what has `log_prob`, such as a distribution.
        sample: of n = len(x): the model's own sampler: means, or draws, of p(x | z) at z ~ p(z); or log p(x | z) of the x given
            here, (n,), nats; or what has `log_prob`.
        kl: of x: KL(q ‖ p), or log q − log p at the draw, nats, of every layer: (batch, L), z_1 first, or a list of L tensors
            (batch, …), whose elements are summed; or their sum, (batch,).
        elbo: of x, where the model's own pass gives nothing but that: log p(x | z) − KL(q ‖ p), or log p(x | z) + log p − log q
            at the draw, (batch,), nats; or its mean over the batch, a scalar.

    Returns:
        What was checked and found right, a sentence each. Values of log q are among it where z_i = μ + σ ε, element by element.

    Raises:
        GeneratorError: with every fault found, in words, and what to do about it.
        ArgumentError: x, or what one of the model's calls gives, is of the wrong kind.

    Examples:
        >>> import energy_prior as ep
        >>> vae = ep.LadderVAE((1, 8, 8)).eval()
        >>> ep.check_generator(vae, torch.rand(4, 1, 8, 8))[0]
        'shapes, types and layer order agree with latent_shapes'
    """
    if is_array(x):
        with exclusive(), torch.no_grad(), untouched(generator):
            reference = probe_generator(generator).latents[0]
        x = as_observations("x", x, x.shape[1:], reference)
    if not isinstance(x, Tensor):
        raise ArgumentError(f"x: expected a torch.Tensor or a numpy array, got {type(x).__name__}.")
    if x.is_meta or x.layout != torch.strided:
        raise ArgumentError(f"x: expected a dense tensor with values, got a {x.layout} one on {x.device}.")
    if x.ndim < 2 or len(x) < 2:
        raise ArgumentError(f"x: expected two or more observations, (batch, *x_shape), got shape {tuple(x.shape)}.")
    for name, call in {"reconstruct": reconstruct, "sample": sample, "kl": kl, "elbo": elbo}.items():
        if call is not None and not callable(call):
            raise ArgumentError(f"{name}: expected a function, got {type(call).__name__}.")
        if call is not None and name != "sample" and find_infer(generator) is None:
            raise ArgumentError(
                f"{name}: it needs a generator with infer, to compare with; {type(generator).__name__} has none."
            )
    with (
        exclusive(),
        torch.inference_mode(False),
        full_precision(x.device),
        untouched(generator, reconstruct, sample, kl, elbo) as snapshot,
        reproducible(torch.Generator().manual_seed(_SEED), x.device),
        unvalidated(),
    ):
        x = x.detach().clone()  # made in inference mode, it could not take part in autograd
        passed, faults = _run(generator, x, _OwnCalls(reconstruct, sample, kl, elbo), snapshot)
    if faults:
        raise GeneratorError(f"{type(generator).__name__} breaks the generator protocol:\n- " + "\n- ".join(faults))
    return tuple(passed)


class _OwnCalls(NamedTuple):
    """The model's own calls that were given."""

    reconstruct: Callable[[Tensor], Any] | None
    sample: Callable[[int], Any] | None
    kl: Callable[[Tensor], Any] | None
    elbo: Callable[[Tensor], Any] | None


def _run(generator: Any, x: Tensor, own: _OwnCalls, snapshot: Snapshot) -> tuple[list[str], list[str]]:
    """What was found right, and what wrong."""
    reading: Callable[[], Reading] = cache(lambda: read_off(generator, x))
    # Each gives what is wrong, and needs that those before it up to `repeat` found nothing.
    checks: list[tuple[str, Callable[[], str | None], bool]] = [
        ("shapes, types and layer order agree with latent_shapes", lambda: _shapes(generator, snapshot, own, x), True),
        ("likelihood fits the observations", lambda: check_likelihood(generator, x), True),
        ("conditionals are deterministic", lambda: check_deterministic(generator, x), True),
        ("nothing that belongs in the state is kept on the model", lambda: check_nothing_kept(generator, x), True),
        ("descend leaves its state untouched", lambda: check_states(generator, x), True),
        ("a batch row does not depend on the others", lambda: check_rows(generator, x), False),
        (
            "every latent reaches a layer below it or the observation, with gradients",
            lambda: check_reaches(generator, x),
            False,
        ),
        ("noise -> latents -> noise round-trips", lambda: check_round_trip(generator, x), False),
        ("log p of every layer is that of the map from noise", lambda: check_density(generator, x), False),
    ]
    if find_infer(generator) is not None:
        checks += [
            (
                "infer gives latents and log q of the right shapes, finite, reproducible, row by row",
                lambda: check_infer(generator, x),
                True,
            ),
            ("posterior draws are where the prior can be", lambda: check_support(generator, x), False),
            ("gradients reach q through the latents and through log q", lambda: check_gradients_of_infer(generator, x), False),
            ("log q", lambda: check_log_q(generator, x, reading()), False),
        ]
    passed, faults = [], []
    for what, check, decisive in checks:
        fault = _fault(what, check)
        if fault is not None:
            faults.append(fault)
            if decisive:  # what follows would only repeat it
                return passed, faults
        else:
            passed.append(_log_q_sentence(generator, reading()) if what == "log q" else what)
    comparisons: tuple[tuple[Any, Callable[[Any], str]], ...] = (
        (own.sample, lambda call: compare_sample(generator, x, call)),
        (own.reconstruct, lambda call: compare_reconstruct(generator, x, call, reading())),
        (own.kl, lambda call: compare_kl(generator, x, call, reading())),
        (own.elbo, lambda call: compare_elbo(generator, x, call, reading())),
    )
    for call, compare in comparisons:
        if call is not None:
            try:
                passed.append(compare(call))
            except GeneratorError as error:
                faults.append(str(error))
    return passed, faults


def _fault(what: str, check: Callable[[], str | None]) -> str | None:
    try:
        return check()
    except EnergyPriorError as error:
        return str(error)
    except Exception as error:
        return f"while checking that {what}, the generator raised {type(error).__name__}: {error}"


def _log_q_sentence(generator: Any, reading: Reading) -> str:
    """Which layers' log q was held to its draw."""
    if not reading.unread:
        what = "Gaussian" if len(reading.loc) == len(reading.q) else "distribution"
        return f"log q of every layer is that of the {what} that infer draws it from"
    known = ", ".join(map(str, sorted(reading.q))) or "no layer"
    layer = max(reading.unread)
    return (
        f"log q was compared with the draws in layers: {known}; not in {', '.join(map(str, sorted(reading.unread)))}: "
        f"layer {layer}: {reading.unread[layer]}"
        + ("; posterior_log_prob gives the same in every layer" if has_posterior_log_prob(generator) else "")
    )


def _shapes(generator: Any, snapshot: Snapshot, own: _OwnCalls, x: Tensor) -> str | None:
    with torch.no_grad():
        if not _lazy(generator):
            _run_once(generator, own.reconstruct or own.elbo, x)
        probe_generator(generator)
    if snapshot.parameters_changed():
        warn(
            "generator: its parameters are set by the first batch that it sees. They were set by x for this check, and are put "
            "back after it. Run the model once by its own forward, on training data, before you wrap it.",
            UserWarning,
        )
    return None


def _lazy(generator: Any) -> bool:
    return isinstance(generator, nn.Module) and any(nn.parameter.is_lazy(p) for p in generator.parameters())


def _run_once(generator: Any, own: Callable[[Tensor], Any] | None, x: Tensor) -> None:
    """A forward pass, the model's own if there is one to be found, so that what sets itself by data sees data."""
    model = getattr(generator, "model", None)

    def through_the_protocol(x: Tensor) -> None:
        generator.likelihood(inferred_descent(generator, generator.infer(x)).state)

    for call in (own, model if isinstance(model, nn.Module) else None, through_the_protocol):
        if call is not None:
            try:
                call(x)
            except Exception:  # this was no check: those that follow say what is wrong  # noqa: S112
                continue
            return
