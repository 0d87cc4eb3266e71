"""What the page is made of: text, numbers, images, axes."""

from __future__ import annotations

__all__ = ["HEIGHT", "TOP", "WIDTH", "Axes", "escaped", "lowered", "number", "picture", "thumbnail_size"]

import base64
import html
import io
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from energy_prior._util import eight_bit, resized
from energy_prior.checks.settings import require_extra

_LEAST_SIDE = 8
WIDTH, HEIGHT = 400, 180
"""Of a plot, in its own units."""

TOP = 22
"""Where the frame of a plot begins."""

_LEFT, _RIGHT, _BOTTOM = 38, 8, 34
_LOWERED = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def thumbnail_size(count: int, shape: Sequence[int], most: int) -> tuple[int, int]:
    """Height and width to show images at: as they are, or smaller, so that together they hold no more than so many values.

    Args:
        count: number of images.
        shape: (channels, height, width) of each.
        most: values, a byte each in a PNG that nothing is saved in.
    """
    channels, height, width = shape
    scale = math.sqrt(most / (max(count, 1) * channels * height * width))
    if scale >= 1:
        return height, width
    return min(height, max(_LEAST_SIDE, int(height * scale))), min(width, max(_LEAST_SIDE, int(width * scale)))


class Axes:
    """The frame of a plot with its axes.

    Args:
        across: first and last value of the horizontal axis.
        up: lowest and highest value to be shown.
        counts: whether these are counts, of which the lowest is 0; others get some space above and below.
    """

    def __init__(self, across: tuple[float, float], up: tuple[float, float], *, counts: bool = False) -> None:
        self.left, self.right, self.bottom = float(_LEFT), float(WIDTH - _RIGHT), float(HEIGHT - _BOTTOM)
        self._counts = counts
        slack = 0.0 if counts else 0.05 * (up[1] - up[0]) or 0.5
        self._across, self._up = across, (up[0] - slack, up[1] + slack)

    def x(self, value: float) -> float:
        """Where a value of the horizontal axis is."""
        low, high = self._across
        return self.left + (self.right - self.left) * (value - low) / (high - low or 1.0)

    def y(self, value: float) -> float:
        """Where a value of the vertical axis is."""
        low, high = self._up
        return self.bottom - (self.bottom - TOP) * (value - low) / (high - low or 1.0)

    def drawn(self, across: str, up: str) -> str:
        """Lines, ticks and titles, as SVG."""
        parts = [f'<path class="axis" d="M{self.left:.1f} {TOP}V{self.bottom:.1f}H{self.right:.1f}"/>']
        for value in _ticks(*self._across, 6):
            at = self.x(value)
            parts.append(f'<path class="axis" d="M{at:.1f} {self.bottom:.1f}v4"/>')
            parts.append(f'<text x="{at:.1f}" y="{self.bottom + 15:.1f}" text-anchor="middle">{number(value)}</text>')
        for value in _ticks(*self._up, 4, whole=self._counts):
            at = self.y(value)
            parts.append(f'<path class="axis" d="M{self.left:.1f} {at:.1f}h-4"/>')
            parts.append(f'<text x="{self.left - 6:.1f}" y="{at + 4:.1f}" text-anchor="end">{number(value)}</text>')
        parts.append(f'<text x="{(self.left + self.right) / 2:.1f}" y="{HEIGHT - 4}" text-anchor="middle">{across}</text>')
        parts.append(f'<text x="0" y="{TOP - 10}">{up}</text>')
        return "".join(parts)


def _ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round numbers from low to high, at most about `most`."""
    rough = (high - low or 1.0) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def picture(x: Tensor, alt: str, size: tuple[int, int]) -> str:
    """An image, (channels, height, width) in [0, 1], as PNG inside of the page."""
    image: Any = require_extra("PIL.Image", "examples")
    height, width = size
    pixels = eight_bit(resized(x.detach().float().cpu()[None], size))[0]
    buffer = io.BytesIO()
    image.fromarray(pixels.numpy()).save(buffer, "png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escaped(alt)}" width="{width}" height="{height}">'


def number(value: float) -> str:
    """Short, with a minus sign that is one."""
    if abs(value) >= 1e6:
        return f"{value:.2e}".replace("-", "−")
    text = f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"
    return "0" if text in ("0", "-0") else text.replace("-", "−")


def lowered(letter: str, index: int) -> str:
    """A letter with an index below it: z₁."""
    return letter + str(index).translate(_LOWERED)


def escaped(text: str) -> str:
    """Plain text for HTML, in elements and in attributes."""
    plain = "".join(c if c.isprintable() or c == " " else "\ufffd" for c in text)
    return html.escape(plain, quote=True)
