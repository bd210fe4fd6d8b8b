"""`feed_forward` as two branches of work, whatever the kernels are that it consists of.

The dense MLP's three products are PyTorch's, in a branch of their own; router, choice and experts follow each other in
the caller's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..branches import beside
from ..reference.feed_forward import FeedForwardCall
from ..scaled_product import multiplies_fp8, scaled_product


def feed_forward(
    call: FeedForwardCall,
    gated: Callable[[Tensor, Tensor, str], None],
    choose: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
    experts: Callable[..., Tensor],
    quantize_rows: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Results: `reference.feed_forward`. The router's scores are rounded to the dtype of `routed`. Where the MLP's
    weights are FP8, rows are not rounded to that on a GPU that does not multiply it.

    Args:
        gated: (gate [R, F], up [R, F], activation): writes act(gate) * up over `gate`; allocates nothing.
        choose: as `reference.feed_forward.choose`.
        experts, quantize_rows: implementations of these ops.
    """
    dense, width = call.dense, call.dense_down.shape[1]
    # Memory of the caller's stream, which outlives the other's work.
    gate, up = dense.new_empty(2, dense.shape[0], width)
    mlp = torch.empty_like(dense, memory_format=torch.contiguous_format)
    with beside(call.hidden) as (aside,):
        with aside:
            _products(
                quantize_rows,
                dense,
                (call.dense_gate, call.dense_gate_scale, gate),
                (call.dense_up, call.dense_up_scale, up),
            )
            if gate.numel():
                gated(gate, up, call.activation)
            _products(quantize_rows, gate, (call.dense_down, call.dense_down_scale, mlp))
        mixture = call.mixture(experts, *choose(call.routed @ call.router.T, call.expert_scale, call.top_k))
    return mlp, mixture


def _products(quantize_rows: Callable, rows: Tensor, *products: tuple[Tensor, Tensor | None, Tensor]) -> None:
    """Products of the same rows; each is (weight, its scale or None, result)."""
    numbers = row_scale = None
    for weight, scale, result in products:
        if scale is None:
            torch.mm(rows, weight.T, out=result)
            continue
        if numbers is None:
            numbers, row_scale = quantize_rows(rows) if multiplies_fp8(rows.device) else (rows, None)
        scaled_product(numbers, row_scale, weight, scale, result)
