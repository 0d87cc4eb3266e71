"""The examples in docstrings that take another repository's model get a small stand-in for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import energy_prior  # noqa: F401  # before pytest imports a single file of it, as a second copy


@pytest.fixture(autouse=True)
def _public_model(request: pytest.FixtureRequest, doctest_namespace: dict[str, Any]) -> Iterator[None]:
    """Names for the example of an adapter: `model`, and what the adapter takes beside it."""
    module, _, name = request.node.name.rpartition(".")  # of a doctest that is the documented name
    names: dict[str, Any] = {}
    if module.startswith("energy_prior.adapters.") and name.endswith("Adapter"):
        from example_models import EXAMPLE_MODELS

        names = EXAMPLE_MODELS[name]()
    doctest_namespace.update(names)
    yield
    for known in names:
        del doctest_namespace[known]
