"""Compiled chains of deep models on a CPU: each layer's part of the pass by itself.

The time that compiling a deep model's step in one piece takes grows with its layers. Here layers that are alike share what is
compiled, forward and backward (`_sharing`); the step around them is the reference.
Energies that read noise are compiled too, as they need no pass; those of z_i are not, as they would add to the wait.
"""

from __future__ import annotations

__all__ = ["Regional"]

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils._pytree import tree_map

from energy_prior._util import not_none
from energy_prior.langevin.backends._compiler import CompileCache, cache_for
from energy_prior.langevin.density import JointDensity
from energy_prior.protocol import HierarchicalGenerator, have_waymarks, reads_noise

_R = TypeVar("_R")


class Regional(JointDensity):
    """The same density, whose gradients run what is compiled; without gradients it runs the modules themselves.

    Attributes:
        plain: the density that it was made of.
    """

    def __init__(self, density: JointDensity) -> None:
        self.plain = density
        cache = cache_for(density, "regions")
        generator: Any = _Generator(density.topdown.generator, cache)
        energies: list[Any] = [_Energy(f, cache) if reads_noise(f) else f for f in density.energies]
        super().__init__(density.topdown.run_by(generator, _first), energies, density.space, density.x)
        self.cache_key = density.cache_key


class _State(NamedTuple):
    """The generator's own state, and the conditional below it, which was computed with it."""

    own: Any
    conditional: Distribution | None = None


def _first(state: Any) -> _State:
    """The state that the pass starts from, as those below it are: of the same layout, and with a gradient."""

    def alike(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().clone().requires_grad_() if floating else value

    return _State(tree_map(alike, state))


class _Generator:
    """A generator whose `descend` computes the next conditional too: the two are one region."""

    def __init__(self, generator: HierarchicalGenerator, cache: CompileCache) -> None:
        self._own, self._cache = generator, cache
        self.latent_shapes = generator.latent_shapes

    def conditional(self, state: _State, layer: int) -> Distribution:
        return not_none(state.conditional)

    def descend(self, state: _State, z: Tensor, layer: int) -> _State:
        return _State(*_run(self._cache, _down, layer, self._own, layer, state.own, z))

    def likelihood(self, state: _State) -> _Likelihood:
        return _Likelihood(self._own, self._cache, state)


class _Likelihood(NamedTuple):
    """p_β0(x | z), as a density needs it."""

    generator: HierarchicalGenerator
    cache: CompileCache
    state: _State

    def log_prob(self, x: Tensor) -> Tensor:
        return _run(self.cache, _observed, None, self.generator, self.state.own, x)


class _Energy:
    """An energy that reads noise; of a waymark it is not compiled, as few chains need one."""

    reads_noise = True

    def __init__(self, energy: nn.Module, cache: CompileCache) -> None:
        self._own, self._cache = energy, cache
        self.has_waymarks = have_waymarks([energy])

    def __call__(self, *arguments: Any) -> Tensor:
        if len(arguments) > 1:
            return self._own(*arguments)
        return _run(self._cache, _energy, id(self._own), self._own, *arguments)


def _run(cache: CompileCache, function: Callable[..., _R], variant: Any, *arguments: Any) -> _R:
    if not torch.is_grad_enabled():
        return function(*arguments)
    autocast = torch.is_autocast_enabled("cpu")  # an older torch would take what was compiled with it for what was not
    return cache.call(function, (variant, autocast), *arguments)


# ----------------------------------------------------------------------------------------------------------- to be compiled


def _down(generator: HierarchicalGenerator, layer: int, state: Any, z: Tensor) -> tuple[Any, Distribution | None]:
    state = generator.descend(state, z, layer)
    return state, generator.conditional(state, layer - 1) if layer > 1 else None


def _observed(generator: HierarchicalGenerator, state: Any, x: Tensor) -> Tensor:
    return generator.likelihood(state).log_prob(x)


def _energy(energy: nn.Module, value: Any) -> Tensor:
    return energy(value)
