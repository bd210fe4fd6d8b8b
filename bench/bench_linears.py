"""Cases of `linears`: query, key and value of a canvas side by side, in turn, and one product over joined weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dgemma_accel.branches import in_turn
from dgemma_accel.ops.linears import linears
from dgemma_accel.reference.budget import check_linears

from . import planted
from .cases import CANVAS, HIDDEN, Case, Sizes, Variant, weight_dtype

# Rows of query, key and value, where a layer has one.
WIDTHS = {"sliding layer": (4096, 2048, 2048), "global layer": (8192, 1024)}


class Inputs(NamedTuple):
    """rows [R, E]; weights, each [N, E]."""

    rows: Tensor
    weights: list[Tensor]


def make_inputs(
    rows: int, widths: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int
) -> Inputs:
    noise = planted.generator(device, seed)

    def normal(count: int, deviation: float) -> Tensor:
        return torch.empty(count, HIDDEN, dtype=dtype, device=device).normal_(0.0, deviation, generator=noise)

    return Inputs(normal(rows, 1.0), [normal(width, HIDDEN**-0.5) for width in widths])


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
            shape=f"[{rows}, {HIDDEN}] x {' + '.join(map(str, widths))}",
            dtype=dtype,
            bytes=(rows * (HIDDEN + sum(widths)) + sum(widths) * HIDDEN) * dtype.itemsize,
            flops=2 * rows * HIDDEN * sum(widths),
            # Weights once more where they are joined, and the truth in fp64.
            memory=sum(widths) * HIDDEN * (2 * dtype.itemsize + 8) + 24 * rows * sum(widths),
            make=lambda device, seed, widths=widths: make_inputs(rows, widths, dtype, device, seed),
            backends=VARIANTS,
            check=lambda results, inputs: check_linears(results, *inputs),
        )
        for label, widths in WIDTHS.items()
    ], []
