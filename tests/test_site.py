"""The documentation site, without building it: navigation, links and anchors, the API reference, the gallery, the hooks."""

from __future__ import annotations

import collections
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import markdown
import pytest
import yaml

import energy_prior

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FILES = [*sorted(ROOT.glob("*.md")), *PAGES]


class Loader(yaml.SafeLoader):
    """What mkdocs reads: it has tags of Python objects too."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_navigation(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [page for inner in (entry.values() if isinstance(entry, dict) else entry) for page in in_navigation(inner)]


def test_every_page_is_in_the_navigation_once(hooks: ModuleType) -> None:
    found = in_navigation(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"])  # noqa: S506
    assert sorted(found) == sorted([*(p.relative_to(DOCS).as_posix() for p in PAGES), *hooks.TOP_LEVEL])


# ---------------------------------------------------------------------------------------------------------------- links


def without_code(text: str) -> str:
    text = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]+`", "code", text)


def anchors(file: Path) -> set[str]:
    """Of its headings, as GitHub names them, and of the names of the API that it has."""
    text = re.sub(r"^( *)```.*?^\1```$", "", file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    names = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    seen: collections.Counter[str] = collections.Counter()
    found = set(names)
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


@pytest.mark.parametrize("file", FILES, ids=[str(f.relative_to(ROOT)) for f in FILES])
def test_links_and_anchors(file: Path) -> None:
    """Every relative link leads to a file, and where it names an anchor to one."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(file.read_text(encoding="utf-8"))):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        there = (file.parent / path).resolve() if path else file
        if not there.is_file() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            broken.append(target)
    assert not broken


def test_what_a_broken_link_is(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Which `rule`?\n\n## 1. The model, as it is\n\n## Again\n\n## Again\n\n```sh\n# no heading\n```\n\n::: a.B\n"
    )
    assert anchors(page) == {"which-rule", "1-the-model-as-it-is", "again", "again-1", "a.B"}


# ------------------------------------------------------------------------------------------------------------------ API


INSIDE = [m.name for m in pkgutil.iter_modules(energy_prior.__path__) if m.ispkg or m.name in ("detectors", "plots")]
AREAS = [energy_prior, *(importlib.import_module(f"energy_prior.{name}") for name in INSIDE)]
"""The package, its subpackages, and the two modules that are imported by name."""


def public_names() -> set[str]:
    """What is listed in `__all__` there."""
    return {f"{area.__name__}.{name}" for area in AREAS for name in getattr(area, "__all__", ())}


def what(name: str) -> Any:
    """The object of a name; constants, which several names may share, by the name itself."""
    module, _, last = name.rpartition(".")
    value = getattr(importlib.import_module(module), last)
    return value if inspect.isclass(value) or inspect.isfunction(value) else name


def test_every_public_name_is_in_the_reference_once(hooks: ModuleType) -> None:
    texts = [page.read_text(encoding="utf-8") for page in sorted((DOCS / "api").glob("*.md"))]
    listed = [name for text in texts for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)]
    assert set(hooks.api_names()) == set(listed)
    modules = [name for name in listed if importlib.util.find_spec(name.rpartition(".")[0]) and is_module(name)]
    assert not modules, "these name modules, whose members would all be there again"
    times = collections.Counter(map(what, listed))
    assert not [thing for thing, n in times.items() if n > 1]
    assert not [name for name in sorted(public_names()) if what(name) not in times]
    assert len(public_names()) > 100


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


def test_what_is_in_the_reference_has_a_docstring(hooks: ModuleType) -> None:
    """Constants too, below their assignment, from where the site takes them."""
    missing = []
    for name in hooks.api_names():
        thing = what(name)
        if thing is name:
            source = "".join(p.read_text(encoding="utf-8") for p in Path(energy_prior.__file__).parent.rglob("*.py"))
            last = name.rpartition(".")[2]
            missing += [] if re.search(rf'^{last}\b[^\n]* = [^\n]*\n"""', source, re.MULTILINE) else [name]
        elif not vars(thing).get("__doc__") and not thing.__doc__:
            missing.append(name)
    assert not missing


# -------------------------------------------------------------------------------------------------------------- results


