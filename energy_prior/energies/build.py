"""Which energy a layer gets, and what a checkpoint says of the built-in ones."""

from __future__ import annotations

__all__ = ["build_energies", "default_energies", "denoising_energies", "describe_energies"]

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from energy_prior._util import first_line, shortened, shown
from energy_prior.checks.settings import check_layers
from energy_prior.energies.base import Energy
from energy_prior.energies.denoising import DenoisingEnergy
from energy_prior.energies.networks import ConvEnergy, FlatEnergy, MLPEnergy
from energy_prior.errors import CheckpointError

BUILT_IN: dict[str, type[MLPEnergy | ConvEnergy | DenoisingEnergy | FlatEnergy]] = {
    kind.__name__: kind for kind in (MLPEnergy, ConvEnergy, DenoisingEnergy, FlatEnergy)
}
"""The energies that a checkpoint can describe by name."""

_REMEDY = "Save the prior again, or use another copy."


def default_energies(latent_shapes: Sequence[Sequence[int]], layers: Iterable[int] | None = None) -> nn.ModuleList:
    """One energy per layer, in the order z_1, …, z_L: `MLPEnergy` for vectors, `DenoisingEnergy` where any layer is a map.

    Args:
        latent_shapes: shapes of z_1, …, z_L without the batch.
        layers: numbers of the layers, from 1 (nearest the data) to L, that have one; the others have `FlatEnergy`. None: all.

    Raises:
        ArgumentError: if `layers` are not numbers of layers.

    Examples:
        >>> [type(f).__name__ for f in default_energies([(16,), (8,)])]
        ['MLPEnergy', 'MLPEnergy']
        >>> [type(f).__name__ for f in default_energies([(2, 4, 4), (8,)])]
        ['DenoisingEnergy', 'DenoisingEnergy']
        >>> [type(f).__name__ for f in default_energies([(16,), (8,)], layers=[2])]  # LEBM: the top layer alone
        ['FlatEnergy', 'MLPEnergy']
    """
    shapes = [tuple(shape) for shape in latent_shapes]
    deep = any(len(shape) == 3 and min(shape[1:]) > 1 for shape in shapes)
    energies = denoising_energies(shapes) if deep else nn.ModuleList(MLPEnergy(shape) for shape in shapes)
    if layers is None:
        return energies
    chosen = check_layers("layers", layers, len(shapes))
    return nn.ModuleList(
        f if i in chosen else FlatEnergy(shape, reads_noise=deep)
        for i, (f, shape) in enumerate(zip(energies, shapes, strict=True), start=1)
    )


def denoising_energies(latent_shapes: Sequence[Sequence[int]], channels: int = 32) -> nn.ModuleList:
    """A `DenoisingEnergy` per layer, in the order z_1, …, z_L, each reading the noise of its layer and of those above.

    Args:
        latent_shapes: shapes of z_1, …, z_L without the batch.
        channels: width of the networks.

    Examples:
        >>> from energy_prior import JointEBMPrior, LadderVAE
        >>> vae = LadderVAE((1, 8, 8), latent_dims=(16, 8))
        >>> JointEBMPrior(vae, denoising_energies(vae.latent_shapes, channels=8))
        JointEBMPrior(LadderVAE; z_1 (16,) DenoisingEnergy, z_2 (8,) DenoisingEnergy; space="noise", step_size=0.3)
    """
    shapes = [tuple(shape) for shape in latent_shapes]
    return nn.ModuleList(DenoisingEnergy(shape, shapes[i + 1 :], channels) for i, shape in enumerate(shapes))


