"""Functions through `torch.compile`: one compiled form per kind of density, with the reference where that is not possible."""

from __future__ import annotations

__all__ = ["CompileCache", "Kind", "cache_for", "failed"]

import contextlib
import functools
import re
import threading
import types
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from energy_prior._util import first_line
from energy_prior.errors import BackendWarning, warn
from energy_prior.langevin.backends._sharing import Sharing
from energy_prior.langevin.density import JointDensity

_R = TypeVar("_R")

Kind = Literal["loop", "call", "regions"]
"""What is compiled: loops of steps (`_loops`), functions as they are, or parts of the density (`_regions`)."""

_internals: Any = torch._C  # pyright: ignore[reportPrivateUsage]
_KEPT = 64
_caches: OrderedDict[Hashable, CompileCache] = OrderedDict()
_failed: set[Hashable] = set()
_choosing, _compiling = threading.Lock(), threading.RLock()
_ADVICE = (
    (
        r"data-dependent|guard on|Tensor\.item|unbacked",
        "A step cannot ask for a tensor's values: choose with torch.where, not `if`.",
    ),
    (r"numpy", "Compute with torch there, not NumPy."),
    (r"checkpoint", "Checkpoint only where torch.compiler.is_dynamo_compiling() is False."),
    (r"\bprint\b|logging", "Print only where torch.compiler.is_dynamo_compiling() is False."),
)
"""What the compiler stops at, and what to write instead; else its own first hint is taken."""


class CompileCache:
    """What is compiled for the densities of one cache key and number of rows, each function when it is first needed.

    It is compiled without graph breaks, and used again by every further chain of that kind in this process. Where that is not
    possible (no C++ compiler, or code of the generator that cannot be compiled), a `BackendWarning` says so once, and
    from then on the reference is used, whatever the number of rows.

    Args:
        name: for people, what is compiled.
        key: what counts as failed, if one function of this cache cannot be compiled.
        how: options or the backend of torch.compile.
    """

    def __init__(self, name: str, key: Hashable, **how: Any) -> None:
        self._name, self._key, self._how = name, key, how
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
            with contextlib.nullcontext() if key in self._ready else _alone():
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
            self._compiled[key] = torch.compile(own, fullgraph=True, dynamic=False, **self._how)
        return self._compiled[key]

    def _fail(self, error: Exception, *, quietly: bool) -> None:
        _failed.add(self._key)
        _internals._autograd._saved_tensors_hooks_enable()  # checkpoints need them; an error in torch.func leaves them off
        if not quietly:
            warn(
                f"Langevin steps of {self._name}, cannot be compiled and run in eager mode: {type(error).__name__}: "
                f'{first_line(error)}{_place(error)} (backend="eager" never tries)',
                BackendWarning,
            )


def cache_for(density: JointDensity, kind: Kind = "call", threads: int | None = None) -> CompileCache:
    """What is compiled for densities like this one; the longest unused cache is dropped where there are many.

    Args:
        density: with the layers and the number of rows.
        kind: of what is compiled.
        threads: that each loop has.
    """
    topdown = density.topdown
    key = density.cache_key, topdown.batch_size, kind, threads
    with _choosing:
        if key not in _caches:
            options = _cpu_options() if topdown.reference.device.type == "cpu" else {}
            if kind == "loop":  # C++ around the operations, too: the interpreter would let one thread at a time through
                options = {**options, "cpp_wrapper": True, "cpp.threads": threads}
            how: dict[str, Any] = {"options": options or None}
            if kind == "regions":
                own_layouts = {"layout_optimization": True, "force_layout_optimization": True}
                how = {"backend": Sharing({**options, **_one_file(), **own_layouts})}
            name = f"{type(topdown.generator).__name__}, batch of {topdown.batch_size}"
            both = density.cache_key, kind
            weakref.finalize(density.energies[0], _failed.discard, both)  # the key has addresses, which are used again
            _caches[key] = CompileCache(name, both, **how)
            if len(_caches) > _KEPT:
                _caches.popitem(last=False)
        _caches.move_to_end(key)
        return _caches[key]


def failed(density: JointDensity, kind: Kind) -> bool:
    """Whether something of this kind could not be compiled for densities like this one."""
    return (density.cache_key, kind) in _failed


def _place(error: Exception) -> str:
    """Where the compiler stopped in the user's code, and what to write there, as far as its error says."""
    text = str(error)
    frames = re.findall(r'File "(.+)", line (\d+), in (\w+)\n\s*(.*)', text.partition("from user code")[2])
    ours, theirs = Path(__file__).parents[2], Path(torch.__file__).parent
    outside = [frame for frame in frames if not {ours, theirs}.intersection(Path(frame[0]).parents)]
    said = ""
    if frames:
        file, line, function, code = (outside or frames)[-1]
        said = f" It stopped at {file}:{line}, in {function}: `{code.strip()}`."
    advice = next((words for pattern, words in _ADVICE if re.search(pattern, text, re.IGNORECASE)), None)
    hint = re.search(r"Hint: (.+)", text)
    return said + (f" {advice}" if advice else f" {hint[1]}" if hint else "")


@contextlib.contextmanager
def _alone() -> Generator[None]:
    """One thread compiles, others wait for it; with what is compiled forward goes what is compiled backward.

    The compiler looks at `.grad` of what it is given, of which torch warns.
    """
    from torch._functorch import config  # not before it is needed

    there = hasattr(config, "force_non_lazy_backward_lowering")
    at_once: Any = config.patch(force_non_lazy_backward_lowering=True) if there else contextlib.nullcontext()
    with _compiling, at_once, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
        yield


@functools.cache
def _cpu_options() -> dict[str, Any]:
    # in loops of small nets the compiler's own layouts cost more than they bring: groups of channels are copied to and fro
    options: dict[str, Any] = {"layout_optimization": False}
    try:
        from energy_prior.langevin.backends._passes import BiasesApart

        more: dict[str, Any] = {**options, "post_grad_custom_post_pass": BiasesApart()}
        torch.compile(_nothing, options=more)  # looks at the options alone
    except (ImportError, RuntimeError):  # an older torch has no such passes, or not as an option
        return options
    return more


@functools.cache
def _one_file() -> dict[str, Any]:
    """Options that put all loops of a graph into one C++ file: each file reads torch's headers."""
    options: dict[str, Any] = {
        "cpp_wrapper": True,
        "cpp_wrapper_build_separate": True,
        "aot_inductor.compile_wrapper_opt_level": "O0",  # what calls the loops; it has next to nothing to do
    }
    try:
        torch.compile(_nothing, options=options)  # looks at the options alone
    except (ImportError, RuntimeError):  # an older torch does not know them
        return {}
    return options


def _nothing() -> None: ...
