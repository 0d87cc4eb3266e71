"""`load_checkpoint` and `load_weights`: checkpoints of public code, read without running any, and what is wrong in words."""

from __future__ import annotations

import argparse
import re
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_ins import NVAE
from torch import nn

from energy_prior import ArgumentError, CheckpointError
from energy_prior.adapters import load_checkpoint, load_weights


def test_checkpoints_of_public_code(tmp_path: Path) -> None:
    """NVAE's: args in a Namespace, and a `weight_normalized` that its code makes anew; VDVAE's: "module." before names."""
    model, path = NVAE(), tmp_path / "checkpoint.pt"
    weights = {f"module.{k}": v for k, v in model.state_dict().items()}
    saved = {
        "epoch": 3,
        "state_dict": weights | {"module.stem.weight_normalized": torch.zeros(1)},
        "arch_instance": {"a": ["b"]},
    }
    torch.save(saved | {"args": argparse.Namespace(num_latent_scales=2)}, path)
    loaded = load_checkpoint(path)
    assert loaded["args"].num_latent_scales == 2
    other = NVAE()
    assert load_weights(other, path) is other
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert load_weights(NVAE(), loaded) is not None
    assert load_weights(NVAE(), {"model_state_dict": model.state_dict()}) is not None


@pytest.mark.parametrize("prefix", ["model.", "_orig_mod.", "module._orig_mod.", "model.module."])
def test_prefixes_of_wrappers_are_taken_off(prefix: str) -> None:
    model, other = NVAE(), NVAE()
    load_weights(other, {"state_dict": {prefix + k: v for k, v in model.state_dict().items()}})
    assert torch.equal(other.stem.weight, model.stem.weight)
    inside = nn.Module()
    inside.model = nn.Linear(2, 2)
    assert load_weights(inside, inside.state_dict()) is inside, "names that are the model's own stay"


def averaged(weights: dict[str, Any]) -> Any:
    """As `torch.optim.swa_utils.AveragedModel` names them."""
    return {"n_averaged": torch.tensor(7)} | {f"module.{k}": v for k, v in weights.items()}


def of_a_whole_run(weights: dict[str, Any]) -> Any:
    """As Lightning keeps a module with other parts beside the model, and the optimiser's state."""
    inside = {f"vae.{k}": v for k, v in weights.items()} | {"loss.scale": torch.ones(3), "step": torch.tensor(9)}
    return {"state_dict": inside, "epoch": 3, "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}]}


@pytest.mark.parametrize(
    "kept",
    [
        averaged,
        of_a_whole_run,
        lambda w: {f"net.{k}": v for k, v in w.items()},
        lambda w: {"net": w, "step": 3},
        lambda w: {"model": {"state_dict": w}},
        lambda w: {"state_dict": w, "ema": {k: v + 1 for k, v in w.items()}},
        lambda w: {"first": w, "copy": {f"net.{k}": v.clone() for k, v in w.items()}},
    ],
)
def test_what_training_code_writes(kept: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    torch.save(kept(model.state_dict()), tmp_path / "model.pt")
    load_weights(other, tmp_path / "model.pt")
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


def test_two_states_that_differ_are_named() -> None:
    weights = nn.Linear(2, 2).state_dict()
    with pytest.raises(CheckpointError, match="holds 2 different states of this Linear, under 'a' and 'b'"):
        load_weights(nn.Linear(2, 2), {"a": weights, "b": {k: v + 1 for k, v in weights.items()}})
    with pytest.raises(CheckpointError, match="under 'encoder.' and 'decoder.'"):
        load_weights(
            nn.Linear(2, 2),
            {f"{p}.{k}": torch.full_like(v, len(p) + ord(p[0])) for p in ("encoder", "decoder") for k, v in weights.items()},
        )


def test_other_names_are_not_blamed_on_the_settings() -> None:
    with pytest.raises(
        CheckpointError, match="no name is the same. The model has weight, bias; the file has a.w, a.b"
    ) as error:
        load_weights(nn.Linear(2, 2), {"a.w": torch.ones(2), "a.b": torch.ones(2)})
    assert "settings" not in str(error.value)
    with pytest.raises(CheckpointError, match=r"weight has shape \(2, 3\) instead of \(2, 2\)"):
        load_weights(nn.Linear(2, 2), nn.Linear(3, 2).state_dict())


def test_a_compiled_model_is_filled_inside() -> None:
    model, other = NVAE(), NVAE()
    wrapped = torch.compile(other)
    assert load_weights(wrapped, model.state_dict()) is wrapped  # type: ignore[type-var]
    assert torch.equal(other.stem.weight, model.stem.weight)


def test_the_home_folder_in_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model, other = NVAE(), NVAE()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    load_weights(other, "~/model.pt")
    assert torch.equal(other.stem.weight, model.stem.weight)
    assert load_checkpoint(Path("~/model.pt")).keys() == model.state_dict().keys()


@pytest.mark.parametrize("path", ["", None, 3])
def test_what_is_no_path(path: Any) -> None:
    with pytest.raises(ArgumentError, match="path: expected a path, got"):
        load_checkpoint(path)
    with pytest.raises(ArgumentError, match="path: expected a path, got"):
        load_weights(NVAE(), path)


def test_what_was_allowed_before_is_allowed_after(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(a=1)}, tmp_path / "a.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        load_checkpoint(tmp_path / "a.pt")
        assert torch.load(tmp_path / "a.pt")["args"].a == 1


class Harmful:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("touched"),))


def test_unsafe_checkpoints_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "extra": Harmful()}, "bad.pt")
    with pytest.raises(
        CheckpointError, match="'bad.pt' asks for builtins.getattr, .*more than tensors and plain values"
    ) as error:
        load_checkpoint("bad.pt")
    assert "weights_only" not in str(error.value), "torch's advice to switch its safety off is not passed on"
    assert not Path("touched").exists()


