"""The life of a run: checkpoints, going on after a stop with the same weights bit by bit, and what cannot go on."""

from __future__ import annotations

import contextlib
import errno
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from energy_prior import (
    ArgumentError,
    CheckpointError,
    DivergenceError,
    JointEBMPrior,
    LadderVAE,
    MLPEnergy,
    TrainingWarning,
    fit_elbo,
)
from energy_prior.training import METHODS, FitConfig, Method
from energy_prior.training.run_dir import RunFolder

X = torch.rand(48, 1, 4, 4, generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, Any] = {
    "iterations": 14,
    "batch_size": 16,
    "steps": 4,
    "posterior_steps": 4,
    "log_every": 4,
    "checkpoint_every": 5,
    "progress": False,
}


def make(seed: int = 0) -> JointEBMPrior:
    torch.manual_seed(seed)
    return JointEBMPrior(LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8))


def everything(prior: JointEBMPrior) -> dict[str, Tensor]:
    assert isinstance(prior.generator, nn.Module)
    return {**prior.state_dict(), **{f"g.{k}": v for k, v in prior.generator.state_dict().items()}}


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """The messages of every `TrainingWarning` inside."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TrainingWarning)
        try:
            yield said
        finally:
            said.extend(str(w.message) for w in caught)


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs but `finally`."""


def killed_after(saves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    count = iter(range(100))
    original = RunFolder.save

    def save(self: RunFolder, iteration: int, state: dict[str, Any]) -> None:
        original(self, iteration, state)
        if next(count) + 1 == saves:
            raise Killed

    monkeypatch.setattr(RunFolder, "save", save)


@pytest.mark.parametrize("persistent", [0, None])
@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_goes_on_bit_by_bit(
    method: Method, persistent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make()
    settings: dict[str, Any] = SETTINGS | {"persistent": persistent, "accumulate": 2}
    expected = whole.fit(X, method, **settings, run_dir=tmp_path / "a", rng=torch.Generator().manual_seed(1))
    assert expected.resumed_at is None
    with monkeypatch.context() as patch:
        killed_after(2, patch)
        with pytest.raises(Killed):
            make().fit(X, method, **settings, run_dir=tmp_path / "b", rng=torch.Generator().manual_seed(1))
    torch.rand(7)  # the stream of the new process is elsewhere
    again = make()
    result = again.fit(X, method, **settings, run_dir=tmp_path / "b", rng=torch.Generator().manual_seed(1))
    assert result.resumed_at == 10
    assert result.history == expected.history
    assert result.clipped == expected.clipped
    for name, value in everything(whole).items():
        assert torch.equal(everything(again)[name], value), name


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first, again = make(), make()
    first.fit(X, **SETTINGS, run_dir=tmp_path, rng=torch.Generator().manual_seed(1))
    assert again.fit(X, **SETTINGS, run_dir=tmp_path, rng=torch.Generator().manual_seed(1)).resumed_at == 14
    for name, value in everything(first).items():
        assert torch.equal(everything(again)[name], value), name


@pytest.mark.parametrize("validation", [True, False])
def test_the_elbo_goes_on_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, validation: bool) -> None:
    settings: dict[str, Any] = {"iterations": 14, "batch_size": 16, "log_every": 3, "checkpoint_every": 5, "kl_warmup": 2}
    settings |= {"progress": False, "validation": X[:8] if validation else None}

    def run(folder: str) -> tuple[Any, Any]:
        vae = make().generator
        assert isinstance(vae, LadderVAE)
        return vae, fit_elbo(vae, X, **settings, run_dir=tmp_path / folder, rng=torch.Generator().manual_seed(1))

    whole, expected = run("a")
    with monkeypatch.context() as patch:
        killed_after(2, patch)
        with pytest.raises(Killed):
            run("b")
    again, result = run("b")
    assert result.resumed_at == 10
    assert (result.history, result.validation_elbo) == (expected.history, expected.validation_elbo)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    make().fit(X, **SETTINGS, run_dir=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-00000010", "checkpoint-00000014"]


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    """Where the caller gives one; a script without any goes on."""
    make().fit(X, **SETTINGS, run_dir=tmp_path / "a", rng=torch.Generator().manual_seed(1))
    with pytest.raises(ArgumentError, match="cannot go on like this: seed was"):
        make().fit(X, **SETTINGS, run_dir=tmp_path / "a", rng=torch.Generator().manual_seed(2))
    make().fit(X, **SETTINGS, run_dir=tmp_path / "b")
    assert make().fit(X, **SETTINGS, run_dir=tmp_path / "b").resumed_at == 14


def test_numbers_of_numpy(tmp_path: Path) -> None:
    make().fit(X, **(SETTINGS | {"iterations": np.int64(14), "learning_rate": np.float32(1e-3)}), run_dir=tmp_path)
    assert (tmp_path / "checkpoint-00000014").is_dir()


def test_samples_that_diverge_do_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverges(self: JointEBMPrior, n: int, **_: Any) -> Tensor:
        raise DivergenceError("The chain diverged.", layer=1, step=3)

    monkeypatch.setattr(JointEBMPrior, "sample", diverges)
    with recorded() as said:
        make().fit(X, **SETTINGS, sample_every=5, run_dir=tmp_path)
    assert any("No samples drawn after iteration 5: The chain diverged" in message for message in said)


def test_a_failed_run_forgets_the_calibration_of_other_energies() -> None:
    prior = JointEBMPrior(make().generator, [Steep(), Steep()])
    prior.fit(X, **SETTINGS)
    prior.calibration.fill_(1.0)
    with recorded(), pytest.raises(DivergenceError):
        prior.fit(X, "two_stage", **WILD, steps=4, learning_rate=0.05, max_energy=20.0)
    assert bool((prior.calibration == 0).all())


CHANGES: list[tuple[str, Callable[[], JointEBMPrior], dict[str, Any], Tensor, str]] = [
    (
        "saturation",
        lambda: JointEBMPrior(make().generator, [MLPEnergy((3,), saturation=5.0), MLPEnergy((2,))]),
        {},
        X,
        r"energies.*saturation=100.*now .*saturation=5",
    ),
    ("setting", make, {"learning_rate": 0.5}, X, "learning_rate was 0.003, now 0.5"),
    ("method", make, {"method": "two_stage"}, X, "task was"),
    ("data", make, {}, 0.9 * X, "data was"),
    ("generator", lambda: make(3), {}, X, "generator was"),
    ("space", lambda: JointEBMPrior(make().generator, space="latent"), {}, X, "space was 'noise', now 'latent'"),
    (
        "energies",
        lambda: JointEBMPrior(
            make().generator, [nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))]
        ),
        {},
        X,
        "energies.*was",
    ),
]


