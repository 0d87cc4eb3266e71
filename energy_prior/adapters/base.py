"""The base class of the adapters: the wrapped model, checked once."""

from __future__ import annotations

__all__ = ["Adapter", "without_compile"]

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from energy_prior.errors import GeneratorError

_Model = TypeVar("_Model", bound=nn.Module)


class Adapter(nn.Module):
    """A user's model behind the generator protocol.

    Args:
        model: the model object. Of a model that torch.compile has wrapped, the original is taken, as the adapter calls its
            parts one by one.
        parts: attributes that it must have.
        source: where such models come from, for errors.

    Attributes:
        model: the user's model.
        latent_shapes: shapes of z_1 (nearest the data), …, z_L.
        x_shape: shape of an observation.
        x_range: lowest and highest value of an observation; None: it may have any.

    Raises:
        GeneratorError: if a part is missing, the model is in training mode, or its weights have several dtypes or devices.
    """

    model: Any
    latent_shapes: tuple[torch.Size, ...]
    x_shape: torch.Size
    x_range: tuple[float, float] | None = (0.0, 1.0)
    autocast = True

    def __init__(self, model: nn.Module, parts: Sequence[str], source: str) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise GeneratorError(f"model: expected {source}, an nn.Module, got {type(model).__name__}.")
        model = without_compile(model)
        missing = [part for part in parts if not hasattr(model, part)]
        if missing:
            wrapped = isinstance(getattr(model, "module", None), nn.Module)  # DataParallel, DistributedDataParallel
            raise GeneratorError(
                f"model: expected {source}, but {type(model).__name__} lacks {', '.join(missing)}. "
                + (
                    "It is a wrapper: pass the model inside, model.module."
                    if wrapped
                    else "For a model of another kind write the methods of energy_prior.HierarchicalGenerator."
                )
            )
        if model.training:
            raise GeneratorError(
                "model: it is in training mode, where batch norm couples the observations of a batch. Call model.eval() first."
            )
        kinds = {(p.dtype, p.device) for p in model.parameters() if p.is_floating_point()}
        if len(kinds) > 1:
            raise GeneratorError(
                f"model: expected weights of one dtype on one device, got {', '.join(sorted(f'{t} on {d}' for t, d in kinds))}."
                " Convert it with model.float() and model.to(device)."
            )
        self.model = model

    def _cast(self, value: Tensor) -> Tensor:
        """The same values in the dtype of the weights: autocast may have made parameters of a distribution bf16."""
        return value.to(next(self.model.parameters()).dtype)

    def _index(self, layer: int) -> int:
        """Index of a layer in a list of the model that runs from z_L to z_1."""
        return len(self.latent_shapes) - layer


def without_compile(model: _Model) -> _Model:
    """The model inside the wrapper of torch.compile; any other as it is."""
    return cast(_Model, getattr(model, "_orig_mod", model))
