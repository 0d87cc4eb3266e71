"""`CAREamicsAdapter` on CAREamics' own model; in an environment of its own, as its pins are other versions than ours.

python -m venv apart && . apart/bin/activate
pip install -c tests/apart/careamics.txt . pytest bioimageio.core lightning matplotlib psutil scikit-image torchmetrics zarr
pip install -c tests/apart/careamics.txt --no-deps careamics torchvision
pytest --override-ini addopts= tests/apart/careamics_ladder.py
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from energy_prior import JointEBMPrior, check_generator
from energy_prior.adapters import CAREamicsAdapter, load_weights

if not torch.version.cuda:  # torchvision's operators are built for CUDA's torch; its import asks that these two exist
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

LadderVAE: Any = importlib.import_module("careamics.models.lvae").LadderVAE
likelihoods: Any = importlib.import_module("careamics.models.lvae.likelihoods")
noise_models: Any = importlib.import_module("careamics.models.lvae.noise_models")
configuration: Any = importlib.import_module("careamics.config")
lightning: Any = importlib.import_module("lightning")

QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def ladder(**changed: Any) -> Any:
    """A small `LadderVAE`, with statistics of its norms and a prior of z_L that are not the trivial ones."""
    settings: dict[str, Any] = {"input_shape": (16, 16), "output_channels": 1, "multiscale_count": 1, "z_dims": [3, 2]}
    settings |= {"encoder_n_filters": 8, "decoder_n_filters": 8, "encoder_dropout": 0.1, "decoder_dropout": 0.1}
    settings |= {"encoder_conv_strides": [2, 2], "decoder_conv_strides": [2, 2], "nonlinearity": "ELU"}
    model = LadderVAE(**(settings | {"predict_logvar": "pixelwise", "analytical_kl": False} | changed))
    with torch.no_grad():
        model.top_down_layers[-1].top_prior_params.normal_(std=0.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d) and module.running_mean is not None:
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return model.eval()


def noise_likelihood(folder: Path, channels: int = 1) -> Any:
    """A noise model of three Gaussians per channel, read from files as CAREamics has them."""
    parts = []
    for channel in range(channels):
        weight = 0.3 * np.random.default_rng(channel).normal(size=(9, 2)).astype(np.float32)
        weight[3:6] += [[1.0, 0.5]]
        np.savez(folder / f"{channel}.npz", trained_weight=weight, min_signal=0.0, max_signal=255.0, min_sigma=0.5)
        config = configuration.GaussianMixtureNMConfig(model_type="GaussianMixtureNoiseModel", path=folder / f"{channel}.npz")
        parts.append(noise_models.GaussianMixtureNoiseModel(config))
    likelihood = likelihoods.NoiseModelLikelihood(noise_models.MultiChannelNoiseModel(parts))
    likelihood.set_data_stats(torch.full((1, channels, 1, 1), 110.0), torch.full((1, channels, 1, 1), 35.0))
    return likelihood


def gaussian(lower_bound: float | None = -5.0) -> Any:
    return likelihoods.GaussianLikelihood("pixelwise", lower_bound)


def checked(adapter: CAREamicsAdapter, likelihood: Any) -> Tensor:
    """Observations, after the model's own calls have agreed with the adapter on them."""
    model, to_input = adapter.model, adapter.encoder_input or (lambda x: x)
    top, x = model.top_down_layers[-1], torch.randn(4, *adapter.x_shape)

    def log_p(output: Tensor, x: Tensor) -> Tensor:
        if likelihood is None:
            return torch.distributions.Normal(output, 0.5).log_prob(x).flatten(1).sum(1)
        return likelihood(output, x)[0].flatten(1).sum(1)

    def sample(n: int) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            for layer in model.top_down_layers:  # its sampler divides the parameters of q by it, and has none
                patch.setattr(layer, "normalize_latent_factor", 0)
            if top.top_prior_params.ndim == 5:  # its sampler repeats four dimensions
                patch.setattr(top, "get_p_params", lambda above, n: top.top_prior_params.expand(n, -1, -1, -1, -1))
            return log_p(model.output_layer(model.topdown_pass(None, n_img_prior=n)[0]), x)

    said = check_generator(
        adapter,
        x,
        reconstruct=lambda x: log_p(model(to_input(x))[0], x),
        sample=sample,
        kl=lambda x: model(to_input(x))[1]["kl"],
    )
    print(*said[-3:], sep="\n")
    assert [line.partition(":")[0] for line in said][-3:] == ["sample", "reconstruct", "kl"]
    return x


