"""What tests of training share: tiny images, a tiny prior, a task of it, and a generator that knows nothing of autocast."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from energy_prior import Inferred, JointEBMPrior, LadderVAE, TrainingWarning, denoising_energies
from energy_prior.training import FitConfig, FitHooks
from energy_prior.training.batches import Batches
from energy_prior.training.distributed import Engine
from energy_prior.training.rules import FitTask

X = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(energies: list[nn.Module] | None = None, seed: int = 0) -> JointEBMPrior:
    torch.manual_seed(seed)
    return JointEBMPrior(LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8), energies)


def make_for(method: str) -> JointEBMPrior:
    """The same, with energies that this rule can train."""
    torch.manual_seed(0)
    return make(list(denoising_energies([(3,), (2,)], channels=4))) if method == "denoising" else make()


def hooks_of(prior: JointEBMPrior) -> FitHooks:
    """Hooks that leave the prior's calibration and fingerprint as they are."""
    return FitHooks(
        started=prior.train_jointly,
        learned=lambda: None,
        save=prior.save,
        sample=lambda n, step_size: prior.sample(n, step_size=step_size),
        tuned=prior.step_size.fill_,
    )


def task_of(prior: JointEBMPrior, method: Any, **settings: Any) -> FitTask:
    options: dict[str, Any] = {"batch_size": 16, "steps": 3} | settings
    config = FitConfig(**options).for_method(method)
    batches = Batches(X, config, prior.generator, X.shape[1:], X)
    return FitTask(prior.model, batches, method, config, Engine(), hooks_of(prior), X)


def weights(module: nn.Module) -> Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """The messages of every `TrainingWarning` inside."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TrainingWarning)
        try:
            yield said
        finally:
            said.extend(str(w.message) for w in caught)


class TwoLayers(nn.Module):
    """README's example: its distributions take the dtype that autocast gives their parameters."""

    latent_shapes = (torch.Size([4]), torch.Size([2]))

    def __init__(self) -> None:
        super().__init__()
        self.m, self.g = nn.Linear(2, 4), nn.Linear(4, 8)
        self.q2, self.q1 = nn.Linear(8, 2), nn.Linear(10, 4)

    def start(self, batch_size: int) -> Tensor:
        return self.m.weight.new_zeros(batch_size, 2)

    def conditional(self, state: Tensor, layer: int) -> Normal:
        return Normal(state, torch.ones_like(state)) if layer == 2 else Normal(self.m(state), 0.5)

    def descend(self, state: Tensor, z: Tensor, layer: int) -> Tensor:
        return z

    def likelihood(self, state: Tensor) -> Independent:
        return Independent(Normal(self.g(state), 0.1), 1)

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        def draw(loc: Tensor) -> tuple[Tensor, Tensor]:
            z = loc + 0.3 * torch.randn(loc.shape, generator=rng, dtype=loc.dtype, device=loc.device)
            return z, Normal(loc, 0.3).log_prob(z).sum(1)

        z2, log_q2 = draw(self.q2(x))
        z1, log_q1 = draw(self.q1(torch.cat([x, z2], 1)))
        return Inferred((z1, z2), torch.stack([log_q1, log_q2], 1))


class Shifted(nn.Module):
    """One layer of N(0, I) whose posterior is N(far, I) whatever is observed."""

    def __init__(self, far: float, units: int) -> None:
        super().__init__()
        self.latent_shapes, self.x_shape, self.far = (torch.Size((units,)),), (1,), far
        self.anchor = nn.Parameter(torch.zeros(units))

    def start(self, batch_size: int) -> Tensor:
        return self.anchor.expand(batch_size, -1)

    def conditional(self, state: Tensor, layer: int) -> Normal:
        return Normal(state, torch.ones_like(state))

    def descend(self, state: Tensor, z: Tensor, layer: int) -> Tensor:
        return z

    def likelihood(self, state: Tensor) -> Any:
        return Independent(Normal(state[:, :1], 1.0), 1)

    def infer(self, x: Tensor) -> Inferred:
        q = Normal(self.anchor.expand(len(x), -1) + self.far, 1.0)
        z = q.rsample()
        return Inferred((z,), q.log_prob(z).sum(1, keepdim=True))
