"""What calls cost beside their chains: scores, what surrounds the iterations of `fit`, memory, and the import.

    git worktree add ../before 89456b6
    python benchmarks/cost.py --before ../before    # an hour on two cores that do nothing else; rows as cases end
    python benchmarks/cost.py --case scores         # only these rows; the others stay as they are in docs/results/cost.json
    python benchmarks/cost.py --quick               # see that it runs

- `over_before`: seconds of `llr_score(x, 1)` with its default draws on a `LadderVAE`, over those at the commit `--before`; a
  process each, in turn, medians.
- `over_plain_loop`: `llr_scores(x, steps=0)` over a loop that for every draw and every k infers, draws the k layers from the
  generator's prior and decodes, as the evaluation of hvae-oodd does, at `ResidualVAE((3, 32, 32), groups=(8, 8))`.
- `added_peak_over_max_memory`: what `llr_score(x, 1)` of 64 images there adds to a process's memory above one row's, over its
  `max_memory`.
- `fit_overhead`: (wall − iterations)/wall of `fit(method="nce")`, an NVAE of 2 × 2 groups, 200 iterations of 64.
- `fit_peak_gib`: what 5 iterations of `fit` of 8, `sample` and `llr_score` of 8 images, and `mismatch` of as many as a longer
  `fit` compares at its end, add to a process with a VDVAE of CIFAR-10's size (43 layers).
- `cold_compile_over_before`: seconds of the first compiled call of a process with an empty cache of torch's, less those of an
  eager one, over the same at the commit `--before`: four steps of 16 chains of an NVAE of 2 × 8 groups, energies of z_i.
- `warm_compile_seconds_over_eager_call`: the first compiled call of a second process with that cache, over an eager one.
- `effective_samples_per_second_over_plain_loop`: there, of Σf in three times 60 compiled steps of size 0.5, over those of a
  loop (Euler's) with the full sampler in every step. `the_same_at_equal_acceptance`: each with steps of the size at which MALA
  would accept 95% (the loop 240); `step_size_over_plain_loop`: the ratio of those sizes.
- `block_schedule_over_full_steps`: there, effective samples of Σf per second of chains that after each step of all layers make
  m steps of the k layers nearest the data alone, whose pass down is a part of it, over those of full steps alone; the best of
  k and m in `BLOCKS`, each with steps of the size that is accepted 95% of the time. Seconds are those of long chains of each
  kind: going from one to the other is free here.
- `full_size …`: `examples/two_stage.py --one-update`, on images of noise: what it adds to a process's memory, a chain of 20
  steps of eight samples included, and seconds of either stage with its one update (with the generator's validation of 24
  images, and what the energies set of themselves before theirs).
- `keeping_memory_over_default`: seconds of an iteration of `fit(method="denoising")` on maps of 14 × 14 and 7 × 7, a batch of
  128, where the C library is told to keep what is freed (`KEEPING`), over those with its defaults.

Models are stand-ins of these sizes (`nvae_style.py`, `vdvae_style.py`) with weights as drawn. Writes docs/results/cost.json
and .md.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from adapters import BATCH, nvae_style, plain_loop, with_energies
from measure import added_memory, alternate, apart, goal_rows, ratio_table
from nvae_style import NVAEStyle
from results import ROOT, Row, machine, write_results
from torch import Tensor
from vdvae_style import VDVAEStyle

from energy_prior import ConvEnergy, JointEBMPrior, LadderVAE, ResidualVAE
from energy_prior._util import not_none
from energy_prior.adapters import NVAEAdapter, VDVAEAdapter
from energy_prior.evaluate import effective_sample_size
from energy_prior.langevin import ChainDraw, ChainSettings, Target, sample_target
from energy_prior.langevin.proposal import Scheme
from energy_prior.process import frozen
from energy_prior.topdown import TopDown

FULL_SIZE = ("lsun_church_64", "celeba_hq_256")
FULL_SIZE_METRICS = ("added_gib", "elbo_seconds", "energies_seconds")
GOALS: dict[tuple[str, str], float | None] = {
    ("scores, 16 images", "over_before"): 0.40,
    ("scores, 1000 images", "over_before"): 1.05,
    ("scores, all k", "over_plain_loop"): 0.70,
    ("scores, memory", "added_peak_over_max_memory"): 1.2,
    ("nvae_2x2", "fit_overhead"): 0.10,
    ("vdvae_full", "fit_peak_gib"): 6.0,
    ("nvae_2x8", "cold_compile_over_before"): 0.5,
    ("nvae_2x8", "warm_compile_seconds_over_eager_call"): None,
    ("nvae_2x8", "effective_samples_per_second_over_plain_loop"): 1.6,
    ("nvae_2x8", "the_same_at_equal_acceptance"): None,
    ("nvae_2x8", "step_size_over_plain_loop"): None,
    ("nvae_2x8", "block_schedule_over_full_steps"): None,
    ("import", "flop_counter_and_triton_imported"): 0.0,
    ("deep_fit", "keeping_memory_over_default"): None,
    **{(f"full_size {setting}", metric): None for setting in FULL_SIZE for metric in FULL_SIZE_METRICS},
}
HIGHER = {
    ("nvae_2x8", "effective_samples_per_second_over_plain_loop"),
    ("nvae_2x8", "the_same_at_equal_acceptance"),
    ("nvae_2x8", "step_size_over_plain_loop"),
    ("nvae_2x8", "block_schedule_over_full_steps"),
}
"""Figures that are better where they are larger; a goal is the least that they should be."""
KEEPING = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
MEMORY = 2**28
ROUNDS, LONG = 3, 240
BLOCK_ROUNDS = 100
"""Steps of all layers that a schedule of blocks is judged by."""
BLOCKS = ((1, 4), (2, 2), (4, 1), (8, 1))
"""Layers nearest the data, and their steps after each step of all layers."""


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="checkout of the commit to compare with; without it `over_before` is left out")
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="only this one; may be given several times")
    parser.add_argument("--quick", action="store_true", help="see that it runs; writes nothing into docs/results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(CHILDREN[options.child](options.quick)))
        return
    out = Path(tempfile.mkdtemp()) if options.quick else ROOT / "docs" / "results"
    before = options.before or (str(ROOT) if options.quick else None)
    for name in options.case or CASES:
        figures = kept(out / "cost.json") | CASES[name](options.quick, before)
        rows = goal_rows(GOALS, figures, higher=HIGHER)
        write_results(out / "cost.json", rows)  # as each case ends: some take long
        text = f"`python benchmarks/cost.py`; its docstring says what each figure is. Measured on: {machine()}."
        (out / "cost.md").write_text(ratio_table("What calls cost beside their chains", text, rows))
    print((out / "cost.md").read_text())


def kept(path: Path) -> dict[tuple[str, str], float]:
    """Figures that are there."""
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    return {(row["case"], row["metric"]): row["value"] for row in rows if row["value"] is not None}


# -------------------------------------------------------------------------------------------------------------------- the cases


def scores(quick: bool, before: str | None) -> dict[tuple[str, str], float]:
    """Few and many images against the commit before, every k against a plain loop, and memory."""
    figures: dict[tuple[str, str], float] = {}
    for images in (16, 1000) if before else ():
        child = ("--child", f"score {images}", *(["--quick"] if quick else []))
        ratios = []
        for _ in range(1 if quick else ROUNDS):
            here, there = (apart(__file__, *child, package=package) for package in (str(ROOT), before))
            ratios.append(here / there)
        figures[f"scores, {images} images", "over_before"] = statistics.median(ratios)
    ratio = alternate(every_k(quick), 1 if quick else ROUNDS)
    figures["scores, all k", "over_plain_loop"] = ratio("ours", "loop")
    peaks = [apart(__file__, "--child", name, *(["--quick"] if quick else []), give_back=True) for name in ("many", "one")]
    figures["scores, memory", "added_peak_over_max_memory"] = (peaks[0] - peaks[1]) * 1024 / MEMORY
    return figures


def fitting(quick: bool, before: str | None) -> dict[tuple[str, str], float]:
    """What surrounds the iterations of a deep model's fit."""
    return {("nvae_2x2", "fit_overhead"): apart(__file__, "--child", "overhead", *(["--quick"] if quick else []))}


