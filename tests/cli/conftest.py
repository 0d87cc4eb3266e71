"""A run of `energy-prior train` that the tests of several commands start from."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from pictures import picture, write_parquet

from energy_prior.cli.main import main

FLAGS = [
    "generator.latent_dims=[3, 2]",
    "generator.hidden=8",
    "elbo.iterations=4",
    "elbo.batch_size=8",
    "elbo.progress=false",
    "fit.0.iterations=4",
    "fit.0.batch_size=8",
    "fit.0.progress=false",
    "data.validation=12",
]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `energy-prior train`."""
    folder = tmp_path_factory.mktemp("run")
    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        data = write_parquet(folder / "set", [picture(7 * i % 255, (6, 6)) for i in range(50)])
        settings = [word for flag in FLAGS for word in ("--set", flag)]
        assert main(["train", "--data", str(data), "--out", str(folder / "out"), "--device", "cpu", *settings]) == 0
    return folder / "out"
