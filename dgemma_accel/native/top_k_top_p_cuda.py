"""`top_k_top_p` by the extension's CUDA kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .params import DTYPES, AtMost, BuiltCapability, extension, missing_cuda
from .top_k_top_p_params import output, top_k_top_p_params

FEATURES = {
    "device": {"cuda"},
    "dtype": set(DTYPES),
    "vocab": AtMost(2**31 - 1),
    "compute_capability": BuiltCapability(8, 0),
}

unavailable = missing_cuda


def top_k_top_p(
    logits: Tensor,
    temperature: Tensor,
    top_k: int,
    top_p: float,
    top_k_first: bool,
    softcap: float | None,
) -> Tensor:
    """As `reference.top_k_top_p`, on the current stream of the logits' device; waits for nothing."""
    with torch.cuda.device(logits.device):
        cutoff = output(logits)
        if cutoff.numel():
            params = top_k_top_p_params(logits, temperature, top_k, top_p, top_k_first, softcap, cutoff)
            extension().top_k_top_p_cuda(params, torch.cuda.current_stream(logits.device).cuda_stream)
    return cutoff
