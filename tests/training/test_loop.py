"""What one update, one look and one stage of a run do: each safeguard by itself, so that none can go missing unseen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ladders import QuadraticEnergy
from torch import Tensor, nn

from energy_prior import ArgumentError, DivergenceError, JointEBMPrior, LadderVAE, MLPEnergy, fit_elbo
from energy_prior.training import ElboConfig, FitConfig
from energy_prior.training.batches import Batches
from energy_prior.training.chains import TrainingChains
from energy_prior.training.config import RunConfig
from energy_prior.training.diagnostics import check_sound, entry, forebodings
from energy_prior.training.distributed import Engine
from energy_prior.training.elbo import _ElboTask, elbo
from energy_prior.training.loop import Group, run_loop
from energy_prior.training.rules import FitTask
from energy_prior.training.run_dir import RunFolder

X = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def make(energies: list[nn.Module] | None = None) -> JointEBMPrior:
    torch.manual_seed(0)
    return JointEBMPrior(LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8), energies)


def task_of(prior: JointEBMPrior, method: Any, **settings: Any) -> FitTask:
    options: dict[str, Any] = {"batch_size": 16, "steps": 3} | settings
    config = FitConfig(**options).for_method(method)
    batches = Batches(X, config, prior.generator, X.shape[1:], X)
    return FitTask(prior, batches, method, config, Engine())


# ------------------------------------------------------------------------------------------------------------- one update


class Line:
    """A task whose loss is slope · mean(x) · w: its gradient is known."""

    name = "line"

    def __init__(self, slope: float, clip: float = 1e9, decay: float = 0.0) -> None:
        self.weight, self.slope = nn.Parameter(torch.tensor([2.0])), slope
        self.groups = [Group("line", [self.weight], 0.1, decay, clip)]

    def loss(self, x: Tensor, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.slope * x.mean() * self.weight.sum()
        return loss, {"loss": loss}

    def look(self, first: int, figures: dict[str, Tensor]) -> dict[str, float]:
        return {"gradient_norm_line": float(figures["gradient_norm_line"][-1])}

    def begin(self) -> None: ...
    def updated(self, iteration: int) -> None: ...
    def finish(self) -> None: ...
    def picture(self) -> None: ...
    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None: ...


def gradients(task: Line, config: RunConfig, batches: Any, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the optimiser was given in each update."""
    seen: list[float] = []
    original = torch.optim.AdamW.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert task.weight.grad is not None
        seen.append(float(task.weight.grad))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run_loop(task, batches, config, Engine())  # type: ignore[arg-type]
    return seen


def numbers(*values: float) -> Iterator[Tensor]:
    yield from (torch.tensor([v]) for v in values)


def test_gradients_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(iterations=2, progress=False, log_every=1)
    assert gradients(Line(100.0, clip=3.0), config, numbers(1.0, 0.01), monkeypatch) == pytest.approx([3.0, 1.0])


def test_accumulated_gradients_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(iterations=2, accumulate=2, progress=False)
    assert gradients(Line(1.0), config, numbers(1.0, 3.0, 5.0, 9.0), monkeypatch) == pytest.approx([2.0, 7.0])


def test_weights_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Line(0.0, decay=0.5)
    gradients(task, RunConfig(iterations=1, warmup=0, progress=False), numbers(1.0), monkeypatch)
    assert float(task.weight.detach()) == pytest.approx(2.0 * (1 - 0.1 * 0.5))


# -------------------------------------------------------------------------------------------------- penalties of the energies


def constant(value: float) -> list[nn.Module]:
    return [QuadraticEnergy(torch.zeros(d, d), torch.zeros(d), value) for d in (3, 2)]


@pytest.mark.parametrize("method", ["nce", "two_stage"])
def test_penalty_and_wall_are_in_the_loss(method: Any) -> None:
    """Both f are 40, beyond the bound of 25 by 15: 0.01 · 2 · 80² + 0.1 · 2 · 2 · 15²."""
    task = task_of(make(constant(40.0)), method, energy_penalty=0.01, energy_bound=25.0)
    loss, figures = task.loss(X[:16], 1)
    assert float((loss - figures["loss"]).detach()) == pytest.approx(0.01 * 2 * 80**2 + 0.1 * 2 * 2 * 15**2, rel=1e-4)


