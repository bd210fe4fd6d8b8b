"""Decoder and encoder attention through `block_attention`: the prefix is read where the cache keeps it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.block_attention import block_attention
from ..ops.checks import FLOAT_DTYPES
from ..ops.linears import linears, scaled_linears
from .cache import readable
from .hooks import collected
from .layer import norm
from .masks import CausalRange, PrefixRange, reference_mask
from .naming import takes_cache
from .overrides import other_attention
from .patches import Patch
from .products import projections, share_rows, weight_scales

OVERRIDDEN = "an attention module has a forward that is not transformers' own"


@takes_cache
def decoder_attention_forward(
    patch: Patch,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | PrefixRange | None = None,
    cache=None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """`DiffusionGemmaDecoderTextAttention.forward` without cache concatenation and without repeated heads.

    Args:
        hidden_states: [B, C, E].
        position_embeddings: (cos, sin), each [1 or B, C, D].
        attention_mask: None (the whole prefix is visible), a `PrefixRange`, or a mask of the original model, which the
            original attention serves.
        cache: the encoder's; not written.

    Returns:
        ([B, C, E], None); attention weights are only made by the original attention.
    """
    module = patch.owner
    reason = _reason_for_reference(patch, hidden_states, attention_mask, cache, kwargs)
    if reason is not None:
        if not torch.compiler.is_compiling():
            patch.acceleration.say("attention", reason)
        return _original(patch, hidden_states, position_embeddings, attention_mask, cache, kwargs)
    query, key, value = project(module, hidden_states, position_embeddings)
    layer = cache.layers[module.layer_idx]
    return _attend(patch, query, key, value, layer, attention_mask, causal=False), None


@takes_cache
def encoder_attention_forward(
    patch: Patch,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | CausalRange | None = None,
    cache=None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """`DiffusionGemmaEncoderTextAttention.forward` through `block_attention` where the mask is a `CausalRange`.

    Arguments and result as in `decoder_attention_forward`, but the cache takes up the keys and values, and
    any other mask is served by the original without a word: images are its job.
    """
    module = patch.owner
    other = OVERRIDDEN if patch.overridden else other_attention(module.config)
    if other is not None and not torch.compiler.is_compiling():
        patch.acceleration.say("attention", other)
    if (
        other is not None
        or not isinstance(attention_mask, CausalRange)
        or _needs_original(module, hidden_states, cache.layers[module.layer_idx], kwargs)
    ):
        return _original(patch, hidden_states, position_embeddings, attention_mask, cache, kwargs)
    query, key, value = project(module, hidden_states, position_embeddings)
    layer = cache.layers[module.layer_idx]
    # Before the update: that may move what the cache holds.
    output = _attend(patch, query, key, value, layer, attention_mask, causal=True)
    cache.update(key, value, module.layer_idx)
    return output, None


def _original(patch: Patch, hidden_states, position_embeddings, mask, cache, kwargs: dict):
    return patch.original()(
        hidden_states=hidden_states,
        position_embeddings=position_embeddings,
        attention_mask=reference_mask(mask, patch.owner.layer_type),
        **patch.acceleration.as_argument(cache),
        **kwargs,
    )


def _attend(patch: Patch, query, key, value, layer, mask: PrefixRange | None, *, causal: bool) -> Tensor:
    """[B, C, E]: attention over what `layer` holds and over the block, then the output projection."""
    start = end = padding = None
    held = bool(layer.is_initialized) and layer.keys.shape[-2] > 0
    if mask is not None and held:
        start, end = mask.on(query.device)
    if isinstance(mask, CausalRange) and mask.padding is not None:
        # To the end of the block, where causality hides it.
        padding = mask.padding.to(query.device)
        query, key, value = (_turned(x, padding) for x in (query, key, value))
    output = block_attention(
        query,
        key,
        value,
        layer.keys if held else None,
        layer.values if held else None,
        prefix_start=start,
        prefix_end=end,
        scale=float(patch.owner.scaling),
        causal=causal,
        window=mask.window if isinstance(mask, CausalRange) else None,
        backend=patch.acceleration.backend_of("block_attention"),
    )
    if padding is not None:
        output = _turned(output, -padding)
    return patch.owner.o_proj(output.transpose(1, 2).flatten(2))


def _turned(x: Tensor, by: Tensor) -> Tensor:
    """x [B, heads, C, D] with the positions of row b turned left by by[b]: position by[b] comes to the front."""
    batch, _, length, _ = x.shape
    places = (torch.arange(length, device=x.device) + by[:, None]) % length
    rows = torch.arange(batch, device=x.device)[:, None]
    return x.transpose(1, 2)[rows, places].transpose(1, 2)


def project(
    module,
    hidden_states: Tensor,
    position_embeddings,
    side_by_side: bool = False,
    rounded: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [B, heads, C, D], normed and rotated.

    Args:
        side_by_side: their modules are products only. rounded: `hidden_states` in FP8 and the scales of their rows,
            where that was made with them.
    """
    cos, sin = position_embeddings
    modules = projections(module)
    if side_by_side or share_rows(modules):
        rows, shape = hidden_states.flatten(0, -2), hidden_states.shape[:-1]
        weights = [one.weight for one in modules]
        scales = weight_scales(modules)
        if rounded is None:
            found = linears(rows, weights, scales)
        else:
            found = scaled_linears(*(x.flatten(0, -2) for x in rounded), weights, scales, rows.dtype)
        made = [x.unflatten(0, shape) for x in found]
    else:
        made = [one(hidden_states) for one in modules]
    # Global layers have one projection for keys and values; they part at the norms.
    query, key, value = (x.unflatten(-1, (-1, module.head_dim)) for x in (made[0], made[1], made[-1]))
    query, key = _rotate(norm(module.q_norm, query), cos, sin), _rotate(norm(module.k_norm, key), cos, sin)
    return query.transpose(1, 2), key.transpose(1, 2), norm(module.v_norm, value).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of [B, C, heads, D] by cos, sin [1 or B, C, D]; the frequency pairs are D / 2 apart."""
    first, second = x.chunk(2, -1)
    return x * cos[:, :, None] + torch.cat((-second, first), -1) * sin[:, :, None]


def _reason_for_reference(patch: Patch, hidden_states: Tensor, mask, cache, kwargs: dict) -> str | None:
    module = patch.owner
    if patch.overridden:
        return OVERRIDDEN
    other = other_attention(module.config)
    if other is not None:
        return other
    if cache is None:
        return "no cache was given"
    if not readable(cache, cache.layers[module.layer_idx]):
        return f"the keys of {type(cache).__name__} cannot be read in place"
    if mask is not None and not isinstance(mask, PrefixRange):
        return "an attention mask that is not a range of the prefix was given"
    return _needs_original(module, hidden_states, cache.layers[module.layer_idx], kwargs)


def _needs_original(module, hidden_states: Tensor, layer, kwargs: dict) -> str | None:
    """Why `block_attention` cannot serve a call whose mask it can express, or None."""
    if module.training and module.attention_dropout > 0:
        return "attention dropout is on"
    if torch.is_autocast_enabled(hidden_states.device.type):
        # Norms give fp32 and projections the other dtype, which the original brings together.
        return "autocast is on"
    if kwargs.get("output_attentions") or "attentions" in collected():
        return "attention weights were asked for"
    # Buffers that hold nothing yet may be of an earlier dtype or device; the first update replaces them.
    held = layer.keys if layer.is_initialized and layer.keys.shape[-2] else hidden_states
    if torch.is_grad_enabled() and (
        hidden_states.requires_grad
        or held.requires_grad
        or any(parameter.requires_grad for parameter in module.parameters())
    ):
        return "autograd is on"
    if hidden_states.dtype not in FLOAT_DTYPES or held.dtype != hidden_states.dtype:
        return f"dtypes {hidden_states.dtype} and {held.dtype} of canvas and cache"
    if held.device != hidden_states.device:
        return f"the cache is on {held.device} and the canvas on {hidden_states.device}"
    return None
