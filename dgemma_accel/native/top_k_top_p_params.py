"""`TopKTopPParams` of a call."""

from __future__ import annotations

import torch
from torch import Tensor

from .params import DTYPES, extension, row_parameter

# The largest fp32 number below 1, which is none.
LARGEST_SHARE = 1 - 2.0**-24


def top_k_top_p_params(
    logits: Tensor,
    temperature: Tensor,
    top_k: int,
    top_p: float,
    top_k_first: bool,
    softcap: float | None,
    cutoff: Tensor,
):
    """The struct for these arguments, which have to stay alive while it is used."""
    rows0, rows1, vocab = logits.shape
    stride0, stride1, _ = logits.stride()
    share = top_p if top_p >= 1 else min(top_p, LARGEST_SHARE)
    # `TopKTopPParams.FIELDS` names them.
    return extension().TopKTopPParams(
        logits, DTYPES[logits.dtype], rows0, rows1, vocab, stride0, stride1,
        row_parameter(temperature, logits.device), top_k, share, top_k_first, softcap or 0.0, cutoff,
    )  # fmt: skip


def output(logits: Tensor) -> Tensor:
    """The cutoffs [N0, N1] fp32, not yet written."""
    return logits.new_empty(logits.shape[:-1], dtype=torch.float32)
