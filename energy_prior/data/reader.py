"""Rows of a source as tensors, all by the same rules, with what is left out counted and named."""

from __future__ import annotations

__all__ = ["ReadSettings", "Reader", "Unscaled", "spread_of"]

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from energy_prior._util import shown, some_of
from energy_prior.checks.settings import check_count, real_number, require_extra, whole_number
from energy_prior.data.pixels import (
    EIGHT_BITS,
    ChannelOrder,
    ImageError,
    channel_order,
    numbers,
    on_background,
    open_image,
    range_of,
    resized_picture,
    sixteen_bits,
)
from energy_prior.data.rows import ImageSource, Row
from energy_prior.errors import ArgumentError, DataWarning, warn

_LUMINANCE = (0.299, 0.587, 0.114)  # of ITU-R BT.601, as Pillow converts RGB to gray


@dataclass(frozen=True)
class ReadSettings:
    """How images are read; `load_images` says what each setting means."""

    size: int | None = None
    channels: int | None = None
    value_range: tuple[float, float] | None = None
    channel_order: ChannelOrder | None = None
    background: float = 1.0
    on_error: str = "raise"

    def __post_init__(self) -> None:
        if self.channels is not None:
            if whole_number(self.channels) not in (1, 3):
                raise ArgumentError(f"channels: expected 1, 3 or None, got {shown(self.channels)}.")
            object.__setattr__(self, "channels", whole_number(self.channels))
        if self.size is not None:
            object.__setattr__(self, "size", check_count("size", self.size))
        if self.value_range is not None:
            object.__setattr__(self, "value_range", _range(self.value_range))
        order = self.channel_order
        if order is not None and not (isinstance(order, str) and order in get_args(ChannelOrder)):
            raise ArgumentError(f'channel_order: expected "first", "last" or None, got {shown(self.channel_order)}.')
        level = real_number(self.background)
        if level is None or not 0 <= level <= 1:
            raise ArgumentError(f"background: expected a number from 0 (black) to 1 (white), got {shown(self.background)}.")
        object.__setattr__(self, "background", level)
        if not isinstance(self.on_error, str) or self.on_error not in ("raise", "skip"):
            raise ArgumentError(f'on_error: expected "raise" or "skip", got {shown(self.on_error)}.')


