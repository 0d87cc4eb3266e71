"""The life of a run: checkpoints, going on after a stop with the same weights bit by bit, and what cannot go on."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import X, make, make_for, recorded, seeded
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from energy_prior import ArgumentError, CheckpointError, DivergenceError, JointEBMPrior, LadderVAE, MLPEnergy, fit_elbo
from energy_prior.checkpoint import digest
from energy_prior.training import METHODS, Method
from energy_prior.training.distributed import Engine
from energy_prior.training.run_dir import RunFolder

SETTINGS: dict[str, Any] = {
    "iterations": 14,
    "batch_size": 16,
    "steps": 4,
    "posterior_steps": 4,
    "log_every": 4,
    "checkpoint_every": 5,
    "step_size": 0.3,  # tuning takes longer than such a run
    "progress": False,
}


def everything(prior: JointEBMPrior) -> dict[str, Tensor]:
    assert isinstance(prior.generator, nn.Module)
    return {**prior.state_dict(), **{f"g.{k}": v for k, v in prior.generator.state_dict().items()}}


QUICK: list[Any] = [("nce", None)]


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


@pytest.mark.parametrize(
    ("method", "persistent"),
    [pytest.param(m, p, marks=pytest.mark.slow) for m in METHODS for p in (0, None) if (m, p) not in QUICK] + QUICK,
)
def test_a_stopped_run_goes_on_bit_by_bit(
    method: Method, persistent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_for(method)
    settings: dict[str, Any] = SETTINGS | {"persistent": persistent, "accumulate": 2, "step_size": None}
    expected = whole.fit(X, method, **settings, run_dir=tmp_path / "a", rng=seeded())
    assert expected.resumed_at is None
    with monkeypatch.context() as patch:
        killed_after(2, patch)
        with pytest.raises(Killed):
            make_for(method).fit(X, method, **settings, run_dir=tmp_path / "b", rng=seeded())
    torch.rand(7)  # the stream of the new process is elsewhere
    again = make_for(method)
    result = again.fit(X, method, **settings, run_dir=tmp_path / "b", rng=seeded())
    assert result.resumed_at == 10
    assert result.history == expected.history
    for name, value in everything(whole).items():
        assert torch.equal(everything(again)[name], value), name


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first, again = make(), make()
    first.fit(X, **SETTINGS, run_dir=tmp_path, rng=seeded())
    assert again.fit(X, **SETTINGS, run_dir=tmp_path, rng=seeded()).resumed_at == 14
    for name, value in everything(first).items():
        assert torch.equal(everything(again)[name], value), name


@pytest.mark.parametrize("validation", [True, False])
def test_the_elbo_goes_on_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, validation: bool) -> None:
    settings: dict[str, Any] = {"iterations": 14, "batch_size": 16, "log_every": 3, "checkpoint_every": 5, "kl_warmup": 2}
    settings |= {"progress": False, "validation": X[:8] if validation else None}

    def run(folder: str) -> tuple[Any, Any]:
        vae = make().generator
        assert isinstance(vae, LadderVAE)
        return vae, fit_elbo(vae, X, **settings, run_dir=tmp_path / folder, rng=seeded())

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


@pytest.mark.slow
def test_another_seed_is_another_run(tmp_path: Path) -> None:
    """Where the caller gives one; a script without any goes on."""
    make().fit(X, **SETTINGS, run_dir=tmp_path / "a", rng=seeded())
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
    ("generator", lambda: make(seed=3), {}, X, "generator was"),
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
    with pytest.raises(CheckpointError, match="is truncated, damaged or .*Delete the folder checkpoint-00000014 to go on"):
        make().fit(X, **SETTINGS, run_dir=tmp_path)
    file.unlink()
    file.parent.rmdir()
    assert make().fit(X, **SETTINGS, run_dir=tmp_path).resumed_at == 10


def test_a_flipped_bit_is_told(tmp_path: Path) -> None:
    make().fit(X, **SETTINGS, run_dir=tmp_path)
    file = tmp_path / "checkpoint-00000014" / "rank0.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    prior = make()
    before = {name: value.clone() for name, value in everything(prior).items()}
    with pytest.raises(
        CheckpointError, match="rank0.safetensors' is damaged: .* by its digest. Delete the folder checkpoint-0"
    ):
        prior.fit(X, **SETTINGS, run_dir=tmp_path)
    assert all(torch.equal(before[name], value) for name, value in everything(prior).items())


def signed(file: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """Changes a checkpoint so that its digest is right."""
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    document = json.loads(header["config"])
    change(document, tensors)
    text = json.dumps(document)
    save_file(tensors, file, header | {"config": text, "digest": digest(tensors, text)})


def at(*place: str, of: str = "state") -> Callable[[Any], Any]:
    """Where something is in the document, which says of everything what it is."""

    def found(document: Any) -> Any:
        here = document[of]
        for key in place:
            here = next(iter(here.values()))[int(key) if key.isdecimal() else key]
        return here

    return found


def value_of(*place: str, becomes: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], object]:
    def change(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        here = at(*place)(document)
        here.clear()
        here.update(becomes)

    return change


def tensor_of(name: str, becomes: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any], dict[str, Tensor]], object]:
    def change(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[name] = becomes(tensors[name])

    return change


DEEP: dict[str, Any] = {"list": []}
for _ in range(300):
    DEEP = {"list": [DEEP]}

DAMAGES: list[tuple[Any, str]] = [
    (lambda d, t: d.clear(), "it says that it was written after iteration None"),
    (lambda d, t: d.update(identity=3), "it does not say of which run it is"),
    (lambda d, t: d.update(iteration=13), "it says that it was written after iteration 13"),
    (lambda d, t: d.update(iteration=14.0), "it says that it was written after iteration 14.0"),
    (lambda d, t: d.update(iteration=1e400), "it says that it was written after iteration inf"),
    (lambda d, t: d.update(state=None), "its state cannot be put together .None is no part of a state"),
    (lambda d, t: d.update(state={}), "its state cannot be put together"),
    (lambda d, t: d.update(state={"list": [], "dict": {}}), "its state cannot be put together"),
    (lambda d, t: d.update(state={"dict": []}), "its state cannot be put together"),
    (lambda d, t: d.update(state={"list": 3}), "its state cannot be put together"),
    (lambda d, t: d.update(state={"value": [1]}), "its state cannot be put together"),
    (lambda d, t: d.update(state={"tensor": ["x"]}), "its state cannot be put together"),
    (lambda d, t: d.update(state={"tensor": "x"}), "its state cannot be put together"),
    (lambda d, t: d.update(state=DEEP), "state is a list of 1 instead of a dict"),
    (lambda d, t: d["state"]["dict"].pop("weights"), "state lacks weights"),
    (lambda d, t: d["state"]["dict"].update(more={"value": 1}), "state has more, which is not expected"),
    (lambda d, t: at("weights")(d)["list"].pop(), "state/weights is a list of 11 instead of a list of 12"),
    (lambda d, t: at("history")(d)["list"].clear(), "state/history is a list of 0 instead of a list of at least 1"),
    (value_of("data", "taken", becomes={"value": 10**9}), "state/data/taken is 1000000000 instead of a whole number in its"),
    (value_of("task", "chains", "step_size", becomes={"value": 0}), "state/task/chains/step_size is 0 instead of a finite"),
    (value_of("task", "chains", "backend", becomes={"value": "x"}), "state/task/chains/backend is 'x' instead of"),
    (value_of("task", "stage", becomes={"value": 3}), "state/task/stage is 3 instead of a whole number in its range"),
    (value_of("task", "warned", becomes={"dict": {"a": {"value": 1}}}), "state/task/warned/a is 1 instead of text"),
    (value_of("task", "chains", becomes={"dict": {}}), "state/task/chains lacks step_size"),
    (tensor_of("/weights/0", lambda t: t * torch.nan), "state/weights/0 is not finite"),
    (tensor_of("/weights/0", lambda t: t[:1, :1].contiguous()), r"state/weights/0 is a tensor .* shape \(1, 1\) instead of"),
    (tensor_of("/weights/0", lambda t: t.double()), "state/weights/0 is a tensor of torch.float64"),
    (tensor_of("/optimizer/0/exp_avg", lambda t: t / 0), "state/optimizer/0/exp_avg is not finite"),
    (tensor_of("/optimizer/0/step", lambda t: t * 0 - 1), "state/optimizer/0/step is a tensor .* instead of a number of steps"),
    (tensor_of("/task/good/0", lambda t: t.flatten()), "state/task/good/0 is a tensor"),
    (tensor_of("/task/chains/persistent/0", lambda t: t[:-1].clone()), "persistent is a list of 2 instead of latents of every"),
    (tensor_of("/task/chains/persistent/0", lambda t: t * torch.nan), "persistent is a list of 2 instead of latents of every"),
    (tensor_of("/task/chains/persistent/0", lambda t: t[:, :1].clone()), "persistent is a list of 2 instead of latents of"),
    (tensor_of("/random/cpu", lambda t: t[:-1].clone()), "state/random/cpu is a tensor .* the state of a random stream"),
    (tensor_of("/data/pass_start", lambda t: t | 255), "state/data/pass_start is a tensor .* the state of a random stream"),
]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a run by a rule whose state has everything."""
    folder = tmp_path_factory.mktemp("run")
    make().fit(X, "multi_stage_nce", **SETTINGS, run_dir=folder, rng=seeded())
    return folder


