"""Cases of `linears`: query, key and value of a canvas side by side, in turn, and one product over joined weights.

And a layer's other products, which have nothing to run beside: how far one alone is from the roofline. With FP8 weights
rows are rounded beforehand, as in a compiled step what makes them does. The roofline is that of bf16 all the same, so
an FP8 product that matrix units limit may pass it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dgemma_accel.branches import in_turn
from dgemma_accel.ops.linears import linears, scaled_linears
from dgemma_accel.reference.budget import check_linears
from dgemma_accel.reference.quantization import FP8, quantize_rows
from dgemma_accel.scaled_product import multiplies_fp8, way_of

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
    """rows [R, E]; weights, each [N, E]; scales, each [N, 1], of FP8 weights."""

    rows: Tensor
    weights: list[Tensor]
    scales: list[Tensor] | None = None


def make_inputs(
    rows: int, depth: int, widths: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int,
    scaled: bool = False,
) -> Inputs:  # fmt: skip
    noise = planted.generator(device, seed)

    def normal(count: int, deviation: float) -> Tensor:
        return torch.empty(count, depth, dtype=dtype, device=device).normal_(0.0, deviation, generator=noise)

    inputs = Inputs(normal(rows, 1.0), [normal(width, depth**-0.5) for width in widths])
    if not scaled:
        return inputs
    made = [quantize_rows(weight) for weight in inputs.weights]
    return Inputs(inputs.rows, [numbers for numbers, _ in made], [scale for _, scale in made])


def _scaled(inputs: Inputs):
    numbers, row_scale = quantize_rows(inputs.rows)
    return lambda: scaled_linears(numbers, row_scale, inputs.weights, inputs.scales, inputs.rows.dtype)


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
SCALED = (
    Variant("side by side", _scaled),
    # As in a prompt, which nobody traces.
    Variant("rows rounded first", lambda inputs: lambda: linears(*inputs)),
)


def cases(device: torch.device, sizes: Sizes) -> tuple[list[Case], list[str]]:
    if device.type == "cpu":
        return [], ["linears: a CPU has no streams for products to run side by side on"]
    rows, dtype = sizes.rows or CANVAS, weight_dtype(device)

    def case(label: str, depth: int, widths: tuple[int, ...], scaled: bool) -> Case:
        size = FP8.itemsize if scaled else dtype.itemsize
        return Case(
            op="linears",
            label=f"{label}, FP8 weights" if scaled else label,
            shape=f"[{rows}, {depth}] x {' + '.join(map(str, widths))}",
            dtype=dtype,
            bytes=(rows * depth + sum(widths) * depth) * size + rows * sum(widths) * dtype.itemsize,
            flops=2 * rows * depth * sum(widths),
            # Weights once more where they are joined or rounded, and the truth in fp64.
            memory=sum(widths) * depth * (2 * dtype.itemsize + 8) + 24 * rows * sum(widths),
            make=lambda device, seed: make_inputs(rows, depth, widths, dtype, device, seed, scaled),
            backends=SCALED if scaled else VARIANTS if len(widths) > 1 else VARIANTS[:1],
            check=lambda results, inputs: check_linears(results, *inputs),
        )

    plain = [case(label, *shape, False) for label, shape in SHAPES.items()]
    if not multiplies_fp8(device):
        return plain, ["linears: below compute capability 8.9 rows are not rounded to FP8"]
    # A router's weights are never FP8.
    scaled = [case(label, *shape, True) for label, shape in SHAPES.items() if label != "router"]
    return [*plain, *scaled], [f"linears: scales of FP8 weights are applied {way_of(device, dtype)}"]
