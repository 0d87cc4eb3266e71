"""BIVA (Maaløe et al., NeurIPS 2019), and the VAE and LVAE beside it in the repository vlievin/biva-pytorch, as generators."""

from __future__ import annotations

__all__ = ["BIVAAdapter"]

from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal

from energy_prior._util import draw, not_none, plain_normal, sum_event
from energy_prior.adapters.base import Adapter
from energy_prior.adapters.likelihoods import mixture_of_logistics
from energy_prior.errors import ArgumentError, GeneratorError
from energy_prior.process import reproducible
from energy_prior.protocol import Inferred
from energy_prior.topdown import infer_top_down

_SOURCE = "a BIVA, LVAE or VAE (DeepVae) of vlievin/biva-pytorch"
_PARTS = ("stages", "projection", "input_tensor_shape", "pad", "lambda_init")
_TOP_DOWN, _BOTTOM_UP, _SINGLE = "td_stochastic", "bu_stochastic", "stochastic"
_Likelihood = Literal["bernoulli", "mixture"]


class _State(NamedTuple):
    """Above a layer: features and skip connections from the stage above, None above z_L, and the number of observations.

    `top_down` is the first latent of a stage with two, between the two; None elsewhere.
    """

    features: Tensor | None
    skips: tuple[Tensor, ...] | None
    top_down: Tensor | None
    batch: int


