"""CIFAR-10, CelebA-HQ-256 or LSUN-Church-64 in two stages: a deep generator, or an NVAE of yours, then its joint prior.

    python examples/two_stage.py cifar10 --data path/to/cifar10            # train*.parquet, or a folder train/ of images
    python examples/two_stage.py celeba_hq_256                             # from the Hugging Face hub, streamed
    python examples/two_stage.py lsun_church_64 --data path/to/images --nvae checkpoint.pt --nvae-code path/to/NVAE
    python examples/two_stage.py cifar10 --data path/to/cifar10 --quick    # minutes on a CPU, to see that it runs
    python examples/two_stage.py celeba_hq_256 --one-update                # full size: does an update fit, and how long?

    accelerate launch --multi_gpu --num_processes 2 --mixed_precision bf16 examples/two_stage.py celeba_hq_256

Stage one trains a `ResidualVAE`, or takes the checkpoint of an NVAE (whose own code builds the model, and needs what it always
needs: a GPU, as its batch norm has no form for a CPU, and tensorboardX); stage two learns the
energies on it, frozen, for 6,500 iterations as published (Cui, Wu and Han, CVPR 2023), by the rule for deep latents, denoising.
The published 10 steps of 0.003 hardly move a chain: step sizes and learning rates are the library's. The full size is meant
for GPUs.

Writes to --out: samples.png (real | Gaussian prior | joint prior), long_chain.png, results.json, prior.safetensors, with
--export N folders of N samples of either prior for a FID tool, and checkpoints: the same command after a kill goes on where it
was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from command_line import add_options, default_device, user_path
from PIL import Image
from torch import Tensor, nn

from energy_prior import JointEBMPrior, ResidualVAE, fit_elbo, map_batches, plots
from energy_prior.adapters import NVAEAdapter, load_checkpoint, load_weights
from energy_prior.data import ImageStream, load_images
from energy_prior.training import launched_accelerator


@dataclass(frozen=True)
class Setting:
    """A data set: its name on the hub, the side of its images, the generator's size, and how long that is trained."""

    hub: str
    side: int
    generator: dict[str, Any]
    iterations: int
    batch_size: int
    energy_batch: int = 64


SETTINGS = {
    "cifar10": Setting("uoft-cs/cifar10", 32, {"groups": (10, 5), "channels": 128, "latent_channels": 16}, 100_000, 64),
    "lsun_church_64": Setting(
        "tglcourse/lsun_church_train", 64, {"groups": (8, 6, 4), "channels": 96, "latent_channels": 16}, 150_000, 32
    ),
    "celeba_hq_256": Setting(
        "korexyz/celeba-hq-256x256",
        256,
        {"groups": (8, 6, 4, 2), "channels": 64, "latent_channels": 16, "downsample": 2, "checkpointing": True},
        150_000,
        8,
        energy_batch=16,
    ),
}
QUICK = {"groups": (1, 1), "channels": 8, "latent_channels": 2, "mixtures": 2}