@pytest.mark.parametrize(("change", "words"), DAMAGES, ids=range(len(DAMAGES)))
def test_a_state_that_is_not_of_this_run(change: Any, words: str, stopped: Path, tmp_path: Path) -> None:
    """Nothing is taken from it, and the error says where it differs."""
    shutil.copytree(stopped, tmp_path / "run")
    signed(tmp_path / "run" / "checkpoint-00000014" / "rank0.safetensors", change)
    prior = make()
    before = {name: value.clone() for name, value in everything(prior).items()}
    with pytest.raises(CheckpointError, match=f"rank0.safetensors' is damaged.*{words}.*Delete the folder") as error:
        prior.fit(X, "multi_stage_nce", **SETTINGS, run_dir=tmp_path / "run", rng=seeded())
    assert len(str(error.value)) < 1000
    assert all(torch.equal(before[name], value) for name, value in everything(prior).items())


def test_a_setting_that_there_was(tmp_path: Path) -> None:
    """A run that an older version began with a setting that is gone does not go on without it."""
    make().fit(X, "nce", **SETTINGS, run_dir=tmp_path, rng=seeded())

    def older(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        document["identity"]["energy_penalty"] = 0.05

    file = tmp_path / "checkpoint-00000014" / "rank0.safetensors"
    signed(file, older)
    with pytest.raises(ArgumentError, match="cannot go on like this: energy_penalty was 0.05, now None"):
        make().fit(X, "nce", **SETTINGS, run_dir=tmp_path, rng=seeded())


def test_a_state_that_is_not_of_these_chains(tmp_path: Path) -> None:
    """The last checkpoint of "two_stage" has chains that persist."""
    make().fit(X, "two_stage", **SETTINGS, run_dir=tmp_path, rng=seeded())
    file = tmp_path / "checkpoint-00000014" / "rank0.safetensors"
    content = file.read_bytes()
    signed(file, tensor_of("/task/chains/persistent/1", lambda t: t.double()))
    with pytest.raises(CheckpointError, match="is damaged, or not of this run: state/task/"):
        make().fit(X, "two_stage", **SETTINGS, run_dir=tmp_path, rng=seeded())
    file.write_bytes(content)
    assert make().fit(X, "two_stage", **SETTINGS, run_dir=tmp_path, rng=seeded()).resumed_at == 14


def test_a_state_of_another_elbo(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"iterations": 2, "batch_size": 16, "validation": X[:8], "progress": False, "run_dir": tmp_path}
    fit_elbo(make().generator, X, **settings)
    file = tmp_path / "checkpoint-00000002" / "rank0.safetensors"
    content = file.read_bytes()
    name = next(iter(dict(make().generator.named_parameters())))  # type: ignore[attr-defined]
    for change, words in (
        (tensor_of(f"/task/best/weights/{name}", lambda t: t * torch.nan), f"state/task/best/weights/{name} is not finite"),
        (value_of("task", "best", "elbo", becomes={"value": "x"}), "state/task/best/elbo is 'x' instead of a number"),
        (value_of("task", "skipped", becomes={"value": -1}), "state/task/skipped is -1"),
    ):
        signed(file, change)
        vae = make().generator
        before = {key: value.clone() for key, value in vae.state_dict().items()}  # type: ignore[attr-defined]
        with pytest.raises(CheckpointError, match=f"{words}.*Name another run_dir"):
            fit_elbo(vae, X, **settings)
        assert all(torch.equal(before[key], value) for key, value in vae.state_dict().items())  # type: ignore[attr-defined]
        file.write_bytes(content)
    assert fit_elbo(make().generator, X, **settings).resumed_at == 2


def test_what_a_file_says_of_its_run_is_shortened(tmp_path: Path) -> None:
    make().fit(X, **SETTINGS, run_dir=tmp_path)
    file = tmp_path / "checkpoint-00000014" / "rank0.safetensors"
    signed(file, lambda d, t: d["identity"].update(iterations="x" * 10_000))
    with pytest.raises(ArgumentError, match="cannot go on like this: iterations was 'xxx") as error:
        make().fit(X, **SETTINGS, run_dir=tmp_path)
    assert len(str(error.value)) < 600


def test_a_checkpoint_without_its_own_file(tmp_path: Path) -> None:
    make().fit(X, **SETTINGS, run_dir=tmp_path)
    folder = tmp_path / "checkpoint-00000014"
    (folder / "rank0.safetensors").rename(folder / "rank1.safetensors")
    with pytest.raises(CheckpointError, match="checkpoint-00000014' lacks the file of a process, rank0.safetensors"):
        make().fit(X, **SETTINGS, run_dir=tmp_path)
    (folder / "rank1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="checkpoint-00000014' lacks the file of a process, rank0.safetensors"):
        make().fit(X, **SETTINGS, run_dir=tmp_path)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    prior = make()
    prior.fit(X, **SETTINGS, run_dir=tmp_path)
    prior.save(tmp_path / "checkpoint-00000014" / "rank0.safetensors")
    with pytest.raises(CheckpointError, match="one that a run with a run_dir wrote. It has the format 'energy-prior'.*Delete"):
        make().fit(X, **SETTINGS, run_dir=tmp_path)


def test_names_of_compiled_parts(tmp_path: Path) -> None:
    """A state may have names with what torch.compile puts into them."""
    folder = RunFolder(tmp_path, Engine(), {})
    state = {"a": {"net._orig_mod.weight": torch.ones(2)}}
    folder.save(1, state)
    found = folder.load(torch.device("cpu"), state)
    assert found is not None
    assert torch.equal(found[1]["a"]["net._orig_mod.weight"], torch.ones(2))


def test_a_loader_that_has_become_shorter(tmp_path: Path) -> None:
    class Loader:
        def __init__(self, n: int) -> None:
            self.n = n

        def __iter__(self) -> Iterator[Tensor]:
            yield from X.split(16)[: self.n]

    make().fit(Loader(4), iterations=3, batch_size=16, progress=False, run_dir=tmp_path, step_size=0.3)
    with pytest.raises(ArgumentError, match="data: the run had taken 3 batches from it .* and the iterable now gives 2"):
        make().fit(Loader(2), iterations=3, batch_size=16, progress=False, run_dir=tmp_path, step_size=0.3)


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
            make().fit(X, **SETTINGS, run_dir=tmp_path, rng=seeded())
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000005"]
    assert make().fit(X, **SETTINGS, run_dir=tmp_path, rng=seeded()).resumed_at == 5


def test_what_a_kill_left_half_written_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-00000005").mkdir(parents=True)
    (tmp_path / ".checkpoint-00000005" / "rank0.safetensors").write_bytes(b"half")
    assert make().fit(X, **SETTINGS, run_dir=tmp_path).resumed_at is None
    assert not (tmp_path / ".checkpoint-00000005").exists()


def test_run_dir_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="run_dir: expected a folder, but .* is a file"):
        make().fit(X, **SETTINGS, run_dir=tmp_path / "file")
    with pytest.raises(ArgumentError, match="run_dir: expected a path, got int"):
        make().fit(X, **SETTINGS, run_dir=3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="run_dir: expected a folder, as tensorboard or sample_every"):
        make().fit(X, **SETTINGS, sample_every=2)


@pytest.mark.slow
def test_tensorboard_and_sample_grids_do_not_change_a_run(tmp_path: Path) -> None:
    plain, shown = make(), make()
    plain.fit(X, **SETTINGS, rng=seeded(), run_dir=tmp_path / "a")
    shown.fit(X, **SETTINGS, rng=seeded(), run_dir=tmp_path / "b", sample_every=5, tensorboard=True)
    for name, value in everything(plain).items():
        assert torch.equal(everything(shown)[name], value), name
    assert sorted(p.name for p in (tmp_path / "b" / "samples").iterdir()) == ["00000005.png", "00000010.png"]
    assert any((tmp_path / "b" / "tensorboard").glob("events.*"))


def other_activation(prior: JointEBMPrior) -> None:
    for f in prior.energies:
        f.net[2] = nn.Tanh()  # type: ignore[union-attr,operator]


def other_likelihood(prior: JointEBMPrior) -> None:
    prior.generator.pixels.name = "discretized_logistic"  # type: ignore[attr-defined]


def fixed_sigma(prior: JointEBMPrior) -> None:
    prior.generator.pixels.log_sigma.requires_grad_(False)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_activation, r"energies.0.net.2 was 'SiLU\(\)', now 'Tanh\(\)'"),
        (other_likelihood, "generator.pixels was 'PixelLikelihood.gaussian"),
        (fixed_sigma, r"generator.pixels.log_sigma was \[\[\], 'torch.float32', True\]"),
    ],
)
def test_a_run_of_another_model_cannot_go_on(change: Any, words: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"iterations": 4, "batch_size": 16, "steps": 3, "progress": False, "run_dir": tmp_path}
    make().fit(X, "variational", **settings)
    prior = make()
    change(prior)
    with pytest.raises(ArgumentError, match=f"cannot go on like this: .*{words}"):
        prior.fit(X, "variational", **settings)
    assert not prior.trained_jointly, "nothing half-done"


