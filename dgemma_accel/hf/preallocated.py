"""A cache that is allocated once and correct at every prompt length; imports transformers.

transformers' own static cache mixes up sliding layers once the prompt reaches the window. Here a layer's keys are a
view of the valid part of its buffer, so every reader, the original attention included, sees what a dynamic cache
would hold, and a step neither copies nor allocates anything that grows with the context.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from .bank import rounded_up


class _Buffers:
    """What both kinds of layers share: buffers [B, Hkv, capacity, D] and writing into them.

    `keys` and `values` are the slots [first, first + held) of the buffers.
    """

    capacity: int
    first: int

    def _allocate_for(self, key_states: Tensor, value_states: Tensor) -> None:
        """Buffers that fit these states; tokens that are already held move along."""
        fits = self.is_initialized and (
            self.key_buffer.shape[:3] == (*key_states.shape[:2], self.capacity)
            and self.key_buffer.dtype == key_states.dtype
            and self.key_buffer.device == key_states.device
        )
        if fits and not self._held_elsewhere():
            return
        before = (self.keys, self.values) if self.is_initialized and self.keys.numel() else None
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, key_states.shape[0]
        if not fits:
            # Buffers outlive the call; tensors of inference mode could not be written outside of it.
            with torch.inference_mode(False):
                self.key_buffer, self.value_buffer = (
                    torch.empty(*x.shape[:2], self.capacity, x.shape[3], dtype=x.dtype, device=x.device)
                    for x in (key_states, value_states)
                )
        self.is_initialized = True
        self.first = 0
        self._view(0)
        if before is not None:
            self._write(0, *before)
            self._view(before[0].shape[2])

    def _view(self, held: int) -> None:
        self.keys = self.key_buffer[:, :, self.first : self.first + held]
        self.values = self.value_buffer[:, :, self.first : self.first + held]

    def _write(self, slot: int, key_states: Tensor, value_states: Tensor) -> None:
        end = slot + key_states.shape[2]
        self.key_buffer[:, :, slot:end] = key_states
        self.value_buffer[:, :, slot:end] = value_states

    def slot_for(self, new: int) -> int | None:
        """The slot of the buffers at which `new` tokens may be written, before `took`; None where only `update`,
        which may make other buffers, can take them."""
        if not self.is_initialized or self.key_buffer.shape[2] != self.capacity or self._held_elsewhere():
            return None
        return self._room_for(new)

    def _held_elsewhere(self) -> bool:
        """Whether what is held is no longer in the buffers, as after `batch_select_indices`."""
        return self.keys.untyped_storage().data_ptr() != self.key_buffer.untyped_storage().data_ptr()

    def adopt(self, key_buffer: Tensor, value_buffer: Tensor) -> None:
        """Use these buffers, holding nothing yet."""
        self.key_buffer, self.value_buffer = key_buffer, value_buffer
        self.dtype, self.device, self.batch_size = key_buffer.dtype, key_buffer.device, key_buffer.shape[0]
        self.is_initialized, self.first = True, 0
        self._view(0)

    def part_from_buffers(self) -> None:
        """Keep what is held in memory of its own; the next update makes new buffers."""
        if self.is_initialized:
            self.keys, self.values = self.keys.clone(), self.values.clone()
            self.key_buffer, self.value_buffer, self.first = self.keys, self.values, 0

    def reset(self) -> None:
        """Forget every token; the buffers stay."""
        if hasattr(self, "cumulative_length"):
            self.cumulative_length = 0
        self.first = 0
        if self.is_initialized:
            self._view(0)

    def offload(self) -> None:
        raise NotImplementedError("a preallocated cache stays on its device")


class PreallocatedLayer(_Buffers, DynamicLayer):
    """A layer that sees everything: `capacity` tokens, and if `growing` larger buffers where that is too few."""

    def __init__(self, capacity: int, growing: bool = False) -> None:
        super().__init__()
        self.capacity, self.growing, self.first = capacity, growing, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        held, new = self.keys.shape[2] if self.is_initialized else 0, key_states.shape[2]
        if held + new > self.capacity:
            if not self.growing:
                raise ValueError(
                    f"cache: there is room for {self.capacity} tokens, holds {held} and got {new} more"
                )
            self.capacity = rounded_up(held + new)
        self._allocate_for(key_states, value_states)
        self._write(held, key_states, value_states)
        self.took(new)
        return self.keys, self.values

    def _room_for(self, new: int) -> int | None:
        held = self.keys.shape[2]
        return held if held + new <= self.capacity else None

    def took(self, new: int) -> None:
        """`new` tokens were written behind what was held."""
        self._view(self.keys.shape[2] + new)


class PreallocatedSlidingLayer(_Buffers, DynamicSlidingWindowLayer):
    """A layer that keeps the last `sliding_window` - 1 tokens.

    The window slides through the buffer; only when it comes to the end it moves back to the front.
    """

    def __init__(self, sliding_window: int, canvas_length: int) -> None:
        super().__init__(sliding_window=sliding_window)
        keep = sliding_window - 1
        # Twice the window, so that moving to the front copies between separate slots.
        self.capacity, self.first = keep + max(keep, canvas_length), 0

    def activate_past_recording(self) -> None:
        raise NotImplementedError("a preallocated sliding layer keeps its window and nothing before it")

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write the new tokens; returns the earlier window and all of them, as the encoder's attention wants it."""
        self._allocate_for(key_states, value_states)
        keep, held, new = self.sliding_window - 1, self.keys.shape[2], key_states.shape[2]
        slot = self._room_for(new)
        if slot is None:
            # A long prompt: only its end is kept.
            keys, values = key_states, value_states
            if held:
                keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
            self.cumulative_length += new
            self.first = 0
            self._write(0, keys[:, :, -keep:], values[:, :, -keep:])
            self._view(keep)
            return keys, values
        self._write(slot, key_states, value_states)
        self._view(held + new)
        seen = self.keys, self.values
        self._view(held)
        self.took(new)
        return seen

    def _room_for(self, new: int) -> int | None:
        held = self.keys.shape[2]
        if held + new > self.capacity:
            return None
        if self.first + held + new > self.capacity:
            keys, values = self.keys, self.values
            if self.first < held:
                keys, values = keys.clone(), values.clone()
            self.first = 0
            self._write(0, keys, values)
            self._view(held)
        return self.first + held

    def took(self, new: int) -> None:
        """`new` tokens were written behind what was held; the window slides on."""
        keep, held = self.sliding_window - 1, self.keys.shape[2] + new
        self.cumulative_length += new
        self.first += max(0, held - keep)
        self._view(min(held, keep))


