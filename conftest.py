"""The examples in docstrings that take another repository's model, or its weights, get a small stand-in for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

import energy_prior  # noqa: F401  # before pytest imports a single file of it, as a second copy


@pytest.fixture(autouse=True)
def _public_model(request: pytest.FixtureRequest, doctest_namespace: dict[str, Any], tmp_path_factory: Any) -> Iterator[None]:
    """Names for the example of an adapter: `model`, and what the adapter takes beside it; torch-fidelity for Inception's."""
    module, _, name = request.node.name.rpartition(".")  # of a doctest that is the documented name
    names: dict[str, Any] = {}
    if module.startswith("energy_prior.adapters.") and name.endswith("Adapter"):
        from example_models import EXAMPLE_MODELS

        names = EXAMPLE_MODELS[name]()
    doctest_namespace.update(names)
    with contextlib.ExitStack() as stack:
        if module == "energy_prior.evaluate.networks" and name.startswith("inception"):
            from stand_ins_inception import installed

            stack.enter_context(installed(tmp_path_factory.mktemp("hub")))
        yield
    for known in names:
        del doctest_namespace[known]
