"""`quantize_rows` by the extension's CUDA kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.quantization import FP8
from .params import DTYPES, BuiltCapability, extension, missing_cuda

FEATURES = {"device": {"cuda"}, "compute_capability": BuiltCapability(8, 0), "dtype": frozenset(DTYPES)}

unavailable = missing_cuda


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.quantization.quantize_rows`, the same bits, on the current stream of the rows' device."""
    width, device = rows.shape[-1], rows.device
    flat = rows.reshape(-1, width)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    numbers = torch.empty(rows.shape, dtype=FP8, device=device)
    scales = torch.empty((*rows.shape[:-1], 1), dtype=torch.float32, device=device)
    if numbers.numel():
        # `QuantizeRowsParams.FIELDS` names them.
        params = extension().QuantizeRowsParams(
            flat, DTYPES[rows.dtype], flat.shape[0], width, flat.stride(0), numbers, scales
        )
        with torch.cuda.device(device):
            extension().quantize_rows_cuda(params, torch.cuda.current_stream(device).cuda_stream)
    return numbers, scales
