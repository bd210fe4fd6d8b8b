"""`feed_forward`: a layer's dense MLP beside its router and experts.

The MLP's three products are PyTorch's, with `gated_kernel` between them, in a branch of their own; router, choice and
experts follow each other in the caller's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..branches import beside
from ..reference.feed_forward import FeedForwardCall
from .common import FUSED, on_device, unavailable
from .expert_routing import choose
from .experts import FEATURES, activate, experts

__all__ = ["FEATURES", "feed_forward", "unavailable"]

# Numbers that a program of `gated_kernel` takes.
GATED_BLOCK = 1024


@triton.jit(do_not_specialize=["count"])
def gated_kernel(
    gate, up, output, count: tl.int64, VECTOR: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """output = act(gate) * up of `count` numbers that lie together, in fp32 and rounded once; VECTOR divides count."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # All of a vector or nothing, so that the compiler loads it at once.
    m = o // VECTOR * VECTOR < count
    b_gate = tl.load(gate + o, mask=m, other=0.0).to(tl.float32)
    b_up = tl.load(up + o, mask=m, other=0.0).to(tl.float32)
    tl.store(output + o, (activate(b_gate, ACTIVATION) * b_up).to(output.dtype.element_ty), mask=m)


def feed_forward(call: FeedForwardCall) -> tuple[Tensor, Tensor]:
    """Arguments and results: `reference.feed_forward`.

    Gate, up and their gated product are rounded to the dtype of `dense`, as the router's scores are to that of
    `routed`; weights of the choices are fp32.
    """
    dense, width = call.dense, call.dense_down.shape[1]
    # Memory of the caller's stream, which outlives the other's work.
    gate, up, middle = dense.new_empty(3, dense.shape[0], width)
    mlp = torch.empty_like(dense, memory_format=torch.contiguous_format)
    with on_device(call.hidden), beside(call.hidden) as (aside,):
        with aside:
            torch.mm(dense, call.dense_gate.T, out=gate)
            torch.mm(dense, call.dense_up.T, out=up)
            if middle.numel():
                gated_kernel[(triton.cdiv(middle.numel(), GATED_BLOCK),)](
                    gate, up, middle, middle.numel(), VECTOR=1 if width % 8 else 8, ACTIVATION=call.activation,
                    BLOCK=GATED_BLOCK, **FUSED, num_warps=4,
                )  # fmt: skip
            torch.mm(middle, call.dense_down.T, out=mlp)
        mixture = call.mixture(experts, *choose(call.routed @ call.router.T, call.expert_scale, call.top_k))
    return mlp, mixture
