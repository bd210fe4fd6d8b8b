"""`feed_forward`: a layer's dense MLP beside its router and experts, with `gated_kernel` between the MLP's products."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..native.feed_forward_branches import feed_forward as in_branches
from ..reference.feed_forward import FeedForwardCall
from .common import FUSED, on_device, unavailable
from .expert_routing import choose
from .experts import FEATURES, activate, experts
from .quantize_rows import quantize_rows

__all__ = ["FEATURES", "feed_forward", "unavailable"]

# Numbers that a program of `gated_kernel` takes.
GATED_BLOCK = 1024


@triton.jit(do_not_specialize=["count"])
def gated_kernel(
    gate, up, count: tl.int64, VECTOR: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """gate = act(gate) * up of `count` numbers that lie together, in fp32 and rounded once; VECTOR divides count."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # All of a vector or nothing, so that the compiler loads it at once.
    m = o // VECTOR * VECTOR < count
    b_gate = tl.load(gate + o, mask=m, other=0.0).to(tl.float32)
    b_up = tl.load(up + o, mask=m, other=0.0).to(tl.float32)
    tl.store(gate + o, (activate(b_gate, ACTIVATION) * b_up).to(gate.dtype.element_ty), mask=m)


def feed_forward(call: FeedForwardCall) -> tuple[Tensor, Tensor]:
    """Arguments and results: `reference.feed_forward`.

    Gate, up and their gated product are rounded to the dtype of `dense`, as the router's scores are to that of
    `routed`; weights of the choices are fp32.
    """
    with on_device(call.hidden):
        return in_branches(call, _gated, choose, experts, quantize_rows)


def _gated(gate: Tensor, up: Tensor, activation: str) -> None:
    gated_kernel[(triton.cdiv(gate.numel(), GATED_BLOCK),)](
        gate, up, gate.numel(), VECTOR=1 if gate.shape[1] % 8 else 8, ACTIVATION=activation, BLOCK=GATED_BLOCK,
        **FUSED, num_warps=4,
    )  # fmt: skip