def full_size(quick: bool, before: str | None) -> dict[tuple[str, str], float]:
    """The memory that a model of full size needs."""
    peak = apart(__file__, "--child", "full", *(["--quick"] if quick else []), give_back=True)
    return {("vdvae_full", "fit_peak_gib"): peak / 2**20}


def examples(quick: bool, before: str | None) -> dict[tuple[str, str], float]:
    """What an update of the full-size settings of examples/two_stage.py takes."""
    figures: dict[tuple[str, str], float] = {}
    for setting in FULL_SIZE:
        found = apart(__file__, "--child", f"two_stage {setting}", *(["--quick"] if quick else []), give_back=True)
        figures |= {(f"full_size {setting}", metric): value for metric, value in zip(FULL_SIZE_METRICS, found, strict=True)}
    return figures


def compiling(quick: bool, before: str | None) -> dict[tuple[str, str], float]:
    """The first compiled call, from cold and from what another process has compiled."""
    child = ("--child", "compile", *(["--quick"] if quick else []))

    def calls(package: str, processes: int) -> list[tuple[float, float]]:
        """Of each of these processes, one after another with one cache: the first compiled call, and an eager one."""
        with tempfile.TemporaryDirectory() as folder:
            settings = {"TORCHINDUCTOR_CACHE_DIR": folder}
            return [apart(__file__, *child, package=package, settings=settings) for _ in range(processes)]

    (first, eager), (again, eager_again) = calls(str(ROOT), 2)
    figures = {("nvae_2x8", "warm_compile_seconds_over_eager_call"): again / eager_again}
    if before:
        ((first_before, eager_before),) = calls(before, 1)
        figures["nvae_2x8", "cold_compile_over_before"] = (first - eager) / (first_before - eager_before)
    return figures


