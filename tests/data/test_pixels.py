"""What pixels mean: every mode of Pillow, arrays of any type and order, and what cannot be told."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded, table
from PIL import Image

from energy_prior import ArgumentError, DataWarning
from energy_prior.data import ImageStream, load_images


def saved(folder: Path, *pictures: Image.Image, suffix: str = "png") -> Path:
    (folder / "train").mkdir(parents=True)
    for i, image in enumerate(pictures):
        image.save(folder / "train" / f"{i}.{suffix}")
    return folder


GRAY = np.array([[0, 60, 120], [180, 240, 255]], np.uint8)
COLOUR = np.stack([GRAY, 255 - GRAY, GRAY // 2], -1)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "CMYK", "YCbCr", "HSV", "1", "RGBA", "LA"])
def test_modes_of_eight_bits_mean_what_pillow_says(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(GRAY if mode in ("L", "LA", "1") else COLOUR).convert(mode)
    expected = np.asarray(image.convert("L" if mode in ("L", "LA", "1") else "RGB"), np.float32) / 255
    # as rows of a table: PNG has not every mode, TIFF has
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    stored = image.convert("RGB") if mode == "HSV" else image
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = load_images(table(tmp_path, image=[encoded(stored, kind)])).images[0]
    want = torch.from_numpy(expected if expected.ndim == 3 else expected[..., None]).permute(2, 0, 1)
    assert float((got - want).abs().max()) < 1.5 / 255


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_sixteen_bits_are_scaled_by_their_range(mode: str, tmp_path: Path) -> None:
    values = np.array([[0, 1, 4096], [32768, 65534, 65535]], np.uint16)
    image = Image.frombytes(mode, (3, 2), values.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    got = load_images(table(tmp_path, image=[encoded(image, "TIFF")])).images
    assert torch.allclose(got[0, 0], torch.from_numpy(values.astype(np.float32) / 65535))
    assert load_images(tmp_path, size=2).images.shape == (1, 1, 2, 2)


@pytest.mark.parametrize(("background", "level"), [(1.0, 255), (0.0, 0), (0.5, 128)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_see_through_images_are_composed_and_said(mode: str, background: float, level: int, tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (90, 90, 90, 255))
    image.putpixel((1, 0), (90, 90, 90, 0))
    if mode == "P":
        image = Image.new("P", (2, 1), 0)
        image.putpalette([90, 90, 90, 1, 2, 3])
        image.putpixel((1, 0), 1)
        image.info["transparency"] = bytes([255, 0])
    else:
        image = image.convert("LA" if mode == "PA" else mode)
    path = saved(tmp_path, image)
    with pytest.warns(DataWarning, match="1 images of .* are see-through; they are composed on a background of"):
        got = load_images(path, background=background).images
    assert (got[0, 0, 0] * 255).round().tolist() == [90, level]


@settings(deadline=None, max_examples=40)
@given(
    dtype=st.sampled_from(["uint8", "int16", "int32", "int64", "uint16", "float32", "float64", "bool"]),
    shape=st.sampled_from([(5, 4), (5, 4, 3), (3, 5, 4), (5, 4, 1), (1, 5, 4)]),
    data=st.data(),
)
def test_arrays_of_any_type_and_order(dtype: str, shape: tuple[int, ...], data: Any, tmp_path_factory: Any) -> None:
    """Whole numbers by the smallest range that has them, others in [0, 1] or [−1, 1]."""
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    if dtype == "bool":
        low, high, images = 0, 1, rng.random((3, *shape)) < 0.5
    elif dtype.startswith("float"):
        low, high = data.draw(st.sampled_from([(0, 1), (-1, 1)]))
        images = rng.uniform(low, high, (3, *shape)).astype(dtype)
        images[0].flat[0], images[0].flat[1] = low, high
    else:
        low, high = 0, data.draw(st.sampled_from([1, 255, 65535] if dtype in ("int32", "int64", "uint16") else [1, 255]))
        images = rng.integers(0, high + 1, (3, *shape)).astype(dtype)
        images[0].flat[0] = high
    folder = table(tmp_path_factory.mktemp("a"), image=images.tolist(), label=[2, 0, 1])
    got = load_images(folder)
    unit = (images.astype(np.float64) - low) / (high - low)
    want = unit[:, None] if len(shape) == 2 else unit if shape[0] in (1, 3) else np.moveaxis(unit, -1, 1)
    assert torch.allclose(got.images, torch.from_numpy(want).float(), atol=1e-6)
    assert got.labels is not None
    assert got.labels.tolist() == [2, 0, 1]
    batch = next(iter(ImageStream(folder, size=4, batch_size=3, channels=1, value_range=(low, high))))
    assert batch.shape == (3, 1, 4, 4)


def test_columns_of_datasets_and_fixed_size_lists(tmp_path: Path) -> None:
    images = np.arange(24).reshape(2, 3, 4)
    features = datasets.Features(
        {"image": datasets.Array2D((3, 4), "uint8"), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    (tmp_path / "a").mkdir()
    datasets.Dataset.from_dict({"image": images, "label": [1, 0]}, features).to_parquet(str(tmp_path / "a" / "train.parquet"))
    loaded = load_images(tmp_path / "a")
    assert loaded.classes == ("cat", "dog")
    fixed = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(pa.array(images.flatten()), 4), 3)
    for got in (loaded.images, load_images(table(tmp_path / "b", img=fixed)).images):
        assert torch.allclose(got[:, 0], torch.from_numpy(images / 255).float())


def test_numbers_in_pictures(tmp_path: Path) -> None:
    """Modes I and F: what they mean depends on all of them."""
    whole = Image.fromarray(np.array([[0, 200], [1, 2]], np.int32))
    assert torch.allclose(load_images(saved(tmp_path / "a", whole, suffix="tif")).images.amax(), torch.tensor(200 / 255))
    floats = [Image.fromarray(np.array([[v, 0.5]], np.float32)) for v in (-1.0, 1.0)]
    assert load_images(saved(tmp_path / "b", *floats, suffix="tif")).images.amax() == 1.0
    assert sorted(load_images(tmp_path / "b").images[:, 0, 0, 0].tolist()) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([[[0, 70000]]], r"value_range: .* have values from 0 to 70000, where whole numbers .* Pass value_range=\(low, high\)"),
        ([[[-3, 4]]], "have values from -3 to 4"),
        ([[[0.5, 1.5]]], "have values from 0.5 to 1.5, where numbers from 0 to 1"),
        ([[[0.5, float("nan")]]], "row 0' of .* cannot be used: a value is NaN or infinite"),
        ([[[1, 2], [3]]], "row 0' of .* cannot be used: its numbers form no array"),
        ([[[1, None]]], "row 0' of .* cannot be used: its numbers form no array"),
        ([[[[1, 2, 3, 4]] * 2] * 2], "does not say where its channels"),
        ([[[[1, 2, 3]] * 3] * 3], r"channel_order: .* has the shape \(3, 3, 3\), which does not say where its channels"),
        ([[[]]], "column: expected images in the column 'image'"),
    ],
)
def test_numbers_that_mean_nothing(images: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=words):
        load_images(table(tmp_path, image=images))


def tiff(data: bytes, bits: int, photometric: int = 1, sample_format: int = 1) -> bytes:
    """Two gray pixels beside each other, with these tags."""
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(data), 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + b"\0" * 4


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (tiff(b"\1\0\2\0", 16, photometric=0), "its numbers count from white to black"),
        (tiff(b"\x12\x34\x56", 12), "it has 12 bits in numbers of 16"),
        (tiff(b"\xfb\1", 8, sample_format=2), "its numbers have a sign"),
    ],
)
def test_tags_that_a_mode_does_not_show(content: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=f"row 0' of .* cannot be used: {words}"):
        load_images(table(tmp_path, image=[content]))


def test_unsigned_numbers_of_32_bits(tmp_path: Path) -> None:
    content = tiff(np.array([3_000_000_000, 0], "<u4").tobytes(), 32)
    got = load_images(table(tmp_path, image=[content]), value_range=(0, 4_000_000_000))
    assert got.images.flatten().tolist() == [0.75, 0.0]


def test_a_dark_map_of_sixteen_bits_stays_dark(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.pgm").write_bytes(b"P5 2 1 65535\n" + np.array([200, 1], ">u2").tobytes())
    assert torch.allclose(load_images(tmp_path).images.flatten(), torch.tensor([200, 1]) / 65535)


def test_numbers_are_scaled_exactly_and_whatever_the_default_type(tmp_path: Path) -> None:
    large = table(tmp_path / "a", image=[[[2**40 + 1, 2**40]]])
    assert load_images(large, value_range=(2**40, 2**40 + 2)).images.flatten().tolist() == [0.5, 0.0]
    torch.set_default_dtype(torch.float64)
    try:
        assert load_images(table(tmp_path / "b", image=[[[[0, 0, 0]] * 4] * 4]), channels=1).images.shape == (1, 1, 4, 4)
    finally:
        torch.set_default_dtype(torch.float32)
    with pytest.raises(ArgumentError, match="value_range: expected two finite numbers"):
        load_images(large, value_range=(-1e308, 1e308))


def test_a_stream_finds_order_and_range_from_its_first_images(tmp_path: Path) -> None:
    certain, either = np.zeros((4, 5, 4, 3), np.int64).tolist(), np.zeros((4, 3, 4, 3), np.int64).tolist()
    folder = table(tmp_path / "a", image=certain + either)
    for seed in range(4):
        torch.manual_seed(seed)
        assert len(list(ImageStream(folder, size=4, batch_size=8, value_range=(0, 1)))) == 1
    (tmp_path / "b").mkdir()
    none = pa.table({"image": pa.array([], pa.list_(pa.list_(pa.int64())))})
    pq.write_table(none, tmp_path / "b" / "train-00000-of-00002.parquet")
    pq.write_table(pa.table({"image": [[[1, 200], [3, 4]]]}), tmp_path / "b" / "train-00001-of-00002.parquet")
    with pytest.warns(DataWarning, match="in the first part from 1 to 200: 0 is read as 0 and 255 as 1"):
        assert len(list(ImageStream(tmp_path / "b", size=2, batch_size=1, channels=1))) == 1


def test_what_can_be_said_of_numbers(tmp_path: Path) -> None:
    wide = table(tmp_path / "a", image=[[[0, 70000]]])
    assert load_images(wide, value_range=(0, 140000)).images.flatten().tolist() == [0.0, 0.5]
    with pytest.raises(ArgumentError, match="row 0' of .* has values from 0 to 70000, outside of 0 to 100"):
        load_images(wide, value_range=(0, 100))
    cube = table(tmp_path / "b", image=np.arange(27).reshape(1, 3, 3, 3).tolist())
    first, last = (load_images(cube, channel_order=order).images for order in ("first", "last"))  # type: ignore[arg-type]
    assert torch.equal(first, last.permute(0, 2, 3, 1))
    with pytest.raises(ArgumentError, match="is a picture, whose range its mode says; value_range is for numbers"):
        load_images(saved(tmp_path / "c", Image.new("L", (2, 2))), value_range=(0, 255))


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"value_range": 3}, "value_range: expected two finite numbers"),
        ({"value_range": (1, 1)}, "value_range: expected two finite numbers"),
        ({"channel_order": "middle"}, 'channel_order: expected "first", "last" or None'),
        ({"background": 2}, "background: expected a number from 0"),
        ({"on_error": "ignore"}, 'on_error: expected "raise" or "skip"'),
        ({"column": 3}, "column: expected the name of a column, got 3"),
        ({"label_column": None}, "label_column: expected the name of a column, got None"),
        ({"column": "x"}, "column: .* is a folder of images, which has no columns"),
    ],
)
def test_settings_that_cannot_be(keywords: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=words):
        load_images(saved(tmp_path, Image.new("L", (2, 2))), **keywords)


def test_a_first_gray_image_leaves_the_others_their_colours(tmp_path: Path) -> None:
    gray, red = Image.new("L", (2, 2), 100), Image.new("RGB", (2, 2), (255, 0, 0))
    path = table(tmp_path, image=[encoded(gray), encoded(red)])
    with pytest.warns(DataWarning, match="1 of 2 images of .* are gray, the others have colours; all are read as RGB"):
        got = load_images(path).images
    assert (got[:, :, 0, 0] * 255).round().tolist() == [[100, 100, 100], [255, 0, 0]]
    assert load_images(path, channels=1).images.shape == (2, 1, 2, 2)


def test_orientation_of_a_camera(tmp_path: Path) -> None:
    image, exif = Image.fromarray(GRAY), Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    (tmp_path / "train").mkdir()
    image.save(tmp_path / "train" / "0.png", exif=exif)
    got = (load_images(tmp_path).images[0, 0] * 255).round().byte().numpy()
    assert (got == np.rot90(GRAY, -1)).all()


def test_a_stream_of_numbers_keeps_one_rule(tmp_path: Path) -> None:
    images = np.zeros((1300, 2, 2), np.int64)
    images[5] = 255
    images[1299] = 300
    pq.write_table(pa.table({"image": images[:1000].tolist()}), tmp_path / "train-00000-of-00002.parquet")
    pq.write_table(pa.table({"image": images[1000:].tolist()}), tmp_path / "train-00001-of-00002.parquet")
    stream = ImageStream(tmp_path, size=2, batch_size=10, channels=1, buffer=1)
    with pytest.warns(DataWarning, match="numbers, in the first part from 0 to 255: 0 is read as 0 and 255 as 1") as said:
        batches = [next(iter(stream))]
    assert len(said) == 1
    assert batches[0].amax() == 1.0
    with pytest.raises(
        ArgumentError, match="train-00001-of-00002.parquet, row 299' .* values from 300 to 300, outside of 0 to 255"
    ):
        list(stream)
