"""`energy-prior score`: the table of a folder's images, what could not be read, a run that was killed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from pictures import picture

from energy_prior import DivergenceError, JointEBMPrior, LadderVAE
from energy_prior.cli.main import main
from energy_prior.cli.score import score_images
from energy_prior.cli.train import load_run, read_run

pytestmark = pytest.mark.filterwarnings("ignore:source. 1 of 11 images:energy_prior.DataWarning")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of ten images, in other sizes and colours than the model's, and one that is none."""
    place = tmp_path / "photos" / "test"
    place.mkdir(parents=True)
    for i in range(10):
        picture(20 * i, (8 + i, 9), "RGB").save(place / f"{i}.png")
    (place / "broken.png").write_bytes(b"\x89PNG but no more")
    return place.parent


def rows_of(file: Path) -> list[dict[str, Any]]:
    with file.open() as opened:
        return list(csv.DictReader(opened))


def test_a_table_of_a_folder(run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scores.csv"
    assert main(["score", str(run), "--data", str(images), "--out", str(out), "--batch-size", "4"]) == 3
    rows = {Path(row["name"]).name: row for row in rows_of(out)}
    assert set(rows) == {*(f"{i}.png" for i in range(10)), "broken.png"}
    assert not rows["broken.png"]["score"]
    assert rows["broken.png"]["error"]
    threshold = load_run(run).threshold(0.95)
    for name, row in rows.items():
        if name != "broken.png":
            terms = [float(row[t]) for t in ("reconstruction", "rate", "negative_energy", "norms")]
            assert float(row["score"]) == pytest.approx(sum(terms), rel=1e-4)
            assert row["flagged"] == str(float(row["score"]) > threshold)
    printed = capsys.readouterr().out
    assert "11 images" in printed
    assert "1 images could not be read" in printed
    assert [p.name for p in tmp_path.iterdir() if "scores" in p.name] == ["scores.csv"], "nothing is left over"


def test_parquet_and_json(run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "test" / "broken.png").unlink()
    out = tmp_path / "scores.parquet"
    words = ["score", str(run), "--data", str(images), "--out", str(out), "--method", "reconstruction", "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {
        "images": 10,
        "unreadable": 0,
        "flagged": None,
        "threshold": None,
        "method": "reconstruction",
        "out": str(out),
    }
    table = pq.read_table(out).to_pydict()
    assert list(table) == ["name", "score", "flagged", "error"]
    first = table["score"]
    assert main(words) == 0
    assert pq.read_table(out).to_pydict()["score"] == first, "scores that draw have a seed"


def test_a_killed_run_goes_on(run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third batch is interrupted, and the file's last line is cut; another table is not mistaken for it."""
    whole, out = tmp_path / "whole.csv", tmp_path / "scores.csv"
    prior, plain = load_run(run), JointEBMPrior.explain
    score_images(prior, str(images), whole, batch_size=2)
    seen: list[int] = []

    def explain(self: JointEBMPrior, x: Any, **keywords: Any) -> Any:
        seen.append(len(x))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return plain(self, x, **keywords)

    monkeypatch.setattr(JointEBMPrior, "explain", explain)
    with pytest.raises(KeyboardInterrupt):
        score_images(prior, str(images), out, batch_size=2)
    part = tmp_path / ".scores.csv.part.jsonl"
    part.write_text(part.read_text()[:-20])
    score_images(prior, str(images), out, batch_size=2)
    assert len(seen) == 3 + 4, "the first batch is not scored again"
    assert out.read_text() == whole.read_text()
    seen.append(0)
    part.write_text("another\n" + "x" * 30)
    score_images(prior, str(images), out, batch_size=2)
    assert len(seen) == 7 + 1 + 5
    assert out.read_text() == whole.read_text()


def test_rows_of_another_generator_are_dropped(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prior's own state does not hold the generator."""
    generator = LadderVAE((1, 6, 6), latent_dims=(2, 2), hidden=8)
    prior, plain, calls = JointEBMPrior(generator), JointEBMPrior.anomaly_score, list[int]()

    def score(self: JointEBMPrior, x: Any, *arguments: Any, **keywords: Any) -> Any:
        calls.append(len(x))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, x, *arguments, **keywords)

    monkeypatch.setattr(JointEBMPrior, "anomaly_score", score)
    with pytest.raises(KeyboardInterrupt):
        score_images(prior, str(images), tmp_path / "a.csv", batch_size=2)
    with torch.no_grad():
        generator.pixels.log_sigma.add_(1.0)
    score_images(prior, str(images), tmp_path / "a.csv", batch_size=2)
    assert len(calls) == 2 + 5, "every batch again"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "scores.txt"], "out: expected a file ending in .csv or .parquet"),
        (["--quantile", "1.5"], "quantile: expected"),
        (["--quantile", "most"], "--quantile: expected a number, got 'most'"),
        (["--batch-size", "0"], "batch_size: expected"),
        (["--method", "best"], "method: expected one of"),
        (["--split", "nothing"], "nothing"),
        (["--out", "nowhere/scores.csv"], "out: there is no folder 'nowhere'"),
        (["--device", "nothing"], "--device nothing: not available"),
    ],
)
def test_errors_are_one_line(
    words: list[str], message: str, run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--out", str(tmp_path / "scores.csv")] if "--out" not in words else []
    assert main(["score", str(run), "--data", str(images), *given, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.glob("*scores*"))


def test_a_prior_of_no_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prior: expected one of images"):
        score_images(JointEBMPrior(LadderVAE((6,), latent_dims=(2, 2), hidden=8)), "anywhere", tmp_path / "a.csv")


def test_images_without_a_finite_score_have_a_row(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the same batch have theirs."""
    prior = JointEBMPrior(LadderVAE((1, 6, 6), latent_dims=(2, 2), hidden=8))
    plain = JointEBMPrior.anomaly_score

    def score(self: JointEBMPrior, x: Any, *arguments: Any, **keywords: Any) -> Any:
        if bool((x.flatten(1).mean(1) > 0.3).any()):
            raise DivergenceError("not finite")
        return plain(self, x, *arguments, **keywords)

    monkeypatch.setattr(JointEBMPrior, "anomaly_score", score)
    report = score_images(prior, str(images), tmp_path / "a.csv")
    errors = {Path(row["name"]).name: row["error"] for row in rows_of(tmp_path / "a.csv")}
    assert report["unreadable"] == sum(bool(why) for why in errors.values()) > 1
    assert errors["9.png"] == "not finite"
    assert not errors["0.png"]


def test_images_are_read_as_the_run_read_them(run: Path) -> None:
    assert read_run(run)[1] == {"value_range": None, "channel_order": None, "background": 1.0}


def test_a_prior_that_is_not_calibrated_has_no_threshold(images: Path, tmp_path: Path) -> None:
    prior = JointEBMPrior(LadderVAE((1, 6, 6), latent_dims=(2, 2), hidden=8))
    report = score_images(prior, str(images), tmp_path / "a.csv")
    assert (report["method"], report["threshold"], report["unreadable"]) == ("log_joint", None, 1)
    assert torch.tensor([float(r["score"]) for r in rows_of(tmp_path / "a.csv")[:10]]).isfinite().all()
