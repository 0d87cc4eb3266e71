"""Detection of unknown observations: the figures of a score, and the protocols that say what is known and unknown."""

from __future__ import annotations

__all__ = ["Detection", "DetectionTask", "detection", "labelled_ranks"]

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from energy_prior.checks.settings import check_count, check_share, require_extra, whole_number
from energy_prior.errors import ArgumentError, ShapeError


class Detection(NamedTuple):
    """Figures of a score, each in [0, 1], with unknown observations as the positive class.

    All but AUROC and the false-positive rates depend on the share of positives: without it they compare with nothing.

    Attributes:
        auroc: area under the ROC curve.
        auprc: area under the precision-recall curve by the trapezoid rule, `auc(recall, precision)`, as in the tables of
            protocol "zenati" (Zenati et al., 2018).
        average_precision: Σ_n (R_n − R_{n−1}) P_n, which does not interpolate.
        fpr80: share of known observations that are flagged where 80% of the unknown ones are.
        fpr95: the same where 95% are.
        positives: share of unknown observations.

    Examples:
        >>> from energy_prior.evaluate.detection import detection
        >>> found = detection(known=[0.1, 0.2, 0.6], unknown=[0.3, 0.9])
        >>> round(found.auroc, 3), round(found.fpr95, 3), found.positives
        (0.833, 0.333, 0.4)
    """

    auroc: float
    auprc: float
    average_precision: float
    fpr80: float
    fpr95: float
    positives: float


def detection(known: Any, unknown: Any) -> Detection:
    """Figures of a score, higher = more unknown, by scikit-learn.

    Args:
        known: scores of known observations, (n,), n ≥ 1, of any unit: a tensor, an array or a list of numbers.
        unknown: scores of unknown observations, (m,), m ≥ 1, of the same unit.

    Raises:
        ShapeError: if a side is no row of numbers, or has none.
        ArgumentError: if a score is NaN; infinite ones have their rank.
        MissingExtraError: if scikit-learn is not installed.

    Examples:
        >>> round(detection(known=torch.tensor([0.1, 0.2, 0.6]), unknown=torch.tensor([0.3, 0.9])).auroc, 3)
        0.833
    """
    metrics = require_extra("sklearn.metrics", "eval")
    labels, scores = labelled_ranks(known, unknown)
    precision, recall, _ = metrics.precision_recall_curve(labels, scores)
    false, true, _ = metrics.roc_curve(labels, scores, drop_intermediate=False)
    return Detection(
        auroc=float(metrics.auc(false, true)),
        auprc=float(metrics.auc(recall, precision)),
        average_precision=float(metrics.average_precision_score(labels, scores)),
        fpr80=float(false[(true >= 0.8).argmax()]),
        fpr95=float(false[(true >= 0.95).argmax()]),
        positives=float(labels.mean(dtype="float64")),
    )


def labelled_ranks(known: Any, unknown: Any) -> tuple[Any, Any]:
    """Labels, 1 of unknown observations, and ranks of scores, as arrays: figures depend on no more, and ranks are finite.

    Args:
        known: scores of known observations, (n,), as for `detection`.
        unknown: scores of unknown observations, (m,).
    """
    known, unknown = _scores("known", known), _scores("unknown", unknown)
    labels = torch.cat([torch.zeros(len(known)), torch.ones(len(unknown))])
    return labels.numpy(), torch.unique(torch.cat([known, unknown]), return_inverse=True)[1].numpy()


