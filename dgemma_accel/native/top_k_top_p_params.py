"""`TopKTopPParams` of a call."""

from __future__ import annotations

from torch import Tensor

from .params import DTYPES, extension, row_parameter


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
    # `TopKTopPParams.FIELDS` names them.
    return extension().TopKTopPParams(
        logits, DTYPES[logits.dtype], rows0, rows1, vocab, stride0, stride1,
        row_parameter(temperature, logits.device), top_k, top_p, top_k_first, 0.0 if softcap is None else softcap,
        cutoff,
    )  # fmt: skip
