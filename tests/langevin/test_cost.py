"""What a computation costs, counted, and the parts that follow from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_priors import conv, lively, mlp, target_of
from torch import nn

from energy_prior import LadderVAE
from energy_prior.langevin.cost import equal_parts, evaluation_cost, forward_memory


def test_the_cost_of_an_evaluation_is_counted() -> None:
    """Products: 2·(4·128 + 128·128 + 128) and 2·(3·128 + …) of the energies, 2·(3·16 + 16·16 + 16·8) of p(z_1 | z_2), twice."""
    prior = lively(mlp())
    with torch.no_grad():
        cost = evaluation_cost(target_of(prior, 2).density())
    products = sum(d * 128 + 128 * 128 + 128 for d in (4, 3)) + 3 * 16 + 16 * 16 + 16 * 8
    assert cost.flops == 2 * 2 * products
    assert cost.memory > 8 * 4 * 128
    assert cost.operations > 20


def test_it_is_counted_once_for_densities_of_one_cache_key(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = lively(mlp())
    with torch.no_grad():
        first = evaluation_cost(target_of(prior, 2).density())
        monkeypatch.setattr("energy_prior.langevin.cost._counted", lambda _: None)
        assert evaluation_cost(target_of(prior, 5).density()) is first
        held = {2: torch.randn(2, 3).double()}
        assert evaluation_cost(target_of(prior, 2, held).density()) is None


@pytest.mark.parametrize(
    ("rows", "memory", "sizes"), [(10, 100, [10]), (10, 30, [3, 3, 3, 1]), (10, 49, [4, 4, 2]), (3, 1, [1, 1, 1])]
)
def test_equal_parts(rows: int, memory: float, sizes: list[int]) -> None:
    parts = equal_parts(rows, 10.0, memory)
    assert [part.stop - part.start for part in parts] == sizes
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(rows))


def test_the_memory_of_a_pass_is_that_of_what_lives_at_once() -> None:
    """A row: 10 numbers and 30 live while the first becomes the second, with the largest once more; then 30 and 20."""
    weights = torch.randn(10, 30), torch.randn(30, 20)
    rows_seen: list[int] = []

    def run(rows: int) -> torch.Tensor:
        rows_seen.append(rows)
        normalised = [w / w.norm() for w in weights]  # of the pass, not of a row
        x = torch.ones(rows, 10)
        for w in normalised:
            x = x @ w
        return x

    module, cpu = nn.Linear(1, 1), torch.device("cpu")
    assert forward_memory(run, module, "pass", cpu) == 4 * (30 + 20 + 30)
    assert forward_memory(run, module, "pass", cpu) == forward_memory(run, nn.Linear(1, 1), "pass", cpu)
    assert rows_seen == [2, 4] * 2, "counted once for a module"


def test_the_memory_of_a_pass_row_by_row_is_not_too_little() -> None:
    """Where the number of operations depends on the rows: 100 numbers of each live at once, and are stacked."""

    def run(rows: int) -> torch.Tensor:
        return torch.stack([torch.ones(10) @ torch.ones(10, 100) for _ in range(rows)])

    assert forward_memory(run, nn.Linear(1, 1), "pass", torch.device("cpu")) >= 4 * 200


def test_results_without_a_storage_do_not_count() -> None:
    def run(rows: int) -> torch.Tensor:
        mask = torch.sparse_coo_tensor(torch.tensor([[0], [0]]), torch.ones(1), (5, 10), check_invariants=True)
        return (mask @ torch.ones(10, rows)).T

    assert forward_memory(run, nn.Linear(1, 1), "pass", torch.device("cpu")) > 0


def test_decoding_in_parts_gives_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = lively(conv())
    sizes: list[int] = []
    original = LadderVAE.likelihood

    def spy(self: LadderVAE, state: Any) -> Any:
        sizes.append(len(state))
        return original(self, state)

    assert isinstance(prior.generator, nn.Module)
    latents = prior.sample_latents(40, steps=3)
    monkeypatch.setattr(LadderVAE, "likelihood", spy)
    images = []
    with torch.no_grad():
        for memory in (1e9, 2e4):
            sizes.clear()
            images.append(prior.decode(latents, max_memory=memory))
    torch.testing.assert_close(*images, rtol=1e-10, atol=1e-10)
    assert max(sizes) < 40, "the last call decoded in parts"
