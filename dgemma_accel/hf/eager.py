"""Why a canvas runs step by step, neither compiled nor captured, and why the pass that stores it is not captured."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..backends import BackendError, choose, requirements
from .call import Call
from .experts import why_looping
from .head import is_plain
from .hooks import collected, has_hooks
from .masks import CausalRange, PrefixRange
from .overrides import in_front, is_compiled_module, is_overridden, other_attention, other_experts
from .patches import Patch, patch_of
from .registry import fingerprint, modules_of
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
    if denoiser.call.logprobs_of is not None:
        return "return_logprobs reads the logits of every step"
    reason = _why_not_in_one_piece(model, cache, canvas)
    if reason is not None:
        return reason
    # `fallback.why_original` has seen to the forwards of the model, of its `model` and of the decoder.
    decoder = model.model.decoder
    reason = denoiser.call.once(why_not_traced, "decoder", decoder, (model.model, decoder), (model.lm_head,))
    if reason is not None:
        return reason
    if not canvas.is_cuda:
        return None
    return denoiser.call.once(why_not_captured, model, denoiser.acceleration, on=canvas)


def why_not_stored(
    patch: Patch, call: Call, embeds: Tensor, masks, cache, others: Mapping[str, object]
) -> str | None:
    """Why the pass over a finished canvas cannot be captured, or None.

    Args:
        patch: of the forward of `DiffusionGemmaEncoderTextModel`. embeds: [B, C, E]. masks, cache: as it gets them.
        others: its other arguments, but for the positions.
    """
    from .preallocated import PreallocatedCache

    if type(cache) is not PreallocatedCache:
        return f"the cache is a {type(cache).__name__}; cache_implementation='static' gives one that does not grow"
    ranges = list(masks.values()) if isinstance(masks, dict) else [None]
    if not all(type(mask) is CausalRange and mask.padding is None for mask in ranges):
        return "the attention mask is not a range of the prefix"
    wanted = {name: value for name, value in others.items() if value is not None}
    if not wanted.pop("return_dict", True) or wanted:
        return f"arguments {', '.join(others)} go to the encoder"
    if torch.is_grad_enabled() or collected():
        return "autograd is on, or the encoder's inner states were asked for"
    text, model = patch.owner, patch.acceleration.model
    if any(
        not layer.is_initialized
        or (layer.key_buffer.dtype, layer.batch_size) != (embeds.dtype, embeds.shape[0])
        for layer in cache.layers
    ):
        return "the cache is of another dtype or batch size"
    reason = _why_not_in_one_piece(model, cache, embeds) or call.once(why_not_traced, "encoder", text)
    if reason is not None:
        return reason
    if patch.had or patch.overridden:
        return "the forward of the text encoder is more than transformers' own"
    return call.once(_why_pass_waits, text, patch.acceleration, on=embeds) if embeds.is_cuda else None


def ask_ahead(model, acceleration, call: Call, canvas: Tensor) -> None:
    """What the pass over the finished canvas will ask about the encoder's modules, in a call that asks once."""
    text = model.model.encoder.language_model
    # What cannot be answered is asked again then.
    with contextlib.suppress(Exception):
        if call.once(why_not_traced, "encoder", text) is not None:
            call.disturb()
            return
        if canvas.is_cuda:
            call.once(_why_pass_waits, text, acceleration, on=canvas)
        call.once(fingerprint, model, text)


def _why_not_in_one_piece(model, cache, canvas: Tensor) -> str | None:
    if any(layer.key_buffer.device != canvas.device for layer in cache.layers):
        return "the model is spread over several devices"
    if torch.is_autocast_enabled(canvas.device.type):
        return "autocast is on"
    return "the weights are split over ranks" if crosses_ranks(model) else None


def why_not_traced(what: str, text_model, outer: Sequence = (), also: Sequence = ()) -> str | None:
    """Which code of another's a function that goes through the layers itself would go round, or run once where it
    belongs into every run.

    Args:
        outer: modules around the layers, whose forwards are not run. also: modules besides those of `text_model`
            that are.
    """
    if nn.modules.module._has_any_global_hook():
        return "hooks of all modules are registered"
    inner = [*also, *(module for module in modules_of(text_model) if module is not text_model)]
    if any(has_hooks(module) or "_hf_hook" in module.__dict__ for module in (*outer, *inner)):
        return f"{'model.model or ' if outer else ''}a module of the {what} has hooks"
    for module in inner:
        # What is in the `__dict__` of a module that the compiler wraps is its own doing.
        if "forward" not in module.__dict__ or is_compiled_module(module):
            continue
        patch = patch_of(module)
        if in_front(module) is not None if patch is None else patch.replaced:
            return f"a {type(module).__name__} has a forward of its own"
    reason = other_attention(text_model.config) or other_experts(text_model.config)
    if reason is not None:
        return reason
    for layer in text_model.layers:
        if layer.self_attn.training and layer.self_attn.attention_dropout > 0:
            return "attention dropout is on"
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
    return _why_waiting(decoder, acceleration, canvas, needs)


def _why_pass_waits(text_model, acceleration, embeds: Tensor) -> str | None:
    return _why_waiting(text_model, acceleration, embeds, [])


def _why_waiting(text_model, acceleration, canvas: Tensor, needs: list[tuple[str, dict]]) -> str | None:
    """Which op waits for the device, of those needed and those of the layers, or None."""
    dtype = text_model.embed_tokens.weight.dtype
    widths = {layer.self_attn.head_dim for layer in text_model.layers}
    attention = [("block_attention", {"dtype": dtype, "head_dim": width}) for width in sorted(widths)]
    for op, need in (*needs, *attention):
        try:
            choice = choose(op, acceleration.backend_of(op), requirements(canvas, **need))
        except BackendError:
            # The step itself says so.
            continue
        if choice.implementation.backend == "reference":
            return f"{op} is the reference, which waits for the device"
    for layer in text_model.layers:
        reason = why_looping(layer.experts, acceleration.backend, canvas.device, dtype)
        if reason is not None:
            return reason
    return None
