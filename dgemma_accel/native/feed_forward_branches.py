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


def feed_forward(
    call: FeedForwardCall,
    gated: Callable[[Tensor, Tensor, str], None],
    choose: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
    experts: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:
    """Results: `reference.feed_forward`. The router's scores are rounded to the dtype of `routed`.

    Args:
        gated: (gate [R, F], up [R, F], activation): writes act(gate) * up over `gate`; allocates nothing.
        choose: as `reference.feed_forward.choose`.
        experts: an implementation of the op.
    """
    dense, width = call.dense, call.dense_down.shape[1]
    # Memory of the caller's stream, which outlives the other's work.
    gate, up = dense.new_empty(2, dense.shape[0], width)
    mlp = torch.empty_like(dense, memory_format=torch.contiguous_format)
    with beside(call.hidden) as (aside,):
        with aside:
            torch.mm(dense, call.dense_gate.T, out=gate)
            torch.mm(dense, call.dense_up.T, out=up)
            if gate.numel():
                gated(gate, up, call.activation)
            torch.mm(gate, call.dense_down.T, out=mlp)
        mixture = call.mixture(experts, *choose(call.routed @ call.router.T, call.expert_scale, call.top_k))
    return mlp, mixture
