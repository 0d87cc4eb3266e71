"""Checks at the boundary, once per call: each error says the argument, what was expected, what came and what to do."""

from __future__ import annotations

__all__ = [
    "as_observations",
    "check_calls",
    "check_dtype",
    "check_energies",
    "check_given",
    "check_k",
    "check_latents",
    "check_observations",
    "check_same_place",
    "checked_infer",
    "energy_modules",
    "is_array",
    "range_fault",
]

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from energy_prior.checks.settings import whole_number
from energy_prior.conditionals import is_conditional
from energy_prior.errors import ArgumentError, DataWarning, DivergenceError, GeneratorError, ShapeError, warn
from energy_prior.protocol import HierarchicalGenerator, Inferred, layer_energy, reads_noise

_RANGE_SLACK = 0.05


def check_dtype(what: str, dtype: torch.dtype) -> None:
    """A model computes in float32 or float64; else a `GeneratorError` says why, and what to do."""
    if dtype not in (torch.float32, torch.float64):
        raise GeneratorError(
            f"generator: expected {what} in torch.float32 or torch.float64, got {dtype}. Log densities are of hundreds of nats "
            "and Langevin follows their small differences: half precision holds neither. Convert the model with "
            "model.float()."
        )


def check_calls(generator: Any) -> None:
    """All calls are there, on an object, and latent_shapes holds shapes."""
    if isinstance(generator, type):
        raise GeneratorError(f"generator: expected an object, got the class {generator.__name__}; build it first.")
    missing = [n for n in ("latent_shapes", "start", "conditional", "descend", "likelihood") if not hasattr(generator, n)]
    if missing:
        raise GeneratorError(
            f"generator: {type(generator).__name__} lacks {', '.join(missing)}; see energy_prior.HierarchicalGenerator."
        )
    if not isinstance(generator.latent_shapes, Sequence) or not all(isinstance(s, Sequence) for s in generator.latent_shapes):
        raise GeneratorError(
            f"generator.latent_shapes: expected a shape per layer, such as (torch.Size([16]), torch.Size([8])), got "
            f"{generator.latent_shapes!r}."
        )


def check_same_place(generator: Tensor, energies: Tensor) -> None:
    """The generator and the energies have one dtype, float32 or float64, and device."""
    check_dtype("latents", generator.dtype)
    if (generator.dtype, generator.device) != (energies.dtype, energies.device):
        raise ArgumentError(
            f"generator: it is {generator.dtype} on {generator.device}, but the energies are {energies.dtype} on "
            f"{energies.device}. Move both with prior.to(…), not the generator alone."
        )


def energy_modules(energies: Any) -> list[nn.Module]:
    """The user's energies as a list of modules."""
    if isinstance(energies, str | Mapping) or not isinstance(energies, Iterable):
        raise ArgumentError(
            f"energies: expected a list of modules, one per layer, got {type(energies).__name__}; space is a keyword."
        )
    modules = list(energies)
    for layer, module in enumerate(modules, start=1):
        if not isinstance(module, nn.Module):
            raise ArgumentError(f"energies: expected an nn.Module for f_{layer}, got {type(module).__name__}.")
    return modules


def check_energies(energies: Sequence[nn.Module] | nn.ModuleList, latents: Sequence[Tensor], noise: Sequence[Tensor]) -> None:
    """One energy per layer, each giving (batch,) values in the latents' dtype, of z_i or, if it reads noise, of ε_i, …, ε_L."""
    if len(energies) != len(latents):
        raise ArgumentError(f"energies: expected one module per layer, {len(latents)} (z_1 first), got {len(energies)}.")
    for layer, (energy, z) in enumerate(zip(energies, latents, strict=True), start=1):
        given = noise if reads_noise(energy) else latents
        leaves = tuple(t.detach().requires_grad_() for t in given)
        try:
            with torch.enable_grad():
                value = layer_energy(energy, layer, leaves, leaves)
        except RuntimeError as error:
            raise ShapeError(
                f"energies: f_{layer} fails on a batch of z_{layer} of shape {tuple(z.shape)}, {z.dtype} on {z.device}: {error}"
            ) from error
        if not isinstance(value, Tensor) or value.shape != (len(z),):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(
                f"energies: expected f_{layer}(z_{layer}) of shape ({len(z)},), one value per observation, got {got}. "
                "Sum or squeeze the rest inside the module."
            )
        if value.dtype != z.dtype:
            raise ArgumentError(f"energies: expected f_{layer} in the latents' {z.dtype}, got {value.dtype}.")
        ones = torch.ones_like(value)
        leaf = leaves[layer - 1]
        followed = value.requires_grad and torch.autograd.grad(value, leaf, ones, allow_unused=True)[0] is not None
        moved = tuple(t.detach() + 1 for t in given)
        if not followed and not torch.equal(value.detach(), layer_energy(energy, layer, moved, moved).detach()):
            raise ArgumentError(
                f"energies: f_{layer}(z_{layer}) has no gradient in z_{layer}, which Langevin follows. Is z detached, or is "
                "there a torch.no_grad() inside?"
            )