def test_the_penalty_of_the_run_follows_its_gap() -> None:
    task = task_of(make(), "two_stage", gap_limit=1.0)
    task.gaps = [torch.tensor(30.0)]
    before = float(task.penalty)
    task.updated(1)
    assert float(task.penalty) > before


def test_the_penalty_leaves_the_inference_model_alone() -> None:
    prior = make(constant(3.0))
    for f in prior.energies:
        f.h.data.fill_(1.0)  # type: ignore[union-attr,operator]
    prior.train_jointly()
    task = task_of(prior, "variational", energy_penalty=1.0)
    loss, figures = task.loss(X[:16], 1)
    inner = list(prior.generator.inference.parameters())  # type: ignore[attr-defined]
    found = torch.autograd.grad(loss - figures["loss"], inner, allow_unused=True, materialize_grads=True, retain_graph=True)
    scale = max(float(g.abs().max()) for g in torch.autograd.grad(figures["loss"], inner))
    assert max(float(g.abs().max()) for g in found) < 1e-5 * scale


# ---------------------------------------------------------------------------------------------------------------- chains


@pytest.mark.parametrize("restart", [0.0, 1.0])
def test_restarted_chains_begin_at_ancestral_draws(restart: float, monkeypatch: pytest.MonkeyPatch) -> None:
    chains = TrainingChains(make().model, FitConfig(batch_size=8, persistent=8, restart=restart), 0.1)
    monkeypatch.setattr(TrainingChains, "run", lambda self, start, steps: tuple(z.clone() for z in start))
    first = chains.prior(8, 1)[0].sort(0).values
    second = chains.prior(8, 1)[0].sort(0).values
    assert torch.equal(first, second) == (restart == 0.0)


def test_posterior_chains_are_tamed() -> None:
    torch.manual_seed(0)
    steep = JointEBMPrior(LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8, sigma=1e-4))
    steep.train_jointly()
    _, figures = task_of(steep, "joint", posterior_steps=4).loss(X[:16], 1)
    assert float(figures["posterior_tamed"]) > 0.5


def test_a_stage_starts_from_the_average_with_new_chains() -> None:
    task = task_of(make(), "multi_stage_nce", iterations=9, stages=3)
    for average in task.average:
        average.fill_(0.25)
    task.chains.bank = (torch.zeros(8, 3), torch.zeros(8, 2))
    task._enter_stage(4)
    assert all(bool((w == 0.25).all()) for w in task.weights)
    assert task.chains.bank is None
    assert task.previous is not None


def test_the_step_size_is_tuned_to_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    original = JointEBMPrior.tune_step_size

    def tune(self: JointEBMPrior, **keywords: Any) -> float:
        asked.append(keywords["target_acceptance"])
        return original(self, **keywords)

    monkeypatch.setattr(JointEBMPrior, "tune_step_size", tune)
    make().fit(X, iterations=2, batch_size=16, target_acceptance=0.8, progress=False)
    assert asked == [0.8]


# ----------------------------------------------------------------------------------------------------------------- looks


def test_the_largest_energy_of_a_window() -> None:
    prior = make()
    figures = {name: torch.zeros(3) for name in ("loss", "energy_posterior", "energy_prior")}
    figures |= {"largest_1": torch.tensor([1.0, 5.0, 2.0]), "largest_2": torch.tensor([3.0, 0.0, 0.0])}
    chains = task_of(prior, "nce").chains
    assert "saturation" not in entry(figures, chains)  # energies of one's own
    figures |= {"saturation_1": torch.tensor([0.1, 0.1, 0.1]), "saturation_2": torch.tensor([0.0, 0.6, 0.0])}
    got = entry(figures, chains)
    assert got["max_energy"] == 5.0
    assert got["saturation"] == pytest.approx(0.2)


