"""What it costs to run a deep model through the protocol: 2 scales of 8 groups at 32 × 32, in the manner of NVAE.

    python benchmarks/adapters.py            # a few minutes on two cores that do nothing else
    python benchmarks/adapters.py --quick    # see that it runs

Full sampler: an eager loop of noise-space Langevin that in every step runs the whole model, image tower included, as code does
that has no way to stop above the image. Every figure is a median of ratios of runs that alternate within this one process;
compilation is not counted. Writes docs/results/adapters.json and .md.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import added_memory, alternate, apart, goal_rows, ratio_table
from results import ROOT, write_results
from torch import Tensor, nn

from energy_prior import JointEBMPrior, ResidualVAE
from energy_prior._util import frozen

STEP, BATCH = 0.1, 8
GOALS: dict[tuple[str, str], float | None] = {
    ("nvae_style", "adapter_over_full_sampler"): 0.83,
    ("nvae_style", "compiled_over_full_sampler"): 0.60,
    ("nvae_style", "peak_memory_over_full_sampler"): 0.80,
    ("sample_steps_0", "over_own_sampler"): 1.05,
}


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="see that it runs; writes nothing into docs/results")
    parser.add_argument("--memory", choices=("ours", "loop"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        torch.set_num_threads(1)
        run = chains(2)[options.memory]
        run()
        print(added_memory(run))
        return
    quick, figures = options.quick, {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a step that falls back to eager mode must not pass for a compiled one
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        runs = chains(4 if quick else 20)
        ratio = alternate(runs, 2 if quick else 9)
        figures["nvae_style", "adapter_over_full_sampler"] = ratio("ours", "loop")
        figures["nvae_style", "compiled_over_full_sampler"] = ratio("compiled", "loop")
        peaks = {name: apart(__file__, "--memory", name) for name in ("ours", "loop")}
        figures["nvae_style", "peak_memory_over_full_sampler"] = peaks["ours"] / peaks["loop"]
        ratio = alternate(samplers(), 4 if quick else 25)
        figures["sample_steps_0", "over_own_sampler"] = ratio("ours", "own")
    rows = goal_rows(GOALS, figures)
    out = Path(tempfile.mkdtemp()) if quick else ROOT / "docs" / "results"
    write_results(out / "adapters.json", rows)
    text = "`python benchmarks/adapters.py`: ratios within one run; its docstring says what is compared."
    (out / "adapters.md").write_text(ratio_table("Deep models through the protocol", text, rows))
    print((out / "adapters.md").read_text())


def deep_prior() -> JointEBMPrior:
    """16 layers of latents, with energies of a few nats."""
    torch.manual_seed(0)
    generator = ResidualVAE((3, 32, 32), groups=(8, 8), channels=64).eval()
    prior = JointEBMPrior(generator)
    for f in prior.energies:
        nn.init.normal_(f.net[-1].weight, std=0.1)  # type: ignore[union-attr,index]
    return prior


def full_pass(generator: Any, noise: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The model's own way from noise to latents (z_1 first) and an image."""
    state, latents = generator.start(len(noise[0])), []
    for eps in reversed(noise):
        p = generator.conditional(state)
        latents.insert(0, p.loc + p.scale * eps)
        state = generator.descend(state, latents[0])
    return latents, generator.likelihood(state).mean


def chains(steps: int) -> dict[str, Callable[[], object]]:
    """Noise-space Langevin: the plain loop with the full sampler in it, ours, and ours compiled."""
    prior = deep_prior()
    generator: Any = prior.generator
    start = [torch.randn(BATCH, *shape) for shape in generator.latent_shapes]

    def loop() -> None:
        noise = list(start)
        with frozen(generator, prior):
            for _ in range(steps):
                leaves = [t.detach().requires_grad_() for t in noise]
                with torch.enable_grad():
                    latents, _ = full_pass(generator, leaves)  # the image is made, as the sampler makes it
                    energies = [f(z) for f, z in zip(prior.energies, latents, strict=True)]
                    gradient = torch.autograd.grad(torch.stack(energies).sum(), leaves)
                a = STEP**2
                noise = [t.detach() + 0.5 * a * (g - t.detach()) + STEP * torch.randn_like(t) for t, g in zip(leaves, gradient)]

    def ours(backend: Any) -> Callable[[], object]:
        return lambda: prior.sample_latents(BATCH, steps=steps, step_size=STEP, backend=backend)

    return {"loop": loop, "ours": ours("eager"), "compiled": ours("compiled")}


def samplers() -> dict[str, Callable[[], object]]:
    """Images without a chain: the model's own sampler, and ours with steps=0."""
    prior, batch = deep_prior(), 16
    generator: Any = prior.generator

    def own() -> None:
        with torch.no_grad():
            full_pass(generator, [torch.randn(batch, *shape) for shape in generator.latent_shapes])

    return {"own": own, "ours": lambda: prior.sample(batch, steps=0)}


if __name__ == "__main__":
    main()