def test_the_gallery_shows_every_result() -> None:
    """Every table and picture, and the files of figures that have no table; their commands stand before them."""
    text = (DOCS / "gallery.md").read_text(encoding="utf-8")
    tables = {f"results/{p.name}" for p in (DOCS / "results").glob("*.md")}
    assert set(re.findall(r"^\[[^\]]+\]\((results/\w+\.md)\)$", text, re.MULTILINE)) == tables
    pictures = {f"results/{p.name}" for p in (DOCS / "results").glob("*.png")}
    assert set(re.findall(r"^!\[[^\]]+\]\((results/\w+\.png)\)$", text, re.MULTILINE)) == pictures
    for file in sorted((DOCS / "results").glob("*.json")):
        link = f"(results/{file.stem}.md)" if file.with_suffix(".md").exists() else f"(results/{file.name})"
        assert link in text, f"{file.name} is not in the gallery"
        script = re.match(r"python (\S+)", json.loads(file.read_text())["command"])
        assert script, file.name
        assert f"`python {script[1]}" in text.partition(link)[0], f"the command of {file.name} is not in the gallery"


# ---------------------------------------------------------------------------------------------------------------- hooks


def test_code_becomes_links(hooks: ModuleType) -> None:
    names = ["energy_prior.fit_elbo", "energy_prior.ChainSettings", "energy_prior.evaluate.detection.detection"]

    def target(code: str, page: str = "training.md") -> str:
        """Where `code` leads; nothing if it stays as it is."""
        html = hooks.linked(f"<p>see <code>{code}</code></p>", page, names)
        found = re.fullmatch(
            rf'<p>see (?:<(a|autoref).*?"(.*?)"><code>{re.escape(code)}</code></\1>|<code>.*</code>)</p>', html
        )
        assert found is not None
        return found[2] or ""

    assert target("fit_elbo") == target("fit_elbo(vae, images)") == target("energy_prior.fit_elbo") == "energy_prior.fit_elbo"
    assert target("energy_prior.langevin.ChainSettings") == target("ChainSettings") == "energy_prior.ChainSettings"
    assert target("prior.sample(4)") == "energy_prior.JointEBMPrior.sample"
    assert target("detection(known, unknown)") == "energy_prior.evaluate.detection.detection"
    assert not target("detection")
    assert not target("fit_elbo(x) + 1")
    assert target("docs/threads.md", "api/prior.md") == "../threads.html"
    assert not target("docs/nowhere.md")
    for apart in (
        "<pre><code>fit_elbo</code></pre>",
        '<a href="x"><code>fit_elbo</code></a>',
        "<h2><code>fit_elbo</code></h2>",
    ):
        assert hooks.linked(apart, "training.md", names) == apart


def test_tables_of_the_gallery(hooks: ModuleType) -> None:
    shown = hooks.with_tables("Text.\n\n[Title](results/anomaly_mnist.md)\n\nMore, [not alone](results/data.md).\n")
    assert shown.startswith('Text.\n\n[Title](results/anomaly_mnist.md)\n\n??? info "Anomaly detection on MNIST')
    assert "\n    **development" in shown
    assert "\n    | digit |" in shown
    assert shown.endswith("\n\nMore, [not alone](results/data.md).\n")


def test_formulas_stay_as_they_are(hooks: ModuleType) -> None:
    text = "∇_z [f] at z_i, ∏_{i<L} p(z_i | z_{>i}), (n, *x_shape) and (m, *y_shape)"
    html = markdown.markdown(f"{text}, an *important* **word**, `code`", extensions=[hooks.PlainFormulas()])
    escaped = text.replace("<", "&lt;").replace(">", "&gt;")
    assert html == f"<p>{escaped}, an <em>important</em> <strong>word</strong>, <code>code</code></p>"


def test_the_citation_is_of_this_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == energy_prior.__version__


def test_pages_of_the_top_level(hooks: ModuleType) -> None:
    text = "See [training](docs/training.md#data), [changes](CHANGELOG.md)."
    assert hooks.top_level_page(text) == "See [training](training.md#data), [changes](changelog.md)."
    assert all((ROOT / file).is_file() for file in hooks.TOP_LEVEL.values())
