"""A small model of our own with the interface of vlievin/biva-pytorch: what the adapter calls, and its own passes.

Written against that interface, not from its code. It has the traps of the original: blocks that empty the list of skip
connections they are given, and layers that set their weights by the first batch they see.
"""

from __future__ import annotations

__all__ = ["DeepVae", "Ran", "ready"]

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal

WIDTH, SIDE = 6, 4


class Ran(NamedTuple):
    """What a pass gives: log q and log p, z_1 first, each (batch,), and the parameters of p(x | z)."""

    log_q: list[Tensor]
    log_p: list[Tensor]
    parameters: Tensor


class SetByData(nn.Module):
    """A 1 × 1 convolution that takes its gain from the first batch that it sees."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.register_buffer("initialized", torch.tensor(False))
        self.weightnorm = True
        self.conv, self.gain = nn.Conv2d(source, target, 1), nn.Parameter(torch.ones(target, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if not self.initialized:
            self.gain.data = 1 / (y.detach().std((0, 2, 3)).view(-1, 1, 1) + 0.5)
            self.initialized = torch.tensor(True)
        return self.gain * y


class Latent(nn.Module):
    """Some units, alone or for each pixel: q and p of features, and the prior of the top; `given` is taken for the draw."""

    prior: Tensor

    def __init__(self, units: int, dense: bool, top: bool, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.output_shape = (-1, units) if dense else (-1, units, SIDE, SIDE)
        self.act = act
        self.qx2z = Dense(2 * units) if dense else SetByData(WIDTH, 2 * units)
        if top:
            prior = torch.linspace(-0.4, 0.4, 2 * units)
            self.register_buffer("prior", prior if dense else prior.view(-1, 1, 1).repeat(1, SIDE, SIDE))
        else:
            self.px2z = Dense(2 * units) if dense else SetByData(WIDTH, 2 * units)

    def forward(
        self, x: Tensor | None, inference: bool, sample: bool = True, N: int | None = None, given: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Any]]:
        if x is None:
            mu, log_var = self.prior.expand(N or 1, *self.prior.shape).chunk(2, 1)
        else:
            mu, raw = (self.qx2z if inference else self.px2z)(torch.tanh(x)).chunk(2, 1)
            log_var = self.act(raw)
        dist = Normal(mu, (log_var / 2).exp())
        z = (dist.rsample() if given is None else given) if sample else None
        return z, {"z": z, "dist": dist}


class Dense(nn.Linear):
    """Of all features at once."""

    def __init__(self, target: int) -> None:
        super().__init__(WIDTH * SIDE * SIDE, target)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(1))


def lifted(units: int, dense: bool) -> nn.Module:
    """z -> features."""
    if dense:
        return nn.Sequential(nn.Linear(units, WIDTH * SIDE * SIDE), nn.Unflatten(1, (WIDTH, SIDE, SIDE)))
    return SetByData(units, WIDTH)


class Joined(nn.Module):
    """Features, with others where there are any."""

    def __init__(self, source: int, beside: int) -> None:
        super().__init__()
        self.own, self.other = SetByData(source, WIDTH), SetByData(beside, WIDTH) if beside else None

    def forward(self, h: Tensor, aux: Tensor | None = None) -> Tensor:
        h = self.own(h)
        return torch.tanh(h if aux is None or self.other is None else h + self.other(aux))


class Blocks(nn.Module):
    """Two blocks, which take skip connections off the list that they are given, and give back a new one."""

    def __init__(self, skips: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Joined(WIDTH, WIDTH if skips else 0) for _ in range(2))
        self.skips = skips

    def forward(self, x: Tensor, aux: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        found: list[Tensor] = []
        for layer in self.layers:
            x = layer(x, aux.pop() if self.skips and aux is not None else None)
            found.insert(0, x)
        return x, found


class OneStage(nn.Module):
    """A stage of the kind "vae", "lvae" or "biva"; the top one of "biva" has one latent."""

    def __init__(self, kind: str, index: int, stages: int, channels: int, dense: bool, options: dict[str, Any]) -> None:
        super().__init__()
        top, source, units = index == stages - 1, WIDTH if index else channels, 3 - index % 2
        no_skip, conditional = options["no_skip"], options["conditional_bu"]
        self.kind, self._no_skip, self.two = kind, no_skip, kind == "biva" and not top
        beside = 0 if no_skip or not index else (2 * WIDTH if kind == "biva" else WIDTH)
        self.q_convs = Joined(source, beside)
        self.p_convs = Blocks(not (no_skip or top))
        if kind == "biva":
            self.q_td_convs = Joined(source, WIDTH)
        if self.two:
            self.bu_stochastic = Latent(units, dense, False, options["act"])
            self.td_stochastic = Latent(units, dense, False, options["act"])
            self.bu_proj, self.z_proj = lifted(units, dense), lifted(2 * units, dense)
            self.merge = Joined(WIDTH, WIDTH)
            self.bu_condition = Joined(units, WIDTH) if conditional else None
            return
        self.stochastic = Latent(units, dense, top, options["act"])
        if kind == "biva":
            self.q_top, self.z_proj = SetByData(2 * WIDTH, WIDTH), lifted(units, dense)
            return
        self.p_proj = lifted(units, dense)
        if kind == "vae":
            self.q_proj = lifted(units, dense)
        else:
            self.merge = Joined(WIDTH, 0 if top else WIDTH)

    def infer(self, data: dict[str, Tensor], given: Tensor | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """On the way up: what the next stage sees, and what there is of the posterior."""
        aux = None if self._no_skip else data.get("aux")
        h = self.q_convs(data.get("x_bu", data.get("x")), aux)
        if self.kind == "lvae":
            return {"x": h, "aux": h}, {"h": h}
        if self.kind == "vae":
            z, q = self.stochastic(h, inference=True, given=given)
            return {"x": self.q_proj(z), "aux": h}, q
        down = self.q_td_convs(data.get("x_td", data.get("x")), h)
        both = torch.cat([h, down], 1)
        if not self.two:
            return {}, self.stochastic(self.q_top(both), inference=True, given=given)[1]
        z, q = self.bu_stochastic(h, inference=True, given=given)
        return {"x_bu": self.bu_proj(z), "x_td": down, "aux": both}, {"z_bu": z, "bu": q, "td": {"z": z, "h": down}}


class DeepVae(nn.Module):
    """Three stages on images of 4 × 4, padded from 2 × 2 with `padded`, without a change of resolution."""

    stages: Any
    unpad: list[int]

    def __init__(
        self,
        Stage: str = "biva",
        stages: int = 3,
        tensor_shp: tuple[int, ...] = (-1, 1, SIDE, SIDE),
        features_out: int | None = None,
        padded: bool = False,
        dense: bool = False,
        no_skip: bool = False,
        conditional_bu: bool = False,
        lambda_init: Callable[[Tensor], Tensor] | None = None,
        log_var_act: Callable[[Tensor], Tensor] = F.softplus,
    ) -> None:
        super().__init__()
        self.input_tensor_shape, self.lambda_init = tensor_shp, lambda_init
        self.pad = [(SIDE - n) // 2 for n in reversed(tensor_shp[2:]) for _ in range(2)] if padded else None
        if self.pad is not None:
            self.unpad = [-n for n in self.pad]
        channels = tensor_shp[1]
        options = {"no_skip": no_skip, "conditional_bu": conditional_bu, "act": log_var_act}
        self.stages = nn.ModuleList(OneStage(Stage, i, stages, channels, dense, options) for i in range(stages))
        self.projection = nn.Sequential(nn.ELU(), SetByData(WIDTH, features_out or channels))

    def forward(self, x: Tensor) -> dict[str, Any]:
        """The parameters of p(x | z), and log q − log p of every layer, z_1 first."""
        ran = self.run(x, len(x))
        return {"x_": ran.parameters, "kl": [q - p for q, p in zip(ran.log_q, ran.log_p, strict=True)]}

    def sample_from_prior(self, N: int) -> dict[str, Any]:
        """The parameters of p(x | z) for draws of the prior."""
        return {"x_": self.run(None, N).parameters}

    def run(self, x: Tensor | None, n: int, given: Sequence[Tensor] | None = None) -> Ran:
        """A whole pass, of observations or from the prior, with its own draws or through latents, z_1 first."""
        left: list[Any] = list(given) if given is not None else [None] * (2 * len(self.stages))
        z_of = [{name: left.pop(0) for name in _latents(stage)} for stage in self.stages]
        found: list[Any] = [None] * len(self.stages)
        if x is not None:
            x = F.pad(x, self.pad) if self.pad is not None else x
            data = {"x": x if self.lambda_init is None else self.lambda_init(x)}
            for i, stage in enumerate(self.stages):
                data, found[i] = stage.infer(data, z_of[i].get("bu", z_of[i].get("z")))
        log_q, log_p, d, skips = [], [], None, None
        for stage, posterior, z in list(zip(self.stages, found, z_of, strict=True))[::-1]:
            drawn: list[Tensor] = []
            for name in _latents(stage)[::-1]:  # of two the top-down one first
                part = {"bu": "bu_stochastic", "td": "td_stochastic", "z": "stochastic"}[name]
                above = stage.bu_condition(drawn[0], aux=d) if name == "bu" and stage.bu_condition is not None else d
                value, p = getattr(stage, part)(above, inference=False, sample=posterior is None, N=n, given=z[name])
                if posterior is not None:
                    q = posterior if name == "z" else posterior[name]
                    if "h" in q:
                        _, q = getattr(stage, part)(stage.merge(q["h"], aux=d), inference=True, given=z[name])
                    value = q["z"]
                    log_q.insert(0, total(q["dist"].log_prob(value)))
                log_p.insert(0, total(p["dist"].log_prob(value)))
                drawn.append(value)
            lift = stage.z_proj if stage.kind == "biva" else stage.p_proj
            d, skips = stage.p_convs(lift(torch.cat(drawn, 1)), aux=None if stage._no_skip else skips)
        parameters = self.projection(d)
        return Ran(log_q, log_p, F.pad(parameters, self.unpad) if self.pad is not None else parameters)


def _latents(stage: Any) -> tuple[str, ...]:
    return ("bu", "td") if stage.two else ("z",)


def total(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1)


def ready(model: DeepVae) -> DeepVae:
    """In evaluation mode, run once, so that its weights are set."""
    with torch.no_grad():
        model.eval()(torch.rand(16, *model.input_tensor_shape[1:]))
    return model
