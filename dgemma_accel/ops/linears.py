"""`linears`: products of the same rows with several weights, beside each other on the device.

One of them alone has too few tiles of a canvas for a GPU: query, key and value projections take about as long together
as the longest by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..branches import beside
from ..scaled_product import multiplies_fp8, scaled_product
from .quantize_rows import quantize_rows
from .registration import operator


@operator("linears")
def _linears(rows: Tensor, weights: list[Tensor]) -> list[Tensor]:
    def product(number: int, result: Tensor) -> None:
        torch.mm(rows, weights[number].T, out=result)

    return _side_by_side(rows, weights, rows.dtype, product)


@operator("scaled_linears")
def _scaled_linears(
    rows: Tensor,
    row_scale: Tensor | None,
    weights: list[Tensor],
    scales: list[Tensor],
    dtype: torch.dtype,
) -> list[Tensor]:
    def product(number: int, result: Tensor) -> None:
        scaled_product(rows, row_scale, weights[number], scales[number], result)

    return _side_by_side(rows, weights, dtype, product)


def _side_by_side(rows: Tensor, weights: list[Tensor], dtype: torch.dtype, product) -> list[Tensor]:
    # Memory of the caller's stream, which outlives the others' work.
    results = _empty(rows, weights, dtype)
    with beside(rows, len(weights) - 1) as asides:
        for number, aside in enumerate(asides, 1):
            with aside:
                product(number, results[number])
        product(0, results[0])
    return results


def _empty(rows: Tensor, weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [rows.new_empty(rows.shape[0], weight.shape[0], dtype=dtype) for weight in weights]


@_linears.register_fake
def _(rows, weights):
    return _empty(rows, weights, rows.dtype)


@_scaled_linears.register_fake
def _(rows, row_scale, weights, scales, dtype):
    return _empty(rows, weights, dtype)


def scaled_linears(
    numbers: Tensor,
    row_scale: Tensor | None,
    weights: list[Tensor],
    scales: list[Tensor],
    dtype: torch.dtype,
) -> list[Tensor]:
    """`linears` of rows that are rounded already: `quantize_rows` of them; or as they are, with `row_scale` None.

    Args:
        numbers: [R, E] float8_e4m3fn. row_scale: [R, 1] fp32.
        weights, scales: as in `linears`.
        dtype: of the results.
    """
    return _scaled_linears(numbers, row_scale, weights, scales, dtype)


def linears(rows: Tensor, weights: list[Tensor], scales: list[Tensor] | None = None) -> list[Tensor]:
    """rows @ weight^T for each weight, as `torch.nn.functional.linear` computes it; with scales, of FP8 weights.

    With scales a weight is its FP8 numbers times the scale of their row, and rows are rounded to FP8 too, with a scale
    for each (`quantize_rows`): traced, the compiler fuses that with what made the rows. On GPUs that do not multiply
    FP8 (below 8.9) rows stay as they are, and weights are widened in every call.

    Args:
        rows: [R, E], any dtype that `torch.mm` takes; with scales bf16, fp16 or fp32.
        weights: at least one, each [N, E] in the dtype and on the device of `rows`; with scales float8_e4m3fn,
            contiguous.
        scales: [N, 1] fp32 for each weight.

    Returns:
        A tensor [R, N] for each weight, in the dtype of `rows`.

    Raises:
        RuntimeError: tensors that cannot be multiplied, as `torch.mm` says it.
    """
    if scales is None:
        return _linears(rows, weights)
    numbers, row_scale = quantize_rows(rows) if multiplies_fp8(rows.device) else (rows, None)
    return scaled_linears(numbers, row_scale, weights, scales, rows.dtype)
