"""Run by tests/test_distributed.py in two processes under `accelerate launch`: each mode prints or saves what it finds."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from ladders import PairsLadder, QuadraticEnergy

from energy_prior import JointEBMPrior, LadderVAE
from energy_prior.errors import EnergyPriorError
from energy_prior.training import map_batches
from energy_prior.training.chains import TrainingChains
from energy_prior.training.distributed import Engine


def fitted(out: Path, accelerator: Any, rank: int, world: int) -> None:
    """Five updates by NCE whose draws are known: the rows of a table, shared out as the data are."""
    torch.manual_seed(0)
    ladder = PairsLadder((2, 2), x_dim=4, seed=1)
    data = torch.distributions.MultivariateNormal(*ladder.tilted()).sample((64,))
    table = torch.randn(100, 16, 4, dtype=torch.float64)
    calls = iter(range(100))

    def ancestral(self: TrainingChains, n: int) -> tuple[torch.Tensor, ...]:
        return tuple(table[next(calls)][rank::world].split((2, 2), dim=1))

    original, TrainingChains.ancestral = TrainingChains.ancestral, ancestral  # type: ignore[method-assign]
    prior = JointEBMPrior(ladder, [QuadraticEnergy(torch.zeros(2, 2).double(), torch.zeros(2).double()) for _ in range(2)])
    prior.fit(data, iterations=5, batch_size=16 // world, accelerator=accelerator, progress=False)
    TrainingChains.ancestral = original  # type: ignore[method-assign]
    torch.save([p.detach() for p in prior.parameters()], out / f"weights-{world}-{rank}.pt")


def main() -> None:
    """One mode."""
    mode, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    if mode == "one":
        fitted(out, None, 0, 1)
        return
    accelerator = Accelerator(cpu=True)
    rank, world = accelerator.process_index, accelerator.num_processes
    if mode == "two":
        fitted(out, accelerator, rank, world)
        torch.manual_seed(0)
        prior = JointEBMPrior(LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8))
        samples = map_batches(prior.sample, 11, batch_size=3, seed=4, accelerator=accelerator, steps=3)
        assert torch.equal(samples, map_batches(prior.sample, 11, batch_size=3, seed=4, steps=3))
        images = torch.rand(10, 1, 4, 4)
        scores = map_batches(prior.anomaly_score, images, batch_size=4, accelerator=accelerator)
        assert torch.equal(scores, map_batches(prior.anomaly_score, images, batch_size=4))
        settings: Any = {"steps": 3, "posterior_steps": 2, "persistent": 16, "progress": False, "accelerator": accelerator}
        for method in ("two_stage", "variational"):
            prior.fit(images, method, iterations=6, checkpoint_every=3, run_dir=out / method, **settings)
        Engine(accelerator).agree("weights", [float(p.detach().sum()) for p in prior.parameters()])
        again = prior.fit(images, method, iterations=6, checkpoint_every=3, run_dir=out / method, **settings)
        assert again.resumed_at == 6
        vae, stray = LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8), []
        for seed in (0, rank):  # the generator agrees, the energies do not
            torch.manual_seed(seed)
            stray.append(JointEBMPrior(vae))
        vae.load_state_dict({name: torch.zeros_like(value) for name, value in vae.state_dict().items()})
        try:
            stray[1].fit(images, iterations=2, progress=False, accelerator=accelerator)
        except EnergyPriorError as error:
            (out / f"stray-{rank}.txt").write_text(str(error))
        torch.manual_seed(rank)
        other = JointEBMPrior(LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8))
        try:
            other.fit(images, iterations=2, progress=False, accelerator=accelerator)
        except EnergyPriorError as error:
            (out / f"disagree-{rank}.txt").write_text(str(error))
    if mode == "dies":
        torch.manual_seed(0)
        prior = JointEBMPrior(LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8))
        if rank == 1:
            original = TrainingChains.ancestral

            def dies(self: TrainingChains, n: int) -> Any:
                if (out / "run" / "checkpoint-00000004").exists():
                    os._exit(3)
                return original(self, n)

            TrainingChains.ancestral = dies  # type: ignore[method-assign]
        try:
            prior.fit(
                torch.rand(32, 1, 4, 4),
                iterations=50,
                checkpoint_every=2,
                run_dir=out / "run",
                accelerator=accelerator,
                progress=False,
            )
        except EnergyPriorError as error:
            (out / "died.txt").write_text(str(error))
            raise
    accelerator.wait_for_everyone()
    accelerator.state.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may abort a process that is being taken apart ("terminate called without an active exception")


if __name__ == "__main__":
    main()
