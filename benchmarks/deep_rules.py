"""What each learning rule does for one model with deep latents, after half an hour; and chains with and without waymarks.

    python benchmarks/deep_rules.py --data DATA                  # hours on one core; goes on where it stopped
    python benchmarks/deep_rules.py --data DATA --device cuda    # on a GPU
    python benchmarks/deep_rules.py --table                      # only the table, of what is done
    python benchmarks/deep_rules.py --quick                      # see that it runs, on scikit-learn's digits

The backbone, the images and the distances are those of `deep_latents.py`, case `cifar10_pyramid`, but of 1,000 images:

    denoising                  the library's rule for deep latents
    denoising_flow_alone       its energies; chains of one step after the waymarks
    denoising_steps_alone      its energies; the default's steps from N(0, I), without waymarks
    nce                        one ratio between the posterior and the prior; chains without waymarks
    two_stage                  its energies, then 400 iterations of maximum likelihood; the default chains
    telescoped                 ratios between neighbouring waymarks, told apart one by one:
                               f(ε; t_k) = Σ_{j ≥ k} g(ε; t_j) (Rhodes, Xu and Gutmann, NeurIPS 2020); chains as in "denoising"

All have the networks of "denoising". Every unit is a line of docs/results/deep_rules.partial.jsonl as it ends; weights are in
`--runs`, the backbone's and those of "denoising" where `deep_latents.py` keeps them. Writes docs/results/deep_rules.json and
.md.
"""

from __future__ import annotations

import argparse
import inspect
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from backbones import CASES, QUICK
from case_runs import CaseRun, Log, Sizes, digits, most, read_options
from deep_latents import FIGURES, DeepRun
from deep_measures import noise_of
from measure import ratio_table
from ratios import minimise
from results import ROOT, Row, code_key, mean_row, write_results
from torch import Tensor, nn

from energy_prior import DenoisingEnergy, JointEBMPrior, denoising_energies
from energy_prior.data import load_images
from energy_prior.energies import waymark
from energy_prior.evaluate import gap_closed

_WAYMARKS = 10
_BATCH = 128
CHAINS: dict[str, dict[str, Any]] = {
    "denoising": {},
    "denoising_flow_alone": {"steps": 1},
    "denoising_steps_alone": {"waymarks": 0},
}
"""Options of chains under the energies of "denoising"."""
RULES: dict[str, tuple[dict[str, Any], str | None, dict[str, Any]]] = {
    "nce": ({"method": "nce", "iterations": 4000, "batch_size": 128}, None, {"waymarks": 0}),
    "two_stage": ({"method": "two_stage", "iterations": 400, "batch_size": 64}, "shorter", {}),
}
"""Settings of `fit`, about half an hour on one core; the run before it; options of chains."""
TELESCOPED = 3000
"""Iterations."""


def main() -> None:
    """Runs what is missing, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = read_options(parser)
    out, runs = ROOT / "docs" / "results", Path(options.runs)
    name, make, sizes = "cifar10_pyramid", CASES["cifar10_pyramid"], Sizes()
    if options.quick:
        out = runs = Path(tempfile.mkdtemp())
        name, make = "digits", QUICK["digits"]
        sizes = Sizes(images=100, draws=0, moments=200, classifier=20, components=2, few=50, long=40, held=400)
    log = out / "deep_rules.partial.jsonl"
    if not options.table:
        torch.manual_seed(0)
        case = make()
        images = load_images(Path(options.data) / case.data).images if case.data else digits(case.generator.x_shape)
        files = [Path(__file__).with_name(f"{file}.py") for file in FIGURES]
        key = code_key(*files, also=inspect.getsource(make))
        shared = Log(out / "deep_latents.partial.jsonl", key, name, "backbone|shorter energies", options.device)
        run = DeepRun(case, images, runs / f"deep-{name}-{key}", shared, sizes)
        run.run()
        own = code_key(*files, *(Path(__file__).with_name(name) for name in ("deep_rules.py", "ratios.py")))
        done = Log(log, own, name, options.units, options.device)
        measure(run, done, 3 if options.quick else None)
        if not done.matched:
            parser.error('--units: no unit is called so; they are the names in the docstring, and those with " energies"')
    found = most(log, name)
    if not {"gaussian", "reconstructions"} <= set(found):
        raise SystemExit(f'There is no table yet: the units "gaussian" and "reconstructions" are not in {log}.')
    rows = rows_of(found)
    write_results(out / "deep_rules.json", rows)
    ran = sorted({(result["commit"] or "unknown")[:7] + ", " + result["device"] for result in found.values()})
    text = (
        "`python benchmarks/deep_rules.py`, of 1,000 images: its docstring says what the rules are. Shares of the gap between "
        f"the Gaussian prior and reconstructions. Run at {'; '.join(ran)}."
    )
    (out / "deep_rules.md").write_text(ratio_table("Learning rules on deep latents", text, rows))
    print((out / "deep_rules.md").read_text())


def measure(run: CaseRun, log: Log, iterations: int | None) -> None:
    """All units.

    Args:
        run: the backbone and its distances.
        log: units that are done.
        iterations: of every rule; None: as many as are usual.
    """
    n = run.sizes.few
    log.unit("reconstructions", lambda: run.distance(run.reconstructed(run.others[:n])))
    log.unit("gaussian", lambda: run.distance(run.gaussian(n, 90)))
    for name, chain in CHAINS.items():
        log.unit(name, lambda chain=chain: run.distance(run.sampled(run.learned("shorter"), n, 90, **chain)))
    for name, (settings, after, chain) in RULES.items():
        settings = {"progress": False} | settings | ({} if iterations is None else {"iterations": iterations})
        log.unit(f"{name} energies", lambda name=name, s=settings, after=after: run.learn(name, s, after=after))
        log.unit(name, lambda name=name, chain=chain: run.distance(run.sampled(run.learned(name), n, 90, **chain)))
    file = run.folder / "telescoped.pt"
    log.unit("telescoped energies", lambda: _telescope(run, file, iterations or TELESCOPED))

    def telescoped() -> dict[str, Any]:
        prior = JointEBMPrior(run.vae, [Telescoped(f).to(run.device) for f in denoising_energies(run.vae.latent_shapes)])
        prior.energies.load_state_dict(torch.load(file, weights_only=True, map_location=run.device))
        rng = torch.Generator().manual_seed(90)
        batches = [
            prior.sample(min(run.batch, n - at), waymarks=_WAYMARKS, backend="eager", rng=rng) for at in range(0, n, run.batch)
        ]
        return run.distance(torch.cat(batches).cpu())

    log.unit("telescoped", telescoped)


class Telescoped(nn.Module):
    """f(ε; t) = log N(ε; α m, α² C + σ² I) − log N(ε; 0, I) + Σ_{t_j ≥ t} g(ε; t_j), of waymarks t_j = j/K, j < K.

    Args:
        energy: gives the closed part, and g = ⟨ε_i, net(ε_i, …, ε_L, t)⟩.
    """

    reads_noise = True
    has_waymarks = True

    def __init__(self, energy: Any) -> None:
        super().__init__()
        self.energy: DenoisingEnergy = energy

    def forward(self, noise: tuple[Tensor, ...], level: Tensor | None = None) -> Tensor:
        """f, (batch,), nats, at the waymark next to `level`."""
        number = 0 if level is None else min(_WAYMARKS - 1, round(float(level.flatten()[0]) * _WAYMARKS))
        at = [noise[0].new_full((len(noise[0]),), j / _WAYMARKS) for j in range(number, _WAYMARKS)]
        return self.closed(noise[0], at[0]) + torch.stack([self.g(noise, level) for level in at]).sum(0)

    def closed(self, own: Tensor, level: Tensor) -> Tensor:
        """The part that is set from the posterior's noise, (batch,), nats."""
        return self.energy.quadratic(own, waymark(level)[0])

    def g(self, noise: tuple[Tensor, ...], level: Tensor) -> Tensor:
        """The part that is learned, (batch,), nats."""
        return (noise[0] * self.energy.net(noise, level)).flatten(1).sum(1)


