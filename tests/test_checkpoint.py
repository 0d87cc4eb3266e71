"""Checkpoints: bitwise round trips, atomic writes, and a clear refusal of every file that does not belong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from energy_prior import CheckpointError, ConvEnergy, JointEBMPrior, LadderVAE, MLPEnergy
from energy_prior import checkpoint as checkpoint_module


def make(dims: tuple[int, ...] = (3, 2), **keywords: Any) -> JointEBMPrior:
    torch.manual_seed(0)
    prior = JointEBMPrior(LadderVAE((1, 4, 4), latent_dims=dims, hidden=8, **keywords))
    for p in prior.parameters():
        p.data.normal_()
    prior.step_size.fill_(0.123)
    return prior


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nets", ["mlp", "conv"])
def test_round_trip_is_bitwise(tmp_path: Path, nets: str, dtype: torch.dtype) -> None:
    prior = make(nets=nets).to(dtype)
    prior.save(tmp_path / "prior.safetensors")
    again = JointEBMPrior.load(tmp_path / "prior.safetensors", prior.generator)
    assert again.space == prior.space
    assert list(again.state_dict()) == list(prior.state_dict())
    for name, value in prior.state_dict().items():
        assert again.state_dict()[name].dtype == value.dtype
        assert torch.equal(again.state_dict()[name], value), name
    rngs = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert torch.equal(prior.sample(3, rng=rngs[0]), again.sample(3, rng=rngs[1]))


def test_settings_of_built_in_energies_travel(tmp_path: Path) -> None:
    vae = LadderVAE((1, 8, 8), latent_dims=(3, 2), hidden=8, nets="conv")
    energies = [
        ConvEnergy(vae.latent_shapes[0], channels=(4, 6), activation="gelu", spectral_norm=True),
        MLPEnergy(vae.latent_shapes[1], hidden=(5,), activation="tanh"),
    ]
    prior = JointEBMPrior(vae, energies, space="latent")
    prior.save(tmp_path / "p")
    again = JointEBMPrior.load(tmp_path / "p", vae)
    assert again.space == "latent"
    assert [type(f) for f in again.energies] == [ConvEnergy, MLPEnergy]
    assert all(torch.equal(a, b) for a, b in zip(prior.state_dict().values(), again.state_dict().values(), strict=True))


class Mine(nn.Module):
    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.net = nn.Linear(width, 1)

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z[:, : self.net.in_features])[:, 0]


def test_custom_energies_must_be_passed_to_load(tmp_path: Path) -> None:
    vae = LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8)
    prior = JointEBMPrior(vae, [Mine(), Mine()])
    prior.save(tmp_path / "p")
    with pytest.raises(CheckpointError, match="f_1 was a module of your own, Mine"):
        JointEBMPrior.load(tmp_path / "p", vae)
    again = JointEBMPrior.load(tmp_path / "p", vae, energies=[Mine(), Mine()])
    assert all(torch.equal(a, b) for a, b in zip(prior.parameters(), again.parameters(), strict=True))
    wrong = [Mine(1), Mine()]
    kept = [p.detach().clone() for p in wrong[0].parameters()]
    message = r"energies.0.net.weight has shape \(1, 2\) instead of \(1, 1\)"
    with pytest.raises(CheckpointError, match=message):
        JointEBMPrior.load(tmp_path / "p", vae, energies=wrong)
    assert all(torch.equal(a, b) for a, b in zip(kept, wrong[0].parameters(), strict=True)), "nothing half-loaded"
    with pytest.raises(CheckpointError, match="is missing|is not expected"):
        JointEBMPrior.load(tmp_path / "p", vae, energies=[MLPEnergy((3,)), MLPEnergy((2,))])


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No checkpoint at"):
        JointEBMPrior.load(tmp_path / "nowhere", make().generator)


@pytest.mark.parametrize("keep", [0, 5, 0.3, 0.999])
def test_truncated_file(tmp_path: Path, keep: float) -> None:
    prior, path = make(), tmp_path / "p"
    prior.save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    with pytest.raises(CheckpointError, match="truncated, damaged or of another kind"):
        JointEBMPrior.load(path, prior.generator)


def test_foreign_files(tmp_path: Path) -> None:
    prior, path = make(), tmp_path / "p"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of energy-prior"):
        JointEBMPrior.load(path, prior.generator)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        JointEBMPrior.load(path, prior.generator)


def test_future_version_and_damaged_configuration(tmp_path: Path) -> None:
    prior, path = make(), tmp_path / "p"
    header = {"format": "energy-prior", "format_version": "99", "config": "{}"}
    save_file({"weight": torch.zeros(2)}, path, metadata=header)
    with pytest.raises(CheckpointError, match="format '99'.*Upgrade"):
        JointEBMPrior.load(path, prior.generator)
    save_file({"weight": torch.zeros(2)}, path, metadata=header | {"format_version": "1"})
    with pytest.raises(CheckpointError, match="format 1, of an unreleased version.*Fit the prior again"):
        JointEBMPrior.load(path, prior.generator)
    save_file({"weight": torch.zeros(2)}, path, metadata=header | {"format_version": "2"})
    with pytest.raises(CheckpointError, match="is damaged"):
        JointEBMPrior.load(path, prior.generator)


def test_another_generator(tmp_path: Path) -> None:
    prior, path = make(), tmp_path / "p"
    prior.save(path)
    with pytest.raises(CheckpointError, match=re.escape("made for latents of shapes [[3], [2]] (z_1 first); this generator")):
        JointEBMPrior.load(path, make((4, 2)).generator)
    other = make().generator
    assert isinstance(other, LadderVAE)
    with torch.no_grad():
        next(iter(other.parameters())).add_(1e-6)
    with pytest.raises(CheckpointError, match="generator with other weights"):
        JointEBMPrior.load(path, other)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    prior, path = make(), tmp_path / "p"
    prior.save(path)
    before = path.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module.os, call, full_disk)
    with pytest.raises(OSError, match="No space left"):
        make((4, 2)).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left behind"


def test_the_header_is_readable_json(tmp_path: Path) -> None:
    prior, path = make(), tmp_path / "p"
    prior.save(path)
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    assert config["latent_shapes"] == [[3], [2]]
    assert [e["kind"] for e in config["energies"]] == ["MLPEnergy", "MLPEnergy"]


@pytest.mark.filterwarnings("ignore::energy_prior.TrainingWarning")  # energies of any size
def test_a_generator_changed_since_the_fit_is_not_vouched_for(tmp_path: Path) -> None:
    prior = make()
    assert isinstance(prior.generator, LadderVAE)
    prior.fit(torch.rand(8, 1, 4, 4), iterations=2, progress=False)
    prior.save(tmp_path / "p")
    with torch.no_grad():
        next(iter(prior.generator.parameters())).add_(0.1)
    with pytest.raises(CheckpointError, match="The generator has changed since the energies were fitted"):
        prior.save(tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_energies_that_share_weights(tmp_path: Path) -> None:
    vae = LadderVAE((1, 4, 4), latent_dims=(2, 2), hidden=8)
    shared = Mine()
    JointEBMPrior(vae, [shared, shared]).save(tmp_path / "p")
    again = Mine()
    JointEBMPrior.load(tmp_path / "p", vae, energies=[again, again])
    assert torch.equal(again.net.weight, shared.net.weight)


@pytest.mark.parametrize("entry", [{}, 3, {"kind": "MLPEnergy", "latent_shape": [3], "depth": 9}, {"kind": "Other"}])
def test_a_damaged_description_of_the_energies(tmp_path: Path, entry: Any) -> None:
    prior, path = make(), tmp_path / "p"
    prior.save(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = json.loads(header["config"])
    text = json.dumps(config | {"energies": [entry, entry]})
    changed = header | {"config": text, "digest": checkpoint_module.digest(tensors, text)}
    save_file(tensors, path, metadata=changed)
    with pytest.raises(CheckpointError, match="energies: "):
        JointEBMPrior.load(path, prior.generator)


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    prior, path = make(), tmp_path / "p"
    with torch.no_grad():
        next(iter(prior.parameters())).fill_(float("nan"))
    prior.save(path)
    with pytest.raises(CheckpointError, match="is not finite"):
        JointEBMPrior.load(path, prior.generator)


def test_a_flipped_bit(tmp_path: Path) -> None:
    prior, path = make(), tmp_path / "p"
    prior.save(path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="is damaged. Save the prior again"):
        JointEBMPrior.load(path, prior.generator)


def test_a_joint_checkpoint_names_the_generator_that_does_not_fit(tmp_path: Path) -> None:
    prior, path = make(), tmp_path / "p"
    prior.train_jointly()
    prior.save(path)
    other = LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8, depth=3)
    with pytest.raises(CheckpointError, match="does not fit this generator: .* is missing.*Build it as it was"):
        JointEBMPrior.load(path, other)
