"""What it costs to run a deep model through the protocol: NVAE with 2 scales of 8 groups at 32 × 32, and `ResidualVAE`.

    python benchmarks/adapters.py            # ten minutes or more on two cores that do nothing else
    python benchmarks/adapters.py --quick    # see that it runs

The NVAE is a model of our own with the interface and the cells of NVAE (`nvae_style.py`), in the sizes of its training
script's defaults; it goes through `NVAEAdapter`. Full sampler: an eager loop of noise-space Langevin that runs the whole
model in every step, image tower included, as code does that has no way to stop above the image. Every figure is a median of
ratios of runs that alternate within this one process; compilation is not counted. Writes docs/results/adapters.json and .md.
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
from nvae_style import NVAEStyle
from results import ROOT, write_results
from torch import Tensor, nn

from energy_prior import ConvEnergy, JointEBMPrior, ResidualVAE
from energy_prior.adapters import NVAEAdapter
from energy_prior.process import frozen

STEP, BATCH = 0.1, 16
GOALS: dict[tuple[str, str], float | None] = {
    ("nvae_style", "adapter_over_full_sampler"): 0.75,
    ("nvae_style", "compiled_over_full_sampler"): 0.55,
    ("nvae_style", "peak_memory_over_full_sampler"): 0.60,
    ("residual_vae", "ours_over_full_sampler"): None,
    ("residual_vae", "compiled_over_full_sampler"): None,
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
        run = chains(with_energies(nvae_style()), 2)[options.memory]
        run()
        print(added_memory(run))
        return
    quick, figures = options.quick, {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a step that falls back to eager mode must not pass for a compiled one
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        for case, name, generator in (
            ("nvae_style", "adapter", nvae_style(quick)),
            ("residual_vae", "ours", ResidualVAE((3, 32, 32), groups=(1, 1) if quick else (8, 8)).eval()),
        ):
            ratio = alternate(chains(with_energies(generator), 4 if quick else 20), 2 if quick else 7)
            figures[case, f"{name}_over_full_sampler"] = ratio("ours", "loop")
            figures[case, "compiled_over_full_sampler"] = ratio("compiled", "loop")
        peaks = {name: apart(__file__, "--memory", name, give_back=True) for name in ("ours", "loop")}
        figures["nvae_style", "peak_memory_over_full_sampler"] = peaks["ours"] / peaks["loop"]
        ratio = alternate(samplers(with_energies(nvae_style(quick))), 4 if quick else 25)
        figures["sample_steps_0", "over_own_sampler"] = ratio("ours", "own")
    rows = goal_rows(GOALS, figures)
    out = Path(tempfile.mkdtemp()) if quick else ROOT / "docs" / "results"
    write_results(out / "adapters.json", rows)
    text = "`python benchmarks/adapters.py`: ratios within one run; its docstring says what is compared."
    (out / "adapters.md").write_text(ratio_table("Deep models through the protocol", text, rows))
    print((out / "adapters.md").read_text())


def nvae_style(quick: bool = False) -> NVAEAdapter:
    """The NVAE, wrapped, with statistics of its batch norms that are not those of a new one."""
    torch.manual_seed(0)
    model = NVAEStyle(groups=1 if quick else 8).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return NVAEAdapter(model)


# ------------------------------------------------------------------------------------------------------------ what is compared


def with_energies(generator: Any) -> JointEBMPrior:
    """The joint prior of a generator with energies of z_i, of a few nats: their chains run the generator in every step."""
    energies = [ConvEnergy(shape) for shape in generator.latent_shapes]
    for f in energies:
        nn.init.normal_(f.net[-1].weight, std=0.1)  # type: ignore[index, arg-type]
    return JointEBMPrior(generator, energies)


def full_pass(generator: Any, noise: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The model's own way from noise to latents (z_1 first) and an image."""
    state, latents = generator.start(len(noise[0])), []
    for layer in range(len(noise), 0, -1):
        p = generator.conditional(state, layer)
        latents.insert(0, p.loc + p.scale * noise[layer - 1])
        state = generator.descend(state, latents[0], layer)
    return latents, generator.likelihood(state).mean


def plain_loop(prior: JointEBMPrior, steps: int, step_size: float = STEP) -> Callable[[], Tensor]:
    """Noise-space Langevin from noise to latents with the full sampler in every step; gives Σf before each, (steps, batch)."""
    generator: Any = prior.generator
    start = [torch.randn(BATCH, *shape) for shape in generator.latent_shapes]

    def loop() -> Tensor:
        noise, sums, a = list(start), list[Tensor](), step_size**2
        with frozen(generator, prior):
            for _ in range(steps):
                leaves = [t.detach().requires_grad_() for t in noise]
                with torch.enable_grad():
                    latents, _ = full_pass(generator, leaves)  # the image is made, as the sampler makes it
                    energies = torch.stack([f(z) for f, z in zip(prior.energies, latents, strict=True)]).sum(0)
                    gradient = torch.autograd.grad(energies.sum(), leaves)
                sums.append(energies.detach())
                pairs = [(t.detach(), g) for t, g in zip(leaves, gradient, strict=True)]
                noise = [t + 0.5 * a * (g - t) + step_size * torch.randn_like(t) for t, g in pairs]
            with torch.no_grad():
                full_pass(generator, noise)
        return torch.stack(sums)

    return loop


def chains(prior: JointEBMPrior, steps: int) -> dict[str, Callable[[], object]]:
    """Noise-space Langevin from noise to latents: the plain loop, ours, and ours compiled."""

    def ours(backend: Any) -> Callable[[], object]:
        return lambda: prior.sample_latents(BATCH, steps=steps, step_size=STEP, backend=backend)

    return {"loop": plain_loop(prior, steps), "ours": ours("eager"), "compiled": ours("compiled")}


def samplers(prior: JointEBMPrior) -> dict[str, Callable[[], object]]:
    """Images without a chain: the model's own sampler, and ours with steps=0."""
    batch, generator = 16, prior.generator

    def own() -> None:
        with torch.no_grad():
            full_pass(generator, [torch.randn(batch, *shape) for shape in generator.latent_shapes])

    return {"own": own, "ours": lambda: prior.sample(batch, steps=0)}


if __name__ == "__main__":
    main()
