"""Samples of several priors beside real images: one table, with what each mends of what a prior can mend."""

from __future__ import annotations

__all__ = ["METRICS", "SampleReport", "SampleTask", "Spread", "nearest"]

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from typing_extensions import Self

from energy_prior.checks.settings import check_count
from energy_prior.errors import ArgumentError, ShapeError
from energy_prior.evaluate.images import frechet_distance, gap_closed, inception_score, kernel_distance, precision_recall
from energy_prior.evaluate.networks import efficientnet_features, efficientnet_probabilities

METRICS = ("frechet", "kernel", "precision", "recall", "inception_score")
"""The figures of a set of images, in the order of the table."""

_NAMES, _COLUMNS = 24, {  # of the table, and how wide they are
    "Fréchet": 16, "kernel × 1000": 18, "precision": 17, "recall": 17, "inception score": 17, "gap closed": 12,
}  # fmt: skip
_REAL, _RECONSTRUCTIONS = "real images", "reconstructions"
_AT_ONCE = 1000  # samples whose distances to all images are computed together
_FEWEST = 4  # of a side: precision and recall look at three neighbours
_NEAR, _MOST_OUTSIDE = 0.25, 0.25  # a decoder's mean may leave [0, 1] a little, and a draw of p(x | z) more
_SPREADS = 10  # a gap that is less than so many standard deviations of its ends is none to take shares of


class Spread(NamedTuple):
    """A figure over several sets of samples.

    Attributes:
        mean: their mean.
        sd: their standard deviation; None for one set.

    Examples:
        >>> Spread(mean=5.0, sd=0.5).sd
        0.5
    """

    mean: float
    sd: float | None


@dataclass(frozen=True)
class SampleReport:
    """What `SampleTask.report` found; printed, it is a table.

    Attributes:
        images: on each side of every comparison.
        draws: sets of samples of each prior.
        figures: "real images", "reconstructions" and each prior -> metric of `METRICS` -> its figure. "frechet" is None where a
            side has no more images than there are features: its covariance is singular then, and "kernel" is what compares;
            "inception_score" is None without a classifier.
        gap_closed: each prior but the first -> what it closes of the gap between the first one's samples and reconstructions,
            by the Fréchet distance, or by the kernel distance where there is none; None where that gap is below ten standard
            deviations, or there are no reconstructions.
        network: what the features are of, for people.
        features: how many there are of an image.

    Examples:
        >>> spread = Spread(20.0, 1.0), Spread(5.0, None)
        >>> figures = {name: {"frechet": s} for name, s in zip(("the generator's own", "joint"), spread)}
        >>> print(SampleReport(5000, 3, figures, {"joint": 0.9}, "Inception", 2048))
        5000 images a side, 3 draws; features of Inception
                                   Fréchet     kernel × 1000        precision           recall  inception score  gap closed
        the generator's own         20 ± 1                 –                –                –                –           –
        joint                            5                 –                –                –                –       0.900
    """

    images: int
    draws: int
    figures: dict[str, dict[str, Spread | None]]
    gap_closed: dict[str, float | None]
    network: str
    features: int

    def __str__(self) -> str:
        """The table."""
        heads = "".join(f"{head:>{width}}" for head, width in _COLUMNS.items())
        lines = [f"{self.images} images a side, {self.draws} draws; features of {self.network}", f"{'':<{_NAMES}}{heads}"]
        for name, found in self.figures.items():
            cells = [_text(found.get(metric), 1000 if metric == "kernel" else 1) for metric in METRICS]
            share = self.gap_closed.get(name)
            cells.append("–" if share is None else f"{share:.3f}")
            row = "".join(f"{cell:>{width}}" for cell, width in zip(cells, _COLUMNS.values(), strict=True))
            lines.append(f"{name:<{_NAMES}}{row}")
        if any("frechet" in found and found["frechet"] is None for found in self.figures.values()):
            lines.append(f"Fréchet distances need more than {self.features} images a side; kernel distances do not.")
        return "\n".join(lines)

    def document(self) -> dict[str, Any]:
        """The same as plain values, which JSON can hold."""
        figures = {
            name: {metric: None if spread is None else spread._asdict() for metric, spread in found.items()}
            for name, found in self.figures.items()
        }
        closed = {name: {**figures[name], "gap_closed": share} for name, share in self.gap_closed.items()}
        head = {"images": self.images, "draws": self.draws, "network": self.network, "features": self.features}
        return {**head, **figures, **closed}


