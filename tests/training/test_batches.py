"""Batches of a tensor, an array or a loader: every observation once a pass, shared out, and gone on with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runs import X, make
from torch import Tensor

from energy_prior.training import (
    RunConfig,
)
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
    assert len(make().fit(loader, iterations=6, progress=False).history) == 1
    assert len(make().fit([X[:8], X[:8]], iterations=6, progress=False).history) == 1
