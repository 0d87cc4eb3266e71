"""Updates launched as one graph against updates kernel by kernel: on a GPU CUDA's own graphs, elsewhere tapes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tapes import Tape, record_on_tapes
from torch import Tensor, nn

from energy_prior import BackendWarning, FitResult, JointEBMPrior, ResidualVAE
from energy_prior.training.recorded import RecordedLoss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    return record_on_tapes(monkeypatch) if DEVICE == "cpu" else []


def small() -> JointEBMPrior:
    torch.manual_seed(0)
    vae = ResidualVAE((1, 8, 8), groups=(1, 1), channels=8, latent_channels=2).to(DEVICE).eval()
    return JointEBMPrior(vae)


def fitted(prior: JointEBMPrior, **settings: Any) -> FitResult:
    data = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"iterations": 8, "batch_size": 16, "log_every": 1, "step_size": 0.1, "progress": False}
    return prior.fit(data, "denoising", rng=torch.Generator().manual_seed(2), **options | settings)


def weights(prior: JointEBMPrior) -> Tensor:
    return torch.cat([p.detach().flatten() for p in prior.energies.parameters()])


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}], ids=["plain", "two batches an update"])
def test_a_recorded_run_learns_what_a_plain_one_does(
    settings: dict[str, Any], recordings: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tapes number for number, as they draw from the same stream; on a GPU the loss falls as it does there."""
    prior = small()
    before = weights(prior)
    history = fitted(prior, **settings).history
    assert DEVICE == "cuda" or len(recordings) == 1
    again = small()
    fitted(again, **settings)
    assert (weights(again) - weights(prior)).norm() < 0.1 * (weights(prior) - before).norm()  # TF32 adds in no fixed order
    monkeypatch.setattr("energy_prior.training.recorded.DEVICES", ())
    plain = small()
    losses, expected = (torch.tensor([entry["loss"] for entry in h]) for h in (history, fitted(plain, **settings).history))
    torch.testing.assert_close(losses.mean(), expected.mean(), rtol=0.2, atol=0.0)
    assert len(losses.unique()) == len(losses), "every launch draws its own noise"
    if DEVICE == "cpu":
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights(prior), weights(plain), rtol=1e-4, atol=1e-6)


def quadratic() -> tuple[nn.Linear, Any]:
    net = nn.Linear(3, 1).to(DEVICE)

    def loss(inputs: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        y = net(inputs[0])
        return y.square().mean(), {"largest_y": y.amax()}

    return net, loss


def test_gradient_and_figures_are_those_of_the_weights_and_inputs_of_now(recordings: list[Tape]) -> None:
    net, loss = quadratic()
    recorded = RecordedLoss(loss, list(net.parameters()))
    kept = []
    for _ in range(3):
        x = torch.randn(5, 3, device=DEVICE)
        for call in (recorded, loss):
            value, figures = call([x])
            kept.append((value, figures["largest_y"], *torch.autograd.grad(3 * value, list(net.parameters()))))
        with torch.no_grad():
            net.weight.mul_(2)
    for ours, theirs in zip(kept[::2], kept[1::2], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert DEVICE == "cuda" or len(recordings) == 1


def test_other_shapes_other_places_and_autocast_are_not_launched(recordings: list[Tape]) -> None:
    net, loss = quadratic()
    recorded = RecordedLoss(loss, list(net.parameters()))
    recorded([torch.randn(5, 3, device=DEVICE)])
    x = torch.randn(4, 3, device=DEVICE)
    torch.testing.assert_close(recorded([x])[0], loss([x])[0])
    x = torch.randn(5, 3, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(recorded([x])[0], loss([x])[0])
    net.weight.data = 2 * net.weight.data
    torch.testing.assert_close(recorded([x])[0], loss([x])[0])


def test_what_cannot_be_recorded_runs_as_it_is_with_one_warning(recordings: list[Tape]) -> None:
    net, loss = quadratic()

    def asking(inputs: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return loss(inputs if float(inputs[0].sum()) < 1e9 else [])

    recorded, x = RecordedLoss(asking, list(net.parameters())), [torch.randn(5, 3, device=DEVICE)]
    other = RecordedLoss(loss, list(net.parameters()))
    other(x)
    with pytest.warns(BackendWarning, match="cannot be recorded as a CUDA graph"):
        recorded(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(recorded(x)[0], loss(x)[0])
        torch.testing.assert_close(other(x)[0], loss(x)[0])  # recorded again: what was recorded before is void
    assert torch.randn(3, device=DEVICE).isfinite().all()
    assert DEVICE == "cuda" or len(recordings) == 3


def test_energies_with_hooks_are_not_recorded(recordings: list[Tape]) -> None:
    """Their Python runs in every update."""
    prior, calls = small(), []
    prior.energies[0].register_forward_hook(lambda *_: calls.append(1))
    fitted(prior)
    assert recordings == []
    assert len(calls) >= 8
