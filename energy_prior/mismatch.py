"""How far the posterior's noise is from a prior's: moments and nats per layer, and what a classifier tells apart."""

from __future__ import annotations

__all__ = ["LEAST_DRAWS", "SATURATED", "LayerMismatch", "Mismatch", "measure", "mismatch_of", "tell_apart"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from energy_prior._util import resized
from energy_prior.energies.quadratic import Quadratic
from energy_prior.langevin import ChainSettings
from energy_prior.model import JointModel

SATURATED = 0.99
"""Accuracy above which a classifier makes too few errors to learn a log ratio from."""

LEAST_DRAWS = 32
"""Fewer observations say nothing of the posterior's moments."""

_BATCH = 64
_STEPS = 200
_LEAST_STRIDED = 12  # height from which the classifier halves the maps at once


class LayerMismatch(NamedTuple):
    """The posterior's noise ε_i = (z_i − μ_i)/σ_i of one layer, which would be N(0, I) if posterior and prior agreed.

    Attributes:
        units: of the layer.
        mean: root mean square of the units' means; 0 for the prior.
        variance: mean of the units' variances; 1 for the prior.
        smallest: smallest eigenvalue of the covariance, shrunk towards I; 1 for the prior.
        largest: the largest one.
        kl: E_q[log N(ε_i; m, C)/N(ε_i; 0, I)], nats, on other draws than those that m and C are of: KL(q ‖ N(0, I)) is at least
            this, up to the error of its estimate, and what a Gaussian does not show comes on top.
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
        draws: posterior draws, and as many of each prior.
    """

    layers: tuple[LayerMismatch, ...]
    tilt: float
    accuracy: float
    joint_accuracy: float | None
    draws: int

    @property
    def far(self) -> bool:
        """Whether the draws are told apart so well that `"nce"` saturates: "denoising" is the rule then."""
        return self.accuracy > SATURATED

    def __str__(self) -> str:
        lines = ["layer    units  rms mean  variance  eigenvalues of C     KL at least"]
        for i, a in enumerate(self.layers, start=1):
            values = f"{a.smallest:.3g} to {a.largest:.3g}"
            lines.append(f"{i:>5}{a.units:>9,}{a.mean:>10.3f}{a.variance:>10.3f}  {values:<17}{a.kl:>9,.1f} nats")
        reach = '"nce" saturates, use "denoising"' if self.far else '"nce" can learn it'
        lines.append(
            f"Posterior and the generator's prior: told apart in {self.accuracy:.1%} of {self.draws:,} draws each, a tilt of "
            f"at least {self.tilt:,.0f} nats; {reach}."
        )
        if self.joint_accuracy is not None:
            lines.append(f"Posterior and the joint prior: told apart in {self.joint_accuracy:.1%}.")
        return "\n".join(lines)


def mismatch_of(
    model: JointModel, x: Tensor, posterior: ChainSettings, joint: ChainSettings | None, batch_size: int = 256
) -> Mismatch:
    """The mismatch of a model's posterior draws at observations.

    Args:
        model: generator and energies.
        x: observations, (n, *x_shape), n ≥ 32, one posterior draw each.
        posterior: settings of the posterior's chain, for generators without `infer`.
        joint: settings of the joint prior's chain; None: only the generator's own prior is compared with.
        batch_size: observations and chains at a time.
    """
    batches = x.split(batch_size)
    of_posterior = [model.noise(model.posterior_draw(batch, posterior).latents) for batch in batches]
    of_joint = None if joint is None else [model.noise(model.sample(len(batch), joint)) for batch in batches]
    return measure(_joined(of_posterior), None if of_joint is None else _joined(of_joint))


def _joined(batches: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.cat(layer) for layer in zip(*batches, strict=True)]


def measure(posterior: Sequence[Tensor], joint: Sequence[Tensor] | None = None) -> Mismatch:
    """The mismatch of draws of the posterior's noise to N(0, I), and to noise of the joint prior.

    Draws from torch's global stream.

    Args:
        posterior: (ε_1, …, ε_L) of posterior draws, (n, *shape) each, n ≥ 8.
        joint: the same of draws of the joint prior, as many.
    """
    n = len(posterior[0])
    prior = [torch.randn_like(e) for e in posterior]
    half = n // 2
    layers, tilt = [], 0.0
    for e, other in zip(posterior, prior, strict=True):
        with e.device:
            closed = Quadratic(e.shape[1:]).to(e)
        closed.set_moments(e[:half])
        at_posterior, at_prior = float(closed(e[half:]).mean()), float(closed(other).mean())
        tilt += at_posterior - at_prior
        low, high = (float(v) for v in closed.variances.aminmax())
        mean, variance = e.mean(0).square().mean().sqrt(), e.var(0).mean()
        layers.append(LayerMismatch(e[0].numel(), float(mean), float(variance), min(low, 1.0), max(high, 1.0), at_posterior))
    accuracy = tell_apart(posterior, prior)
    return Mismatch(tuple(layers), tilt, accuracy, None if joint is None else tell_apart(posterior, joint), n)


def tell_apart(first: Sequence[Tensor], second: Sequence[Tensor], steps: int = _STEPS) -> float:
    """Classifier two-sample test of layers of noise: balanced accuracy on a third of the draws, learned on the rest.

    After Lopez-Paz and Oquab (ICLR 2017); the classifier sees all layers together. Draws from torch's global stream.

    Args:
        first: (ε_1, …, ε_L) of one distribution, (n, *shape) each, n ≥ 3.
        second: the same of the other, (m, *shape) each.
        steps: updates of the classifier, of 64 draws of each.

    Returns:
        In [0, 1]; ½: no difference found.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(first[0].device.type, enabled=False):
        sides = [[e.detach().clone() for e in side] for side in (first, second)]
        device = sides[0][0].device
        with device:
            net = _Classifier([e.shape[1:] for e in sides[0]]).to(sides[0][0])
        held = [len(side[0]) // 3 for side in sides]
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
        for _ in range(steps):
            rows = [k + torch.randint(len(side[0]) - k, (_BATCH,), device=device) for side, k in zip(sides, held, strict=True)]
            logits = [net([e[r] for e in side]) for side, r in zip(sides, rows, strict=True)]
            loss = F.softplus(-logits[0]).mean() + F.softplus(logits[1]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        right = []
        for side, k, sign in zip(sides, held, (1, -1), strict=True):
            batches = torch.arange(k, device=device).split(4 * _BATCH)
            right.append(torch.cat([sign * net([e[rows] for e in side]) > 0 for rows in batches]).float().mean())
    return 0.5 * float(right[0] + right[1])


class _Classifier(nn.Module):
    """A logit of all layers: convolutions over their maps at one size and their squares, pooled, and a perceptron."""

    def __init__(self, shapes: Sequence[torch.Size], width: int = 32) -> None:
        super().__init__()
        maps = [s for s in shapes if len(s) == 3]
        self._size = max(((s[1], s[2]) for s in maps), default=(1, 1))
        vectors = sum(s.numel() for s in shapes if len(s) != 3)
        features = 2 * vectors
        if maps:
            stride = 2 if self._size[0] >= _LEAST_STRIDED else 1
            layers: list[nn.Module] = [nn.Conv2d(2 * sum(s[0] for s in maps), width, 3, stride, padding=1), nn.SiLU()]
            for _ in range(2):
                layers += [nn.GroupNorm(4, width), nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
            self.maps = nn.Sequential(*layers)
            features += 2 * width
        self.head = nn.Sequential(nn.Linear(features, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1))

    def forward(self, noise: Sequence[Tensor]) -> Tensor:
        features = [f for e in noise if e.ndim != 4 for f in (e.flatten(1), e.flatten(1).square() - 1)]
        maps = [resized(e, self._size) for e in noise if e.ndim == 4]
        if maps:
            both = torch.cat(maps, 1)
            h = self.maps(torch.cat([both, both.square() - 1], 1))
            features += [h.mean((2, 3)), h.square().mean((2, 3))]
        return self.head(torch.cat(features, 1)).squeeze(1)
