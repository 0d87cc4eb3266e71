"""What a run says of itself: figures for the history, warnings before something goes wrong, likely causes when it did."""

from __future__ import annotations

__all__ = ["check_sound", "early_warnings", "energy_figures", "history_entry", "told_apart", "weight_share"]

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from energy_prior.energies import Energy
from energy_prior.errors import DivergenceError
from energy_prior.evaluate import effective_sample_size
from energy_prior.mismatch import SATURATED
from energy_prior.training.chains import TrainingChains
from energy_prior.training.config import FitConfig, Method

_FEW_WEIGHTS = 0.005
_HIGH_ENERGY = 0.5
_HIGH_SATURATION = 0.5
_SATURATED = 0.75
_LOW_ACCEPTANCE = 0.5
_WIDE_GAP = 25.0
_LEAST_APART = 1000.0


def weight_share(logits: Tensor) -> Tensor:
    """(Σw)²/(n Σw²) with w = e^logit, in (0, 1]: the share of prior draws that carry the ratio estimate, a scalar.

    The effective sample size of importance sampling (Kong, 1992) over n. Near 1/n, one draw outweighs all others: the two
    distributions hardly overlap, and the ratio is learned from almost nothing.
    """
    weights = torch.softmax(logits, 0)
    return 1 / (len(logits) * weights.square().sum())


def told_apart(positive: Tensor, negative: Tensor) -> Tensor:
    """Accuracy of the classifier that the ratio is learned by, in [0, 1], a scalar; ½ where the two cannot be told apart.

    Near 1 the logistic loss has hardly a gradient left, however far the logit is from the log ratio: the estimate is saturated
    (the density chasm of Rhodes, Xu and Gutmann, NeurIPS 2020).

    Args:
        positive: the logit at posterior draws, (batch,), nats.
        negative: the logit at draws of the prior, (batch,), nats.
    """
    return 0.5 * ((positive > 0).to(positive).mean() + (negative < 0).to(negative).mean())


def energy_figures(energies: Iterable[nn.Module], draws: Sequence[Tensor]) -> dict[str, Tensor]:
    """Of each layer the largest |f_i|, nats, and of built-in energies the largest mean |f_i| as a share of the saturation.

    Args:
        energies: one per layer.
        draws: f at draws of one kind each (posterior, prior), (n, L), nats.
    """
    figures: dict[str, Tensor] = {}
    for layer, energy in enumerate(energies, start=1):
        sizes = [f[:, layer - 1].abs() for f in draws]
        figures[f"largest_{layer}"] = torch.stack([size.amax() for size in sizes]).amax()
        if isinstance(energy, Energy) and energy.bounded:
            figures[f"saturation_{layer}"] = torch.stack([size.mean() for size in sizes]).amax() / energy.saturation
    return figures


def history_entry(figures: dict[str, Tensor], chains: TrainingChains, apart: list[float]) -> dict[str, float]:
    """An entry of the history from a window of figures, (iterations,) each.

    Args:
        figures: of the window.
        chains: of the run.
        apart: how many draws the ratio estimate has told apart, of how many, in the windows before; brought up to now. Of
            those before only so many count that there are a thousand.
    """
    others = ("largest_", "saturation_", "told_apart")
    last = {name: float(value[-1]) for name, value in figures.items() if not name.startswith(others)}
    last["gap"] = last["energy_posterior"] - last["energy_prior"]
    last["max_energy"] = max(float(value.max()) for value in _by_layer(figures, "largest_").values())
    if saturation := _by_layer(figures, "saturation_"):
        last["saturation"] = max(float(value.mean()) for value in saturation.values())
    for name in ("acceptance", "weight_ess"):
        if name in figures:
            last[name] = float(figures[name].mean())
    if "told_apart" in figures:
        draws = float(figures["told_apart_draws"].sum())
        share = min(max(_LEAST_APART - draws, 0.0) / max(apart[1], 1.0), 1.0)
        apart[:] = apart[0] * share + float(figures["told_apart"].mean()) * draws, apart[1] * share + draws
        last["told_apart"] = (apart[0] + 1) / (apart[1] + 2)  # one more on either side: a few that are all right show little
    if "acceptance" in figures:
        last["step_size"] = chains.step_size
        path = chains.last.negative_energy if chains.last else None
        if path is not None and len(path) > 4:
            last["chain_ess"] = float(effective_sample_size(path[1:, :, None]).mean())
    if "posterior_acceptance" in figures:
        last["posterior_step_size"] = chains.posterior_step_size
    return last