@dataclass(frozen=True)
class SampleTask:
    """Real images that samples are compared with; priors are functions of a number of images.

    Attributes:
        reference: images in [0, 1] that everything is compared with, (n, channels, height, width), 1 or 3 channels.
        others: as many other real images in [0, 1], (n, channels, height, width), whose distance is the least to expect, and
            which are reconstructed.
        features: images in [0, 1], (batch, …) -> features, (batch, d), of any unit.
        probabilities: features, (n, d) -> p(y | x) in [0, 1], (n, classes), for the inception score; None: there is none.
        network: what the features are of, for people.
        device: where features are computed, and where images that are reconstructed are; None: where the images are.
        batch_size: images at a time, ≥ 1.

    Examples:
        >>> from energy_prior import load_example
        >>> from sklearn.datasets import load_digits
        >>> prior, images = load_example(), torch.tensor(load_digits().images[:200, None] / 16, dtype=torch.float32)
        >>> task = SampleTask.halves(images, features=lambda x: x.flatten(1)[:, ::8], network="eight pixels")
        >>> priors = {"Gaussian": lambda n: prior.sample(n, prior="generator"), "joint": lambda n: prior.sample(n, steps=5)}
        >>> report = task.report(priors, prior.reconstruct, draws=2, progress=False)
        >>> list(report.figures), list(report.gap_closed)
        (['real images', 'reconstructions', 'Gaussian', 'joint'], ['joint'])
    """

    reference: Tensor
    others: Tensor
    features: Callable[[Tensor], Tensor] = efficientnet_features
    probabilities: Callable[[Tensor], Tensor] | None = efficientnet_probabilities
    network: str = "EfficientNet-Lite0 (no FID)"
    batch_size: int = 250
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size)
        if self.features is not efficientnet_features and self.probabilities is efficientnet_probabilities:
            object.__setattr__(self, "probabilities", None)  # of other features
            object.__setattr__(self, "network", "your own" if self.network == type(self).network else self.network)
        shapes = {tuple(x.shape) for x in (self.reference, self.others)}
        if len(shapes) > 1 or self.reference.ndim != 4 or len(self.reference) < _FEWEST:
            got = " and ".join(map(str, (tuple(self.reference.shape), tuple(self.others.shape))))
            raise ShapeError(f"reference, others: expected as many images on either side, {_FEWEST} or more, got {got}.")
        for name, images in (("reference", self.reference), ("others", self.others)):
            low, high = (float(v) for v in images.aminmax())
            if not 0 <= low <= high <= 1:
                raise ArgumentError(f"{name}: expected values in [0, 1], got some from {low:.4g} to {high:.4g}. Scale them.")

    @classmethod
    def halves(cls, images: Tensor, *, seed: int = 0, **options: Any) -> Self:
        """A random half of some images to compare with, the other half for the rest.

        Args:
            images: images in [0, 1] that were not trained on, (n, channels, height, width), 1 or 3 channels, n ≥ 8.
            seed: of the halves, ≥ 0.
            **options: features, probabilities, network, batch_size, device.

        Raises:
            ShapeError: if there are fewer.
        """
        if images.ndim != 4 or len(images) < 2 * _FEWEST:
            wanted = f"(n, channels, height, width) of {2 * _FEWEST} or more"
            raise ShapeError(f"images: expected {wanted}, got {tuple(images.shape)}.")
        rng = torch.Generator().manual_seed(check_count("seed", seed, least=0))
        order, half = torch.randperm(len(images), generator=rng), len(images) // 2
        return cls(images[order[:half]], images[order[half : 2 * half]], **options)

    def report(
        self,
        priors: Mapping[str, Callable[[int], Tensor]],
        reconstruct: Callable[[Tensor], Tensor] | None = None,
        *,
        draws: int = 3,
        progress: bool = True,
    ) -> SampleReport:
        """Distances of real images, reconstructions and samples to the reference, and what each prior mends.

        Everything is clamped to [0, 1] first. Priors are compared fairly where they share one decoder, and decode alike.

        Args:
            priors: name -> number of images, n, -> samples in [0, 1], (n, channels, height, width); the generator's own prior
                comes first.
            reconstruct: images in [0, 1], (batch, …) -> what the model makes of them, (batch, …): the best that any prior can
                reach. None: nothing says how large the gap is.
            draws: sets of samples of each prior, ≥ 1, for means and spread.
            progress: show how far it is, where standard error is a terminal.

        Raises:
            ArgumentError, ShapeError: if there is no prior, or what a function gives does not fit; the message says how.
            MissingExtraError: if the network of the default features is not installed.
        """
        draws = check_count("draws", draws)
        taken = {_REAL, _RECONSTRUCTIONS} & set(priors)
        if not priors or taken:
            raise ArgumentError(f"priors: expected one or more, of other names than {_REAL!r}, got {list(priors)}.")
        n, bar = (
            len(self.reference),
            tqdm(total=draws * len(priors) + 2, desc="report", unit="set", disable=None if progress else True),
        )
        reference = self._features("reference", lambda start, count: self.reference[start : start + count])

        def others(start: int, count: int) -> Tensor:
            return self.others[start : start + count].to(self.device)

        def figures(name: str, make: Callable[[int, int], Tensor]) -> dict[str, float | None]:
            found = self._figures(reference, self._features(name, make))
            bar.update()
            return found

        sets = {_REAL: [figures("others", others)]}
        if reconstruct is not None:
            sets[_RECONSTRUCTIONS] = [figures("reconstruct", lambda start, count: reconstruct(others(start, count)))]
        for name, sample in priors.items():
            sets[name] = [figures(name, lambda _, count, sample=sample: sample(count)) for _ in range(draws)]
        bar.close()
        found = {
            name: {metric: _spread([entry[metric] for entry in several]) for metric in METRICS}
            for name, several in sets.items()
        }
        first, *rest = priors
        closed = {name: _share(found, first, name) for name in rest}
        return SampleReport(n, draws, found, closed, self.network, reference.shape[1])

    def _features(self, name: str, make: Callable[[int, int], Tensor]) -> Tensor:
        """Features of as many images as there are in the reference, some at a time."""
        n, parts = len(self.reference), []
        for start in range(0, n, self.batch_size):
            count = min(self.batch_size, n - start)
            images = make(start, count)
            if tuple(images.shape) != (count, *self.reference.shape[1:]):
                wanted = (count, *self.reference.shape[1:])
                raise ShapeError(f"{name}: expected images of shape {wanted}, got {tuple(images.shape)}.")
            outside = ((images < -_NEAR) | (images > 1 + _NEAR)).double().mean()
            if not float(outside) <= _MOST_OUTSIDE:
                raise ArgumentError(
                    f"{name}: expected images in [0, 1], and {float(outside):.0%} of the values are far outside. Scale them: "
                    "of a model of images in [−1, 1], `lambda n: (prior.sample(n) + 1) / 2`."
                )
            part = self.features(images.detach().to(self.device).clamp(0, 1)).detach().cpu()
            if part.ndim != 2 or len(part) != count or not part.is_floating_point():
                raise ArgumentError(
                    f"features: expected (n, d) of floating-point numbers, got {tuple(part.shape)}, {part.dtype}."
                )
            parts.append(part)
        return torch.cat(parts)

    def _figures(self, reference: Tensor, other: Tensor) -> dict[str, float | None]:
        precision, recall = precision_recall(reference, other)
        return {
            "frechet": frechet_distance(other, reference) if len(reference) > reference.shape[1] else None,
            "kernel": kernel_distance(other, reference),
            "precision": precision,
            "recall": recall,
            "inception_score": None if self.probabilities is None else inception_score(self.probabilities(other)),
        }


