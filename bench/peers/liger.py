"""Liger-Kernel: its fused mixture of experts, and the nearest thing to row statistics, its cross-entropy forward."""

from __future__ import annotations

import importlib

import torch

from ..bench_experts import need_plain_weights
from ..cases import Case, Skipped, Variant
from . import missing

NAME = "liger"


def unavailable(device: torch.device) -> str | None:
    try:
        importlib.import_module("liger_kernel.ops.cross_entropy")
    except Exception as error:
        return missing("liger_kernel", error)
    return None if device.type == "cuda" else "liger_kernel needs a GPU"


def _row_stats(case: Case, inputs) -> list[Variant]:
    if inputs.logits.requires_grad:
        raise Skipped("its forward overwrites logits that need a gradient")
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    def prepare(inputs):
        target = inputs.logits.argmax(-1)
        # Loss of the most probable token: one log-sum-exp and one gather, no entropy, no sample.
        return lambda: LigerCrossEntropyFunction.apply(
            inputs.logits, target, None, -100, 0.0, 0.0, "none", inputs.softcap, False
        )

    # It counts its targets and reads the count on the host: no graph can hold it.
    return [Variant("cross_entropy forward (no entropy, no sample)", prepare, capturable=False)]


def _experts(case: Case, inputs) -> list[Variant]:
    need_plain_weights(inputs)
    try:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
    except ImportError as error:
        raise Skipped(f"this liger_kernel has no fused_moe: {error}") from error

    def prepare(inputs):
        index = inputs.index.to(torch.int32)
        weights = inputs.weights.to(inputs.hidden.dtype)
        return lambda: LigerFusedMoEFunction.apply(inputs.hidden, inputs.gate_up, inputs.down, index, weights)

    # Its gate is SiLU where the model's is gelu: the same work, another result, so nothing is compared.
    return [Variant("fused_moe (SiLU gate)", prepare, capturable=False)]


VARIANTS = {"row_stats": _row_stats, "experts": _experts}


def variants(case: Case, inputs) -> list[Variant]:
    build = VARIANTS.get(case.op)
    return build(case, inputs) if build else []
