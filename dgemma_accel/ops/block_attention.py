"""`block_attention`: a block of queries over a read-only prefix and its own keys, without copying the prefix."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import pick, requirements
from . import checks
from .registration import operator


@operator("block_attention")
def _block_attention(
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
    window: int | None,
    check: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    length = 0 if prefix_key is None else prefix_key.shape[2]
    checks.values_in("prefix_start", prefix_start, 0, length, force=check)
    checks.values_in("prefix_end", prefix_end, 0, length, force=check)
    run = pick("block_attention", backend, requirements(query, dtype=query.dtype, head_dim=query.shape[-1]))
    return run(
        query, key, value, prefix_key, prefix_value, prefix_start, prefix_end, scale, softcap, causal, window
    )


@_block_attention.register_fake
def _(
    query,
    key,
    value,
    prefix_key,
    prefix_value,
    prefix_start,
    prefix_end,
    scale,
    softcap,
    causal,
    window,
    check,
    backend,
):
    batch, heads, length, head_dim = query.shape
    output = query.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    return output, query.new_empty(batch, heads, length, dtype=torch.float32)


def _check_heads(name: str, tensor: Tensor, query: Tensor, kv_heads: int, length: int | None) -> None:
    checks.is_tensor(name, tensor)
    checks.has_dtype(name, tensor, (query.dtype,))
    checks.on_device(name, tensor, query.device, "query")
    if tensor.ndim != 4:
        raise ValueError(f"{name}: shape must be [B, Hkv, length, D], got {tuple(tensor.shape)}")
    expected = (query.shape[0], kv_heads, tensor.shape[2] if length is None else length, query.shape[3])
    checks.has_shape(name, tensor, expected, "[B, Hkv, length, D]")


def _checked_window(window: int | None, causal: bool) -> int | None:
    if window is None:
        return None
    number = checks.plain_number(window, integer=True)
    if number is None:
        raise TypeError(f"window: an int or None expected, got {type(window).__name__}")
    if number < 1:
        raise ValueError(f"window: must be at least 1, got {window}")
    if not causal:
        raise ValueError("window: only for causal=True; without it, prefix_start limits what all queries see")
    return number


def _unit_last_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    *,
    prefix_start: Tensor | None = None,
    prefix_end: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    causal: bool = False,
    window: int | None = None,
    return_lse: bool = False,
    check: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of C block queries over [prefix[start_b:end_b] ; block], fp32 softmax and accumulation.

    Every query sees the whole prefix range. Inside the block it sees every key, or with `causal` keys up
    to its own position. Slots of the prefix outside [start_b, end_b) are never read. start_b >= end_b
    is an empty prefix.

    Args:
        query: [B, Hq, C, D] bf16, fp16 or fp32.
        key, value: [B, Hkv, C, D], same dtype and device; Hq must be a multiple of Hkv.
        prefix_key, prefix_value: [B, Hkv, L, D], both or neither; any strides with a unit last one.
        prefix_start, prefix_end: [B] int32 slots, 0 <= value <= L; default 0 and L. On a GPU they are
            clamped to the buffer, and checked only with `check=True`.
        scale: factor on the scores, default D ** -0.5 (DiffusionGemma uses 1.0).
        softcap: scores s become c * tanh(s / c); c in [1e-30, 1e30], or None.
        causal: causal inside the block (the encoder's commit pass).
        window: a query sees keys at a distance below this (1: itself alone), where the block follows slot
            end_b - 1: query i sees the slots from end_b - (window - 1 - i) and the block's keys from i - window + 1
            on. Only with `causal`; the sliding layers of the encoder. None: all keys.
        return_lse: also return the log-sum-exp of the scores.
        check: read prefix_start and prefix_end on the device too. Waits for the device.
        backend: "auto", "reference", "cpp", "triton" or "cuda".

    Returns:
        [B, Hq, C, D] in the query's dtype, a view of [B, C, Hq, D] storage, so that transposing it for
        the output projection costs nothing; with `return_lse` also [B, Hq, C] fp32 (natural logarithm).

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value.
        backends.BackendError: the backend named cannot run this call.

    Source: DiffusionGemmaDecoderTextAttention of transformers' modeling_diffusion_gemma.py.
    """
    checks.is_tensor("query", query)
    checks.has_dtype("query", query, checks.FLOAT_DTYPES)
    if query.ndim != 4:
        raise ValueError(f"query: shape must be [B, Hq, C, D], got {tuple(query.shape)}")
    if 0 in query.shape:
        raise ValueError(f"query: no dimension may be 0, got shape {tuple(query.shape)}")
    checks.is_tensor("key", key)
    if key.ndim != 4 or key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"key: shape must be [B, Hkv, C, D] with Hkv dividing Hq = {query.shape[1]}, got {tuple(key.shape)}"
        )
    kv_heads = key.shape[1]
    _check_heads("key", key, query, kv_heads, query.shape[2])
    _check_heads("value", value, query, kv_heads, query.shape[2])
    if (prefix_key is None) != (prefix_value is None):
        raise ValueError("prefix_key and prefix_value: give both or neither")
    if prefix_key is not None:
        _check_heads("prefix_key", prefix_key, query, kv_heads, None)
        _check_heads("prefix_value", prefix_value, query, kv_heads, prefix_key.shape[2])
        prefix_key, prefix_value = _unit_last_stride(prefix_key), _unit_last_stride(prefix_value)
    for name, bound in (("prefix_start", prefix_start), ("prefix_end", prefix_end)):
        if bound is None:
            continue
        if prefix_key is None:
            raise ValueError(f"{name}: given without a prefix")
        checks.is_tensor(name, bound)
        checks.has_dtype(name, bound, (torch.int32,))
        checks.has_shape(name, bound, (query.shape[0],), "one slot per batch row")
        checks.on_device(name, bound, query.device, "query")
    if scale is None:
        scale = query.shape[-1] ** -0.5
    number = checks.plain_number(scale, integer=False)
    if number is None:
        raise TypeError(f"scale: a number expected, got {type(scale).__name__}")
    if not -checks.FP32_MAX <= number <= checks.FP32_MAX:
        raise ValueError(f"scale: must be finite, got {scale}")

    for name, flag in (("causal", causal), ("return_lse", return_lse), ("check", check)):
        checks.is_bool(name, flag)
    checks.is_string("backend", backend)
    window = _checked_window(window, causal)

    output, lse = _block_attention(
        _unit_last_stride(query),
        _unit_last_stride(key),
        _unit_last_stride(value),
        prefix_key,
        prefix_value,
        prefix_start,
        prefix_end,
        float(number),
        checks.softcap_value(softcap),
        causal,
        window,
        check,
        backend,
    )
    return (output, lse) if return_lse else output
