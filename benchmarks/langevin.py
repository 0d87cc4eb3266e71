"""What a Langevin step costs: against the bare matrix products, a plain loop, torchebm, and what it need not do.

    python benchmarks/langevin.py            # about ten minutes on two cores that do nothing else
    python benchmarks/langevin.py --gpu      # the cases of a CUDA device, about six minutes
    python benchmarks/langevin.py --quick    # see that it runs

Every figure is a median of ratios of runs that alternate within one process, each case in a process of its own: what earlier
cases leave to the C library's allocator speeds some loops up. Compilation is not counted (docs/sampling.md says when it
pays). Bare: the forward products and the input-gradient products of all nets of one step, and nothing else.
Baseline: a plain eager loop with the reference step, the density summed over the batch, no parameter gradients and no
decoding. torchebm is compared with if it is installed. Writes docs/results/langevin.json, .md and .png, or langevin_gpu.*.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from langevin_models import DeepConv, Published, StiffLadder, weights_of
from measure import added_memory, alternate, apart, goal_rows, ratio_picture, ratio_table
from results import ROOT, Row, machine, write_results
from torch import Tensor, nn

from energy_prior import ConvEnergy, DivergenceError, JointEBMPrior, LadderVAE, MLPEnergy, ResidualVAE
from energy_prior.process import frozen
from energy_prior.protocol import layer_energy
from energy_prior.topdown import TopDown, ancestral
from energy_prior.training import recorded
from energy_prior.training.chains import TrainingChains

STEP, STEPS = 0.1, 60
GOALS: dict[tuple[str, str], float | None] = {
    ("batch=100", "baseline_over_bare"): 2.6,
    ("batch=1000", "baseline_over_bare"): 2.0,
    ("batch=100", "over_bare"): 1.25,
    ("batch=1000", "over_bare"): 1.25,
    ("batch=100", "over_baseline"): 0.60,
    ("batch=1000", "over_baseline"): 0.65,
    ("batch=100", "over_torchebm"): 0.65,
    ("batch=1000", "over_torchebm"): 0.65,
    ("batch=100", "eager_over_baseline"): None,
    ("batch=1000", "eager_over_baseline"): None,
    ("batch=1000", "bf16_over_full"): None,
    ("bf16", "energy_distance"): None,
    ("bf16", "energy_distance_floor"): None,
    ("deep_conv", "over_decoding_loop"): 0.60,
    ("llr_k1_of_8", "over_k8"): 0.35,
    ("two_stage_training", "over_baseline"): 0.71,
    ("ladder_sigma_0.01_to_1", "over_latent_space"): 0.20,
    ("memory_2500_over_25", "ratio"): 1.05,
}
GPU_GOALS: dict[tuple[str, str], float | None] = {
    ("batch=100", "graph_over_baseline"): 0.15,
    ("batch=10000", "best_over_baseline"): 0.25,
}
"""Cases of a CUDA device; every other figure of theirs is reported without a goal."""


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="the cases of a CUDA device, instead of those of a CPU")
    parser.add_argument("--quick", action="store_true", help="see that it runs; writes nothing into docs/results")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory is not None:
        print(peak_memory(options.memory))
        return
    quick = options.quick
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu: torch sees no CUDA device")
    cases: dict[str, Callable[[], dict[str, float]]] = {
        "batch=100": lambda: published(100, quick),
        "batch=1000": lambda: published(1000, quick),
        "bf16": lambda: coarse_samples(quick),
        "deep_conv": lambda: deep_conv(quick),
        "llr_k1_of_8": lambda: llr(quick),
        "two_stage_training": lambda: two_stage_training(quick),
        "ladder_sigma_0.01_to_1": lambda: stiff_ladder(quick),
        "memory_2500_over_25": lambda: memory(quick),
    }
    if options.gpu:
        cases = {
            "batch=100": lambda: on_gpu(ladder(), 100, ("eager", "compiled", "graph"), quick),
            "batch=10000": lambda: on_gpu(ladder(), 10_000, ("eager", "compiled", "graph"), quick),
            "denoising": lambda: on_gpu(denoising_prior(), 100, ("eager", "graph"), quick),
            "updates": lambda: updates(quick),
            "deep_conv": lambda: on_gpu(deep_prior(), 100, ("eager", "compiled", "graph"), quick),
        }
    if options.case:
        torch.manual_seed(0)
        warnings.simplefilter("error")  # a step that falls back to eager mode must not pass for a compiled one
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")  # on a GPU, while it compiles
        print(json.dumps(cases[options.case]()))
        return
    figures: dict[tuple[str, str], float] = {}
    out = Path(tempfile.mkdtemp()) if quick else ROOT / "docs" / "results"
    for case in cases:
        arguments = ["--case", case, *(["--gpu"] if options.gpu else []), *(["--quick"] if quick else [])]
        for metric, value in apart(__file__, *arguments).items():
            figures[case, metric] = value
            print(f"{case:<24}{metric:<24}{value:.4g}", flush=True)
        if options.gpu:  # such a machine may be lent for a short time
            write_gpu(out, figures)
    if not options.gpu:
        write_cpu(out, figures)


def write_cpu(out: Path, figures: Mapping[tuple[str, str], float]) -> None:
    """The table and picture of a CPU."""
    rows = goal_rows(GOALS, figures, lambda case, metric: "not measured: needs torchebm")
    text = (
        "`python benchmarks/langevin.py`: ratios of times within one run; its docstring says what is compared. "
        f"Measured on: {machine()}. The rows against a plain loop and torchebm, and those of bf16, depend on the processor."
    )
    write(out / "langevin", text, rows)


def write_gpu(out: Path, figures: Mapping[tuple[str, str], float]) -> None:
    """The table and picture of a CUDA device."""
    goals = GPU_GOALS | {key: None for key in figures if key not in GPU_GOALS}
    rows = goal_rows(goals, figures, lambda case, metric: "not measured: the command was stopped before")
    text = (
        "`python benchmarks/langevin.py --gpu`: chains of 60 steps in noise space, from start to end. Ratios of times in one "
        "run, against a plain eager loop. `ms_per_step`: time of a chain over its steps. `first_call_s`: the first call, with "
        f"what it compiles or records. Measured on: {machine()}, torch {torch.__version__}."
    )
    write(out / "langevin_gpu", text, rows)


def write(path: Path, text: str, rows: Sequence[Row]) -> None:
    """Files of this name, as JSON, Markdown and PNG."""
    write_results(path.with_suffix(".json"), rows)
    path.with_suffix(".md").write_text(ratio_table("Langevin", text, rows))
    ratio_picture(path.with_suffix(".png"), rows)
    print(path.with_suffix(".md").read_text())


# ------------------------------------------------------------------------------------------- the published two-layer setting


def published(batch: int, quick: bool) -> dict[str, float]:
    """Chains of 60 steps in latent space, through the public method, against the same steps by others."""
    generator = Published()
    prior = JointEBMPrior(generator, generator.energies(), space="latent")
    nets = [*prior.energies, generator.prior]
    matrices = weights_of(*nets)
    inputs = {size: torch.randn(batch, size) for w in matrices for size in w.shape}
    start = tuple(z.detach() for z in ancestral(generator, batch).latents)

    def bare() -> None:
        with torch.no_grad():
            for _ in range(STEPS):
                for w in matrices:
                    torch.mm(inputs[w.shape[1]], w.t())
                    torch.mm(inputs[w.shape[0]], w)

    def ours(**options: Any) -> Callable[[], object]:
        return lambda: prior.sample_latents(batch, start=start, steps=STEPS, step_size=STEP, **options)

    runs: dict[str, Callable[[], object]] = {
        "bare": bare,
        "baseline": lambda: plain_chain(generator, list(prior.energies), start, STEPS),
        "compiled": ours(backend="compiled"),
        "eager": ours(backend="eager"),
    }
    if batch == 1000:
        runs["bf16"] = ours(backend="compiled", precision="bf16")
    with contextlib.suppress(ImportError):
        runs["torchebm"] = torchebm_chain(generator, list(prior.energies), start)
    ratio = alternate(runs, 2 if quick else 15 if batch == 100 else 7)
    found = {
        "baseline_over_bare": ratio("baseline", "bare"),
        "over_bare": ratio("compiled", "bare"),
        "over_baseline": ratio("compiled", "baseline"),
        "eager_over_baseline": ratio("eager", "baseline"),
    }
    if "torchebm" in runs:
        found["over_torchebm"] = ratio("compiled", "torchebm")
    if "bf16" in runs:
        found["bf16_over_full"] = ratio("bf16", "compiled")
    return found


def plain_chain(
    generator: Any, energies: Sequence[nn.Module], start: Sequence[Tensor], steps: int, step_size: float = STEP
) -> list[Tensor]:
    """The loop that one writes by hand for two layers: z ← z + ½ s² ∇[Σ f_i(z_i) + log p_β(z)] + s n."""
    z = list(start)
    with frozen(generator, *energies):
        for _ in range(steps):
            leaves = [t.detach().requires_grad_() for t in z]
            with torch.enable_grad():
                state = generator.start(len(z[0]))
                log_density = generator.conditional(state, 2).log_prob(leaves[1]).sum(1)
                state = generator.descend(state, leaves[1], 2)
                log_density = log_density + generator.conditional(state, 1).log_prob(leaves[0]).sum(1)
                for f, t in zip(energies, leaves, strict=True):
                    log_density = log_density + f(t)
                gradient = torch.autograd.grad(log_density.sum(), leaves)
            z = [t.detach() + 0.5 * step_size**2 * g + step_size * torch.randn_like(t) for t, g in zip(leaves, gradient)]
    return z


def torchebm_chain(generator: Any, energies: Sequence[nn.Module], start: Sequence[Tensor]) -> Callable[[], object]:
    """The same chain by torchebm's `LangevinDynamics`, on U(z) = −Σ f_i(z_i) − log p_β(z) of the concatenated latents."""
    from torchebm.core import BaseModel  # type: ignore[import-not-found]
    from torchebm.samplers import LangevinDynamics  # type: ignore[import-not-found]

    class Density(BaseModel):
        def forward(self, x: Tensor) -> Tensor:
            z1, z2 = x[:, :128], x[:, 128:]
            state = generator.start(len(x))
            log_density = generator.conditional(state, 2).log_prob(z2).sum(1) + energies[0](z1) + energies[1](z2)
            return -log_density - generator.conditional(generator.descend(state, z2, 2), 1).log_prob(z1).sum(1)

    sampler = LangevinDynamics(Density(), step_size=0.5 * STEP**2)
    x = torch.cat(list(start), 1)

    def run() -> object:
        with frozen(generator, *energies):
            return sampler.sample(x=x, n_steps=STEPS)

    return run


