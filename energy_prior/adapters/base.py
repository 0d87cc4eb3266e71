"""What the adapters share: the wrapped model, looked at once."""

from __future__ import annotations

__all__ = ["Adapter"]

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from energy_prior.errors import GeneratorError


class Adapter(nn.Module):
    """A user's model behind the generator protocol.

    Args:
        model: the model object.
        parts: attributes that it must have.
        source: where such models come from, for errors.

    Attributes:
        model: the user's model.
        latent_shapes: shapes of z_1 (nearest the data), …, z_L.
        x_shape: shape of an observation.
        x_range: lowest and highest value of an observation.

    Raises:
        GeneratorError: if a part is missing, the model is in training mode, or its weights have several dtypes or devices.
    """

    model: Any
    latent_shapes: tuple[torch.Size, ...]
    x_shape: torch.Size
    x_range: tuple[float, float] = (0.0, 1.0)
    autocast = True

    def __init__(self, model: nn.Module, parts: Sequence[str], source: str) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise GeneratorError(f"model: expected {source}, an nn.Module, got {type(model).__name__}.")
        missing = [part for part in parts if not hasattr(model, part)]
        if missing:
            raise GeneratorError(
                f"model: expected {source}, but {type(model).__name__} lacks {', '.join(missing)}. For a model of another kind "
                "write the four methods of energy_prior.HierarchicalGenerator."
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

    def _exact(self, parameters: Tensor) -> Tensor:
        """Parameters of a distribution in the dtype of the weights: autocast may have made them bf16."""
        return parameters.to(next(self.model.parameters()).dtype)
