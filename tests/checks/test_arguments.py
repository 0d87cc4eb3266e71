"""Bad input: each gets the documented error, whose message names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from energy_prior import (
    ArgumentError,
    ChainWarning,
    DivergenceError,
    GeneratorError,
    JointEBMPrior,
    LadderVAE,
    MLPEnergy,
    ShapeError,
    TrainingWarning,
    fit_elbo,
)
from energy_prior.langevin import InjectedNoise

X = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
NAN = X.clone()
NAN[1, 0, 2, 3] = float("nan")


def make(**keywords: Any) -> JointEBMPrior:
    return JointEBMPrior(LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8), **keywords)


def z(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(s, dtype=dtype) for s in shapes)


CASES: list[tuple[Callable[[JointEBMPrior], Any], type[Exception], str]] = [
    # latents
    (lambda p: p.negative_energy(z((4, 3))), ShapeError, r"latents: expected a tuple of 2 tensors .*got 1 entries"),
    (lambda p: p.negative_energy(torch.zeros(4, 3)), ShapeError, r"latents: expected a tuple of 2 tensors .*got Tensor"),  # type: ignore[arg-type]
    (lambda p: p.log_density(z((4, 3), (4, 9))), ShapeError, r"latents\[1\] \(z_2\): expected shape \(4, 2\), got \(4, 9\)"),
    (lambda p: p.log_density(z((4, 3), (5, 2))), ShapeError, r"latents\[1\] \(z_2\): expected shape \(4, 2\), got \(5, 2\)"),
    (
        lambda p: p.log_density(z((4, 3), (4, 2), dtype=torch.float64)),
        ArgumentError,
        r"latents\[0\] \(z_1\): expected torch.float32, the generator's dtype, got torch.float64.*\.to\(torch.float32\)",
    ),
    (
        lambda p: p.log_density([t.to("meta") for t in z((4, 3), (4, 2))]),
        ArgumentError,
        "expected a tensor on cpu, where the generator is, got one on meta",
    ),
    (lambda p: p.log_density((torch.full((4, 3), float("inf")), torch.zeros(4, 2))), ArgumentError, "got 12 that are NaN"),
    (lambda p: p.sample_latents(4, start=z((4, 3), (3, 2))), ShapeError, r"start\[1\] \(z_2\): expected shape \(4, 2\)"),
    # observations
    (lambda p: p.anomaly_score(X[:, :, :3]), ShapeError, r"x: expected shape \(batch, 1, 4, 4\), got \(4, 1, 3, 4\)"),
    (lambda p: p.anomaly_score(X.double()), ArgumentError, "x: expected torch.float32"),
    (lambda p: p.anomaly_score(X.tolist()), ArgumentError, "x: expected a tensor of shape .* got list"),
    (lambda p: p.anomaly_score(X[:0]), ShapeError, "x: expected at least one observation"),
    (lambda p: p.llr_score(NAN, 1), ArgumentError, "x: expected finite values, got 1 that are NaN or infinite"),
    (lambda p: p.sample_posterior(NAN), ArgumentError, "x: expected finite values"),
    (lambda p: p.fit(NAN, progress=False), ArgumentError, "data: expected finite values"),
    (lambda p: p.fit(X[:0], progress=False), ShapeError, "data: expected at least one observation"),
    (lambda p: p.fit(X[:, :, :2], progress=False), ShapeError, "data: expected shape"),
    (lambda p: p.fit([NAN], progress=False), ArgumentError, r"data \(a batch of it\): expected finite values"),
    (lambda p: p.fit([], progress=False), ArgumentError, "data: the iterable gave no batch"),
    (lambda p: p.fit(3, progress=False), ArgumentError, "data: expected a tensor, an array or an iterable of batches, got int"),  # type: ignore[arg-type]
    # k
    (lambda p: p.llr_score(X, 3), ArgumentError, "k: expected a whole number from 0 to 2.* got 3"),
    (lambda p: p.llr_score(X, -1), ArgumentError, "k: expected a whole number from 0 to 2.* got -1"),
    (lambda p: p.log_joint(X, 1.0), ArgumentError, "k: expected a whole number.* got 1.0"),  # type: ignore[arg-type]
    (lambda p: p.log_joint(X, True), ArgumentError, "k: expected a whole number.* got True"),
    # given
    (
        lambda p: p.sample_latents(4, given={3: torch.zeros(4, 2)}),
        ArgumentError,
        "given: expected layer numbers from 1 .* to 2",
    ),
    (
        lambda p: p.sample_latents(4, given={0: torch.zeros(4, 2)}),
        ArgumentError,
        "given: expected layer numbers from 1 .* got 0",
    ),
    (lambda p: p.sample(4, given={2: torch.zeros(4, 3)}), ShapeError, r"given\[2\]: expected shape \(4, 2\), got \(4, 3\)"),
    (lambda p: p.sample(4, given={2: torch.zeros(3, 2)}), ShapeError, r"given\[2\]: expected shape \(4, 2\), got \(3, 2\)"),
    # chain options
    (lambda p: p.sample(4, steps=-1), ArgumentError, "steps: expected a whole number of at least 0, got -1"),
    (lambda p: p.sample(4, steps=-3), ArgumentError, "steps: .* got -3"),
    (lambda p: p.sample(4, steps=2.5), ArgumentError, "steps: .* got 2.5"),  # type: ignore[arg-type]
    (lambda p: p.sample(4, step_size=0.0), ArgumentError, "step_size: expected a finite number above 0, got 0.0"),
    (lambda p: p.sample(4, step_size=-0.1), ArgumentError, "step_size: .* got -0.1"),
    (lambda p: p.sample(4, step_size=float("nan")), ArgumentError, "step_size: .* got nan"),
    (lambda p: p.sample(4, temperature=0), ArgumentError, "temperature: expected a finite number above 0"),
    (lambda p: p.sample(4, adjust="yes"), ArgumentError, "adjust: expected True or False"),  # type: ignore[arg-type]
    (lambda p: p.sample(4, scheme="heun"), ArgumentError, "scheme: expected one of"),  # type: ignore[arg-type]
    (lambda p: p.sample(4, stepsize=0.1), ArgumentError, "stepsize: not an option of a chain.*Did you mean 'step_size'"),  # type: ignore[call-arg]
    (lambda p: p.trajectory(4, steps=5, every=6), ArgumentError, "every: expected at most steps = 5, got 6"),
    (lambda p: p.trajectory(4, steps=5, every=0), ArgumentError, "every: expected a whole number"),
    (lambda p: p.sample(0), ArgumentError, "n: expected a whole number of at least 1, got 0"),
    (lambda p: p.sample(4, decode="median"), ArgumentError, 'decode: expected "mean", "sample" or None'),  # type: ignore[arg-type]
    (lambda p: p.sample(4, prior="gaussian"), ArgumentError, 'prior: expected "joint" or "generator"'),  # type: ignore[arg-type]
    (
        lambda p: p.sample(4, prior="generator", steps=3),
        ArgumentError,
        "takes max_memory of the options of a chain, and neither `given`, `start`",
    ),
    (lambda p: p.llr_score(X, 1, posterior=3), ArgumentError, "posterior: expected a dict whose every name is .*, got int"),  # type: ignore[arg-type]
    (lambda p: p.log_joint(X, num_samples=0), ArgumentError, "num_samples: expected a whole number of at least 1"),
    (lambda p: p.sample_posterior(X, method="gibbs"), ArgumentError, 'method: expected "langevin" or "infer"'),  # type: ignore[arg-type]
    (lambda p: p.anomaly_score(X, "likelihood"), ArgumentError, "method: expected one of .*'log_joint'"),
    (lambda p: p.tune_step_size(max_memory=0), ArgumentError, "max_memory: expected"),
    (lambda p: p.tune_step_size(target_acceptance=1.0), ArgumentError, "target_acceptance: expected a number between 0 and 1"),
    (
        lambda p: p.sample_latents(4, steps=9, noise=InjectedNoise([torch.zeros(5, 4, 3), torch.zeros(5, 4, 2)])),
        ArgumentError,
        "noise: expected 10 rows or more .* got 5",
    ),
    (
        lambda p: p.sample_latents(4, steps=2, adjust=True, noise=InjectedNoise([torch.zeros(5, 4, 3), torch.zeros(5, 4, 2)])),
        ArgumentError,
        "noise: Metropolis adjustment needs `uniforms`",
    ),
    (lambda p: InjectedNoise([torch.zeros(5, 4, 3), torch.zeros(4, 4, 2)]), ShapeError, "noise: expected the same"),
    # fit
    (
        lambda p: p.fit(X, "contrastive_divergence"),
        ArgumentError,
        r"method: expected one of \('denoising', 'nce', 'multi_stage_nce', 'two_stage', 'variational', 'joint'\)",
    ),
    (lambda p: p.fit(X, learning_rte=1.0), ArgumentError, "learning_rte: not a setting of fit. Did you mean 'learning_rate'"),
    (lambda p: p.fit(X, iterations=0), ArgumentError, "iterations: expected a whole number of at least 1"),
    (lambda p: p.fit(X, learning_rate=-1e-3), ArgumentError, "learning_rate: expected a finite number above 0"),
    (lambda p: p.fit(X, weight_decay=-1), ArgumentError, "weight_decay: expected a finite number of at least 0"),
    (lambda p: p.fit(X, ema_decay=1.0), ArgumentError, r"ema_decay: expected a number in \[0, 1\)"),
    (lambda p: p.fit(X, step_size=0.0), ArgumentError, "step_size: expected"),
    (lambda p: fit_elbo(p.generator, X, iteratons=3), ArgumentError, "iteratons: not a setting of fit_elbo"),
    (lambda p: fit_elbo(p.generator, X, validation=NAN), ArgumentError, "validation: expected finite values"),
    (lambda p: fit_elbo(object(), X), GeneratorError, "expected an nn.Module with infer"),  # type: ignore[arg-type]
    # further slips
    (lambda p: p.sample(4, rng=0), ArgumentError, "rng: expected a torch.Generator or None, got int"),  # type: ignore[arg-type]
    (lambda p: p.sample(4, given=[torch.zeros(4, 2)]), ArgumentError, "given: expected a mapping"),  # type: ignore[arg-type]
    (lambda p: p.sample_latents(4, noise=torch.zeros(3)), ArgumentError, "noise: expected an InjectedNoise"),  # type: ignore[arg-type]
    (
        lambda p: p.sample_latents(4, steps=2, noise=InjectedNoise([torch.zeros(3, 1, 3), torch.zeros(3, 1, 2)])),
        ShapeError,
        r"noise: expected one tensor .* shapes \[\(4, 3\), \(4, 2\)\], got \[\(1, 3\), \(1, 2\)\]",
    ),
    (
        lambda p: p.sample_latents(4, steps=2, noise=InjectedNoise(z((3, 4, 3), (3, 4, 2), dtype=torch.float64))),
        ArgumentError,
        "noise: expected torch.float32 on cpu, like the latents, got torch.float64",
    ),
    (lambda p: InjectedNoise([]), ShapeError, "noise: expected one tensor per free layer, got none"),
    (
        lambda p: p.sample_posterior(X, steps=2, noise=InjectedNoise([torch.zeros(3, 4, 3), torch.zeros(3, 4, 2)])),
        ArgumentError,
        "noise: give `start` as well",
    ),
    (lambda p: p.sample_posterior(X, method="infer", steps=3), ArgumentError, '"infer" runs no chain'),
    (
        lambda p: p.trajectory(4, steps=2, every=1, given={1: torch.zeros(4, 3), 2: torch.zeros(4, 2)}),
        ArgumentError,
        "given: every layer is held",
    ),
    (lambda p: p.anomaly_score((255 * X).to(torch.uint8)), ArgumentError, "scale it to the range"),
    (lambda p: p.anomaly_score(X, "tails"), ArgumentError, r"needs prior.calibrate\(x\)"),
    (lambda p: p.calibrate(X[:1]), ShapeError, "x: expected two or more observations"),
    (lambda p: p.explain(X), ArgumentError, r"needs prior.calibrate\(x\)"),
    (lambda p: p.threshold(0.9), ArgumentError, r"needs prior.calibrate\(x\)"),
    (lambda p: p.threshold(1.0), ArgumentError, "quantile: expected"),
    (lambda p: p.fit((255 * X).byte().numpy()), ArgumentError, "data: .* got an array of uint8. Scale it to the range"),
    (lambda p: p.fit(X, config={"iterations": 3}), ArgumentError, "config: expected a FitConfig or None, got dict"),  # type: ignore[arg-type]
    (lambda p: p.fit(X, persistent=3, batch_size=4), ArgumentError, "persistent: expected 0 or at least batch_size"),
    (
        lambda p: p.fit([X], "two_stage", batch_size=2, persistent=3, progress=False),
        ArgumentError,
        "persistent: .* as a batch has, 4, got 3",
    ),
    (lambda p: p.fit(X, restart_probability=2.0), ArgumentError, r"restart_probability: expected a share in \[0, 1\]"),
    (lambda p: fit_elbo(p.generator, X, iterations=10, kl_warmup=10), ArgumentError, "kl_warmup: expected fewer than"),
    (lambda p: p.save(""), ArgumentError, "path: expected a path, got an empty text"),
    (lambda p: p.save("no/such/folder/p.safetensors"), FileNotFoundError, "path: there is no folder 'no/such/folder'"),
    (lambda p: p.save("tests"), IsADirectoryError, "path: 'tests' is a folder"),
    (lambda p: JointEBMPrior.load(p.generator, "p"), ArgumentError, "path: expected a path, got LadderVAE"),  # type: ignore[arg-type]
    # construction
    (lambda p: JointEBMPrior(p.generator, "latent"), ArgumentError, "energies: .* got str; space is a keyword"),  # type: ignore[arg-type]
    (lambda p: make(energies=[torch.sum, torch.sum]), ArgumentError, "energies: expected an nn.Module for f_1, got"),
    (lambda p: JointEBMPrior(LadderVAE), GeneratorError, "got the class LadderVAE; build it first"),  # type: ignore[arg-type]
    (lambda p: make(space="pixel"), ArgumentError, "space: expected one of"),
    (
        lambda p: make(energies=[nn.Flatten()]),
        ArgumentError,
        r"energies: expected one module per layer, 2 \(z_1 first\), got 1",
    ),
    (lambda p: JointEBMPrior(nn.Linear(2, 2)), GeneratorError, "Linear lacks latent_shapes, start"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "error", "words"), CASES, ids=[case[2][:40] for case in CASES])
def test_bad_input(call: Callable[[JointEBMPrior], Any], error: type[Exception], words: str) -> None:
    prior = make()
    before = {name: value.clone() for name, value in prior.state_dict().items()}
    with pytest.raises(error, match=f"(?s){words}"):
        call(prior)
    assert all(torch.equal(before[name], value) for name, value in prior.state_dict().items()), "nothing half-written"


class Returns(nn.Module):
    """An energy that returns a given function of z."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, latent: Tensor) -> Any:
        return self.function(latent)


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        (lambda t: t.sum(1, keepdim=True), ShapeError, r"expected f_1\(z_1\) of shape \(2,\), one value per .*got \(2, 1\)"),
        (lambda t: t.sum(), ShapeError, r"got \(\)"),
        (lambda t: 0.0, ShapeError, "got float"),
        (lambda t: t.sum(1).double(), ArgumentError, "expected f_1 in the latents' torch.float32, got torch.float64"),
        (lambda t: t @ torch.zeros(7, 1), ShapeError, "f_1 fails on a batch of z_1 of shape"),
        (lambda t: t.detach().sum(1), ArgumentError, r"f_1\(z_1\) has no gradient in z_1.*Is z detached"),
    ],
)
def test_energies_of_the_wrong_kind(function: Callable[[Tensor], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"(?s)energies: .*{words}"):
        make(energies=[Returns(function), Returns(lambda t: t.sum(1))])


def flat(t: Tensor) -> Tensor:
    return 0.0 * t.sum(1)


EXPLODING = {
    "grows without bound": lambda t: 1e3 * t.square().sum(1) ** 2,
    "is infinite at once": lambda t: torch.where(t.sum(1) > -1e9, torch.inf, t.sum(1)),
    "is NaN": lambda t: t.sum(1) * float("nan"),
    "has a NaN gradient": lambda t: (t.sum(1) * 0).sqrt(),
}


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize(
    ("name", "adjust"), [(n, a) for n in EXPLODING for a in (False, True) if not (a and n.startswith("grows"))]
)
def test_an_energy_that_explodes(name: str, adjust: bool, layer: int) -> None:
    """DivergenceError with layer and step; MALA, which rejects the moves of the one that grows without bound, stays finite."""
    energies = [Returns(flat), Returns(flat)]
    energies[layer - 1] = Returns(EXPLODING[name])
    prior = make(energies=energies)
    with pytest.raises(DivergenceError, match=r"diverged at step \d+: .*(smaller step_size|at fault)") as caught:
        prior.sample_latents(8, steps=200, step_size=0.5, adjust=adjust, rng=torch.Generator().manual_seed(0))
    assert caught.value.step is not None
    # a gradient that is NaN reaches z_2 through z_1, so only an energy, or the top layer's gradient, is told apart
    if name != "has a NaN gradient":
        assert caught.value.layer == layer
    if name != "grows without bound":
        assert caught.value.step == 0
    else:
        assert caught.value.step > 0


def test_a_proposal_of_density_zero_is_rejected_not_an_error() -> None:
    """A hard wall, f = −∞ outside: MALA stays inside."""
    wall = Returns(lambda t: torch.where(t[:, 0].abs() < 4.0, 0.0 * t[:, 0], -torch.inf))
    prior = make(energies=[wall, Returns(flat)])
    start = z((500, 3), (500, 2))
    inside = prior.sample_latents(500, start=start, steps=30, step_size=0.9, adjust=True)[0][:, 0]
    assert float(inside.abs().max()) < 4.0


def test_training_that_diverges_keeps_the_last_good_weights() -> None:
    class Bomb(nn.Module):
        """Fine for some calls, then NaN."""

        def __init__(self) -> None:
            super().__init__()
            self.w, self.calls = nn.Parameter(torch.zeros(3)), 0

        def forward(self, t: Tensor) -> Tensor:
            self.calls += 1
            return t @ self.w * (float("nan") if self.calls > 80 else 1.0)

    bomb = Bomb()
    prior = make(energies=[bomb, Returns(lambda t: t.sum(1) * 0)])
    with pytest.raises(DivergenceError, match="Training diverged in iteration .*last good average") as caught:
        prior.fit(X, iterations=100, log_every=10, progress=False)
    assert caught.value.step is not None
    assert caught.value.step > 10
    assert torch.isfinite(bomb.w).all()
    assert not torch.equal(bomb.w, torch.zeros(3))


@pytest.mark.parametrize(
    ("saturation", "why"),
    [
        (None, r"f_2, the energy of layer 2, reached 5e\+03 nats \(max_energy is 1000\)\. Lower"),
        (100.0, r"f_2, the energy of layer 2, is at 100% of its saturation on average \(the limit is 75%\)\. Lower"),
    ],
)
def test_energies_that_run_away_stop_the_run_and_name_the_layer(saturation: float | None, why: str) -> None:
    generator = make().generator
    energies = [MLPEnergy(shape, (8,), saturation=saturation) for shape in generator.latent_shapes]
    prior = JointEBMPrior(generator, energies)
    with torch.no_grad():
        energies[1].net[-1].bias.fill_(5e3)  # type: ignore[arg-type]
    with pytest.raises(DivergenceError, match=why) as caught:
        prior.fit(X, iterations=5, progress=False)
    assert caught.value.layer == 2


def test_generator_whose_likelihood_is_not_finite() -> None:
    prior = make()
    assert isinstance(prior.generator, LadderVAE)
    with torch.no_grad():
        prior.generator.decoder[-2].weight.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(DivergenceError, match="step 0: .*layer 1"):
        prior.sample_posterior(X)


def test_elbo_training_that_diverges_keeps_the_best_weights() -> None:
    vae = LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8)
    words = "diverged in iteration 11: .*not finite in 10 updates in a row. It holds its best weights"
    with pytest.warns(TrainingWarning, match="iteration 2 was left out"), pytest.raises(DivergenceError, match=words):
        fit_elbo(vae, X, iterations=50, learning_rate=1e18, gradient_clip=1e30, log_every=3, progress=False)
    assert max(float(p.detach().abs().max()) for p in vae.parameters()) < 10, "those before the update that went too far"


def test_chains_that_hardly_move_say_so() -> None:
    """MALA on an energy that no step size can follow stays where it was, and says so."""
    prior = make(energies=[Returns(lambda t: 1e6 * t.sum(1)), Returns(lambda t: t.sum(1))])
    with pytest.warns(ChainWarning, match="accepted 0.0% of the chains' steps.*too steep to sample"):
        prior.sample_latents(4, adjust=True, steps=5)
