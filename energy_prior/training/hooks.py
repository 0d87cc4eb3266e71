"""What a run of `fit` asks of the object whose energies it trains."""

from __future__ import annotations

__all__ = ["FitHooks"]

import dataclasses
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class FitHooks:
    """What a run asks of the object whose energies it trains. All are called while no other public call runs.

    Attributes:
        started: a joint rule begins, or goes on: from now on the generator's weights belong to what is learned.
        learned: at the end, also after an error: the energies are others than before the run, so that whatever was computed
            for the old ones is void. Not called where nothing was learned yet.
        save: writes the object to a file: the last good average of a run that has diverged.
        sample: number n and step size -> observations under the energies as they are, (n, *x_shape), for pictures.
        tuned: the step size that the chains have from now on.
        exchange: other energies take the place of those that the library had chosen; None: they stay.

    Examples:
        >>> from energy_prior import load_example
        >>> prior = load_example()
        >>> hooks = FitHooks(
        ...     started=lambda: None,
        ...     learned=prior.calibration.forget,
        ...     save=prior.save,
        ...     sample=lambda n, step_size: prior.sample(n, step_size=step_size, steps=5),
        ...     tuned=prior.step_size.fill_,
        ... )
        >>> hooks.sample(2, 0.2).shape
        torch.Size([2, 1, 8, 8])
    """

    started: Callable[[], object]
    learned: Callable[[], object]
    save: Callable[[Path], object]
    sample: Callable[[int, float], Tensor]
    tuned: Callable[[float], object]
    exchange: Callable[[nn.ModuleList], object] | None = None
