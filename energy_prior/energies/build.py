"""Which energy a layer gets, and what a checkpoint says of the built-in ones."""

from __future__ import annotations

__all__ = ["build_energies", "default_energies", "denoising_energies", "describe_energies"]

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from energy_prior.energies.base import Energy
from energy_prior.energies.denoising import DenoisingEnergy
from energy_prior.energies.networks import ConvEnergy, MLPEnergy
from energy_prior.errors import CheckpointError

BUILT_IN: dict[str, type[MLPEnergy | ConvEnergy | DenoisingEnergy]] = {
    kind.__name__: kind for kind in (MLPEnergy, ConvEnergy, DenoisingEnergy)
}
"""The energies that a checkpoint can describe by name."""


def default_energies(latent_shapes: Sequence[Sequence[int]]) -> nn.ModuleList:
    """One energy per layer, in the order z_1, …, z_L: `MLPEnergy` for vectors, `DenoisingEnergy` where any layer is a map.

    Args:
        latent_shapes: shapes of z_1, …, z_L without the batch.
    """
    shapes = [tuple(shape) for shape in latent_shapes]
    if any(len(shape) == 3 and min(shape[1:]) > 1 for shape in shapes):
        return denoising_energies(shapes)
    return nn.ModuleList(MLPEnergy(shape) for shape in shapes)


def denoising_energies(latent_shapes: Sequence[Sequence[int]], channels: int = 32) -> nn.ModuleList:
    """A `DenoisingEnergy` per layer, in the order z_1, …, z_L, each reading the noise of its layer and of those above.

    Args:
        latent_shapes: shapes of z_1, …, z_L without the batch.
        channels: width of the networks.
    """
    shapes = [tuple(shape) for shape in latent_shapes]
    return nn.ModuleList(DenoisingEnergy(shape, shapes[i + 1 :], channels) for i, shape in enumerate(shapes))


def describe_energies(energies: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """What a checkpoint says of each energy, enough to build the built-in ones again; others are only named."""
    described: list[dict[str, Any]] = []
    for energy in energies:
        energy = getattr(energy, "_orig_mod", energy)  # what torch.compile wraps
        kind = type(energy)
        if isinstance(energy, Energy) and BUILT_IN.get(kind.__name__) is kind:
            described.append({"kind": kind.__name__, "latent_shape": list(energy.latent_shape), **energy.config})
        else:
            described.append({"kind": "custom", "name": kind.__qualname__})
    return described


def build_energies(described: Iterable[Mapping[str, Any]]) -> nn.ModuleList:
    """The built-in energies that `describe_energies` described.

    Raises:
        CheckpointError: if one of them is not built in.
    """
    built = nn.ModuleList()
    for layer, entry in enumerate(described, start=1):
        if not isinstance(entry, Mapping) or entry.get("kind") not in (*BUILT_IN, "custom"):
            raise CheckpointError(f"energies: the description of f_{layer}, {entry!r}, is not one that this version can read.")
        if entry["kind"] == "custom":
            raise CheckpointError(
                f"energies: f_{layer} was a module of your own, {entry.get('name')}; a checkpoint holds its weights but not "
                "its code. Pass energies=[…] to load, built as they were when the prior was saved."
            )
        try:
            built.append(BUILT_IN[entry["kind"]](**{key: value for key, value in entry.items() if key != "kind"}))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"energies: f_{layer} cannot be built from {dict(entry)!r}: {error}") from error
    return built