def coarse_samples(quick: bool) -> dict[str, float]:
    """Energy distance of bf16 samples to full-precision ones of other seeds, and that between two full-precision sets."""
    generator = Published()
    prior = JointEBMPrior(generator, generator.energies())
    n = 200 if quick else 4000
    sets = [
        torch.cat(prior.sample_latents(n, step_size=0.3, precision=precision, rng=torch.Generator().manual_seed(seed)), 1)
        for seed, precision in enumerate(("full", "full", "bf16"))
    ]
    return {
        "energy_distance": energy_distance(sets[2], sets[0]),
        "energy_distance_floor": energy_distance(sets[1], sets[0]),
    }


# ---------------------------------------------------------------------------------------------------- only what is needed


def deep_prior() -> JointEBMPrior:
    """Eight convolutional layers, with energies of a few nats."""
    generator = DeepConv()
    energies = [ConvEnergy(shape, channels=(16, 32, 32)) for shape in generator.latent_shapes]
    for f in energies:
        nn.init.normal_(f.net[-1].weight, std=0.1)  # type: ignore[arg-type]
    return JointEBMPrior(generator, energies)


def deep_conv(quick: bool) -> dict[str, float]:
    """Compiled noise-space chains against an eager loop that decodes the image in every step."""
    prior, batch, steps = deep_prior(), 16, 4 if quick else 20
    generator: Any = prior.generator
    start = [torch.randn(batch, *shape) for shape in generator.latent_shapes]

    def decoding_loop() -> None:
        noise = list(start)
        with frozen(generator, prior):
            for _ in range(steps):
                leaves = [t.detach().requires_grad_() for t in noise]
                with torch.enable_grad():
                    state, tilt = generator.start(batch), torch.zeros(batch)
                    for layer in range(8, 0, -1):
                        p = generator.conditional(state, layer)
                        z = p.loc + p.scale * leaves[layer - 1]
                        tilt = tilt + prior.energies[layer - 1](z)
                        state = generator.descend(state, z, layer)
                    generator.likelihood(state).mean  # noqa: B018
                    gradient = torch.autograd.grad(tilt.sum(), leaves)
                a = STEP**2
                noise = [t.detach() + 0.5 * a * (g - t.detach()) + STEP * torch.randn_like(t) for t, g in zip(leaves, gradient)]

    runs: dict[str, Callable[[], object]] = {
        "loop": decoding_loop,
        "ours": lambda: prior.sample_latents(batch, steps=steps, step_size=STEP, backend="compiled"),
    }
    return {"over_decoding_loop": alternate(runs, 2 if quick else 9)("ours", "loop")}