class BIVAAdapter(Adapter):
    """A `DeepVae` of vlievin/biva-pytorch: `BIVA`, `LVAE` or `VAE`.

    A stage of BIVA has a top-down latent and a bottom-up latent, but for the top stage, which has one: N stages are 2 N − 1
    layers. The bottom-up latent of a stage is the layer below its top-down latent:

        z_1 = z_1^BU,  z_2 = z_1^TD,  z_3 = z_2^BU,  z_4 = z_2^TD,  …,  z_L = z_N

        p(z_i^TD | z_{>i}) p(z_i^BU | z_i^TD, z_{>i}),   with `conditional_bu`; without it, z_i^BU does not depend on z_i^TD
        q(z | x) = q(z_1^BU | x) … q(z_N | z_{<N}^BU, x) ∏_i q(z_i^TD | z_{>i}, x)

    The order is that of the model's own list of KL terms. A stage of LVAE and VAE is one layer. σ = exp(softplus(·)/2), or
    whatever `log_var_act` the model has; z_L ~ N(0, I), or learned.

    Observations are in [0, 1]. The model gives the parameters of p(x | z) and does not say of which distribution, which is in
    the repository's script. With "mixture" the encoder and the likelihood see 2 x − 1.

    Args:
        model: the model, in evaluation mode, with its weights (`energy_prior.adapters.load_weights`).
        likelihood: "bernoulli", of the model's output as logits, as for binarised MNIST there; "mixture", PixelCNN++'s mixture
            of discretised logistics, as for CIFAR-10, with −0.999 and 0.999 in [−1, 1] as the edges of the lowest and the
            highest level. Override the method `likelihood` for another one.

    Raises:
        GeneratorError: if this is not such a model, is not in evaluation mode, or has never run: its layers set their weights
            by the first batch that they see.
        ArgumentError: if `likelihood` is neither.

    Examples:
        With `model`, a small `BIVA` of that code, that has run once and is in evaluation mode:

        >>> from energy_prior import JointEBMPrior
        >>> prior = JointEBMPrior(BIVAAdapter(model, likelihood="bernoulli"))
        >>> [tuple(z) for z in prior.generator.latent_shapes]
        [(3,), (3,), (2,), (2,), (3,)]
        >>> prior.sample(4, prior="generator").shape  # the model's own samples
        torch.Size([4, 1, 4, 4])
    """

    def __init__(self, model: nn.Module, *, likelihood: _Likelihood) -> None:
        super().__init__(model, _PARTS, _SOURCE)
        if likelihood not in get_args(_Likelihood):
            raise ArgumentError(f'likelihood: expected "bernoulli" or "mixture", got {likelihood!r}.')
        self.kind: str = likelihood
        self._places: list[tuple[int, str]] = []  # of z_1, …, z_L: a stage, and its part for the layer
        for i, stage in enumerate(self.model.stages):
            parts = [name for name in (_BOTTOM_UP, _TOP_DOWN, _SINGLE) if hasattr(stage, name)]
            if not parts or not hasattr(stage, "p_convs"):
                raise GeneratorError(
                    f"model: expected {_SOURCE}, but its stage {i + 1}, a {type(stage).__name__}, is none of it."
                )
            self._places += [(i, name) for name in parts]
        waiting = [n for n, part in self.model.named_modules() if _waits(part)]
        if waiting:
            raise GeneratorError(
                f"model: {len(waiting)} of its layers, such as {waiting[0]}, will set their weights by the first batch that "
                "they see. Load the weights of a trained model, or run model(x) once on observations of the data."
            )
        shapes = [getattr(self.model.stages[i], name).output_shape[1:] for i, name in self._places]
        self.latent_shapes: tuple[torch.Size, ...] = tuple(torch.Size(int(n) for n in shape) for shape in shapes)
        self.x_shape: torch.Size = torch.Size(int(n) for n in self.model.input_tensor_shape[1:])

    def extra_repr(self) -> str:
        """The likelihood."""
        return f"likelihood={self.kind!r}"

    def start(self, batch_size: int) -> _State:
        """The state above z_L: nothing yet but the number of observations."""
        return _State(None, None, None, batch_size)

    def conditional(self, state: _State, layer: int) -> Normal:
        """p(z_i | z_{>i}) of layer i."""
        stage, name = self._place(layer)
        features = state.features
        if name == _BOTTOM_UP and stage.bu_condition is not None:
            features = stage.bu_condition(state.top_down, aux=features)
        return self._normal(getattr(stage, name), features, inference=False, batch=state.batch)

    def descend(self, state: _State, z: Tensor, layer: int) -> _State:
        """Below a stage's top-down latent, its z; below its last latent, through its deterministic blocks.

        These empty the list of skip connections that they are given: here a copy.
        """
        stage, name = self._place(layer)
        if name == _TOP_DOWN:
            return state._replace(top_down=z)
        project = stage.p_proj if hasattr(stage, "p_proj") else stage.z_proj
        latents = z if state.top_down is None else torch.cat([state.top_down, z], dim=1)
        skips = None if state.skips is None or stage._no_skip else list(state.skips)
        features, skips = stage.p_convs(project(latents), aux=skips)
        return _State(features, tuple(skips), None, state.batch)

    def likelihood(self, state: _State) -> Distribution:
        """p(x | z) of the model's output.

        Raises:
            GeneratorError: for "bernoulli", if the output has not the shape of an observation.
        """
        parameters = self._cast(self.model.projection(not_none(state.features)))
        if self.model.pad is not None:
            parameters = F.pad(parameters, self.model.unpad)
        if self.kind == "mixture":
            return mixture_of_logistics(parameters)
        if parameters.shape[1:] != self.x_shape:
            raise GeneratorError(
                f"model: its output has shape {tuple(parameters.shape[1:])}, and logits of a Bernoulli distribution have that "
                f'of an observation, {tuple(self.x_shape)}. With 10 M channels for M logistics, say likelihood="mixture".'
            )
        return Independent(Bernoulli(logits=parameters, validate_args=False), len(self.x_shape), validate_args=False)

    def infer(self, x: Tensor, *, rng: torch.Generator | None = None) -> Inferred:
        """z ~ q(z | x): the latents of a VAE and the bottom-up ones of BIVA on the way up, the others on the way down.

        Args:
            x: observations, (batch, *x_shape).
            rng: random number generator; None: torch's global stream.
        """
        seen = 2 * x - 1 if self.kind == "mixture" else x
        seen = seen if self.model.pad is None else F.pad(seen, self.model.pad)
        data: dict[str, Any] = {"x": seen if self.model.lambda_init is None else self.model.lambda_init(seen)}
        found: list[dict[str, Any]] = []
        with reproducible(rng, x.device):
            for stage in self.model.stages:
                data, here = stage.infer(data)
                found.append(here)

        def posterior(state: _State, p: Any, layer: int) -> tuple[Tensor, Tensor]:
            stage, name = self._place(layer)
            here = found[self._places[layer - 1][0]]
            here = here.get({_BOTTOM_UP: "bu", _TOP_DOWN: "td"}.get(name, ""), here)
            if "h" in here:  # of a posterior that is made on the way down
                return draw(self._normal(getattr(stage, name), stage.merge(here["h"], aux=state.features), inference=True))
            z, q = self._cast(here["z"]), here["dist"]
            return z, sum_event(plain_normal(self._cast(q.loc), self._cast(q.scale)).log_prob(z))

        return infer_top_down(self, len(x), posterior, rng)

    def _place(self, layer: int) -> tuple[Any, str]:
        """The stage that a layer is in, and the name of its part."""
        i, name = self._places[layer - 1]
        return self.model.stages[i], name

    def _normal(self, part: Any, features: Tensor | None, *, inference: bool, batch: int | None = None) -> Normal:
        """p or q of a stochastic layer of the model, by its own call; without features, the prior of the top."""
        _, found = part(features, inference=inference, sample=False, N=batch)
        return plain_normal(self._cast(found["dist"].loc), self._cast(found["dist"].scale))


def _waits(part: Any) -> bool:
    """Whether a module will set its weights by the first batch that it sees."""
    waiting = getattr(part, "initialized", None)
    return isinstance(waiting, Tensor) and bool(getattr(part, "weightnorm", False)) and not bool(waiting)
