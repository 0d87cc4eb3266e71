"""Where a run computes: one process, or several over torch.distributed through Hugging Face `accelerate`."""

from __future__ import annotations

__all__ = ["Engine", "launched_accelerator", "map_batches"]

import contextlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from energy_prior.checks.arguments import is_array
from energy_prior.checks.settings import check_count, require_extra, whole_number
from energy_prior.errors import ArgumentError, DistributedError, TrainingWarning, warn
from energy_prior.training.batches import observations_of

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
        self._accelerator, self._mixed = accelerator, False
        self.rank = accelerator.process_index if accelerator else 0
        self.world = accelerator.num_processes if accelerator else 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def check_mixed_precision(self, generator: Any) -> None:
        """Leaves mixed precision off, with a `TrainingWarning`, for a generator that does not say `autocast = True`."""
        mixed = self._accelerator is not None and str(self._accelerator.mixed_precision) != "no"
        self._mixed = mixed and getattr(generator, "autocast", False) is True
        if mixed and not self._mixed:
            warn(
                f"accelerator: {type(generator).__name__} is trained in full precision, as it does not say that it can do with "
                "mixed precision. If its own calls give parameters of distributions in the dtype of its weights under "
                "torch.autocast too, set autocast = True in the class.",
                TrainingWarning,
            )

    @contextlib.contextmanager
    def autocast(self) -> Generator[None]:
        """The accelerator's mixed precision, once `check_mixed_precision` has found that the generator takes it."""
        if self._accelerator is None or not self._mixed:
            yield
            return
        with self._accelerator.autocast():
            torch.clear_autocast_cache()  # it is not the outermost autocast, and would keep bf16 copies of older weights
            yield

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


@contextlib.contextmanager
def launched_accelerator(*, cpu: bool = False) -> Generator[Any]:
    """An `accelerate.Accelerator` if `accelerate launch` or torchrun started this process, else None.

    The processes leave together at the end: gloo aborts a process that goes while its threads still listen.

    Args:
        cpu: stay on the CPU even where there is a GPU.

    Examples:
        >>> from energy_prior import load_example, map_batches
        >>> with launched_accelerator() as accelerator:  # None where this process was started alone
        ...     samples = map_batches(load_example().sample, 6, steps=5, accelerator=accelerator)
        >>> samples.shape
        torch.Size([6, 1, 8, 8])
    """
    if not any(name in os.environ for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")):
        yield None
        return
    accelerator = require_extra("accelerate", "train").Accelerator(cpu=cpu)
    yield accelerator
    accelerator.wait_for_everyone()
    accelerator.end_training()
    accelerator.state.destroy_process_group()


def map_batches(
    call: Callable[..., Any],
    data: Tensor | Iterable[Any] | int,
    *,
    batch_size: int = 256,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    **options: Any,
) -> Any:
    """`call(batch, rng=…, **options)` over a large set in batches, shared out over the processes, and all results in order.

    Batch i has a random stream of its own, made from `seed` and i: the result does not depend on the number of processes.

        samples = map_batches(prior.sample, 50_000, accelerator=accelerator)
        scores = map_batches(prior.anomaly_score, images, accelerator=accelerator)

    Args:
        call: a method of the prior, or anything like it, that takes a batch and `rng` and gives a tensor, or a tuple of
            tensors, with one row per observation.
        data: observations, (n, …), a tensor or an array, handed on in batches; an iterable of batches (a `DataLoader`), of
            tensors, arrays, tuples whose first entry is one or dicts with one, handed on as they come, and the same in every
            process; or a number n, and `call` gets the size of each batch.
        batch_size: rows per call, ≥ 1; not used where the data come in batches.
        seed: of the random streams.
        accelerator: an `accelerate.Accelerator` (extra "train"); None: this process alone.
        **options: handed on to `call`.

    Returns:
        (n, …), or a tuple of such tensors where `call` gives tuples; on the CPU, the same in every process.

    Raises:
        ArgumentError: if the data are of another kind or empty, or if `call` gives anything else.

    Examples:
        >>> from energy_prior import load_example
        >>> prior = load_example()
        >>> samples = map_batches(prior.sample, 10, batch_size=5, steps=5)
        >>> samples.shape, map_batches(prior.anomaly_score, samples).shape
        (torch.Size([10, 1, 8, 8]), torch.Size([10]))
    """
    check_count("batch_size", batch_size)
    engine = Engine(accelerator)
    seeds = torch.Generator(device="cpu").manual_seed(check_count("seed", seed, least=0))
    mine: dict[int, tuple[Tensor, ...]] = {}
    count, as_tuple = 0, False
    for count, (batch, rows) in enumerate(_batches(data, batch_size), start=1):
        of_batch = int(torch.randint(2**62, (), generator=seeds, device="cpu"))
        if (count - 1) % engine.world == engine.rank:
            result = call(batch, rng=torch.Generator(device="cpu").manual_seed(of_batch), **options)
            as_tuple = isinstance(result, tuple)
            mine[count - 1] = _rows_of(result, rows, call)
    if count == 0:
        raise ArgumentError("data: expected at least one observation, got none.")
    everywhere = engine.objects((mine, as_tuple))
    parts = {i: part for found, _ in everywhere for i, part in found.items()}
    joined = tuple(torch.cat(column) for column in zip(*(parts[i] for i in range(count)), strict=True))
    return joined if any(flag for _, flag in everywhere) else joined[0]


def _batches(data: Any, batch_size: int) -> Iterator[tuple[Any, int]]:
    """What each call gets, and how many observations that is."""
    n = whole_number(data)
    if n is not None or isinstance(data, float):
        total = check_count("data", data)
        sizes = (min(batch_size, total - start) for start in range(0, total, batch_size))
        yield from ((size, size) for size in sizes)
    elif isinstance(data, Tensor) or is_array(data):
        if len(data.shape) == 0:
            raise ArgumentError(f"data: expected observations, (n, …), or a number of them, got {data!r}.")
        parts = (data[start : start + batch_size] for start in range(0, len(data), batch_size))
        yield from ((part, len(part)) for part in parts)
    elif isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping):
        for item in data:
            name, batch = observations_of(item)
            if not isinstance(batch, Tensor) and not is_array(batch):
                raise ArgumentError(f"{name}: expected a tensor or an array, got {type(batch).__name__}.")
            yield batch, len(batch)
    else:
        raise ArgumentError(
            f"data: expected a tensor, an array, an iterable of batches or a number of observations, got {type(data).__name__}."
        )


def _rows_of(result: Any, rows: int, call: Any) -> tuple[Tensor, ...]:
    """The tensors of a result, on the CPU, if there is a row for every observation."""
    name = getattr(call, "__qualname__", type(call).__name__)
    tensors = result if isinstance(result, tuple) else (result,)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            kind = type(result).__name__ + (f" with a {type(tensor).__name__} in it" if result is not tensor else "")
            raise ArgumentError(f"call: expected {name} to give a tensor or a tuple of tensors, got a {kind}.")
        if tensor.ndim == 0 or len(tensor) != rows:
            raise ArgumentError(
                f"call: expected {name} to give one row for each of {rows} observations, got shape {tuple(tensor.shape)}."
            )
    if not tensors:
        raise ArgumentError(f"call: expected {name} to give a tensor or a tuple of tensors, got an empty tuple.")
    return tuple(tensor.detach().cpu() for tensor in tensors)
