"""Specification of `block_attention`: a block of queries over a read-only prefix and its own keys."""

from __future__ import annotations

import torch
from torch import Tensor

from .row_stats import compute_dtype


def block_attention(
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
) -> tuple[Tensor, Tensor]:
    """softmax(scale * Q K^T) V of C block queries over [prefix[start_b:end_b] ; block].

    Scores, softmax and the weighted sum are computed in fp32 (fp64 for fp64 inputs) and rounded once.
    `softcap` c turns a scaled score s into c * tanh(s / c). Every query sees the whole prefix range;
    inside the block it sees all keys, or keys 0..i when `causal`. Slots outside [start_b, end_b) are
    never read, so they may hold anything.

    `window` w, in causal calls, hides keys at a distance of w and more: the block follows the prefix, so query i
    is end_b - s + i positions after slot s and i - j after key j of the block. A query sees itself at distance 0.

    Args:
        query: [B, Hq, C, D].
        key, value: [B, Hkv, C, D]; Hq is a multiple of Hkv and query head h reads KV head h // (Hq / Hkv).
        prefix_key, prefix_value: [B, Hkv, L, D], or None for an empty prefix.
        prefix_start, prefix_end: [B] int32 slot range, or None for 0 and L.
        scale: factor on the scores.
        softcap: c > 0, or None.
        causal: mask inside the block only.
        window: keys at a distance below `window` are seen, at least 1; None for all. Only with `causal`.

    Returns:
        (output [B, Hq, C, D] in the query's dtype, stored as [B, C, Hq, D]; lse [B, Hq, C] fp32: natural
        logarithm of the sum of exponentials of the scores).

    Source: DiffusionGemmaDecoderTextAttention and eager_attention_forward of transformers'
    modeling_diffusion_gemma.py (bidirectional), DiffusionGemmaEncoderTextAttention (causal).
    """
    batch, query_heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    group = query_heads // kv_heads
    dtype = compute_dtype(query)
    prefix_length = 0 if prefix_key is None else prefix_key.shape[2]
    starts = [0] * batch if prefix_start is None else prefix_start.tolist()
    ends = [prefix_length] * batch if prefix_end is None else prefix_end.tolist()

    # The storage order [B, C, Hq, D] is what the output projection reads.
    output = query.new_empty(batch, length, query_heads, head_dim).transpose(1, 2)
    lse = torch.empty(batch, query_heads, length, dtype=dtype, device=query.device)
    for b, (start, end) in enumerate(zip(starts, ends)):
        # [Hkv, group, C, D] against [Hkv, 1, K, D]: the heads of a group share keys without repeating them.
        q = query[b].to(dtype).reshape(kv_heads, group * length, head_dim)
        scores = _scores(q, key[b].to(dtype), scale, softcap)
        values = value[b].to(dtype)
        if end > start:
            prefix_scores = _scores(q, prefix_key[b, :, start:end].to(dtype), scale, softcap)
            scores = torch.cat([prefix_scores, scores], dim=-1)
        if causal:
            visible = visible_keys(length, max(end - start, 0), window, query.device)
            scores = scores.masked_fill(~visible.repeat(group, 1), float("-inf"))
        row_lse = torch.logsumexp(scores, -1)
        weights = torch.softmax(scores, -1)
        result = weights[..., end - start :] @ values if end > start else weights @ values
        if end > start:
            result = result + weights[..., : end - start] @ prefix_value[b, :, start:end].to(dtype)
        output[b] = result.view(query_heads, length, head_dim).to(query.dtype)
        lse[b] = row_lse.view(query_heads, length)
    return output, lse.float() if dtype == torch.float32 else lse


def visible_keys(length: int, held: int, window: int | None, device: torch.device) -> Tensor:
    """[C, held + C] bool: which keys the queries of a causal block after `held` slots see."""
    distance = torch.arange(held, held + length, device=device)[:, None] - torch.arange(
        held + length, device=device
    )
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    scores = (q @ k.transpose(-1, -2)) * scale
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)
