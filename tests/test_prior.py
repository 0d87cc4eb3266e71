"""`JointEBMPrior`: the public contract, the four RNG rules, independence of the batch, and clean parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ladders import LinearLadder, QuadraticEnergy
from torch import Tensor, nn

from energy_prior import ArgumentError, DivergenceError, GeneratorError, JointEBMPrior, LadderVAE, MLPEnergy
from energy_prior.langevin import InjectedNoise
from energy_prior.topdown import TopDown


def trained_looking(dtype: torch.dtype = torch.float32, space: str = "noise", nets: str = "mlp") -> JointEBMPrior:
    """A prior whose energies are not 0."""
    torch.manual_seed(3)
    vae = LadderVAE((1, 4, 4), latent_dims=(3, 2, 2), hidden=8, nets=nets).to(dtype)  # type: ignore[arg-type]
    prior = JointEBMPrior(vae, space=space)  # type: ignore[arg-type]
    for p in prior.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return prior


X = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
MANY = X.repeat(32, 1, 1, 1)  # energies are standardised on thousands of draws, batch by batch


def zeros(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Latents of three observations."""
    return [torch.zeros(3, d, dtype=dtype, device="cpu") for d in (3, 2, 2)]


RANDOM: dict[str, Callable[[JointEBMPrior, Any], Any]] = {
    "sample": lambda p, rng: p.sample(3, steps=4, rng=rng),
    "sample decode": lambda p, rng: p.sample(3, steps=4, decode="sample", rng=rng),
    "sample generator": lambda p, rng: p.sample(3, prior="generator", rng=rng),
    "sample_latents": lambda p, rng: torch.cat(p.sample_latents(3, steps=4, adjust=True, rng=rng), 1),
    "trajectory": lambda p, rng: p.trajectory(3, steps=4, every=2, rng=rng).latents[0],
    "sample_posterior": lambda p, rng: torch.cat(p.sample_posterior(X, steps=4, rng=rng), 1),
    "infer": lambda p, rng: torch.cat(p.sample_posterior(X, method="infer", rng=rng), 1),
    "log_joint": lambda p, rng: p.log_joint(X, 2, steps=4, rng=rng),
    "llr_score": lambda p, rng: p.llr_score(X, 2, steps=4, rng=rng),
    "llr_scores": lambda p, rng: p.llr_scores(X, steps=4, rng=rng),
    "anomaly_score": lambda p, rng: p.anomaly_score(X, rng=rng),
    "score_terms": lambda p, rng: p.score_terms(X, rng=rng).log_likelihood,
    "reconstruct": lambda p, rng: p.reconstruct(X, rng=rng),
    "decode": lambda p, rng: p.decode(
        [torch.zeros(3, d, dtype=p.dtype, device="cpu") for d in (3, 2, 2)], decode="sample", rng=rng
    ),
    "fit": lambda p, rng: (
        p.fit(MANY, iterations=3, step_size=0.2, progress=False, rng=rng),
        torch.cat([q.flatten() for q in p.parameters()]),
    )[1],
    "mismatch": lambda p, rng: torch.tensor(p.mismatch(MANY[:64], steps=4, rng=rng).layers[0].kl, device="cpu"),
    "tune_step_size": lambda p, rng: torch.tensor(p.tune_step_size(batch_size=4, rng=rng), device="cpu"),
}


