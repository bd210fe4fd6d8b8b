"""`quantize_rows`: rows in FP8, each with a scale of its own, as `linears` multiplies them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import pick, requirements
from ..reference.quantization import FP8
from ..reference.quantization import quantize_rows as by_operators
from .registration import operator


@operator("quantize_rows")
def _quantize_rows(rows: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return pick("quantize_rows", backend, requirements(rows, dtype=rows.dtype))(rows)


@_quantize_rows.register_fake
def _(rows, backend):
    numbers = rows.new_empty(rows.shape, dtype=FP8)
    return numbers, rows.new_empty((*rows.shape[:-1], 1), dtype=torch.float32)


def quantize_rows(rows: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn numbers [..., K], fp32 scales [..., 1]); the arithmetic is `reference.quantization.quantize_rows`.

    With "auto" in code that is traced it is those operators, which the compiler fuses with what made the rows.

    Args:
        rows: [..., K] bf16, fp16 or fp32, from a model, so not checked again.

    Raises:
        backends.BackendError: the backend named cannot run this call.
    """
    if backend == "auto" and torch.compiler.is_compiling():
        return by_operators(rows)
    return _quantize_rows(rows, backend)
