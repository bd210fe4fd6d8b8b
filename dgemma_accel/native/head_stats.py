"""head_stats as the vendor's matrix product (MKL, cuBLAS) followed by `row_stats` of its result."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import choose


def product_then_row_stats(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    temperature: Tensor,
    stats_temperature: Tensor | None,
    uniform: Tensor | None,
    seed: Tensor | None,
    offset: Tensor,
    softcap: float | None,
) -> tuple[Tensor, ...]:
    """`reference.head_stats` with the `row_stats` of a named backend."""
    logits = torch.nn.functional.linear(hidden, weight)
    needs = {"device": logits.device.type, "dtype": logits.dtype, "vocab": logits.shape[-1]}
    row_stats = choose("row_stats", backend, needs).implementation.run
    return logits, *row_stats(logits, temperature, stats_temperature, uniform, seed, offset, softcap)
