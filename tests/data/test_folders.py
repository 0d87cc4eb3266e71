"""Folders as people have them: any names, links, hidden entries, nested classes, shards; what is an image and what is said."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import picture, write_parquet
from PIL import Image

from energy_prior import ArgumentError, DataWarning
from energy_prior.data import load_images

NAMES = st.text(
    st.sampled_from("ab1 #%[]*?{}'\"&=:~!äß日本_-.") | st.characters(categories=("Ll", "Lo", "Nd")), min_size=1, max_size=8
).filter(lambda name: not name.startswith(".") and name != "__MACOSX")
SUFFIXES = st.sampled_from([".png", ".PNG", ".bmp", ".tif", ".tiff", ".gif", ".webp", ".ppm", ".Png"])


def save(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((3, 4), value, np.uint8)).save(path, lossless=True)  # which WebP alone asks


@settings(deadline=None, max_examples=40)
@given(
    files=st.dictionaries(
        st.tuples(st.lists(NAMES, min_size=1, max_size=3), NAMES, SUFFIXES).map(lambda t: (*t[0], t[1] + t[2])),
        st.integers(0, 255),
        min_size=1,
        max_size=8,
    ),
    hidden=st.lists(st.sampled_from([".DS_Store", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", "._a.png"]), max_size=3),
)
def test_what_goes_into_a_tree_comes_out(
    files: dict[tuple[str, ...], int], hidden: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every image once, with the number of the first folder as its label, whatever the names mean to a shell or a glob."""
    root = tmp_path_factory.mktemp("tree") / "a [set] #1%20" / "train"
    kept: dict[tuple[str, ...], int] = {}
    for parts, value in files.items():
        path = root.joinpath(*parts)
        try:
            save(path, value)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            continue  # a name that is a folder already
        kept[parts] = value
    for name in hidden:
        for base in (root, root / next(iter(kept))[0]):
            (base / name).parent.mkdir(parents=True, exist_ok=True)
            (base / name).write_bytes(b"no image")
    classes = sorted({parts[0] for parts in kept})
    loaded = load_images(root.parent, "train", channels=1)
    assert loaded.labels is not None
    assert loaded.classes is not None
    got = sorted((loaded.classes[y], round(float(x.mean()) * 255)) for x, y in zip(loaded.images, loaded.labels, strict=True))
    assert got == sorted((parts[0], value) for parts, value in kept.items())
    assert sorted(loaded.classes) == classes