@pytest.mark.parametrize("name", RANDOM)
def test_the_four_rng_rules(name: str) -> None:
    draw, prior = RANDOM[name], trained_looking()
    state = torch.get_rng_state()
    seeded = [draw(copy.deepcopy(prior), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state), "an explicit rng leaves the global stream untouched"
    assert torch.equal(seeded[0], seeded[1]), "the same seed gives the same result"
    assert not torch.equal(seeded[0], seeded[2]), "different seeds differ"
    globally = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        globally.append(draw(copy.deepcopy(prior), None))
    assert torch.equal(globally[0], globally[1])
    assert not torch.equal(globally[0], globally[2])


def test_one_rng_goes_on_from_call_to_call() -> None:
    prior, rng = trained_looking(), torch.Generator().manual_seed(0)
    assert not torch.equal(prior.sample(2, steps=2, rng=rng), prior.sample(2, steps=2, rng=rng))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("space", ["noise", "latent"])
@pytest.mark.parametrize("adjust", [False, True])
def test_with_injected_noise_a_chain_does_not_depend_on_its_batch(
    adjust: bool, space: str, dtype: torch.dtype, tolerance: float
) -> None:
    prior = trained_looking(dtype, space)
    steps, n = 8, 6
    shapes = [(steps + 1, n, *shape) for shape in prior.generator.latent_shapes]
    normals = [torch.randn(shape, dtype=dtype) for shape in shapes]
    uniforms = torch.rand(steps + 1, n, dtype=dtype)
    options = {"steps": steps, "step_size": 0.3, "adjust": adjust}
    whole = prior.sample_latents(n, noise=InjectedNoise(normals, uniforms), **options)  # type: ignore[arg-type]
    for rows in (slice(0, 1), slice(2, 5)):
        part = InjectedNoise([m[:, rows] for m in normals], uniforms[:, rows])
        alone = prior.sample_latents(len(range(n)[rows]), noise=part, **options)  # type: ignore[arg-type]
        for a, b in zip(whole, alone, strict=True):
            torch.testing.assert_close(a[rows], b, rtol=tolerance, atol=tolerance)


def test_a_posterior_chain_does_not_depend_on_its_batch() -> None:
    """Adaptive step sizes included: every chain tunes its own."""
    prior = trained_looking(torch.float64)
    x = X.double()
    steps = 10
    normals = [torch.randn(steps + 1, 4, *shape, dtype=torch.float64) for shape in prior.generator.latent_shapes]
    uniforms = torch.rand(steps + 1, 4, dtype=torch.float64)
    start = prior.sample_latents(4, steps=1)
    whole = prior.sample_posterior(x, steps=steps, start=start, noise=InjectedNoise(normals, uniforms))
    part = InjectedNoise([m[:, 1:2] for m in normals], uniforms[:, 1:2])
    alone = prior.sample_posterior(x[1:2], steps=steps, start=[z[1:2] for z in start], noise=part)
    for a, b in zip(whole, alone, strict=True):
        torch.testing.assert_close(a[1:2], b, rtol=1e-12, atol=1e-12)


def test_untrained_joint_prior_is_the_generators_own() -> None:
    vae = LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8)
    prior = JointEBMPrior(vae)
    z = prior.sample_latents(5)
    assert torch.equal(prior.negative_energy(z), torch.zeros(5, 2))
    log_prior = torch.zeros(5)
    state = vae.start(5)
    for layer in (2, 1):
        log_prior += vae.conditional(state, layer).log_prob(z[layer - 1]).sum(1)
        state = vae.descend(state, z[layer - 1], layer)
    torch.testing.assert_close(prior.log_density(z), log_prior)