def moving(quick: bool, before: str | None) -> dict[tuple[str, str], float]:
    """Effective samples per second."""
    prior, steps = with_energies(nvae_style(quick)), 8 if quick else 60
    target = Target(prior.generator, list(prior.energies), "noise", BATCH)

    def ours(step_size: float) -> Callable[[], Tensor]:
        settings = ChainSettings(steps=steps, step_size=step_size, backend="compiled")

        def chains() -> Tensor:
            with torch.no_grad(), frozen(prior, prior.generator):
                result = sample_target(target, settings, default_step_size=step_size, trace=True).result
            return not_none(not_none(result).negative_energy)[1:]

        return chains

    def per_second(run: Callable[[], Tensor], rounds: int) -> float:
        effective, begin = 0.0, time.perf_counter()
        for _ in range(rounds):
            effective += float(effective_sample_size(run()[:, :, None]))
        return effective / (time.perf_counter() - begin)

    rounds, looks = (1, 1) if quick else (ROUNDS, 8)
    steps_95 = [_step_at_95(target, scheme, looks) for scheme in ("crank_nicolson", "euler")]
    ours(0.5)()  # compiles
    same = per_second(ours(0.5), rounds) / per_second(plain_loop(prior, steps, 0.5), rounds)
    fast = per_second(ours(steps_95[0]), rounds)
    slow = per_second(plain_loop(prior, steps if quick else LONG, steps_95[1]), 1)
    return {
        ("nvae_2x8", "effective_samples_per_second_over_plain_loop"): same,
        ("nvae_2x8", "the_same_at_equal_acceptance"): fast / slow,
        ("nvae_2x8", "step_size_over_plain_loop"): steps_95[0] / steps_95[1],
    }