def llr(quick: bool) -> dict[str, float]:
    """A chain of L^{>1}, layers 2 … 8 held, against one of L^{>8}, all free: time per step, once the layers above are done."""
    prior, batch, steps = deep_prior(), 16, 4 if quick else 40
    given = dict(enumerate(prior.sample_latents(batch, prior="generator"), start=1))
    given.pop(1)

    def chain(held: Mapping[int, Tensor] | None) -> Callable[[], object]:
        return lambda: prior.sample_latents(batch, given=held, steps=steps, step_size=STEP, backend="compiled")

    return {"over_k8": alternate({"k1": chain(given), "k8": chain(None)}, 2 if quick else 9)("k1", "k8")}


def two_stage_training(quick: bool) -> dict[str, float]:
    """An iteration of `fit(method="two_stage")`, batches of 100 with 60 steps, against the same with the baseline's chains."""
    few, more = (2, 4) if quick else (5, 25)
    x = torch.randn(1000, 32)

    @contextlib.contextmanager
    def baseline_chains() -> Iterator[None]:
        original = TrainingChains.run

        def run(self: TrainingChains, start: Sequence[Tensor], steps: int) -> tuple[Tensor, ...]:
            z = plain_chain(self.model.generator, list(self.model.energies), start, steps, self.step_size)
            return tuple(z)

        TrainingChains.run = run
        try:
            yield
        finally:
            TrainingChains.run = original

    generator = Published()
    prior = JointEBMPrior(generator, generator.energies(), space="latent")
    untrained = copy.deepcopy(prior.state_dict())

    def seconds(iterations: int, baseline: bool) -> float:
        torch.manual_seed(0)
        prior.load_state_dict(untrained)
        options: dict[str, Any] = {"batch_size": 100, "steps": STEPS, "persistent": 0, "progress": False, "step_size": STEP}
        with baseline_chains() if baseline else contextlib.nullcontext():
            begin = time.perf_counter()
            prior.fit(x, "two_stage", iterations=iterations, backend="compiled", **options)
            return time.perf_counter() - begin

    seconds(1, False)  # compiles
    ratios = []
    for _ in range(1 if quick else 5):
        per = [seconds(more, baseline) - seconds(few, baseline) for baseline in (False, True)]
        ratios.append(per[0] / per[1])
    return {"over_baseline": statistics.median(ratios)}


