"""Checks of p_β(z_i | z_{>i}): its kind, shape and tensors, and that noise becomes z and z the same noise."""

from __future__ import annotations

__all__ = ["check_conditional"]

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, TransformedDistribution

from energy_prior.conditionals import is_conditional, tensors_of, to_latent, to_noise
from energy_prior.errors import GeneratorError

_EXPECTED = (
    "a distribution of torch's that has a smooth map from N(0, I) (Normal, MultivariateNormal, Laplace, Uniform, "
    "energy_prior.Logistic, Independent or TransformedDistribution of these) or a Distribution with the methods from_noise "
    "and to_noise"
)


def check_conditional(conditional: Any, layer: int, shape: torch.Size, batch: int) -> None:
    """A conditional of shape (batch, *shape), its tensors finite, z = T(ε) sound; else a `GeneratorError` says what it is."""
    if not is_conditional(conditional):
        raise GeneratorError(f"generator.conditional: for layer {layer} expected {_EXPECTED}, got {_refused(conditional)}")
    got = (*conditional.batch_shape, *conditional.event_shape)
    if got != (batch, *shape):
        raise GeneratorError(
            f"generator.conditional: layer {layer} (1 is nearest the data) has shape {got}, but "
            f"latent_shapes[{layer - 1}] and a batch of {batch} say {(batch, *shape)}. latent_shapes runs from z_1 to z_L; "
            "start() must give the state of z_L, the top."
        )
    what = "loc or scale" if isinstance(conditional, Normal) else f"a parameter of the {type(conditional).__name__}"
    if not all(bool(torch.isfinite(t).all()) for t in tensors_of(conditional)):
        raise GeneratorError(f"generator.conditional: {what} of layer {layer} is not finite for a draw of the prior.")
    base: Any = conditional
    while isinstance(base, Independent | TransformedDistribution):
        base = base.base_dist
    scale = getattr(base, "scale", None)
    if isinstance(scale, Tensor) and not (scale > 0).all():
        raise GeneratorError(f"generator.conditional: scale of layer {layer} must be above 0, got {float(scale.min()):.3g}.")
    if type(conditional) is not Normal:
        _check_map(conditional, layer, (batch, *shape))


def _check_map(conditional: Distribution, layer: int, shape: tuple[int, ...]) -> None:
    """T is finite, keeps the shape, and has the inverse that it is said to have."""
    like = tensors_of(conditional)
    if not like:
        raise GeneratorError(
            f"generator.conditional: the {type(conditional).__name__} of layer {layer} holds no tensor in its attributes, so "
            "that its dtype and device are not known. Keep its parameters there."
        )
    for value in (-1.0, 0.5):
        noise = like[0].new_full(shape, value)
        z = to_latent(conditional, noise)
        back = to_noise(conditional, z) if z.shape == noise.shape else noise
        if z.shape != noise.shape or not bool(torch.isfinite(z).all()) or not torch.allclose(back, noise, atol=1e-2):
            raise GeneratorError(
                f"generator.conditional: the {type(conditional).__name__} of layer {layer} takes noise of {value} and shape "
                f"{shape} to z of shape {tuple(z.shape)} and back to {_range(back)}. Noise of z's own shape must become a "
                "finite z, and that z the same noise. Are its parameters in order, do its transforms keep the shape, and is z "
                "not rounded to an end of its range?"
            )


def _range(values: Tensor) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:.4g}" if low == high else f"{low:.4g} … {high:.4g}"


def _refused(conditional: Any) -> str:
    name = type(conditional).__name__
    if isinstance(conditional, Independent | TransformedDistribution) and not is_conditional(conditional.base_dist):
        return f"{name} of a {_refused(conditional.base_dist)}"
    if not isinstance(conditional, Distribution):
        return f"{name}."
    with contextlib.suppress(NotImplementedError):  # how torch.distributions says that there is no support
        support = conditional.support
        if support is not None and support.is_discrete:
            return f"{name}, which is discrete: no smooth map makes it of Gaussian noise, and Langevin cannot move its codes."
    return f"{name}. Give it from_noise(ε) and to_noise(z), methods that take N(0, I) to it and back."