def _step_at_95(target: Target, scheme: Scheme, looks: int) -> float:
    """The step size at which MALA would accept 95% of the steps of chains of this scheme."""
    few, s = target.rows(slice(0, 4)), 0.2
    with torch.no_grad(), frozen(target.generator, *target.energies):
        for _ in range(looks):
            settings = ChainSettings(steps=10, step_size=s, scheme=scheme, backend="eager")
            result = sample_target(few, settings, default_step_size=s, measure=True).result
            rejected = 1 - float(not_none(not_none(result).acceptance).mean())
            s *= (0.05 / max(rejected, 1e-3)) ** (1 / 3)  # what is rejected grows like s³
    return s


def in_blocks(quick: bool, before: str | None) -> dict[tuple[str, str], float]:
    """Whether steps of the layers nearest the data, which cost less, pay between steps of all layers."""
    prior, rounds, looks = with_energies(nvae_style(quick)), 4 if quick else BLOCK_ROUNDS, 1 if quick else 5
    full = Target(prior.generator, list(prior.energies), "noise", BATCH)
    layers = len(full.free)

    def target_of(z: tuple[Tensor, ...], free: int) -> Target:
        held = {i: z[i - 1] for i in range(free + 1, layers + 1)}
        return dataclasses.replace(full, held=held, topdown=TopDown(full.generator, BATCH, held))

    def step(z: tuple[Tensor, ...] | None, target: Target, step_size: float, steps: int = 1) -> ChainDraw:
        settings = ChainSettings(steps=steps, step_size=step_size, backend="eager")
        return sample_target(target, settings, default_step_size=step_size, start=z, trace=True)

    with torch.no_grad(), frozen(prior, prior.generator):
        start = step(None, full, 0.2, 2 if quick else BLOCK_ROUNDS).latents
        kinds = sorted({layers, *(k for k, _ in BLOCKS if k < layers)})
        sizes = {k: _step_at_95(target_of(start, k), "crank_nicolson", looks) for k in kinds}
        seconds = alternate({f"{k}": functools.partial(step, start, target_of(start, k), sizes[k], 40) for k in kinds}, ROUNDS)
        per_second = {}
        for k, m in ((1, 0), *((k, m) for k, m in BLOCKS if k < layers)):
            z, sums = start, list[Tensor]()
            for _ in range(rounds):
                z = step(z, full, sizes[layers]).latents
                z = step(z, target_of(z, k), sizes[k], m).latents if m else z
                sums.append(torch.stack([f(own) for f, own in zip(prior.energies, z, strict=True)]).sum(0))
            effective = float(effective_sample_size(torch.stack(sums)[:, :, None]))
            per_second[k, m] = effective / (1 + m * seconds(f"{k}", f"{layers}"))
            print(f"{k} layers, {m} steps: {per_second[k, m] / per_second[1, 0]:.2f} (step {sizes[k]:.2f})", flush=True)
    best = max(value for (_, m), value in per_second.items() if m)
    return {("nvae_2x8", "block_schedule_over_full_steps"): best / per_second[1, 0]}


def importing(quick: bool, before: str | None) -> dict[tuple[str, str], float]:
    """What the import pulls in."""
    return {("import", "flop_counter_and_triton_imported"): apart(__file__, "--child", "import")}


def allocating(quick: bool, before: str | None) -> dict[tuple[str, str], float]:
    """What it costs that the C library gives memory back and asks for it again."""
    child, ratios = ("--child", "iteration", *(["--quick"] if quick else [])), []
    for _ in range(1 if quick else 3):
        keeping, default = apart(__file__, *child, settings=KEEPING), apart(__file__, *child)
        ratios.append(keeping / default)
    return {("deep_fit", "keeping_memory_over_default"): statistics.median(ratios)}