def both_channels(x: Tensor) -> Tensor:
    return x.mean(1, keepdim=True)


def with_laterals(x: Tensor) -> Tensor:
    """Three inputs of different resolution, made up."""
    y = both_channels(x)
    return torch.cat([y, y.flip(2), y.flip(3)], 1)


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        ({}, {}),
        ({"z_dims": [3, 2, 4], "input_shape": (32, 32), "analytical_kl": True}, {}),
        ({"z_dims": [2, 2, 3, 2, 2], "input_shape": (64, 64)}, {}),
        ({"input_shape": (3, 16, 16), "encoder_conv_strides": [1, 2, 2], "decoder_conv_strides": [1, 2, 2]}, {}),
        ({"output_channels": 2}, {"encoder_input": both_channels}),
        ({"output_channels": 2, "multiscale_count": 3, "z_dims": [2, 2, 3]}, {"encoder_input": with_laterals}),
    ],
    ids=["two layers", "three", "five", "3D", "two channels", "lateral"],
)
def test_with_a_predicted_variance(changed: dict[str, Any], options: dict[str, Any]) -> None:
    likelihood = gaussian()
    checked(CAREamicsAdapter(ladder(**changed), likelihood, **options), likelihood)


def test_with_a_squared_error() -> None:
    checked(CAREamicsAdapter(ladder(predict_logvar=None), variance=0.25), None)


@pytest.mark.parametrize("channels", [1, 2])
def test_with_noise_models(channels: int, tmp_path: Path) -> None:
    likelihood = noise_likelihood(tmp_path, channels)
    model = ladder(predict_logvar=None, output_channels=channels)
    checked(CAREamicsAdapter(model, likelihood, encoder_input=both_channels), likelihood)


def test_what_is_refused() -> None:
    flat = {"input_shape": (3, 16, 16), "encoder_conv_strides": [1, 2, 2]}
    for changed, words in ((flat, "encoder is 3D and its decoder 2D"), ({"input_shape": (12, 12)}, "have widths 6, 3")):
        with pytest.raises(ValueError, match=words):
            CAREamicsAdapter(ladder(**changed), gaussian())


class Training(lightning.LightningModule):
    """What CAREamics trains: the model and its likelihood, by the ELBO."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = ladder(predict_logvar=None)
        self.noise_model_likelihood = noise_likelihood(folder)

    def training_step(self, batch: Any, index: int) -> Tensor:
        output, data = self.model(batch[0])
        return sum(kl.mean() for kl in data["kl"]) - self.noise_model_likelihood(output, batch[0])[0].mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.model.parameters())
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


@pytest.mark.filterwarnings("ignore")  # Lightning's, of workers and monitors
def test_from_a_checkpoint_of_lightning_to_samples_and_scores(tmp_path: Path) -> None:
    """The file that a training run has written, without running code from it."""
    x = torch.randn(16, 1, 16, 16)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8)
    training = Training(tmp_path)
    saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
    lightning.Trainer(max_epochs=1, callbacks=[saving], **QUIET).fit(training, data)
    model = load_weights(ladder(predict_logvar=None), tmp_path / "last.ckpt").eval()
    likelihood = load_weights(noise_likelihood(tmp_path), tmp_path / "last.ckpt")
    trained = training.model.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    prior = JointEBMPrior(CAREamicsAdapter(model, likelihood))
    prior.fit(x, iterations=3, batch_size=8, progress=False)
    assert prior.sample(3, steps=2, decode="sample").shape == (3, 1, 16, 16)
    assert torch.isfinite(prior.llr_score(x[:4], 1, steps=2)).all()
    assert torch.isfinite(prior.log_joint(x[:4], steps=2)).all()
