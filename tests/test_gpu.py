"""The whole way on a GPU, of vectors and of maps: fit, sample, score, save and load: `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from energy_prior import JointEBMPrior, LadderVAE, ResidualVAE, fit_elbo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("method", ["denoising", "nce", "two_stage", "multi_stage_nce"])
@pytest.mark.parametrize("maps", [True, False], ids=["maps", "vectors"])
def test_the_whole_way(maps: bool, method: str, tmp_path: Path) -> None:
    """Images stay on the CPU; the model and what is drawn are on the GPU."""
    if method == "denoising" and not maps:
        pytest.skip("energies of vectors have no waymarks")
    x = torch.rand(256, 1, 16, 16).round()
    torch.manual_seed(1)
    vae = (
        ResidualVAE((1, 16, 16), groups=(1, 1), channels=16, latent_channels=4)
        if maps
        else LadderVAE((1, 16, 16), latent_dims=(8, 4), hidden=32)
    ).to("cuda")
    fit_elbo(vae, x, validation=x[:50], iterations=20, batch_size=64, progress=False)
    prior = JointEBMPrior(vae)
    prior.fit(x, method, iterations=6, batch_size=64, progress=False)
    images = prior.sample(32)
    assert images.device.type == "cuda"
    assert images.shape == (32, 1, 16, 16)
    assert images.isfinite().all()
    scores = prior.llr_score(x[:8].to("cuda"), 1)
    assert scores.shape == (8,)
    assert scores.isfinite().all()
    prior.save(tmp_path / "prior.safetensors")
    again = JointEBMPrior.load(tmp_path / "prior.safetensors", vae)
    draws = [p.sample(4, rng=torch.Generator().manual_seed(3), backend="eager") for p in (prior, again)]
    torch.testing.assert_close(*draws, rtol=1e-2, atol=1e-3)  # convolutions in TF32 add in no fixed order
    assert not torch.equal(draws[0], prior.sample(4, rng=torch.Generator().manual_seed(4), backend="eager"))


@pytest.mark.parametrize("backend", ["eager", "compiled", "graph"])
def test_energies_with_waymarks_on_every_backend(backend: str) -> None:
    """One seed gives one draw per backend; the distributions are held to each other by the tests under injected noise."""
    vae = ResidualVAE((1, 16, 16), groups=(1, 1), channels=16, latent_channels=4).to("cuda").eval()
    prior = JointEBMPrior(vae)
    prior.fit(torch.rand(256, 1, 16, 16), iterations=4, batch_size=64, progress=False)
    first, second = (
        prior.sample_latents(16, rng=torch.Generator().manual_seed(0), backend=backend)  # type: ignore[arg-type]
        for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
