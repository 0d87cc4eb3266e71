"""The problems of the stability benchmark: where each starts, how far it came, and the plain loop to compare with."""

from __future__ import annotations

__all__ = ["PROBLEMS", "Problem", "Trained", "plain_loop"]

import copy
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results import code_key
from torch import Tensor, nn

from energy_prior import JointEBMPrior, LadderVAE, fit_elbo
from energy_prior.data import load_images
from energy_prior.evaluate import excess_ratio, frechet_distance
from energy_prior.langevin import ChainSettings, Target, sample_target
from energy_prior.topdown import TopDown, ancestral
from energy_prior.training.config import JOINT_METHODS, LANGEVIN_METHODS, Method

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from cifar10 import TwoLayers
from ladders import GaussianLadder, PairsLadder, QuadraticEnergy, gaussian, kl

_CHECK_EVERY = 50


@dataclass
class Problem:
    """Where a run starts, and how far it is from the goal.

    Attributes:
        generator: what the prior is built on.
        energies: makes its energies; None from it: the default ones.
        data: to learn from.
        batch_size: of the runs.
        distance: what is to become small, of a prior: Fréchet distance of its samples, or KL to the optimum.
        start: the distance of the generator's own prior before the run.
        floor: the least that the distance can be.
    """

    generator: Any
    energies: Callable[[], Sequence[nn.Module] | None]
    data: Tensor
    batch_size: int
    distance: Callable[[JointEBMPrior], float]
    start: float
    floor: float


@dataclass
class Trained:
    """A prior after its run."""

    prior: JointEBMPrior
    problem: Problem

    def ratio(self) -> float:
        """(distance − floor)/(start − floor)."""
        self.end = self.problem.distance(self.prior)
        return excess_ratio(self.end, self.problem.start, self.problem.floor)

    def acceptance(self) -> float:
        """Mean MALA acceptance over 60 steps of the prior's chain at its own step size."""
        return float(self.prior.trajectory(128, steps=60, every=60).acceptance[1:].mean())

    def details(self) -> dict[str, float]:
        """The distances themselves."""
        return {"start": self.problem.start, "end": self.end, "floor": self.problem.floor}


def _images(kind: str) -> Callable[[Method, int, str, bool], Problem]:
    def make(method: Method, seed: int, data: str, quick: bool) -> Problem:
        return image_problem(kind, seed, data, quick)

    return make


def image_problem(kind: str, seed: int, data: str, quick: bool, reference: str = "test") -> Problem:
    """A VAE trained by its ELBO on small images, and the Fréchet distance to held-out ones.

    On CIFAR-10 the nets are convolutional, and the features see images averaged down to 8x8: what so small a decoder blurs
    no prior can bring back, and at full resolution that would be most of the distance.
    """
    cache = (
        Path(tempfile.gettempdir()) / f"energy-prior-{kind}-{seed}-{quick}-{reference}-{code_key(Path(__file__), also=data)}.pt"
    )
    made = torch.load(cache, weights_only=False) if cache.exists() else _trained(kind, seed, data, quick, reference)
    if not cache.exists():  # the five rules start from one VAE
        part = cache.with_suffix(f".{os.getpid()}")
        torch.save(made, part)
        part.replace(cache)
    vae, features, train, test, start, floor, repeats = made
    count = min(len(test), 5000)

    def distance(prior: JointEBMPrior) -> float:
        return _mean_distance(features, test[:count], [prior.sample(count) for _ in range(repeats)])

    return Problem(vae, lambda: None, train, 16 if quick else 256 if kind == "cifar10" else 64, distance, start, floor)


def _trained(kind: str, seed: int, data: str, quick: bool, reference: str) -> tuple[Any, ...]:
    """The VAE and the feature net, the training and reference images, and the distances at the start and at best."""
    train, labels, test = _load(kind, data, quick)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    train, labels = train[order], labels[order]
    n = len(train) // 10
    validation, train, labels = train[:n], train[n:], labels[n:]
    if reference == "validation":
        test = validation
    conv = kind == "cifar10"
    if conv:
        train, validation, test = (2 * images - 1 for images in (train, validation, test))
        vae: nn.Module = TwoLayers(width=16, hidden=128, dims=(48, 16), sigma=0.2)
    else:
        vae = LadderVAE(tuple(train.shape[1:]), latent_dims=(16, 8), hidden=128)
    iterations = 30 if quick else {"digits": 2000, "mnist": 4000, "cifar10": 4000}[kind]
    noise = 0.15 if kind == "digits" else 0.0
    fit_elbo(
        vae,
        train,
        validation=validation[:1000],
        iterations=iterations,
        batch_size=64 if conv else 128,
        log_every=iterations // 10,
        input_noise=noise,
        progress=False,
    )
    features = _classifier(train, labels, conv, 30 if quick else 1500)
    count = min(len(test), 5000)

    repeats = 20 if kind == "digits" else 2  # few test images: average over more sample sets
    prior = JointEBMPrior(vae)
    start = _mean_distance(features, test[:count], [prior.sample(count, prior="generator") for _ in range(repeats)])
    rows = torch.randperm(len(train))
    floor = _mean_distance(features, test[:count], [train[rows.roll(i * count)[:count]] for i in range(repeats)])
    return vae, features, train, test, start, floor, repeats


