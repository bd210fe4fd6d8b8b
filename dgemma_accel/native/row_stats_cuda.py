"""`row_stats` by the extension's CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .params import DTYPES, AtMost, BuiltCapability, extension, missing_cuda
from .row_stats_params import outputs, row_stats_params

FEATURES = {
    "device": {"cuda"},
    "dtype": set(DTYPES),
    "vocab": AtMost(2**31 - 1),
    "compute_capability": BuiltCapability(8, 0),
}

unavailable = missing_cuda


def row_stats(
    logits: Tensor,
    temperature: Tensor,
    stats_temperature: Tensor | None,
    uniform: Tensor | None,
    seed: Tensor | None,
    offset: Tensor,
    softcap: float | None,
    cutoff: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """As `reference.row_stats`, on the current stream of the logits' device; waits for nothing."""
    with torch.cuda.device(logits.device):
        out = outputs(logits)
        if out[0].numel() == 0:
            return out
        native = extension()
        params = row_stats_params(
            logits, temperature, stats_temperature, uniform, seed, offset, softcap, out, cutoff
        )
        size = native.row_stats_cuda_workspace(params)
        workspace = torch.empty(size, dtype=torch.uint8, device=logits.device)
        params.workspace = workspace.data_ptr()
        native.row_stats_cuda(params, torch.cuda.current_stream(logits.device).cuda_stream)
    return out