class Reader:
    """Turns rows into tensors.

    Pictures of 8 bits come as uint8, of 16 bits as float32 in [0, 1], scaled to `size`. Numbers (arrays, and pictures in modes
    I and F) come as they are, as `Unscaled`: what they mean depends on all of them, and `scaled` brings them to [0, 1].

    Args:
        source: for messages.
        settings: how they are read.

    Attributes:
        order: where the channels of arrays are; None: not known yet.
        left_out: name -> why, of the images that were skipped.
    """

    def __init__(self, source: str, settings: ReadSettings) -> None:
        self.order: ChannelOrder | None = settings.channel_order
        self._source, self._settings = source, settings
        self.left_out: dict[str, str] = {}
        self._images = self._see_through = 0

    def read(self, rows: Iterator[Row] | ImageSource) -> Iterator[tuple[Row, Tensor | Unscaled]]:
        """Rows with their images, without those that are skipped."""
        for row in rows:
            try:
                image = self._image(row)
            except ImageError as error:
                if self._settings.on_error == "raise":
                    raise ArgumentError(
                        f"source: {row.name!r} of {self._source!r} cannot be used: {error}. Mend or remove it, or pass "
                        'on_error="skip" to go on without such.'
                    ) from None
                self.left_out[row.name] = str(error)
                continue
            self._images += 1
            yield row, image

    def report(self, left_out: str) -> None:
        """Says in `DataWarning`s, after a pass, what was left out, and where a background shows.

        Args:
            left_out: what the source itself has left out.
        """
        if left_out:
            warn(f"source: files in {self._source!r} that are no images were left out. {left_out}.", DataWarning)
        if self.left_out:
            few = [f"{name}: {why}" for name, why in self.left_out.items()]
            total = self._images + len(few)
            warn(f"source: {len(few)} of {total} images of {self._source!r} were left out ({some_of(few)}).", DataWarning)
        if self._see_through:
            warn(
                f"source: {self._see_through} images of {self._source!r} are see-through; they are composed on a background of "
                f"{self._settings.background:g} (0 black, 1 white). Pass background= for another.",
                DataWarning,
            )

    def scaled(self, image: Unscaled, name: str, meant: tuple[float, float]) -> Tensor:
        """Numbers as a float32 image in [0, 1], in the channels and the size of the settings.

        Args:
            image: the numbers.
            name: of their row.
            meant: the range that becomes 0 … 1.

        Raises:
            ArgumentError: if one is outside of it.
        """
        low, high = (float(v) for v in image.values.aminmax())
        if not meant[0] <= low <= high <= meant[1]:
            raise ArgumentError(
                f"value_range: {name!r} of {self._source!r} has values from {low:g} to {high:g}, outside of {meant[0]:g} to "
                f"{meant[1]:g}, the range that its other images have. Pass value_range=(low, high) of all of them."
            )
        unit = (image.values.to(torch.float64) - meant[0]) / (meant[1] - meant[0])
        return self._sized(self._in_channels(unit.to(torch.float32)))

    def meant(self, spread: tuple[float, float], *, whole: bool) -> tuple[float, float]:
        """The range that numbers with this spread are meant to have: that of the settings, else the one that is found.

        Raises:
            ArgumentError: if it cannot be told.
        """
        given = self._settings.value_range
        found = range_of(*spread, whole=whole) if given is None else given
        if found is None:
            kinds = "whole numbers from 0 to 255 or 65,535" if whole else "numbers from 0 to 1, or from −1 to 1"
            raise ArgumentError(
                f"value_range: the images of {self._source!r} have values from {spread[0]:g} to {spread[1]:g}, where {kinds} "
                "would be known. Pass value_range=(low, high): low becomes 0, high becomes 1."
            )
        return found

    def _image(self, row: Row) -> Tensor | Unscaled:
        opened = open_image(row.image)
        if isinstance(opened, np.ndarray):
            return self._unscaled(opened, row)
        if self._settings.value_range is not None:
            raise ArgumentError(
                f"value_range: {row.name!r} of {self._source!r} is a picture, whose range its mode says; value_range is for "
                "numbers. Leave it out."
            )
        if opened.mode not in EIGHT_BITS:
            return self._sized(self._in_channels(sixteen_bits(opened)))
        picture, see_through = on_background(opened, self._settings.background)
        self._see_through += see_through
        if self._settings.channels == 1:
            picture = picture.convert("L")
        picture = resized_picture(picture, self._settings.size)
        flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        image = flat.reshape(picture.height, picture.width, -1).permute(2, 0, 1)
        return image.expand(3, -1, -1) if self._settings.channels == 3 else image

    def _unscaled(self, array: Any, row: Row) -> Unscaled:
        if array.ndim == 3 and self.order is None:
            self.order = channel_order(array.shape)
            if self.order is None:
                raise ArgumentError(
                    f"channel_order: {row.name!r} of {self._source!r} has the shape {array.shape}, which does not say where "
                    'its channels (one or three) are. Pass channel_order="first" or "last".'
                )
        return Unscaled(numbers(array, self.order))

    def _in_channels(self, image: Tensor) -> Tensor:
        wanted = self._settings.channels
        if wanted is None or wanted == len(image):
            return image
        if wanted == 3:
            return image.expand(3, -1, -1)
        return torch.einsum("c,chw->hw", torch.tensor(_LUMINANCE, device="cpu", dtype=image.dtype), image)[None]

    def _sized(self, image: Tensor) -> Tensor:
        size = self._settings.size
        if size is None or tuple(image.shape[1:]) == (size, size):
            return image
        pil: Any = require_extra("PIL.Image", "examples")
        channels = [resized_picture(pil.fromarray(channel.contiguous().numpy()), size) for channel in image]
        return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels])).clamp(0, 1)


@dataclass(frozen=True)
class Unscaled:
    """Numbers whose range is not known yet, (1 or 3, height, width), whole or floating-point."""

    values: Tensor


def spread_of(images: Sequence[Unscaled]) -> tuple[float, float]:
    """The smallest and the largest of all numbers."""
    ends = [image.values.aminmax() for image in images]
    return min(float(low) for low, _ in ends), max(float(high) for _, high in ends)


def _range(value: Any) -> tuple[float, float]:
    ends = [real_number(v) for v in value] if isinstance(value, Sequence | np.ndarray | Tensor) else []
    low, high = ends if len(ends) == 2 else (None, None)
    if low is None or high is None or not low < high or not math.isfinite(high - low):
        raise ArgumentError(f"value_range: expected two finite numbers (low, high) with low below high, got {shown(value)}.")
    return low, high