def test_a_constant_added_to_an_energy_does_what_it_should() -> None:
    ladder = LinearLadder((3, 2))
    x = torch.randn(5, 3, dtype=torch.float64)
    shifted = copy.deepcopy(ladder)
    with torch.no_grad():
        shifted.energies[1].c.add_(2.5)
    before, after = JointEBMPrior(ladder, ladder.energies), JointEBMPrior(shifted, shifted.energies)

    def rng() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    z = before.sample_latents(5, rng=rng())
    for a, b in zip(z, after.sample_latents(5, rng=rng()), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(after.negative_energy(z) - before.negative_energy(z), torch.tensor([[0.0, 2.5]] * 5).double())
    torch.testing.assert_close(after.log_density(z) - before.log_density(z), torch.full((5,), 2.5).double())
    for k in range(3):
        difference = after.log_joint(x, k, rng=rng()) - before.log_joint(x, k, rng=rng())
        torch.testing.assert_close(difference, torch.full((5,), 2.5).double())
        torch.testing.assert_close(after.llr_score(x, k, rng=rng()), before.llr_score(x, k, rng=rng()))
    difference = after.anomaly_score(x, rng=rng()) - before.anomaly_score(x, rng=rng())
    torch.testing.assert_close(difference, torch.full((5,), -2.5).double())


def test_anomaly_score_is_minus_log_joint_and_its_parts_add_up() -> None:
    prior = trained_looking(torch.float64)
    x = X.double()

    def rng() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    torch.testing.assert_close(prior.anomaly_score(x, num_samples=4, rng=rng()), -prior.log_joint(x, num_samples=4, rng=rng()))
    terms = prior.score_terms(x, num_samples=4, rng=rng())
    torch.testing.assert_close(terms.log_joint(), prior.log_joint(x, num_samples=4, rng=rng()))
    energy = prior.anomaly_score(x, "negative_energy", num_samples=4, rng=rng())
    torch.testing.assert_close(terms.negative_energy.sum(1), -energy)
    torch.testing.assert_close(terms.log_likelihood, -prior.anomaly_score(x, "reconstruction", num_samples=4, rng=rng()))


def test_score_terms_are_those_of_the_posterior_draw() -> None:
    prior = trained_looking(torch.float64)
    x, rng = X.double(), torch.Generator
    one = prior.score_terms(x, num_samples=1, rng=rng().manual_seed(2))
    z = prior.sample_posterior(x, method="infer", rng=rng().manual_seed(2))
    torch.testing.assert_close(one.negative_energy, prior.negative_energy(z).detach())
    torch.testing.assert_close(one.log_prior.sum(1) + one.negative_energy.sum(1), prior.log_density(z).detach())
    assert one.log_q is not None
    assert one.log_q.shape == one.log_prior.shape == (4, 3)
    with torch.no_grad():
        expected = prior.generator.infer(x, rng=rng().manual_seed(2))  # type: ignore[attr-defined]
    assert one.log_q.shape == expected.log_q.shape
    ladder = LinearLadder((2, 2))
    ladder.infer = None  # type: ignore[assignment,method-assign]
    assert JointEBMPrior(ladder, ladder.energies).score_terms(torch.randn(3, 3).double(), posterior={"steps": 2}).log_q is None


def test_columns_of_llr_scores_are_the_closed_form() -> None:
    """The last one, whose chain comes first, agrees with `llr_score` at the same posterior draw, bit for bit."""
    ladder = LinearLadder((3, 2), seed=4)
    prior = JointEBMPrior(ladder, ladder.energies)
    x = torch.randn(6, 3, dtype=torch.float64)
    many = x.repeat(400, 1)  # rows are independent draws
    scores = prior.llr_scores(many, num_samples=1, steps=30, step_size=0.7, adjust=True, rng=torch.Generator().manual_seed(0))
    assert scores.shape == (2400, 2)
    scores = scores.reshape(400, 6, 2).mean(0)
    for k in (1, 2):
        exact = torch.tensor([ladder.log_joint(row, 0) - ladder.log_joint(row, k) for row in x], dtype=torch.float64)
        torch.testing.assert_close(scores[:, k - 1], exact, rtol=0, atol=1.5)
    one = {"num_samples": 1, "steps": 5}
    last = prior.llr_score(x, 2, rng=torch.Generator().manual_seed(1), **one)  # type: ignore[arg-type]
    assert torch.equal(last, prior.llr_scores(x, rng=torch.Generator().manual_seed(1), **one)[:, 1])  # type: ignore[arg-type]


def test_trajectory_frames_and_diagnostics() -> None:
    prior = trained_looking()
    run = prior.trajectory(5, steps=11, every=4, step_size=0.5)
    assert run.steps.tolist() == [0, 4, 8]
    assert [tuple(z.shape) for z in run.latents] == [(3, 5, 3), (3, 5, 2), (3, 5, 2)]
    for frame in range(3):
        torch.testing.assert_close(run.negative_energy[frame], prior.negative_energy([z[frame] for z in run.latents]).detach())
    assert run.drift_norm.shape == run.acceptance.shape == (3, 5)
    assert torch.equal(run.acceptance[0], torch.ones(5))
    assert bool(((run.acceptance[1:] > 0) & (run.acceptance[1:] <= 1)).all())
    assert float(run.acceptance[1:].min()) < 1


def test_trajectory_start_is_ancestral_and_end_is_the_chain() -> None:
    prior = trained_looking(torch.float64)
    options: dict[str, Any] = {"steps": 6, "step_size": 0.4}
    run = prior.trajectory(5, every=3, rng=torch.Generator().manual_seed(1), **options)
    end = prior.sample_latents(5, rng=torch.Generator().manual_seed(1), **options)
    for z, last in zip(run.latents, end, strict=True):
        torch.testing.assert_close(z[-1], last)


@pytest.mark.parametrize("space", ["noise", "latent"])
def test_a_chain_starts_at_the_latents_of_its_first_noise(space: str) -> None:
    prior = trained_looking(torch.float64, space)
    normals = [torch.randn(2, 4, *shape, dtype=torch.float64) for shape in prior.generator.latent_shapes]
    run = prior.trajectory(4, steps=1, every=1, noise=InjectedNoise(normals))
    with torch.no_grad():
        start = TopDown(prior.generator, 4).descend([n[0] for n in normals], "noise").latents
    for z, expected in zip(run.latents, start, strict=True):
        torch.testing.assert_close(z[0], expected)


def test_drift_norm_is_the_gradient_of_log_density_in_latent_space() -> None:
    prior = trained_looking(torch.float64, "latent")
    run = prior.trajectory(4, steps=1, every=1)
    leaves = [z[0].clone().requires_grad_() for z in run.latents]
    gradient = torch.autograd.grad(prior.log_density(leaves).sum(), leaves)
    torch.testing.assert_close(run.drift_norm[0], torch.cat(gradient, 1).norm(dim=1))


def test_parameters_stay_clean() -> None:
    prior = trained_looking()
    prior.train()
    assert isinstance(prior.generator, LadderVAE)
    prior.generator.train()
    frozen_one = next(iter(prior.parameters())).requires_grad_(False)
    flags = [(p, p.requires_grad) for p in (*prior.parameters(), *prior.generator.parameters())]
    weights = [p.detach().clone() for p, _ in flags]
    for name, draw in RANDOM.items():
        if name not in ("fit", "tune_step_size"):
            draw(prior, None)
    assert all(p.grad is None and p.requires_grad is flag for p, flag in flags)
    assert not frozen_one.requires_grad
    assert all(torch.equal(p, w) for (p, _), w in zip(flags, weights, strict=True))
    assert all(m.training for m in (*prior.modules(), *prior.generator.modules()))


def test_flags_are_restored_after_an_error() -> None:
    prior = trained_looking()
    with torch.no_grad():
        next(iter(prior.energies[0].parameters())).fill_(float("nan"))
    with pytest.raises(DivergenceError):
        prior.sample(2)
    assert all(p.requires_grad for p in prior.parameters())
    assert all(m.training for m in prior.modules())
    assert torch.distributions.Distribution._validate_args


def test_fit_changes_the_energies_alone() -> None:
    prior = trained_looking()
    assert isinstance(prior.generator, LadderVAE)
    before = copy.deepcopy(prior.generator.state_dict())
    energies = [p.detach().clone() for p in prior.parameters()]
    prior.fit(MANY, iterations=5, step_size=0.2, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), prior.generator.state_dict().values(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(energies, prior.parameters(), strict=True))
    assert all(p.grad is None for p in (*prior.parameters(), *prior.generator.parameters()))


def test_to_moves_the_generator_and_float64_works_end_to_end() -> None:
    prior = trained_looking().double()
    assert isinstance(prior.generator, LadderVAE)
    assert {p.dtype for p in (*prior.parameters(), *prior.generator.parameters())} == {torch.float64}
    x = X.double()
    for name, draw in RANDOM.items():
        if not {"X", "MANY"} & set(draw.__code__.co_names):
            assert draw(prior, None).dtype in (torch.float64, torch.float32), name
    prior.fit(MANY.double(), iterations=3, step_size=0.2, progress=False)
    assert prior.llr_score(x, 1, steps=2).dtype == torch.float64
    assert prior.sample(2, steps=2).dtype == torch.float64


def test_parameters_and_state_dict_are_the_energies() -> None:
    prior = trained_looking()
    assert {name.split(".")[0] for name, _ in prior.named_parameters()} == {"energies"}
    keys = set(prior.state_dict())
    assert "step_size" in keys
    assert {k.split(".")[0] for k in keys} == {"calibration", "energies", "step_size"}
    assert {k.split(".")[1] for k in keys if k.startswith("energies")} == {"0", "1", "2"}


def test_given_all_layers_decodes_them() -> None:
    prior = trained_looking()
    z = prior.sample_latents(3, steps=2)
    held = dict(enumerate(z, start=1))
    assert all(torch.equal(a, b) for a, b in zip(prior.sample_latents(3, given=held), z, strict=True))
    assert torch.equal(prior.sample(3, given=held), prior.sample(3, given=held))


def test_hierarchical_resampling_keeps_the_layers_above() -> None:
    prior = trained_looking()
    z = prior.sample_latents(3, steps=2)
    lower = prior.sample_latents(3, given={2: z[1], 3: z[2]}, steps=5)
    assert not torch.equal(lower[0], z[0])
    assert torch.equal(lower[1], z[1])
    assert torch.equal(lower[2], z[2])


def test_decode_falls_back_to_a_sample_where_there_is_no_mean() -> None:
    class NoMean(LadderVAE):
        def likelihood(self, state: Any) -> torch.distributions.Distribution:
            likelihood = super().likelihood(state)

            class Without(torch.distributions.Independent):
                @property
                def mean(self) -> Tensor:
                    raise NotImplementedError

            assert isinstance(likelihood, torch.distributions.Independent)
            return Without(likelihood.base_dist, 3, validate_args=False)

    prior = JointEBMPrior(NoMean((1, 4, 4), latent_dims=(2,), hidden=4))
    assert prior.sample(2, steps=1).shape == (2, 1, 4, 4)
    with pytest.raises(ValueError, match="has no mean"):
        prior.sample(2, steps=1, decode="mean")


def test_a_generator_without_infer_scores_by_langevin() -> None:
    ladder = LinearLadder((2, 2))

    class NoInfer:
        """Not an nn.Module either."""

        latent_shapes = ladder.latent_shapes
        start, conditional, descend, likelihood = ladder.start, ladder.conditional, ladder.descend, ladder.likelihood

    prior = JointEBMPrior(NoInfer(), ladder.energies)  # type: ignore[arg-type]
    x = torch.randn(3, 3, dtype=torch.float64)
    assert torch.isfinite(prior.llr_score(x, 1, steps=20, posterior={"steps": 10})).all()
    with pytest.raises(ValueError, match="posterior: steps: expected"):
        prior.anomaly_score(x, posterior={"steps": -1})
    with pytest.raises(ValueError, match="posterior: expected a dict whose every name is an option of a chain.*got int"):
        prior.anomaly_score(x, posterior=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no infer"):
        prior.sample_posterior(x, method="infer")


def test_users_own_energies() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor(0.5))

        def forward(self, z: Tensor) -> Tensor:
            return -self.a * z.square().sum(1)

    vae = LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8)
    prior = JointEBMPrior(vae, energies=[Mine(), Mine()])
    assert len(list(prior.parameters())) == 2
    result = prior.fit(MANY, iterations=5, progress=False)
    assert prior.sample(3, steps=3).shape == (3, 1, 4, 4)
    assert result.step_size == pytest.approx(float(prior.step_size))


