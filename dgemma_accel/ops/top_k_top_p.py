"""`top_k_top_p`: the least logit of each row that top-k and top-p keep, without a sort of the vocabulary."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends import pick, requirements
from . import checks
from .registration import operator
from .row_stats import rows_view


@operator("top_k_top_p")
def _top_k_top_p(
    logits: Tensor,
    temperature: Tensor,
    top_k: int,
    top_p: float,
    top_k_first: bool,
    softcap: float | None,
    backend: str,
) -> Tensor:
    checks.values_in("temperature", temperature, 0.0, math.inf, high_open=True)
    run = pick("top_k_top_p", backend, requirements(logits, dtype=logits.dtype, vocab=logits.shape[-1]))
    return run(logits, temperature, top_k, top_p, top_k_first, softcap)


@_top_k_top_p.register_fake
def _(logits, temperature, top_k, top_p, top_k_first, softcap, backend):
    return logits.new_empty(logits.shape[:-1], dtype=torch.float32)


def top_k_top_p(
    logits: Tensor,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    top_k_first: bool = False,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The cutoff of each row of logits: tokens whose logit lies below it are what top-k and top-p drop.

    `row_stats(logits, cutoff=cutoff)` draws from the tokens that are kept, and has their statistics. With
    x = softcap * tanh(logits / softcap), or x = logits, over the temperature, in fp32:

    - top_k keeps the tokens whose logit reaches the k-th largest; all that tie with it stay;
    - top_p keeps the tokens before which, strictly larger logits only, there is at most the share p of the mass
      sum e^x. A tie is kept or dropped as one, and the largest logit is always kept;
    - the mass is that of the whole row, or with `top_k_first` that of what top_k keeps;
    - what both keep is kept.

    A row without a distribution (as `row_stats` has it: all -inf, NaN or +inf anywhere) has the cutoff -inf.

    Args:
        logits: [..., V] bf16, fp16 or fp32, -inf allowed. Any strides; a last stride other than 1 is copied.
        top_k: >= 1; None or 0 keeps all.
        top_p: in [0, 1]; None or 1.0 keeps all, 0 the largest.
        top_k_first: take top_p of what top_k left, renormalised, as SDAR's generate.py and transformers do; Dream's
            takes both of the row.
        temperature: >= 0; a number, a 0-d tensor or one value per row [...]. 0 counts as 1: a greedy row
            is filtered as it came.
        softcap: in [1e-30, 1e30], or None.
        backend: "auto", "reference", "cpp", "triton" or "cuda".

    Returns:
        [...] fp32, each a logit of its row, or -inf where all are kept.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value.
        backends.BackendError: the backend named cannot run this call.

    Source: top_p_logits and top_k_logits of Dream's generation_utils.py; top_k_logits and top_p_logits of SDAR's
    generate.py; Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020.
    """
    checks.is_table_of_logits(logits)
    k = checks.count_or_none("top_k", top_k)
    p = checks.share_or_none("top_p", top_p)
    checks.is_bool("top_k_first", top_k_first)
    shape = tuple(logits.shape[:-1])
    temperature = checks.number_or_rows(
        "temperature", temperature, shape, logits.device, keep=checks.may_keep_numbers(logits)
    )
    softcap = checks.softcap_value(softcap)
    checks.is_string("backend", backend)
    return _top_k_top_p(rows_view(logits), temperature, k, p, top_k_first, softcap, backend).reshape(shape)
