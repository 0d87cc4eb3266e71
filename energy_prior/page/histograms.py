"""Histograms of scores, with the images behind their bars, as HTML."""

from __future__ import annotations

__all__ = ["ScoredSet", "score_views"]

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from energy_prior.page.parts import HEIGHT, TOP, WIDTH, Axes, escaped, number, picture, thumbnail_size

_BARS = 20
_PER_BAR = 8
_MOST_VALUES = 2**20  # of the images behind the bars


class ScoredSet(NamedTuple):
    """A set of images with scores.

    Attributes:
        label: what it is called.
        names: of the images.
        scores: (n,), finite, n ≥ 1.
        images: (n, channels, height, width), in [0, 1].
        left_out: images of the set that have no score.
    """

    label: str
    names: Sequence[str]
    scores: Tensor
    images: Tensor
    left_out: int = 0


def score_views(sets: Sequence[ScoredSet], threshold: float | None) -> str:
    """A histogram per set, over the same bars, with images behind each bar.

    Scores beyond the ends of the axis are in the first and the last bar, so that every image is in one.

    Args:
        sets: the known images first.
        threshold: a score to mark; None: none.
    """
    edges = _edges([s.scores for s in sets])
    inner = torch.tensor(edges[1:-1], dtype=torch.float64)
    places = [torch.bucketize(s.scores.double().cpu(), inner, right=True) for s in sets]
    behind = [
        [_spread(s, (place == bar).nonzero()[:, 0]) for bar in range(_BARS)] for s, place in zip(sets, places, strict=True)
    ]
    shown = sum(len(chosen) for bars in behind for chosen in bars)
    size = thumbnail_size(shown, sets[0].images.shape[1:], _MOST_VALUES)
    return "".join(
        _histogram(f"bar-{i}", scored, edges, bars, place.bincount(minlength=_BARS).tolist(), threshold, size)
        for i, (scored, place, bars) in enumerate(zip(sets, places, behind, strict=True))
    )


def _histogram(
    key: str,
    scored: ScoredSet,
    edges: Sequence[float],
    behind: Sequence[Sequence[int]],
    counts: Sequence[int],
    threshold: float | None,
    size: tuple[int, int],
) -> str:
    axes = Axes((edges[0], edges[-1]), (0, max(counts)), counts=True)
    label, last = escaped(scored.label), max(bar for bar, count in enumerate(counts) if count)
    bars, panels = [], []
    for bar, count in enumerate(counts):
        if not count:
            continue
        what = f"score {_span(edges, bar)}: {_images(count)}"
        left, right, top = axes.x(edges[bar]), axes.x(edges[bar + 1]), min(axes.y(count), axes.bottom - 1.5)
        current, opened = (' aria-current="true"', " open") if bar == last else ("", "")
        bars.append(
            f'<a href="#{key}-{bar}" data-item="bar" data-count="{count}" aria-label="{what} of {label}"{current}>'
            f"<title>{what}</title>"
            f'<rect class="hit" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{axes.bottom - TOP:.1f}"/>'
            f'<rect class="bar" x="{left + 0.75:.2f}" y="{top:.1f}" width="{right - left - 1.5:.2f}" '
            f'height="{axes.bottom - top:.1f}"/></a>'
        )
        some = f", {len(behind[bar])} of them here" if len(behind[bar]) < count else ""
        figures = "".join(_shown(scored, i, size) for i in behind[bar])
        panels.append(
            f'<details class="bin" id="{key}-{bar}"{opened}><summary>{label}, {what}{some}</summary>'
            f'<div class="grid">{figures}</div></details>'
        )
    line = ""
    if threshold is not None and edges[0] < threshold < edges[-1]:
        x = axes.x(threshold)
        line = f'<path class="threshold" d="M{x:.1f} {TOP}V{axes.bottom:.1f}"/>'
    left_out = f"; {scored.left_out} could not be read or scored" if scored.left_out else ""
    return (
        f'<figure class="histogram {"first" if key == "bar-0" else "second"}">'
        f"<figcaption><h3>{label}: {_images(len(scored.scores))}{left_out}</h3></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="Histogram of the scores of {label}">'
        f"{axes.drawn('score, higher = more anomalous', 'images')}<g data-group>{''.join(bars)}</g>{line}</svg>"
        f"{''.join(panels)}</figure>"
    )


def _shown(scored: ScoredSet, i: int, size: tuple[int, int]) -> str:
    """An image behind a bar, with its score and its name."""
    name = scored.names[i]
    short = escaped(re.split(r"[/\\]", name)[-1].rpartition(", ")[2])  # of a table the row
    caption = f'<figcaption>{number(float(scored.scores[i]))}<span title="{escaped(name)}">{short}</span></figcaption>'
    return f"<figure>{picture(scored.images[i], name, size)}{caption}</figure>"


def _span(edges: Sequence[float], bar: int) -> str:
    """Which scores are in a bar."""
    if bar == 0:
        return f"up to {number(edges[1])}"
    if bar == _BARS - 1:
        return f"{number(edges[bar])} and more"
    return f"{number(edges[bar])} to {number(edges[bar + 1])}"


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"


def _edges(scores: Sequence[Tensor]) -> list[float]:
    """Of the bars: most of all scores, but no further from the known ones than twice their own width."""
    levels = torch.tensor([0.002, 0.998], dtype=torch.float64)
    low, high = (float(q) for q in torch.quantile(torch.cat([s.double().cpu() for s in scores]), levels))
    least, most = (float(q) for q in torch.quantile(scores[0].double().cpu(), levels))
    width = most - least
    if width > 0:
        low, high = max(low, least - 2 * width), min(high, most + 2 * width)
    if high - low <= 1e-6 * max(abs(low), abs(high), 1e-6):  # all alike
        low, high = low - 0.5 * max(abs(low), 1.0), high + 0.5 * max(abs(high), 1.0)
    return [low + (high - low) * i / _BARS for i in range(_BARS + 1)]


def _spread(scored: ScoredSet, rows: Tensor) -> list[int]:
    """Rows to show, from low to high scores."""
    ordered = rows[scored.scores.cpu()[rows].argsort(stable=True)]
    if len(ordered) > _PER_BAR:
        ordered = ordered[torch.linspace(0, len(ordered) - 1, _PER_BAR).round().long()]
    return ordered.tolist()
