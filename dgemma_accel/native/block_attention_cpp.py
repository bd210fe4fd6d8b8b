"""The `cpp` backend of block_attention: PyTorch's flash attention for CPUs, which leaves the log-sum-exp too."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..reference.block_attention import block_attention as reference
from ..reference.block_attention import visible_keys

__all__ = ["FEATURES", "block_attention", "unavailable"]

FEATURES = {"device": {"cpu"}, "dtype": {torch.bfloat16, torch.float16, torch.float32}}

# What `scaled_dot_product_attention` comes to on a CPU. Heads of queries that share keys read them where they are.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
# The least scale that no processor takes for 0.
_LEAST_SCALE = torch.finfo(torch.float32).tiny


def unavailable() -> str | None:
    """It is PyTorch's own operations: never missing."""
    return None


def block_attention(*arguments) -> tuple[Tensor, Tensor]:
    """As `reference.block_attention`, whose arguments it takes by position, and which serves a softcap.

    The part of the prefix that is seen is copied. In bf16 and fp16 the log-sum-exp is off by up to 1e-4, which shows
    where all scores of a row are nearly equal: PyTorch's exponential is a short one there.
    """
    query, key, value, prefix_key, prefix_value, prefix_start, prefix_end, scale, softcap, causal, window = (
        arguments
    )
    if softcap is not None:
        return reference(*arguments)
    batch, length = query.shape[0], query.shape[2]
    whole = 0 if prefix_key is None else prefix_key.shape[2]
    starts = [0] * batch if prefix_start is None else prefix_start.tolist()
    ends = [whole] * batch if prefix_end is None else prefix_end.tolist()
    if window is not None:
        # What no query sees may hold anything, and a mask that is added does not hide NaN.
        starts = [max(start, end - window + 1) for start, end in zip(starts, ends)]
    # A range that ends before it begins is empty, as any other empty one.
    spans = [(start, end) if end > start else (0, 0) for start, end in zip(starts, ends)]

    def attend(rows: slice, start: int, end: int) -> tuple[Tensor, Tensor]:
        keys, values, mask = key[rows], value[rows], None
        if end > start:
            keys = torch.cat([prefix_key[rows, :, start:end], keys], 2)
            values = torch.cat([prefix_value[rows, :, start:end], values], 2)
        # PyTorch sets its own causal mask before it scales the scores: 0 makes NaN of its -inf, and -1 inf.
        triangle = causal and end == start and (window is None or window >= length) and scale >= _LEAST_SCALE
        if causal and not triangle:
            seen = visible_keys(length, end - start, window, query.device)
            mask = torch.zeros(seen.shape, dtype=query.dtype).masked_fill_(~seen, -math.inf)
        parts = (x if x.stride(-1) == 1 else x.contiguous() for x in (query[rows], keys, values))
        output, lse = _flash(*parts, 0.0, triangle, attn_mask=mask, scale=scale)
        # In the order that the output projection reads.
        return output.transpose(1, 2).contiguous(), lse.contiguous()

    if len(set(spans)) == 1:
        output, lse = attend(slice(None), *spans[0])
    else:
        found = [attend(slice(row, row + 1), *span) for row, span in enumerate(spans)]
        output, lse = (torch.cat(parts) for parts in zip(*found))
    # A short row of scores that are all NaN comes out as 0, log-sum-exp included; and a mask that is added does not
    # hide a NaN later in the block from the rows before it.
    if not lse.all() or (causal and lse.isnan().any()):
        return reference(*arguments)
    return output.transpose(1, 2), lse
