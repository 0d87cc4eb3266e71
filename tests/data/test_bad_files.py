"""Files that cannot be read, columns and labels of every kind: words with the row, or going on without it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import encoded, table
from PIL import Image

from energy_prior import ArgumentError, DataWarning
from energy_prior.cli.main import main
from energy_prior.data import ImageStream, load_images

GOOD = [encoded(Image.fromarray(np.full((4, 4), v, np.uint8))) for v in (10, 20, 30)]
LARGE, BOMB = (encoded(Image.new("L", (side, side))) for side in (90, 200))
NOISE = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)))


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 5000)


BAD: dict[str, tuple[Any, str]] = {
    "null": (None, "there is no image"),
    "empty": (b"", "it is empty"),
    "text": (b"no image at all", "it is no image that Pillow can read"),
    "truncated": (NOISE[: len(NOISE) // 2], "it cannot be read as an image"),
    "oversized": (LARGE, "it has 90 × 90 pixels, and Pillow's limit is 5000|.*decompression bomb"),
    "a bomb": (BOMB, ".*decompression bomb"),
    "broken chunk": (
        GOOD[0][:30] + b"\0" * 20 + GOOD[0][50:],
        "it cannot be read as an image|it is no image that",
    ),
}


@pytest.mark.usefixtures("small_limit")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("kind", "in_folder"), [(k, f) for k in BAD for f in (True, False) if k != "null" or not f])
def test_a_bad_image_is_named_or_skipped(kind: str, in_folder: bool, tmp_path: Path) -> None:
    content, why = BAD[kind]
    if in_folder:
        (tmp_path / "train").mkdir()
        for i, data in enumerate([GOOD[0], content, *GOOD[1:]]):
            (tmp_path / "train" / f"{i}.png").write_bytes(data)
    else:
        table(tmp_path, image=pa.array([GOOD[0], content, *GOOD[1:]], pa.binary()))
    name = "1.png" if in_folder else "train.parquet, row 1"
    with pytest.raises(ArgumentError, match=f"source: '{name}' of .* cannot be used: ({why}).*on_error=\"skip\""):
        load_images(tmp_path)
    with pytest.warns(DataWarning, match=f"1 of 4 images of .* were left out .{name}: ({why})"):
        got = load_images(tmp_path, on_error="skip")
    assert sorted((got.images[:, 0, 0, 0] * 255).round().tolist()) == [10, 20, 30]
    stream = ImageStream(tmp_path, size=4, batch_size=3, channels=1, on_error="skip")
    with pytest.warns(DataWarning, match="1 of 4 images"):
        assert len(list(stream)) == 1
    with pytest.raises(ArgumentError, match=f"'{name}'"):
        list(ImageStream(tmp_path, size=4, batch_size=3, channels=1))


def damage_start(path: Path) -> None:
    path.write_bytes(b"PAR0")


def damage_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4:60] = b"\xff" * 56  # where the first page says how long it is
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("damage", [damage_start, damage_middle, truncate])
@pytest.mark.parametrize("number", [0, 1])
def test_a_broken_shard_is_named_or_skipped(damage: Callable[[Path], None], number: int, tmp_path: Path) -> None:
    for i in range(2):
        pq.write_table(pa.table({"image": [NOISE] * 3, "label": [0, 1, 2]}), tmp_path / f"train-0000{i}-of-00002.parquet")
    damage(tmp_path / f"train-0000{number}-of-00002.parquet")
    with pytest.raises(ArgumentError, match=f"source: 'train-0000{number}-of-00002.parquet' of .* cannot be used: it "):
        load_images(tmp_path)
    with pytest.warns(DataWarning, match=f"left out .train-0000{number}-of-00002.parquet: it "):
        assert len(load_images(tmp_path, on_error="skip").images) == 3


def test_no_shard_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"")
    for on_error in ("raise", "skip"):
        with pytest.raises(ArgumentError, match="none of the 1 parquet files of .* can be read: "):
            load_images(tmp_path, on_error=on_error)  # type: ignore[arg-type]


def test_a_shard_with_other_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": GOOD}), tmp_path / "train-00000-of-00002.parquet")
    pq.write_table(pa.table({"img": GOOD}), tmp_path / "train-00001-of-00002.parquet")
    with pytest.raises(
        ArgumentError, match="'train-00001-of-00002.parquet' of .* has no column 'image', other than 'train-00000"
    ):
        load_images(tmp_path)
    pq.write_table(pa.table({"image": GOOD, "label": [1, 2, 3]}), tmp_path / "train-00001-of-00002.parquet")
    with pytest.raises(
        ArgumentError, match="'train-00001-of-00002.parquet' of .* has a column 'label', other than 'train-00000"
    ):
        load_images(tmp_path)
    assert len(load_images(tmp_path, label_column=False).images) == 6


def named(path: Path, names: list[str], labels: list[int]) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    datasets.Dataset.from_dict({"image": struct(GOOD), "label": labels}, features=features).to_parquet(str(path))


def test_shards_that_name_their_classes_differently(tmp_path: Path) -> None:
    for i, names in enumerate((["a", "b"], ["b", "a"])):
        named(tmp_path / f"train-0000{i}-of-00002.parquet", names, [0, 1, 0])
    with pytest.raises(ArgumentError, match=r"name their classes differently, \('a', 'b'\) and \('b', 'a'\)"):
        load_images(tmp_path)


def test_labels_without_a_name(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    named(path, ["a", "b"], [0, -1, 1])
    loaded = load_images(tmp_path)
    assert loaded.labels is not None
    assert (loaded.labels.tolist(), loaded.classes) == ([0, -1, 1], ("a", "b")), "-1: held back, as on the hub"
    rows = pq.read_table(path)
    other = rows.set_column(1, "label", pa.array([0, 7, 1])).replace_schema_metadata(rows.schema.metadata)
    pq.write_table(other, path)
    with pytest.raises(ArgumentError, match="has 2 names of classes, and a label 7 without one"):
        load_images(tmp_path)


def test_names_as_labels_are_numbered_as_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    named(path, ["b", "a", "c"], [0, 1, 2])
    rows = pq.read_table(path)
    pq.write_table(rows.set_column(1, "label", pa.array(["a", "b", "a"])).replace_schema_metadata(rows.schema.metadata), path)
    loaded = load_images(tmp_path)
    assert loaded.labels is not None
    assert (loaded.labels.tolist(), loaded.classes) == ([1, 0, 1], ("b", "a", "c"))


def struct(images: list[bytes]) -> list[dict[str, Any]]:
    return [{"bytes": data, "path": None} for data in images]


def test_which_column_has_the_images(tmp_path: Path) -> None:
    both = table(tmp_path / "a", img=struct(GOOD), image=struct(GOOD[::-1]))
    assert (load_images(both).images[:, 0, 0, 0] * 255).round().tolist() == [30, 20, 10]
    assert (load_images(both, column="img").images[:, 0, 0, 0] * 255).round().tolist() == [10, 20, 30]
    only = table(tmp_path / "b", scan=struct(GOOD), mask=["a", "b", "c"])
    assert len(load_images(only).images) == 3
    two = table(tmp_path / "c", left=struct(GOOD), right=GOOD)
    with pytest.raises(ArgumentError, match="column: .* has several columns of images, 'left', 'right'; name one of them"):
        load_images(two)
    assert len(load_images(two, column="right").images) == 3
    with pytest.raises(ArgumentError, match="column: .* has no column 'x'; there are 'left', 'right'"):
        load_images(two, column="x")
    with pytest.raises(ArgumentError, match=r"column: expected images in the column 'image' of .*, got list<.*int64>"):
        load_images(table(tmp_path / "d", image=[[1, 2], [3, 4]]))
    with pytest.raises(ArgumentError, match="column: expected images in the column 'image' of .*, got string"):
        load_images(table(tmp_path / "e", image=["a.png"]))


@pytest.mark.parametrize(
    ("labels", "want", "classes"),
    [
        ([2, 0, 2], [2, 0, 2], None),
        ([1.0, 0.0, 3.0], [1, 0, 3], None),
        (["dog", "cat", "dog"], [1, 0, 1], ("cat", "dog")),
        ([True, False, True], [1, 0, 1], None),
    ],
)
def test_labels(labels: list[Any], want: list[int], classes: Any, tmp_path: Path) -> None:
    got = load_images(table(tmp_path, image=GOOD, label=labels))
    assert got.labels is not None
    assert (got.labels.tolist(), got.classes) == (want, classes)


@pytest.mark.parametrize(
    "labels", [[1e300, 2.0, 1.0], [0.5, 1.0, 2.0], [1, None, 2], [[1], [2], [3]], [float("nan"), 1.0, 1.0]]
)
def test_labels_that_are_none(labels: list[Any], tmp_path: Path) -> None:
    folder = table(tmp_path, image=GOOD, label=labels, other=[1, 2, 3])
    with pytest.raises(ArgumentError, match=r"label_column: expected whole numbers or names as labels in .*, got .*row [01]\)"):
        load_images(folder)
    assert load_images(folder, label_column=False).labels is None
    other = load_images(folder, label_column="other").labels
    assert other is not None
    assert other.tolist() == [1, 2, 3]
    with pytest.raises(ArgumentError, match="label_column: .* has no column 'x'"):
        load_images(folder, label_column="x")


def test_damaged_exif_is_no_error_of_pillow(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "PNG", exif=b"Exif\0\0MM\xd7*\0\0\0\x08\0\0\0\0\0\0")
    with pytest.raises(ArgumentError, match="row 0' of .* cannot be used: it cannot be read as an image"):
        load_images(table(tmp_path, image=[buffer.getvalue()]))
    with pytest.raises(ArgumentError, match="its bytes are missing, and paths in tables are not followed"):
        load_images(
            table(
                tmp_path,
                image=pa.array([{"bytes": None, "path": "a.png"}], pa.struct({"bytes": pa.binary(), "path": pa.string()})),
            )
        )


def test_streams_are_copied_and_pickled_and_take_any_numbers(tmp_path: Path) -> None:
    stream = ImageStream(table(tmp_path, image=GOOD), size=4, batch_size=3, channels=1, buffer=10**30)
    assert len(list(copy.deepcopy(stream))) == 1
    assert pickle.dumps(stream)
    assert len(load_images(tmp_path, limit=10**30).images) == 3
    with pytest.raises(ArgumentError, match="batch_size: expected at most 0"):
        list(ImageStream(tmp_path, size=4, batch_size=1, channels=1, skip=10**30, world=10**30))


def test_a_pass_that_was_broken_off_is_not_counted(tmp_path: Path) -> None:
    stream = ImageStream(table(tmp_path, image=[*GOOD, b"bad"]), size=4, batch_size=1, channels=1, on_error="skip")
    next(iter(stream))
    with pytest.warns(DataWarning, match="1 of 4 images"):
        assert len(list(stream)) == 3


@pytest.mark.parametrize("name", ["imagefolder", "parquet", "json"])
def test_a_kind_of_files_is_no_set(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=f"'{name}' is a kind of files, no set on the hub"):
        load_images(name)


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(
        ArgumentError, match="loading it from the hub failed: no route to host.*Without a network, pass a folder"
    ):
        load_images("someone/something")


def test_a_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"img": [*struct(GOOD[:2]), None], "label": [1, 0, 0]}, features=features)
    for streaming in (False, True):
        monkeypatch.setattr(
            "datasets.load_dataset", lambda *_, streaming=streaming, **__: rows.to_iterable_dataset() if streaming else rows
        )
        with pytest.warns(DataWarning, match="1 of 3 images of 'some/set' were left out .row 2: there is no image"):
            got = load_images("some/set", on_error="skip", streaming=streaming)
        assert got.labels is not None
        assert (got.labels.tolist(), got.classes) == ([1, 0], ("a", "b"))


def no_split(folder: Path) -> None:
    (folder / "test").mkdir()


def bad_row(folder: Path) -> None:
    table(folder, image=[GOOD[0], b"no image"] * 4)


def bad_shard(folder: Path) -> None:
    (folder / "train.parquet").write_bytes(b"PAR1")


def loose(folder: Path) -> None:
    for name in ("0.png", "cat/1.png"):
        (folder / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "train" / name).write_bytes(GOOD[0])
    (folder / "train" / "notes.txt").write_text("a")


def numbers(folder: Path) -> None:
    table(folder, image=[[[0, 99999]]] * 8)


@pytest.mark.parametrize("make", [no_split, bad_row, bad_shard, loose, numbers])
def test_the_command_line_says_it_in_one_line(
    make: Callable[[Path], None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    make(data)
    assert main(["train", "--data", str(data), "--out", str(out), "--set", "data.validation=2"]) == 2
    said = capfd.readouterr()
    assert said.err.startswith("energy-prior: data.")
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert not out.exists()


@pytest.mark.parametrize(("encoding", "fine"), [("utf-8-sig", True), ("utf-16", True), ("latin-1", False)])
def test_a_recipe_in_another_encoding(encoding: str, fine: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"data: {{source: {tmp_path}/Bücher}}\n", encoding=encoding)
    assert main(["train", str(file)]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert ("there is no folder" in said and "Bücher" in said) if fine else "expected text in UTF-8" in said
