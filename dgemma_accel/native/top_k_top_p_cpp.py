"""`top_k_top_p` on CPU threads, by the extension's host code."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .params import DTYPES, extension, missing_extension
from .row_stats_cpp import ISA_VARIABLE
from .top_k_top_p_params import output, top_k_top_p_params

FEATURES = {"device": {"cpu"}, "dtype": set(DTYPES)}

unavailable = missing_extension


def top_k_top_p(
    logits: Tensor,
    temperature: Tensor,
    top_k: int,
    top_p: float,
    top_k_first: bool,
    softcap: float | None,
) -> Tensor:
    """As `reference.top_k_top_p`; extra memory is at most 5 bytes per logit of a row, for each thread."""
    cutoff = output(logits)
    if cutoff.numel() == 0:
        return cutoff
    params = top_k_top_p_params(logits, temperature, top_k, top_p, top_k_first, softcap, cutoff)
    extension().top_k_top_p_host(params, torch.get_num_threads(), os.environ.get(ISA_VARIABLE, ""))
    return cutoff