def test_a_generator_of_another_fixed_scale_cannot_go_on(tmp_path: Path) -> None:
    for sigma in (0.1, 0.5):
        vae = LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8, sigma=sigma)
        if sigma == 0.5:
            with pytest.raises(ArgumentError, match="parameters that do not learn. was"):
                fit_elbo(vae, X, iterations=4, progress=False, run_dir=tmp_path)
        else:
            fit_elbo(vae, X, iterations=4, progress=False, run_dir=tmp_path)


def test_a_loader_of_another_length_cannot_go_on(tmp_path: Path) -> None:
    def loader(n: int) -> Any:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X[:n]), batch_size=16)

    make().fit(loader(64), iterations=4, progress=False, run_dir=tmp_path)
    with pytest.raises(ArgumentError, match="data was 'DataLoader 4 64', now 'DataLoader 3 48'"):
        make().fit(loader(48), iterations=4, progress=False, run_dir=tmp_path)


def test_one_run_at_a_time_in_a_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path, Engine(), {}).held(), pytest.raises(ArgumentError, match="another run is writing to"):
        make().fit(X, iterations=2, batch_size=16, progress=False, run_dir=tmp_path)
    make().fit(X, iterations=2, batch_size=16, progress=False, run_dir=tmp_path)


def test_paths_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make().fit(X, **SETTINGS, run_dir="~/run")
    assert (tmp_path / "run" / "checkpoint-00000014").is_dir()
    assert make().fit(X, **SETTINGS, run_dir=tmp_path / "run").resumed_at == 14
    fit_elbo(make().generator, X, iterations=2, batch_size=16, progress=False, run_dir="~/elbo")
    assert (tmp_path / "elbo" / "checkpoint-00000002").is_dir()
    for run in (lambda: make().fit(X, **SETTINGS, run_dir=""), lambda: fit_elbo(make().generator, X, run_dir="")):
        with pytest.raises(ArgumentError, match="run_dir: expected a path, got an empty text"):
            run()


def test_last_good_weights_go_to_the_users_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    def explodes(*_: Any, **__: Any) -> None:
        raise DivergenceError("as if", step=3)

    monkeypatch.setattr("energy_prior.training.diagnostics.check_sound", explodes)
    with pytest.raises(DivergenceError, match=f"saved as '{tmp_path / 'run' / 'last_good.safetensors'}' too"):
        make().fit(X, **SETTINGS, run_dir="~/run")
    assert (tmp_path / "run" / "last_good.safetensors").is_file()
