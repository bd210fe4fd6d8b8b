"""`linears`: products of the same rows with several weights, beside each other on the device.

One of them alone has too few tiles of a canvas for a GPU: query, key and value projections take about as long together
as the longest by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..branches import beside
from .registration import operator


@operator("linears")
def _linears(rows: Tensor, weights: list[Tensor]) -> list[Tensor]:
    # Memory of the caller's stream, which outlives the others' work.
    results = [rows.new_empty(rows.shape[0], weight.shape[0]) for weight in weights]
    with beside(rows, len(weights) - 1) as asides:
        for aside, weight, result in zip(asides, weights[1:], results[1:]):
            with aside:
                torch.mm(rows, weight.T, out=result)
        torch.mm(rows, weights[0].T, out=results[0])
    return results


@_linears.register_fake
def _(rows, weights):
    return [rows.new_empty(rows.shape[0], weight.shape[0]) for weight in weights]


def linears(rows: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """rows @ weight^T for each weight, as `torch.nn.functional.linear` computes it.

    Args:
        rows: [R, E], any dtype that `torch.mm` takes.
        weights: at least one, each [N, E] in the dtype and on the device of `rows`.

    Returns:
        A tensor [R, N] for each weight.

    Raises:
        RuntimeError: tensors that cannot be multiplied, as `torch.mm` says it.
    """
    return _linears(rows, weights)