CASES: dict[str, Callable[[bool, str | None], dict[tuple[str, str], float]]] = {
    "scores": scores,
    "fit": fitting,
    "full_size": full_size,
    "examples": examples,
    "compile": compiling,
    "moving": moving,
    "blocks": in_blocks,
    "import": importing,
    "allocator": allocating,
}


# --------------------------------------------------------------------------------------------- in processes of their own


def score_seconds(images: int, quick: bool) -> float:
    """Median seconds of `llr_score(x, 1)` on a ladder for images of 28 × 28."""
    torch.manual_seed(0)
    prior = JointEBMPrior(LadderVAE((1, 28, 28), latent_dims=(64, 32)))
    x, seconds = torch.rand(images, 1, 28, 28), []
    for _ in range(2 if quick else 9):
        begin = time.perf_counter()
        prior.llr_score(x, 1, backend="eager")
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def deep(quick: bool) -> JointEBMPrior:
    """Sixteen layers of maps with energies of z_i."""
    torch.manual_seed(0)
    vae = ResidualVAE((3, 32, 32), groups=(1, 1) if quick else (8, 8), channels=32).eval()
    return JointEBMPrior(vae, [ConvEnergy(shape) for shape in vae.latent_shapes])


def every_k(quick: bool) -> dict[str, Callable[[], object]]:
    """LLR^{>k} of every k: ours, and a plain loop over draws and k that calls the whole model each time."""
    prior, draws = deep(quick), 2
    generator: Any = prior.generator
    x, layers = torch.rand(4, 3, 32, 32), len(generator.latent_shapes)

    def log_joint(k: int) -> Tensor:
        latents = generator.infer(x).latents
        noise = [torch.randn_like(z) for z in latents]
        state, total = generator.start(len(x)), torch.zeros(len(x))
        for layer in range(layers, 0, -1):
            p = generator.conditional(state, layer)
            z = p.loc + p.scale * noise[layer - 1] if layer <= k else latents[layer - 1]
            total = total + p.log_prob(z).flatten(1).sum(1) + prior.energies[layer - 1](z)
            state = generator.descend(state, z, layer)
        return total + generator.likelihood(state).log_prob(x)

    def loop() -> Tensor:
        with torch.no_grad():
            means = [torch.stack([log_joint(k) for _ in range(draws)]).mean(0) for k in range(layers + 1)]
            return torch.stack([means[0] - mean for mean in means[1:]], 1)

    return {"ours": lambda: prior.llr_scores(x, steps=0, num_samples=draws), "loop": loop}


def score_memory(images: int, quick: bool) -> int:
    """kB that a score adds."""
    torch.set_num_threads(1)
    prior = deep(quick)
    x = torch.rand(images, 3, 32, 32)
    prior.llr_score(x[:1], 1, steps=2, num_samples=1, backend="eager")
    draws = 1 if images == 1 else 8
    return added_memory(lambda: prior.llr_score(x, 1, steps=2, num_samples=draws, max_memory=MEMORY, backend="eager"))


def fit_overhead(quick: bool) -> float:
    """(wall − iterations)/wall."""
    torch.manual_seed(0)
    generator = NVAEAdapter(NVAEStyle(groups=2, **({"channels": 4, "latents": 2, "cells": 1} if quick else {})).eval())
    prior = JointEBMPrior(generator, [ConvEnergy(shape) for shape in generator.latent_shapes])
    x, ends, iterations = torch.rand(512, 3, 32, 32), list[float](), 10 if quick else 200
    begin = time.perf_counter()
    prior.fit(
        x,
        "nce",
        iterations=iterations,
        batch_size=8 if quick else 64,
        log_every=1,
        progress=False,
        callback=lambda _: ends.append(time.perf_counter()),
    )
    wall = time.perf_counter() - begin
    of_iterations = (ends[-1] - ends[0]) * iterations / (iterations - 1)  # the first one's start is not seen
    return (wall - of_iterations) / wall


