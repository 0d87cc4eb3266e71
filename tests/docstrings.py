"""What the docstring of a public name has to say, and a reader of Google's style that finds what one lacks.

Every parameter has an entry; every parameter, attribute and return that is a tensor says its shape in parentheses and its
unit. The dimensions and units below are all that there are: a word for another one is added here, not made up in a docstring.
"""

from __future__ import annotations

import builtins
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from energy_prior import HierarchicalGenerator, errors
from energy_prior.langevin import NoiseSource

INTERFACES: tuple[type, ...] = (HierarchicalGenerator, NoiseSource)
"""Whose methods say it for the classes that have them; these may say more."""

ARRAYS = ("X", "data", "known", "unknown", "validation", "x")
"""Parameters annotated as `Any` that are tensors, or what becomes one."""

DIMENSIONS = {
    *("batch", "n", "m", "u", "k", "l", "d", "M", "C", "L", "…"),
    *("channels", "height", "width", "features", "classes"),
    *("*x_shape", "*latent_shape", "*latent_shapes", "*shape", "*sample_shape"),
    *("T", "chains", "frames", "steps", "layers", "levels"),  # of chains and tables
}

UNITS = {
    "nats": r"\bnats\b",
    "a range": r"\[−?[\dπ./]+, [\dπ./]+[\])]",
    "whole numbers": r"\bwhole numbers?\b",
    "bool": r"\bbool\b",
    "the data's units": r"\bdata's units\b",
    "any unit": r"\bany unit\b",
    "the same unit": r"\bthe (same|score's) unit\b",
    "no unit": r"\bno unit\b",
}
WORDS = {
    "observations, in the data's range": r"\b[Oo]bservations?\b",
    "latents, in the model's units": r"\blatents\b|\bz_[1iL]",
    "noise, of N(0, 1)": r"\b[Nn]oise of N\(0, 1\)|\bε_\w",
    "features, in the network's units": r"\b[Ff]eatures\b",
}
"""Words for tensors that have the same unit everywhere."""
FIGURES = r"\blog [pq]|\bf_i\b|\bf_1\b|∇|\bscores?\b|\bshare\b|\bprobabilit"
"""Where a text is of a density, an energy or a score, these words say what it is of, not its unit."""

_SECTIONS = ("Args", "Attributes", "Examples", "Raises", "Returns", "Shape")
_OF_ENTRIES = ("Args", "Attributes", "Raises")


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A docstring.

    Attributes:
        text: what stands outside of its sections.
        sections: the entries of each by name, and under "" what is no entry.
    """

    text: str
    sections: Mapping[str, Mapping[str, str]]

    def entries(self, *sections: str) -> dict[str, str]:
        return {name: said for s in sections for name, said in self.sections.get(s, {}).items() if name}


def parse(docstring: str) -> Parsed:
    """A docstring's sections; a `ValueError` says what of them cannot be read."""
    text: list[str] = []
    sections: dict[str, dict[str, list[str]]] = {}
    section = name = ""
    for line in inspect.cleandoc(docstring).splitlines():
        if head := re.fullmatch(rf"({'|'.join(_SECTIONS)}):(.*)", line):
            section, name = head[1], ""
            if section in sections:
                raise ValueError(f"{section} is there twice")
            sections[section] = {"": [head[2]]}
        elif not section or (line and not line.startswith(" ")):
            section = ""
            text.append(line)
        elif section in _OF_ENTRIES and (entry := re.fullmatch(r" {4}(\*{0,2}\w[\w, ]*):(.*)", line)):
            name = entry[1].lstrip("*")
            if name in sections[section]:
                raise ValueError(f"{section}: {name} is there twice")
            sections[section][name] = [entry[2]]
        elif line.strip():
            if section in _OF_ENTRIES and not (name and line.startswith(" " * 8)):
                raise ValueError(f"{section}: {line.strip()!r} belongs to no entry")
            sections[section][name].append(line)
    found = {s: {n: " ".join(map(str.strip, said)).strip() for n, said in all_.items()} for s, all_ in sections.items()}
    for s, entries in found.items():
        for n, said in entries.items():
            if n and not said:
                raise ValueError(f"{s}: {n} says nothing")
    return Parsed("\n".join(text), found)


def shapes(said: str) -> list[str]:
    """What stands in parentheses as Python writes a tuple, of dimensions that are known."""
    found: list[str] = []
    for inside in re.findall(r"(?<!\w)\(([^()]*)\)", said):
        parts = [part.strip() for part in inside.split(",")]
        alone = len(parts) == 1 and not parts[0].startswith("*") and parts[0] not in ("", "…")  # (n) is no tuple
        if not alone and all(part == "" or _is_dimension(part) for part in parts):
            found.append(f"({inside})")
    return found


def _is_dimension(part: str) -> bool:
    term = re.sub(r"\[[^\]]*\]$", "", part)
    return all(t.isdigit() or t in DIMENSIONS for t in re.split(r" ?[+−·] ?", term))


