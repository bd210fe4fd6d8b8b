"""`feed_forward`: a layer's dense MLP beside its router and experts.

The MLP's two products are cuBLAS's, with `gated_kernel` between them, on a stream of their own; router, choice and
experts follow each other on the caller's. Both streams meet before the op returns, so nobody outside knows of the
second one, and a CUDA graph gets two branches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FUSED, beside, on_device, unavailable
from .expert_routing import choose
from .experts import FEATURES, activate, experts

__all__ = ["FEATURES", "feed_forward", "unavailable"]

# Columns of a row that a program of `gated_kernel` takes.
GATED_BLOCK = 1024


@triton.jit
def gated_kernel(gate_up, output, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """output [R, WIDTH] = act(gate) * up of gate_up [R, 2 * WIDTH], in fp32 and rounded once."""
    TILES: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    i_r = (tl.program_id(0) // TILES).to(tl.int64)
    o = tl.program_id(0) % TILES * BLOCK + tl.arange(0, BLOCK)
    m = o < WIDTH
    p_g = gate_up + i_r * (2 * WIDTH) + o
    b_gate = tl.load(p_g, mask=m, other=0.0).to(tl.float32)
    b_up = tl.load(p_g + WIDTH, mask=m, other=0.0).to(tl.float32)
    b_o = activate(b_gate, ACTIVATION) * b_up
    tl.store(output + i_r * WIDTH + o, b_o.to(output.dtype.element_ty), mask=m)


def feed_forward(
    dense: Tensor,
    routed: Tensor,
    hidden: Tensor,
    dense_gate_up: Tensor,
    dense_down: Tensor,
    router: Tensor,
    expert_scale: Tensor,
    gate_up: Tensor,
    down: Tensor,
    top_k: int,
    activation: str = "gelu_tanh",
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    gate_up_global_scale: Tensor | None = None,
    down_global_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results: `reference.feed_forward`.

    Gate, up and their gated product are rounded to the dtype of `dense`, as the router's scores are to that of
    `routed`; weights of the choices are fp32.
    """
    rows, width = dense.shape[0], dense_down.shape[1]
    # Memory of the caller's stream, which outlives the other's work.
    both, middle = dense.new_empty(rows, 2 * width), dense.new_empty(rows, width)
    mlp = torch.empty_like(dense, memory_format=torch.contiguous_format)
    with on_device(hidden), beside(hidden) as aside:
        with aside:
            _mlp(dense, dense_gate_up, dense_down, activation, both, middle, mlp)
        index, weights = choose(routed @ router.T, expert_scale, top_k)
        scales = (gate_up_scale, down_scale, gate_up_global_scale, down_global_scale)
        mixture = experts(hidden, index, weights, gate_up, down, activation, *scales)
    return mlp, mixture


def _mlp(
    rows: Tensor, gate_up: Tensor, down: Tensor, activation: str, both: Tensor, middle: Tensor, output: Tensor
):
    torch.mm(rows, gate_up.T, out=both)
    count, width = middle.shape
    if count:
        gated_kernel[(count * triton.cdiv(width, GATED_BLOCK),)](
            both, middle, WIDTH=width, ACTIVATION=activation, BLOCK=GATED_BLOCK, **FUSED, num_warps=4,
        )  # fmt: skip
    torch.mm(middle, down.T, out=output)