@pytest.mark.parametrize(("what", "build", "change", "data", "message"), CHANGES, ids=[c[0] for c in CHANGES])
def test_another_run_cannot_go_on(
    what: str, build: Callable[[], JointEBMPrior], change: dict[str, Any], data: Tensor, message: str, tmp_path: Path
) -> None:
    make().fit(X, **SETTINGS, run_dir=tmp_path)
    other = build()
    before = {name: value.clone() for name, value in everything(other).items()}
    with pytest.raises(ArgumentError, match=f"run_dir: .*cannot go on like this: .*{message}"):
        other.fit(data, **(SETTINGS | change), run_dir=tmp_path)
    assert all(torch.equal(before[name], value) for name, value in everything(other).items())


def test_settings_that_only_show_a_run_may_change(tmp_path: Path) -> None:
    make().fit(X, **SETTINGS, run_dir=tmp_path)
    assert make().fit(X, **SETTINGS, sample_every=4, run_dir=tmp_path).resumed_at == 14


def test_a_truncated_checkpoint_is_named_and_the_one_before_is_whole(tmp_path: Path) -> None:
    make().fit(X, **SETTINGS, run_dir=tmp_path)
    file = tmp_path / "checkpoint-00000014" / "rank0.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated or damaged .*Delete the folder checkpoint-00000014 to go on"):
        make().fit(X, **SETTINGS, run_dir=tmp_path)
    file.unlink()
    file.parent.rmdir()
    assert make().fit(X, **SETTINGS, run_dir=tmp_path).resumed_at == 10


def test_another_number_of_processes(tmp_path: Path) -> None:
    make().fit(X, **SETTINGS, run_dir=tmp_path)
    (tmp_path / "checkpoint-00000014" / "rank1.safetensors").write_bytes(b"")
    with pytest.raises(ArgumentError, match="has 2 processes, and can only go on with as many; got 1"):
        make().fit(X, **SETTINGS, run_dir=tmp_path)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))
    original = os.fsync

    def fsync(file: int) -> None:
        if next(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left on device: the checkpoint .* could not be written.*make room"):
            make().fit(X, **SETTINGS, run_dir=tmp_path, rng=torch.Generator().manual_seed(1))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000005"]
    assert make().fit(X, **SETTINGS, run_dir=tmp_path, rng=torch.Generator().manual_seed(1)).resumed_at == 5


def test_what_a_kill_left_half_written_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-00000005").mkdir(parents=True)
    (tmp_path / ".checkpoint-00000005" / "rank0.safetensors").write_bytes(b"half")
    assert make().fit(X, **SETTINGS, run_dir=tmp_path).resumed_at is None
    assert not (tmp_path / ".checkpoint-00000005").exists()


def test_run_dir_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="run_dir: expected a folder, but .* is a file"):
        make().fit(X, **SETTINGS, run_dir=tmp_path / "file")
    with pytest.raises(ArgumentError, match="run_dir: expected a folder's path, got int"):
        make().fit(X, **SETTINGS, run_dir=3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="run_dir: expected a folder, as tensorboard or sample_every"):
        make().fit(X, **SETTINGS, sample_every=2)