@dataclass(frozen=True)
class DetectionTask:
    """What a model may learn from, and what its score is tested on.

    Attributes:
        name: the case in tables.
        train: known observations to train, calibrate and choose settings on, (n, …).
        known: known observations to test on, (m, …); none of them is in `train`.
        unknown: unknown observations to test on, (u, …).

    Examples:
        >>> images, labels = torch.rand(100, 1, 8, 8), torch.arange(100) % 10
        >>> task = DetectionTask.zenati(images, labels, unknown=4)
        >>> task.name, len(task.train), len(task.known), len(task.unknown)
        ('zenati, class 4', 72, 18, 10)
        >>> known, unknown = task.scores(lambda x: x.mean((1, 2, 3)))
        >>> known.shape, unknown.shape
        (torch.Size([18]), torch.Size([10]))
    """

    name: str
    train: Tensor
    known: Tensor
    unknown: Tensor

    @classmethod
    def zenati(
        cls,
        images: Tensor,
        labels: Tensor | None,
        unknown: int | Iterable[int],
        *,
        seed: int = 0,
        share: float = 0.8,
        name: str | None = None,
    ) -> Self:
        """Protocol "zenati" (Zenati et al., 2018): classes are held out of all images, a share of the others is trained on.

        Tested on are the rest of the other classes and *every* image of the classes held out, so that a third or so of MNIST's
        test images are unknown. Images are drawn once: the public loaders draw anew for training and for testing, and most of
        what they test on as known they have trained on.

        Args:
            images: observations of all splits together, (n, …).
            labels: their classes, (n,), whole numbers.
            unknown: the class or classes held out.
            seed: of the draw.
            share: of the known images that is trained on, in (0, 1).
            name: the case in tables; None: "zenati, class 4".

        Raises:
            ShapeError: if there is not one label per image.
            ArgumentError: if no image, or every one, is of a class held out.
        """
        held, text = _held_out(images, labels, unknown)
        known = (~held).nonzero()[:, 0]
        known = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))]
        count = int(check_share("share", share) * len(known))
        if not 0 < count < len(known):
            raise ArgumentError(f"share: expected a share that leaves known images on both sides of {len(known)}, got {share}.")
        return cls(name or f"zenati, {text}", images[known[:count]], images[known[count:]], images[held])

    @classmethod
    def test_split(
        cls,
        train: tuple[Tensor, Tensor | None],
        test: tuple[Tensor, Tensor | None],
        unknown: int | Iterable[int],
        *,
        name: str | None = None,
    ) -> Self:
        """Classes are held out of the training split; the whole test split is tested on: of MNIST a tenth is unknown.

        Args:
            train: observations, (n, …), and classes, (n,), whole numbers, of the training split, as
                `energy_prior.data.load_images` gives them.
            test: observations, (m, …), and classes, (m,), whole numbers, of the test split.
            unknown: the class or classes held out.
            name: the case in tables; None: "test_split, class 4".

        Raises:
            ShapeError: if there is not one label per image.
            ArgumentError: if no image of a split, or every one, is of a class held out.
        """
        (images, labels), (others, other_labels) = train, test
        left_out, text = _held_out(images, labels, unknown)
        held, _ = _held_out(others, other_labels, unknown)
        return cls(name or f"test_split, {text}", images[~left_out], others[~held], others[held])

    @classmethod
    def in_and_out(
        cls, name: str, train: Tensor, known: Tensor, unknown: Tensor, *, limit: int | None = None, seed: int = 0
    ) -> Self:
        """One set against another, with as many observations of each: of the larger one a random part.

        Args:
            name: the case in tables, "cifar10/svhn".
            train: known observations to train on, (n, …).
            known: other known observations, (m, …).
            unknown: observations of another set, (u, …).
            limit: at most so many of each, ≥ 1; None: all.
            seed: of the draw.

        Raises:
            ShapeError: if a side has none, or observations of another shape.
        """
        if not len(train) or not len(known) or not len(unknown):
            raise ShapeError(
                f"known, unknown: expected observations, got {len(train)} to train on, {len(known)} and {len(unknown)}."
            )
        if not train.shape[1:] == known.shape[1:] == unknown.shape[1:]:
            got = " and ".join(str(tuple(x.shape[1:])) for x in (train, known, unknown))
            raise ShapeError(f"train, known, unknown: expected observations of one shape, got {got}.")
        count, rng = min(len(known), len(unknown)), torch.Generator().manual_seed(seed)
        count = count if limit is None else min(count, check_count("limit", limit))
        some = [x[torch.randperm(len(x), generator=rng)[:count]] for x in (known, unknown)]
        return cls(name, train, *some)

    def scores(self, score: Callable[[Tensor], Any], *, batch_size: int = 1000) -> tuple[Tensor, Tensor]:
        """Scores of the known and of the unknown observations, (m,) and (u,), of the score's unit, float64 on the CPU.

        Args:
            score: x, (batch, …), -> scores, (batch,), of any unit, higher = more unknown.
            batch_size: observations that it gets at a time, ≥ 1.

        Raises:
            ShapeError, ArgumentError: if what it gives is no row of numbers.
        """
        batch_size = check_count("batch_size", batch_size)
        known, unknown = (
            torch.cat([_scores("score", score(batch)) for batch in x.split(batch_size)]) for x in (self.known, self.unknown)
        )
        return known, unknown

    def rows(self, scores: Mapping[str, Callable[[Tensor], Any]], *, batch_size: int = 1000) -> list[dict[str, str | float]]:
        """Every figure of every score as a row of a table.

        Args:
            scores: name -> score, as for `scores`: x, (batch, …), -> (batch,), of any unit. With
                `{"": prior.anomaly_score, "knn": …}` the metrics of the name "" are "auroc", "auprc", …, those of "knn"
                "auroc_knn", ….
            batch_size: observations that a score gets at a time, ≥ 1.

        Returns:
            {"case": name of the task, "metric": …, "value": …} for each.

        Raises:
            ShapeError, ArgumentError: if what a score gives is no row of numbers.
        """
        rows: list[dict[str, str | float]] = []
        for name, score in scores.items():
            found = detection(*self.scores(score, batch_size=batch_size))._asdict().items()
            rows += [{"case": self.name, "metric": f"{key}_{name}" if name else key, "value": value} for key, value in found]
        return rows


