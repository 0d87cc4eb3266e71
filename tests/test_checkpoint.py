"""Checkpoints: bitwise round trips, atomic writes, and a clear refusal of every file that does not belong."""

from __future__ import annotations

import json
import re
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from energy_prior import CheckpointError, ConvEnergy, JointEBMPrior, LadderVAE, MLPEnergy, denoising_energies
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
    with pytest.raises(CheckpointError, match="not a checkpoint of energy-prior as expected here, one that JointEBMPrior.save"):
        JointEBMPrior.load(path, prior.generator)
    checkpoint_module.write_checkpoint(path, {"weight": torch.zeros(2)}, {}, checkpoint_module.RUN)
    with pytest.raises(CheckpointError, match="wrote. It has the format 'energy-prior run'"):
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
    save_file({"weight": torch.zeros(2)}, path, metadata=header | {"format_version": "3"})
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


def signed(
    path: Path,
    tensors: dict[str, Any] | None = None,
    header: dict[str, str] | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """Writes a checkpoint with other contents, whose digest is right; a name whose value is None goes."""
    with safe_open(path, "pt") as file:
        metadata: dict[str, str] = file.metadata() | (header or {})
        values: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()} | (tensors or {})  # noqa: SIM118
    if config is not None:
        document = json.loads(metadata["config"]) | config
        metadata["config"] = json.dumps({name: value for name, value in document.items() if value is not None})
    values = {name: value for name, value in values.items() if value is not None}
    save_file(values, path, metadata=metadata | {"digest": checkpoint_module.digest(values, metadata["config"])})


WELL = {"kind": "MLPEnergy", "latent_shape": [3]}
DESCRIPTIONS: list[Any] = [
    {},
    3,
    WELL | {"depth": 9},
    {"kind": "Other"},
    WELL | {"latent_shape": [2]},
    WELL | {"latent_shape": [3.0]},
    WELL | {"hidden": [64]},
    WELL | {"hidden": [0]},
    WELL | {"hidden": [128, "x"]},
    WELL | {"hidden": [100_000, 100_000]},
    WELL | {"hidden": [10**12, 10**12]},
    WELL | {"hidden": [10**30]},
    WELL | {"hidden": [1] * 100_000},
    WELL | {"activation": "relu"},
    WELL | {"saturation": -1},
    {"kind": "ConvEnergy", "latent_shape": [3]},
    {"kind": "DenoisingEnergy", "latent_shape": [3], "above": [[2]], "channels": 10**5},
    {"kind": "DenoisingEnergy", "latent_shape": [3], "above": [[2]] * 100_000},
]


@pytest.mark.parametrize("entry", DESCRIPTIONS, ids=range(len(DESCRIPTIONS)))
def test_a_damaged_description_of_the_energies(tmp_path: Path, entry: Any) -> None:
    """Nothing of the size that it asks for is made: some would need terabytes."""
    prior, path = make(), tmp_path / "p"
    prior.save(path)
    signed(path, config={"energies": [entry, entry]})
    before = time.process_time()
    with pytest.raises(CheckpointError, match="/p': energies: .* Save the prior again") as error:
        JointEBMPrior.load(path, prior.generator)
    assert len(str(error.value)) < 600
    assert time.process_time() - before < 5


def test_an_energy_of_as_many_weights_for_another_shape(tmp_path: Path) -> None:
    vae = LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8)
    prior, path = JointEBMPrior(vae, denoising_energies(vae.latent_shapes, channels=4)), tmp_path / "p"
    prior.save(path)
    described = [{"kind": "DenoisingEnergy", "latent_shape": [1, 3], "above": [[2]], "channels": 4, "saturation": 4.0}]
    described.append({"kind": "DenoisingEnergy", "latent_shape": [2], "above": [], "channels": 4, "saturation": 4.0})
    signed(path, config={"energies": described})
    with pytest.raises(CheckpointError, match="f_1 cannot be built .* it is for another layer or for other weights"):
        JointEBMPrior.load(path, vae)
    described[0]["latent_shape"] = [3]
    signed(path, config={"energies": described})
    assert JointEBMPrior.load(path, vae).energies[0].latent_shape == (3,)


@pytest.mark.parametrize("energies", [[], [WELL], [WELL] * 3, [WELL] * 100_000])
def test_descriptions_of_other_layers(tmp_path: Path, energies: Any) -> None:
    prior, path = make(), tmp_path / "p"
    prior.save(path)
    signed(path, config={"energies": energies})
    with pytest.raises(CheckpointError, match=f"expected descriptions of f_1, …, f_2, got {len(energies)} of them"):
        JointEBMPrior.load(path, prior.generator)


