"""The wheel in an environment of its own, without extras: the whole way works, and what is missing is named.

python -m build && python -m venv apart && apart/bin/pip install -c constraints.txt dist/*.whl pytest
cp tests/apart/without_extras.py elsewhere/ && cd elsewhere && apart/bin/pytest without_extras.py
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

import energy_prior as ep
from energy_prior import evaluate, plots
from energy_prior.cli.main import main
from energy_prior.cli.sample import write_samples
from energy_prior.cli.view import write_page
from energy_prior.data import load_images

QUIET: dict[str, Any] = {"iterations": 5, "batch_size": 16, "progress": False}


class TwoLayers(nn.Module):
    """z_2 ~ N(0, I), z_1 | z_2 ~ N(m(z_2), 0.5²), x | z_1 ~ N(g(z_1), 0.1²)."""

    latent_shapes = (torch.Size([4]), torch.Size([2]))

    def __init__(self) -> None:
        super().__init__()
        self.m, self.g = nn.Linear(2, 4), nn.Linear(4, 8)
        self.q2, self.q1 = nn.Linear(8, 2), nn.Linear(10, 4)

    def start(self, batch_size: int) -> torch.Tensor:
        return self.m.weight.new_zeros(batch_size, 2)

    def conditional(self, state: torch.Tensor, layer: int) -> Normal:
        return Normal(state, torch.ones_like(state)) if layer == 2 else Normal(self.m(state), 0.5)

    def descend(self, state: torch.Tensor, z: torch.Tensor, layer: int) -> torch.Tensor:
        return z

    def likelihood(self, state: torch.Tensor) -> Independent:
        return Independent(Normal(self.g(state), 0.1), 1)

    def infer(self, x: torch.Tensor, *, rng: torch.Generator | None = None) -> ep.Inferred:
        q2 = Normal(self.q2(x), 0.3)
        z2 = q2.rsample()
        q1 = Normal(self.q1(torch.cat([x, z2], 1)), 0.3)
        z1 = q1.rsample()
        return ep.Inferred((z1, z2), torch.stack([q1.log_prob(z1).sum(1), q2.log_prob(z2).sum(1)], 1))


def prior_of_images() -> ep.JointEBMPrior:
    """Untrained."""
    return ep.JointEBMPrior(ep.LadderVAE((1, 8, 8), latent_dims=(3, 2), hidden=8))


def test_no_extra_is_here_and_the_package_is_not_the_source_tree() -> None:
    """Else the tests below show nothing."""
    for package in (
        "scikit-learn",
        "matplotlib",
        "datasets",
        "accelerate",
        "pyyaml",
        "efficientnet-lite-pytorch",
        "huggingface-hub",
    ):
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(package)
    assert "site-packages" in ep.__file__
    assert (Path(ep.__file__).parent / "py.typed").exists()


def test_the_whole_way(tmp_path: Path) -> None:
    """Wrap, check, train, sample, score, save and load."""
    torch.manual_seed(0)
    generator, x = TwoLayers(), torch.randn(64, 8)
    ep.fit_elbo(generator, x, **QUIET)
    assert ep.check_generator(generator, x[:4])
    prior = ep.JointEBMPrior(generator)
    prior.fit(x, run_dir=tmp_path / "run", **QUIET)
    assert prior.sample(3).shape == (3, 8)
    assert prior.llr_score(x[:4], 1).shape == (4,)
    prior.calibrate(torch.randn(64, 8))
    assert prior.anomaly_score(x[:4]).isfinite().all()
    prior.save(tmp_path / "prior.safetensors")
    again = ep.JointEBMPrior.load(tmp_path / "prior.safetensors", generator)
    draws = [p.sample(2, rng=torch.Generator().manual_seed(0)) for p in (prior, again)]
    assert torch.equal(*draws)


def test_a_prior_to_share(tmp_path: Path) -> None:
    """A folder needs no extra, and the example is in the wheel."""
    prior = ep.load_example("digits")
    assert prior.sample(2).shape == (2, 1, 8, 8)
    prior.save_pretrained(tmp_path / "digits", ep.ModelCard(data="Digits", license="mit"))
    again = ep.JointEBMPrior.from_pretrained(tmp_path / "digits")
    draws = [p.sample(2, rng=torch.Generator().manual_seed(0)) for p in (prior, again)]
    assert torch.equal(*draws)


@pytest.mark.parametrize(
    ("call", "extra"),
    [
        (lambda folder: evaluate.detection([1.0], [2.0]), "eval"),
        (lambda folder: evaluate.efficientnet_features(torch.rand(2, 1, 8, 8)), "eval"),
        (lambda folder: evaluate.two_sample_accuracy(*torch.rand(4, 8, 2)), "eval"),
        (lambda folder: evaluate.inception_features(torch.rand(2, 3, 8, 8)), "fid"),
        (lambda folder: importlib.import_module("energy_prior.detectors"), "eval"),
        (lambda folder: plots.image_panels(folder / "a.png", {"x": torch.rand(4, 1, 8, 8)}), "examples"),
        (lambda folder: load_images("ylecun/mnist"), "examples"),
        (lambda folder: prior_of_images().push_to_hub("owner/name"), "hub"),
        (lambda folder: ep.JointEBMPrior.from_pretrained("owner/name"), "hub"),
        (lambda folder: write_samples(prior_of_images(), 2, folder / "samples"), "examples"),
        (lambda folder: write_page(prior_of_images(), folder / "view.html"), "examples"),
        (lambda folder: prior_of_images().fit(torch.rand(32, 1, 8, 8), run_dir=folder, tensorboard=True, **QUIET), "train"),
    ],
)
def test_what_is_missing_is_named(call: Callable[[Path], Any], extra: str, tmp_path: Path) -> None:
    """With the words that install it."""
    with pytest.raises(ep.MissingExtraError, match=rf'pip install "energy-prior\[{extra}\]"'):
        call(tmp_path)


@pytest.mark.parametrize(
    ("words", "extra"), [(["demo"], "examples"), (["train", "recipe.yaml"], "train"), (["train", "--data", "a/b"], "train")]
)
def test_commands_name_it_in_one_line(words: list[str], extra: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And end with status 2."""
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f'pip install "energy-prior[{extra}]"' in error
    assert error.count("\n") == 1


def test_info_works(capsys: pytest.CaptureFixture[str]) -> None:
    """It says which extras are not here."""
    assert main(["info"]) == 0
    assert "extra eval: without" in capsys.readouterr().out
