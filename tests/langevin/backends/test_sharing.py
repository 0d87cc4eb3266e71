"""Which graphs are compiled once."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.compile_fx
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from energy_prior.langevin.backends._sharing import Sharing


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The graphs that reach the compiler, which here leaves them as they are."""
    graphs: list[Any] = []

    def compile_fx(graph: Any, inputs: Any, config_patches: Any) -> Callable[..., Any]:
        graphs.append(graph)

        def run(*inputs: Any) -> Any:
            return graph.forward(*inputs)

        return run

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    torch._dynamo.reset()
    yield graphs
    alive.clear()
    torch._dynamo.reset()


alive: list[Callable[..., Tensor]] = []


def run(backend: Sharing, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """By a compiled form of its own."""

    def own(*arguments: Any) -> Tensor:
        return function(*arguments)

    code = types.FunctionType(own.__code__.replace(), own.__globals__, "own", None, own.__closure__)
    alive.append(torch.compile(code, backend=backend, fullgraph=True, dynamic=False))
    return alive[-1](*arguments)


def layer(net: nn.Module, x: Tensor) -> Tensor:
    return x + torch.tanh(net(x))


def test_layers_that_are_alike_are_compiled_once(compiled: list[Any]) -> None:
    """Each runs with its own parameters, also after they have changed."""
    backend, x, nets = Sharing({}), torch.randn(2, 3), [nn.Linear(3, 3) for _ in range(3)]
    for net in nets:
        assert torch.equal(run(backend, layer, net, x), layer(net, x))
    with torch.no_grad():
        nets[0].weight.mul_(2.0)
    assert torch.equal(run(backend, layer, nets[0], x), layer(nets[0], x))
    assert len(compiled) == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda net, x: x + torch.sigmoid(net(x)),
        lambda net, x: x + 2 * torch.tanh(net(x)),
        lambda net, x: torch.tanh(net(x)) + x,
        lambda net, x: torch.cat([x, torch.tanh(net(x))]),
        lambda net, x: torch.cat([torch.tanh(net(x)), x]),
    ],
)
def test_other_operations_are_compiled_anew(other: Callable[..., Tensor], compiled: list[Any]) -> None:
    backend, x, net = Sharing({}), torch.randn(2, 3), nn.Linear(3, 3)
    for function in (layer, other):
        torch.testing.assert_close(run(backend, function, net, x), function(net, x))
    assert len(compiled) == 2


@pytest.mark.parametrize(
    "other",
    [
        torch.randn(4, 3),
        torch.randn(3, 2).T,
        torch.randn(2, 3, dtype=torch.float64),
        torch.randn(2, 3).requires_grad_(),
        torch.randn(2, 3).requires_grad_().tanh(),
        torch.randn(3, 3)[1:],
    ],
    ids=["shape", "strides", "dtype", "gradient", "not a leaf", "offset"],
)
@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf")
def test_other_inputs_are_compiled_anew(other: Tensor, compiled: list[Any]) -> None:
    backend = Sharing({})
    for x in (torch.randn(2, 3).requires_grad_(not other.is_leaf), other):
        run(backend, torch.tanh, x)
    assert len(compiled) == 2


def test_inputs_that_share_memory_are_compiled_anew(compiled: list[Any]) -> None:
    backend, whole = Sharing({}), torch.randn(2, 2, 3)
    for x, y in ((whole[0], torch.randn(2, 3)), (whole[0], whole[1].clone()), (whole[0], whole[0].view(2, 3))):
        run(backend, torch.add, x, y)
    assert len(compiled) == 2


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "setting",
    [lambda: torch.autocast("cpu", torch.bfloat16), torch.no_grad, lambda: threads(torch.get_num_threads() + 1)],
    ids=["autocast", "no_grad", "threads"],
)
def test_other_settings_are_compiled_anew(setting: Callable[[], Any], compiled: list[Any]) -> None:
    backend, x, net = Sharing({}), torch.randn(2, 3), nn.Linear(3, 3)
    run(backend, layer, net, x)
    with setting():
        assert torch.equal(run(backend, layer, net, x), layer(net, x))
    assert len(compiled) == 2


def test_graphs_with_parts_of_their_own_are_not_shared(compiled: list[Any]) -> None:
    """What a checkpoint computes again is a part of its graph, which is not looked into."""
    backend, x = Sharing({}), torch.randn(2, 3, requires_grad=True)
    for net in (nn.Linear(3, 3), nn.Linear(3, 3)):
        run(backend, lambda net, x: checkpoint(net, x, use_reentrant=False), net, x)
    assert len(compiled) == 2


def test_arguments_that_may_be_more_than_they_show_are_not_shared(compiled: list[Any]) -> None:
    class Setting:
        def __repr__(self) -> str:
            return "setting"

    backend, x = Sharing({}), torch.randn(2)
    for _ in range(2):
        graph = fx.Graph()
        graph.output(graph.call_function(torch.add, (graph.placeholder("x"), Setting())))  # type: ignore[arg-type]
        backend(fx.GraphModule({}, graph), [x])
    assert len(compiled) == 2
