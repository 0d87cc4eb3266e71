"""How far the posterior's noise is from a prior's: moments and nats per layer, and what a classifier tells apart."""

from __future__ import annotations

__all__ = ["CLASSIFIER_STEPS", "LEAST_DRAWS", "SATURATED", "LayerMismatch", "Mismatch", "measure", "mismatch_of", "tell_apart"]

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from energy_prior._util import resized
from energy_prior.checks.arguments import checked_infer
from energy_prior.energies.quadratic import Quadratic
from energy_prior.langevin import ChainSettings
from energy_prior.model import NEVER_SPLIT, JointModel
from energy_prior.protocol import find_infer

SATURATED = 0.99
"""Accuracy above which a classifier makes too few errors to learn a log ratio from."""

CLASSIFIER_STEPS = 300
"""Updates of a classifier that tells two sides apart, of 128 draws of each."""

LEAST_DRAWS = 32
"""Fewer observations say nothing of the posterior's moments."""

_FAR = 25.0  # nats
_SURE = 3.0  # standard errors
_MOST_AT_ONCE = 256
_BATCH = 128
_LEAST_BATCH, _NUMBERS = 8, 2**24  # and what the classifier's maps of a batch hold, unless fewer rows than the least fit
_LOOK_EVERY = 20
_LEAST_STRIDED = 12  # height from which the classifier halves the maps at once
_LARGEST_MAP = 32  # larger ones it sees as means
_FULL = 2048  # units with a covariance of all of them


class LayerMismatch(NamedTuple):
    """The posterior's noise ε_i = (z_i − μ_i)/σ_i of one layer, which would be N(0, I) if posterior and prior agreed.

    Attributes:
        units: of the layer.
        mean: root mean square of the units' means; 0 for the prior.
        variance: mean of the units' variances; 1 for the prior.
        smallest: smallest eigenvalue of the covariance, shrunk towards I; 1 for the prior.
        largest: the largest one.
        kl: E_q[log N(ε_i; m, C)/N(ε_i; 0, I)], nats, on other draws than those that m and C are of: KL(q ‖ N(0, I)) is at least
            this, up to the error of its estimate, and what a Gaussian does not show comes on top; 0 where these draws are too
            few to show any.

    Examples:
        >>> layer = LayerMismatch(units=16, mean=0.69, variance=1.18, smallest=0.83, largest=1.46, kl=4.5)  # of a `Mismatch`
        >>> round(layer.kl / layer.units, 2)  # nats per unit
        0.28
    """

    units: int
    mean: float
    variance: float
    smallest: float
    largest: float
    kl: float


@dataclass(frozen=True)
class Mismatch:
    """How far the aggregate posterior is from the prior, in noise space.

    Attributes:
        layers: of z_1, …, z_L.
        tilt: E_q[f] − E_p[f] in nats of f = Σ_i log N(ε_i; m, C)/N(ε_i; 0, I): what energies have to reach at least.
        accuracy: balanced accuracy of a classifier that tells posterior draws from draws of the generator's own prior, on
            draws that it has not seen, in [0, 1]; ½: no difference found.
        joint_accuracy: the same with draws of the joint prior; None where that was not asked for.
        draws: posterior draws.
        joint_draws: draws of the joint prior; 0 where `joint_accuracy` is None.

    Examples:
        >>> from energy_prior.mismatch import LayerMismatch
        >>> layer = LayerMismatch(units=16, mean=0.69, variance=1.18, smallest=0.83, largest=1.46, kl=4.5)
        >>> found = Mismatch((layer,), 8.2, accuracy=0.875, joint_accuracy=0.52, draws=1000, joint_draws=1000)
        >>> found.far, found.worse
        (False, False)
        >>> print(found)
        layer    units  rms mean  variance  eigenvalues of C     KL at least
            1       16     0.690     1.180  0.83 to 1.46           4.5 nats
        Posterior and the generator's prior: told apart in 87.5% of 1,000 draws each, a tilt of at least 8 nats; near enough for
        "nce", as far as these draws show.
        Posterior and the joint prior: told apart in 52.0%.
    """

    layers: tuple[LayerMismatch, ...]
    tilt: float
    accuracy: float
    joint_accuracy: float | None
    draws: int
    joint_draws: int = 0

    @property
    def far(self) -> bool:
        """Whether `"nce"` would saturate, as far as these draws show: a tilt above 25 nats, or all draws told apart.

        "denoising" is the rule then. Few draws show less than there is: of a thousand units take thousands.
        """
        return self.accuracy > SATURATED or self.tilt > _FAR

    @property
    def worse(self) -> bool:
        """Whether the joint prior is farther from the posterior than the generator's own prior is.

        Its draws are told apart more often, by more than three standard errors: the accuracies' sampling errors, of the third
        of the draws that tests.
        """
        tests, joint_tests = self.draws // 3, self.joint_draws // 3
        if self.joint_accuracy is None or not (tests and joint_tests):
            return False
        error = math.sqrt((3 / tests + 1 / joint_tests) / 16)  # a rate has a variance of at most 1/4n, and four make the two
        return self.joint_accuracy > self.accuracy + _SURE * error

    def __str__(self) -> str:
        lines = ["layer    units  rms mean  variance  eigenvalues of C     KL at least"]
        for i, a in enumerate(self.layers, start=1):
            values = f"{a.smallest:.3g} to {a.largest:.3g}"
            lines.append(f"{i:>5}{a.units:>9,}{a.mean:>10.3f}{a.variance:>10.3f}  {values:<17}{a.kl:>9,.1f} nats")
        reach = '"nce" saturates, use "denoising"' if self.far else 'near enough for "nce", as far as these draws show'
        lines.append(
            f"Posterior and the generator's prior: told apart in {self.accuracy:.1%} of {self.draws:,} draws each, a tilt of "
            f"at least {self.tilt:,.0f} nats; {reach}."
        )
        if self.joint_accuracy is not None:
            lines.append(
                f"Posterior and the joint prior: told apart in {self.joint_accuracy:.1%}{', more than before' * self.worse}."
            )
        return "\n".join(lines)


