"""vLLM's Triton kernels, imported where a user has vLLM installed."""

from __future__ import annotations

import importlib
import inspect

import torch

from ..bench_block_attention import SCALE
from ..bench_experts import need_plain_weights
from ..cases import Case, Skipped, Variant
from . import missing

NAME = "vllm"

PAGE = 16


def unavailable(device: torch.device) -> str | None:
    try:
        importlib.import_module("vllm")
    except Exception as error:
        return missing("vllm", error)
    return None if device.type == "cuda" else "vLLM's Triton kernels need a GPU"


def _find(places: tuple[str, ...], name: str):
    """A function that moved between versions, from the first module that has it."""
    tried = []
    for place in places:
        try:
            return getattr(importlib.import_module(place), name)
        except (ImportError, AttributeError):
            tried.append(place)
    raise Skipped(f"this vLLM has no {name} in {', '.join(tried)}")


def _accepted(function, arguments: dict) -> dict:
    """The arguments that this version of a function knows."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in known}


def paged(prefix: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """[B, Hkv, L, D] and [B, Hkv, C, D] as pages [pages, PAGE, Hkv, D], row after row, padded to whole pages."""
    whole = torch.cat([prefix, block], 2).transpose(1, 2)
    padding = -whole.shape[1] % PAGE
    whole = torch.nn.functional.pad(whole, (0, 0, 0, 0, 0, padding))
    return whole.reshape(-1, PAGE, *whole.shape[2:]).contiguous()


def _attention(case: Case, inputs) -> list[Variant]:
    if inputs.start is not None:
        raise Skipped("a paged cache has no left padding")
    function = _find(
        ("vllm.v1.attention.ops.triton_unified_attention", "vllm.attention.ops.triton_unified_attention"),
        "unified_attention",
    )

    def prepare(inputs):
        batch, heads, canvas, dim = inputs.query.shape
        device = inputs.query.device
        length = inputs.prefix_key.shape[2] + canvas
        query = inputs.query.transpose(1, 2).reshape(batch * canvas, heads, dim).contiguous()
        key, value = paged(inputs.prefix_key, inputs.key), paged(inputs.prefix_value, inputs.value)
        pages = key.shape[0] // batch
        out = torch.empty_like(query)
        arguments = _accepted(
            function,
            {
                "q": query,
                "k": key,
                "v": value,
                "out": out,
                "cu_seqlens_q": torch.arange(batch + 1, dtype=torch.int32, device=device) * canvas,
                "max_seqlen_q": canvas,
                "seqused_k": torch.full((batch,), length, dtype=torch.int32, device=device),
                "max_seqlen_k": length,
                "softmax_scale": SCALE,
                "causal": False,
                "window_size": (-1, -1),
                "block_table": torch.arange(batch * pages, dtype=torch.int32, device=device).view(
                    batch, pages
                ),
                "softcap": 0.0,
                "q_descale": None,
                "k_descale": None,
                "v_descale": None,
            },
        )

        def run():
            function(**arguments)
            return out

        return run

    batch, heads, canvas, dim = inputs.query.shape

    def outputs(result):
        return {"output": result.view(batch, canvas, heads, dim).transpose(1, 2)}

    return [Variant("unified_attention, paged", prepare, outputs)]


def _row_stats(case: Case, inputs) -> list[Variant]:
    function = _find(("vllm.model_executor.models.diffusion_gemma_sampler",), "sample_row_stats")

    def prepare(inputs):
        # It takes fp32 logits behind the softcap, and writes probabilities for the self-conditioning.
        logits = inputs.softcap * torch.tanh(inputs.logits.float() / inputs.softcap)
        rows = logits.shape[0]
        temperature = torch.full((1,), inputs.temperature, dtype=torch.float32, device=logits.device)
        return lambda: function(logits, temperature, rows, 1234, torch.bfloat16)

    return [Variant("sample_row_stats", prepare, lambda result: {"argmax": result[0], "entropy": result[2]})]


def _experts(case: Case, inputs) -> list[Variant]:
    need_plain_weights(inputs)
    function = _find(
        ("vllm.model_executor.layers.fused_moe", "vllm.model_executor.layers.fused_moe.fused_moe"),
        "fused_experts",
    )

    def prepare(inputs):
        activation = "gelu_tanh"
        try:
            kinds = importlib.import_module("vllm.model_executor.layers.fused_moe.activation").MoEActivation
            activation = getattr(kinds, "GELU_TANH", None) or kinds.GELU
        except (ImportError, AttributeError):
            # Versions before the enumeration name the activation, and know the exact gelu only.
            activation = "gelu"
        arguments = _accepted(
            function,
            {
                "hidden_states": inputs.hidden,
                "w1": inputs.gate_up,
                "w2": inputs.down,
                "topk_weights": inputs.weights.float(),
                "topk_ids": inputs.index.to(torch.int32),
                "inplace": False,
                "activation": activation,
            },
        )
        return lambda: function(**arguments)

    return [Variant("fused_experts", prepare, lambda result: {"result": result})]


VARIANTS = {"block_attention": _attention, "row_stats": _row_stats, "experts": _experts}


def variants(case: Case, inputs) -> list[Variant]:
    build = VARIANTS.get(case.op)
    return build(case, inputs) if build else []