CONFIGS: list[dict[str, Any]] = [
    {"space": 3},
    {"space": "other"},
    {"space": None},
    {"joint": 1},
    {"joint": None},
    {"latent_shapes": None},
    {"latent_shapes": [[3]]},
    {"latent_shapes": [[1] * 100_000]},
    {"generator": None},
    {"generator": "x"},
    {"energies": {}},
    {"energies": None},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_damaged_configuration(tmp_path: Path, config: dict[str, Any]) -> None:
    prior, path = make(), tmp_path / "p"
    prior.save(path)
    signed(path, config=config)
    with pytest.raises(CheckpointError, match="/p' ") as error:
        JointEBMPrior.load(path, prior.generator)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("text", ["", "3", "[]", "{", "[" * 100_000, '{"space": ' + "1" * 5000 + "}"])
def test_a_configuration_that_is_none(tmp_path: Path, text: str) -> None:
    prior, path = make(), tmp_path / "p"
    prior.save(path)
    signed(path, header={"config": text})
    with pytest.raises(CheckpointError, match="/p' is damaged: expected its configuration as a JSON object") as error:
        JointEBMPrior.load(path, prior.generator)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("version", ["", "-1", "2.0", "²", "1" * 6000])
def test_a_version_that_is_none(tmp_path: Path, version: str) -> None:
    prior, path = make(), tmp_path / "p"
    prior.save(path)
    signed(path, header={"format_version": version})
    with pytest.raises(CheckpointError, match="/p' has checkpoint format .*Upgrade"):
        JointEBMPrior.load(path, prior.generator)


TENSORS: list[tuple[str, Any, str]] = [
    ("step_size", None, "its step_size is missing or impossible"),
    ("step_size", torch.tensor(1), "its step_size is missing or impossible"),
    ("step_size", torch.tensor(-0.1), "its step_size is missing or impossible"),
    ("step_size", torch.tensor(torch.nan), "its step_size is missing or impossible"),
    ("step_size", torch.tensor(0.3, dtype=torch.float64), "of a prior in torch.float64 .*expected torch.float32, as this"),
    ("step_size", torch.tensor(0.3, dtype=torch.complex64), "its step_size is missing or impossible"),
    ("step_size", torch.tensor([0.3]), r"step_size has shape \(1,\) instead of \(\)"),
    ("calibration.count", None, "its calibration.count is missing or impossible"),
    ("calibration.count", torch.tensor(0.5), "calibration.count is of torch.float32 instead of torch.int64"),
    ("calibration.table", torch.zeros(4, 512, dtype=torch.bool), "calibration.table is of torch.bool instead of torch.float32"),
    ("energies.0.net.1.weight", torch.zeros(1), "f_1 cannot be built .* it is for another layer or for other weights"),
    ("energies.0.net.1.bias", torch.full((128,), torch.inf), "energies.0.net.1.bias is not finite"),
    ("x" * 10_000, torch.zeros(1), "x*… is not expected"),
]


@pytest.mark.parametrize(("name", "value", "words"), TENSORS, ids=range(len(TENSORS)))
def test_tensors_that_do_not_fit(tmp_path: Path, name: str, value: Any, words: str) -> None:
    prior, path = make(), tmp_path / "p"
    prior.save(path)
    signed(path, {name: value})
    with pytest.raises(CheckpointError, match=f"/p'.* {words}|/p' {words}") as error:
        JointEBMPrior.load(path, prior.generator)
    assert len(str(error.value)) < 800


def test_numbers_beyond_single_precision_are_finite(tmp_path: Path) -> None:
    prior, path = make().double(), tmp_path / "p"
    with torch.no_grad():
        next(iter(prior.parameters())).fill_(1e300)
    prior.save(path)
    again = JointEBMPrior.load(path, prior.generator)
    assert bool((next(iter(again.parameters())) == 1e300).all())


@pytest.mark.parametrize(("dtype", "shape"), [("F4", [3]), ("F32", [2**63, 0]), ("F32", [1] * 100), ("U16", [6])])
def test_what_safetensors_has_and_torch_may_not(tmp_path: Path, dtype: str, shape: list[int]) -> None:
    """Whatever torch says of such tensors: the file is damaged, by its digest if by nothing else."""
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, 0 if 0 in shape else 12 if dtype == "U16" else 4]}
    header = {"a": entry, "__metadata__": {"format": "energy-prior", "format_version": "3", "config": "{}", "digest": ""}}
    text = json.dumps(header).encode()
    (tmp_path / "p").write_bytes(struct.pack("<Q", len(text)) + text + bytes(entry["data_offsets"][1]))  # type: ignore[index]
    with pytest.raises(CheckpointError, match="/p' is (damaged|not a whole safetensors file)"):
        JointEBMPrior.load(tmp_path / "p", make().generator)


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
    with pytest.raises(CheckpointError, match="is damaged: it does not hold what was written.*Save the prior again"):
        JointEBMPrior.load(path, prior.generator)


def test_a_joint_checkpoint_names_the_generator_that_does_not_fit(tmp_path: Path) -> None:
    prior, path = make(), tmp_path / "p"
    prior.train_jointly()
    prior.save(path)
    other = LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8, depth=3)
    with pytest.raises(CheckpointError, match="does not fit this generator: .* is missing.*Build it as it was"):
        JointEBMPrior.load(path, other)