# --------------------------------------------------------------------------------------------------------- fewer steps


def stiff_ladder(quick: bool) -> dict[str, float]:
    """Gradient evaluations until the energy distance to exact draws is below 0.02, from ε ~ N(0, 3²)."""
    generator = StiffLadder()
    n, most, tolerance = 1000, 200 if quick else 20_000, 0.02
    rng = torch.Generator().manual_seed(0)
    mean, covariance = generator.tilted()
    exact = mean + torch.randn(4000, 12, generator=rng) @ torch.linalg.cholesky(covariance).T
    dispersed = [3.0 * torch.randn(n, 4, generator=rng) for _ in range(3)]
    with torch.no_grad():
        start = TopDown(generator, n).descend(dispersed, "noise").latents

    def evaluations(space: Any, step_size: float | None, every: int) -> int:
        """Until the tolerance is met; `most` if it is not."""
        prior = JointEBMPrior(generator, generator.energies, space=space)
        options: dict[str, Any] = {"step_size": step_size, "adjust": False}
        spent, z = 0, start
        if step_size is None:
            prior.tune_step_size(target_acceptance=0.7)
            spent, options = 150, {"adjust": True}  # the tuning counts
        while spent < most:
            try:
                z = prior.sample_latents(n, start=z, steps=every, **options)
            except DivergenceError:  # too large a step for the layer with σ = 0.01
                return most
            spent += every
            with torch.no_grad():
                noise = TopDown(generator, n).position(z, "noise")
            if energy_distance(torch.cat(noise, 1), exact) < tolerance:
                return spent
        return most

    noise = evaluations("noise", None, 5)
    latent = min(evaluations("latent", s, 100) for s in (0.005, 0.008, 0.011, 0.014, 0.017))
    print(f"noise space {noise}, latent space {latent}{' or more' if latent >= most else ''} evaluations", file=sys.stderr)
    return {"over_latent_space": noise / latent}


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E‖X − Y‖ − E‖X − X'‖ − E‖Y − Y'‖, unbiased: 0 on average for equal distributions (Székely and Rizzo, 2013)."""

    def within(t: Tensor) -> Tensor:
        return torch.pdist(t).mean()

    return float(2 * torch.cdist(a, b).mean() - within(a) - within(b))


# ------------------------------------------------------------------------------------------------------------- memory


def memory(quick: bool) -> dict[str, float]:
    """Peak of the resident memory above its level before the call, 2,500 steps over 25, each in a process of its own."""
    few, many = (apart(__file__, "--memory", str(steps), give_back=True) for steps in (25, 250 if quick else 2500))
    return {"ratio": many / few}


def peak_memory(steps: int) -> int:
    """kB that a chain of 1,000 rows adds to this process's peak, once a chain has run before."""
    torch.set_num_threads(1)
    generator = Published()
    prior = JointEBMPrior(generator, generator.energies(), space="latent")
    prior.sample_latents(100, steps=2, step_size=STEP)
    return added_memory(lambda: prior.sample_latents(1000, steps=steps, step_size=STEP))


