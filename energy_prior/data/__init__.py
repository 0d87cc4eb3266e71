"""Image sets: from folders, parquet files or the Hugging Face hub; one tensor, or a stream."""

from __future__ import annotations

__all__ = ["ImageStream", "Images", "load_images"]

from energy_prior.data.images import Images, load_images
from energy_prior.data.stream import ImageStream
