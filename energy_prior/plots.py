"""Plots, written to files: grids of images, Langevin chains, latents along a chain, scores. No display needed."""

from __future__ import annotations

__all__ = [
    "chain_strip",
    "detection_curves",
    "explanation",
    "image_panels",
    "latent_transitions",
    "score_histograms",
]

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from energy_prior.checks.settings import check_count, check_path, require_extra
from energy_prior.errors import ArgumentError, ShapeError
from energy_prior.evaluate.detection import detection, labelled_ranks

_MOST_PANELS = 6  # in a row


def image_panels(path: str | os.PathLike[str], panels: Mapping[str, Tensor], *, columns: int = 8) -> None:
    """Grids of images side by side, each under its title; more than six in several rows.

    Args:
        path: file to write; its suffix sets the format (.png, .pdf, .svg, …).
        panels: title -> images in [0, 1], (n, channels, height, width), 1 or 3 channels.
        columns: images per row of a grid.

    Raises:
        ArgumentError, ShapeError: if there is no panel, or one has no images.

    Examples:
        >>> import os, tempfile
        >>> from energy_prior import load_example
        >>> prior = load_example()
        >>> panels = {"Gaussian prior": prior.sample(16, prior="generator"), "joint prior": prior.sample(16)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     image_panels(f"{folder}/samples.png", panels, columns=4)
        ...     os.listdir(folder)
        ['samples.png']
    """
    file = check_path("path", path)
    if not panels:
        raise ArgumentError("panels: expected one or more, got none.")
    for title, images in panels.items():
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ShapeError(f"panels[{title!r}]: expected a tensor of images, (n, 1 or 3, height, width), got {got}.")
    rows = math.ceil(len(panels) / _MOST_PANELS)
    across = math.ceil(len(panels) / rows)
    grids = {title: _grid(images, columns) for title, images in panels.items()}
    highest = max(grid.shape[0] / grid.shape[1] for grid in grids.values())
    figure = _figure(3.4 * across, (3.4 * highest + 0.2) * rows)
    figure.get_layout_engine().set(wspace=0.06)
    for index, (title, grid) in enumerate(grids.items(), start=1):
        axes = figure.add_subplot(rows, across, index)
        _show(axes, grid)
        axes.set_title(title)
    figure.savefig(file, dpi=150)


def chain_strip(path: str | os.PathLike[str], frames: Tensor, steps: Tensor, energy: Tensor) -> None:
    """One row of decoded images per chain, from its ancestral start to its end, above Σ_i f_i along the chains.

    Args:
        path: file to write; its suffix sets the format (.png, .pdf, .svg, …).
        frames: decoded images in [0, 1], (chains, frames, channels, height, width).
        steps: step number of each frame, (frames,), whole numbers.
        energy: Σ_i f_i(z_i) of each frame and chain, (frames, chains), nats.

    Examples:
        >>> import os, tempfile
        >>> from energy_prior import load_example
        >>> prior = load_example()
        >>> run = prior.trajectory(2, steps=10, every=5)
        >>> frames = torch.stack([prior.decode([z[i] for z in run.latents]) for i in range(3)], 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     chain_strip(f"{folder}/chains.png", frames, run.steps, run.negative_energy.sum(2))
        ...     os.listdir(folder)
        ['chains.png']
    """
    file = check_path("path", path)
    chains, count = frames.shape[:2]
    figure = _figure(max(0.55 * count + 1.2, 5.0), 0.55 * chains + 3.2)
    top, bottom = figure.subplots(2, 1, height_ratios=[0.55 * chains, 2.0])
    _show(top, _grid(rearrange(frames, "a f c h w -> (a f) c h w"), count))
    between = ": " if count > 10 else "\n"  # a narrow picture would cut a long line off
    top.set_title(f"Langevin chains under the joint prior{between}ancestral start (left) to end (right)", fontsize=10)
    side = frames.shape[-1] + 1
    top.set_xticks([side * (i + 0.5) for i in range(count)], [str(int(s)) for s in steps])
    top.tick_params(length=0, labelsize=8)
    lines = bottom.plot(steps.cpu(), energy.cpu(), color="tab:blue", alpha=0.3, linewidth=0.8)
    lines[0].set_label("single chains")
    bottom.plot(steps.cpu(), energy.mean(1).cpu(), color="tab:blue", linewidth=2, label="mean of the chains")
    bottom.set_xlabel("Langevin step")
    bottom.set_ylabel("$\\sum_i f_i(z_i)$ in nats")
    bottom.margins(x=0.02)
    bottom.legend(frameon=False)
    figure.savefig(file, dpi=150)