# ------------------------------------------------------------------------------------------------------------ a CUDA device


def ladder() -> JointEBMPrior:
    """A `LadderVAE` of the published sizes, with energies of a few nats."""
    generator = LadderVAE((32,), latent_dims=(128, 100), hidden=200, depth=4)
    energies = [MLPEnergy((128,), hidden=(200, 200, 200)), MLPEnergy((100,), hidden=(100, 100))]
    for f in energies:
        nn.init.normal_(f.net[-1].weight, std=1.0)  # type: ignore[arg-type]
    return JointEBMPrior(generator, energies)


def denoising_prior() -> JointEBMPrior:
    """What `JointEBMPrior` makes of a model of CIFAR-10's size by default, after one iteration."""
    prior = JointEBMPrior(ResidualVAE((3, 32, 32), groups=(2, 2), channels=32, latent_channels=8).to("cuda").eval())
    prior.fit(torch.rand(256, 3, 32, 32), "denoising", iterations=1, batch_size=64, progress=False)
    return prior


def updates(quick: bool) -> dict[str, float]:
    """Updates of "denoising" recorded as a graph, against updates kernel by kernel; the recording does not count."""

    def ms(devices: Sequence[str]) -> float:
        at: list[float] = []
        with mock.patch.object(recorded, "DEVICES", devices):
            vae = ResidualVAE((3, 32, 32), groups=(2, 2), channels=32, latent_channels=8).to("cuda").eval()
            settings: dict[str, Any] = {
                "iterations": 20 if quick else 100,
                "batch_size": 128,
                "log_every": 10,
                "progress": False,
            }
            JointEBMPrior(vae).fit(
                torch.rand(256, 3, 32, 32), "denoising", callback=lambda entry: at.append(time.perf_counter()), **settings
            )
        return statistics.median(b - a for a, b in zip(at, at[1:])) / settings["log_every"] * 1e3

    plain, launched = ms(()), ms(("cuda",))
    return {"plain_ms_per_update": plain, "recorded_ms_per_update": launched, "recorded_over_plain": launched / plain}


