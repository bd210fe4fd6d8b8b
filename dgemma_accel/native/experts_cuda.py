"""`experts` by the extension's CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.experts import ACTIVATIONS
from ..reference.quantization import NVFP4, scales_by_row
from .params import DTYPES, AtMost, BuiltCapability, MultipleOf, extension, missing_cuda

FEATURES = {
    "device": {"cuda"},
    "dtype": {torch.bfloat16, torch.float16},
    "activation": set(ACTIVATIONS),
    # A lane multiplies 16 bytes of a row at a time, which are 32 numbers in NVFP4.
    "embedding": MultipleOf(32),
    "width": MultipleOf(32),
    "experts": AtMost(1024),
    "compute_capability": BuiltCapability(8, 0),
}

unavailable = missing_cuda

# Choices (rows * K) computed at a time: bounds the fp32 results of a long prompt, 369 MB at E = 2816.
PAIRS_AT_ONCE = 32_768
# Bytes from whose multiples on rows and matrices are read.
VECTOR = 16
# Elements from a row to the next: those of `PAIRS_AT_ONCE` rows are counted by eight in 32 bits.
FARTHEST = 2**20 - 1
# The values of WeightFormat.
PLAIN, FP8, FP4 = range(3)


def experts(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str = "gelu_tanh",
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    gate_up_global_scale: Tensor | None = None,
    down_global_scale: Tensor | None = None,
) -> Tensor:
    """As `reference.experts`, on the current stream of the rows' device; waits for nothing.

    Products accumulate in fp32; act(gate) * up is computed in fp32 and rounded once, to the dtype of the rows;
    weights and sum of a row's choices are fp32, rounded once. Weights that are not contiguous are copied.
    """
    output = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if output.numel() == 0 or index.numel() == 0:
        return output.zero_()
    device, (rows, embedding), top_k = hidden.device, hidden.shape, index.shape[1]
    with torch.cuda.device(device):
        native = extension()
        stream = torch.cuda.current_stream(device).cuda_stream
        hidden, index = aligned_rows(hidden), index.contiguous()
        matrices = (
            matrix(gate_up, gate_up_scale, gate_up_global_scale),
            matrix(down, down_scale, down_global_scale),
        )
        width = gate_up.shape[1] // 2
        at_once, workspace = max(1, PAIRS_AT_ONCE // top_k), None
        for first in range(0, rows, at_once):
            part = slice(first, first + at_once)
            x, i, w = hidden[part], index[part], weights[part]
            # `ExpertsParams.FIELDS` names them; the workspace comes later, its size depends on the others.
            params = native.ExpertsParams(
                DTYPES[x.dtype], len(x), top_k, len(down), width, embedding, ACTIVATIONS.index(activation),
                x, x.stride(0), i, w, DTYPES[w.dtype], *w.stride(), *matrices, output[part], None,
            )  # fmt: skip
            if workspace is None:
                # The first part is the largest.
                size = native.experts_cuda_workspace(params)
                workspace = torch.empty(size, dtype=torch.uint8, device=device)
            params.workspace = workspace.data_ptr()
            native.experts_cuda(params, stream)
    return output


def aligned_rows(tensor: Tensor) -> Tensor:
    """[R, E] whose rows begin at multiples of `VECTOR` bytes; a copy where they do not, or lie too far apart."""
    apart = tensor.stride(0) * tensor.element_size() % VECTOR == 0 and tensor.stride(0) <= FARTHEST
    return tensor if apart and tensor.stride(1) == 1 and tensor.data_ptr() % VECTOR == 0 else packed(tensor)


def packed(tensor: Tensor) -> Tensor:
    """Contiguous from a multiple of `VECTOR` bytes on, where a copy begins."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % VECTOR == 0 else tensor.clone()


def matrix(weight: Tensor, scale: Tensor | None, global_scale: Tensor | None) -> tuple:
    """An `ExpertsMatrix`: (format, weights, scale, scale by row, global scale, global scales of an expert)."""
    if weight.dtype == NVFP4:
        total = global_scale.contiguous()
        return FP4, packed(weight), packed(scale), False, total, total.numel() // len(weight)
    if scale is None:
        return PLAIN, packed(weight), None, False, None, 1
    return FP8, packed(weight), scale.contiguous(), scales_by_row(weight, scale), None, 1
