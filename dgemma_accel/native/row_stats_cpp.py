"""`row_stats` on CPU threads, by the extension's host code."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .params import DTYPES, extension, missing_extension
from .row_stats_params import outputs, row_stats_params

FEATURES = {"device": {"cpu"}, "dtype": set(DTYPES)}

# Names one of `_C.host_instruction_sets()`, for tests and for comparing them; empty for the best.
ISA_VARIABLE = "DGEMMA_ACCEL_ISA"

unavailable = missing_extension


def row_stats(
    logits: Tensor,
    temperature: Tensor,
    stats_temperature: Tensor | None,
    uniform: Tensor | None,
    seed: Tensor | None,
    offset: Tensor,
    softcap: float | None,
    statistics: bool = True,
    cutoff: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """As `reference.row_stats`, without a copy of the logits: extra memory is 20 bytes per 4096 of them."""
    out = outputs(logits)
    if out[0].numel() == 0:
        return out
    native = extension()
    params = row_stats_params(
        logits, temperature, stats_temperature, uniform, seed, offset, softcap, out, cutoff
    )
    workspace = torch.empty(native.row_stats_host_workspace(params), dtype=torch.uint8, device="cpu")
    params.workspace = workspace.data_ptr()
    native.row_stats_host(params, torch.get_num_threads(), os.environ.get(ISA_VARIABLE, ""), statistics)
    return out