def latent_transitions(
    path: str | os.PathLike[str], posterior: Sequence[Tensor], chains: Sequence[Tensor], steps: Tensor
) -> None:
    """Latents of prior chains at some steps, over posterior draws: a row per layer, top layer first, a column per frame.

    After the figure of Cui, Wu and Han (CVPR 2023) for two-dimensional latents. Of wider latents the first two dimensions are
    shown.

    Args:
        path: file to write; its suffix sets the format (.png, .pdf, .svg, …).
        posterior: posterior draws (z_1, …, z_L), each (n, d), d ≥ 2.
        chains: (z_1, …, z_L) of the chains, each (frames, m, d).
        steps: step number of each frame, (frames,), whole numbers.

    Examples:
        >>> import os, tempfile
        >>> from energy_prior import load_example
        >>> prior = load_example()
        >>> run = prior.trajectory(20, steps=10, every=10)
        >>> posterior = prior.sample_posterior(torch.rand(20, 1, 8, 8), method="infer")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     latent_transitions(f"{folder}/latents.png", posterior, run.latents, run.steps)
        ...     os.listdir(folder)
        ['latents.png']
    """
    file = check_path("path", path)
    columns = len(steps)
    figure = _figure(1.9 * columns + 0.3, 2.0 * len(posterior) + 0.5)
    grid = figure.subplots(len(posterior), columns, squeeze=False)
    for row, layer in zip(grid, range(len(posterior), 0, -1), strict=True):
        z, run = posterior[layer - 1].cpu(), chains[layer - 1].cpu()
        both = torch.cat([z[:, :2], run[..., :2].reshape(-1, 2)])
        low, high = both.amin(0).tolist(), both.amax(0).tolist()
        for index, axes in enumerate(row):
            axes.scatter(z[:, 0], z[:, 1], s=3, color="0.75", label="posterior", linewidths=0)
            axes.scatter(run[index, :, 0], run[index, :, 1], s=3, color="tab:blue", label="joint prior", linewidths=0)
            axes.set_xlim(low[0], high[0])
            axes.set_ylim(low[1], high[1])
            axes.set_xticks([])
            axes.set_yticks([])
            if layer == len(posterior):
                axes.set_title(f"step {int(steps[index])}" if index else "ancestral start", fontsize=9)
        row[0].set_ylabel(f"$z_{layer}$")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9, markerscale=3)
    figure.savefig(file, dpi=150)


