"""FlashInfer, which compiles its kernels on the spot and needs nvcc for that."""

from __future__ import annotations

import importlib
import shutil

import torch

from ..bench_block_attention import SCALE
from ..cases import Case, Skipped, Variant
from . import missing

NAME = "flashinfer"


def unavailable(device: torch.device) -> str | None:
    try:
        importlib.import_module("flashinfer")
    except Exception as error:
        return missing("flashinfer", error)
    if device.type != "cuda":
        return "flashinfer needs a GPU"
    return None if shutil.which("nvcc") else "flashinfer compiles at run time and finds no nvcc"


def _attention(case: Case, inputs) -> list[Variant]:
    if inputs.query.shape[0] != 1:
        raise Skipped("single_prefill_with_kv_cache takes one sequence")
    import flashinfer

    def prepare(inputs):
        # NHD layout: [length, heads, D].
        query = inputs.query[0].transpose(0, 1).contiguous()
        key = torch.cat([inputs.prefix_key, inputs.key], 2)[0].transpose(0, 1).contiguous()
        value = torch.cat([inputs.prefix_value, inputs.value], 2)[0].transpose(0, 1).contiguous()
        return lambda: flashinfer.single_prefill_with_kv_cache(
            query, key, value, causal=False, sm_scale=SCALE, backend="fa2"
        )

    return [
        Variant(
            "single_prefill, fa2, no cat", prepare, lambda result: {"output": result.transpose(0, 1)[None]}
        )
    ]


def _row_stats(case: Case, inputs) -> list[Variant]:
    from flashinfer import sampling

    def prepare(inputs):
        logits = inputs.softcap * torch.tanh(inputs.logits.float() / inputs.softcap)
        temperature = torch.full((logits.shape[0],), inputs.temperature, device=logits.device)

        def run():
            probabilities = sampling.softmax(logits, temperature=temperature)
            return probabilities, sampling.sampling_from_logits(logits / inputs.temperature)

        return run

    # No argmax and no entropy: it is compared by the most probable token of its softmax.
    return [
        Variant("softmax, sampling_from_logits", prepare, lambda result: {"argmax": result[0].argmax(-1)})
    ]


def _top_k_top_p(case: Case, inputs) -> list[Variant]:
    from flashinfer import sampling

    def by_p(inputs):
        logits = inputs.logits.float() / inputs.temperature
        return lambda: sampling.top_p_renorm_probs(sampling.softmax(logits), inputs.top_p)

    def by_k(inputs):
        logits = inputs.logits.float()
        return lambda: sampling.top_k_mask_logits(logits, inputs.top_k)

    if inputs.top_p is None:
        return [
            Variant("top_k_mask_logits", by_k, lambda result: {"kept": result.isfinite().sum(-1).float()})
        ]
    return [
        Variant("softmax, top_p_renorm_probs", by_p, lambda result: {"kept": (result > 0).sum(-1).float()})
    ]


VARIANTS = {"block_attention": _attention, "row_stats": _row_stats, "top_k_top_p": _top_k_top_p}


def variants(case: Case, inputs) -> list[Variant]:
    build = VARIANTS.get(case.op)
    return build(case, inputs) if build else []
