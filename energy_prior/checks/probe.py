"""One plain pass of a generator: what it offers, by type, shape and dtype."""

from __future__ import annotations

__all__ = ["Probe", "check_signatures", "probe_generator"]

import contextlib
import inspect
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from energy_prior.checks.arguments import check_calls, check_dtype
from energy_prior.checks.conditionals import check_conditional
from energy_prior.conditionals import is_bounded, tensors_of, to_latent
from energy_prior.errors import EnergyPriorError, GeneratorError
from energy_prior.process import full_precision

_PROBE_BATCH = 2
_CALLS = {
    "start": ("batch_size",),
    "conditional": ("state", "layer"),
    "descend": ("state", "z", "layer"),
    "likelihood": ("state",),
}
_OLDER = (
    " This is an earlier form of the protocol. The layer is an argument now, L (the top), …, 1 (nearest the data), so that "
    "states need no counter or tag."
)


@dataclass(frozen=True)
class Probe:
    """What one pass of a generator showed.

    Attributes:
        latents: (z_1, …, z_L) of a batch of 2.
        x_shape: shape of an observation.
        families: kind of conditional by layer (1 … L), of those that are not Normal.
        bounded: the layers where z_i is known not to reach all real numbers.
    """

    latents: tuple[Tensor, ...]
    x_shape: torch.Size
    families: dict[int, str]
    bounded: frozenset[int]


def probe_generator(generator: Any) -> Probe:
    """One pass with a batch of 2 and no random numbers, checking types and shapes on the way; autocast does not reach it.

    Raises:
        GeneratorError: names the call at fault, what was expected and what came.
    """
    check_calls(generator)
    check_signatures(generator)
    lazy = [name for name, p in _named_parameters(generator) if nn.parameter.is_lazy(p)]
    if lazy:
        raise GeneratorError(
            f"generator: its parameter {lazy[0]} has no shape yet (a lazy module). Run the model once by its own forward, on "
            "data as it is trained on, before it is wrapped."
        )
    at: list[str] = ["latent_shapes"]
    try:
        with _no_autocast(generator):
            return _probe(generator, at)
    except EnergyPriorError:
        raise
    except Exception as error:
        kinds = {p.dtype for _, p in _named_parameters(generator) if p.is_floating_point()}
        if kinds and kinds <= {torch.float16, torch.bfloat16}:
            check_dtype("its weights", kinds.pop())
        order = _order_that_works(generator)
        if order:
            raise GeneratorError(f"layer order: {order}") from error
        count = len(generator.latent_shapes)
        raise GeneratorError(
            f"generator.{at[-1]} raised {type(error).__name__} in a plain pass from z_{count} down to z_1: {error}. Does it "
            f"take layer {count} for the top and 1 for the layer nearest the data, and the state that start or descend gave?"
        ) from error


def check_signatures(generator: Any) -> None:
    """Every call takes the arguments of the protocol, the layer among them.

    Raises:
        GeneratorError: says what it takes and what it should.
    """
    for name, arguments in _CALLS.items():
        call = getattr(generator, name)
        try:
            signature = inspect.signature(call)
        except (TypeError, ValueError):  # code that does not say
            continue
        try:
            signature.bind(*arguments)
        except TypeError:
            older = arguments[-1] == "layer" and len(signature.parameters) == len(arguments) - 1
            why = _OLDER if older else ""
            raise GeneratorError(
                f"generator.{name}: expected {name}({', '.join(arguments)}), got {name}{signature}.{why}"
            ) from None


def _probe(generator: Any, at: list[str]) -> Probe:
    """One pass; `at`: the calls so far."""
    shapes = tuple(torch.Size(s) for s in generator.latent_shapes)
    if not shapes:
        raise GeneratorError("generator.latent_shapes: expected the shape of at least one layer, got none.")
    at.append("start")
    state = generator.start(_PROBE_BATCH)
    latents: list[Tensor] = []
    families: dict[int, str] = {}
    bounded: set[int] = set()
    for layer in range(len(shapes), 0, -1):
        at.append(f"conditional(state, layer={layer})")
        conditional = generator.conditional(state, layer)
        try:
            check_conditional(conditional, layer, shapes[layer - 1], _PROBE_BATCH)
        except GeneratorError as error:
            order = _order_that_works(generator)
            if not order:
                raise
            raise GeneratorError(f"layer order: {order}") from error
        if not isinstance(conditional, Normal):
            families[layer] = type(conditional).__name__
        if is_bounded(conditional):
            bounded.add(layer)
        first = tensors_of(conditional)[0]
        check_dtype(f"layer {layer}", first.dtype)
        if latents and (first.dtype, first.device) != (latents[0].dtype, latents[0].device):
            raise GeneratorError(
                f"generator.conditional: layer {layer} is {first.dtype} on {first.device}, the layer above "
                f"{latents[0].dtype} on {latents[0].device}; all layers must agree."
            )
        latents.insert(0, to_latent(conditional, first.new_full((_PROBE_BATCH, *shapes[layer - 1]), 0.5)))
        at.append(f"descend(state, z, layer={layer})")
        state = generator.descend(state, latents[0], layer)
    at.append("likelihood")
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
    return Probe(tuple(latents), likelihood.event_shape, families, frozenset(bounded))


class _Renumbered:
    """A generator whose layers, or shapes, are counted from the other end."""

    def __init__(self, generator: Any, numbers: bool, shapes: bool) -> None:
        self._generator, self._numbers, given = generator, numbers, tuple(generator.latent_shapes)
        self.latent_shapes = given[::-1] if shapes else given

    def _layer(self, layer: int) -> int:
        return len(self.latent_shapes) + 1 - layer if self._numbers else layer

    def start(self, batch_size: int) -> Any:
        return self._generator.start(batch_size)

    def conditional(self, state: Any, layer: int) -> Any:
        return self._generator.conditional(state, self._layer(layer))

    def descend(self, state: Any, z: Tensor, layer: int) -> Any:
        return self._generator.descend(state, z, self._layer(layer))

    def likelihood(self, state: Any) -> Any:
        return self._generator.likelihood(state)


def _order_that_works(generator: Any) -> str:
    """Says which order the layers are in, where they are in another one than the protocol's."""
    if isinstance(generator, _Renumbered):
        return ""
    count = len(generator.latent_shapes)
    for numbers, shapes in ((False, True), (True, False), (True, True)):
        try:
            _probe(_Renumbered(generator, numbers, shapes), [])
        except Exception:  # not this one  # noqa: S112
            continue
        found = ["latent_shapes runs from the top; it must run from z_1 (nearest the data) to z_L (the top)"] if shapes else []
        if numbers:
            found.append(f"conditional and descend take layer 1 for the top; the top is layer {count}, nearest the data is 1")
        return f"{'; '.join(found)}. Reverse it, and the latents that infer returns if they run that way too."
    return ""


@contextlib.contextmanager
def _no_autocast(generator: Any) -> Generator[None]:
    devices = {torch.device("cpu"), *(p.device for _, p in _named_parameters(generator))}
    with contextlib.ExitStack() as stack:
        for device in devices:
            stack.enter_context(full_precision(device))
        yield


def _named_parameters(generator: Any) -> list[tuple[str, nn.Parameter]]:
    return list(generator.named_parameters()) if isinstance(generator, nn.Module) else []
