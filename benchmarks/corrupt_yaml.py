"""Hostile recipes: tags that ask for code, values of every kind, aliases that multiply, much of everything."""

from __future__ import annotations

__all__ = ["YAML"]

import random
from pathlib import Path

from corruptions import DEEP, Corruption, deep

_KEYS = (
    *("x", "1", "null", "true", "2024-01-01", "[1]", "? [a]\n", "<<", "''", "generator", "elbo", "fit", "data", "seed", "out"),
    *("device", "hidden", "depth", "latent_dims", "levels", "x_range", "sigma", "likelihood", "nets", "factory", "iterations"),
    *("self", "x_shape", "method", "batch_size", "learning_rate", "progress", "source", "validation"),
)
_NUMBERS = (
    *("-1", "0", "1", "2", "3", "1.5", "1e-3", "1_000", "0o17", "017", "1000000000", "10000000000", "99999999999999999999"),
    *(".nan", ".inf", "-.inf", "1e999", "1e400", "-1e400", "0x" + "f" * 5000, "9" * 5000, "9" * 4000, "0b" + "1" * 20_000),
    *("1" + ":1" * 3000, "1" + ":1" * 30, "1" + ":1" * 30 + ".5"),
)
_LISTS = (
    *("[]", "{}", "[[]]", "[1]", "[3, 2]", "[a]", "[null]", "[0, 1]", "[0, .nan]", "[1, 0]", "[1000000000000]"),
    *("[100000000, 100000000]", "{<<: 3}", "{<<: [1]}", "{<<: {a: 1}}", "{? [1] : 2}", "{? {a: 1} : 2}", "{1: 2}", "{null: 2}"),
    *("{true: 2}", "{2024-01-01: 2}", "{1.5: 2}", "{[1]: 2}", "&a [*a]", "&a {b: *a}", "*nowhere"),
    *("[" + "1, " * 20_000 + "]", "{" + ", ".join(f"a{i}: 1" for i in range(3000)) + "}"),
    *("[" * 3000, deep("[", "]", 3000), deep("{a: ", "}", 3000), "- " * 3000, "? " * 3000),
)
_TEXTS = (
    *(
        "true",
        "no",
        "~",
        "''",
        '"\\0"',
        '"\\ud800"',
        '"\\x"',
        "x" * 50_000,
        "'~nobody/x'",
        "denoising",
        "nce",
        "gan",
        "mlp",
        "conv",
    ),
    *("cuda", "cuda:0", "cuda:99999999999999999999", "meta", "mps", "xla", "cpu", "cpu:-1", "cpu:9", "vulkan", "lazy", "a:b"),
    *("os:mkdir", "%", "@", "`", "|", ">", "'", '"', "!", "!!", "!x 3", "&", "*", "# x", "{", "}", "]", "\t", "\x00", "\x85"),
    *("\ufeff", "\U0001f600", "gaussian", "bernoulli", "mixture", "last", "skip"),
)


def _tags(bait: Path) -> tuple[str, ...]:
    return (
        f"!!python/object/apply:os.mkdir ['{bait}']",
        f"!!python/object/new:os.mkdir ['{bait}']",
        f'!!python/object/apply:builtins.eval [\'__import__("os").mkdir("{bait}")\']',
        *(
            "!!python/name:os.mkdir",
            "!!python/module:antigravity",
            "!!python/tuple [1, 2]",
            "!!int abc",
            "!!int ''",
            "!!float abc",
        ),
        *(
            "!!float ''",
            "!!bool abc",
            "!!timestamp abc",
            "!!null abc",
            "!!binary '='",
            "!!binary abc",
            "!!set {a, b}",
            "!!str 3",
        ),
        *(
            "!!omap [a: 1]",
            "!!omap [1]",
            "!!pairs [a: 1]",
            "!!map [1]",
            "!!seq {a: 1}",
            "2024-99-99",
            "2024-02-30",
            "2024-01-01",
        ),
        "2001-12-14t21:59:43.10-05:00",
    )


def _value(chance: random.Random, bait: Path) -> str:
    return chance.choice(chance.choice((_NUMBERS, _NUMBERS, _LISTS, _TEXTS, _TEXTS, _tags(bait))))


def _changed_value(chance: random.Random, data: bytes, bait: Path) -> bytes:
    """Other values after one or two of the colons."""
    text = data.decode()
    for _ in range(chance.choice((1, 1, 2))):
        at = chance.choice([i for i, letter in enumerate(text) if letter == ":"])
        end = min((i for i in (text.find(mark, at) for mark in ",}\n") if i > 0), default=len(text))
        text = text[: at + 1] + " " + _value(chance, bait) + text[end:]
    return text.encode("utf-8", "surrogatepass")


def _new_entry(chance: random.Random, data: bytes, bait: Path) -> bytes:
    """One more entry, in a section or at the top."""
    text, entry = data.decode(), f"{chance.choice(_KEYS)}: {_value(chance, bait)}"
    sections = [i + 1 for i, letter in enumerate(text) if letter == "{"]
    if chance.random() < 0.6 and sections:
        at = chance.choice(sections)
        return (text[:at] + entry + ", " + text[at:]).encode("utf-8", "surrogatepass")
    return (text + entry + "\n").encode("utf-8", "surrogatepass")


def _much(chance: random.Random, data: bytes, bait: Path) -> bytes:
    """Aliases and merges that multiply, what holds itself, several documents, other encodings."""
    text, levels = data.decode(), chance.choice((8, 25, 200))
    section = chance.choice(("data", "generator", "elbo", "fit", "out", "seed", "device"))
    laughs = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]\n" for i in range(levels))
    merges = "".join(f"m{i}: &m{i} {{{f'<<: [*m{i - 1}, *m{i - 1}]' if i else 'k: v'}}}\n" for i in range(levels))
    multiplied = (laughs + text, merges + text, f"{laughs}{section}: *a{levels - 1}\n", f"{merges}{section}: *m{levels - 1}\n")
    within = (f"{section}: &r [*r, *r]\n", f"&r {{{section}: *r}}\n", f"{section}: {{a: &r [[*r]]}}\n")
    documents = (
        *(text + "---\n" + text, "%YAML 9.9\n---\n" + text, "%TAG ! tag:x,2000:\n---\n" + text, "...\n" + text, text + text),
        *("--- !!python/object:os.x\n" + text, "- " + text.replace("\n", "\n  ")),
    )
    large = (
        *("[" * DEEP, "{" * DEEP, "a: " * DEEP, "- " * DEEP, "? " * DEEP, "&a " * DEEP, "[" + "{}, " * 300_000 + "]"),
        *("# " + "x" * 2_000_000 + "\n" + text, text + "\n" * 1_000_000, text + "#" + "x" * 100_000, "x" * 1_000_000),
        *("x: [" + "[], " * 30_000 + "]", f"{section}: " + "x" * 1_000_000, f"{section}: {{{'a' * 2000}: 1}}"),
        *(f"{section}: " + "x" * 100_000, "!!binary " + "AAAA" * 10_000, "[" + "1," * 60_000 + "]"),
    )
    if chance.random() < 0.2:
        mark = chance.choice((b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"))
        return mark + chance.choice((text, "out: x\n", "")).encode(
            chance.choice(("utf-8", "utf-16-le", "utf-16-be", "utf-32", "latin-1"))
        )
    return chance.choice(chance.choice((multiplied, within, documents, large))).encode()


YAML: dict[str, Corruption] = {"value": _changed_value, "entry": _new_entry, "much of something": _much}