def has_unit(said: str) -> bool:
    """Whether a unit is named, or what has the same one everywhere."""
    for shape in shapes(said):
        said = said.replace(shape, "")
    words = UNITS if re.search(FIGURES, said) else {**UNITS, **WORDS}
    return any(re.search(pattern, said) for pattern in words.values())


def is_tensor(annotation: Any, name: str = "") -> bool:
    """Whether an annotation, as it is written, is or has a tensor, or an array that becomes one."""
    written = str(getattr(annotation, "__forward_arg__", annotation))
    return bool(re.search(r"\b(Tensor|ndarray|NDArray|ArrayLike)\b", written)) or (written == "Any" and name in ARRAYS)


def lacks(said: str) -> list[str]:
    """What the text on a tensor has not."""
    return [what for what, found in (("shape", shapes(said)), ("unit", has_unit(said))) if not found]


def faults_of_call(call: Callable[..., Any], docstring: str | None, interface: str | None = None) -> list[str]:
    """What the docstring of a function or method lacks; parameters and shapes may be those of an interface's docstring."""
    if not docstring:
        return ["no docstring"]
    try:
        own, said = parse(docstring), parse(interface or "")
    except ValueError as error:
        return [str(error)]
    signature = inspect.signature(call)
    parameters = {n: p.annotation for n, p in signature.parameters.items() if n not in ("self", "cls")}
    faults = list(_faults_of_entries(parameters, {**said.entries("Args"), **own.entries("Args")}))
    faults += [f"{n}: there is no such parameter" for n in own.entries("Args") if n not in parameters]
    faults += _faults_of_errors(own)
    if is_tensor(signature.return_annotation):
        texts = [" ".join(p.sections["Returns"].values()) if "Returns" in p.sections else p.text for p in (own, said)]
        faults += [f"what it returns: no {what}" for what in min((lacks(text) for text in texts), key=len)]
    return faults


def faults_of_class(kind: type) -> list[str]:
    """What the docstrings of a class and of its public methods and properties lack, its own and those of its bases here."""
    if not vars(kind).get("__doc__"):
        return ["no docstring"]
    bases = [base for base in kind.__mro__ if base.__module__.partition(".")[0] == kind.__module__.partition(".")[0]]
    try:
        parsed = [parse(vars(base).get("__doc__") or "") for base in bases]
    except ValueError as error:
        return [str(error)]
    record = dataclasses.is_dataclass(kind) or hasattr(kind, "_fields") or hasattr(kind, "__total__")
    said: dict[str, str] = {}
    annotations: dict[str, Any] = {}
    for base, doc in zip(reversed(bases), reversed(parsed)):
        said |= doc.entries(*(("Args", "Attributes") if record else ("Attributes",)))
        annotations |= {n: a for n, a in vars(base).get("__annotations__", {}).items() if not n.startswith("_")}
    faults = list(_faults_of_entries({n: a for n, a in annotations.items() if record or is_tensor(a)}, said))
    if "__init__" in vars(kind) and not record and not getattr(kind, "_is_protocol", False):
        parameters = {n: p.annotation for n, p in inspect.signature(kind).parameters.items()}
        faults += _faults_of_entries(parameters, parsed[0].entries("Args"))
        faults += [f"{n}: there is no such parameter" for n in parsed[0].entries("Args") if n not in parameters]
    faults += _faults_of_errors(parsed[0])
    for name, member in _members(bases):
        call: Any = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        faults += [f"{name}: {fault}" for fault in faults_of_call(call, call.__doc__, _interface(kind, name, annotations))]
    return faults


def _faults_of_entries(annotations: Mapping[str, Any], said: Mapping[str, str]) -> Iterator[str]:
    for name, annotation in annotations.items():
        if name not in said:
            yield f"{name}: no entry"
        elif is_tensor(annotation, name):
            yield from (f"{name}: no {what}" for what in lacks(said[name]))


def _faults_of_errors(doc: Parsed) -> Iterator[str]:
    for name in (name for names in doc.entries("Raises") for name in names.split(", ")):
        if not hasattr(errors, name) and not hasattr(builtins, name):
            yield f"{name}: there is no such error"


def _members(bases: Iterable[type]) -> Iterator[tuple[str, Any]]:
    """Public methods and properties, each of the first class that has it."""
    seen: set[str] = set()
    for base in bases:
        for name, member in vars(base).items():
            call = getattr(member, "__func__", member)
            if not name.startswith("_") and name not in seen and (isinstance(member, property) or inspect.isfunction(call)):
                seen.add(name)
                yield name, member


def _interface(kind: type, name: str, annotations: Mapping[str, Any]) -> str | None:
    """The docstring that an interface has for a method of a class, if the class has all of its methods."""
    for interface in INTERFACES:
        calls = [n for n, member in vars(interface).items() if not n.startswith("_") and inspect.isfunction(member)]
        if kind is not interface and name in calls and all(hasattr(kind, n) or n in annotations for n in calls):
            return vars(interface)[name].__doc__
    return None
