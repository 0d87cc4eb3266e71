"""`energy-prior view`: what is on the page, that it needs nothing else, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import opened
from pictures import picture
from PIL import Image

from energy_prior import DivergenceError, JointEBMPrior, LadderVAE, ResidualVAE
from energy_prior._util import eight_bit
from energy_prior.cli.main import main
from energy_prior.cli.train import load_run
from energy_prior.cli.view import write_page
from energy_prior.data import Images

VOID = {"meta", "img", "link", "br", "hr", "input", "base"}


class Elements(html.parser.HTMLParser):
    """The elements of a page, each with its attributes; a tag that is not closed, or closes another, is an error."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute of {tag} is there twice"
        self.all.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.all.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def of(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        """Attributes of these elements, in order."""
        return [a for t, a in self.all if t == tag and all(a.get(k.replace("_", "-")) == v for k, v in attributes.items())]


def small(channels: int = 1, **settings: Any) -> JointEBMPrior:
    torch.manual_seed(0)
    return JointEBMPrior(LadderVAE((channels, 6, 6), latent_dims=(3, 2), hidden=8, **settings))


def images(n: int, channels: int = 1) -> torch.Tensor:
    return torch.rand(n, channels, 6, 6, generator=torch.Generator().manual_seed(n))


def stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(element: dict[str, str]) -> torch.Tensor:
    """Of an image of the page."""
    kind, _, data = element["src"].partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.size == (int(element["width"]), int(element["height"]))
        shape = (image.height, image.width) if image.mode == "L" else (image.height, image.width, 3)
        return torch.tensor(list(image.tobytes()), dtype=torch.uint8).reshape(shape)


def test_the_page_of_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One file, well-formed, that names no other; its samples and the figures of its chains are the prior's."""
    photos, out = tmp_path / "photos" / "test", tmp_path / "view.html"
    photos.mkdir(parents=True)
    for i in range(7):
        picture(30 * i, (6, 6)).save(photos / f"{i}.png")
    words = ["view", str(run), "--data", str(photos.parent), "--other", str(photos.parent), "--limit", "5", "--seed", "3"]
    words += ["-n", "5", "--steps", "6", "--out", str(out)]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    expected = {"out": str(out), "bytes": out.stat().st_size, "number": 5, "images": 5, "other": 5, "unreadable": 0}
    prior = load_run(run)
    assert report == expected | {"method": "tails", "threshold": prior.threshold(0.95), "auroc": 0.5}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos", "view.html"]

    found = Elements(out)
    assert not {tag for tag, _ in found.all} & {"link", "iframe", "object", "embed", "base", "form"}
    script = re.search(r"<script>(.*?)</script>", out.read_text(encoding="utf-8"), re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert found.of("meta", http_equiv="Content-Security-Policy")[0]["content"] == policy
    assert [a for tag, a in found.all if tag == "script"] == [{}]
    ids = [a["id"] for _, a in found.all if "id" in a]
    assert len(set(ids)) == len(ids)
    for tag, attributes in found.all:
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#samples").removeprefix("#") in ids
        assert not [name for name in attributes if name.startswith("on")], "code in an attribute"
        assert tag != "img" or "alt" in attributes
    assert not re.search(r"@import|url\(|https?:", out.read_text(encoding="utf-8"))

    shown = [pixels(a) for a in found.of("img")]
    samples = [
        prior.sample(5, prior="generator", rng=stream(3)),
        prior.sample(5, rng=stream(3), steps=6),
    ]
    torch.testing.assert_close(torch.stack(shown[:10]), eight_bit(torch.cat(samples)), rtol=0, atol=0)
    assert torch.equal(prior.sample(5, rng=stream(3), steps=0), samples[0]), "both begin alike"

    chains = prior.trajectory(3, every=1, rng=stream(3), steps=6)
    points = found.of("rect", **{"class": "hit"})
    sums = [float(a["data-sum"]) for a in points if "data-sum" in a]
    torch.testing.assert_close(torch.tensor(sums), chains.negative_energy.sum(2).T.flatten(), rtol=1e-5, atol=1e-5)
    assert [a["data-step"] for a in found.of("button", data_item="frame")] == 3 * [str(i) for i in range(7)]
    frames = prior.decode([z.flatten(0, 1) for z in chains.latents]).unflatten(0, (7, 3)).transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(torch.stack(shown[10:31]), eight_bit(frames), rtol=0, atol=0)
    counts = [int(a["data-count"]) for a in found.of("a", data_item="bar")]
    assert sum(counts) == 10
    assert len(found.of("details")) == len(counts)

    before = out.read_bytes()
    assert main(words) == 0
    assert "open it in a browser" in capsys.readouterr().out
    assert out.read_bytes() == before, "the same call writes the same page"


def test_layers_held(tmp_path: Path) -> None:
    """A row for every k: the image, its posterior draw decoded, and draws with the layers above k held."""
    prior, x = small(3), images(9, 3)
    report = write_page(prior, tmp_path / "a.html", data=x, number=2, steps=2, seed=1)
    assert (report["method"], report["threshold"], report["images"], report["other"]) == ("log_joint", None, 9, None)
    found = Elements(tmp_path / "a.html")
    shown = [pixels(a) for a in found.of("img")]
    held = torch.stack(shown[4 + 2 * 3 :][: 2 * (2 + 2 * 4)]).unflatten(0, (2, 10))
    latents = prior.sample_posterior(x[:2], method="infer", rng=stream(1))
    torch.testing.assert_close(held[:, 0], eight_bit(x[:2]), rtol=0, atol=0)
    torch.testing.assert_close(held[:, 1], eight_bit(prior.decode(latents)), rtol=0, atol=0)
    one = prior.sample(8, given={2: latents[1].repeat_interleave(4, 0)}, rng=stream(1), steps=2)
    torch.testing.assert_close(held[:, 2:6].flatten(0, 1), eight_bit(one), rtol=0, atol=0)
    torch.testing.assert_close(held[:, 6:].flatten(0, 1), eight_bit(prior.sample(8, rng=stream(1), steps=2)), rtol=0, atol=0)
    assert [t for t in found.texts if t in ("k = 0", "k = 1", "k = 2")] == 2 * ["k = 0", "k = 1", "k = 2"]


def test_without_data_it_says_what_they_would_add(tmp_path: Path) -> None:
    prior = JointEBMPrior(ResidualVAE((1, 8, 8), groups=(1, 1), channels=8, latent_channels=2))
    write_page(prior, tmp_path / "a.html", number=1, steps=1)
    found = Elements(tmp_path / "a.html")
    text = " ".join(found.texts)
    assert "With --data SOURCE there are histograms" in text
    assert "Sample 1" in text
    assert not found.of("a", data_item="bar")
    assert [a["data-step"] for a in found.of("button", data_item="frame")] == ["before", "0", "1"]
    gaussian, _, before = (pixels(a) for a in found.of("img")[:3])
    assert torch.equal(before, gaussian), "the chain comes from the first sample of the Gaussian prior"
    assert "crosses 20 of them before its step 0" in text


def test_names_are_no_html(tmp_path: Path) -> None:
    """Neither those of files nor those of the run and the sets, and nothing in them leaves its attribute."""
    bad = "\"><script>alert(1)</script><img src=x onerror='alert(2)'>{{body}}&amp;\u202e\x00"
    data = Images(images(3), None, None, (bad, bad, bad))
    write_page(small(), tmp_path / "a.html", data=data, other=data, labels=(bad, bad), title=bad, number=1, steps=1)
    found = Elements(tmp_path / "a.html")
    assert len(found.of("script")) == 1
    assert not [a for _, a in found.all if "onerror" in a]
    assert all(a["src"].startswith("data:") for a in found.of("img"))
    known = bad.replace("\u202e\x00", "\ufffd\ufffd")
    assert found.texts.count(known) >= 2, "it is shown as it is, but for what cannot be printed"
    assert {a["title"] for _, a in found.all if "title" in a} == {known}


@pytest.mark.parametrize(("number", "side"), [(2, 96), (256, 24)])
def test_the_page_stays_small(number: int, side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of noise in full colour, which no format makes smaller; with as few images as that takes nothing is scaled down."""
    prior = JointEBMPrior(LadderVAE((3, 96, 96), latent_dims=(2, 2), hidden=4))
    monkeypatch.setattr(JointEBMPrior, "anomaly_score", lambda self, x, *args, **options: torch.linspace(0, 1, len(x)))
    monkeypatch.setattr(JointEBMPrior, "sample", lambda self, n, **options: torch.rand(n, 3, 96, 96))
    noise = torch.rand(160, 3, 96, 96)
    report = write_page(prior, tmp_path / "a.html", data=noise, other=noise, number=number, steps=1)
    assert 3_000_000 * (number > 2) < report["bytes"] == (tmp_path / "a.html").stat().st_size < 5_000_000
    widths = [int(a["width"]) for a in Elements(tmp_path / "a.html").of("img")]
    assert side <= widths[0] <= side + 16
    assert min(widths) >= 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": torch.full((3, 1, 6, 6), torch.nan)}, "data: expected finite values, got 108"),
        ({"data": images(3), "other": torch.full((3, 1, 6, 6), torch.inf)}, "other: expected finite values"),
        ({"data": images(3, 3)}, r"data: expected shape \(batch, 1, 6, 6\)"),
        ({"data": images(3).mul(255).byte()}, "data: expected torch.float32"),
        ({"data": images(3)[:0]}, "data: expected at least one observation"),
        ({"other": images(3)}, "other: expected known images"),
        ({"number": 0}, "number: expected a whole number of at least 1"),
        ({"number": 257}, "number: expected at most 256"),
        ({"steps": 0}, "steps: expected a whole number of at least 1"),
        ({"seed": -1}, "seed: expected"),
        ({"data": images(3), "method": "best"}, "method: expected one of"),
        ({"path": "a.png"}, "out: expected a file ending in .html"),
        ({"method": "log_joint"}, "method: expected known images, `data`, to score"),
        ({"labels": ("a",)}, "labels: expected the names of both sets"),
        ({"path": "nowhere/a.html"}, "out: there is no folder"),
        ({"path": "folder.html"}, "is a folder"),
        ({"prior": JointEBMPrior(LadderVAE((6,), latent_dims=(2, 2), hidden=8))}, "prior: expected one of images"),
        ({"prior": JointEBMPrior(LadderVAE((2, 6, 6), latent_dims=(2, 2), hidden=8))}, "prior: expected one of images"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "folder.html").mkdir()
    prior, path = arguments.pop("prior", None) or small(), tmp_path / arguments.pop("path", "a.html")
    with pytest.raises((ValueError, OSError), match=message):
        write_page(prior, path, **{"number": 1, "steps": 1, **arguments})
    assert [p.name for p in tmp_path.iterdir()] == ["folder.html"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-n", "many"], "--number: expected a whole number, got 'many'"),
        (["-n", "1000"], "number: expected at most 256 samples on a page, got 1000"),
        (["--limit", "0"], "limit: expected a whole number of at least 1"),
        (["--other", "photos"], "--other: expected known images to compare with. Pass --data SOURCE too."),
        (["--other-split", "test"], "--other-split: expected other images to take it of. Pass --other SOURCE too."),
        (["--data", "."], "source: "),
        (["--out", "nowhere/view.html"], "out: there is no folder 'nowhere' to write the page to"),
        (["--device", "abacus"], "--device abacus: not available here"),
    ],
)
def test_errors_are_one_line(
    run: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["view", str(run), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:source. 1 of 3 images:energy_prior.DataWarning")
def test_images_without_a_score_are_counted(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be read, and what has no finite score; where none has one there is no page."""
    (tmp_path / "set" / "test").mkdir(parents=True)
    for i in range(2):
        picture(100 * i, (6, 6)).save(tmp_path / "set" / "test" / f"{i}.png")
    (tmp_path / "set" / "test" / "broken.png").write_bytes(b"\x89PNG but no more")
    plain, least = JointEBMPrior.explain, 0.2

    def explain(self: JointEBMPrior, x: torch.Tensor, **options: Any) -> Any:
        if bool((x.flatten(1).mean(1) > least).any()):
            raise DivergenceError("not finite")
        return plain(self, x, **options)

    monkeypatch.setattr(JointEBMPrior, "explain", explain)
    out = tmp_path / "view.html"
    words = ["view", str(run), "--data", str(tmp_path / "set"), "-n", "1", "--steps", "1", "--out", str(out)]
    assert main(words) == 3
    assert "2 images could not be read or scored" in capsys.readouterr().out
    assert any("1 image; 2 could not be read or scored" in text for text in Elements(out).texts)
    out.unlink()
    least = -1.0
    assert main(words) == 2
    assert "has a finite score. not finite" in capsys.readouterr().err
    assert not out.exists()


def test_a_page_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there stays, and nothing half-written beside it."""
    out = tmp_path / "a.html"
    out.write_text("before")

    def full(*places: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left on device: the page .* could not be written"):
        write_page(small(), out, number=1, steps=1)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.html", "before")]


@pytest.mark.slow
def test_in_a_browser(tmp_path: Path) -> None:
    """By mouse and keyboard, on a wide and a narrow window, and without scripts; nothing is asked of the network."""
    out = tmp_path / "a.html"
    write_page(small(), out, data=images(60), other=images(50), number=4, steps=18)
    with opened(tmp_path / "profile") as page:
        for width in (1200, 360):
            page.show(out, width=width)
            assert page.run("document.documentElement.scrollWidth") <= width
        assert page.run("[...document.images].every(i => i.complete && i.naturalWidth > 0)")

        page.run("document.querySelectorAll('[data-item=pair]')[5].click()")
        assert page.run("[...document.querySelectorAll('[data-item=pair][aria-pressed=true]')].map(b => b.ariaLabel)") == [
            "Gaussian prior, sample 2",
            "Joint prior, sample 2",
        ]
        assert page.run("document.querySelectorAll('.pair img').length") == 2

        said = "document.querySelector('.said').textContent"
        assert page.run(said).startswith("Step 18: Σ f = ")
        page.run("document.querySelector('[data-item=frame]').focus()")
        assert page.run(said).startswith("Step 0: Σ f = ")
        page.press("ArrowRight")
        page.press("Enter")
        page.run("document.activeElement.blur()")
        assert page.run(said).startswith("Step 3: Σ f = ")
        moved = "document.querySelector('.mark').getAttribute('transform')"
        before = page.run(moved)
        page.run("document.querySelector('rect[data-step=\"7\"]').dispatchEvent(new MouseEvent('click', {bubbles: true}))")
        assert page.run(said).startswith("Step 7: Σ f = ")
        assert page.run(moved) != before

        opened_now = "[...document.querySelectorAll('.second .bin')].filter(b => b.open).map(b => b.id)"
        (last,) = page.run(opened_now)
        page.run("document.querySelector('.second [data-item=bar]').focus()")
        page.press("End")
        page.press("ArrowLeft")
        page.press("Enter")
        (now,) = page.run(opened_now)
        assert now != last
        assert page.run(f"document.getElementById('{now}').offsetHeight > 0")
        assert page.run(f"document.getElementById('{last}').offsetHeight") == 0

        methods = {e["method"] for e in page.events}
        assert not methods & {"Log.entryAdded", "Runtime.exceptionThrown"}
        page.show(out, scripts=False, dark=True)
        asked = [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
        assert asked
        assert all(url.startswith(("data:image/png", out.as_uri())) for url in asked)