def _held_out(images: Tensor, labels: Tensor | None, unknown: int | Iterable[int]) -> tuple[Tensor, str]:
    """Which images are of a class held out, (n,), and these classes in words."""
    if labels is None or labels.shape != (len(images),):
        got = "none" if labels is None else str(tuple(labels.shape))
        raise ShapeError(f"labels: expected a class for each of the {len(images)} images, got {got}.")
    one = whole_number(unknown)
    classes = [one] if one is not None else [whole_number(u) for u in unknown] if isinstance(unknown, Iterable) else [None]
    if None in classes or not set(classes) <= set(labels.tolist()):
        there = labels.unique().tolist()
        raise ArgumentError(f"unknown: expected classes among {there[:20]}, got {unknown!r}.")
    held = torch.isin(labels, torch.tensor(classes, dtype=labels.dtype, device=labels.device))
    if not 0 < int(held.sum()) < len(held):
        there = labels.unique().tolist()
        raise ArgumentError(
            f"unknown: expected some of the classes {there[:20]}, but not all, got {classes}: there have to be known and "
            "unknown images."
        )
    return held.to(images.device), f"class{'es' if len(classes) > 1 else ''} {', '.join(map(str, classes))}"


def _scores(name: str, values: Any) -> Tensor:
    """Scores of any kind as float64, (n,), on the CPU."""
    try:
        row = values.detach() if isinstance(values, Tensor) else torch.as_tensor(values)
        row = row.to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(
            f"{name}: expected scores, (n,), as a tensor, an array or a list, got {type(values).__name__}."
        ) from error
    if row.ndim != 1 or len(row) == 0:
        raise ShapeError(f"{name}: expected one score or more, (n,), got the shape {tuple(row.shape)}.")
    if bool(row.isnan().any()):
        raise ArgumentError(f"{name}: expected numbers, and {int(row.isnan().sum())} of {len(row)} scores are NaN.")
    return row
