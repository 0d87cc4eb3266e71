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

from energy_prior.checks.arguments import is_array
from energy_prior.checks.settings import check_count, check_device
from energy_prior.errors import ArgumentError, DataWarning, ShapeError, warn
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
        return {**head, "figures": {**figures, **closed}}


@dataclass(frozen=True, eq=False)
class SampleTask:
    """Real images that samples are compared with; priors are functions of a number of images.

    Attributes:
        reference: images in [0, 1] that everything is compared with, (n, channels, height, width), 1 or 3 channels.
        others: as many other real images in [0, 1], (n, channels, height, width), whose distance is the least to expect, and
            which are reconstructed.
        features: images in [0, 1], (batch, …) -> features, (batch, d), of any unit.
        probabilities: features, (n, d) -> p(y | x) in [0, 1], (n, classes), for the inception score; None: there is none.
        network: what the features are of, for people; None: "EfficientNet-Lite0 (no FID)", or "your own" of other features.
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
    network: str | None = None
    batch_size: int = 250
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size)
        _check_calls({"features": self.features}, probabilities=self.probabilities)
        default = self.features is efficientnet_features
        settled: dict[str, Any] = {"reference": _real("reference", self.reference), "others": _real("others", self.others)}
        settled["network"] = self.network or ("EfficientNet-Lite0 (no FID)" if default else "your own")
        if not default and self.probabilities is efficientnet_probabilities:
            settled["probabilities"] = None  # of other features
        if self.device is not None:
            check_device("device", str(self.device))
        for name, value in settled.items():
            object.__setattr__(self, name, value)
        shapes = [tuple(x.shape) for x in (self.reference, self.others)]
        if shapes[0] != shapes[1] or len(self.reference) < _FEWEST:
            got = " and ".join(map(str, shapes))
            raise ShapeError(f"reference, others: expected as many images on either side, {_FEWEST} or more, got {got}.")

    @classmethod
    def halves(cls, images: Tensor, *, seed: int = 0, **options: Any) -> Self:
        """A random half of some images to compare with, the other half for the rest.

        Args:
            images: images in [0, 1] that were not trained on, (n, channels, height, width), 1 or 3 channels, n ≥ 8.
            seed: of the halves, ≥ 0.
            **options: features, probabilities, network, batch_size, device.

        Raises:
            ShapeError: if there are fewer, or they are no images.
            ArgumentError: if a value is not in [0, 1], or a setting is impossible.
        """
        images = _real("images", images)
        if len(images) < 2 * _FEWEST:
            raise ShapeError(f"images: expected {2 * _FEWEST} or more, got {len(images)}.")
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
            reconstruct: images in [0, 1], (batch, …) -> what the model makes of them, (batch, …), which is about as good as
                samples can be. None: nothing says how large the gap is.
            draws: sets of samples of each prior, ≥ 1, for means and spread; with one there is no spread to hold a gap against.
            progress: show how far it is, where standard error is a terminal.

        Raises:
            ArgumentError, ShapeError: if there is no prior, or what a function gives does not fit; the message says how.
            MissingExtraError: if the network of the default features is not installed.
        """
        draws = check_count("draws", draws)
        if not isinstance(priors, Mapping) or not priors or {_REAL, _RECONSTRUCTIONS} & set(priors):
            names = f"other names than {_REAL!r} and {_RECONSTRUCTIONS!r}"
            got = list(priors) if isinstance(priors, Mapping) else type(priors).__name__
            raise ArgumentError(f"priors: expected a dict of one or more functions, with {names}, got {got}.")
        _check_calls({f"priors[{name!r}]": sample for name, sample in priors.items()}, reconstruct=reconstruct)
        total = draws * len(priors) + 1 + (reconstruct is not None)
        bar = tqdm(total=total, desc="report", unit="set", disable=None if progress else True)
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
        for name, several in sets.items():
            if len(several) > 1 and all(entry == several[0] for entry in several):
                warn(
                    f"priors[{name!r}]: all {draws} draws are the same images, so that ± 0 says nothing. Is it seeded anew?",
                    DataWarning,
                )
        found = {
            name: {metric: _spread([entry[metric] for entry in several]) for metric in METRICS}
            for name, several in sets.items()
        }
        first, *rest = priors
        closed = {name: _share(found, first, name) for name in rest}
        return SampleReport(len(self.reference), draws, found, closed, str(self.network), reference.shape[1])

    def _features(self, name: str, make: Callable[[int, int], Tensor]) -> Tensor:
        """Features of as many images as there are in the reference, some at a time."""
        n, parts = len(self.reference), []
        for start in range(0, n, self.batch_size):
            count = min(self.batch_size, n - start)
            images = _images(name, make(start, count))
            if tuple(images.shape) != (count, *self.reference.shape[1:]):
                wanted = (count, *self.reference.shape[1:])
                raise ShapeError(f"{name}: expected images of shape {wanted}, got {tuple(images.shape)}.")
            images = images.to(self.device).float()
            if not bool(torch.isfinite(images).all()):
                raise ArgumentError(f"{name}: expected finite images, and some of these {count} have NaN or infinity.")
            outside = float(((images < -_NEAR) | (images > 1 + _NEAR)).double().mean())
            if outside > _MOST_OUTSIDE:
                low, high = (float(v) for v in images.aminmax())
                raise ArgumentError(
                    f"{name}: expected images in [0, 1], and {outside:.0%} of the values are far outside, from {low:.6g} to "
                    f"{high:.6g}. Scale them, of a model of images in [−1, 1] by lambda n: (prior.sample(n) + 1) / 2, and "
                    "reconstructions by lambda x: (prior.reconstruct(2 * x - 1) + 1) / 2."
                )
            part = _tensor("features", self.features(images.clamp(0, 1))).cpu()
            if part.ndim != 2 or len(part) != count or not part.shape[1] or not part.is_floating_point():
                raise ArgumentError(
                    f"features: expected ({count}, d) of floating-point numbers, got {tuple(part.shape)}, {part.dtype}."
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
            "inception_score": self._score(other),
        }

    def _score(self, features: Tensor) -> float | None:
        if self.probabilities is None:
            return None
        found = _tensor("probabilities", self.probabilities(features))
        if len(found) != len(features):
            raise ShapeError(f"probabilities: expected ({len(features)}, classes), got {tuple(found.shape)}.")
        return inception_score(found)


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
        ArgumentError: if a value is not finite.

    Examples:
        >>> images = torch.rand(10, 1, 8, 8)
        >>> numbers, distances = nearest(images[[7, 2]] + 0.01, images)
        >>> numbers.flatten().tolist(), round(float(distances[0]), 2)  # of √64 · 0.01
        ([7, 2], 0.08)
    """
    count = check_count("count", count)
    samples, images = _tensor("samples", samples), _tensor("images", images)
    if samples.ndim < 2 or samples.shape[1:] != images.shape[1:] or len(images) < count:
        got = f"{tuple(samples.shape)} and {tuple(images.shape)}"
        raise ShapeError(f"samples, images: expected one shape, (n, …) and (m, …) with m of at least {count}, got {got}.")
    samples = samples if samples.is_floating_point() else samples.float()
    rows = images.to(samples).flatten(1)
    for name, values in {"samples": samples, "images": rows}.items():
        if not bool(torch.isfinite(values).all()):
            raise ArgumentError(f"{name}: expected finite values, got NaN or infinity.")
    exact = "donot_use_mm_for_euclid_dist"  # products round, and what is a copy would be at a distance
    distances = (torch.cdist(x.flatten(1), rows, compute_mode=exact) for x in samples.split(_AT_ONCE))
    parts = [found.topk(count, largest=False) for found in distances]
    if not parts:
        return samples.new_zeros(0, count, dtype=torch.long), samples.new_zeros(0, count)
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])


def _tensor(name: str, value: Any) -> Tensor:
    """What a user or a function of theirs gave, if it is a tensor or an array."""
    if isinstance(value, Tensor):
        return value.detach()
    if is_array(value):
        return torch.as_tensor(value)
    raise ShapeError(f"{name}: expected a tensor or an array, got {type(value).__name__}.")


def _images(name: str, value: Any) -> Tensor:
    images = _tensor(name, value)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ShapeError(f"{name}: expected images, (n, 1 or 3, height, width), got {tuple(images.shape)}.")
    return images


def _real(name: str, value: Any) -> Tensor:
    """Images in [0, 1]."""
    images = _images(name, value)
    low, high = (float(v) for v in images.aminmax()) if images.numel() else (0.0, 1.0)
    if math.isnan(low) or math.isnan(high):
        raise ArgumentError(f"{name}: expected finite images, got NaN. Leave out what could not be read.")
    if not 0 <= low <= high <= 1 or not images.is_floating_point():
        raise ArgumentError(
            f"{name}: expected floating-point values in [0, 1], got {images.dtype} from {low:.7g} to {high:.7g}. Scale them: "
            "x / 255 of 8-bit images, (x + 1) / 2 of images in [−1, 1]."
        )
    return images


def _check_calls(functions: Mapping[str, Any], **optional: Any) -> None:
    """Functions, and those that may be None."""
    for name, function in {**functions, **{name: f for name, f in optional.items() if f is not None}}.items():
        if not callable(function):
            raise ArgumentError(f"{name}: expected a function, got {type(function).__name__}.")


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
