"""Detection: its figures on raw scores against their definitions, and what the protocols train and test on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from energy_prior import ArgumentError, MissingExtraError, ShapeError
from energy_prior.evaluate import DetectionTask, detection


def test_detection_keeps_scores_of_hundreds_of_nats_apart() -> None:
    """No sigmoid in float32, which would tie them."""
    known, unknown = torch.tensor([500.0, 501.0, 502.0]), torch.tensor([502.5, 503.0])
    assert detection(known, unknown) == (1.0, 1.0, 1.0, 0.0, 0.0, 0.4)
    assert detection(unknown, known).auroc == 0.0


def test_detection_takes_numbers_of_any_kind() -> None:
    """Lists, arrays, tensors that require gradients; infinite scores have their rank."""
    known, unknown = [1, 2.5, -float("inf")], np.array([3, 4], np.int16)
    assert detection(known, unknown).auprc == 1.0
    grown = torch.tensor([float("inf"), 3.0], requires_grad=True)
    assert detection(torch.tensor(known, dtype=torch.bfloat16), grown).auprc == 1.0


def test_figures_against_their_definitions() -> None:
    """Ranks by hand: of the unknown scores 1, 3, 5 and 7 among the known 0, 2, 4, 6."""
    found = detection([0.0, 2.0, 4.0, 6.0], [1.0, 3.0, 5.0, 7.0])
    assert found.auroc == pytest.approx(10 / 16)  # pairs in the right order
    precision, recall = [1, 1 / 2, 2 / 3, 2 / 4, 3 / 5, 3 / 6, 4 / 7], [1, 1, 2, 2, 3, 3, 4]
    assert found.average_precision == pytest.approx((1 + 2 / 3 + 3 / 5 + 4 / 7) / 4)
    points = [(0.0, 1.0), *((r / 4, p) for r, p in zip(recall, precision)), (1.0, 4 / 8)]
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(points, points[1:]))
    assert found.auprc == pytest.approx(area)
    assert found.fpr80 == found.fpr95 == 3 / 4  # all four unknown ones are flagged from score 1 on, and with it 2, 4 and 6
    assert detection(range(100), [79.5] * 4 + [-1.0]).fpr80 == pytest.approx(0.2)
    assert found.positives == 0.5
    assert detection(range(5), range(5)).fpr80 == pytest.approx(0.8), "points on a straight piece count too"


@pytest.mark.parametrize(
    ("known", "unknown", "error", "words"),
    [
        ([], [1.0], ShapeError, "known: expected one score or more"),
        ([1.0], torch.zeros(0), ShapeError, "unknown: expected one score or more"),
        ([1.0], [[1.0]], ShapeError, r"unknown: .* got the shape \(1, 1\)"),
        ([1.0, float("nan")], [1.0], ArgumentError, "known: expected numbers, and 1 of 2 scores are NaN"),
        (["a"], [1.0], ShapeError, "known: expected scores, .* got list"),
        ([1.0], None, ShapeError, "unknown: expected scores, .* got NoneType"),
    ],
)
def test_what_detection_refuses(known: Any, unknown: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        detection(known, unknown)


def test_a_missing_extra_names_its_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(MissingExtraError, match=r'pip install "energy-prior\[eval\]"'):
        detection(torch.zeros(2), torch.ones(2))


LABELS = torch.arange(100) % 5
IMAGES = torch.arange(100.0).reshape(100, 1, 1, 1)
"""A hundred images of five classes, each its own number."""


def numbers(x: Tensor) -> set[int]:
    return {int(v) for v in x.flatten()}


def test_zenati_trains_on_a_share_of_the_known_and_tests_on_every_unknown() -> None:
    task = DetectionTask.zenati(IMAGES, LABELS, 3, seed=1)
    assert task.name == "zenati, class 3"
    assert numbers(task.unknown) == set(range(3, 100, 5))
    assert (len(task.train), len(task.known)) == (64, 16)
    assert numbers(task.train) | numbers(task.known) == set(range(100)) - numbers(task.unknown)
    assert not numbers(task.train) & numbers(task.known)
    again, other = (DetectionTask.zenati(IMAGES, LABELS, 3, seed=seed) for seed in (1, 2))
    assert torch.equal(task.train, again.train)
    assert not torch.equal(task.train, other.train)
    assert torch.equal(DetectionTask.zenati(IMAGES, LABELS, np.int64(3), seed=1).train, task.train)  # type: ignore[arg-type]
    two = DetectionTask.zenati(IMAGES, LABELS, [0, 3], share=0.5)
    assert (two.name, len(two.train), len(two.unknown)) == ("zenati, classes 0, 3", 30, 40)


def test_test_split_holds_the_class_out_of_training_alone() -> None:
    task = DetectionTask.test_split((IMAGES[:60], LABELS[:60]), (IMAGES[60:], LABELS[60:]), 0, name="digit 0")
    assert task.name == "digit 0"
    assert numbers(task.train) == {i for i in range(60) if i % 5}
    assert numbers(task.known) == {i for i in range(60, 100) if i % 5}
    assert numbers(task.unknown) == {60, 65, 70, 75, 80, 85, 90, 95}


def test_in_and_out_have_equal_size() -> None:
    task = DetectionTask.in_and_out("a/b", IMAGES[:50], IMAGES[50:70], IMAGES[70:], seed=3)
    assert (len(task.train), len(task.known), len(task.unknown)) == (50, 20, 20)
    assert numbers(task.known) == set(range(50, 70))
    assert len(numbers(task.unknown) & set(range(70, 100))) == 20
    assert len(DetectionTask.in_and_out("a/b", IMAGES, IMAGES, IMAGES, limit=7).unknown) == 7


def test_rows_of_a_task() -> None:
    """Scores get every observation once, in parts, and become one row per figure."""
    task, seen = DetectionTask.zenati(IMAGES, LABELS, 3), []

    def score(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x.flatten()

    rows = task.rows({"": score, "halved": lambda x: (x.flatten() / 2).numpy()}, batch_size=10)
    assert seen == [10, 6, 10, 10]
    assert {row["case"] for row in rows} == {"zenati, class 3"}
    figures = {row["metric"]: row["value"] for row in rows}
    assert len(rows) == len(figures) == 12
    assert figures["auroc"] == figures["auroc_halved"] == detection(task.known.flatten(), task.unknown.flatten()).auroc
    assert figures["positives"] == 20 / 36


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: DetectionTask.zenati(IMAGES, None, 3),
            ShapeError,
            "labels: expected a class for each of the 100 images, got none",
        ),
        (lambda: DetectionTask.zenati(IMAGES, LABELS[:4], 3), ShapeError, r"labels: .* got \(4,\)"),
        (
            lambda: DetectionTask.zenati(IMAGES, LABELS, 7),
            ArgumentError,
            r"unknown: expected classes among \[0, 1, 2, 3, 4\], got 7",
        ),
        (
            lambda: DetectionTask.zenati(IMAGES, LABELS, [3, 77]),
            ArgumentError,
            r"unknown: expected classes among .* got \[3, 77\]",
        ),
        (lambda: DetectionTask.zenati(IMAGES, LABELS, 3, share=0.01), ArgumentError, "share: expected a share that leaves"),
        (lambda: DetectionTask.zenati(IMAGES, LABELS, range(5)), ArgumentError, "there have to be known and unknown"),
        (lambda: DetectionTask.zenati(IMAGES, LABELS, 3, share=1.0), ArgumentError, r"share: expected"),
        (
            lambda: DetectionTask.test_split((IMAGES, LABELS), (IMAGES[:1], LABELS[:1]), 3),
            ArgumentError,
            "unknown: expected classes among",
        ),
        (
            lambda: DetectionTask.in_and_out("a", IMAGES, IMAGES[:0], IMAGES),
            ShapeError,
            "known, unknown: expected observations",
        ),
        (lambda: DetectionTask.in_and_out("a", IMAGES, IMAGES, IMAGES[0]), ShapeError, "observations of one shape"),
        (lambda: DetectionTask.in_and_out("a", IMAGES, IMAGES, IMAGES, limit=0), ArgumentError, "limit: expected"),
        (lambda: DetectionTask.zenati(IMAGES, LABELS, 3).rows({"f": lambda x: x}), ShapeError, "score: expected"),
    ],
)
def test_what_protocols_refuse(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