def compile_seconds(quick: bool) -> tuple[float, float]:
    """Of the first compiled call, and of an eager one."""
    prior, seconds = with_energies(nvae_style(quick)), list[float]()
    backends: tuple[Any, ...] = ("eager", "eager", "compiled")
    for backend in backends:
        begin = time.perf_counter()
        prior.sample_latents(BATCH, steps=4, step_size=0.1, backend=backend)
        seconds.append(time.perf_counter() - begin)
    return seconds[2], seconds[1]


def iteration_seconds(quick: bool) -> float:
    """Median seconds of an iteration of denoising."""
    torch.manual_seed(0)
    prior = JointEBMPrior(ResidualVAE((1, 28, 28), groups=(1, 2), channels=16, latent_channels=4).eval())
    ends: list[float] = []
    prior.fit(
        torch.rand(256, 1, 28, 28),
        "denoising",
        iterations=4 if quick else 20,
        batch_size=16 if quick else 128,
        step_size=0.1,
        log_every=1,
        progress=False,
        callback=lambda _: ends.append(time.perf_counter()),
    )
    return statistics.median(b - a for a, b in zip(ends[1:], ends[2:], strict=False))


def full_size_memory(quick: bool) -> int:
    """kB of fit, sample and score at a VDVAE of full size."""
    torch.manual_seed(0)
    model = VDVAEStyle(16, ((1, 1, None), (8, 1, 1), (32, 1, 8))) if quick else VDVAEStyle()
    generator = VDVAEAdapter(model.eval())
    prior = JointEBMPrior(generator)
    x = torch.rand(81, 3, 32, 32)  # 2**25 numbers of its latents

    def run() -> None:
        prior.fit(x, iterations=5, batch_size=8, progress=False)
        prior.sample(8)
        prior.llr_score(x[:8], 1)
        prior.mismatch(x, prior="generator")

    return added_memory(run)


def two_stage_update(setting: str, quick: bool) -> tuple[float, float, float]:
    """GiB that one update of each stage and eight samples add, and the seconds of the stages."""
    from PIL import Image  # the extra "examples"

    sys.path.insert(0, str(ROOT / "examples"))
    import two_stage

    size = two_stage.SETTINGS[setting]
    if quick:
        size = dataclasses.replace(size, generator=size.generator | two_stage.QUICK, batch_size=8, energy_batch=8)
        two_stage.SETTINGS[setting] = size
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        images, out = Path(folder) / "train", Path(folder) / "out"
        images.mkdir()
        pixels = torch.randint(256, (24 + max(size.batch_size, size.energy_batch), size.side, size.side, 3)).to(torch.uint8)
        for i, x in enumerate(pixels.numpy()):
            Image.fromarray(x).save(images / f"{i}.png")
        options = {"setting": setting, "data": folder, "out": out, "quick": False, "one_update": True, "device": "cpu"}
        options |= {"seed": 0, "nvae": None, "nvae_code": None, "export": 0}
        added = added_memory(lambda: results.update(two_stage.run(argparse.Namespace(**options))))
    return added / 2**20, results["elbo_seconds"], results["energies_seconds"]


def imported(quick: bool) -> int:
    """How many modules of triton and torch's FLOP counter a fresh import brings."""
    code = "import sys, energy_prior; print(sum(m.split('.')[0] == 'triton' or 'flop_counter' in m for m in sys.modules))"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)  # noqa: S603


CHILDREN: dict[str, Callable[[bool], float | tuple[float, ...]]] = {
    "score 16": lambda quick: score_seconds(16, quick),
    "score 1000": lambda quick: score_seconds(100 if quick else 1000, quick),
    "many": lambda quick: score_memory(16 if quick else 64, quick),
    "one": lambda quick: score_memory(1, quick),
    "overhead": fit_overhead,
    "full": full_size_memory,
    **{f"two_stage {name}": functools.partial(two_stage_update, name) for name in FULL_SIZE},
    "compile": compile_seconds,
    "iteration": iteration_seconds,
    "import": imported,
}


if __name__ == "__main__":
    main()
