"""Attention masks as a range of cache slots per row, instead of tables over queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import readable
from .call import active_call, version
from .naming import takes_cache
from .overrides import other_attention
from .patches import Patch, patch_of


@dataclass(eq=False)
class PrefixRange:
    """The attention mask of one layer kind: row b sees cache slots [start_b, end_b) and the whole canvas.

    start, end: [B] int32, or None for all slots. `reference_masks` makes the masks of the original model, for a layer
    that needs them.
    """

    start: Tensor | None
    end: Tensor | None
    reference_masks: Callable[[], dict]

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """start and end on `device`, for models spread over several."""
        if self.start is not None and self.start.device != device:
            self.start, self.end = (bound.to(device, non_blocking=True) for bound in (self.start, self.end))
        return self.start, self.end


@dataclass(eq=False)
class CausalRange(PrefixRange):
    """The encoder's: row b sees cache slots [start_b, end_b), and inside the block its own past.

    window: a query sees no key at this distance or farther (the sliding layers), or None.
    padding: [B] int64, how many tokens at the beginning of the row's block nobody sees, or None for none. Only where
        nothing is in the cache yet: the prompt of a padded batch.
    """

    window: int | None = None
    padding: Tensor | None = None


class _Once:
    """A function without arguments that is called at the first need. `functools.cache` cannot be traced."""

    def __init__(self, make: Callable[[], dict]) -> None:
        self.make, self.made = make, None

    def __call__(self) -> dict:
        if self.made is None:
            self.made = self.make()
        return self.made


def reference_mask(mask, layer_type: str):
    """What the original attention expects in place of `mask`."""
    return mask.reference_masks()[layer_type] if isinstance(mask, PrefixRange) else mask


def contiguous_range(visible: Tensor) -> tuple[Tensor, Tensor] | None:
    """(start, end), each [B] int32, of the True slots of every row of [B, L]; None if a row has holes."""
    slots = visible.shape[1]
    if slots == 0:
        empty = visible.new_zeros(visible.shape[0], dtype=torch.int32)
        return empty, empty.clone()
    count = visible.sum(-1)
    start = visible.int().argmax(-1)
    end = torch.where(count > 0, slots - visible.flip(-1).int().argmax(-1), start)
    if not bool((end - start == count).all()):
        return None
    return start.int(), end.int()


@takes_cache
def create_decoder_masks(patch: Patch, config, inputs_embeds, cache, decoder_attention_mask=None):
    """`DiffusionGemmaDecoderModel.create_diffusion_decoder_attention_mask` with ranges instead of 4-D masks.

    Called once per canvas. A 2-D mask [B, past + C] of which each row is one run of True over the past and all True
    over the canvas becomes a `PrefixRange` per layer kind; on sliding layers it is shifted to what their cache
    still holds. Everything else is the original's business.
    """

    def make() -> dict:
        return patch.original()(
            config=config,
            inputs_embeds=inputs_embeds,
            decoder_attention_mask=decoder_attention_mask,
            **patch.acceleration.as_argument(cache),
        )

    original = _Once(make)

    mask = decoder_attention_mask
    if cache is None or not isinstance(mask, Tensor) or mask.ndim != 2 or cache.is_compileable:
        return original()
    if not _take_ranges(patch, patch.owner.layers):
        return original()

    visible = _on_host(mask)
    if bool(visible.all()):
        return dict.fromkeys(("full_attention", "sliding_attention"))

    ranges = {}
    for kind, index in _first_layers(config).items():
        layer = cache.layers[index]
        if not readable(cache, layer):
            return original()
        held, seen = layer.keys.shape[-2], cache.get_seq_length(index)
        span = _row_range(visible, seen - held, seen, inputs_embeds.shape[:2])
        if span is None:
            patch.acceleration.say("attention", "the attention mask has holes or hides canvas positions")
            return original()
        ranges[kind] = PrefixRange(*_to(mask.device, span), reference_masks=original)
    return ranges


@takes_cache
def create_encoder_masks(
    patch: Patch, config, inputs_embeds, attention_mask, cache, position_ids, mm_token_type_ids=None
):
    """`DiffusionGemmaEncoderModel.create_masks_for_generate` with ranges where the mask is plainly causal.

    That is text, whose rows hide nothing but a first part of the cache, or of the prompt where the cache is empty.
    Images and other masks are the original's business.
    """

    def make() -> dict:
        return patch.original()(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            mm_token_type_ids=mm_token_type_ids,
            **patch.acceleration.as_argument(cache),
        )

    original = _Once(make)

    text = config.get_text_config()
    if mm_token_type_ids is not None or cache is None or text.use_bidirectional_attention == "all":
        return original()
    if not _take_ranges(patch, patch.owner.language_model.layers):
        return original()
    if attention_mask is not None and (attention_mask.ndim != 2 or attention_mask.shape[1] == 0):
        return original()
    visible = None if attention_mask is None else _on_host(attention_mask)
    new = inputs_embeds.shape[1]
    # What a mask does not mention it hides, be it all True.
    if visible is not None and visible.shape[1] >= cache.get_seq_length() + new and bool(visible.all()):
        visible = None
    masks = {}
    for kind, index in _first_layers(text).items():
        sliding = kind == "sliding_attention"
        if index >= len(cache.layers) or cache.is_sliding[index] != sliding:
            return original()
        layer, seen = cache.layers[index], cache.get_seq_length(index)
        if (seen and not readable(cache, layer)) or cache.is_compileable:
            return original()
        # Where everything fits into one window, it is no limit.
        window = text.sliding_window if sliding and seen + new > text.sliding_window else None
        held = layer.keys.shape[-2] if seen else 0
        span, padding = (None, None), None
        if visible is not None and not seen:
            padding = _left_padding(visible, inputs_embeds.shape[:2])
            if padding is None:
                return original()
        elif visible is not None:
            span = _row_range(visible, seen - held, seen, inputs_embeds.shape[:2])
            if span is None:
                return original()
            start, end = span
            # The window counts from the last slot that is seen; hidden slots behind it would move it.
            if window is not None and not bool(((end == held) | (start == end)).all()):
                return original()
        span = _to(inputs_embeds.device, (*span, padding))
        masks[kind] = CausalRange(*span[:2], reference_masks=original, window=window, padding=span[2])
    return masks


def next_canvas_arguments(
    patch: Patch,
    attention_mask,
    decoder_attention_mask,
    decoder_position_ids,
    canvas_length: int,
    cur_len: int,
):
    """`_prepare_kwargs_for_next_canvas`: what it appends to a mask need not be read from the device."""
    prepared = patch.original()(
        attention_mask=attention_mask,
        decoder_attention_mask=decoder_attention_mask,
        decoder_position_ids=decoder_position_ids,
        canvas_length=canvas_length,
        cur_len=cur_len,
    )
    call = active_call()
    if call is not None and not patch.overridden:
        longer = {}
        for before, after in ((decoder_attention_mask, prepared[1]), (attention_mask, prepared[2])):
            host = call.mask_on_host(before)
            if host is not None and after.shape[1] == host.shape[1] + canvas_length:
                shown = torch.nn.functional.pad(host, (0, canvas_length), value=True)
                longer[id(after)] = after, version(after), shown
        call.masks_on_host = longer
    return prepared


def _on_host(mask: Tensor) -> Tensor:
    """A mask as bools on the host; of those that `generate` makes only the first is read from the device."""
    call = active_call()
    if call is None or _is_on_host(mask):
        return mask.bool().cpu()
    host = call.mask_on_host(mask)
    if host is None:
        host = mask.bool().cpu()
        if mask is not call.given_mask or not mask.is_inference():
            # With the tensor, so that no other one gets its id.
            call.masks_on_host[id(mask)] = mask, version(mask), host
    return host


def _is_on_host(mask: Tensor) -> bool:
    return mask.is_cpu


def _to(device: torch.device, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in tensors)


def _take_ranges(patch: Patch, layers) -> bool:
    """Whether nobody else's code makes the masks, and this package's attention serves every layer, since another one
    knows nothing of ranges. It says so where not."""
    if patch.overridden:
        patch.acceleration.say("attention", f"{patch.name} is not transformers' own")
        return False
    other = other_attention(layers[0].self_attn.config) if len(layers) else None
    if other is not None:
        patch.acceleration.say("attention", other)
        return False
    if all(patch_of(getattr(layer, "self_attn", None)) is not None for layer in layers):
        return True
    patch.acceleration.say(
        "attention", "a layer was replaced after accelerate(model); calling that again serves it as well"
    )
    return False


def _first_layers(config) -> dict[str, int]:
    """The first layer of each kind."""
    first: dict[str, int] = {}
    for index, kind in enumerate(config.get_text_config().layer_types):
        first.setdefault(kind, index)
    return first


def _row_range(visible: Tensor, first: int, seen: int, shape) -> tuple[Tensor, Tensor] | None:
    """The range of slots that hold tokens first..seen-1, or None if a range cannot say what the mask says."""
    batch, canvas_length = shape
    # A mask that is too short hides what it does not mention.
    visible = torch.nn.functional.pad(
        visible, (0, max(0, seen + canvas_length - visible.shape[1])), value=False
    )
    visible = visible.expand(batch, -1)
    if not bool(visible[:, seen : seen + canvas_length].all()):
        return None
    return contiguous_range(visible[:, first:seen])


def _left_padding(visible: Tensor, shape) -> Tensor | None:
    """[B] int64: how many tokens of a prompt [B, L] are hidden, if these are the first ones of every row; else None."""
    if tuple(visible.shape) != tuple(shape) or not bool((visible[:, 1:] >= visible[:, :-1]).all()):
        return None
    return shape[1] - visible.sum(-1)
