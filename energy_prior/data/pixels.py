"""What the pixels of a stored image mean: pictures by the range of their mode, other numbers by a rule for the whole set."""

from __future__ import annotations

__all__ = [
    "ImageError",
    "channel_order",
    "numbers",
    "on_background",
    "open_image",
    "range_of",
    "resized_picture",
    "sixteen_bits",
]

import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from energy_prior._util import first_line
from energy_prior.checks.settings import require_extra
from energy_prior.data.rows import Broken

ChannelOrder = Literal["first", "last"]

_ORIENTATION, _PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 274, 262, 258, 339  # tags of EXIF and TIFF
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_GRAY = ("1", "L", "LA", "La")
_COLOUR = ("P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
EIGHT_BITS = (*_WITH_ALPHA, *_GRAY, *_COLOUR)


class ImageError(Exception):
    """An image that cannot be used, and why; it never leaves `energy_prior.data`."""


def open_image(stored: Any) -> Any:
    """A stored image as a PIL image of 8 or 16 bits, decoded and turned as its EXIF says, or as an array of numbers.

    Args:
        stored: as a `Row` has it.

    Raises:
        ImageError: if there is none, or it cannot be read.
    """
    pil: Any = require_extra("PIL.Image", "examples")
    if isinstance(stored, Broken):
        raise ImageError(stored.why)
    if isinstance(stored, dict):
        stored = stored.get("bytes")
        if stored is None:
            raise ImageError("there is no image: its bytes are missing, and paths in tables are not followed")
    if stored is None:
        raise ImageError("there is no image")
    if isinstance(stored, bytes | Path):
        try:
            if not (stored if isinstance(stored, bytes) else stored.stat().st_size):
                raise ImageError("it is empty")
            with pil.open(io.BytesIO(stored) if isinstance(stored, bytes) else stored) as picture:
                pixels, most = picture.width * picture.height, pil.MAX_IMAGE_PIXELS
                if most is not None and pixels > most:
                    raise ImageError(f"it has {picture.width} × {picture.height} pixels, and Pillow's limit is {most} in all")
                picture.load()
                if picture.getexif().get(_ORIENTATION) is not None:
                    picture = require_extra("PIL.ImageOps", "examples").exif_transpose(picture)
            return _without_pillow(picture)
        except ImageError:
            raise
        except require_extra("PIL", "examples").UnidentifiedImageError:
            raise ImageError("it is no image that Pillow can read") from None
        except Exception as error:  # whatever Pillow makes of the bytes
            raise ImageError(f"it cannot be read as an image ({first_line(error)})") from error
    if isinstance(stored, str):
        raise ImageError("it is text")
    try:
        array = np.asarray(stored)
    except (TypeError, ValueError) as error:  # nested lists of different lengths
        raise ImageError(f"its numbers form no array ({first_line(error)})") from error
    if array.dtype.kind not in "buif":
        raise ImageError(f"its numbers form no array of whole or floating-point numbers, but one of {array.dtype}")
    return array


def _without_pillow(picture: Any) -> Any:
    """A picture whose mode says what its numbers mean; those of modes I and F as an array.

    Raises:
        ImageError: if the tags of its file say something that the mode does not.
    """
    tags = getattr(picture, "tag_v2", {})
    bits, signed = tags.get(_BITS, (0,))[0], tags.get(_SAMPLE_FORMAT, (1,))[0] == 2
    if picture.mode in EIGHT_BITS:
        if signed:
            raise ImageError("its numbers have a sign, which is lost in 8 bits; save it with 32")
        return picture
    if picture.mode not in ("I", "F", *_SIXTEEN_BITS):
        raise ImageError(f"its mode {picture.mode!r} has no meaning here; save it as gray or RGB")
    if "transparency" in picture.info:
        raise ImageError("it has 16 bits and a transparent colour, which are not read together")
    if tags.get(_PHOTOMETRIC) == 0:
        raise ImageError("its numbers count from white to black; save it as black to white")
    if picture.mode in _SIXTEEN_BITS or (picture.mode == "I" and picture.format in ("PPM", "PNG")):
        if bits not in (0, 16):
            raise ImageError(f"it has {bits} bits in numbers of 16; save it with 8 or 16")
        return picture
    array = np.asarray(picture)
    return array.view(np.uint32) if picture.mode == "I" and bits == 32 and not signed else array


def on_background(picture: Any, background: float) -> tuple[Any, bool]:
    """An 8-bit picture in mode L or RGB, composed on a background of this brightness, and whether one shows through."""
    mode = picture.mode
    see_through = False
    if mode in _WITH_ALPHA or "transparency" in picture.info:
        picture = (picture.convert("LA") if mode == "La" else picture).convert("RGBA")
        see_through = picture.getchannel("A").getextrema()[0] < 255
        if see_through:
            level = round(255 * background)
            image = require_extra("PIL.Image", "examples")
            picture = image.alpha_composite(image.new("RGBA", picture.size, (level, level, level, 255)), picture)
    return picture.convert("L" if mode in _GRAY else "RGB"), see_through


def sixteen_bits(picture: Any) -> Tensor:
    """A gray picture of 16 bits, of any byte order, over 65,535: (1, height, width) float32."""
    return torch.from_numpy(np.asarray(picture).astype(np.float32) / 65535)[None]


def numbers(array: Any, order: ChannelOrder | None) -> Tensor:
    """An array as it is, (1 or 3, height, width), whole numbers in the smallest type that has them.

    Args:
        array: (height, width), (height, width, channels) or (channels, height, width).
        order: where the channels are.

    Raises:
        ImageError: if it has another shape, or a value that is not finite.
    """
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and order is not None:
        array = array if order == "first" else np.moveaxis(array, 2, 0)
    if array.ndim != 3 or array.shape[0] not in (1, 3) or 0 in array.shape:
        raise ImageError(f"its numbers have the shape {array.shape}, and one or three channels are expected")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise ImageError("a value is NaN or infinite")
        return torch.from_numpy(np.array(array, order="C", dtype=np.float32 if array.dtype.itemsize <= 4 else np.float64))
    low, high = int(array.min()), int(array.max())
    if not -(2**63) <= low <= high < 2**63:
        raise ImageError(f"its numbers go from {low} to {high}, beyond 64 bits")
    small = np.uint8 if low >= 0 and high <= 255 else np.int32 if low >= -(2**31) and high < 2**31 else np.int64
    return torch.from_numpy(np.array(array, order="C", dtype=small))


def channel_order(shape: tuple[int, ...]) -> ChannelOrder | None:
    """Where the channels of an array of three dimensions are; None if that cannot be told."""
    first, last = shape[0] in (1, 3), shape[-1] in (1, 3)
    return None if first == last else "first" if first else "last"


def range_of(low: float, high: float, *, whole: bool) -> tuple[float, float] | None:
    """The range that numbers from `low` to `high` are meant to have; None if that cannot be told.

    Whole numbers: 0 … 1, 0 … 255 or 0 … 65,535, whichever is the first that has them. Others: 0 … 1, or −1 … 1.
    """
    known = [(0.0, 1.0), (0.0, 255.0), (0.0, 65535.0)] if whole else [(0.0, 1.0), (-1.0, 1.0)]
    return next(((a, b) for a, b in known if a <= low and high <= b), None)


def resized_picture(picture: Any, size: int | None) -> Any:
    """The central square of a PIL image, scaled to `size`; None: as it is."""
    if size is None or picture.size == (size, size):
        return picture
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)).resize((size, size), reducing_gap=2.0)