def check_tensor(name: str, value: Any, shape: Sequence[int], reference: Tensor, batch: int | None) -> int:
    """A finite tensor (batch, *shape) with the dtype and device of `reference`; returns its batch size."""
    wanted = f"({'batch' if batch is None else batch}, {', '.join(map(str, shape))})"
    if not isinstance(value, Tensor):
        hint = " Convert it with torch.from_numpy." if is_array(value) else ""
        raise ArgumentError(f"{name}: expected a tensor of shape {wanted}, got {type(value).__name__}.{hint}")
    if tuple(value.shape[1:]) != tuple(shape) or value.ndim == 0 or (batch is not None and len(value) != batch):
        raise ShapeError(f"{name}: expected shape {wanted}, got {tuple(value.shape)}.")
    if len(value) == 0:
        raise ShapeError(f"{name}: expected at least one observation, got an empty batch.")
    if value.dtype != reference.dtype:
        raise ArgumentError(
            f"{name}: expected {reference.dtype}, the generator's dtype, got {value.dtype}. Convert it with "
            f".to({reference.dtype})"
            + ("." if value.is_floating_point() else ", and scale it to the range that the model wants.")
        )
    if value.layout != torch.strided:
        raise ArgumentError(f"{name}: expected a dense tensor, got a {value.layout} one. Convert it with .to_dense().")
    if value.device != reference.device:
        raise ArgumentError(
            f"{name}: expected a tensor on {reference.device}, where the generator is, got one on {value.device}. Move it "
            f'with .to("{reference.device}").'
        )
    if not torch.isfinite(value).all():
        raise ArgumentError(
            f"{name}: expected finite values, got {int((~torch.isfinite(value)).sum())} that are NaN or infinite. Clean the "
            "data first; nothing is repaired silently."
        )
    return len(value)


def check_latents(name: str, latents: Any, shapes: Sequence[torch.Size], reference: Tensor, batch: int | None = None) -> None:
    """(z_1, …, z_L), z_i a finite tensor of shape (batch, *shapes[i - 1])."""
    if isinstance(latents, Tensor) or not isinstance(latents, Sequence) or len(latents) != len(shapes):
        got = f"{len(latents)} entries" if isinstance(latents, Sequence) else type(latents).__name__
        raise ShapeError(f"{name}: expected a tuple of {len(shapes)} tensors (z_1, …, z_{len(shapes)}), got {got}.")
    for layer, (z, shape) in enumerate(zip(latents, shapes, strict=True), start=1):
        batch = check_tensor(f"{name}[{layer - 1}] (z_{layer})", z, shape, reference, batch)


def check_given(given: Mapping[int, Tensor], shapes: Sequence[torch.Size], reference: Tensor, batch: int) -> dict[int, Tensor]:
    """Layer numbers 1 … L, as Python's own, with their values."""
    if not isinstance(given, Mapping):
        raise ArgumentError(f"given: expected a mapping from layer number to z, got {type(given).__name__}.")
    checked: dict[int, Tensor] = {}
    for key, z in given.items():
        layer = whole_number(key)
        if layer is None or not 1 <= layer <= len(shapes):
            raise ArgumentError(
                f"given: expected layer numbers from 1 (nearest the data) to {len(shapes)} (the top), got {key!r}."
            )
        check_tensor(f"given[{layer}]", z, shapes[layer - 1], reference, batch)
        checked[layer] = z
    return checked


def check_observations(name: str, x: Any, x_shape: Sequence[int], reference: Tensor, generator: Any = None) -> None:
    """A batch of finite observations, (batch, *x_shape), like `reference`; warns if they leave the generator's `x_range`."""
    check_tensor(name, x, x_shape, reference, None)
    what = range_fault(x, generator)
    if what is not None:
        warn(f"{name}: {what}", DataWarning)


def as_observations(name: str, value: Any, x_shape: Sequence[int], reference: Tensor, generator: Any = None) -> Tensor:
    """A batch of observations as a tensor, checked as `check_observations` does.

    An array (numpy's, or what numpy can read as one) of floating-point numbers is converted to the dtype and device of
    `reference`. A tensor is the caller's to convert: it is returned as it is, or refused.

    Args:
        name: of the argument, for messages.
        value: a tensor or an array, (batch, *x_shape).
        x_shape: shape of an observation.
        reference: a tensor with the dtype and device that observations must have.
        generator: the generator, for the range that it says observations have; None: any range.

    Returns:
        (batch, *x_shape); it may share its memory with an array.

    Raises:
        ArgumentError, ShapeError: if it is of another kind, shape, dtype or device, or not finite. Arrays of integers are
            refused: nobody but the caller knows the scale that the model was trained on.
    """
    x = _from_array(name, value, reference) if is_array(value) else value
    check_observations(name, x, x_shape, reference, generator)
    return x