def mismatch_of(
    model: JointModel,
    x: Tensor,
    posterior: ChainSettings,
    joint: ChainSettings | None,
    batch_size: int | None = None,
    joint_draws: int | None = None,
    steps: int = CLASSIFIER_STEPS,
    max_memory: float = 2.0**30,
) -> Mismatch:
    """The mismatch of a model's posterior draws at observations.

    Args:
        model: generator and energies.
        x: observations, (n, *x_shape), n ≥ 32, one posterior draw each.
        posterior: settings of the posterior's chain, for generators without `infer`.
        joint: settings of the joint prior's chain; None: only the generator's own prior is compared with.
        batch_size: observations and chains at a time; None: 256, or as many as `max_memory` allows, but 16.
        joint_draws: draws of the joint prior, 6 … n; None: n.
        steps: updates of the classifiers.
        max_memory: bytes that a pass through the generator may need, > 0.
    """
    if batch_size is None:
        infer = find_infer(model.generator) is not None

        def one_pass(rows: int) -> None:
            model.noise(checked_infer(model.generator, x[:rows]).latents if infer else model.ancestral(rows))

        batch_size = int(max_memory / max(model.memory_of(one_pass, "noise", infer, like=x), 1.0))
        batch_size = min(_MOST_AT_ONCE, max(NEVER_SPLIT, batch_size))
    of_posterior = [model.noise(model.posterior_draw(batch, posterior).latents) for batch in x.split(batch_size)]
    if joint is None:
        return measure(_joined(of_posterior), steps=steps)
    sizes = [len(batch) for batch in x[:joint_draws].split(batch_size)]
    return measure(_joined(of_posterior), _joined([model.noise(model.sample(size, joint)) for size in sizes]), steps)


def _joined(batches: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.cat(layer) for layer in zip(*batches, strict=True)]


def measure(posterior: Sequence[Tensor], joint: Sequence[Tensor] | None = None, steps: int = CLASSIFIER_STEPS) -> Mismatch:
    """The mismatch of draws of the posterior's noise to N(0, I), and to noise of the joint prior.

    Draws from torch's global stream.

    Args:
        posterior: (ε_1, …, ε_L) of posterior draws, (n, *shape) each, n ≥ 8.
        joint: the same of draws of the joint prior, (m, *shape) each, m ≥ 6.
        steps: updates of the classifiers.
    """
    n = len(posterior[0])
    prior = [torch.randn_like(e) for e in posterior]
    half = n // 2
    layers, tilt = [], 0.0
    for e, other in zip(posterior, prior, strict=True):
        closed = _gaussian(e[:half])
        at_posterior, at_prior = float(closed(e[half:]).mean()), float(closed(other).mean())
        tilt += at_posterior - at_prior
        low, high = (float(v) for v in closed.variances.aminmax())
        mean, variance = e.mean(0).square().mean().sqrt(), e.var(0).mean()
        found = float(mean), float(variance), min(low, 1.0), max(high, 1.0), max(at_posterior, 0.0)
        layers.append(LayerMismatch(e[0].numel(), *found))
    accuracy = tell_apart(posterior, prior, steps)
    if joint is None:
        return Mismatch(tuple(layers), tilt, accuracy, None, n)
    return Mismatch(tuple(layers), tilt, accuracy, tell_apart(posterior, joint, steps), n, len(joint[0]))