def describe_energies(energies: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """What a checkpoint says of each energy, enough to build the built-in ones again; others are only named.

    Args:
        energies: f_1, …, f_L.

    Examples:
        >>> from energy_prior import DenoisingEnergy
        >>> describe_energies([DenoisingEnergy((8,), channels=4), torch.nn.Linear(4, 1)])
        [{'kind': 'DenoisingEnergy', 'latent_shape': [8], 'above': [], 'channels': 4, 'saturation': 4.0},
         {'kind': 'custom', 'name': 'Linear'}]
    """
    described: list[dict[str, Any]] = []
    for energy in energies:
        energy = getattr(energy, "_orig_mod", energy)  # what torch.compile wraps
        kind = type(energy)
        if isinstance(energy, Energy) and BUILT_IN.get(kind.__name__) is kind:
            described.append({"kind": kind.__name__, "latent_shape": list(energy.latent_shape), **energy.config})
        else:
            described.append({"kind": "custom", "name": kind.__qualname__})
    return described


def build_energies(
    described: Sequence[Any], latent_shapes: Sequence[Sequence[int]], weights: Mapping[str, Sequence[int]]
) -> nn.ModuleList:
    """The built-in energies that `describe_energies` described, of any weights; torch's global stream stays as it is.

    What a description asks for is compared with the weights that there are before anything of its size is made.

    Args:
        described: a description per layer, of z_1, …, z_L.
        latent_shapes: shapes of z_1, …, z_L without the batch.
        weights: shapes of the weights to be loaded, by their names in the prior's state ("energies.0.…").

    Raises:
        CheckpointError: if one of them is not built in, or is for other layers or other weights than these.

    Examples:
        >>> from energy_prior import default_energies
        >>> from energy_prior.energies import describe_energies
        >>> energies = default_energies([(4,), (2,)])
        >>> weights = {f"energies.{name}": value.shape for name, value in energies.state_dict().items()}
        >>> built = build_energies(describe_energies(energies), [(4,), (2,)], weights)
        >>> [tuple(f.latent_shape) for f in built]
        [(4,), (2,)]
    """
    if len(described) != len(latent_shapes):
        raise CheckpointError(
            f"energies: expected descriptions of f_1, …, f_{len(latent_shapes)}, got {len(described)} of them. {_REMEDY}"
        )
    return nn.ModuleList(
        _built(entry, layer, shape, {name: size for name, size in weights.items() if name.startswith(f"energies.{layer - 1}.")})
        for layer, (entry, shape) in enumerate(zip(described, latent_shapes), start=1)
    )


def _built(entry: Any, layer: int, shape: Sequence[int], weights: Mapping[str, Sequence[int]]) -> nn.Module:
    """f of one layer."""
    if not isinstance(entry, Mapping) or entry.get("kind") not in (*BUILT_IN, "custom"):
        raise CheckpointError(
            f"energies: the description of f_{layer}, {shown(entry)}, is not one that this version can read. {_REMEDY}"
        )
    if entry["kind"] == "custom":
        raise CheckpointError(
            f"energies: f_{layer} was a module of your own, {shortened(str(entry.get('name')))}; a checkpoint holds its "
            "weights but not its code. Pass energies=[…] to load, built as they were when the prior was saved."
        )
    settings = {key: value for key, value in entry.items() if key != "kind"}
    fits = settings.get("latent_shape") == list(shape)
    lists = [value for key, value in settings.items() if key != "latent_shape" and isinstance(value, list)]
    fits = fits and all(len(value) <= len(weights) for value in lists)
    failure: Exception | None = None
    try:
        if fits:
            with torch.random.fork_rng(devices=[]):  # what is drawn here is replaced
                with torch.device("meta"):  # which has shapes, and no memory
                    state = BUILT_IN[entry["kind"]](**settings).state_dict()
                sizes = {f"energies.{layer - 1}.{name}": value.shape for name, value in state.items()}
                if sizes == {name: torch.Size(size) for name, size in weights.items()}:
                    return BUILT_IN[entry["kind"]](**settings)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        failure = error
    raise CheckpointError(
        f"energies: f_{layer} cannot be built from {shown(dict(entry))}: "
        + ("it is for another layer or for other weights" if failure is None else first_line(failure))
        + f". {_REMEDY}"
    ) from failure