def early_warnings(entry: dict[str, float], config: FitConfig, gap: float) -> dict[str, str]:
    """What may soon go wrong, in plain words, by kind.

    Args:
        entry: of the history.
        config: settings of the run.
        gap: mean of E₊[Σf] − E₋[Σf] where prior draws are the joint prior's, else 0, nats; of layers of more than 128 units
            per 128 units.
    """
    found: dict[str, str] = {}
    if entry["max_energy"] > _HIGH_ENERGY * config.max_energy:
        found["energy"] = (
            f"an energy has reached {entry['max_energy']:.3g} nats, and at max_energy = {config.max_energy:g} the run stops. "
            "Lower learning_rate; with chains, raise steps."
        )
    if entry.get("saturation", 0.0) > _HIGH_SATURATION:
        found["saturation"] = (
            f"the energies of a layer are at {entry['saturation']:.0%} of their saturation on average, and at {_SATURATED:.0%} "
            "the run stops: energies that saturate learn nothing more. Lower learning_rate; with chains, leave step_size "
            "out or raise steps."
        )
    if gap > _WIDE_GAP:
        found["gap"] = (
            f"Σf is {gap:.3g} nats higher at posterior draws than at the chains' draws of the prior (of larger layers per 128 "
            "units): the chains do not follow the energies, which grow without learning. Lower learning_rate or raise steps; "
            'of a posterior that is far (prior.mismatch), learn by "denoising" first.'
        )
    if entry.get("acceptance", 1.0) < _LOW_ACCEPTANCE:
        change = "Lower learning_rate"
        if config.step_size:
            change = "Leave step_size out, so that it is tuned"
        found["acceptance"] = (
            f"MALA would accept only {entry['acceptance']:.0%} of the steps of the prior's chains (step size "
            f"{entry['step_size']:.3g}): the draws that the energies learn from are biased. {change}."
        )
    if entry.get("posterior_acceptance", 1.0) < _LOW_ACCEPTANCE / 2:
        found["posterior_acceptance"] = (
            f"the posterior's chains accept only {entry['posterior_acceptance']:.0%} of their steps and hardly move: raise "
            'posterior_steps. A generator with `infer` needs these chains in the rule "joint" alone.'
        )
    if entry.get("told_apart", 0.0) > SATURATED:
        found["told_apart"] = (
            f"the ratio estimate is saturated: {entry['told_apart']:.1%} of the draws are told apart, so that nothing shows "
            "how far the posterior is from the prior, and the energies stop learning long before it is reached. Build the "
            "prior with energies=denoising_energies(generator.latent_shapes), the default where layers are maps, and use "
            'method="denoising"; with few latents also "multi_stage_nce" or "two_stage".'
        )
    if entry.get("weight_ess", 1.0) < _FEW_WEIGHTS:
        found["weight_ess"] = (
            f"only {entry['weight_ess']:.2%} of the prior's draws carry the ratio estimate: prior and posterior hardly "
            'overlap. Use method="multi_stage_nce" or "two_stage", a larger batch_size, or a generator with a larger σ.'
        )
    return found


def check_sound(figures: dict[str, Tensor], first: int, method: Method, config: FitConfig) -> None:
    """Raises `DivergenceError` at the first iteration of a window where something is not finite or the energies have run away.

    That is where an |f_i| is above `max_energy`, or where those of a built-in energy are near its saturation on average.

    Args:
        figures: of the window, (iterations,) each.
        first: number of its first iteration.
        method: the learning rule.
        config: its settings.
    """
    largest, saturation = _by_layer(figures, "largest_"), _by_layer(figures, "saturation_")
    watched = {name: value for name, value in figures.items() if name == "loss" or name.startswith("gradient_norm_")}
    bad = [~torch.isfinite(value) for value in watched.values()]
    bad += [~(value <= config.max_energy) for value in largest.values()]
    bad += [~(value <= _SATURATED) for value in saturation.values()]
    rows = torch.stack(bad).any(0).nonzero()
    if len(rows) == 0:
        return
    row = int(rows[0])
    layer = next((i for i, value in largest.items() if not bool(value[row] <= config.max_energy)), None)
    saturated = next((i for i, value in saturation.items() if not bool(value[row] <= _SATURATED)), None)
    if layer is not None:
        reached = float(largest[layer][row])
        what = f"f_{layer}, the energy of layer {layer}, reached {reached:.3g} nats (max_energy is {config.max_energy:g})."
    elif saturated is not None:
        layer = saturated
        share = f"{float(saturation[layer][row]):.0%} of its saturation on average"
        what = f"f_{layer}, the energy of layer {layer}, is at {share} (the limit is {_SATURATED:.0%})."
    else:
        name = next(name for name, value in watched.items() if not bool(torch.isfinite(value[row])))
        what = f"the {name.replace('gradient_norm_', 'gradient of the ')} is not finite."
    raise DivergenceError(f"{what} {_likely_cause(method, config, figures, row)}", layer=layer, step=first + row)


def _by_layer(figures: dict[str, Tensor], prefix: str) -> dict[int, Tensor]:
    """The figures of this name by layer, (iterations,) each."""
    return {int(name.removeprefix(prefix)): value for name, value in figures.items() if name.startswith(prefix)}


def _likely_cause(method: Method, config: FitConfig, figures: dict[str, Tensor], row: int) -> str:
    """Why a run has probably diverged, and what to change."""
    if "acceptance" in figures and config.step_size and float(figures["acceptance"][row]) < _LOW_ACCEPTANCE:
        return (
            f"The fixed step_size = {config.step_size:g} is too large: MALA would accept "
            f"{float(figures['acceptance'][row]):.0%} of its steps. Leave it out, so that it is tuned, or make it smaller."
        )
    if "gradient_norm_generator" in figures and not bool(torch.isfinite(figures["gradient_norm_generator"][row])):
        return "Lower generator_learning_rate, or train the generator longer by itself (fit_elbo) first."
    return (
        "Lower learning_rate"
        + ("; raise steps or set persistent, for better prior draws" if method not in ("nce", "multi_stage_nce") else "")
        + "; with custom energies, use a smooth activation and start from f = 0."
    )