def _telescope(run: CaseRun, file: Path, iterations: int) -> dict[str, Any]:
    """Learns to tell draws of each waymark from draws of the next."""
    torch.manual_seed(1)
    energies: list[Any] = [f.to(run.device) for f in denoising_energies(run.vae.latent_shapes)]
    plain = [Telescoped(f) for f in energies]
    rows = noise_of(run.vae, run.train[: run.sizes.moments].to(run.device))
    for i, f in enumerate(energies):
        f.set_from([rows[i]], [])
    weights = [w for f in plain for w in f.parameters() if w.requires_grad]

    def loss() -> Tensor:
        clean = noise_of(run.vae, run.train[torch.randint(len(run.train), (_BATCH,))].to(run.device))
        added = [torch.randn_like(e) for e in clean]
        k = torch.randint(_WAYMARKS, (_BATCH,)).to(clean[0])
        here, following = (_logit(plain, _noised(clean, added, at), k) for at in (k, k + 1))
        return F.softplus(-here).mean() + F.softplus(following).mean()

    last = minimise(loss, weights, iterations)
    torch.save(nn.ModuleList(plain).state_dict(), file)
    return {"loss": last}


def _noised(clean: Sequence[Tensor], added: Sequence[Tensor], number: Tensor) -> tuple[Tensor, ...]:
    """Noise of maps at the waymarks of these numbers, (batch,)."""
    alpha, sigma = (t[:, None, None, None] for t in waymark(number / _WAYMARKS))
    return tuple(alpha * e + sigma * n for e, n in zip(clean, added, strict=True))


def _logit(energies: Sequence[Telescoped], noise: tuple[Tensor, ...], number: Tensor) -> Tensor:
    """The log ratio between the waymark of each number and the next, (batch,), nats."""
    here, following = number / _WAYMARKS, (number + 1) / _WAYMARKS
    parts = [f.closed(e, here) - f.closed(e, following) for f, e in zip(energies, noise, strict=True)]
    return torch.stack([*parts, *(f.g(noise[i:], here) for i, f in enumerate(energies))]).sum(0)


def rows_of(found: dict[str, dict[str, Any]]) -> list[Row]:
    """The share of the gap that each closes, of those that are done."""
    gaussian, reconstructions = found["gaussian"]["fd"], found["reconstructions"]["fd"]
    rows: list[Row] = []
    for name in (*CHAINS, *RULES, "telescoped"):
        case, metric = "cifar10_pyramid", f"gap_closed_{name}"
        if name in found and gaussian > reconstructions:
            closed = gap_closed(found[name]["fd"], gaussian, reconstructions)
            rows.append(mean_row(case, metric, [closed], None, "higher"))
        else:
            why = "no gap" if name in found else "not measured: not run yet"
            rows.append(Row(case=case, metric=metric, value=None, sd=None, n=0, goal=None, better="higher", why=why))
    return rows


if __name__ == "__main__":
    main()