def _mean_distance(features: nn.Module, reference: Tensor, sets: Sequence[Tensor]) -> float:
    with torch.no_grad():
        return sum(frechet_distance(features(images), features(reference)) for images in sets) / len(sets)


def _load(kind: str, data: str, quick: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Training images in [0, 1] with labels, and test images."""
    if kind == "digits":
        from sklearn.datasets import load_digits

        pixels, targets = (torch.from_numpy(part) for part in load_digits(return_X_y=True))  # type: ignore[arg-type]
        images, labels = pixels.float().reshape(-1, 1, 8, 8) / 16, targets
        return images[:1400], labels[:1400], images[1400:]
    train = load_images(Path(data) / kind, "train", limit=300 if quick else 20_000)
    test = load_images(Path(data) / kind, "test", limit=100 if quick else None).images
    assert train.labels is not None  # noqa: S101
    some = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:5000]  # MNIST's first 5,000 are easier
    return train.images, train.labels, test[some]


def _classifier(images: Tensor, labels: Tensor, conv: bool, iterations: int) -> nn.Module:
    """The feature net: its 64 units before the last layer."""
    channels, height, width = images.shape[1:]
    body: list[nn.Module] = [nn.Flatten(), nn.Linear(channels * height * width, 128), nn.ReLU(), nn.Dropout(0.3)]
    inner = 128
    if conv:
        body = [
            nn.AvgPool2d(4),
            nn.Conv2d(channels, 32, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
        ]
        inner = 64 * (height // 16) * (width // 16)
    net = nn.Sequential(*body, nn.Linear(inner, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
    for _ in range(iterations):
        rows = torch.randint(len(images), (128,))
        loss = nn.functional.cross_entropy(net(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net[:-1].eval().requires_grad_(False)


# --------------------------------------------------------------------------------------- the ladder with a known optimum


def ladder_problem(method: Method, seed: int, data: str, quick: bool) -> Problem:
    """Data of a ladder with known quadratic energies; the learner has the same ladder with f = 0.

    The frozen rules see draws of (z_1, z_2) themselves, and their optimum is those energies: KL(truth ‖ p(z)). The joint
    rules see x, and may change the ladder too: KL(truth ‖ p(x)), 0 at the optimum.
    """
    dims, n = (2, 2), 2000 if quick else 50_000
    joint = method in JOINT_METHODS
    ladder = GaussianLadder(dims, 3, seed) if joint else PairsLadder(dims, x_dim=4, seed=seed)
    truth = copy.deepcopy(ladder)
    mean, covariance = gaussian(truth, tilted=True)
    part = slice(4, 7) if joint else slice(0, 4)
    target = mean[part], covariance[part, part]
    draws = torch.distributions.MultivariateNormal(*target).sample((n,))

    def energies() -> list[nn.Module]:
        return [QuadraticEnergy(torch.zeros(d, d).double(), torch.zeros(d).double()) for d in dims]

    def distance(prior: JointEBMPrior) -> float:
        ladder.energies = list(prior.energies)  # type: ignore[assignment]
        now = gaussian(ladder, tilted=True)
        return kl(target, (now[0][part], now[1][part, part]))

    ladder.energies = energies()  # type: ignore[assignment]
    start = distance(JointEBMPrior(ladder, energies()))
    return Problem(ladder, energies, draws, 64, distance, start, 0.0)


PROBLEMS: dict[str, Callable[[Method, int, str, bool], Problem]] = {
    "ladder": ladder_problem,
    "digits": _images("digits"),
    "mnist": _images("mnist"),
    "cifar10": _images("cifar10"),
}


# ------------------------------------------------------------------------------------------------------- the plain loop


def plain_loop(problem: Problem, method: Method, iterations: int, largest: float, least_acceptance: float) -> int | None:
    """The rule as public code has it: Adam 2e-4, LeakyReLU energies, chains of a fixed step, and nothing that holds it.

    All chains run in noise space, where a fixed step has the best chance: 20 Euler steps of s = 0.3 for the prior and of 0.1
    for the posterior.

    Returns:
        The iteration at which it failed, or None.
    """
    generator, joint = problem.generator, method in JOINT_METHODS
    shapes = generator.latent_shapes
    custom = problem.energies()
    quadratic = custom is not None and isinstance(custom[0], QuadraticEnergy)
    energies = list(custom) if custom is not None and quadratic else [_plain_energy(shape) for shape in shapes]
    weights = [p for f in energies for p in f.parameters()]
    weights += [p for p in generator.parameters() if p.requires_grad] if joint else []
    optimizer = torch.optim.Adam(weights, lr=2e-4)
    step = 0.3

    def run(
        nets: Sequence[nn.Module], start: Sequence[Tensor], x: Tensor | None, s: float, *, measure: bool
    ) -> tuple[tuple[Tensor, ...], float]:
        with torch.no_grad():
            target = Target(generator, nets, "noise", len(start[0]), x=x)  # type: ignore[arg-type]
            settings = ChainSettings(steps=20, step_size=s, scheme="euler", adjust=False, backend="eager")
            draw = sample_target(target, settings, default_step_size=s, start=start, measure=measure)
        accepted = None if draw.result is None else draw.result.acceptance
        return draw.latents, 1.0 if accepted is None else float(accepted.mean())

    def chain(start: Sequence[Tensor], x: Tensor | None, s: float) -> tuple[tuple[Tensor, ...], float]:
        return run(energies, start, x, s, measure=True)

    def f(latents: Sequence[Tensor], nets: Sequence[nn.Module] = energies) -> Tensor:
        return torch.stack([net(z) for net, z in zip(nets, latents, strict=True)], 1)

    accepted, previous, iteration = 1.0, None, 0
    try:
        for iteration in range(1, iterations + 1):
            if method == "multi_stage_nce" and iteration in (iterations // 3 + 1, 2 * iterations // 3 + 1):
                previous = copy.deepcopy(energies)
            x = problem.data[torch.randint(len(problem.data), (problem.batch_size,))]
            with torch.no_grad():
                prior_draw = ancestral(generator, len(x)).latents
            inferred = generator.infer(x)
            positive, log_q = inferred.latents, inferred.log_q.sum(1)
            negative = prior_draw
            if method in LANGEVIN_METHODS:
                negative, accepted = chain(prior_draw, None, step)
            elif previous is not None:
                negative, _ = run(previous, prior_draw, None, step, measure=False)
            if method == "joint":
                positive, _ = chain([z.detach() for z in positive], x, 0.1)
            if not joint:
                positive = tuple(z.detach() for z in positive)
            up, down = f(positive), f(negative)
            if method in LANGEVIN_METHODS:
                loss = down.sum(1).mean() - up.sum(1).mean()
            else:
                before = (0.0, 0.0) if previous is None else (f(positive, previous).sum(1), f(negative, previous).sum(1))
                a, b = up.sum(1) - before[0], down.sum(1) - before[1]
                loss = nn.functional.softplus(-a).mean() + nn.functional.softplus(b).mean()
            if joint:
                topdown = TopDown(generator, len(x))
                descent = topdown.descend(positive, "latent", to_observation=True)
                below = topdown.descend(negative, "latent").log_priors().sum(1).mean()
                likelihood = topdown.likelihood(descent).log_prob(x) + descent.log_priors().sum(1)
                loss = loss + below - likelihood.mean() + (log_q.mean() if method == "variational" else 0.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if iteration % _CHECK_EVERY == 0 or iteration == iterations:
                worst = float(torch.cat([up, down]).detach().abs().max())
                if not worst <= largest or not math.isfinite(float(loss.detach())):
                    return iteration
                if method in LANGEVIN_METHODS and accepted < least_acceptance and iteration == iterations:
                    return iteration
    except (ArithmeticError, ValueError):  # a chain, or a distribution's parameters, stopped being finite
        return iteration
    return None


def _plain_energy(shape: torch.Size) -> nn.Module:
    """Two hidden layers with LeakyReLU 0.2, as published."""
    n = math.prod(shape)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(n, 200),
        nn.LeakyReLU(0.2),
        nn.Linear(200, 200),
        nn.LeakyReLU(0.2),
        nn.Linear(200, 1),
        nn.Flatten(0),
    )
