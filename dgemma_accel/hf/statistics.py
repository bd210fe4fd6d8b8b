"""Row statistics of positions whose token is given, and log-probabilities of tokens that are asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.row_stats import RowStats, row_stats
from ..reference.row_stats import apply_softcap


def as_given(stats: RowStats, canvas: Tensor, pinned: Tensor | None) -> RowStats:
    """Statistics in which a pinned position is certain of its token."""
    if pinned is None:
        return stats
    return stats._replace(
        argmax=torch.where(pinned, canvas, stats.argmax),
        sample=torch.where(pinned, canvas, stats.sample),
        entropy=torch.where(pinned, 0.0, stats.entropy),
        top1_prob=torch.where(pinned, 1.0, stats.top1_prob),
        top2_prob=torch.where(pinned, 0.0, stats.top2_prob),
        sample_prob=torch.where(pinned, 1.0, stats.sample_prob),
    )


def token_logprobs(logits: Tensor, tokens: Tensor, softcap: float | None, backend: str) -> Tensor:
    """ln softmax(softcap(logits)) of some tokens, [B, C, K] fp32, untempered.

    Args:
        logits: [B, C, V]. tokens: [K] int64, best on the same device.
    """
    # At temperature 0 the statistics are those of temperature 1.
    stats = row_stats(logits, temperature=0.0, softcap=softcap, backend=backend)
    chosen = logits.index_select(-1, tokens.to(logits.device)).float()
    return apply_softcap(chosen, softcap) - stats.logsumexp[..., None]
