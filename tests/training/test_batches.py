"""Batches of a tensor, an array or a loader: every observation once a pass, shared out, and gone on with."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import X, make, seeded, weights
from torch import Tensor

from energy_prior import ArgumentError, ShapeError
from energy_prior.training import Method, RunConfig
from energy_prior.training.batches import Batches


def batches_of(data: Tensor, batch_size: int | None = None, **keywords: Any) -> Batches:
    return Batches(data, RunConfig(batch_size=batch_size), None, data.shape[1:], data, **keywords)


def test_batches_visit_everything_once_per_pass() -> None:
    data = torch.arange(10.0)[:, None]
    stream = batches_of(data, 5)
    for _ in range(3):
        seen = torch.cat([next(stream), next(stream)]).flatten()
        assert sorted(seen.tolist()) == list(range(10))
    assert len(next(batches_of(data))) == 10


def test_processes_share_a_batch() -> None:
    data = torch.arange(12.0)[:, None]
    whole = batches_of(data, 6, seed=3)
    parts = [batches_of(data, 3, seed=3, rank=r, world=2) for r in range(2)]
    for _ in range(5):
        seen = torch.cat([next(p) for p in parts]).flatten()
        assert sorted(seen.tolist()) == sorted(next(whole).flatten().tolist())


@pytest.mark.parametrize("loader", [False, True])
def test_batches_go_on_where_they_stood(loader: bool) -> None:
    data = torch.rand(20, 3)

    class Noisy(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, i: int) -> Tensor:
            return data[i] + torch.rand(3)

    def stream() -> Batches:
        source = torch.utils.data.DataLoader(Noisy(), batch_size=4, shuffle=True) if loader else data
        return Batches(source, RunConfig(batch_size=4), None, (3,), data, seed=5)

    first = stream()
    for _ in range(8):
        next(first)
        torch.rand(1)
    state = first.state()
    expected = [next(first) for _ in range(7)]
    again = stream()
    again.load_state(state)
    for batch in expected:
        assert torch.equal(next(again), batch)


def test_data_loaders_and_tuples() -> None:
    dataset = torch.utils.data.TensorDataset(X, torch.zeros(64))
    loader = torch.utils.data.DataLoader(dataset, batch_size=16)
    assert len(make().fit(loader, iterations=6, step_size=0.3, progress=False).history) == 1
    assert len(make().fit([X[:8], X[:8]], iterations=6, step_size=0.3, progress=False).history) == 1


# -------------------------------------------------------------------------------------------------------- arrays and dicts

ARRAY = X.double().numpy()
BYTES = (255 * ARRAY).astype(np.uint8)
READ_ONLY = ARRAY.astype(np.float32)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    "array",
    [
        ARRAY,
        ARRAY.astype(np.float32),
        ARRAY.astype(np.float64).astype(">f8"),
        ARRAY[::-1][::-1],
        READ_ONLY,
        np.asfortranarray(ARRAY),
    ],
    ids=["float64", "float32", "big-endian", "strided", "read-only", "Fortran"],
)
@pytest.mark.parametrize("whole", [True, False])
def test_arrays_are_the_observations_that_they_hold(array: np.ndarray, whole: bool) -> None:
    expected = make()
    expected.fit(X, iterations=3, batch_size=32, step_size=0.3, progress=False, rng=seeded())
    data = array if whole else [array[:32], array[32:]]
    if not whole:
        expected = make()
        expected.fit([X[:32], X[32:]], iterations=3, step_size=0.3, progress=False, rng=seeded())
    prior = make()
    prior.fit(data, iterations=3, batch_size=32, step_size=0.3, progress=False, rng=seeded())
    assert torch.equal(weights(prior), weights(expected))


def test_float64_models_take_arrays_of_any_precision() -> None:
    prior = make().double()
    prior.fit(ARRAY.astype(np.float32), iterations=2, batch_size=32, step_size=0.3, progress=False)
    assert weights(prior).dtype == torch.float64


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (
            (255 * ARRAY).astype(np.uint8),
            ArgumentError,
            "data: expected floating-point numbers, got an array of uint8. Scale it",
        ),
        (ARRAY > 0.5, ArgumentError, "data: .* got an array of bool"),
        (ARRAY.astype(str), ArgumentError, "data: expected an array of floating-point numbers, got one of <U"),
        (ARRAY[:, 0], ShapeError, r"data: expected shape \(batch, 1, 4, 4\), got \(64, 4, 4\)"),
        (np.full_like(ARRAY, 1e300), ArgumentError, "data: expected finite values"),
        ({"x": X}, ArgumentError, "data: expected a tensor, an array or an iterable of batches, got dict"),
        ("images", ArgumentError, "data: expected a tensor, an array or an iterable of batches, got str"),
        (3.0, ArgumentError, "data: expected a tensor, an array or an iterable of batches, got float"),
        ([BYTES], ArgumentError, r"data \(a batch of it\): .* uint8"),
        ([()], ArgumentError, "expected a tuple whose first entry is the observations, got an empty one"),
        (
            [{"a": X, "b": X}],
            ArgumentError,
            r"a dict with .* under one of 'x', .*shape \(batch, 1, 4, 4\), got the keys 'a', 'b'",
        ),
        ([{}], ArgumentError, r"got the keys \(none\)"),
        ([{"image": "cat.png", "b": X}], ArgumentError, r"data \(a batch of it\)\['image'\]: expected a tensor .* got str"),
    ],
)
def test_data_of_another_kind(data: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make().fit(data, iterations=2, progress=False)


@pytest.mark.parametrize(
    "batch",
    [
        {"label": torch.zeros(64), "pixel_values": X},
        {"x": X, "image": X[:3]},
        {"image": X.numpy(), "label": 3},
        {"mine": X, "label": torch.zeros(64), "path": ["a"] * 64},
        collections.UserDict(img=X),
        ({"images": X}, torch.zeros(64)),
        [X, torch.zeros(64)],
    ],
)
def test_batches_that_are_dicts_and_tuples(batch: Any) -> None:
    assert torch.equal(next(Batches([batch], RunConfig(), None, X.shape[1:], X)), X)


# ---------------------------------------------------------------------------------------------------------- default device


@pytest.fixture
def _meta() -> Iterator[None]:
    """A default device that computes nothing: whatever is made there by accident fails."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_orders_do_not_depend_on_the_default_device(request: pytest.FixtureRequest) -> None:
    expected = batches_of(X, 16, seed=4)
    wanted = [next(expected) for _ in range(6)]
    request.getfixturevalue("_meta")
    stream = batches_of(X, 16, seed=4)
    got = [next(stream) for _ in range(3)]
    again = batches_of(X, 16, seed=4)
    again.load_state(stream.state())
    got += [next(again) for _ in range(3)]
    assert all(map(torch.equal, wanted, got))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nce", "two_stage", "joint"])
def test_a_run_under_another_default_device_is_the_same(method: Method, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    options: dict[str, Any] = {"iterations": 6, "batch_size": 16, "steps": 2, "posterior_steps": 2, "checkpoint_every": 4}
    options |= {"log_every": 3, "progress": False}
    priors = [make() for _ in range(3)]
    priors[0].fit(X, method, **options, rng=seeded())
    first, second = seeded(), seeded()
    request.getfixturevalue("_meta")

    def stops(entry: dict[str, float]) -> None:
        if entry["iteration"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        priors[1].fit(X, method, **options, rng=first, run_dir=tmp_path, callback=stops)
    assert priors[2].fit(X, method, **options, rng=second, run_dir=tmp_path).resumed_at == 4
    assert torch.equal(weights(priors[0]), weights(priors[2]))
