"""`progress` by the extension's CUDA kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.progress import ProgressCall
from .params import BuiltCapability, extension, missing_cuda
from .progress_params import prepare

FEATURES = {"device": {"cuda"}, "compute_capability": BuiltCapability(8, 0)}

unavailable = missing_cuda


def progress(call: ProgressCall) -> tuple[Tensor, ...]:
    """As `reference.progress`, on the current stream of the tokens' device; waits for nothing."""
    device = call.tokens.device
    with torch.cuda.device(device):
        params, result, alive = prepare(call)
        if len(call.tokens):
            extension().progress_cuda(params, torch.cuda.current_stream(device).cuda_stream)
        # The launch is queued: the caching allocator hands this memory on in stream order only.
        del alive
    return result
