"""Images from parquet files and folders that the tests write, and what is said of those that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from pictures import picture, write_parquet
from PIL import Image

from energy_prior import ArgumentError
from energy_prior.data import ImageStream, load_images


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_without_hub_metadata(tmp_path: Path, streaming: bool) -> None:
    folder = write_parquet(tmp_path / "set", [picture(0), picture(51), picture(255)])
    images, labels = load_images(folder, streaming=streaming)
    assert images.shape == (3, 1, 4, 6)
    assert images.dtype == torch.float32
    assert images[:, 0, 0, 0].tolist() == pytest.approx([0.0, 0.2, 1.0])
    assert labels is not None
    assert labels.tolist() == [0, 1, 2]
    assert len(load_images(folder, limit=2, streaming=streaming).images) == 2


def test_folders_of_images_with_a_class_each(tmp_path: Path) -> None:
    for i, name in enumerate(("cat", "dog")):
        (tmp_path / "set" / "test" / name).mkdir(parents=True)
        picture(100 * i, (5, 5), "RGB").save(tmp_path / "set" / "test" / name / "0.png")
    images, labels = load_images(tmp_path / "set", "test")
    assert images.shape == (2, 3, 5, 5)
    assert labels is not None
    assert labels.tolist() == [0, 1]
    assert load_images(tmp_path / "set", "test", channels=1).images.shape == (2, 1, 5, 5)


def test_size_crops_the_centre_and_scales(tmp_path: Path) -> None:
    wide = Image.new("L", (12, 4), 0)
    wide.paste(255, (4, 0, 8, 4))
    folder = write_parquet(tmp_path / "set", [wide, picture(0, (9, 9))])
    images, _ = load_images(folder, size=2)
    assert images.shape == (2, 1, 2, 2)
    assert bool((images[0] == 1).all()), "the bright middle, without the dark sides"
    with pytest.raises(ArgumentError, match=r"size: the images of .* differ in size, \(4, 12\) and \(9, 9\) .*; pass the size"):
        load_images(folder)


def test_what_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="there is no folder '/nowhere'"):
        load_images("/nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArgumentError, match=r"expected train.parquet, train-….parquet or a folder train/ with images"):
        load_images(tmp_path / "empty")
    folder = tmp_path / "numbers"
    folder.mkdir()
    datasets.Dataset.from_dict({"x": [1, 2]}).to_parquet(str(folder / "train.parquet"))
    with pytest.raises(ArgumentError, match=r"expected a column of images in .*, got 'x'"):
        load_images(folder)
    with pytest.raises(ArgumentError, match="channels: expected 1, 3 or None, got 2"):
        load_images(folder, channels=2)
    with pytest.raises(ArgumentError, match="limit: expected a whole number of at least 1"):
        load_images(folder, limit=0)


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "set", [picture(10 * i) for i in range(4)])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_images("~/set").images) == 4
    assert next(iter(ImageStream("~/set", size=4, batch_size=2, channels=1))).shape == (2, 1, 4, 4)
    with pytest.raises(ArgumentError, match="source: there is no folder .*nothing"):
        load_images("~/nothing")
    for read in (lambda: load_images(""), lambda: ImageStream("", size=4, batch_size=2)):
        with pytest.raises(ArgumentError, match="source: expected a path, got an empty text"):
            read()


def test_numbers_of_numpy_and_torch(tmp_path: Path) -> None:
    """As sizes."""
    folder = write_parquet(tmp_path / "set", [picture(10 * i) for i in range(6)])
    four, two = np.int64(4), torch.tensor(2)
    images, _ = load_images(folder, size=four, limit=two)  # type: ignore[arg-type]
    batch = next(iter(ImageStream(folder, size=four, batch_size=two, channels=1, skip=np.int32(1))))  # type: ignore[arg-type]
    assert images.shape == batch.shape == (2, 1, 4, 4)
    assert not bool((batch[:, 0, 0, 0] == 0).any()), "the first image is left out"


def test_images_are_on_the_cpu_whatever_the_default_device(tmp_path: Path) -> None:
    (tmp_path / "set" / "train" / "a").mkdir(parents=True)
    (tmp_path / "set" / "train" / "b").mkdir()
    picture(3).save(tmp_path / "set" / "train" / "a" / "0.png")
    picture(3).save(tmp_path / "set" / "train" / "b" / "0.png")
    with torch.device("meta"):
        images, labels = load_images(tmp_path / "set")
    assert labels is not None
    assert images.device.type == labels.device.type == "cpu"


def levels(batch: torch.Tensor) -> list[int]:
    return (batch[:, 0, 0, 0] * 255).round().int().tolist()


def test_a_stream_gives_every_image_once_in_another_order_each_pass(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "set", [picture(10 * i, (9, 6)) for i in range(14)])
    stream = ImageStream(folder, size=4, batch_size=4, channels=1, skip=2)
    torch.manual_seed(0)
    passes = [[levels(b) for b in stream] for _ in range(2)]
    for batches in passes:
        assert [len(b) for b in batches] == [4, 4, 4]
        assert sorted(level for b in batches for level in b) == [10 * i for i in range(2, 14)]
    assert passes[0] != passes[1]
    torch.manual_seed(0)
    assert [[levels(b) for b in stream] for _ in range(2)] == passes
    assert next(iter(stream)).shape == (4, 1, 4, 4)


@pytest.mark.parametrize("files", [1, 2, 3, 4])
def test_processes_share_a_stream_after_what_is_held_out(files: int, tmp_path: Path) -> None:
    """Every image once, whatever the files are and the seeds of the processes."""
    for k in range(files):
        share = [picture(10 * i, (4, 4)) for i in range(24 * k // files, 24 * (k + 1) // files)]
        write_parquet(tmp_path / f"{k}", share).joinpath("train-00000-of-00001.parquet").rename(tmp_path / f"train-{k}.parquet")
    held_out = levels(load_images(tmp_path, channels=1, limit=8, streaming=True).images)
    seen = []
    for rank in range(2):
        torch.manual_seed(rank)
        stream = ImageStream(tmp_path, size=4, batch_size=4, channels=1, skip=8, rank=rank, world=2)
        seen += [level for b in stream for level in levels(b)]
    assert sorted(held_out + seen) == [10 * i for i in range(24)]


@pytest.mark.parametrize("mode", ["P", "1", "L", "RGB"])
def test_every_mode_is_averaged_when_it_is_scaled(mode: str, tmp_path: Path) -> None:
    """A chequerboard of black and white comes out gray, as a palette too."""
    board = Image.new("RGB", (64, 64))
    for i in range(64):
        for j in range(i % 2, 64, 2):
            board.putpixel((i, j), (255, 255, 255))
    folder = tmp_path / "set" / "train"
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        board.convert(mode).save(folder / f"{name}.png")
    batch = next(iter(ImageStream(tmp_path / "set", size=16, batch_size=2, channels=3)))
    assert float((batch - 0.5).abs().max()) < 0.05


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"batch_size": 9}, "batch_size: expected at most 3, .* left for this process .after skip = [0-9]+., got 9"),
        ({"size": 0}, "size: expected a whole number"),
        ({"channels": 2}, "channels: expected 1 or 3"),
        ({"skip": -1}, "skip: expected"),
        ({"rank": 2, "world": 2}, "rank: expected a whole number below world = 2, got 2"),
        ({"rank": -1}, "rank: expected"),
        ({"world": 0}, "world: expected"),
        ({"split": "test"}, "expected test"),
    ],
)
def test_streams_that_cannot_be(keywords: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "set", [picture(i) for i in range(3)])
    options: dict[str, Any] = {"size": 4, "batch_size": 2, "channels": 1} | keywords
    with pytest.raises(ArgumentError, match=words):
        next(iter(ImageStream(folder, **options)))


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_of_classes_are_mixed_the_same_way_every_time(streaming: bool, tmp_path: Path) -> None:
    """A part of the set, from either end, has images of all classes."""
    for i, name in enumerate("abc"):
        (tmp_path / "set" / "train" / name).mkdir(parents=True)
        for j in range(12):
            picture(20 * i + j, (5, 5), "RGB").save(tmp_path / "set" / "train" / name / f"{j}.png")
    images, labels = load_images(tmp_path / "set", streaming=streaming)
    assert labels is not None
    assert [int(v // 20) for v in (images[:, 0, 0, 0] * 255).round()] == labels.tolist()
    assert set(labels[:12].tolist()) == set(labels[-12:].tolist()) == {0, 1, 2}
    again = load_images(tmp_path / "set", limit=7, streaming=streaming)
    assert torch.equal(again.images, images[:7])
