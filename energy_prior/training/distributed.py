"""Where a run computes: one process, or several over torch.distributed through Hugging Face `accelerate`."""

from __future__ import annotations

__all__ = ["Engine", "launched_accelerator", "map_batches"]

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from energy_prior.checks.arguments import check_count, require_extra
from energy_prior.errors import ArgumentError, DistributedError

if TYPE_CHECKING:
    from accelerate import Accelerator


class Engine:
    """The processes of a run and what they have to agree on. Without an accelerator: this process alone.

    Args:
        accelerator: an `accelerate.Accelerator`, or None.

    Attributes:
        rank: number of this process, 0 … world − 1.
        world: number of processes.
    """

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        if accelerator is not None and not hasattr(accelerator, "num_processes"):
            raise ArgumentError(f"accelerator: expected an accelerate.Accelerator or None, got {type(accelerator).__name__}.")
        if accelerator is not None and str(accelerator.mixed_precision) not in ("no", "bf16"):
            raise ArgumentError(
                f'accelerator: expected mixed_precision "no" or "bf16", got {accelerator.mixed_precision!r}, whose small range '
                "does not hold log densities of hundreds of nats."
            )
        self._accelerator = accelerator
        self.rank = accelerator.process_index if accelerator else 0
        self.world = accelerator.num_processes if accelerator else 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """The accelerator's mixed precision."""
        return self._accelerator.autocast() if self._accelerator else contextlib.nullcontext()

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each tensor over the processes, in one message."""
        if self.world == 1:
            return list(tensors)
        flat = torch.cat([t.flatten() for t in tensors])
        total = self._together(lambda accelerator: accelerator.reduce(flat, reduction="mean"))
        return [part.reshape(t.shape) for part, t in zip(total.split([t.numel() for t in tensors]), tensors, strict=True)]

    def share(self, buffers: Sequence[Tensor]) -> None:
        """Averages what the processes keep beside weights, such as batch norm's running statistics; in place."""
        floating = [b for b in buffers if b.is_floating_point()]
        if self.world > 1 and floating:
            with torch.no_grad():
                for here, mean in zip(floating, self.mean(floating), strict=True):
                    here.copy_(mean)

    def stacked(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, (world, …); all of one shape."""
        if self.world == 1:
            return tensor[None]
        return self._together(lambda accelerator: accelerator.gather(tensor[None].contiguous()))

    def objects(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        if self.world == 1:
            return [value]
        gather = require_extra("accelerate.utils", "train").gather_object
        return self._together(lambda accelerator: gather([value]))

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            self._together(lambda accelerator: accelerator.wait_for_everyone())

    @contextlib.contextmanager
    def own_stream(self, device: torch.device) -> Iterator[None]:
        """A random stream of its own for each process, from seeds that the first one draws; alone: the stream as it is."""
        if self.world == 1:
            yield
            return
        seeds = self.objects(torch.randint(2**62, (self.world,)).tolist())[0]
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seeds[self.rank])
            yield

    def agree(self, what: str, value: Any) -> None:
        """Raises `ArgumentError` unless every process has the same value."""
        values = self.objects(value)
        if any(v != values[0] for v in values):
            raise ArgumentError(
                f"{what}: expected the same in every process, but they differ. Build the model from the same checkpoint, or "
                "under the same seed (accelerate.utils.set_seed), in each of them."
            )

    def _together(self, call: Callable[[Any], Any]) -> Any:
        try:
            return call(self._accelerator)
        except RuntimeError as error:
            raise DistributedError(
                f"Process {self.rank} of {self.world} lost the others: one of them has died or is out of reach ({error}). "
                "Look for the first error in its log; the last checkpoint in run_dir is whole, and the same command goes on "
                "from there."
            ) from error


def map_batches(
    call: Callable[..., Tensor],
    data: Tensor | int,
    *,
    batch_size: int = 256,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    **options: Any,
) -> Tensor:
    """`call(batch, rng=…, **options)` over a large set in batches, shared out over the processes, and all results in order.

    Batch i has a random stream of its own, made from `seed` and i: the result does not depend on the number of processes.

        samples = map_batches(prior.sample, 50_000, accelerator=accelerator)
        scores = map_batches(prior.anomaly_score, images, accelerator=accelerator)

    Args:
        call: a method of the prior, or anything like it, that takes a batch and `rng` and gives one row per observation.
        data: observations, (n, …), handed on batch by batch; or a number n, and `call` gets the size of each batch.
        batch_size: rows per call, ≥ 1.
        seed: of the random streams.
        accelerator: an `accelerate.Accelerator` (extra "train"); None: this process alone.
        **options: handed on to `call`.

    Returns:
        (n, …), on the CPU, the same in every process.
    """
    check_count("batch_size", batch_size)
    engine = Engine(accelerator)
    n = len(data) if isinstance(data, Tensor) else check_count("data", data)
    if n == 0:
        raise ArgumentError("data: expected at least one observation, got none.")
    starts = range(0, n, batch_size)
    seeds = torch.randint(2**62, (len(starts),), generator=torch.Generator().manual_seed(seed)).tolist()
    mine: dict[int, Tensor] = {}
    for i in range(engine.rank, len(starts), engine.world):
        size = min(batch_size, n - starts[i])
        batch = data[starts[i] : starts[i] + size] if isinstance(data, Tensor) else size
        mine[i] = call(batch, rng=torch.Generator().manual_seed(seeds[i]), **options).detach().cpu()
    parts: dict[int, Tensor] = {}
    for part in engine.objects(mine):
        parts |= part
    return torch.cat([parts[i] for i in range(len(starts))])


@contextlib.contextmanager
def launched_accelerator(*, cpu: bool = False) -> Iterator[Accelerator | None]:
    """An `accelerate.Accelerator` if `accelerate launch` or torchrun started this process, else None.

    The processes leave together at the end: gloo aborts a process that goes while its threads still listen.

    Args:
        cpu: stay on the CPU even where there is a GPU.
    """
    if not any(name in os.environ for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")):
        yield None
        return
    accelerator = require_extra("accelerate", "train").Accelerator(cpu=cpu)
    yield accelerator
    accelerator.wait_for_everyone()
    accelerator.end_training()
    accelerator.state.destroy_process_group()
