"""What the built-in energies have in common: a bound on a network's output, and what is set from draws before learning."""

from __future__ import annotations

__all__ = ["Energy"]

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from energy_prior.checks.settings import check_positive, check_shape

_NO_SATURATION = 1e30


class Energy(nn.Module):
    """Base of the built-in energies: the output g of a network becomes g/√(1 + (g/s)²), with s = `saturation`.

    As that is below s, e^(−L·s) < Z < e^(L·s): the joint prior of L layers can always be normalised. With an energy that grows
    without limit, Z need not be finite where the scales of a layer depend on those above, and a chain may run off to a far
    region that outweighs all others. Between ±s/4 f equals g to 3 %, and f orders latents as g does, up to rounding. s is a
    buffer, 1e30 for None, and travels with checkpoints.

    Args:
        latent_shape: shape of z without the batch.
        saturation: s in nats, > 0; None: f = g.

    Attributes:
        latent_shape: shape of z without the batch.
        config: the settings that a checkpoint keeps: plain values, which JSON can hold.
        bounded: whether all of f is below s, so that its size beside s tells of trouble.
        draws: how many draws `set_from` wants, posterior and prior together.
        is_set: whether `set_from` was called, a buffer, (), bool.
        saturation: s of the whole layer, a buffer, (), nats.

    Raises:
        ArgumentError, ShapeError: if a setting is impossible; the message says which.

    Examples:
        >>> from energy_prior import MLPEnergy
        >>> f = MLPEnergy((16,), saturation=10.0)
        >>> _ = f.net[-1].bias.data.fill_(1000.0)  # g
        >>> f(torch.randn(3, 16)).detach()
        tensor([9.9995, 9.9995, 9.9995])
    """

    saturation: Tensor
    is_set: Tensor
    config: dict[str, Any]
    net: nn.Module
    latent_shape: torch.Size
    bounded: bool = True
    draws: int = 2048

    def __init__(self, latent_shape: Sequence[int], saturation: float | None = None) -> None:
        super().__init__()
        limit = None if saturation is None else check_positive("saturation", saturation)
        self.config = {"saturation": limit}
        self.register_buffer("saturation", torch.tensor(_NO_SATURATION if limit is None else limit))
        self.register_buffer("is_set", torch.zeros((), dtype=torch.bool))
        self.latent_shape = check_shape("latent_shape", latent_shape)

    def extra_repr(self) -> str:
        """The saturation; the rest shows in the layers."""
        return f"saturation={float(self.saturation):g}"

    def set_from(self, posterior: Sequence[Tensor], prior: Sequence[Tensor]) -> None:
        """Sets, once, what is not learned.

        Args:
            posterior: batches of posterior draws of z_i, or of ε_i if it reads noise, (n, *latent_shape) each.
            prior: as many of prior draws, (n, *latent_shape) each, of z_i or ε_i too.
        """
        if not bool(self.is_set):
            self._set_from(posterior, prior)
            self.is_set.fill_(True)

    @abstractmethod
    def _set_from(self, posterior: Sequence[Tensor], prior: Sequence[Tensor]) -> None: ...

    def _bounded(self, out: Tensor) -> Tensor:
        """g/√(1 + (g/s)²)."""
        g = out.to(torch.promote_types(out.dtype, torch.float32))  # the slope of the bound is a difference
        return (g / torch.hypot(torch.ones_like(g), g / self.saturation)).to(out.dtype)