def test_tensorboard_and_sample_grids_do_not_change_a_run(tmp_path: Path) -> None:
    plain, shown = make(), make()
    plain.fit(X, **SETTINGS, rng=torch.Generator().manual_seed(1), run_dir=tmp_path / "a")
    shown.fit(X, **SETTINGS, rng=torch.Generator().manual_seed(1), run_dir=tmp_path / "b", sample_every=5, tensorboard=True)
    for name, value in everything(plain).items():
        assert torch.equal(everything(shown)[name], value), name
    assert sorted(p.name for p in (tmp_path / "b" / "samples").iterdir()) == ["00000005.png", "00000010.png"]
    assert any((tmp_path / "b" / "tensorboard").glob("events.*"))


WILD: dict[str, Any] = {
    "iterations": 400,
    "log_every": 1,
    "energy_penalty": 0.0,
    "energy_bound": 1e9,
    "persistent": 0,
    "progress": False,
}
"""Without what holds energies back."""


class Steep(nn.Module):
    """f(z) = w · |z|² with a w that learns far too fast under the rates below."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        return 300 * self.w * z.square().sum(1)


def test_divergence_keeps_the_last_good_prior_in_the_folder(tmp_path: Path) -> None:
    prior = JointEBMPrior(make().generator, [Steep(), Steep()])
    with (
        recorded() as said,
        pytest.raises(DivergenceError, match=r"f_\d, the energy of layer \d.*saved as .*last_good") as caught,
    ):
        prior.fit(X, "two_stage", **WILD, steps=4, learning_rate=0.03, max_energy=100.0, run_dir=tmp_path)
    assert any("an energy has reached" in message for message in said)
    assert caught.value.layer in (1, 2)
    assert caught.value.step is not None
    kept = JointEBMPrior.load(tmp_path / "last_good.safetensors", prior.generator, [Steep(), Steep()])
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), prior.parameters()))
    assert all(bool(torch.isfinite(p).all()) for p in kept.parameters())


def test_a_fixed_step_that_is_too_large_is_named_as_the_cause() -> None:
    prior = JointEBMPrior(make().generator, [Steep(), Steep()])
    with recorded() as said, pytest.raises(DivergenceError, match="fixed step_size = 5"):
        prior.fit(X, "two_stage", **WILD, step_size=5.0, steps=5, learning_rate=1e-3, max_energy=500.0)
    assert any("Leave step_size out" in message for message in said)


def test_warnings_come_once_and_stay_in_the_result() -> None:
    prior = make()
    with recorded() as said:
        result = prior.fit(X, "two_stage", **(SETTINGS | {"step_size": 50.0, "log_every": 1}))
    assert sum("MALA would accept only" in message for message in said) == 1
    assert sum("the drift was cut in" in message for message in said) == 1
    assert result.warnings == said


def test_joint_training_belongs_to_the_prior_and_its_checkpoint(tmp_path: Path) -> None:
    prior = make()
    assert not any(name.startswith("generator") for name in prior.state_dict())
    before = [p.detach().clone() for p in prior.generator.parameters()]  # type: ignore[attr-defined]
    prior.fit(X, "variational", **SETTINGS, generator_learning_rate=1e-2)
    assert any(not torch.equal(a, b) for a, b in zip(before, prior.generator.parameters()))  # type: ignore[attr-defined]
    assert {f"generator.{name}" for name, _ in prior.generator.named_parameters()} <= set(prior.state_dict())  # type: ignore[attr-defined]
    assert len(list(prior.parameters())) == len(list(prior.energies.parameters())) + len(before)
    prior.save(tmp_path / "p")
    again = JointEBMPrior.load(tmp_path / "p", make(9).generator)
    rngs = [torch.Generator().manual_seed(2) for _ in range(2)]
    assert torch.equal(prior.sample(3, rng=rngs[0]), again.sample(3, rng=rngs[1]))
    assert again.trained_jointly
    again.double()
    assert again.sample(2).dtype == torch.float64
    with pytest.raises(CheckpointError, match="generator.*has shape"):
        JointEBMPrior.load(tmp_path / "p", LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=9))


def test_joint_training_that_diverges_is_kept_as_well(tmp_path: Path) -> None:
    """Also where the prior was fitted on the generator as it was before."""
    prior = JointEBMPrior(make().generator, [Steep(), Steep()])
    prior.fit(X, **SETTINGS)
    with recorded(), pytest.raises(DivergenceError, match="last_good"):
        prior.fit(X, "variational", **WILD, steps=4, learning_rate=0.05, max_energy=2.0, run_dir=tmp_path)
    kept = JointEBMPrior.load(tmp_path / "last_good.safetensors", make(4).generator, [Steep(), Steep()])
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), prior.parameters()))


def test_resumable_settings_leave_out_what_only_shows() -> None:
    assert "progress" not in FitConfig().resumable()
    assert "learning_rate" in FitConfig().resumable()
