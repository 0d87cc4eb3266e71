"""The Triton kernel of whole Langevin chains: a small machine for dense nets, with a list of instructions for a program."""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

__all__ = ["COLUMNS", "INTERPRETED", "ROWS", "launch", "run_chains"]

import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from energy_prior.langevin.backends import _program

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets kernels, on any device, instead of compiling them for a GPU; read when this module is imported."""

ROWS = 16
"""Chains per program: the least that a matrix product takes."""
INPUTS, OUTPUTS, WARPS = 32, 64, 4
"""Inputs and outputs of the part of a matrix product that a program makes at a time, and its threads over 32."""
COLUMNS = 12
"""Numbers of an instruction: kind, source, target, third, fourth, inputs, outputs, weight, its two strides, bias, flags."""

_MATMUL = tl.constexpr(_program.MATMUL)
_SAMPLE = tl.constexpr(_program.SAMPLE)
_SAMPLE_TOP = tl.constexpr(_program.SAMPLE_TOP)
_UNIT = tl.constexpr(_program.UNIT)
_HEAD = tl.constexpr(_program.HEAD)
_ADD = tl.constexpr(_program.ADD)
_CONDITIONAL = tl.constexpr(_program.CONDITIONAL)
_ACCUMULATE = tl.constexpr(_program.ACCUMULATE)
_ACTIVATE = tl.constexpr(_program.ACTIVATE)


def launch(
    memory: Tensor,
    program: Tensor,
    weights: Tensor,
    noise: Tensor | None,
    seed: int,
    first_row: int,
    batch: int,
    steps: int,
    coefficients: Sequence[Tensor],
    *,
    products: str,
) -> None:
    """Runs `steps` steps of all chains.

    Args:
        memory: (rows, width) float32, what each chain works in, with its start; rows is a multiple of `ROWS`.
        program: (instructions, COLUMNS) int64, as `energy_prior.langevin.backends._program` has them.
        weights: float32, all parameters, one after the other.
        noise: (steps, batch, units) float32 to be used; None: drawn in the kernel.
        seed: of that, below 2⁶³; a number is a function of it, the step, the row and the unit.
        first_row: what the first row is called in that.
        batch: number of chains, at most rows.
        steps: ≥ 1.
        coefficients: c₀, c₁ and τ of a step.
        products: "ieee" or "tf32".
    """
    with torch.cuda.device_of(memory):
        run_chains[(len(memory) // ROWS,)](
            memory,
            memory.shape[1],
            program,
            len(program),
            weights,
            weights if noise is None else noise,
            seed,
            0 if noise is None else noise.shape[2],
            first_row,
            batch,
            steps,
            *(float(c) for c in coefficients),
            injected=noise is not None,
            precision=products,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            INPUTS=INPUTS,
            OUTPUTS=OUTPUTS,
            num_warps=WARPS,
        )


_NUMBERS = ["width", "instructions", "seed", "units", "first_row", "batch", "steps"]


@triton.jit(do_not_specialize=_NUMBERS)
def run_chains(
    memory,
    width,
    program,
    instructions,
    weights,
    noise,
    seed,
    units,
    first_row,
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
                if kind == _MATMUL:
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
                    if flags >= _ACTIVATE:  # an activation
                        value, slope = _activated(total, flags - _ACTIVATE)
                        tl.store(here + target + column[None, :], value, mask=there)
                        tl.store(here + third + column[None, :], slope, mask=there)
                    else:
                        if third >= 0:
                            total *= tl.load(here + third + column[None, :], mask=there, other=0.0)
                        tl.store(here + target + column[None, :], total, mask=there)
                elif kind == _SAMPLE:
                    loc = tl.load(here + source + column[None, :], mask=there, other=0.0)
                    raw = tl.load(here + source + outputs + column[None, :], mask=there, other=0.0)
                    clamped = 2 * tl.sigmoid(raw * 0.4) - 1  # tanh(raw / 5)
                    sigma = tl.exp(5 * clamped)
                    y = tl.load(here + third + column[None, :], mask=there, other=0.0)
                    tl.store(here + target + column[None, :], loc + sigma * y, mask=there)
                    tl.store(here + fourth + column[None, :], sigma, mask=there)
                    tl.store(here + bias + column[None, :], 1 - clamped * clamped, mask=there)
                elif kind == _SAMPLE_TOP:
                    loc = tl.load(here + source + column[None, :], mask=there, other=0.0)
                    sigma = tl.load(here + fourth + column[None, :], mask=there, other=0.0)
                    y = tl.load(here + third + column[None, :], mask=there, other=0.0)
                    tl.store(here + target + column[None, :], loc + sigma * y, mask=there)
                elif kind == _UNIT:
                    z = tl.load(here + source + column[None, :], mask=there, other=0.0)
                    shift = tl.load(weights + weight + column[None, :], mask=there, other=0.0)
                    spread = tl.load(weights + bias + column[None, :], mask=there, other=1.0)
                    tl.store(here + target + column[None, :], (z - shift) / spread, mask=there)
                elif kind == _HEAD:
                    head = tl.load(weights + weight + column[None, :], mask=there, other=0.0)
                    slope = tl.load(here + third + column[None, :], mask=there, other=0.0)
                    share = tl.load(here + source) / tl.load(weights + bias)
                    bend = 1 / tl.sqrt(1 + share * share)
                    tl.store(here + target + column[None, :], head * slope * bend * bend * bend, mask=there)
                elif kind == _ADD:
                    value = tl.load(here + source + column[None, :], mask=there, other=0.0)
                    value /= tl.load(weights + bias + column[None, :], mask=there, other=1.0)
                    if flags == _ACCUMULATE:
                        value += tl.load(here + target + column[None, :], mask=there, other=0.0)
                    tl.store(here + target + column[None, :], value, mask=there)
                elif kind == _CONDITIONAL:
                    g = tl.load(here + source + column[None, :], mask=there, other=0.0)
                    y = tl.load(here + third + column[None, :], mask=there, other=0.0)
                    sigma = tl.load(here + fourth + column[None, :], mask=there, other=0.0)
                    slope = tl.load(here + bias + column[None, :], mask=there, other=0.0)
                    tl.store(here + target + column[None, :], g, mask=there)
                    tl.store(here + target + outputs + column[None, :], g * y * sigma * slope, mask=there)
                else:
                    g = tl.load(here + source + column[None, :], mask=there, other=0.0)
                    g *= tl.load(here + fourth + column[None, :], mask=there, other=0.0)
                    y = tl.load(here + target + column[None, :], mask=there, other=0.0)
                    if injected:
                        place = row.to(tl.int64)[:, None] * units + weight + column[None, :]
                        real = there & (row < batch)[:, None]
                        n = tl.load(noise + place, mask=real, other=0.0)
                    else:
                        unit = tl.zeros((ROWS, OUTPUTS), dtype=tl.int32) + (weight + column[None, :]).to(tl.int32)
                        chain = tl.zeros((ROWS, OUTPUTS), dtype=tl.int32) + (first_row + row)[:, None]
                        a, b, _, _ = tl.philox(seed, unit, chain, chain * 0 + step, chain * 0)
                        n, _ = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(a), tl.uint_to_uniform_float(b))
                    tl.store(here + target + column[None, :], keep * y + drift * g + scale * n, mask=there)
            tl.debug_barrier()  # the next instruction reads what other threads of this program have written
        noise += batch * units


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
