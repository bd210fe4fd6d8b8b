"""Cases of `linears`: query, key and value of a canvas side by side, in turn, and one product over joined weights.

And a layer's other products, which have nothing to run beside: how far one alone is from the roofline.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dgemma_accel.branches import in_turn
from dgemma_accel.ops.linears import linears
from dgemma_accel.reference.budget import check_linears

from . import planted
from .cases import CANVAS, HIDDEN, Case, Sizes, Variant, weight_dtype

# Columns of the weights, and the rows of each: of query, key and value, where a layer has one.
SHAPES = {
    "sliding layer": (HIDDEN, (4096, 2048, 2048)),
    "global layer": (HIDDEN, (8192, 1024)),
    "output projection, sliding layer": (4096, (HIDDEN,)),
    "output projection, global layer": (8192, (HIDDEN,)),
    "down projection": (2112, (HIDDEN,)),
    "router": (HIDDEN, (128,)),
}


class Inputs(NamedTuple):
    """rows [R, E]; weights, each [N, E]."""

    rows: Tensor
    weights: list[Tensor]


def make_inputs(
    rows: int, depth: int, widths: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int
) -> Inputs:
    noise = planted.generator(device, seed)

    def normal(count: int, deviation: float) -> Tensor:
        return torch.empty(count, depth, dtype=dtype, device=device).normal_(0.0, deviation, generator=noise)

    return Inputs(normal(rows, 1.0), [normal(width, depth**-0.5) for width in widths])


def _in_turn(inputs: Inputs) -> list[Tensor]:
    with in_turn():
        return linears(*inputs)


def _joined(inputs: Inputs):
    whole, sizes = torch.cat(inputs.weights), [len(weight) for weight in inputs.weights]
    return lambda: torch.nn.functional.linear(inputs.rows, whole).split(sizes, 1)


VARIANTS = (
    Variant("side by side", lambda inputs: lambda: linears(*inputs)),
    Variant("in turn", lambda inputs: lambda: _in_turn(inputs)),
    Variant("joined weights", _joined),
)


def cases(device: torch.device, sizes: Sizes) -> tuple[list[Case], list[str]]:
    if device.type == "cpu":
        return [], ["linears: a CPU has no streams for products to run side by side on"]
    rows, dtype = sizes.rows or CANVAS, weight_dtype(device)
    return [
        Case(
            op="linears",
            label=label,
            shape=f"[{rows}, {depth}] x {' + '.join(map(str, widths))}",
            dtype=dtype,
            bytes=(rows * (depth + sum(widths)) + sum(widths) * depth) * dtype.itemsize,
            flops=2 * rows * depth * sum(widths),
            # Weights once more where they are joined, and the truth in fp64.
            memory=sum(widths) * depth * (2 * dtype.itemsize + 8) + 24 * rows * sum(widths),
            make=lambda device, seed, depth=depth, widths=widths: make_inputs(
                rows, depth, widths, dtype, device, seed
            ),
            backends=VARIANTS if len(widths) > 1 else VARIANTS[:1],
            check=lambda results, inputs: check_linears(results, *inputs),
        )
        for label, (depth, widths) in SHAPES.items()
    ], []
