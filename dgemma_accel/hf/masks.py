"""The padding of a prompt as a range of cache slots per row, instead of a mask over queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import readable
from .patches import Patch


@dataclass(eq=False)
class PrefixRange:
    """The attention mask of one layer kind: row b sees cache slots [start_b, end_b) and the whole canvas.

    start, end: [B] int32. `reference_masks` makes the masks of the original model, for a layer that needs them.
    """

    start: Tensor
    end: Tensor
    reference_masks: Callable[[], dict]

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """start and end on `device`, for models spread over several."""
        if self.start.device != device:
            self.start, self.end = self.start.to(device), self.end.to(device)
        return self.start, self.end


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


def create_decoder_masks(patch: Patch, config, inputs_embeds, past_key_values, decoder_attention_mask=None):
    """`DiffusionGemmaDecoderModel.create_diffusion_decoder_attention_mask` with ranges instead of 4-D masks.

    Called once per canvas. A 2-D mask [B, past + C] of which each row is one run of True over the past and all True
    over the canvas becomes a `PrefixRange` per layer kind; on sliding layers it is shifted to what their cache
    still holds. Everything else is the original's business.
    """
    made: list[dict] = []

    def original() -> dict:
        if not made:
            made.append(
                patch.original()(
                    config=config,
                    inputs_embeds=inputs_embeds,
                    past_key_values=past_key_values,
                    decoder_attention_mask=decoder_attention_mask,
                )
            )
        return made[0]

    mask = decoder_attention_mask
    if past_key_values is None or not isinstance(mask, Tensor) or mask.ndim != 2:
        return original()
    if past_key_values.is_compileable:
        return original()

    kinds = {}
    for index, kind in enumerate(config.get_text_config().layer_types):
        kinds.setdefault(kind, index)
    visible = mask.bool()
    if bool(visible.all()):
        return dict.fromkeys(("full_attention", "sliding_attention"))

    ranges = {}
    for kind, index in kinds.items():
        layer = past_key_values.layers[index]
        if not readable(past_key_values, layer):
            return original()
        held, seen = layer.keys.shape[-2], past_key_values.get_seq_length(index)
        span = _row_range(visible, seen - held, seen, inputs_embeds.shape[:2])
        if span is None:
            patch.acceleration.say("attention", "the attention mask has holes or hides canvas positions")
            return original()
        ranges[kind] = PrefixRange(*span, reference_masks=original)
    return ranges


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