def test_quadratic_energy_narrows_the_samples() -> None:
    """The sign: higher f = more probable."""
    ladder = LinearLadder((2,))
    pull = QuadraticEnergy(8 * torch.eye(2).double(), torch.zeros(2).double())
    z = JointEBMPrior(ladder, [pull]).sample_latents(2000, steps=40)[0]
    assert float(z.std()) == pytest.approx(1 / 3, abs=0.06)


def test_no_gpu_stream_is_reseeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` would also reseed the GPUs, which a prior on the CPU does not restore."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    prior = trained_looking()  # seeds globally itself
    seeded.clear()
    state = torch.get_rng_state()
    again = JointEBMPrior(prior.generator, prior.energies)
    assert torch.equal(torch.get_rng_state(), state), "wrapping a model draws nothing"
    again.sample(2, steps=2, rng=torch.Generator())
    assert seeded == []


def test_energies_that_do_not_depend_on_z_are_allowed() -> None:
    """Tilting one layer alone, or none."""

    class Zero(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z.new_zeros(len(z))

    for space in ("noise", "latent"):
        prior = JointEBMPrior(LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8), [Zero(), Zero()], space=space)  # type: ignore[arg-type]
        assert prior.sample(3, steps=3, step_size=0.1).shape == (3, 1, 4, 4)
    with pytest.raises(ValueError, match="nothing to fit"):
        prior.fit(X, progress=False)
    half = JointEBMPrior(prior.generator, [Zero(), QuadraticEnergy(torch.eye(2), torch.zeros(2))])
    half.fit(X, iterations=3, progress=False)
    assert half.sample(3, steps=3).shape == (3, 1, 4, 4)


def test_inside_inference_mode_no_grad_and_after_eval() -> None:
    prior = trained_looking()
    with torch.inference_mode():
        x = X.clone()
        assert prior.sample(3, steps=3).shape == (3, 1, 4, 4)
        held = prior.sample_latents(3, prior="generator")[2].clone()
        assert torch.equal(prior.sample_latents(3, given={3: held}, steps=2)[2], held)
        assert prior.sample_posterior(x, steps=3)[0].shape == (4, 3)
        assert prior.llr_score(x, 1, steps=2).shape == (4,)
    with torch.no_grad():
        prior.eval()
        before = torch.cat([p.flatten().clone() for p in prior.parameters()])
        prior.fit(MANY, iterations=3, step_size=0.2, progress=False)
        assert not torch.equal(before, torch.cat([p.flatten() for p in prior.parameters()]))
    assert not any(m.training for m in prior.modules()), "flags are as they were"


def test_spectral_norm_holds_after_a_fit_that_began_in_eval_mode() -> None:
    vae = LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8)
    prior = JointEBMPrior(vae, [MLPEnergy(s, hidden=(16,), spectral_norm=True) for s in vae.latent_shapes]).eval()
    prior.fit(MANY, iterations=60, learning_rate=0.02, ema_decay=0.0, step_size=0.2, progress=False)
    for f in prior.energies:
        assert isinstance(f, MLPEnergy)
        norm = torch.linalg.matrix_norm(f.net[1].weight.detach(), 2)  # type: ignore[union-attr,arg-type]
        assert float(norm) == pytest.approx(1.0, abs=0.1)


def test_a_generator_moved_alone_is_told() -> None:
    prior = trained_looking()
    assert isinstance(prior.generator, LadderVAE)
    prior.generator.double()
    with pytest.raises(ValueError, match=r"generator: it is torch.float64 on cpu, but the energies are .*prior.to"):
        prior.sample(2)


def test_a_further_fit_forgets_the_calibration() -> None:
    prior = trained_looking()
    prior.fit(MANY, iterations=3, step_size=0.2, progress=False)
    x = torch.rand(200, 1, 1, 1) * torch.rand(200, 1, 4, 4)
    prior.calibrate(x)
    assert prior.threshold(0.5) > 0
    prior.fit(MANY, iterations=3, step_size=0.2, progress=False)
    with pytest.raises(ValueError, match="needs prior.calibrate"):
        prior.anomaly_score(X, "tails")


def test_a_score_that_is_not_finite_is_told() -> None:
    prior = trained_looking()
    with torch.no_grad():
        prior.energies[1].net[-1].bias.fill_(float("inf"))  # type: ignore[union-attr]
    with pytest.raises(DivergenceError, match="the energy f of layer 2") as caught:
        prior.anomaly_score(X)
    assert caught.value.layer == 2


def test_the_last_step_of_an_unadjusted_chain_is_looked_at_too() -> None:
    class Quartic(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z.pow(4).sum(1)

    class Flat(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return -0.5 * z.square().sum(1)

    vae = LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8)
    prior = JointEBMPrior(vae, [Flat(), Quartic()])
    caught, steps = None, 0
    for steps in range(2, 9):
        try:
            z = prior.sample_latents(64, steps=steps, step_size=0.9, rng=torch.Generator().manual_seed(0))
        except DivergenceError as error:
            caught = error
            break
        assert torch.isfinite(prior.negative_energy(z)).all()
    assert caught is not None
    assert caught.layer == 2, "the layer that exploded, not the one that it dragged along"
    assert caught.step is not None
    assert caught.step <= steps


@pytest.mark.parametrize("space", ["noise", "latent"])
def test_no_steps_are_the_start(space: Any) -> None:
    """steps=0: the generator's own prior, by the same draws and in one pass; with a start, that start."""
    vae = LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8)
    prior = JointEBMPrior(vae, space=space)

    def seed() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    own = prior.sample_latents(5, prior="generator", rng=seed())
    here = prior.sample_latents(5, steps=0, rng=seed())
    for a, b in zip(own, here, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(prior.sample(5, steps=0, rng=seed()), prior.sample(5, prior="generator", rng=seed()))
    torch.testing.assert_close(prior.sample(5, steps=0, rng=seed()), prior.decode(here))
    for a, b in zip(prior.sample_latents(5, steps=0, start=own), own, strict=True):
        torch.testing.assert_close(a, b)
    kept = prior.sample_latents(5, steps=0, given={1: own[0]})
    assert torch.equal(kept[0], own[0])
    passes = []
    original = LadderVAE.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LadderVAE, "start", lambda self, n: (passes.append(n) if n == 5 else None, original(self, n))[1])
        prior.sample(5, steps=0)
    assert len(passes) == 2  # where the draws' shapes are read, and the pass itself


def test_decode_and_reconstruct() -> None:
    prior = trained_looking()
    z = prior.sample_latents(20, steps=2)
    x = prior.decode(z)
    assert x.shape == (20, 1, 4, 4)
    torch.testing.assert_close(prior.decode(z, max_memory=1.0), x)
    noisy = [prior.decode(z, decode="sample", rng=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])
    here = prior.sample_posterior(X, method="infer", rng=torch.Generator().manual_seed(0))
    torch.testing.assert_close(prior.reconstruct(X, rng=torch.Generator().manual_seed(0)), prior.decode(here))


@pytest.mark.parametrize("call", ["sample", "decode", "reconstruct"])
def test_observations_that_are_not_finite_are_told(call: str) -> None:
    prior = trained_looking()
    with torch.no_grad():
        next(prior.generator.decoder.parameters())[0] = float("nan")  # type: ignore[union-attr]
    latents = [torch.zeros(4, d) for d in (3, 2, 2)]
    calls: dict[str, Callable[[], Tensor]] = {
        "sample": lambda: prior.sample(2),
        "decode": lambda: prior.decode(latents),
        "reconstruct": lambda: prior.reconstruct(X),
    }
    with pytest.raises(DivergenceError, match="decoded observations are NaN or infinite"):
        calls[call]()


def test_numpy_observations_are_converted() -> None:
    prior = trained_looking()
    for array in (X.numpy(), X.double().numpy(), X.numpy().astype("float16")):
        expected = torch.tensor(array, dtype=torch.float32)
        score = prior.anomaly_score(array, rng=torch.Generator().manual_seed(0))
        torch.testing.assert_close(score, prior.anomaly_score(expected, rng=torch.Generator().manual_seed(0)))
    with pytest.raises(ArgumentError, match="x: expected floating-point numbers, got an array of uint8. Scale it"):
        prior.anomaly_score((255 * X).to(torch.uint8).numpy())


def test_what_a_prior_says_of_itself() -> None:
    prior = trained_looking(torch.float64, "latent")
    assert repr(prior) == (
        'JointEBMPrior(LadderVAE; z_1 (3,) MLPEnergy, z_2 (2,) MLPEnergy, z_3 (2,) MLPEnergy; space="latent", step_size=0.3)'
    )
    assert (prior.device, prior.dtype) == (torch.device("cpu"), torch.float64)


@pytest.mark.parametrize("name", ["generator", "energies", "space", "x_shape"])
def test_what_a_prior_was_built_with_cannot_be_exchanged(name: str) -> None:
    prior = trained_looking()
    before = [name for name, _ in prior.named_parameters()]
    with pytest.raises(ArgumentError, match=f"{name}: a prior keeps what it was built with"):
        setattr(prior, name, getattr(prior, name))
    assert [name for name, _ in prior.named_parameters()] == before
    assert not prior.trained_jointly


class Passes(nn.Module):
    """A wrapper that passes attributes on, as `torch.compile` of a module does."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inside"), name)


@pytest.mark.parametrize("wrap", [torch.compile, Passes])
def test_wrapped_generators_are_the_model_inside(tmp_path: Path, wrap: Any) -> None:
    torch.manual_seed(0)
    vae = LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8)
    prior = JointEBMPrior(wrap(vae))
    prior.fit(MANY, "variational", iterations=2, steps=2, step_size=0.2, progress=False)
    assert {name for name in prior.state_dict() if "_orig_mod" in name or "inside" in name} == set()
    prior.save(tmp_path / "joint.safetensors")
    again = JointEBMPrior.load(tmp_path / "joint.safetensors", LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8))
    assert all(torch.equal(a, b) for a, b in zip(prior.state_dict().values(), again.state_dict().values(), strict=True))
    separate = JointEBMPrior(vae)
    separate.save(tmp_path / "p.safetensors")
    JointEBMPrior.load(tmp_path / "p.safetensors", wrap(vae))


@pytest.mark.slow
def test_compiled_parts_and_energies_have_the_names_of_what_is_inside(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8)
    plain = JointEBMPrior(vae)
    plain.save(tmp_path / "p.safetensors")
    vae.decoder = torch.compile(vae.decoder)  # type: ignore[assignment]
    energies = [torch.compile(MLPEnergy(shape)) for shape in vae.latent_shapes]
    prior = JointEBMPrior.load(tmp_path / "p.safetensors", vae, energies)  # type: ignore[arg-type]
    prior.save(tmp_path / "q.safetensors")
    again = JointEBMPrior.load(tmp_path / "q.safetensors", vae)
    assert all(isinstance(f, MLPEnergy) for f in again.energies)


def test_a_wrapper_that_hides_the_calls_is_told() -> None:
    hidden = nn.DataParallel(LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8))
    with pytest.raises(GeneratorError, match=r"DataParallel hides the calls of the model inside it. Pass its `.module`"):
        JointEBMPrior(hidden)  # type: ignore[arg-type]


def test_a_wrapper_with_a_call_of_its_own_is_kept() -> None:
    class Warm(Passes):
        def likelihood(self, state: Tensor) -> Any:
            return self.inside.likelihood(state / 2)  # type: ignore[operator]

    warm = Warm(LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8))
    assert JointEBMPrior(warm).generator is warm  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(GeneratorError, match=rf"in torch.float32 or torch.float64, got {dtype}.*model.float\(\)"):
        JointEBMPrior(LadderVAE((1, 4, 4), latent_dims=(3, 2), hidden=8).to(dtype))
    prior = trained_looking().to(dtype)
    with pytest.raises(GeneratorError, match=f"expected latents in torch.float32 or torch.float64, got {dtype}"):
        prior.sample(2)


@pytest.mark.parametrize("name", [n for n in RANDOM if n not in ("fit", "infer")])
def test_autocast_changes_nothing(name: str) -> None:
    draw, prior = RANDOM[name], trained_looking()
    alone = draw(copy.deepcopy(prior), torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = draw(copy.deepcopy(prior), torch.Generator().manual_seed(0))
    assert inside.dtype == torch.float32
    assert torch.equal(alone, inside)


def test_autocast_changes_no_density() -> None:
    prior, z = trained_looking(), [torch.ones(2, d) for d in (3, 2, 2)]
    expected = prior.log_density(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prior.log_density(z), expected)
        JointEBMPrior(prior.generator)


@pytest.mark.parametrize("name", RANDOM)
def test_torchs_default_device_changes_nothing(name: str) -> None:
    draw, prior = RANDOM[name], trained_looking()
    alone = draw(copy.deepcopy(prior), torch.Generator().manual_seed(0))
    torch.set_default_device("meta")
    try:
        inside = draw(copy.deepcopy(prior), torch.Generator().manual_seed(0))
    finally:
        torch.set_default_device(None)
    assert torch.equal(alone, inside)
