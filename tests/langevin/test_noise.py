"""Where random numbers come from: counters, injected numbers, and parts of a batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from energy_prior import ArgumentError, ShapeError
from energy_prior.langevin import InjectedNoise, RandomNoise
from energy_prior.langevin.noise import CounterNoise, counted_normal, counted_uniform, threefry


@pytest.mark.parametrize("rows", [slice(0, 3), slice(3, 10)], ids=str)
def test_counted_noise_belongs_to_rows(rows: slice) -> None:
    """Also to rows of rows; what is computed elsewhere from its counters is the same."""
    noise = CounterNoise([(10, 3), (10, 2, 2)], torch.empty(()))
    step, n = torch.tensor(7, dtype=torch.int32), rows.stop - rows.start
    part = noise.rows(rows)
    own = counted_normal(part.counters(), step, [(n, 3), (n, 2, 2)])
    for a, b, again in zip(own, noise.normal(7), part.normal(7), strict=True):
        assert torch.equal(a, b[rows])
        assert torch.equal(again, a)
    assert torch.equal(counted_uniform(part.counters(), step, n), noise.uniform(7)[rows])
    assert torch.equal(part.uniform(7), noise.uniform(7)[rows])
    assert torch.equal(part.rows(slice(1, 3)).normal(7)[1], noise.normal(7)[1][rows][1:3])


def test_threefry_is_the_published_one() -> None:
    """Known answers of the Random123 distribution (Salmon et al., SC 2011), for 2×32 bits and 20 rounds."""

    def words(*values: int) -> list[Tensor]:
        return [torch.tensor(value - 2**32 if value >= 2**31 else value, dtype=torch.int32) for value in values]

    for key, counter, answer in (
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((2**32 - 1, 2**32 - 1), (2**32 - 1, 2**32 - 1), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ):
        assert threefry(torch.stack(words(*key)), *words(*counter)) == tuple(words(*answer))


def test_counted_noise_is_standard_normal_and_never_repeats() -> None:
    torch.manual_seed(0)
    noise = CounterNoise([(4000, 3), (4000, 2, 2)], torch.empty(()))
    flat = torch.cat([torch.cat([n.flatten(1) for n in noise.normal(step)], 1) for step in range(1, 6)], 1)
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.01, 0.99, 99))
    torch.testing.assert_close(flat.flatten().quantile(torch.linspace(0.01, 0.99, 99)), quantiles, rtol=0, atol=0.03)
    uniform = torch.stack([noise.uniform(step) for step in range(1, 6)], 1)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    levels = torch.linspace(0.01, 0.99, 99)
    torch.testing.assert_close(uniform.flatten().quantile(levels), levels, rtol=0, atol=0.02)
    both = torch.cat([flat, uniform], 1)
    assert float((both.T.corrcoef() - torch.eye(40)).abs().max()) < 0.08, "between layers and steps"
    assert float((both.abs().T.corrcoef() - torch.eye(40)).abs().max()) < 0.08
    assert len(flat.flatten().unique()) > 0.99 * flat.numel()
    assert len(uniform.unique()) > 0.99 * uniform.numel()
    pair = CounterNoise([(4000, 2)], torch.empty(()))
    radius = torch.cat(pair.normal(1)).norm(dim=1)
    assert abs(float(torch.stack([radius, pair.uniform(1)]).corrcoef()[0, 1])) < 0.08, (
        "an accept test is not a part of its move"
    )
    torch.manual_seed(0)
    again = CounterNoise([(4000, 3), (4000, 2, 2)], torch.empty(()))
    assert torch.equal(again.normal(3)[1], noise.normal(3)[1]), "whatever was asked for before"
    assert not torch.equal(noise.normal(1)[0], CounterNoise([(4000, 3)], torch.empty(())).normal(1)[0]), "another key"
    assert CounterNoise.reaches([(2**20, 2**11)])
    assert not CounterNoise.reaches([(2**20, 2**12)])


def test_injected_noise_of_rows() -> None:
    noise = InjectedNoise([torch.randn(4, 10, 3), torch.randn(4, 10, 2)], torch.rand(4, 10))
    part = noise.rows(slice(2, 5))
    for step in range(4):
        for a, b in zip(part.normal(step), noise.normal(step), strict=True):
            assert torch.equal(a, b[2:5])
        assert torch.equal(part.uniform(step), noise.uniform(step)[2:5])


def test_injected_noise_that_does_not_fit() -> None:
    like = torch.empty(())
    with pytest.raises(ShapeError, match="one tensor per free layer, got none"):
        InjectedNoise([])
    with pytest.raises(ShapeError, match=r"the same \(steps \+ 1, batch\)"):
        InjectedNoise([torch.randn(3, 2, 4), torch.randn(4, 2, 4)])
    noise = InjectedNoise([torch.randn(3, 2, 4)])
    noise.check([(2, 4)], like, 2, adjust=False)
    with pytest.raises(ShapeError, match="per free layer, shapes"):
        noise.check([(2, 5)], like, 2, adjust=False)
    with pytest.raises(ArgumentError, match="4 rows or more"):
        noise.check([(2, 4)], like, 3, adjust=False)
    with pytest.raises(ArgumentError, match="needs `uniforms`"):
        noise.check([(2, 4)], like, 2, adjust=True)
    with pytest.raises(ArgumentError, match=r"expected torch\.float64"):
        noise.check([(2, 4)], like.double(), 2, adjust=False)


def test_random_noise_of_rows_goes_on_with_the_stream() -> None:
    noise = RandomNoise([(5, 3), (5, 2)], torch.empty((), dtype=torch.float64))
    torch.manual_seed(1)
    part = noise.rows(slice(1, 4))
    drawn: list[Tensor] = [*part.normal(1), part.uniform(1)]
    assert [tuple(t.shape) for t in drawn] == [(3, 3), (3, 2), (3,)]
    torch.manual_seed(1)
    assert torch.equal(drawn[0], torch.randn(3, 3, dtype=torch.float64))
    assert torch.equal(drawn[1], torch.randn(3, 2, dtype=torch.float64))
    assert torch.equal(drawn[2], torch.rand(3, dtype=torch.float64))