def truncated(path: Path) -> Any:
    torch.save(NVAE().state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])
    return load_weights(NVAE(), path)


def another(path: Path) -> Any:
    torch.save(NVAE(residual=False, vanilla=True).state_dict(), path)
    return load_weights(NVAE(), path)


def no_weights(path: Path) -> Any:
    torch.save({"epoch": 3}, path)
    return load_weights(NVAE(), path)


def a_text(path: Path) -> Any:
    path.write_text("hello")
    return load_checkpoint(path)


def an_empty_file(path: Path) -> Any:
    path.write_bytes(b"")
    return load_checkpoint(path)


def a_folder(path: Path) -> Any:
    path.mkdir()
    (path / "weights.pt").write_bytes(b"")
    return load_checkpoint(path)


def a_zip(path: Path) -> Any:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "text")
    return load_checkpoint(path)


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (truncated, CheckpointError, "is not a whole checkpoint|is damaged"),
        (
            another,
            CheckpointError,
            "does not fit this NVAE: 27 of 181 names are there.*missing, such as dec_sampler.*not expected, such as",
        ),
        (no_weights, CheckpointError, "holds no state dict"),
        (a_zip, CheckpointError, "is not a whole checkpoint"),
        (load_checkpoint, FileNotFoundError, "No checkpoint at"),
        (a_text, CheckpointError, "is not a whole checkpoint of torch.save"),
        (an_empty_file, CheckpointError, "is not a whole checkpoint of torch.save .it is empty"),
        (a_folder, FileNotFoundError, "It is a folder; give one of the files in it: weights.pt"),
    ],
)
def test_bad_checkpoints(act: Callable[[Path], Any], error: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=re.compile(words)):
        act(tmp_path / "model.pt")


def shared(width: int, depth: int, inside: dict[str, Any]) -> dict[str, Any]:
    """Dicts of dicts with width^depth paths to the one inside."""
    for _ in range(depth):
        inside = {f"k{i}": inside for i in range(width)}
    return inside


def test_shared_dicts_are_met_once() -> None:
    weights = nn.Linear(2, 2).state_dict()
    load_weights(nn.Linear(2, 2), shared(300, 3, weights))
    with pytest.raises(CheckpointError, match="holds no state dict"):
        load_weights(nn.Linear(2, 2), shared(300, 4, weights))


def test_the_usual_place_goes_first_also_where_it_is_shared() -> None:
    model, weights = nn.Linear(2, 2), nn.Linear(2, 2).state_dict()
    other = {key: value + 1 for key, value in weights.items()}
    load_weights(model, {"a": weights, "ema": other, "state_dict": weights})
    assert torch.equal(model.weight, weights["weight"])


@pytest.mark.parametrize("names", [["x." * 20_000 + str(i) for i in range(50)], [f"a{i}.b{i}.c{i}.w" for i in range(5000)]])
def test_names_with_many_dots_and_many_beginnings(names: list[str]) -> None:
    """Neither time nor memory grows with the square of them."""
    before = time.process_time()
    with pytest.raises(CheckpointError, match="no name is the same") as error:
        load_weights(nn.Linear(2, 2), {name: torch.zeros(1) for name in names})
    assert time.process_time() - before < 3
    assert len(str(error.value)) < 800


def test_a_prefix_of_many_parts() -> None:
    model, weights = nn.Linear(2, 2), nn.Linear(2, 2).state_dict()
    load_weights(model, {"a.b.c.d.e.f.g.h." + key: value for key, value in weights.items()} | {"x.y": torch.zeros(1)})
    assert torch.equal(model.weight, weights["weight"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.to(torch.int64), "weight is of torch.int64 instead of torch.float32"),
        (lambda w: w > 0, "weight is of torch.bool instead of torch.float32"),
        (lambda w: w.to(torch.complex64), "weight is of torch.complex64 instead of torch.float32"),
        (lambda w: w.to_sparse(), "weight is no dense tensor with values"),
        (lambda w: w.to("meta"), "weight is no dense tensor with values"),
        (lambda w: w / 0, "weight is not finite"),
        (lambda w: w[:1].expand(10**9, 2), r"weight has shape \(1000000000, 2\) instead of \(2, 2\)"),
    ],
)
def test_values_of_another_kind(change: Callable[[torch.Tensor], torch.Tensor], words: str) -> None:
    model, weights = nn.Linear(2, 2), nn.Linear(2, 2).state_dict()
    before = model.weight.detach().clone()
    with pytest.raises(CheckpointError, match=words):
        load_weights(model, weights | {"weight": change(weights["weight"].abs() + 1)})
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_other_floating_point_numbers_are_converted(dtype: torch.dtype) -> None:
    model, weights = nn.Linear(2, 2), {key: value.to(dtype) for key, value in nn.Linear(2, 2).state_dict().items()}
    load_weights(model, weights)
    assert torch.equal(model.weight, weights["weight"].float())


def test_equal_values_of_two_dtypes_are_two_states() -> None:
    weights = nn.Linear(2, 2).state_dict()
    with pytest.raises(CheckpointError, match="holds 2 different states"):
        load_weights(nn.Linear(2, 2), {"a": weights, "b": {key: value.double() for key, value in weights.items()}})


def test_many_states_make_no_long_message() -> None:
    many = {f"k{i}": {key: value + i for key, value in nn.Linear(2, 2).state_dict().items()} for i in range(300)}
    with pytest.raises(
        CheckpointError, match="holds 300 different states .* 'k0' and 'k1' and 'k2' and 'k3' and others"
    ) as error:
        load_weights(nn.Linear(2, 2), many)
    assert len(str(error.value)) < 400