class PreallocatedCache(Cache):
    """A cache for a DiffusionGemma model with room for `max_length` tokens, prompt and generated text together.

    Args:
        config: `DiffusionGemmaConfig`.
        max_length: tokens, >= 1. A call that needs more raises ValueError.
        growing: it gets larger buffers instead.

    Memory: 2 * Hkv * D * max_length elements per row and global layer, about two windows per sliding layer.
    """

    def __init__(self, config, max_length: int, *, growing: bool = False) -> None:
        if isinstance(max_length, bool) or not isinstance(max_length, int):
            raise TypeError(f"max_length: an int expected, got {type(max_length).__name__}")
        if max_length < 1:
            raise ValueError(f"max_length: must be at least 1, got {max_length}")
        text = config.get_text_config()
        super().__init__(
            layers=[
                PreallocatedSlidingLayer(text.sliding_window, config.canvas_length)
                if kind == "sliding_attention"
                else PreallocatedLayer(max_length, growing)
                for kind in text.layer_types
            ]
        )
        self.max_length = max_length

    def adopt(self, buffers: list[tuple[Tensor, Tensor]]) -> None:
        """Use these buffers, one pair for every layer."""
        for layer, pair in zip(self.layers, buffers, strict=True):
            layer.adopt(*pair)

    def part_from_buffers(self) -> None:
        """Keep every token in memory of its own."""
        for layer in self.layers:
            layer.part_from_buffers()

    def buffers_at(self, capacity: int) -> list[tuple[Tensor, Tensor]] | None:
        """The buffers of all layers, if they are there and have room for `capacity` tokens and no more."""
        for layer in self.layers:
            right = isinstance(layer, PreallocatedSlidingLayer) or layer.capacity == capacity
            if not (layer.is_initialized and right and layer.key_buffer.shape[2] == layer.capacity):
                return None
        return [(layer.key_buffer, layer.value_buffer) for layer in self.layers]
