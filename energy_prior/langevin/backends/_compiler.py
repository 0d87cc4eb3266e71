"""Functions through `torch.compile`: one compiled form per kind of density, with the reference where that is not possible."""

from __future__ import annotations

__all__ = ["CompileCache", "cache_for", "failed"]

import contextlib
import functools
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

from energy_prior._util import first_line
from energy_prior.errors import BackendWarning, warn
from energy_prior.langevin.density import JointDensity

_R = TypeVar("_R")

_KEPT = 64
_caches: OrderedDict[Hashable, CompileCache] = OrderedDict()
_failed: set[Hashable] = set()
_choosing, _compiling = threading.Lock(), threading.RLock()


class CompileCache:
    """What is compiled for the densities of one cache key and number of rows, each function when it is first needed.

    It is compiled without graph breaks, and used again by every further chain of that kind in this process. Where that is not
    possible (no C++ compiler, or code of the generator that cannot be compiled), a `BackendWarning` says so once, and
    from then on the reference is used, whatever the number of rows.

    Args:
        name: for people, what is compiled.
        key: what counts as failed, if one function of this cache cannot be compiled.
        options: of torch.compile.
    """

    def __init__(self, name: str, key: Hashable, options: dict[str, Any] | None) -> None:
        self._name, self._key, self._options = name, key, options
        self._compiled: dict[Hashable, Callable[..., Any]] = {}
        self._ready: set[Hashable] = set()

    def call(
        self, function: Callable[..., _R], variant: Hashable, *arguments: Any, fallback: Callable[..., _R] | None = None
    ) -> _R:
        """`function` of these arguments.

        Args:
            function: what is compiled.
            variant: what in the arguments it is compiled for anew, beside their shapes.
            arguments: of the function.
            fallback: does the same, and is called with them, without a warning, where `function` cannot be compiled.
        """
        if self._key not in _failed:
            key = function, variant
            with contextlib.nullcontext() if key in self._ready else _compiling:  # one thread compiles, others wait for it
                if self._key not in _failed:
                    try:
                        result = self._compiled_for(function, key)(*arguments)
                    except torch.OutOfMemoryError:
                        raise
                    except Exception as error:  # whatever a compiler, or code of the user's under it, raises
                        self._fail(error, quietly=fallback is not None)
                    else:
                        self._ready.add(key)
                        return result
        return (fallback or function)(*arguments)

    def _compiled_for(self, function: Callable[..., Any], key: Hashable) -> Callable[..., Any]:
        if key not in self._compiled:
            # torch.compile keeps what it compiled with the code object, a few variants each: this gets a code object of its own
            own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
            self._compiled[key] = torch.compile(own, fullgraph=True, dynamic=False, options=self._options)
        return self._compiled[key]

    def _fail(self, error: Exception, *, quietly: bool) -> None:
        _failed.add(self._key)
        internals: Any = torch._C
        internals._autograd._saved_tensors_hooks_enable()  # a compiler that stops in torch.func leaves them disabled
        if not quietly:
            warn(
                f"Langevin steps of {self._name}, cannot be compiled and run in eager mode: {type(error).__name__}: "
                f'{first_line(error)} (backend="eager" never tries)',
                BackendWarning,
            )


def cache_for(density: JointDensity, threads: int | None = None) -> CompileCache:
    """What is compiled for densities like this one; the longest unused cache is dropped where there are many.

    Args:
        density: with the layers and the number of rows.
        threads: that each loop has (`energy_prior.langevin.backends._loops`); None: what is compiled is no loop.
    """
    topdown = density.topdown
    key = density.cache_key, topdown.batch_size, threads
    with _choosing:
        if key not in _caches:
            options = _cpu_options() if topdown.reference.device.type == "cpu" else None
            if threads is not None:  # C++ around the operations, too: the interpreter would let one thread at a time through
                options = {**(options or {}), "cpp_wrapper": True, "cpp.threads": threads}
            name = f"{type(topdown.generator).__name__}, batch of {topdown.batch_size}"
            both = density.cache_key, threads is not None
            weakref.finalize(density.energies[0], _failed.discard, both)  # the key has addresses, which are used again
            _caches[key] = CompileCache(name, both, options)
            if len(_caches) > _KEPT:
                _caches.popitem(last=False)
        _caches.move_to_end(key)
        return _caches[key]


def failed(density: JointDensity, *, loops: bool) -> bool:
    """Whether something could not be compiled for densities like this one, in loops or in single calls."""
    return (density.cache_key, loops) in _failed


@functools.cache
def _cpu_options() -> dict[str, Any]:
    # the compiler's own layouts cost more than they bring: groups of channels are copied to and fro
    options: dict[str, Any] = {"layout_optimization": False}
    try:
        from energy_prior.langevin.backends._passes import BiasesApart

        more: dict[str, Any] = {**options, "post_grad_custom_post_pass": BiasesApart()}
        torch.compile(_nothing, options=more)  # looks at the options alone
    except (ImportError, RuntimeError):  # an older torch has no such passes, or not as an option
        return options
    return more


def _nothing() -> None: ...
