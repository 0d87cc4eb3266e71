"""The backends that there are: found by looking, replaced where one cannot run a chain, and deleted one at a time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_priors import STEPS, N, injected, lively, mlp, target_of

import energy_prior
from energy_prior import ArgumentError
from energy_prior.langevin import backends
from energy_prior.langevin import step as reference
from energy_prior.langevin.step import StepConfig
from energy_prior.process import frozen


def test_every_backend_is_found_by_its_file() -> None:
    folder = Path(backends.__path__[0])
    files = {file.stem for file in folder.glob("*.py") if not file.stem.startswith("_")}
    assert set(backends.available()) == files == {"eager", "compiled", "graph"}
    for name in backends.available():
        assert backends.get(name).name == name
        fallback = backends.get(name).fallback
        assert fallback is None or fallback in files
    assert [name for name in backends.available() if backends.get(name).fallback is None] == ["eager"]
    with pytest.raises(ArgumentError, match="got '_loops'"):
        backends.get("_loops")


def test_these_two_take_every_chain() -> None:
    prior = lively(mlp())
    with torch.no_grad(), frozen(prior, prior.generator):
        density = target_of(prior).density()
    for name in ("eager", "compiled"):
        assert backends.get(name).refusal(density, StepConfig("euler", adjust=True, measured=True), injected(prior)) is None


CODE = """
import sys, warnings
import torch
from energy_prior import ArgumentError, BackendWarning, JointEBMPrior, LadderVAE
from energy_prior.langevin import backends
warnings.simplefilter("error", BackendWarning)
gone = sys.argv[1]
assert gone not in backends.available() and len(backends.available()) == 2, backends.available()
assert not [name for name in sys.modules if name.endswith("backends." + gone)]
torch.manual_seed(0)
prior = JointEBMPrior(LadderVAE((4,), latent_dims=(3, 2), hidden=8))
for f in prior.energies:
    torch.nn.init.normal_(f.net[-1].weight, std=0.5)
try:
    prior.sample(2, steps=2, backend=gone)
except ArgumentError as error:
    assert all(repr(name) in str(error) for name in ("auto", *backends.available())), error
else:
    raise AssertionError
z = prior.sample_latents(6, steps=3, backend="auto", rng=torch.Generator().manual_seed(1))
assert all(bool(torch.isfinite(t).all()) for t in z)
prior.tune_step_size(batch_size=4)
if gone != "graph":
    warnings.simplefilter("ignore")
    prior.sample_latents(6, steps=3, backend="graph", step_size=0.2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eager", "compiled", "graph"])
def test_any_backend_can_be_deleted(name: str, tmp_path: Path) -> None:
    """Nothing else is touched: the package is imported, "auto" chooses among the rest, and who asks for it is told."""
    package = Path(energy_prior.__file__).parent
    shutil.copytree(package, tmp_path / "energy_prior", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "energy_prior" / "langevin" / "backends" / f"{name}.py").unlink()
    there = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", CODE, name], env=there, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_reference_is_what_eager_does() -> None:
    """Bit for bit, with injected noise, adjusted or not."""
    prior = lively(mlp())
    noise = injected(prior)
    for adjust in (False, True):
        config = StepConfig("crank_nicolson", adjust=adjust, measured=adjust)
        with torch.no_grad(), frozen(prior, prior.generator):
            density = target_of(prior).density()
            state, _ = reference.init(density, config, noise.normal(0), torch.full((N,), 0.3, dtype=torch.float64))
            steps = STEPS if adjust else STEPS - 1
            draws = [reference.Draw(noise.normal(t), noise.uniform(t)) for t in range(1, STEPS + 1)]
            for draw in draws[:steps]:
                state, _ = reference.step(density, config, state, [draw])
            end, _ = reference.finalize(density, config, state, draws[steps:])
        z = prior.sample_latents(N, steps=STEPS, step_size=0.3, adjust=adjust, noise=noise, backend="eager")
        for a, b in zip(z, end.latents, strict=True):
            assert torch.equal(a, b)