def test_pictures_are_of_the_average(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = make()
    task = task_of(prior, "nce")
    for average in task.average:
        average.fill_(0.5)
    before = [w.detach().clone() for w in task.weights]
    seen: list[bool] = []

    def sample(*args: Any, **keywords: Any) -> Tensor:
        seen.append(all(bool((w == 0.5).all()) for w in task.weights))
        return X

    monkeypatch.setattr(prior, "sample", sample)
    task.picture()
    assert seen == [True]
    assert all(torch.equal(a, b) for a, b in zip(before, task.weights, strict=True))


def test_what_is_kept_was_looked_at() -> None:
    """The figures of a window are of weights before its last update: a run that fails in the next one keeps those before."""
    task = task_of(make(), "nce")
    sound = {"loss": torch.zeros(1), "largest_1": torch.ones(1), "largest_2": torch.ones(1)}
    figures = sound | {"energy_posterior": torch.zeros(1), "energy_prior": torch.zeros(1)}
    for value in (1.0, 2.0):
        for average in task.average:
            average.fill_(value)
        task.look(int(value), figures)
    for average in task.average:
        average.fill_(3.0)
    with pytest.raises(DivergenceError):
        task.look(3, figures | {"largest_1": torch.tensor([1e9])})
    task.keep_average()
    assert all(bool((w == 1.0).all()) for w in task.weights)


def test_the_last_average_is_seen_to_be_sound() -> None:
    prior = make(constant(0.0))
    task = task_of(prior, "nce", max_energy=50.0)
    with torch.no_grad():
        for f in prior.energies:
            f.c.fill_(80.0)  # type: ignore[union-attr,operator]
    task.latest = [w.detach().clone() for w in task.weights] + task.buffers
    with pytest.raises(DivergenceError, match=r"f_1, the energy of layer 1, reached 80 nats \(max_energy is 50\)"):
        task.finish()


def test_the_last_average_is_not_saturated() -> None:
    prior = JointEBMPrior(make().generator, [MLPEnergy(shape, (8,)) for shape in make().generator.latent_shapes])
    task = task_of(prior, "nce")
    with torch.no_grad():
        prior.energies[1].net[-1].bias.fill_(-300.0)  # type: ignore[union-attr]
    task.latest = [w.detach().clone() for w in task.weights] + task.buffers
    with pytest.raises(DivergenceError, match="f_2, the energy of layer 2, is at 95% of its saturation on average"):
        task.finish()


def test_energies_on_their_way_to_saturation_are_told() -> None:
    entry = {"max_energy": 70.0, "saturation": 0.6}
    said = forebodings(entry, FitConfig())
    assert set(said) == {"saturation"}
    assert "at 60% of their saturation on average, and at 75% the run stops" in said["saturation"]
    assert forebodings(entry | {"saturation": 0.4}, FitConfig()) == {}


@pytest.mark.parametrize("side", ["posterior", "prior"])
def test_energies_that_run_away_on_one_side_stop_the_run(side: str) -> None:
    prior = JointEBMPrior(make().generator, [MLPEnergy(shape, (8,)) for shape in make().generator.latent_shapes])
    task = task_of(prior, "nce")
    calls = iter(["posterior", "prior"])
    one = prior.energies[0].forward

    def one_sided(z: torch.Tensor) -> torch.Tensor:
        return one(z) + (95.0 if next(calls, None) == side else 0.0)

    prior.energies[0].forward = one_sided  # type: ignore[method-assign]
    _, figures = task.loss(next(task.batches), 1)
    with pytest.raises(DivergenceError, match="f_1, the energy of layer 1, is at 95% of its saturation on average"):
        check_sound({name: value.detach()[None] for name, value in figures.items()}, 1, "nce", task.config)


# -------------------------------------------------------------------------------------------------------- the generator's


def test_kl_warmup_and_input_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8)
    task = _ElboTask(vae, None, ElboConfig(iterations=20, kl_warmup=10, input_noise=0.5), Engine())
    for iteration, weight in ((5, 0.5), (10, 1.0), (15, 1.0)):
        torch.manual_seed(1)
        loss, _ = task.loss(X, iteration)
        torch.manual_seed(1)
        torch.testing.assert_close(-loss, elbo(vae, X, weight, 0.5).mean())
    seen: list[Tensor] = []
    original = LadderVAE.infer
    monkeypatch.setattr(LadderVAE, "infer", lambda self, x, rng=None: (seen.append(x), original(self, x))[1])
    elbo(vae, X, 1.0, 0.5)
    assert float((seen[0] - X).std().detach()) == pytest.approx(0.5, rel=0.1)