def score_histograms(
    path: str | os.PathLike[str], scores: Mapping[str, tuple[Tensor, Tensor]], *, known: str, unknown: str
) -> None:
    """A histogram per score of known and of unknown observations, with its AUROC.

    Args:
        path: file to write; its suffix sets the format (.png, .pdf, .svg, …).
        scores: name -> scores of known and of unknown observations, (n,) and (m,), of any unit, higher = more unknown.
        known: label of the known observations.
        unknown: label of the unknown observations.

    Examples:
        >>> import os, tempfile
        >>> scores = {"tails": (torch.randn(50), torch.randn(50) + 2)}  # of known and of unknown images
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     score_histograms(f"{folder}/scores.png", scores, known="digits", unknown="letters")
        ...     os.listdir(folder)
        ['scores.png']
    """
    file = check_path("path", path)
    columns = min(2, len(scores))
    rows = -(-len(scores) // columns)
    figure = _figure(4.6 * columns, 2.6 * rows + 0.4)
    for index, (name, (inside, outside)) in enumerate(scores.items(), start=1):
        axes = figure.add_subplot(rows, columns, index)
        inside, outside = (side.detach().double().cpu() for side in (inside, outside))
        both = torch.cat([inside, outside])
        low, high = (float(q) for q in torch.quantile(both, torch.tensor([0.002, 0.998], dtype=both.dtype)))
        bins = torch.linspace(low, high, 41).tolist()
        for values, label, colour in ((inside, known, "tab:blue"), (outside, unknown, "tab:orange")):
            clipped = values.clamp(low, high).numpy()
            axes.hist(clipped, bins, density=True, alpha=0.6, color=colour, label=label)
        axes.set_title(f"{name}: AUROC {detection(inside, outside).auroc:.3f}", fontsize=10)
        axes.set_yticks([])
        axes.set_ylabel("share", fontsize=8)
        axes.set_xlabel("score (higher = more unknown)", fontsize=8)
        if index == 1:
            handles, labels = axes.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(file, dpi=150)


def detection_curves(
    path: str | os.PathLike[str], scores: Mapping[str, tuple[Tensor, Tensor]], *, known: str, unknown: str
) -> None:
    """ROC and precision-recall curves of scores, with their areas.

    Args:
        path: file to write; its suffix sets the format (.png, .pdf, .svg, …).
        scores: name -> scores of known and of unknown observations, (n,) and (m,), of any unit, higher = more unknown.
        known: label of the known observations.
        unknown: label of the unknown observations, the positive class.

    Examples:
        >>> import os, tempfile
        >>> scores = {"tails": (torch.randn(50), torch.randn(50) + 2)}  # of known and of unknown images
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     detection_curves(f"{folder}/curves.png", scores, known="digits", unknown="letters")
        ...     os.listdir(folder)
        ['curves.png']
    """
    file, metrics = check_path("path", path), require_extra("sklearn.metrics", "eval")
    figure = _figure(9.2, 4.2)
    roc, recall = figure.subplots(1, 2)
    for (name, (inside, outside)), line in zip(scores.items(), itertools.cycle(("-", "--", ":", "-."))):
        labels, ranks = labelled_ranks(inside, outside)
        found = detection(inside, outside)
        false, true, _ = metrics.roc_curve(labels, ranks)
        precision, share, _ = metrics.precision_recall_curve(labels, ranks)
        roc.plot(false, true, line, label=f"{name}: {found.auroc:.3f}")
        recall.plot(share, precision, line, label=f"{name}: {found.auprc:.3f}")
        recall.axhline(found.positives, color="0.8", linewidth=0.8, zorder=0)
    roc.plot([0, 1], [0, 1], color="0.8", linewidth=0.8, zorder=0)
    roc.set(xlabel=f"share of {known} flagged", ylabel=f"share of {unknown} flagged", title="ROC: area under the curve")
    recall.set(xlabel="recall", ylabel="precision", title="Precision and recall: area under the curve", ylim=(0, 1.02))
    for axes in (roc, recall):
        axes.legend(frameon=False, fontsize=8, loc="lower right" if axes is roc else "lower left")
    figure.savefig(file, dpi=150)


def explanation(path: str | os.PathLike[str], images: Tensor, surprises: Mapping[str, Tensor], *, most: int = 8) -> None:
    """The images with the largest surprises, each over bars of what surprises at it.

    Args:
        path: file to write; its suffix sets the format (.png, .pdf, .svg, …).
        images: in [0, 1], (n, channels, height, width), 1 or 3 channels.
        surprises: term -> −log P_t, (n,), nats, as `prior.explain(images).surprises()` gives them.
        most: images shown, ≥ 1.

    Examples:
        >>> import os, tempfile
        >>> from energy_prior import load_example
        >>> images = torch.rand(3, 1, 8, 8)
        >>> surprises = load_example().explain(images).surprises()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     explanation(f"{folder}/surprises.png", images, surprises)
        ...     os.listdir(folder)
        ['surprises.png']
    """
    file, table = check_path("path", path), torch.stack([s.detach().cpu() for s in surprises.values()], 1)
    order = table.square().sum(1).argsort(descending=True)[: check_count("most", most)]
    figure = _figure(1.5 * len(order) + 1.6, 3.6)
    grid = figure.subplots(2, len(order), squeeze=False, height_ratios=[1, 1.3])
    places = list(range(len(surprises)))
    for column, index in enumerate(order.tolist()):
        _show(grid[0][column], rearrange(images[index].detach().float().clamp(0, 1).cpu(), "c h w -> h w c"))
        axes = grid[1][column]
        axes.barh(places, table[index].tolist(), color="tab:blue")
        axes.set_xlim(0, float(table[order].max()) * 1.05 + 1e-9)
        axes.set_yticks(
            places, [name.replace("_", " ") for name in surprises] if column == 0 else [""] * len(places), fontsize=8
        )
        axes.invert_yaxis()
        axes.tick_params(axis="x", labelsize=7)
    grid[1][0].set_xlabel("surprise in nats", fontsize=8)
    figure.savefig(file, dpi=150)


def _figure(width: float, height: float) -> Any:
    """A figure without pyplot: no display, no global state; sizes in inches."""
    return require_extra("matplotlib.figure", "examples").Figure(figsize=(width, height), layout="constrained")


def _grid(images: Tensor, columns: int) -> Tensor:
    """(n, c, h, w) in [0, 1] -> one image (H, W, c) of all of them, one pixel apart."""
    images = images.detach().float().clamp(0, 1).cpu()
    rows = math.ceil(len(images) / columns)
    blank = images.new_ones(rows * columns - len(images), *images.shape[1:])
    padded = torch.nn.functional.pad(torch.cat([images, blank]), (0, 1, 0, 1), value=0.0)
    return rearrange(padded, "(r k) c h w -> (r h) (k w) c", k=columns)[:-1, :-1]


def _show(axes: Any, image: Tensor) -> None:
    """Draws an image (H, W, c) without axes."""
    axes.imshow(image.squeeze(-1).numpy(), cmap="gray_r" if image.shape[-1] == 1 else None, vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_frame_on(False)
