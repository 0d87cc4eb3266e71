"""Parts of the page of `energy-prior view`: numbers, axes, the bars of histograms, the size of images."""

from __future__ import annotations

import re

import pytest
import torch

from energy_prior.page.histograms import ScoredSet, score_views
from energy_prior.page.parts import Axes, escaped, number, picture, thumbnail_size


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (-1.5, "−1.5"),
        (0.08614, "0.0861"),
        (999.7, "1,000"),
        (92718.4, "92,718"),
        (-123456.7, "−123,457"),
        (2.5e8, "2.50e+08"),
        (1e-7, "1e−07"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_text_is_escaped() -> None:
    assert escaped('<a href="x">&\'\x00\u202e é ∑') == "&lt;a href=&quot;x&quot;&gt;&amp;&#x27;\ufffd\ufffd é ∑"


@pytest.mark.parametrize(
    ("across", "up"),
    [((0, 60), (-2.7, 1.9)), ((0, 1), (3.0, 3.0)), ((0, 100_000), (-1e-9, 1e-9)), ((-5.0, -5.0), (0, 0))],
)
def test_axes_have_a_few_round_ticks_inside(across: tuple[float, float], up: tuple[float, float]) -> None:
    axes = Axes(across, up)
    drawn = axes.drawn("across", "up")
    ticks = [float(x) for x in re.findall(r'd="M([\d.]+) [\d.]+v4"', drawn)]
    assert all(axes.left <= x <= axes.right for x in ticks)
    assert 1 <= len(ticks) <= 8
    assert 1 <= len(re.findall(r"h-4", drawn)) <= 7
    assert axes.left <= axes.x(across[0]) <= axes.x(across[1]) <= axes.right
    assert axes.y(up[0]) >= axes.y(up[1])


def test_counts_have_whole_ticks() -> None:
    drawn = Axes((0, 1), (0, 2), counts=True).drawn("score", "images")
    assert re.findall(r'text-anchor="end">([^<]+)<', drawn) == ["0", "1", "2"]


def bars(*sets: torch.Tensor, threshold: float | None = None) -> list[list[tuple[str, int]]]:
    """Span and count of the bars of each histogram."""
    made = [ScoredSet(str(i), [f"{n}" for n in range(len(s))], s, torch.zeros(len(s), 1, 2, 2)) for i, s in enumerate(sets)]
    parts = score_views(made, threshold).split("<figure class=")[1:]
    found = [re.findall(r'data-count="(\d+)" aria-label="score ([^:]+):', part) for part in parts]
    return [[(span, int(count)) for count, span in part] for part in found if part]


def test_every_image_is_behind_a_bar() -> None:
    """Those far away are in the last one, and do not press the known ones together."""
    known = torch.linspace(0, 1, 500)
    first, second = bars(known, torch.cat([torch.tensor([-1e6, 1e9]), torch.full((20,), 1e4)]))
    assert sum(count for _, count in first) == 500
    assert len(first) >= 4, "the known scores take a fifth of the axis, or more"
    assert [count for _, count in second] == [1, 21]
    assert second[-1][0].endswith(" and more")
    assert second[0][0].startswith("up to ")


@pytest.mark.parametrize("value", [0.0, 7.25, -1e5])
def test_scores_that_are_all_alike(value: float) -> None:
    (first,) = bars(torch.full((5,), value), threshold=value)
    assert [count for _, count in first] == [5]


@pytest.mark.parametrize(
    ("count", "shape", "most", "expected"),
    [(10, (1, 28, 28), 10_000, (28, 28)), (100, (3, 64, 64), 120_000, (20, 20)), (1, (3, 40, 80), 2400, (20, 40))],
)
def test_sizes_within_a_bound(count: int, shape: tuple[int, int, int], most: int, expected: tuple[int, int]) -> None:
    assert thumbnail_size(count, shape, most) == expected
    assert picture(torch.rand(shape), "x", expected).endswith(f'alt="x" width="{expected[1]}" height="{expected[0]}">')
