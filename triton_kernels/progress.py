"""`progress` in one launch: a program looks through one row of the batch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.progress import ProgressCall
from .common import CAPABILITIES, DEVICES, FUSED, on_device, unavailable

__all__ = ["FEATURES", "progress", "unavailable"]

FEATURES = {"device": DEVICES, "compute_capability": CAPABILITIES}

# Positions that a program looks at together; a row may be longer.
BLOCK = 256


@triton.jit(do_not_specialize=["length", "mask_id"])
def progress_kernel(
    tokens, new_tokens, open, entropy, active, stuck, nfe, finished,
    new_active, new_stuck, new_nfe,
    length: tl.int32, mask_id: tl.int64,
    NOISE: tl.constexpr, ENDS_UNCHANGED: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    was_active = tl.load(active + i_b) != 0
    b_left = tl.zeros([BLOCK], tl.int32)
    b_changed = tl.zeros([BLOCK], tl.int32)
    b_decidable = tl.zeros([BLOCK], tl.int32)
    b_undecidable = tl.zeros([BLOCK], tl.int32)
    for start in range(0, length, BLOCK):
        o_c = start + tl.arange(0, BLOCK)
        m_c = o_c < length
        p_c = i_b * length + o_c
        b_before = tl.load(tokens + p_c, mask=m_c, other=0)
        b_after = tl.load(new_tokens + p_c, mask=m_c, other=0)
        m_open = tl.load(open + p_c, mask=m_c, other=0) != 0
        m_asked = m_open & was_active
        if NOISE == 0:
            m_asked &= b_before == mask_id
        m_valid = tl.load(entropy + p_c, mask=m_c, other=0.0) != float("inf")
        b_left |= (m_open & (b_after == mask_id)).to(tl.int32)
        b_changed |= (b_before != b_after).to(tl.int32)
        b_decidable |= (m_asked & m_valid).to(tl.int32)
        b_undecidable |= (m_asked & (m_valid == 0)).to(tl.int32)
    masks_left = tl.max(b_left, 0) != 0
    unchanged = tl.max(b_changed, 0) == 0
    if finished is None:
        ended = masks_left == 0
    else:
        ended = tl.load(finished + i_b) != 0
    if ENDS_UNCHANGED:
        ended |= unchanged
    else:
        hopeless = unchanged & (tl.max(b_decidable, 0) == 0)
        if NOISE == 0:
            hopeless &= masks_left
        ended |= hopeless
    if LAST:
        ended = was_active
    else:
        ended &= was_active
    if NOISE:
        undecided = tl.max(b_undecidable, 0) != 0
    else:
        undecided = masks_left
    tl.store(new_active + i_b, was_active & (ended == 0))
    tl.store(new_stuck + i_b, (tl.load(stuck + i_b) != 0) | (ended & undecided))
    tl.store(new_nfe + i_b, tl.load(nfe + i_b) + was_active.to(tl.int64))


def progress(call: ProgressCall) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments, results and arithmetic: `reference.progress`."""
    call = call.contiguous()
    batch, length = call.tokens.shape
    active, stuck = (torch.empty_like(call.active) for _ in range(2))
    nfe = torch.empty_like(call.nfe)
    if batch:
        with on_device(call.tokens):
            progress_kernel[(batch,)](
                *call[:8], active, stuck, nfe, length, call.mask_id,
                NOISE=call.noise, ENDS_UNCHANGED=call.ends_unchanged, LAST=call.last, BLOCK=BLOCK,
                **FUSED, num_warps=4,
            )  # fmt: skip
    return active, stuck, nfe