def main() -> None:
    """Reads the command line and runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=sorted(SETTINGS), help="the data set")
    add_options(parser, data=None, out=None)
    parser.add_argument("--nvae", type=user_path, help="checkpoint of an NVAE, in place of a generator that is trained here")
    parser.add_argument("--nvae-code", type=user_path, help="folder of NVAE's own code, which builds the model")
    parser.add_argument("--one-update", action="store_true", help="full size, one update of each stage, eight samples")
    parser.add_argument("--export", type=int, default=0, metavar="N", help="write N samples of either prior as PNG files")
    options = parser.parse_args()
    if bool(options.nvae) != bool(options.nvae_code):
        parser.error("--nvae and --nvae-code go together")
    if options.quick and options.one_update:
        parser.error("--quick is of a small model, --one-update of the full size: give one of them")
    options.device = options.device or default_device()
    with launched_accelerator(cpu=options.device == "cpu") as accelerator:  # None unless `accelerate launch` started this
        results = run(options, accelerator)
    if accelerator is None or accelerator.is_main_process:
        print(json.dumps(results, indent=2))


def run(options: argparse.Namespace, accelerator: Any = None) -> dict[str, Any]:
    """Trains, compares, draws; returns what results.json holds."""
    setting, quick = SETTINGS[options.setting], options.quick
    short = quick or options.one_update
    source, out = options.data or setting.hub, options.out or Path("runs") / options.setting
    place = accelerator.device if accelerator else torch.device(options.device)
    out.mkdir(parents=True, exist_ok=True)

    def folder(name: str) -> Path | None:
        """For checkpoints."""
        return None if options.one_update else out / name

    # 1. Data in [0, 1]. The first images are held out; the others are read as a stream, as large sets do not fit into memory.
    held_out = 24 if short else 1000
    validation = load_images(source, "train", size=setting.side, channels=3, limit=held_out, streaming=True).images.to(place)
    where = {"rank": accelerator.process_index, "world": accelerator.num_processes} if accelerator else {}

    def stream(batch_size: int) -> ImageStream:
        rows = 8 if quick else batch_size
        return ImageStream(source, "train", size=setting.side, batch_size=rows, skip=held_out, **where)

    # 2. The generator, chosen by its validation ELBO at KL weight 1; or an NVAE that comes trained.
    torch.manual_seed(options.seed)
    rng = torch.Generator().manual_seed(options.seed)
    shared: dict[str, Any] = {"accelerator": accelerator, "rng": rng}
    results: dict[str, Any] = {"setting": options.setting, "seed": options.seed}
    if options.nvae:
        generator: Any = nvae(options.nvae, options.nvae_code).to(place)
    else:
        generator = ResidualVAE((3, setting.side, setting.side), **(setting.generator | (QUICK if quick else {}))).to(place)
        length: dict[str, Any] = {"iterations": setting.iterations, "log_every": 1000, "validation_draws": 1}
        if short:
            length = {"iterations": 6 if quick else 1, "log_every": 3, "validation_draws": 1}
        images, begin = stream(setting.batch_size), time.monotonic()
        length |= {"learning_rate": 5e-4, "run_dir": folder("elbo")}
        elbo = fit_elbo(generator, images, validation=validation, **length, **shared)
        results["validation_elbo"] = elbo.validation_elbo
        if options.one_update:
            results["elbo_seconds"] = time.monotonic() - begin

    # 3. The energies on the frozen generator.
    prior = JointEBMPrior(generator).to(place)
    size: dict[str, Any] = {"iterations": 6500, "checkpoint_every": 500}
    if short:
        size = {"iterations": 4 if quick else 1, "step_size": 0.3}  # tuning it would take most of the time
    batches, begin = stream(setting.energy_batch), time.monotonic()
    fit = prior.fit(batches, "denoising", run_dir=folder("denoising"), **size, **shared)
    if options.one_update:
        results["energies_seconds"] = time.monotonic() - begin

    # 4. Samples of both priors, and a long chain with its energy profile.
    count = max(8 if short else 64, options.export)

    def samples(which: Literal["generator", "joint"]) -> Tensor:
        return map_batches(prior.sample, count, batch_size=32, seed=options.seed, prior=which, accelerator=accelerator)

    drawn = {"gaussian": samples("generator"), "joint": samples("joint")}
    chain = prior.trajectory(8, steps=20 if short else 1000, every=5 if short else 50, rng=rng)
    results |= {
        "step_size": fit.step_size,
        "acceptance": float(chain.acceptance[1:].mean()),
        "energy_start": float(chain.negative_energy[0].sum(1).mean()),
        "energy_end": float(chain.negative_energy[-1].sum(1).mean()),
        "largest_energy": max(h["max_energy"] for h in fit.history),
        "warnings": fit.warnings,
    }
    if accelerator is not None and not accelerator.is_main_process:
        return results

    # 5. Pictures, and everything that is needed to sample again.
    panels = {"real": validation[:64], "Gaussian prior": drawn["gaussian"][:64], "joint prior": drawn["joint"][:64]}
    plots.image_panels(out / "samples.png", panels)
    frames = [prior.decode([z[i] for z in chain.latents]).cpu() for i in range(len(chain.steps))]
    plots.chain_strip(out / "long_chain.png", torch.stack(frames, 1), chain.steps, chain.negative_energy.sum(2))
    for name, x in drawn.items() if options.export else ():
        export(out / f"samples-{name}", x[: options.export])
    prior.save(out / "prior.safetensors")
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def nvae(path: Path, code: Path) -> nn.Module:
    """An NVAE from its checkpoint, built by its own code in the folder `code`."""
    checkpoint = load_checkpoint(path)
    if not (code / "model.py").is_file():
        raise SystemExit(f"--nvae-code: expected the folder of NVAE's code, with model.py in it, got {str(code)!r}.")
    sys.path.insert(0, str(code))
    from model import AutoEncoder  # type: ignore[import-not-found]

    model = AutoEncoder(checkpoint["args"], None, checkpoint["arch_instance"])
    return NVAEAdapter(load_weights(model, checkpoint).eval())


def export(folder: Path, images: Tensor) -> None:
    """One PNG file per image."""
    folder.mkdir(exist_ok=True)
    pixels = (images.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i:06d}.png")


if __name__ == "__main__":
    main()