def test_links_are_followed_and_not_round_in_a_circle(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "0.png", 10)
    save(tmp_path / "set" / "train" / "cat" / "1.png", 20)
    cat = tmp_path / "set" / "train" / "cat"
    (cat / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (cat / "round").symlink_to(tmp_path / "set" / "train", target_is_directory=True)
    (cat / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.warns(DataWarning, match=r"a link to a folder that is read already: 1 \(cat/round\)") as said:
        loaded = load_images(tmp_path / "set")
    assert "a link to nothing: 1 (cat/gone.png)" in str(said[0].message)
    assert sorted((loaded.images[:, 0, 0, 0] * 255).round().tolist()) == [10, 20]


def test_the_first_folder_is_the_class_also_where_one_is_empty(tmp_path: Path) -> None:
    for name in ("bird/a/0.png", "dog/0.png"):
        save(tmp_path / "train" / name, 7)
    (tmp_path / "train" / "cat").mkdir()
    loaded = load_images(tmp_path)
    assert loaded.classes == ("bird", "cat", "dog")
    assert loaded.labels is not None
    assert sorted(loaded.labels.tolist()) == [0, 2], "as in a split where the class has images"
    assert load_images(tmp_path, label_column=False).labels is None


def test_images_beside_folders_of_classes_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "train" / "cat" / "0.png", 1)
    save(tmp_path / "train" / "stray.png", 1)
    with pytest.raises(ArgumentError, match="1 images lie in .* beside folders of classes, such as 'stray.png'"):
        load_images(tmp_path)


def test_loose_images_have_no_labels_and_other_files_are_named(tmp_path: Path) -> None:
    save(tmp_path / "train" / "0.png", 1)
    (tmp_path / "train" / "notes.txt").write_text("hello")
    with pytest.warns(DataWarning, match=r"that are no images were left out. no suffix of an image: 1 \(notes.txt\)"):
        loaded = load_images(tmp_path)
    assert loaded.labels is None
    (tmp_path / "train" / "0.png").unlink()
    with pytest.raises(ArgumentError, match=r"expected images in .*, got none. no suffix of an image: 1 \(notes.txt\)"):
        load_images(tmp_path)


@pytest.mark.parametrize(("call", "words"), [("scandir", "cannot be listed"), ("stat", "cannot be read")])
def test_a_folder_that_cannot_be_listed(call: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, and not taken for a folder without images."""
    for name in ("cat/0.png", "dog/0.png"):
        save(tmp_path / "train" / name, 1)
    real = getattr(os, call)

    def refuse(path: Any, *more: Any, **keywords: Any) -> Any:
        if str(path).endswith("cat"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *more, **keywords)

    monkeypatch.setattr(f"os.{call}", refuse)
    with pytest.raises(ArgumentError, match=words):
        load_images(tmp_path)


def rename(folder: Path, name: str) -> None:
    (folder / "train-00000-of-00001.parquet").rename(folder / name)


@pytest.mark.parametrize("name", ["train.parquet", "train-a.parquet", "train-00000-of-00001-1a2b.parquet"])
def test_files_of_other_splits_are_left_alone(name: str, tmp_path: Path) -> None:
    for other in (
        "train_unlabeled-00000-of-00001.parquet",
        "training.parquet",
        "test-00000-of-00003.parquet",
        ".train.parquet",
    ):
        rename(write_parquet(tmp_path, [picture(200)]), other)
    rename(write_parquet(tmp_path, [picture(10)]), name)
    assert (load_images(tmp_path).images * 255).unique().round().tolist() == [10]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train-00000-of-00003.parquet", "train-00002-of-00003.parquet"], "has 2 of its 3 files; number 1 is missing"),
        (
            ["train-00000-of-00001.parquet", "train-00000-of-00001 (1).parquet"],
            r"train-00000-of-00001 \(1\).parquet, train-00000-of-00001.parquet in .* have the same number",
        ),
        (["train-00000-of-00001.parquet", "train.parquet"], "belong to different sets: train-00000.*, train.parquet"),
        (["train-00000-of-00001.parquet", "train-00000-of-00002.parquet"], "belong to different sets"),
        (["train-00000-of-99999999999.parquet"], "has 1 of its 99999999999 files; number 1 is missing"),
        (["train-1-of-3.parquet", "train-3-of-3.parquet"], "has 2 of its 3 files; number 2 is missing"),
        (["train-clean-00000-of-00001.parquet"], "expected train.parquet, train-….parquet or a folder"),
    ],
)
def test_shards_that_are_not_one_set(names: list[str], words: str, tmp_path: Path) -> None:
    for i, name in enumerate(names):
        rename(write_parquet(tmp_path / f"{i}", [picture(1)]), name)
        (tmp_path / f"{i}" / name).rename(tmp_path / name)
    with pytest.raises(ArgumentError, match=words):
        load_images(tmp_path)


def test_a_file_and_a_folder_of_one_split(tmp_path: Path) -> None:
    write_parquet(tmp_path, [picture(1)])
    save(tmp_path / "train" / "0.png", 1)
    with pytest.raises(ArgumentError, match="has both 'train-00000-of-00001.parquet' and images in train/"):
        load_images(tmp_path)


@pytest.mark.parametrize("split", ["", ".", "..", "a/b", None])
def test_what_is_no_split(split: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="split: expected a name"):
        load_images(tmp_path, split)


def test_links_to_what_is_there_already_give_nothing_twice(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "0.png", 10)
    for name in ("a", "b"):
        (tmp_path / "set" / "train" / name).mkdir(parents=True)
        (tmp_path / "set" / "train" / name / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    save(tmp_path / "set" / "train" / "z" / "1.png", 20)
    (tmp_path / "set" / "train" / "a" / "z").symlink_to(tmp_path / "set" / "train" / "z", target_is_directory=True)
    (tmp_path / "set" / "train" / "z" / "self.png").symlink_to("self.png")
    os.mkfifo(tmp_path / "set" / "train" / "z" / "pipe.png")
    with pytest.warns(DataWarning, match=r"read already: 2 \(a/z, b/link\)") as said:
        loaded = load_images(tmp_path / "set")
    assert "no regular file: 1 (z/pipe.png)" in str(said[0].message)
    assert "a link to nothing: 1 (z/self.png)" in str(said[0].message)
    assert sorted((loaded.images[:, 0, 0, 0] * 255).round().tolist()) == [10, 20]


def test_a_source_that_is_a_file_or_one_folder_up(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "data", [picture(1)])
    with pytest.raises(ArgumentError, match="Its folder 'data' has such files: pass '.*/set/data'"):
        load_images(tmp_path / "set")
    with pytest.raises(ArgumentError, match="is a file; pass the folder that it lies in"):
        load_images(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(ArgumentError, match="source: '.*' cannot be read"):
        load_images(tmp_path / ("x" * 5000))
    os.mkfifo(tmp_path / "train.parquet")
    with pytest.raises(ArgumentError, match="none of the 1 parquet files .* can be read: it is no regular file"):
        load_images(tmp_path)


def test_nothing_is_said_where_nothing_is_wrong(tmp_path: Path) -> None:
    save(tmp_path / "train" / "cat" / "0.png", 1)
    save(tmp_path / "train" / ".hidden" / "0.png", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(load_images(tmp_path).images, torch.full((1, 1, 3, 4), 1 / 255))
