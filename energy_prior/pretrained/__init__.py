"""Small trained priors that come with the package, to try things on."""

from __future__ import annotations

__all__ = ["EXAMPLES", "load_example"]

from pathlib import Path

from energy_prior._util import shown
from energy_prior.errors import ArgumentError
from energy_prior.prior import JointEBMPrior

EXAMPLES = ("digits",)
"""Their names."""


def load_example(name: str = "digits") -> JointEBMPrior:
    """A small trained and calibrated prior with its generator, on the CPU; nothing is downloaded.

    "digits": scans of handwritten digits, (1, 8, 8) in [0, 1], scikit-learn's; a `LadderVAE` with two layers of latents. It is
    made by `examples/digits.py`; its card is README.md beside its files.

    Args:
        name: one of `EXAMPLES`.

    Raises:
        ArgumentError: if there is no such example.

    Examples:
        >>> prior = load_example("digits")
        >>> prior.sample(4).shape
        torch.Size([4, 1, 8, 8])
    """
    if name not in EXAMPLES:
        raise ArgumentError(f"name: expected one of {EXAMPLES}, got {shown(name)}.")
    return JointEBMPrior.from_pretrained(Path(__file__).parent / name)
