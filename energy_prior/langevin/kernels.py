"""The Triton kernel behind `energy_prior.langevin.fused`: a small machine for dense nets that runs a whole Langevin chain."""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

__all__ = ["COLUMNS", "INTERPRETED", "ROWS", "launch", "run_chains"]

import os
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets kernels, on any device, instead of compiling them for a GPU; read when this module is imported."""

ROWS = 16
"""Chains per program: the least that a matrix product takes."""
COLUMNS = 12
"""Numbers of an instruction: kind, source, target, two more sources, inputs, outputs, weights, two strides, bias, flags."""


def launch(
    memory: Tensor,
    program: Tensor,
    weights: Tensor,
    noise: Tensor | None,
    seed: int,
    units: int,
    batch: int,
    steps: int,
    coefficients: Sequence[Tensor],
    *,
    exact: bool,
) -> None:
    """Runs `steps` steps of all chains.

    Args:
        memory: (rows, width) float32, what each chain works in, with its start; rows is a multiple of `ROWS`.
        program: (instructions, COLUMNS) int64.
        weights: float32, all parameters, one after the other.
        noise: (steps, batch, units) float32 to be used; None: drawn in the kernel.
        seed: of that; step t draws from the stream of seed + t.
        units: noise numbers per chain and step.
        batch: number of chains, at most rows.
        steps: ≥ 1.
        coefficients: c₀, c₁ and τ of a step.
        exact: matrix products in float32 instead of TF32.
    """
    run_chains[(len(memory) // ROWS,)](
        memory,
        memory.shape[1],
        program,
        len(program),
        weights,
        weights if noise is None else noise,
        seed,
        units,
        batch,
        steps,
        *(float(c) for c in coefficients),
        injected=noise is not None,
        precision="ieee" if exact else "tf32",
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        INPUTS=32,
        OUTPUTS=64,
    )


@triton.jit
def run_chains(
    memory,
    width,
    program,
    instructions,
    weights,
    noise,
    seed,
    units,
    batch,
    steps,
    keep,
    drift,
    scale,
    injected: tl.constexpr,
    precision: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Steps y' = keep·y + drift·g + scale·n of the chains of this block of rows; arguments as `launch` has them."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = memory + row.to(tl.int64)[:, None] * width
    given = noise
    for step in range(steps):
        for at in range(instructions):
            line = program + at * COLUMNS
            kind = tl.load(line)
            source = tl.load(line + 1)
            target = tl.load(line + 2)
            third = tl.load(line + 3)
            fourth = tl.load(line + 4)
            inputs = tl.load(line + 5)
            outputs = tl.load(line + 6)
            weight = tl.load(line + 7)
            by_input = tl.load(line + 8)
            by_output = tl.load(line + 9)
            bias = tl.load(line + 10)
            flags = tl.load(line + 11)
            for first in range(0, outputs, OUTPUTS):
                column = first + tl.arange(0, OUTPUTS)
                there = (column < outputs)[None, :]
                if kind == 0:  # target = source · W + bias, then an activation, or times a derivative
                    total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
                    for start in range(0, inputs, INPUTS):
                        unit = start + tl.arange(0, INPUTS)
                        real = unit < inputs
                        a = tl.load(here + source + unit[None, :], mask=real[None, :], other=0.0)
                        w = tl.load(
                            weights + weight + unit[:, None] * by_input + column[None, :] * by_output,
                            mask=real[:, None] & there,
                            other=0.0,
                        )
                        total = tl.dot(a, w, total, input_precision=precision)
                    if bias >= 0:
                        total += tl.load(weights + bias + column[None, :], mask=there, other=0.0)
                    if flags >= 8:  # an activation
                        value, slope = _activated(total, flags - 8)
                        tl.store(here + target + column[None, :], value, mask=there)
                        tl.store(here + third + column[None, :], slope, mask=there)
                    else:
                        if third >= 0:
                            total *= tl.load(here + third + column[None, :], mask=there, other=0.0)
                        tl.store(here + target + column[None, :], total, mask=there)
                elif kind == 1:  # z = loc + σ ε, with (loc, log σ before its clamp) in source; σ and d log σ are kept
                    loc = tl.load(here + source + column[None, :], mask=there, other=0.0)
                    raw = tl.load(here + source + outputs + column[None, :], mask=there, other=0.0)
                    clamped = 2 * tl.sigmoid(raw * 0.4) - 1  # tanh(raw / 5)
                    sigma = tl.exp(5 * clamped)
                    y = tl.load(here + third + column[None, :], mask=there, other=0.0)
                    tl.store(here + target + column[None, :], loc + sigma * y, mask=there)
                    tl.store(here + fourth + column[None, :], sigma, mask=there)
                    tl.store(here + bias + column[None, :], 1 - clamped * clamped, mask=there)
                elif kind == 2:  # z = loc + σ ε, with loc in source and σ in fourth
                    loc = tl.load(here + source + column[None, :], mask=there, other=0.0)
                    sigma = tl.load(here + fourth + column[None, :], mask=there, other=0.0)
                    y = tl.load(here + third + column[None, :], mask=there, other=0.0)
                    tl.store(here + target + column[None, :], loc + sigma * y, mask=there)
                elif kind == 3:  # target = (source − shift)/scale
                    z = tl.load(here + source + column[None, :], mask=there, other=0.0)
                    shift = tl.load(weights + weight + column[None, :], mask=there, other=0.0)
                    spread = tl.load(weights + bias + column[None, :], mask=there, other=1.0)
                    tl.store(here + target + column[None, :], (z - shift) / spread, mask=there)
                elif kind == 4:  # target = W · third: the gradient of a head with respect to what it reads
                    head = tl.load(weights + weight + column[None, :], mask=there, other=0.0)
                    slope = tl.load(here + third + column[None, :], mask=there, other=0.0)
                    tl.store(here + target + column[None, :], head * slope, mask=there)
                elif kind == 5:  # target (+)= source/scale
                    value = tl.load(here + source + column[None, :], mask=there, other=0.0)
                    value /= tl.load(weights + bias + column[None, :], mask=there, other=1.0)
                    if flags == 1:
                        value += tl.load(here + target + column[None, :], mask=there, other=0.0)
                    tl.store(here + target + column[None, :], value, mask=there)
                elif kind == 6:  # the gradient with respect to (loc, log σ before its clamp) from that with respect to z
                    g = tl.load(here + source + column[None, :], mask=there, other=0.0)
                    y = tl.load(here + third + column[None, :], mask=there, other=0.0)
                    sigma = tl.load(here + fourth + column[None, :], mask=there, other=0.0)
                    slope = tl.load(here + bias + column[None, :], mask=there, other=0.0)
                    tl.store(here + target + column[None, :], g, mask=there)
                    tl.store(here + target + outputs + column[None, :], g * y * sigma * slope, mask=there)
                else:  # the step itself: y in target, the gradient with respect to z in source, σ in fourth
                    g = tl.load(here + source + column[None, :], mask=there, other=0.0)
                    g *= tl.load(here + fourth + column[None, :], mask=there, other=0.0)
                    y = tl.load(here + target + column[None, :], mask=there, other=0.0)
                    place = row[:, None] * units + weight + column[None, :]
                    if injected:
                        real = there & (row < batch)[:, None]
                        n = tl.load(given + place, mask=real, other=0.0)
                    else:
                        n = tl.randn(seed + step, place)
                    tl.store(here + target + column[None, :], keep * y + drift * g + scale * n, mask=there)
            tl.debug_barrier()  # the next instruction reads what other threads of this program have written
        given += batch * units


@triton.jit
def _activated(x, name):
    """An activation and its derivative: 0 SiLU, 1 tanh, 2 softplus, 3 GELU."""
    s = tl.sigmoid(x)
    value = x * s
    slope = s * (1 + x * (1 - s))
    if name == 1:
        value = 2 * tl.sigmoid(2 * x) - 1
        slope = 1 - value * value
    elif name == 2:
        value = tl.where(x > 20, x, tl.log(1 + tl.exp(tl.minimum(x, 20.0))))
        slope = s
    elif name == 3:
        below = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        value = x * below
        slope = below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return value, slope