def test_validation_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8)
    task = _ElboTask(vae, X, ElboConfig(iterations=2, kl_warmup=0, validation_draws=3), Engine())
    seen: list[int] = []
    original = LadderVAE.infer
    monkeypatch.setattr(LadderVAE, "infer", lambda self, x, rng=None: (seen.append(len(x)), original(self, x))[1])
    state = torch.get_rng_state()
    first, second = task._validation_elbo(), task._validation_elbo()
    assert first == second, "looks are compared with one another"
    assert torch.equal(torch.get_rng_state(), state), "and do not touch the stream that training draws from"
    assert seen == [64] * 6


def test_checkpoints_do_not_change_what_is_learned(tmp_path: Path) -> None:
    weights = []
    for folder in (None, tmp_path / "run"):
        torch.manual_seed(0)
        vae = LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8)
        options: dict[str, Any] = {"iterations": 14, "log_every": 3, "checkpoint_every": 5, "kl_warmup": 13, "batch_size": 16}
        fit_elbo(vae, X, validation=X, run_dir=folder, progress=False, rng=torch.Generator().manual_seed(1), **options)
        weights.append(torch.cat([p.detach().flatten() for p in vae.parameters()]))
    assert torch.equal(*weights)


def test_a_validation_elbo_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ElboTask, "_validation_elbo", lambda self: float("nan"))
    vae = LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8)
    with pytest.raises(DivergenceError, match="validation ELBO is nan"):
        fit_elbo(vae, X, validation=X, iterations=4, kl_warmup=0, log_every=2, progress=False)


# ------------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.filterwarnings("ignore::energy_prior.TrainingWarning")
def test_penalty_and_tamed_steps_go_on_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a gap that is above its limit throughout, and drifts that are cut: both have moved when the run is stopped."""
    settings: dict[str, Any] = {"iterations": 14, "batch_size": 16, "steps": 4, "log_every": 4, "checkpoint_every": 5}
    settings |= {"gap_limit": 1e-3, "taming": 0.2, "progress": False}
    whole = make().fit(X, "two_stage", run_dir=tmp_path / "a", rng=torch.Generator().manual_seed(1), **settings)
    original = RunFolder.save

    def save(self: RunFolder, iteration: int, state: dict[str, Any]) -> None:
        original(self, iteration, state)
        if iteration == 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", save)
        with pytest.raises(KeyboardInterrupt):
            make().fit(X, "two_stage", run_dir=tmp_path / "b", rng=torch.Generator().manual_seed(1), **settings)
    again = make().fit(X, "two_stage", run_dir=tmp_path / "b", rng=torch.Generator().manual_seed(1), **settings)
    assert again.resumed_at == 10
    assert again.history == whole.history
    assert again.tamed == whole.tamed
    assert again.tamed is not None
    assert again.tamed > 0
    assert whole.history[-1]["penalty"] > 1.2e-3


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


class TwoProcesses(Engine):
    """An engine that believes in another process, whose tensors are all 3."""

    def __init__(self) -> None:
        super().__init__()
        self.world = 2

    def mean(self, tensors: Any) -> list[Tensor]:
        return [(t + 3) / 2 for t in tensors]


def test_running_statistics_are_shared() -> None:
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(1.0)  # type: ignore[union-attr]
    TwoProcesses().share(list(norm.buffers()))
    assert norm.running_mean.tolist() == [2.0, 2.0]  # type: ignore[union-attr]
    assert int(norm.num_batches_tracked) == 0  # type: ignore[arg-type]


class WithNorm(LadderVAE):
    """Keeps running statistics of what it sees."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.norm = nn.BatchNorm2d(1)

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Any:
        return super().infer(self.norm(x), rng=rng)


@pytest.mark.parametrize("what", ["elbo", "variational"])
def test_looks_share_running_statistics(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[int] = []
    monkeypatch.setattr(Engine, "share", lambda self, buffers: shared.append(len(buffers)))
    vae = WithNorm((1, 4, 4), latent_dims=(3, 2), hidden=8)
    if what == "elbo":
        fit_elbo(vae, X, iterations=4, log_every=2, batch_size=16, progress=False)
        assert shared == [3, 3]
    else:
        JointEBMPrior(vae).fit(X, "variational", iterations=4, log_every=2, batch_size=16, steps=2, progress=False)
        assert shared == [11, 11]
