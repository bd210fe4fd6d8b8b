"""The language model's head: `head_stats` where it is a plain matrix, `head_stats` of a shard and `merge_stats` where
its vocabulary is split over ranks, the module itself where it is neither."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.checks import FLOAT_DTYPES
from ..ops.head_stats import head_stats
from ..ops.row_stats import RowStats, row_stats
from . import split_head
from .products import is_product


def is_plain(lm_head: nn.Module, hidden: Tensor) -> bool:
    """Whether `head_stats` takes the weight of `lm_head`, with `hidden` or another tensor of its dtype and device."""
    weight = lm_head.weight if is_product(lm_head) else None
    return (
        weight is not None
        and weight.dtype in FLOAT_DTYPES
        and weight.dtype == hidden.dtype
        and weight.device == hidden.device
    )


def logits_and_stats(
    lm_head: nn.Module,
    hidden: Tensor,
    *,
    temperature: Tensor,
    softcap: float | None,
    seed: Tensor,
    offset: Tensor | int,
    backend: str,
) -> tuple[Tensor | split_head.SplitLogits, RowStats]:
    """(logits [B, C, V] in the model's dtype before softcap and temperature, their `RowStats` [B, C]).

    Where the head is split over ranks the logits are this rank's columns, and the statistics those of all columns.

    Args:
        hidden: [B, C, E], the decoder's last hidden states.
        The others as in `row_stats`.
    """
    draw = {
        "temperature": temperature,
        "softcap": softcap,
        "seed": seed,
        "offset": offset,
        "backend": backend,
    }
    if not (torch.is_grad_enabled() and lm_head.weight.requires_grad):
        # Autocast says in which dtype the module multiplies; an op does not ask it.
        if is_plain(lm_head, hidden) and not torch._C._is_any_autocast_enabled():
            return head_stats(hidden, lm_head.weight, **draw)
        if split_head.is_split(lm_head, hidden):
            return split_head.logits_and_stats(lm_head, hidden, **draw)
    logits = lm_head(hidden)
    return logits, row_stats(logits, **draw)
