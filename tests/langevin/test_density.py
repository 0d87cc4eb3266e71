"""Targets and their densities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ladders import LinearLadder
from small_priors import N, lively, mlp, target_of
from torch import Tensor, nn

from energy_prior import JointEBMPrior, LadderVAE
from energy_prior._util import not_none
from energy_prior.process import frozen


@pytest.mark.parametrize(
    ("held", "observed", "free", "informed"),
    [
        ((), False, (1, 2, 3), False),
        ((3,), False, (1, 2), False),
        ((1,), False, (2, 3), True),
        ((2, 3), False, (1,), False),
        ((1, 2, 3), False, (), False),
        ((2, 3), True, (1,), True),
    ],
)
def test_what_is_free_and_what_depends_on_it(held: tuple[int, ...], observed: bool, free: Any, informed: bool) -> None:
    prior = lively(LadderVAE((6,), latent_dims=(4, 3, 2), hidden=8))
    fixed = {i: torch.randn(N, (4, 3, 2)[i - 1]).double() for i in held}
    target = target_of(prior, held=fixed, x=torch.rand(N, 6).double() if observed else None)
    assert (target.free, target.informed) == (free, informed)
    assert target.shapes == tuple((N, (4, 3, 2)[i - 1]) for i in free)
    if free:
        assert target.density().topdown.free == free


def test_rows_of_a_target_are_rows_of_its_density() -> None:
    prior = lively(mlp())
    target = target_of(prior, held={1: torch.randn(N, 4).double()}, x=torch.rand(N, 6).double())
    position = (torch.randn(N, 3).double(),)
    with torch.no_grad(), frozen(prior, prior.generator):
        whole = target.density().evaluate(position)
        for rows in (slice(0, 2), slice(2, N)):
            part = target.rows(rows)
            assert part.batch_size == rows.stop - rows.start
            own = part.density().evaluate([p[rows] for p in position])
            torch.testing.assert_close(own.gradient[0], whole.gradient[0][rows])
            torch.testing.assert_close(not_none(own.log_density), not_none(whole.log_density)[rows])
    assert target.rows(slice(0, 100)).batch_size == N


def test_a_density_is_evaluated_without_its_layers_above() -> None:
    """They are passed through once, when it is made."""
    calls: list[int] = []

    class Counted(LinearLadder):
        def conditional(self, state: Tensor, layer: int) -> Any:
            calls.append(layer)
            return super().conditional(state, layer)

    prior = lively(Counted((2, 2, 2), seed=1))
    target = target_of(prior, held={3: torch.randn(N, 2).double()})
    calls.clear()
    density = target.density()
    assert calls == [3, 2]
    with torch.no_grad(), frozen(prior, prior.generator):
        for _ in range(3):
            density.evaluate([torch.randn(N, 2).double() for _ in range(2)])
    assert calls == [3, 2, 1, 1, 1]


def test_the_gradient_is_that_of_the_log_density() -> None:
    """Beside the Gaussian of noise space."""
    x = torch.rand(N, 6).double()
    for space in ("noise", "latent"):
        prior = lively(mlp(), space=space)
        with frozen(prior, prior.generator):
            density = target_of(prior, x=x).density()
            position = tuple(torch.randn(N, d).double() for d in (4, 3))
            found = density.evaluate(position)
            for i, p in enumerate(position):
                step = torch.zeros_like(p)
                step[:, 1] = 1e-5
                ends = [
                    not_none(density.evaluate(tuple(q + s * step if i == j else q for j, q in enumerate(position))).log_density)
                    for s in (1, -1)
                ]
                slope = found.gradient[i][:, 1] - (p[:, 1] if space == "noise" else 0.0)
                torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-6)


class Squared(torch.autograd.Function):
    """Written as functions for autograd alone are: torch.func refuses it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grads[0]


class Quadratic(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return -Squared.apply(z).flatten(1).sum(1)  # type: ignore[union-attr]


def test_gradients_while_another_thread_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compiler.is_compiling() is then true in every thread."""
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    prior = JointEBMPrior(LinearLadder((3, 2)), [Quadratic(), Quadratic()]).double()
    with torch.no_grad(), frozen(prior, prior.generator):
        density = target_of(prior).density()
        position = [torch.randn(shape).double() for shape in density.topdown.shapes]
        assert all(bool(g.abs().sum() > 0) for g in density.evaluate(position).gradient)
