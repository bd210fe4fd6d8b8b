"""`BlockAttentionParams` of a call, and the tensors of its result."""

from __future__ import annotations

import torch
from torch import Tensor

from .params import DTYPES, address, extension

# Bytes that a kernel's widest load takes at once.
VECTOR = 16


def is_aligned(tensor: Tensor) -> bool:
    """Whether every row of [B, H, length, D] starts on a 16-byte boundary; others are read element by element."""
    size = tensor.element_size()
    steps = [stride for stride, count in zip(tensor.stride()[:-1], tensor.shape) if count > 1]
    return tensor.data_ptr() % VECTOR == 0 and all(step * size % VECTOR == 0 for step in steps)


def heads_view(tensor: Tensor | None) -> tuple[int, int, int, int, bool]:
    """(address, batch stride, head stride, slot stride, aligned), strides in elements."""
    if tensor is None:
        return 0, 0, 0, 0, True
    # A dimension of one may have any stride, and copies of nothing, from beyond it, need aligned addresses as well.
    strides = (stride if count > 1 else 0 for stride, count in zip(tensor.stride()[:3], tensor.shape))
    return (tensor.data_ptr(), *strides, is_aligned(tensor))


def block_attention_params(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    prefix_start: Tensor | None,
    prefix_end: Tensor | None,
    scale: float,
    softcap: float | None,
    causal: bool,
    window: int | None = None,
):
    """The struct for these arguments, still without results; they have to stay alive while it is used."""
    params = extension().BlockAttentionParams()
    params.dtype = DTYPES[query.dtype]
    params.batch, params.query_heads, params.length, params.head_dim = query.shape
    params.kv_heads = key.shape[1]
    params.prefix_length = 0 if prefix_key is None else prefix_key.shape[2]
    params.query, params.key, params.value = heads_view(query), heads_view(key), heads_view(value)
    params.prefix_key, params.prefix_value = heads_view(prefix_key), heads_view(prefix_value)
    params.prefix_start, params.prefix_end = address(prefix_start), address(prefix_end)
    params.scale = scale
    params.softcap = 0.0 if softcap is None else softcap
    params.causal = causal
    if window is not None:
        params.window = min(window, params.window)
    return params


def outputs(params, query: Tensor) -> tuple[Tensor, Tensor]:
    """(output [B, Hq, C, D] stored as [B, C, Hq, D], lse [B, Hq, C] fp32), not yet written, set in the struct."""
    batch, heads, length, head_dim = query.shape
    output = query.new_empty(batch, length, heads, head_dim)
    lse = query.new_empty(batch, heads, length, dtype=torch.float32)
    params.output, params.lse = output.data_ptr(), lse.data_ptr()
    return output.transpose(1, 2), lse


def partial_outputs(params, splits: int, query: Tensor) -> tuple[Tensor, ...]:
    """Room for the shares of the splits, set in the struct: 4 bytes per split and element, none for one split."""
    params.splits = splits
    if splits == 1:
        return ()
    shares = query.new_empty(splits * query.numel(), dtype=torch.float32)
    lse = query.new_empty(splits * query.numel() // query.shape[-1], dtype=torch.float32)
    params.partial_output, params.partial_lse = shares.data_ptr(), lse.data_ptr()
    return shares, lse
