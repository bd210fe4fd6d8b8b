"""Running the steps of a canvas through the compiled form of `graph.take_step`."""

from __future__ import annotations

import types

import torch
from torch import Tensor

from . import graph
from .lookout import Lookout
from .masks import PrefixRange
from .patches import Acceleration


def why_eager(denoiser, canvas: Tensor) -> str | None:
    """Why a canvas cannot run compiled, or None."""
    from .preallocated import PreallocatedCache

    cache, decoder = denoiser.cache, denoiser.model.model.decoder
    if type(cache) is not PreallocatedCache:
        return f"the cache is a {type(cache).__name__}; cache_implementation='static' gives one that does not grow"
    if any(mask is not None and type(mask) is not PrefixRange for mask in denoiser.masks.values()):
        return "the attention mask is not a range of the prefix"
    if any(value is not None for value in denoiser.model_kwargs.values()):
        return f"arguments {', '.join(denoiser.model_kwargs)} go to the decoder"
    if any(layer.key_buffer.device != canvas.device for layer in cache.layers):
        return "the model is spread over several devices"
    modules = [denoiser.model.lm_head, *decoder.modules()]
    if any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in modules):
        return "a module of the decoder has hooks"
    return None


def run(denoiser, canvas: Tensor, argmax: Tensor, carry, finished: Tensor, temperatures: list[Tensor]):
    """All steps of a canvas, as `Denoiser.run`; `temperatures` has one for each step that may be taken."""
    call, criteria, device = denoiser.call, denoiser.criteria, canvas.device
    settings = _settings(denoiser)
    state = _first_state(denoiser, canvas, argmax, carry, finished)
    keys = [layer.key_buffer for layer in denoiser.cache.layers]
    values = [layer.value_buffer for layer in denoiser.cache.layers]
    prefixes = _prefixes(denoiser, state.soft)
    # One copy to the device for all steps.
    offsets = torch.arange(carry.offset, carry.offset + len(temperatures)).to(device, non_blocking=True)
    schedule = torch.stack(temperatures).to(device, non_blocking=True)
    fixed = (denoiser.sampler.entropy_bound, 1.0 if criteria is None else criteria.confidence_threshold)
    bound, confidence = (torch.full((), value, dtype=torch.float32, device=device) for value in fixed)
    seed = carry.seed.to(device, non_blocking=True)
    step = _compiled_for(denoiser.acceleration, denoiser.model, keys, state, carry.pinned, settings)

    lookout = Lookout(call.take_drafts(), may_finish=criteria is not None)
    taken = 0
    for offset, temperature in zip(offsets.unbind(), schedule.unbind()):
        numbers = graph.Numbers(seed, offset, temperature, bound, confidence)
        state = step(denoiser.model, state, keys, values, prefixes, numbers, carry.pinned, settings)
        taken += 1
        if lookout.after_step(state.finished, state.draft):
            break
    lookout.close()

    if settings.depth:
        criteria.argmax_canvas_history = state.history
    report = call.reports[-1]
    report.steps, report.draft = state.steps, state.draft
    if call.with_confidence:
        report.confidence, report.entropy = state.confidence, state.entropy
    carry.step, carry.soft = carry.step + taken, state.soft
    return state.canvas, state.draft, carry, torch.ones_like(finished)


def _settings(denoiser) -> graph.Settings:
    names = ("block_attention", "head_stats", "commit", "soft_embedding")
    return graph.Settings(
        softcap=denoiser.model.final_logit_softcapping,
        vocab=denoiser.sampler.vocab_size,
        depth=None if denoiser.criteria is None else denoiser.criteria.stability_threshold,
        exact=denoiser.acceleration.exact,
        backends=tuple(denoiser.acceleration.backend_of(name) for name in names),
    )


def _first_state(denoiser, canvas: Tensor, argmax: Tensor, carry, finished: Tensor) -> graph.State:
    embeddings = denoiser.model.model.decoder.embed_tokens.weight
    depth = 0 if denoiser.criteria is None else denoiser.criteria.stability_threshold
    soft = carry.soft
    if soft is None:
        soft = embeddings.new_zeros(*canvas.shape, embeddings.shape[1])
    return graph.State(
        canvas=canvas,
        # Two inputs that are one tensor would be a graph of their own.
        draft=argmax.clone(),
        history=canvas.new_full((depth, *canvas.shape), -1),
        finished=finished,
        soft=soft,
        confidence=torch.zeros(canvas.shape, device=canvas.device),
        entropy=torch.zeros(canvas.shape, device=canvas.device),
        steps=torch.zeros(canvas.shape[0], dtype=torch.int64, device=canvas.device),
    )


def _prefixes(denoiser, like: Tensor) -> dict[str, graph.Prefix]:
    """Range in the buffers and rotary embedding of each layer kind."""
    decoder, batch = denoiser.model.model.decoder, like.shape[0]
    prefixes = {}
    for index, layer in enumerate(decoder.layers[: decoder.text_config.num_hidden_layers]):
        kind = layer.self_attn.layer_type
        if kind in prefixes:
            continue
        held = denoiser.cache.layers[index]
        mask = denoiser.masks[kind]
        if mask is None:
            ends = (held.first, held.first + held.keys.shape[2])
            start, end = (torch.full((batch,), e, dtype=torch.int32, device=like.device) for e in ends)
        else:
            start, end = (bound + held.first for bound in mask.on(like.device))
        cos, sin = decoder.rotary_emb(like, denoiser.position_ids, kind)
        prefixes[kind] = graph.Prefix(start, end, cos, sin)
    return prefixes


def _compiled_for(
    acceleration: Acceleration, model, keys, state: graph.State, pinned, settings: graph.Settings
):
    """The compiled step for these shapes; each has a code object of its own, so that no limit on recompiling counts
    across shapes or models."""
    key = (
        tuple(tuple(buffer.shape) for buffer in keys),
        keys[0].dtype,
        keys[0].device,
        model.lm_head.weight.dtype,
        tuple(state.history.shape),
        pinned is None,
        settings,
    )
    if key not in acceleration.compiled:
        original = graph.take_step
        code = original.__code__.replace()
        function = types.FunctionType(code, original.__globals__, original.__name__, original.__defaults__)
        acceleration.compiled[key] = torch.compile(function, fullgraph=True, dynamic=False)
    return acceleration.compiled[key]