def on_gpu(prior: JointEBMPrior, batch: int, backends: Sequence[Any], quick: bool) -> dict[str, float]:
    """Chains in noise space by every backend, against a plain eager loop through the whole pass down."""
    prior = prior.to("cuda").eval()
    generator: Any = prior.generator
    start = tuple(torch.randn(batch, *shape, device="cuda") for shape in generator.latent_shapes)
    a, seconds = STEP**2 / 4, {}

    def baseline() -> None:
        noise = start
        with frozen(generator, prior):
            for _ in range(STEPS):
                leaves = [t.detach().requires_grad_() for t in noise]
                with torch.enable_grad():
                    latents = TopDown(generator, batch).descend(leaves, "noise").latents
                    tilts = [layer_energy(f, i, latents, leaves) for i, f in enumerate(prior.energies, start=1)]
                    gradient = torch.autograd.grad(torch.stack(tilts).sum(), leaves, allow_unused=True, materialize_grads=True)
                noise = tuple(
                    ((1 - a) * t.detach() + 2 * a * g + STEP * torch.randn_like(t)) / (1 + a)
                    for t, g in zip(leaves, gradient, strict=True)
                )
        torch.cuda.synchronize()

    def ours(backend: Any) -> Callable[[], object]:
        def run() -> None:
            prior.sample_latents(batch, steps=STEPS, step_size=STEP, waymarks=0, backend=backend)
            torch.cuda.synchronize()

        return run

    runs = {"baseline": baseline} | {name: ours(name) for name in backends}
    for name, run in runs.items():
        begin = time.perf_counter()
        run()
        seconds[name] = time.perf_counter() - begin
    repeats = 2 if quick else 5
    ratio = alternate(runs, repeats)
    begin = time.perf_counter()
    for _ in range(repeats):
        baseline()
    baseline_ms = (time.perf_counter() - begin) / repeats / STEPS * 1e3
    found = {"baseline_ms_per_step": baseline_ms}
    for name in backends:
        found[f"{name}_over_baseline"] = ratio(name, "baseline")
        found[f"{name}_ms_per_step"] = ratio(name, "baseline") * baseline_ms
        found[f"{name}_first_call_s"] = seconds[name]
    return found | {"best_over_baseline": min(ratio(name, "baseline") for name in backends)}


if __name__ == "__main__":
    main()