def tell_apart(first: Sequence[Tensor], second: Sequence[Tensor], steps: int = CLASSIFIER_STEPS) -> float:
    """Classifier two-sample test of layers of noise: balanced accuracy on draws that the classifier has not seen.

    After Lopez-Paz and Oquab (ICLR 2017). A third of the draws gives Gaussians of both sides, whose log ratio is where the
    logit starts, a third trains a network of all layers together on top of it and says when to stop, a third tests. Draws
    from torch's global stream.

    Args:
        first: (ε_1, …, ε_L) of one distribution, (n, *shape) each, n ≥ 6.
        second: the same of the other, (m, *shape) each.
        steps: updates of the classifier, of 128 draws of each.

    Returns:
        In [0, 1]; ½: no difference found.
    """
    with torch.inference_mode(False), torch.autocast(first[0].device.type, enabled=False):
        sides = [_thirds(side) for side in (first, second)]
        with torch.no_grad():
            ratio = _GaussianRatio(sides[0][0], sides[1][0])
            starts = [[ratio(part) for part in side[1:]] for side in sides]
        with torch.enable_grad():
            net = _trained([side[1] for side in sides], [start[0] for start in starts], steps)
        with torch.no_grad():
            right = []
            for side, start, sign in zip(sides, starts, (1, -1), strict=True):
                rows = torch.arange(len(start[1]), device=start[1].device).split(4 * net.batch)
                logits = torch.cat([net([e[r] for e in side[2]], start[1][r]) for r in rows])
                right.append(float((sign * logits > 0).float().mean()))
    return 0.5 * (right[0] + right[1])


def _thirds(side: Sequence[Tensor]) -> list[list[Tensor]]:
    """The layers of three parts of the draws."""
    rows = torch.randperm(len(side[0]), device=side[0].device).chunk(3)
    return [[e.detach()[r] for e in side] for r in rows]


def _trained(sides: Sequence[Sequence[Tensor]], starts: Sequence[Tensor], steps: int) -> _Classifier:
    """The classifier as it was when it did best on a quarter of the draws, which it does not learn from."""
    device = starts[0].device
    with device:
        net = _Classifier([e.shape[1:] for e in sides[0]]).to(starts[0])

    def loss(rows: Sequence[Tensor]) -> Tensor:
        logits = [net([e[r] for e in side], start[r]) for side, start, r in zip(sides, starts, rows, strict=True)]
        return F.softplus(-logits[0]).mean() + F.softplus(logits[1]).mean()

    kept = [len(start) // 4 for start in starts]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
    best, state = float("inf"), copy.deepcopy(net.state_dict())
    for step in range(steps + 1):
        if step % _LOOK_EVERY == 0:
            with torch.no_grad():
                now = float(loss([torch.arange(k, device=device) for k in kept]))
            if now < best:
                best, state = now, copy.deepcopy(net.state_dict())
        rows = [k + torch.randint(len(start) - k, (net.batch,), device=device) for start, k in zip(starts, kept, strict=True)]
        optimizer.zero_grad()
        loss(rows).backward()
        with torch.device("cpu"):  # where old versions of torch keep the number of the step, whatever the default device is
            optimizer.step()
    net.load_state_dict(state)
    return net


class _GaussianRatio:
    """Σ_i log of the ratio of the Gaussians N(m, C) of layer i of two sides, C shrunk towards I: (batch,), nats."""

    def __init__(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        self._sides = [[_gaussian(e) for e in side] for side in (first, second)]

    def __call__(self, noise: Sequence[Tensor]) -> Tensor:
        first, second = (torch.stack([q(e) for q, e in zip(side, noise, strict=True)]).sum(0) for side in self._sides)
        return first - second


def _gaussian(noise: Tensor) -> Quadratic:
    """log N(ε; m, C)/N(ε; 0, I) with the moments of these draws."""
    with noise.device:
        closed = Quadratic(noise.shape[1:], full=_FULL).to(noise)
    closed.set_moments(noise)
    return closed


class _Classifier(nn.Module):
    """A logit of all layers added to a given one: convolutions over their maps and squares, pooled, and a perceptron.

    Attributes:
        batch: rows that go through together.
    """

    def __init__(self, shapes: Sequence[torch.Size], width: int = 32) -> None:
        super().__init__()
        maps = [s for s in shapes if len(s) == 3]
        self._size = max(((min(s[1], _LARGEST_MAP), min(s[2], _LARGEST_MAP)) for s in maps), default=(1, 1))
        numbers = 2 * sum(s[0] for s in maps) * self._size[0] * self._size[1]
        self.batch = max(_LEAST_BATCH, min(_BATCH, _NUMBERS // max(numbers, 1)))
        vectors = sum(s.numel() for s in shapes if len(s) != 3)
        features = 2 * vectors
        if maps:
            stride = 2 if self._size[0] >= _LEAST_STRIDED else 1
            layers: list[nn.Module] = [nn.Conv2d(2 * sum(s[0] for s in maps), width, 3, stride, padding=1), nn.SiLU()]
            for _ in range(2):
                layers += [nn.GroupNorm(4, width), nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
            self.maps = nn.Sequential(*layers)
            features += 2 * width
        self.share = nn.Parameter(torch.ones(()))
        self.head = nn.Sequential(nn.Linear(features, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1))

    def forward(self, noise: Sequence[Tensor], start: Tensor) -> Tensor:
        features = [f for e in noise if e.ndim != 4 for f in (e.flatten(1), e.flatten(1).square() - 1)]
        maps = [resized(e, self._size) for e in noise if e.ndim == 4]
        if maps:
            both = torch.cat(maps, 1)
            h = self.maps(torch.cat([both, both.square() - 1], 1))
            features += [h.mean((2, 3)), h.square().mean((2, 3))]
        return self.share * start + self.head(torch.cat(features, 1)).squeeze(1)
