"""`SampleTask`: its report against the functions that it is made of, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from energy_prior import ArgumentError, DataWarning, ShapeError
from energy_prior.evaluate import SampleTask, gap_closed, inception_score, kernel_distance, nearest, precision_recall

IMAGES = torch.rand(60, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def corners(images: Tensor) -> Tensor:
    """Features of four pixels."""
    return images[:, 0, :2, :2].flatten(1)


def task(images: Tensor = IMAGES, **options: Any) -> SampleTask:
    settings: dict[str, Any] = {"features": corners} | options
    return SampleTask.halves(images, **settings)


def of_brightness(share: float) -> Callable[[int], Tensor]:
    noise = torch.Generator().manual_seed(2)
    return lambda n: share * torch.rand(n, 1, 6, 6, generator=noise)


def test_distances_are_to_images_that_are_not_reconstructed() -> None:
    seen: list[Tensor] = []

    def features(x: Tensor) -> Tensor:
        seen.append(x)
        return corners(x)

    asked: list[Tensor] = []

    def reconstruct(x: Tensor) -> Tensor:
        asked.append(x)
        return x / 2

    report = task(features=features, batch_size=8).report({"dark": of_brightness(0.3)}, reconstruct, draws=2, progress=False)
    reference, others = torch.cat(seen[:4]), torch.cat(seen[4:8])
    assert {tuple(x.flatten().tolist()) for x in torch.cat([reference, others])} == {
        tuple(x.flatten().tolist()) for x in IMAGES
    }
    assert torch.equal(torch.cat(asked), others)
    assert torch.equal(torch.cat(seen[8:12]), others / 2)
    assert (report.images, report.draws, report.network) == (30, 2, "your own")
    real, dark = report.figures["real images"], report.figures["dark"]
    assert real["kernel"] == (pytest.approx(kernel_distance(corners(others), corners(reference))), None)
    assert (real["precision"][0], real["recall"][0]) == precision_recall(corners(reference), corners(others))  # type: ignore[index]
    assert dark["frechet"].sd > 0  # type: ignore[union-attr]
    assert dark["inception_score"] is None
    classes = lambda f: f.softmax(1)  # noqa: E731
    scored = task(probabilities=classes, network="four pixels").report({"dark": of_brightness(0.3)}, draws=1, progress=False)
    found = scored.figures["real images"]["inception_score"]
    assert found == (pytest.approx(inception_score(classes(corners(others)))), None)
    assert "features of four pixels" in str(scored)


def test_share_of_the_gap() -> None:
    """Reconstructions are the images themselves, the generator's samples are dark, those of the joint prior half as dark."""
    priors = {"generator": of_brightness(0.05), "joint": of_brightness(0.5)}
    report = task().report(priors, lambda x: x, progress=False)
    distances = [report.figures[kind]["frechet"].mean for kind in ("joint", "generator", "reconstructions")]  # type: ignore[union-attr]
    assert report.gap_closed == {"joint": pytest.approx(gap_closed(*distances))}
    assert 0.3 < report.gap_closed["joint"] < 0.9  # type: ignore[operator]
    few = task(features=lambda x: x.flatten(1)).report(priors, lambda x: x, progress=False)  # 36 features of 30 images
    assert few.figures["joint"]["frechet"] is None
    assert "Fréchet distances need more than 36 images a side" in str(few)
    kernels = [few.figures[kind]["kernel"].mean for kind in ("joint", "generator", "reconstructions")]  # type: ignore[union-attr]
    assert few.gap_closed == {"joint": pytest.approx(gap_closed(*kernels))}
    alike = {"generator": of_brightness(1.0), "joint": of_brightness(1.0)}
    assert task().report(alike, lambda x: x, progress=False).gap_closed == {"joint": None}, "no gap beyond the spread"
    assert task().report(priors, progress=False).gap_closed == {"joint": None}, "nothing says how large the gap is"


def test_the_report_as_a_table_and_as_json() -> None:
    report = task().report({"generator": of_brightness(0.05), "joint": of_brightness(0.5)}, lambda x: x, progress=False)
    lines = str(report).splitlines()
    assert len(lines) == 2 + 4
    assert lines[-1].startswith("joint ")
    assert lines[-1].endswith(f"{report.gap_closed['joint']:.3f}")
    document = json.loads(json.dumps(report.document()))
    assert document["figures"]["joint"]["gap_closed"] == report.gap_closed["joint"]
    assert document["figures"]["generator"]["frechet"]["mean"] == report.figures["generator"]["frechet"].mean  # type: ignore[union-attr]
    assert "gap_closed" not in document["figures"]["generator"]


def test_values_outside_the_range_are_clamped() -> None:
    inside = task().report({"a": lambda n: torch.ones(n, 1, 6, 6)}, draws=1, progress=False)
    outside = task().report({"a": lambda n: torch.full((n, 1, 6, 6), 1.2)}, draws=1, progress=False)
    assert inside == outside


def test_draws_that_are_the_same_are_said_to_be() -> None:
    with pytest.warns(DataWarning, match=r"priors\['fixed'\]: all 3 draws are the same images"):
        task().report({"fixed": lambda n: IMAGES[:n]}, progress=False)


def test_arrays_are_images_too() -> None:
    priors = {"a": lambda n: IMAGES[:n].numpy()}
    report = SampleTask.halves(IMAGES.numpy(), features=lambda x: corners(x).numpy()).report(priors, draws=1, progress=False)  # type: ignore[arg-type,return-value]
    assert report == task().report({"a": lambda n: IMAGES[:n]}, draws=1, progress=False)


halves: Any = SampleTask.halves


