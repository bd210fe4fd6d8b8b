"""`RowStatsParams` of a call, and the tensors of its result."""

from __future__ import annotations

import torch
from torch import Tensor

from .params import DTYPES, address, extension, row_parameter


def outputs(logits: Tensor) -> tuple[Tensor, ...]:
    """(argmax, sample) int64 and five fp32 tensors, all [N0, N1], not yet written."""
    shape = logits.shape[:-1]
    integers = [torch.empty(shape, dtype=torch.int64, device=logits.device) for _ in range(2)]
    floats = [torch.empty(shape, dtype=torch.float32, device=logits.device) for _ in range(5)]
    return (*integers, *floats)


def row_stats_params(
    logits: Tensor,
    temperature: Tensor,
    stats_temperature: Tensor | None,
    uniform: Tensor | None,
    seed: Tensor | None,
    offset: Tensor,
    softcap: float | None,
    out: tuple[Tensor, ...],
):
    """The struct for these arguments, which have to stay alive while it is used."""
    device = logits.device
    params = extension().RowStatsParams()
    params.logits = logits.data_ptr()
    params.dtype = DTYPES[logits.dtype]
    params.rows0, params.rows1, params.vocab = logits.shape
    params.stride0, params.stride1 = logits.stride(0), logits.stride(1)
    params.temperature = row_parameter(temperature, device)
    if stats_temperature is not None:
        params.has_stats_temperature = True
        params.stats_temperature = row_parameter(stats_temperature, device)
    params.softcap = 0.0 if softcap is None else softcap
    params.uniform = address(uniform)
    if uniform is None:
        params.seed = row_parameter(seed, device)
        params.offset = row_parameter(offset, device)
    names = ("argmax", "sample", "entropy", "logsumexp", "top1_prob", "top2_prob", "sample_prob")
    for name, tensor in zip(names, out):
        setattr(params, name, tensor.data_ptr())
    return params
