"""cut-cross-entropy: the log-sum-exp of softcapped logits out of the head's product, without the logits."""

from __future__ import annotations

import importlib

import torch

from ..cases import Case, Variant
from . import missing

NAME = "cut_cross_entropy"


def unavailable(device: torch.device) -> str | None:
    try:
        importlib.import_module("cut_cross_entropy.cce_lse_forward")
    except Exception as error:
        return missing("cut_cross_entropy", error)
    return None if device.type == "cuda" else "cut_cross_entropy needs a GPU"


def variants(case: Case, inputs) -> list[Variant]:
    if case.op != "head_stats":
        return []
    from cut_cross_entropy.cce_lse_forward import cce_lse_forward_kernel

    def prepare(inputs):
        return lambda: cce_lse_forward_kernel(inputs.hidden, inputs.weight, softcap=inputs.softcap)

    def outputs(result):
        # Later versions return a record with the log-sum-exp in it.
        return {"plain_logsumexp": getattr(result, "lse", result)}

    return [Variant("log-sum-exp forward, softcap", prepare, outputs)]