def report(*arguments: Any, **settings: Any) -> Any:
    return task().report(*arguments, **settings)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: task(IMAGES[:7]), ShapeError, "images: expected 8 or more, got 7"),
        (lambda: task(IMAGES[0]), ShapeError, r"images: expected images, \(n, 1 or 3, height, width\), got \(1, 6, 6\)"),
        (lambda: task(IMAGES.expand(-1, 2, -1, -1)), ShapeError, r"got \(60, 2, 6, 6\)"),
        (lambda: halves("a"), ShapeError, "images: expected a tensor or an array, got str"),
        (lambda: task(seed=-1), ArgumentError, "seed: expected a whole number of at least 0"),
        (lambda: task(batch_size=0), ArgumentError, "batch_size: expected a whole number of at least 1"),
        (lambda: task(device="nowhere"), ArgumentError, "device nowhere: not available here"),
        (lambda: task(features=3), ArgumentError, "features: expected a function, got int"),
        (lambda: task(features=None), ArgumentError, "features: expected a function, got NoneType"),
        (lambda: task(probabilities=3), ArgumentError, "probabilities: expected a function, got int"),
        (lambda: report({"a": None}), ArgumentError, r"priors\['a'\]: expected a function, got NoneType"),
        (lambda: task(255 * IMAGES), ArgumentError, r"images: expected floating-point values in \[0, 1\], got .* x / 255"),
        (lambda: task((255 * IMAGES).to(torch.uint8)), ArgumentError, "got torch.uint8 from"),
        (lambda: task(1.0005 * IMAGES.round()), ArgumentError, "from 0 to 1.0005"),
        (lambda: task(IMAGES * torch.nan), ArgumentError, "images: expected finite images, got NaN"),
        (lambda: SampleTask(IMAGES[:5], IMAGES[:6]), ShapeError, "as many images on either side, 4 or more"),
        (lambda: report({}), ArgumentError, "priors: expected a dict of one or more functions"),
        (lambda: report([len]), ArgumentError, "priors: .* got list"),
        (
            lambda: report({"reconstructions": len}),
            ArgumentError,
            "other names than 'real images' and 'reconstructions'",
        ),
        (lambda: report({"a": IMAGES}), ArgumentError, r"priors\['a'\]: expected a function, got Tensor"),
        (lambda: report({"a": of_brightness(1.0)}, 3), ArgumentError, "reconstruct: expected a function, got int"),
        (lambda: report({"a": of_brightness(1.0)}, draws=0), ArgumentError, "draws: expected a whole number"),
        (
            lambda: report({"a": lambda n: IMAGES[:3]}),
            ShapeError,
            r"a: expected images of shape \(30, 1, 6, 6\), got \(3,",
        ),
        (lambda: report({"a": lambda n: None}), ShapeError, "a: expected a tensor or an array, got NoneType"),
        (lambda: report({"a": lambda n: (IMAGES,)}), ShapeError, "a: expected a tensor or an array, got tuple"),
        (lambda: report({"a": lambda n: 2 * IMAGES[:n] - 1}), ArgumentError, r"a: .* far outside, from -.* Scale them"),
        (lambda: report({"a": lambda n: IMAGES[:n] * torch.nan}), ArgumentError, "a: expected finite images"),
        (
            lambda: report({"a": of_brightness(1.0)}, lambda x: x[:1]),
            ShapeError,
            "reconstruct: expected images of shape",
        ),
        (lambda: report({"a": of_brightness(1.0)}, lambda x: x / 0), ArgumentError, "reconstruct: expected finite"),
        (lambda: task(features=lambda x: x).report({"a": of_brightness(1.0)}), ArgumentError, r"features: expected \(30, d\)"),
        (lambda: task(features=lambda x: None).report({"a": of_brightness(1.0)}), ShapeError, "features: expected a tensor"),
        (
            lambda: task(features=lambda x: torch.zeros(len(x), 0)).report({"a": of_brightness(1.0)}),
            ArgumentError,
            r"features: expected \(30, d\) of floating-point numbers, got \(30, 0\)",
        ),
        (
            lambda: task(probabilities=lambda f: f[1:].softmax(1)).report({"a": of_brightness(1.0)}),
            ShapeError,
            r"probabilities: expected \(30, classes\), got \(29, 4\)",
        ),
    ],
)
def test_bad_input(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_nearest_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("energy_prior.evaluate.samples._AT_ONCE", 2)
    samples = IMAGES[[5, 9, 40]] + 0.001
    numbers, distances = nearest(samples, IMAGES, count=3)
    everything = torch.cdist(samples.flatten(1), IMAGES.flatten(1), compute_mode="donot_use_mm_for_euclid_dist").sort()
    assert torch.equal(numbers, everything.indices[:, :3])
    assert numbers[:, 0].tolist() == [5, 9, 40]
    torch.testing.assert_close(distances, everything.values[:, :3], rtol=1e-6, atol=0)
    assert bool((nearest(IMAGES.repeat(3, 1, 1, 1), IMAGES)[1] == 0).all()), "copies are at no distance"
    assert [x.shape for x in nearest(samples[:0], IMAGES)] == [(0, 1), (0, 1)]
    for wrong in (IMAGES[:2], IMAGES[:, :, 1:]):
        with pytest.raises(ShapeError, match="samples, images: expected one shape"):
            nearest(samples, wrong, count=3)
    bytes_ = (255 * IMAGES).to(torch.uint8)
    assert nearest(bytes_[:2], bytes_)[0].flatten().tolist() == [0, 1]
    with pytest.raises(ArgumentError, match="images: expected finite values"):
        nearest(samples, IMAGES / 0)