def is_array(value: Any) -> bool:
    """Whether this is an array, but no tensor."""
    return hasattr(value, "__array__") and not isinstance(value, Tensor | type)


def _from_array(name: str, value: Any, reference: Tensor) -> Tensor:
    array = np.asarray(value)
    if array.dtype.kind in "iub":
        raise ArgumentError(
            f"{name}: expected floating-point numbers, got an array of {array.dtype}. Scale it to the range that the model was "
            "trained on, such as x / 255 for 8-bit images in [0, 1]."
        )
    if array.dtype.kind != "f":
        raise ArgumentError(f"{name}: expected an array of floating-point numbers, got one of {array.dtype}.")
    dtype = np.float64 if reference.dtype == torch.float64 else np.float32
    with np.errstate(over="ignore"):  # what becomes infinite is found by the check
        array = np.require(array, dtype, ["C_CONTIGUOUS", "WRITEABLE"])
    return torch.from_numpy(array).to(reference.device, reference.dtype)


def range_fault(x: Tensor, generator: Any) -> str | None:
    """What is wrong with the range of observations, if the generator has an `x_range`."""
    if getattr(generator, "x_range", None) is None:
        return None
    low, high = generator.x_range
    least, most = float(x.min()), float(x.max())
    slack = _RANGE_SLACK * (high - low)
    if least < low - slack or most > high + slack:
        return f"values from {least:.3g} to {most:.3g}, but the generator was made for {low:g} to {high:g}. Rescale them."
    if low < 0 <= least and low == -high and len(x) > 1:
        return (
            f"no value is below 0 (they go from {least:.3g} to {most:.3g}), but the generator was made for {low:g} to "
            f"{high:g}. If they are in [0, {high:g}], rescale them."
        )
    return None


def check_k(k: Any, layers: int) -> int:
    """k of L^{>k}: a whole number from 0 to L."""
    number = whole_number(k)
    if number is None or not 0 <= number <= layers:
        raise ArgumentError(
            f"k: expected a whole number from 0 to {layers}, the number of layers nearest the data to redraw, got {k!r}."
        )
    return number


def checked_infer(generator: HierarchicalGenerator, x: Tensor) -> Inferred:
    """`generator.infer(x)`, its result checked for type and shapes."""
    infer = getattr(generator, "infer", None)
    if not callable(infer):
        raise GeneratorError(f'generator: {type(generator).__name__} has no infer(x); use method="langevin".')
    inferred: Any = infer(x)
    if not isinstance(inferred, Inferred):
        raise GeneratorError(f"generator.infer: expected energy_prior.Inferred, got {type(inferred).__name__}.")
    got = [tuple(z.shape) for z in inferred.latents]
    expected = [(len(x), *shape) for shape in generator.latent_shapes]
    if got != expected:
        raise GeneratorError(f"generator.infer: expected latents (z_1 first) of shapes {expected}, got {got}.")
    if inferred.log_q.shape != (len(x), len(expected)):
        raise GeneratorError(
            f"generator.infer: expected log_q of shape (batch, L) = {(len(x), len(expected))}, got "
            f"{tuple(inferred.log_q.shape)}."
        )
    for layer, z in enumerate(inferred.latents, start=1):
        if (z.dtype, z.device) != (x.dtype, x.device):
            raise GeneratorError(
                f"generator.infer: expected z_{layer} like x, {x.dtype} on {x.device}, got {z.dtype} on {z.device}."
            )
    if inferred.conditionals is not None:
        shapes = [(*p.batch_shape, *p.event_shape) for p in inferred.conditionals]
        if shapes != expected or inferred.state is None or not all(map(is_conditional, inferred.conditionals)):
            kinds = ", ".join(sorted({type(p).__name__ for p in inferred.conditionals}))
            raise GeneratorError(
                "generator.infer: expected Inferred.conditionals, p(z_i | z_(>i)) from z_1 to z_L as `conditional` gives them, "
                f"of shapes {expected}, and the state below z_1, got {kinds} of shapes {shapes} and state of type "
                f"{type(inferred.state).__name__}. Leave both out if infer does not go down through the generator."
            )
    if not all(bool(torch.isfinite(t).all()) for t in (*inferred.latents, inferred.log_q)):
        raise DivergenceError("generator.infer: its draws, or their log q, are not finite.")
    return inferred
