"""What it costs to run a deep model through the protocol: NVAE with 2 scales of 8 groups at 32 × 32, and `ResidualVAE`.

    python benchmarks/adapters.py            # ten minutes or more on two cores that do nothing else
    python benchmarks/adapters.py --quick    # see that it runs

The NVAE is a decoder of our own with the interface and the cells of NVAE and the sizes of its training script's defaults; it
goes through `NVAEAdapter`. Full sampler: an eager loop of noise-space Langevin that in every step runs the whole model, image
tower included, as code does that has no way to stop above the image. Every figure is a median of ratios of runs that
alternate within this one process; compilation is not counted. Writes docs/results/adapters.json and .md.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measure import added_memory, alternate, apart, goal_rows, ratio_table
from results import ROOT, write_results
from torch import Tensor, nn

from energy_prior import ConvEnergy, JointEBMPrior, ResidualVAE
from energy_prior.adapters import NVAEAdapter
from energy_prior.process import frozen

STEP, BATCH = 0.1, 16
GOALS: dict[tuple[str, str], float | None] = {
    ("nvae_style", "adapter_over_full_sampler"): 0.83,
    ("nvae_style", "compiled_over_full_sampler"): 0.60,
    ("nvae_style", "peak_memory_over_full_sampler"): 0.80,
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


# ------------------------------------------------------------------------------------------------------------------ the model


class Conv(nn.Conv2d):
    """As NVAE's: it normalises its weights in every call."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.log_weight_norm = nn.Parameter(self.weight.square().sum((1, 2, 3), keepdim=True).sqrt().log())

    def normalize_weight(self) -> Tensor:
        """The weights that it convolves with."""
        return self.log_weight_norm.exp() * self.weight / self.weight.square().sum((1, 2, 3), keepdim=True).sqrt()


class Cell(nn.Module):
    """A cell of NVAE's decoder: 1 × 1 to a larger width, 5 × 5 per channel, 1 × 1 back, norms, squeeze and excite.

    Between groups the width is six times as large, in the image tower three times, as in NVAE.
    """

    def __init__(self, source: int, target: int, cell_type: str) -> None:
        super().__init__()
        self.cell_type, wide = cell_type, (3 if "post" in cell_type else 6) * source
        self.skip = Conv(source, target, 1) if "up" in cell_type else nn.Identity()
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (source, wide, wide, target))
        for norm in self.norms:
            nn.init.uniform_(norm.running_var, 0.5, 1.5)  # type: ignore[arg-type]
        self.expand, self.shrink = Conv(source, wide, 1, bias=False), Conv(wide, target, 1, bias=False)
        self.depthwise = Conv(wide, wide, 5, padding=2, groups=wide, bias=False)
        hidden = max(target // 16, 4)
        self.gate = nn.Sequential(nn.Linear(target, hidden), nn.ReLU(), nn.Linear(hidden, target), nn.Sigmoid())

    def forward(self, features: Tensor) -> Tensor:
        """Features, at twice the resolution where it goes up."""
        if "up" in self.cell_type:
            features = F.interpolate(features, scale_factor=2)
        h = F.silu(self.norms[1](self.expand(self.norms[0](features))))
        h = self.norms[3](self.shrink(F.silu(self.norms[2](self.depthwise(h)))))
        return self.skip(features) + 0.1 * h * self.gate(h.mean((2, 3)))[:, :, None, None]


class Combiner(nn.Module):
    """Where a group's z enters the features."""

    cell_type = "combiner_dec"

    def __init__(self, width: int, latents: int) -> None:
        super().__init__()
        self.conv = Conv(width + latents, width, 1)

    def forward(self, features: Tensor, z: Tensor) -> Tensor:
        """Features with z in them."""
        return self.conv(torch.cat([features, z], 1))


class NVAEStyle(nn.Module):
    """The decoder of an NVAE at 32 × 32, under NVAE's names; what only its encoder has is empty."""

    res_dist, vanilla_vae, crop_output, input_size, num_flows = True, False, False, 32, 0

    def __init__(self, groups: int, channels: int = 32, latents: int = 20, blocks: int = 2, cells: int = 3) -> None:
        super().__init__()
        width, side = channels * 2 ** (blocks + 1), 32 // 2 ** (blocks + 1)
        self.z0_size = [latents, side, side]
        self.prior_ftr0 = nn.Parameter(torch.randn(width, side, side))
        self.stem = Conv(3, channels, 3, padding=1)
        self.pre_process, self.enc_tower, self.enc0, self.enc_sampler, self.nf_cells = (nn.ModuleList() for _ in range(5))
        self.dec_tower, self.dec_sampler, self.post_process = (nn.ModuleList() for _ in range(3))
        for group in range(2 * groups):
            if group == groups:
                self.dec_tower.append(Cell(width, width // 2, "up_dec"))
                width //= 2
            if group:
                self.dec_tower.append(Cell(width, width, "normal_dec"))
                self.dec_sampler.append(nn.Sequential(nn.ELU(), Conv(width, 2 * latents, 1)))
            self.dec_tower.append(Combiner(width, latents))
        for cell in range(blocks * cells):
            up = cell % cells == 0
            self.post_process.append(Cell(width, width // 2 if up else width, "up_post" if up else "normal_post"))
            width = width // 2 if up else width
        self.image_conditional = nn.Sequential(nn.ELU(), Conv(width, 100, 3, padding=1))

    def decoder_output(self, parameters: Tensor) -> Any:
        """The mixture of these parameters."""
        logits, rest = parameters[:, :10], parameters[:, 10:].unflatten(1, (3, 30))
        return DiscMixLogistic(logits, rest[:, :, :10], rest[:, :, 10:20].clamp(min=-7), torch.tanh(rest[:, :, 20:]))


class DiscMixLogistic(NamedTuple):
    """Parameters of ten discretised logistics, under NVAE's name."""

    logit_probs: Tensor
    means: Tensor
    log_scales: Tensor
    coeffs: Tensor
    max_val: float = 255.0


def nvae_style(quick: bool = False) -> NVAEAdapter:
    """The NVAE, wrapped."""
    torch.manual_seed(0)
    return NVAEAdapter(NVAEStyle(groups=1 if quick else 8).eval())


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


def chains(prior: JointEBMPrior, steps: int) -> dict[str, Callable[[], object]]:
    """Noise-space Langevin from noise to latents: the plain loop with the full sampler in it, ours, and ours compiled."""
    generator: Any = prior.generator
    start = [torch.randn(BATCH, *shape) for shape in generator.latent_shapes]

    def loop() -> list[Tensor]:
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
            with torch.no_grad():
                return full_pass(generator, noise)[0]

    def ours(backend: Any) -> Callable[[], object]:
        return lambda: prior.sample_latents(BATCH, steps=steps, step_size=STEP, backend=backend)

    return {"loop": loop, "ours": ours("eager"), "compiled": ours("compiled")}


def samplers(prior: JointEBMPrior) -> dict[str, Callable[[], object]]:
    """Images without a chain: the model's own sampler, and ours with steps=0."""
    batch, generator = 16, prior.generator

    def own() -> None:
        with torch.no_grad():
            full_pass(generator, [torch.randn(batch, *shape) for shape in generator.latent_shapes])

    return {"own": own, "ours": lambda: prior.sample(batch, steps=0)}


if __name__ == "__main__":
    main()
