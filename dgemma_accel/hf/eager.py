"""Why a canvas runs step by step, neither compiled nor captured."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import BackendError, choose, requirements
from .experts import why_looping
from .head import is_plain
from .hooks import has_hooks
from .masks import PrefixRange
from .overrides import in_front, is_compiled_module, is_overridden, other_attention, other_experts
from .patches import patch_of
from .registry import modules_of
from .split_head import crosses_ranks


def why_eager(denoiser, canvas: Tensor) -> str | None:
    """Why a canvas [B, C] cannot run compiled, or None."""
    from .preallocated import PreallocatedCache

    cache, model = denoiser.cache, denoiser.model
    if type(cache) is not PreallocatedCache:
        return f"the cache is a {type(cache).__name__}; cache_implementation='static' gives one that does not grow"
    if any(mask is not None and type(mask) is not PrefixRange for mask in denoiser.masks.values()):
        return "the attention mask is not a range of the prefix"
    if any(value is not None for value in denoiser.model_kwargs.values()):
        return f"arguments {', '.join(denoiser.model_kwargs)} go to the decoder"
    if any(layer.key_buffer.device != canvas.device for layer in cache.layers):
        return "the model is spread over several devices"
    if denoiser.call.logprobs_of is not None:
        return "return_logprobs reads the logits of every step"
    if torch.is_autocast_enabled(canvas.device.type):
        return "autocast is on"
    if crosses_ranks(model):
        return "the weights are split over ranks"
    reason = _why_not_traced(model)
    if reason is not None:
        return reason
    return why_not_captured(model, denoiser.acceleration, canvas) if canvas.is_cuda else None


def _why_not_traced(model) -> str | None:
    """Which code of another's `graph.take_step` would go round, or run once where it belongs into every step.

    `fallback.why_original` has seen to the forwards of the model, of its `model` and of the decoder.
    """
    decoder = model.model.decoder
    inner = (model.lm_head, *(module for module in modules_of(decoder) if module is not decoder))
    if any(has_hooks(module) or "_hf_hook" in module.__dict__ for module in (model.model, decoder, *inner)):
        return "model.model or a module of the decoder has hooks"
    for module in inner:
        # What is in the `__dict__` of a module that the compiler wraps is its own doing.
        if "forward" not in module.__dict__ or is_compiled_module(module):
            continue
        patch = patch_of(module)
        if in_front(module) is not None if patch is None else patch.replaced:
            return f"a {type(module).__name__} has a forward of its own"
    reason = other_attention(decoder.config) or other_experts(decoder.config)
    if reason is not None:
        return reason
    for layer in decoder.layers:
        if any(map(_is_other, (layer, layer.self_attn))):
            return "the forward of a layer or of its attention is not transformers' own"
    return None


def _is_other(module) -> bool:
    """Whether the forward of a module that `accelerate` replaces was not transformers' own."""
    patch = patch_of(module)
    return is_overridden(module) if patch is None else patch.overridden


def why_not_captured(model, acceleration, canvas: Tensor) -> str | None:
    """Which part of a step on a CUDA device would wait for it, which a capture does not survive, or None."""
    decoder = model.model.decoder
    embeddings, head = decoder.embed_tokens.weight, model.lm_head
    dtype = embeddings.dtype
    statistics = "head_stats" if is_plain(head, embeddings) else "row_stats"
    needs = [
        (statistics, {"dtype": dtype, "vocab": embeddings.shape[0]}),
        ("commit", {"canvas_length": canvas.shape[1]}),
        ("soft_embedding", {"dtype": dtype}),
    ]
    widths = {layer.self_attn.head_dim for layer in decoder.layers}
    needs += [("block_attention", {"dtype": dtype, "head_dim": width}) for width in sorted(widths)]
    for op, need in needs:
        try:
            choice = choose(op, acceleration.backend_of(op), requirements(canvas, **need))
        except BackendError:
            # The step itself says so.
            continue
        if choice.implementation.backend == "reference":
            return f"{op} is the reference, which waits for the device"
    for layer in decoder.layers:
        reason = why_looping(layer.experts, acceleration.backend, canvas.device, dtype)
        if reason is not None:
            return reason
    return None
