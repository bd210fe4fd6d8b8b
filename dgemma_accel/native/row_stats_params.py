"""`RowStatsParams` of a call, and the tensors of its result."""

from __future__ import annotations

import torch
from torch import Tensor

from .params import DTYPES, extension, row_parameter


def outputs(logits: Tensor) -> tuple[Tensor, ...]:
    """(argmax, sample) int64 and five fp32 tensors, all [N0, N1], not yet written."""
    argmax = logits.new_empty(logits.shape[:-1], dtype=torch.int64)
    entropy = torch.empty_like(argmax, dtype=torch.float32)
    return (argmax, torch.empty_like(argmax), entropy, *(torch.empty_like(entropy) for _ in range(4)))


def row_stats_params(
    logits: Tensor,
    temperature: Tensor,
    stats_temperature: Tensor | None,
    uniform: Tensor | None,
    seed: Tensor | None,
    offset: Tensor,
    softcap: float | None,
    out: tuple[Tensor, ...],
    cutoff: Tensor | None = None,
):
    """The struct for these arguments, which have to stay alive while it is used."""
    device = logits.device
    if uniform is not None:
        seed = offset = None
    rows0, rows1, vocab = logits.shape
    stride0, stride1, _ = logits.stride()
    # `RowStatsParams.FIELDS` names them; the workspace comes later, its size depends on the others.
    return extension().RowStatsParams(
        logits, DTYPES[logits.dtype], rows0, rows1, vocab, stride0, stride1, row_parameter(temperature, device),
        row_parameter(stats_temperature, device), stats_temperature is not None, 0.0 if softcap is None else softcap,
        uniform, row_parameter(seed, device), row_parameter(offset, device), *out, None, cutoff,
    )  # fmt: skip
