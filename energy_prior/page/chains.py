"""Samples, chains, and layers held and redrawn, as HTML."""

from __future__ import annotations

__all__ = ["ChainView", "HeldRow", "HeldView", "chain_views", "held_views", "sample_views"]

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from energy_prior.page.parts import HEIGHT, TOP, WIDTH, Axes, escaped, lowered, number, picture

_FEW_LAYERS = 6


class ChainView(NamedTuple):
    """A chain of the joint prior.

    Attributes:
        steps: number of the step of each entry of `energy`, (n,), ascending from 0.
        energy: f_i(z_i), (n, L), nats.
        frames: entries that there are images of, ascending.
        images: (frames, channels, height, width), in [0, 1].
        before: image, (channels, height, width), and f, (L,), of the ancestral draw, where step 0 is not it.
    """

    steps: Tensor
    energy: Tensor
    frames: Sequence[int]
    images: Tensor
    before: tuple[Tensor, Tensor] | None = None


class HeldRow(NamedTuple):
    """Draws of the k lower layers with the others held; k = 0: nothing is redrawn. `images`: (n, channels, height, width)."""

    k: int
    images: Tensor


class HeldView(NamedTuple):
    """What is made of one image, or one sample, with layers held: its title, a row per k, and itself if it is an image."""

    title: str
    rows: Sequence[HeldRow]
    image: Tensor | None = None


def sample_views(sides: Mapping[str, Tensor], size: tuple[int, int]) -> str:
    """Grids of samples side by side; those at the same place are of the same noise.

    Args:
        sides: title -> images, (n, channels, height, width), in [0, 1].
        size: height and width to show them at.
    """
    grids = []
    for title, images in sides.items():
        name = escaped(title)
        cells = "".join(
            f'<button type="button" data-item="pair" data-index="{i}" aria-pressed="false" aria-label="{name}, sample {i + 1}">'
            f"{picture(x, '', size)}</button>"
            for i, x in enumerate(images)
        )
        grids.append(f'<figure><figcaption><h3>{name}</h3></figcaption><div class="grid" data-group>{cells}</div></figure>')
    return f'<div class="sides">{"".join(grids)}</div><div class="pair" aria-live="polite"></div>'


def chain_views(chains: Sequence[ChainView], size: tuple[int, int]) -> str:
    """Each chain as a film strip over the profile of its energy.

    Args:
        chains: what to show.
        size: height and width to show the frames at.
    """
    cards = (_chain(f"Chain {i}", chain, size) for i, chain in enumerate(chains, start=1))
    return f'<div class="cards">{"".join(cards)}</div>'


def _chain(title: str, chain: ChainView, size: tuple[int, int]) -> str:
    moments = [
        _Moment(f"Step {step}", str(step), row.tolist())
        for step, row in zip(chain.steps.tolist(), chain.energy.double(), strict=True)
    ]
    last = chain.frames[-1]
    steps, sums = chain.steps.tolist(), [moment.total for moment in moments]
    axes = Axes((steps[0], steps[-1]), (min(sums), max(sums)))
    points = [(axes.x(step), axes.y(total)) for step, total in zip(steps, sums, strict=True)]
    places = [f'data-x="{x:.1f}" data-y="{y:.1f}"' for x, y in points]
    strip = []
    if chain.before is not None:
        image, f = chain.before
        strip.append(_frame(_Moment("Gaussian draw", "before", f.tolist()), image, size))
    strip += [
        _frame(moments[i], image, size, places[i], chosen=i == last)
        for i, image in zip(chain.frames, chain.images, strict=True)
    ]
    dots = "".join(f'<circle class="dot" cx="{points[i][0]:.1f}" cy="{points[i][1]:.1f}" r="3"/>' for i in chain.frames)
    curve = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    about = f"Sum of f along {title}: {number(sums[0])} nats at step {steps[0]}, {number(sums[-1])} at step {steps[-1]}"
    return (
        f'<article class="chain"><h3>{title}</h3><div class="frames" data-group>{"".join(strip)}</div>'
        f'<p class="said" aria-live="polite">{moments[last].text}</p>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{about}">{axes.drawn("Langevin step", "Σ f in nats")}'
        f'<polyline class="curve" points="{curve}"/>{dots}'
        f'<g class="mark" transform="translate({points[last][0]:.1f} {points[last][1]:.1f})"><circle r="5"/></g>'
        f"{_hits(axes, moments, points, places)}</svg></article>"
    )


class _Moment(NamedTuple):
    """What is said of a moment of a chain: its name, its key, and f of every layer."""

    name: str
    key: str
    f: Sequence[float]

    @property
    def total(self) -> float:
        return math.fsum(self.f)

    @property
    def text(self) -> str:
        """Of few layers with each."""
        each = ", ".join(f"{lowered('f', i)} {number(value)}" for i, value in enumerate(self.f, start=1))
        return f"{self.name}: Σ f = {number(self.total)} nats" + (f" ({each})" if 1 < len(self.f) <= _FEW_LAYERS else "")


def _frame(moment: _Moment, image: Tensor, size: tuple[int, int], place: str = "", *, chosen: bool = False) -> str:
    return (
        f'<button type="button" data-item="frame" data-step="{moment.key}" aria-pressed="{str(chosen).lower()}" '
        f'aria-label="{moment.text}" data-text="{moment.text}" {place}>{picture(image, "", size)}'
        f'<small>{moment.name.lower()}</small><small class="sum">{number(moment.total)}</small></button>'
    )


def _hits(axes: Axes, moments: Sequence[_Moment], points: Sequence[tuple[float, float]], places: Sequence[str]) -> str:
    """A part of the profile for every step, which says its number and Σ f."""
    middles = [(a[0] + b[0]) / 2 for a, b in zip(points, points[1:], strict=False)]
    edges = [axes.left, *middles, axes.right]
    return "".join(
        f'<rect class="hit" x="{low:.1f}" y="{TOP}" width="{high - low:.1f}" height="{axes.bottom - TOP:.1f}" {place} '
        f'data-step="{moment.key}" data-sum="{moment.total:.6g}" data-text="{moment.text}"><title>{moment.text}</title></rect>'
        for low, high, moment, place in zip(edges, edges[1:], moments, places, strict=False)
    )


def held_views(views: Sequence[HeldView], layers: int, size: tuple[int, int]) -> str:
    """A table for each image: a row per k, the k layers nearest the data redrawn with those above them held.

    Args:
        views: what to show.
        layers: L.
        size: height and width of the images.
    """
    cards = []
    for view in views:
        rows = []
        if view.image is not None:
            rows.append(f'<tr><th scope="row">image</th><td>{picture(view.image, "The image", size)}</td></tr>')
        for row in view.rows:
            name, more = _row_title(row.k, layers)
            alt = f"k = {row.k}"
            cells = "".join(f"<td>{picture(x, f'{alt}, {i}', size)}</td>" for i, x in enumerate(row.images, start=1))
            rows.append(f'<tr><th scope="row">{name}<small>{more}</small></th>{cells}</tr>')
        cards.append(
            f'<article><h3>{escaped(view.title)}</h3><div class="scroll"><table>{"".join(rows)}</table></div></article>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _row_title(k: int, layers: int) -> tuple[str, str]:
    """Of a row of the table, and what is redrawn in it."""
    if k == 0:
        return "k = 0", "all layers held"
    if k == layers:
        return f"k = {k}", "nothing held"
    redrawn = lowered("z", 1) + {1: "", 2: f", {lowered('z', 2)}"}.get(k, f" to {lowered('z', k)}")
    return f"k = {k}", f"{redrawn} redrawn"
