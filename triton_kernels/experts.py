"""`experts` as grouped matrix products over tiles of rows that chose the same expert.

`route` lists the tiles on the device. `gate_up_kernel` computes act(gate) * up of a tile, `down_kernel` the expert's
result of every (row, choice), in fp32 and at a place of its own, and `combine_kernel` adds a row's choices up
in their order: no two programs add to one number, so results repeat bit for bit.

Both products are computed transposed, weights @ rows^T. Matrix instructions are wide in their first dimension (64 on
sm_90, 16 elsewhere) and narrow in the second (8): the weights have enough columns for the one, and the 16 rows
that an expert gets from a canvas are enough for the other.

FP8 and NVFP4 weights go through the same kernels; `expert_weights` has what becomes of them in registers. No weight is
rounded a second time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..reference.quantization import NVFP4, scales_by_row
from .common import CAPABILITIES, DEVICES, FUSED, INTERPRET, SINCE_3_9, capability, on_device, unavailable
from .expert_routing import route
from .expert_weights import (
    IN_WORD,
    SCALE_BLOCK,
    SCALE_GROUP,
    by_quarters,
    load_global_scale,
    load_group_scales,
    load_quarters,
    load_scale,
    load_tile,
    load_weights,
    nvfp4_dot,
    quarter_place,
    widen,
)

__all__ = ["FEATURES", "experts", "unavailable"]

FEATURES = {
    "device": DEVICES,
    "dtype": frozenset({torch.bfloat16, torch.float16, torch.float32}),
    "compute_capability": CAPABILITIES,
    "activation": frozenset({"gelu_tanh", "silu"}),
}

# Choices (rows * K) computed at a time: bounds the fp32 results of a long prompt, 369 MB at E = 2816.
PAIRS_AT_ONCE = 32_768
# The mean number of rows by expert up to which a call takes the configuration for few.
FEW = 24
# Rows and columns that a program of `combine_kernel` adds up.
COMBINE_ROWS, COMBINE_BLOCK = 4, 512
# The first architecture that has an instruction for e4m3; older ones take its bits apart.
E4M3_INSTRUCTION = (8, 9)
# Before this one e4m3 goes to bf16 by way of fp16 and fp32. The compiler's own way on sm_90 is an instruction
# (F2F) that does 16 numbers in a cycle, fewer than the memory delivers. Triton 3.6 takes it for sm_89 too, which
# has none, in a process that compiled for a newer one before.
BF16_INSTRUCTION = (10, 0)
# Products one after the other on one accumulator, as NVFP4 weights take four of in a pass. Triton before 3.9 gives each
# of them tensor memory of its own on sm_100, and the launch of a large tile is refused.
CHAINS = SINCE_3_9


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):
    """The activation of an fp32 tile. 0.5 (1 + tanh(u)) is 1 / (1 + e^(-2u)), which cancels nowhere."""
    LOG2E: tl.constexpr = 1.4426950408889634
    u = gate
    if ACTIVATION == "gelu_tanh":
        u = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate / (1.0 + tl.exp2(-u * LOG2E))


@triton.jit(do_not_specialize=["tiles_most", "global_scales"])
def gate_up_kernel(
    hidden, gate_up, scale, global_scale, order, tiles, middle, tiles_most: tl.int32, global_scales: tl.int32,
    stride_h: tl.int64, stride_x: tl.int64, stride_n: tl.int64,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, FORMAT: tl.constexpr, BY_FP16: tl.constexpr,
    PAIRS: tl.constexpr, QUARTERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """middle [pairs by expert, WIDTH]: act(gate) * up of BLOCK_M places x BLOCK_N columns, by quarters with QUARTERS.

    FORMAT of the weights: "plain"; "fp8", scale [X, blocks of 2 * WIDTH, blocks of HIDDEN]; "fp8_rows", scale
    [X, 2 * WIDTH]; "nvfp4", gate_up words [X, 2 * WIDTH, HIDDEN / 8], scale [X, 2 * WIDTH, HIDDEN / 16] as int8,
    global_scale [X, global_scales], of the gate first and of up last, hidden by quarters.
    """
    # A pass over NVFP4 weights is four products BLOCK_K deep.
    COLUMNS: tl.constexpr = 4 * BLOCK_K if FORMAT == "nvfp4" else BLOCK_K
    TILES_N: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    EVEN: tl.constexpr = HIDDEN % COLUMNS == 0
    # Columns vary fastest: tiles of one expert run close together, so L2 hands its weights to all of them.
    i_n = tl.program_id(0) % TILES_N
    i_t = tl.program_id(0) // TILES_N
    i_e = tl.load(tiles + i_t)
    if i_e < 0:
        return
    begin = tl.load(tiles + tiles_most + i_t)
    end = tl.load(tiles + 2 * tiles_most + i_t)
    # Beyond the edges the last row and column stand in: computed, not stored, and no mask in the loop.
    o_m = begin + tl.arange(0, BLOCK_M)
    o_r = tl.load(order + tl.minimum(o_m, end - 1)) // TOP_K
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_w = tl.minimum(o_n, WIDTH - 1).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    p_x = hidden + (o_r.to(tl.int64) * stride_h)[:, None] + o_k[None, :]
    p_g = gate_up + i_e.to(tl.int64) * stride_x + (o_w * stride_n)[:, None] + o_k[None, :]
    p_u = p_g + WIDTH * stride_n
    # [BLOCK_N, BLOCK_M]
    b_gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    b_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if FORMAT == "nvfp4":
        o_8, o_16 = tl.arange(0, COLUMNS // IN_WORD), tl.arange(0, COLUMNS // SCALE_GROUP)
        # Strides that the compiler knows: it copies 16 bytes at a time where it sees that they are aligned.
        o_w += i_e.to(tl.int64) * (2 * WIDTH)
        p_g = gate_up + (o_w * (HIDDEN // IN_WORD))[:, None] + o_8[None, :]
        p_u = p_g + WIDTH * (HIDDEN // IN_WORD)
        p_sg = scale + (o_w * (HIDDEN // SCALE_GROUP))[:, None] + o_16[None, :]
        p_su = p_sg + WIDTH * (HIDDEN // SCALE_GROUP)
        for k in range(0, HIDDEN, COLUMNS):
            # 4 x [BLOCK_K, BLOCK_M]; words and their scales [BLOCK_N, COLUMNS / 8] twice
            k_8, left_8, left_16 = k // IN_WORD, (HIDDEN - k) // IN_WORD, (HIDDEN - k) // SCALE_GROUP
            b_x = load_quarters(p_x + k // 4, o_k, (HIDDEN - k) // 4, HIDDEN // 4, EVEN, UPCAST)
            b_s = load_group_scales(p_sg + k // SCALE_GROUP, o_16, left_16, EVEN, b_x[0].dtype, PAIRS)
            b_g = load_tile(p_g + k_8, o_8, left_8, EVEN, False)
            b_gate = nvfp4_dot(b_gate, b_g, b_s, b_x, PRECISION, PAIRS)
            b_s = load_group_scales(p_su + k // SCALE_GROUP, o_16, left_16, EVEN, b_x[0].dtype, PAIRS)
            b_u = load_tile(p_u + k_8, o_8, left_8, EVEN, False)
            b_up = nvfp4_dot(b_up, b_u, b_s, b_x, PRECISION, PAIRS)
        p_t = global_scale + i_e * global_scales
        b_gate *= load_global_scale(p_t)
        b_up *= load_global_scale(p_t + global_scales - 1)
    elif FORMAT == "fp8":
        tl.static_assert(
            SCALE_BLOCK % BLOCK_K == 0 and SCALE_BLOCK % BLOCK_N == 0, "a tile in two blocks at most"
        )
        DEPTH: tl.constexpr = (HIDDEN + SCALE_BLOCK - 1) // SCALE_BLOCK
        # The up projection begins inside a block, so its tiles may lie in two.
        WHOLE: tl.constexpr = WIDTH % BLOCK_N == 0
        first = WIDTH + i_n * BLOCK_N
        last = tl.minimum(first + BLOCK_N, 2 * WIDTH) - 1
        p_s = scale + i_e.to(tl.int64) * ((2 * WIDTH + SCALE_BLOCK - 1) // SCALE_BLOCK * DEPTH)
        p_sg = p_s + i_n * BLOCK_N // SCALE_BLOCK * DEPTH
        p_su = p_s + first // SCALE_BLOCK * DEPTH
        p_sl = p_s + last // SCALE_BLOCK * DEPTH
        left = last // SCALE_BLOCK * SCALE_BLOCK - WIDTH
        for k in range(0, HIDDEN, BLOCK_K):
            s_g = tl.load(p_sg + k // SCALE_BLOCK)
            # One number or [BLOCK_N, 1]
            b_s = load_scale(p_su + k // SCALE_BLOCK, p_sl + k // SCALE_BLOCK, o_n, left, WHOLE)
            # [BLOCK_M, BLOCK_K], [BLOCK_N, BLOCK_K] twice
            b_x = tl.trans(load_tile(p_x + k, o_k, HIDDEN - k, EVEN, UPCAST))
            b_g = widen(load_tile(p_g + k, o_k, HIDDEN - k, EVEN, False), b_x.dtype, BY_FP16)
            b_gate += tl.dot(b_g, b_x, input_precision=PRECISION) * s_g
            b_u = widen(load_tile(p_u + k, o_k, HIDDEN - k, EVEN, False), b_x.dtype, BY_FP16)
            b_up += tl.dot(b_u, b_x, input_precision=PRECISION) * b_s
    else:
        for k in range(0, HIDDEN, BLOCK_K):
            # [BLOCK_M, BLOCK_K], [BLOCK_N, BLOCK_K] twice
            b_x = tl.trans(load_tile(p_x + k, o_k, HIDDEN - k, EVEN, UPCAST))
            b_g = load_weights(p_g + k, o_k, HIDDEN - k, EVEN, UPCAST, FORMAT, b_x.dtype, BY_FP16)
            b_gate = tl.dot(b_g, b_x, b_gate, input_precision=PRECISION)
            b_u = load_weights(p_u + k, o_k, HIDDEN - k, EVEN, UPCAST, FORMAT, b_x.dtype, BY_FP16)
            b_up = tl.dot(b_u, b_x, b_up, input_precision=PRECISION)
        if FORMAT == "fp8_rows":
            p_s = scale + i_e.to(tl.int64) * (2 * WIDTH) + o_w
            b_gate *= tl.load(p_s)[:, None]
            b_up *= tl.load(p_s + WIDTH)[:, None]
    b_middle = activate(b_gate, ACTIVATION) * b_up
    o_o = quarter_place(o_n, WIDTH) if QUARTERS else o_n
    p_o = middle + (o_m.to(tl.int64) * WIDTH)[None, :] + o_o[:, None]
    tl.store(p_o, b_middle.to(middle.dtype.element_ty), mask=(o_m < end)[None, :] & (o_n < WIDTH)[:, None])


@triton.jit(do_not_specialize=["tiles_most"])
def down_kernel(
    middle, down, scale, global_scale, order, tiles, partial, tiles_most: tl.int32,
    stride_x: tl.int64, stride_n: tl.int64,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    FORMAT: tl.constexpr, BY_FP16: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial [pairs, HIDDEN] fp32: middle @ down^T of BLOCK_M places x BLOCK_N columns, stored in the pairs' order.

    FORMAT of the weights: "plain"; "fp8", scale [X, blocks of HIDDEN, blocks of WIDTH]; "fp8_rows", scale [X, HIDDEN];
    "nvfp4", down words [X, HIDDEN, WIDTH / 8], scale [X, HIDDEN, WIDTH / 16] as int8, global_scale [X], middle by
    quarters.
    """
    COLUMNS: tl.constexpr = 4 * BLOCK_K if FORMAT == "nvfp4" else BLOCK_K
    TILES_N: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    EVEN: tl.constexpr = WIDTH % COLUMNS == 0
    i_n = tl.program_id(0) % TILES_N
    i_t = tl.program_id(0) // TILES_N
    i_e = tl.load(tiles + i_t)
    if i_e < 0:
        return
    begin = tl.load(tiles + tiles_most + i_t)
    end = tl.load(tiles + 2 * tiles_most + i_t)
    o_m = begin + tl.arange(0, BLOCK_M)
    o_s = tl.minimum(o_m, end - 1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_w = tl.minimum(o_n, HIDDEN - 1).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    p_x = middle + (o_s.to(tl.int64) * WIDTH)[:, None] + o_k[None, :]
    p_w = down + i_e.to(tl.int64) * stride_x + (o_w * stride_n)[:, None] + o_k[None, :]
    # [BLOCK_N, BLOCK_M]
    b_o = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if FORMAT == "nvfp4":
        o_8, o_16 = tl.arange(0, COLUMNS // IN_WORD), tl.arange(0, COLUMNS // SCALE_GROUP)
        o_w += i_e.to(tl.int64) * HIDDEN
        p_w = down + (o_w * (WIDTH // IN_WORD))[:, None] + o_8[None, :]
        p_s = scale + (o_w * (WIDTH // SCALE_GROUP))[:, None] + o_16[None, :]
        for k in range(0, WIDTH, COLUMNS):
            # 4 x [BLOCK_K, BLOCK_M]; words and their scales [BLOCK_N, COLUMNS / 8]
            b_x = load_quarters(p_x + k // 4, o_k, (WIDTH - k) // 4, WIDTH // 4, EVEN, UPCAST)
            left = (WIDTH - k) // SCALE_GROUP
            b_s = load_group_scales(p_s + k // SCALE_GROUP, o_16, left, EVEN, b_x[0].dtype, PAIRS)
            b_w = load_tile(p_w + k // IN_WORD, o_8, (WIDTH - k) // IN_WORD, EVEN, False)
            b_o = nvfp4_dot(b_o, b_w, b_s, b_x, PRECISION, PAIRS)
        b_o *= load_global_scale(global_scale + i_e)
    elif FORMAT == "fp8":
        tl.static_assert(
            SCALE_BLOCK % BLOCK_K == 0 and SCALE_BLOCK % BLOCK_N == 0, "a tile in one block only"
        )
        DEPTH: tl.constexpr = (WIDTH + SCALE_BLOCK - 1) // SCALE_BLOCK
        p_s = scale + i_e.to(tl.int64) * ((HIDDEN + SCALE_BLOCK - 1) // SCALE_BLOCK * DEPTH)
        p_s += i_n * BLOCK_N // SCALE_BLOCK * DEPTH
        for k in range(0, WIDTH, BLOCK_K):
            s_w = tl.load(p_s + k // SCALE_BLOCK)
            # [BLOCK_M, BLOCK_K], [BLOCK_N, BLOCK_K]
            b_x = tl.trans(load_tile(p_x + k, o_k, WIDTH - k, EVEN, UPCAST))
            b_w = widen(load_tile(p_w + k, o_k, WIDTH - k, EVEN, False), b_x.dtype, BY_FP16)
            b_o += tl.dot(b_w, b_x, input_precision=PRECISION) * s_w
    else:
        for k in range(0, WIDTH, BLOCK_K):
            # [BLOCK_M, BLOCK_K], [BLOCK_N, BLOCK_K]
            b_x = tl.trans(load_tile(p_x + k, o_k, WIDTH - k, EVEN, UPCAST))
            b_w = load_weights(p_w + k, o_k, WIDTH - k, EVEN, UPCAST, FORMAT, b_x.dtype, BY_FP16)
            b_o = tl.dot(b_w, b_x, b_o, input_precision=PRECISION)
        if FORMAT == "fp8_rows":
            b_o *= tl.load(scale + i_e.to(tl.int64) * HIDDEN + o_w)[:, None]
    o_p = tl.load(order + o_s)
    p_o = partial + (o_p.to(tl.int64) * HIDDEN)[None, :] + o_n[:, None]
    tl.store(p_o, b_o, mask=(o_m < end)[None, :] & (o_n < HIDDEN)[:, None])


@triton.jit(do_not_specialize=["rows"])
def combine_kernel(
    partial, index, weights, output, rows: tl.int32, stride_r: tl.int64, stride_k: tl.int64,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """output [rows, HIDDEN]: the weighted sum of a row's choices, in their order; choices of no expert are not read."""
    TILES: tl.constexpr = (HIDDEN + BLOCK - 1) // BLOCK
    o_r = (tl.program_id(0) // TILES * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    m_r = o_r < rows
    o = tl.program_id(0) % TILES * BLOCK + tl.arange(0, BLOCK)
    # [ROWS, BLOCK]
    b_o = tl.zeros([ROWS, BLOCK], tl.float32)
    for k in range(TOP_K):
        # [ROWS]
        b_e = tl.load(index + o_r * TOP_K + k, mask=m_r, other=-1)
        b_w = tl.load(weights + o_r * stride_r + k * stride_k, mask=m_r, other=0.0).to(tl.float32)
        m_y = ((b_e >= 0) & (b_e < EXPERTS))[:, None] & (o < HIDDEN)[None, :]
        b_y = tl.load(partial + ((o_r * TOP_K + k) * HIDDEN)[:, None] + o[None, :], mask=m_y, other=0.0)
        b_o += tl.where(m_y, b_y * b_w[:, None], 0.0)
    p_o = output + (o_r * HIDDEN)[:, None] + o[None, :]
    tl.store(p_o, b_o.to(output.dtype.element_ty), mask=m_r[:, None] & (o < HIDDEN)[None, :])


def experts(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str = "gelu_tanh",
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    gate_up_global_scale: Tensor | None = None,
    down_global_scale: Tensor | None = None,
) -> Tensor:
    """Arguments and result: `reference.experts`.

    Products accumulate in fp32; act(gate) * up is computed in fp32 and rounded once, to the dtype of the rows;
    weights and sum of a row's choices are fp32, rounded once.
    """
    output = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if output.numel() == 0 or index.numel() == 0:
        return output.zero_()
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    matrices = (
        Matrix.of(gate_up, gate_up_scale, gate_up_global_scale, hidden),
        Matrix.of(down, down_scale, down_global_scale, hidden),
    )
    at_once = max(1, PAIRS_AT_ONCE // index.shape[1])
    with on_device(hidden):
        for first in range(0, hidden.shape[0], at_once):
            part = slice(first, first + at_once)
            rows = (hidden[part], index[part].contiguous(), weights[part])
            _experts(*rows, *matrices, activation, output[part])
    return output


class Matrix(NamedTuple):
    """The weights of one product as a kernel takes them: [X, N, K], or NVFP4's words [X, N, K / 8].

    bytes: of a weight.
    """

    weight: Tensor
    scale: Tensor | None
    global_scale: Tensor | None
    format: str
    bytes: float

    @property
    def global_scales(self) -> int:
        """Of an expert."""
        return 0 if self.global_scale is None else self.global_scale.numel() // len(self.weight)

    @classmethod
    def of(cls, weight: Tensor, scale: Tensor | None, global_scale: Tensor | None, hidden: Tensor) -> Matrix:
        """From the op's arguments, for a launch on `hidden`."""
        if weight.dtype == NVFP4:
            scale = scale.view(torch.int8).contiguous()
            return cls(as_words(weight), scale, global_scale.contiguous(), "nvfp4", 0.5)
        weight = weight if weight.stride(-1) == 1 else weight.contiguous()
        if scale is None:
            return cls(weight, None, None, "plain", weight.element_size())
        format = "fp8_rows" if scales_by_row(weight, scale) else "fp8"
        if is_before(E4M3_INSTRUCTION, hidden):
            weight = weight.view(torch.int8)
        return cls(weight, scale.contiguous(), None, format, 1)


def as_words(weight: Tensor) -> Tensor:
    """Bytes [..., N, K / 2] as int32 [..., N, K / 8], contiguous; a copy where words of them would not be aligned."""
    weight = weight.contiguous()
    return (weight if weight.storage_offset() % 4 == 0 else weight.clone()).view(torch.int32)


def is_before(architecture: tuple[int, int], tensor: Tensor) -> bool:
    """Whether a launch on `tensor` is for an older architecture; the interpreter is for none."""
    target = capability(tensor)
    return target is not None and tuple(target) < architecture


def _experts(
    hidden: Tensor, index: Tensor, weights: Tensor, gate_up: Matrix, down: Matrix, activation: str, output: Tensor
) -> None:  # fmt: skip
    (rows, embedding), top_k, count = hidden.shape, index.shape[1], len(down.weight)
    width = gate_up.weight.shape[1] // 2
    crowd = "few" if index.numel() <= FEW * count else "many"

    def config_for(matrix: Matrix) -> dict:
        # Products of fp32 rows are bound by arithmetic, however the weights are stored.
        size = hidden.element_size() if hidden.dtype == torch.float32 else matrix.bytes
        return configs.select(
            "experts", capability(hidden), bytes=size, format=matrix.format, rows=crowd, chained=CHAINS
        )

    first, second = config_for(gate_up), config_for(down)
    # Tiles are cut once for both products: what fits the one of more rows fits with fewer.
    block_m = min(first["block_m"], second["block_m"])
    order, tiles = route(index, count, block_m)
    total = tiles.shape[1]
    middle = hidden.new_empty(index.numel(), width)
    partial = hidden.new_empty((index.numel(), embedding), dtype=torch.float32)
    common = {
        "WIDTH": width, "HIDDEN": embedding, "BLOCK_M": block_m,
        "PRECISION": "ieee" if hidden.dtype == torch.float32 else "tf32",
        "UPCAST": INTERPRET and hidden.dtype == torch.bfloat16,
        "BY_FP16": hidden.dtype == torch.bfloat16 and is_before(BF16_INSTRUCTION, hidden),
        # The interpreter has no instructions for pairs.
        "PAIRS": hidden.dtype != torch.float32 and not INTERPRET,
    }  # fmt: skip
    if gate_up.format == "nvfp4":
        hidden = by_quarters(hidden)
    gate_up_kernel[(total * triton.cdiv(width, first["up_n"]),)](
        hidden, gate_up.weight, gate_up.scale, gate_up.global_scale, order, tiles, middle, total, gate_up.global_scales,
        hidden.stride(0), gate_up.weight.stride(0), gate_up.weight.stride(1),
        TOP_K=top_k, ACTIVATION=activation, FORMAT=gate_up.format, QUARTERS=down.format == "nvfp4",
        BLOCK_N=first["up_n"], BLOCK_K=first["up_k"],
        **FUSED, num_warps=first["up_warps"], num_stages=first["up_stages"], **common,
    )  # fmt: skip
    down_kernel[(total * triton.cdiv(embedding, second["down_n"]),)](
        middle, down.weight, down.scale, down.global_scale, order, tiles, partial, total,
        down.weight.stride(0), down.weight.stride(1),
        FORMAT=down.format, BLOCK_N=second["down_n"], BLOCK_K=second["down_k"],
        **FUSED, num_warps=second["down_warps"], num_stages=second["down_stages"], **common,
    )  # fmt: skip
    combine_kernel[(triton.cdiv(rows, COMBINE_ROWS) * triton.cdiv(embedding, COMBINE_BLOCK),)](
        partial, index, weights, output, rows, weights.stride(0), weights.stride(1),
        EXPERTS=count, TOP_K=top_k, HIDDEN=embedding, ROWS=COMBINE_ROWS, BLOCK=COMBINE_BLOCK, **FUSED, num_warps=4,
    )  # fmt: skip