def nearest(samples: Tensor, images: Tensor, *, count: int = 1) -> tuple[Tensor, Tensor]:
    """The images that samples are nearest to, by Euclidean distance: do samples repeat the training set?

    Args:
        samples: drawn images, (n, …), or features of them.
        images: images that were trained on, (m, …), m ≥ `count`, or features.
        count: k ≥ 1 of each sample.

    Returns:
        Their numbers from 0 on, (n, k), whole numbers, nearest first, and their distances, (n, k), ≥ 0, of the same unit as the
        images; on the device of the samples.

    Raises:
        ShapeError: if they differ in shape, or there are fewer images.

    Examples:
        >>> images = torch.rand(10, 1, 8, 8)
        >>> numbers, distances = nearest(images[[7, 2]] + 0.01, images)
        >>> numbers.flatten().tolist(), round(float(distances[0]), 2)  # of √64 · 0.01
        ([7, 2], 0.08)
    """
    count = check_count("count", count)
    if samples.shape[1:] != images.shape[1:] or len(images) < count:
        got = f"{tuple(samples.shape)} and {tuple(images.shape)}"
        raise ShapeError(f"samples, images: expected one shape, (n, …) and (m, …) with m of at least {count}, got {got}.")
    rows = images.to(samples).flatten(1)
    parts = [torch.cdist(x.flatten(1), rows).topk(count, largest=False) for x in samples.split(_AT_ONCE)]
    if not parts:
        return samples.new_zeros(0, count, dtype=torch.long), samples.new_zeros(0, count)
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])


def _spread(values: Sequence[float | None]) -> Spread | None:
    there = [v for v in values if v is not None]
    if not there:
        return None
    return Spread(statistics.fmean(there), statistics.stdev(there) if len(there) > 1 else None)


def _share(found: dict[str, dict[str, Spread | None]], first: str, name: str) -> float | None:
    """What a prior closes of the gap between the first one's samples and reconstructions, if there is one."""
    if _RECONSTRUCTIONS not in found:
        return None
    metric = "frechet" if found[first]["frechet"] is not None else "kernel"
    own, generator, reconstructions = (found[kind][metric] for kind in (name, first, _RECONSTRUCTIONS))
    if own is None or generator is None or reconstructions is None:
        return None
    spread = math.hypot(own.sd or 0.0, generator.sd or 0.0)
    if generator.mean - reconstructions.mean <= _SPREADS * spread:
        return None
    return gap_closed(own.mean, generator.mean, reconstructions.mean)


def _text(figure: Spread | None, scale: float) -> str:
    if figure is None:
        return "–"
    return f"{scale * figure.mean:.4g}" + ("" if figure.sd is None else f" ± {scale * figure.sd:.2g}")
