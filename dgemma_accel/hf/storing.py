"""The pass that stores a finished canvas: the encoder writes its keys and values into the cache behind what that holds.

It has a canvas's shape whatever the context, so on a GPU its layers are compiled, and it is recorded, once for each
shape, and replayed, as denoising steps are: launched one by one its operators take the host longer than the device.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..cuda_graph import RECORDINGS
from . import graph
from .call import Call, active_call
from .compiled import Parts, buffers_of, capture_key, leased, prefixes_of
from .eager import why_not_stored
from .naming import takes_cache
from .patches import Patch
from .products import side_by_side
from .registry import STORING, UNCAPTURED


class Place(NamedTuple):
    """Where the canvas goes in the layers of one kind. prefix: what it sees. slots: [C] int64, of the buffers."""

    prefix: graph.Prefix
    slots: Tensor


class Inputs(NamedTuple):
    """What the pass reads besides weights and cache. embeds: [B, C, E]. places: by layer kind."""

    embeds: Tensor
    places: dict[str, Place]


@takes_cache
def text_encoder_forward(patch: Patch, *args, **kwargs):
    """`DiffusionGemmaEncoderTextModel.forward`; in an accelerated `generate` a pass over a finished canvas is a replay.

    Arguments and result are the original's, which serves everything else: prompts, images, devices without a recording.
    """
    # Looked up last: it cannot be traced.
    call = None if args or torch.compiler.is_compiling() else active_call()
    stored = None if call is None else _stored(patch, call, kwargs)
    if stored is not None:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        cache = patch.acceleration.as_argument(kwargs["cache"])
        return BaseModelOutputWithPast(last_hidden_state=stored, **cache)
    cache = patch.acceleration.as_argument(kwargs.pop("cache")) if "cache" in kwargs else {}
    return patch.original()(*args, **cache, **kwargs)


def _stored(patch: Patch, call: Call, kwargs: dict) -> Tensor | None:
    """The last hidden states [B, C, E] of a canvas that the cache has taken up, or None where nothing was done."""
    acceleration, model = patch.acceleration, patch.acceleration.model
    # What tokens become before the layers is the encoder's own business, and not the same in all releases.
    names = ("inputs_embeds", "attention_mask", "position_ids", "cache")
    embeds, masks, position_ids, cache = map(kwargs.get, names)
    # Restored by another thread in the middle of the call, it knows no model.
    if model is None or not isinstance(embeds, Tensor) or embeds.shape[1] != model.config.canvas_length:
        return None
    device = embeds.device
    recording = RECORDINGS.get(device.type)
    if recording is None or not acceleration.graph_on(device) or cache is None or position_ids is None:
        return None
    if cache.get_seq_length() == 0:
        # A prompt, which comes once.
        return None
    others = {name: value for name, value in kwargs.items() if name not in names}
    reason = why_not_stored(patch, call, embeds, masks, cache, others)
    if reason is not None:
        call.disturb()
        acceleration.say("graph", reason, UNCAPTURED[STORING])
        return None
    count = embeds.shape[1]
    # Before the ranges are read: windows may move within their buffers.
    slots = [layer.slot_for(count) for layer in cache.layers]
    if None in slots:
        return None

    text, layers = patch.owner, graph.layers_of(patch.owner)
    prefixes = prefixes_of(text, cache, masks, position_ids, embeds)
    places = {}
    for layer, slot in zip(layers, slots):
        kind = layer.self_attn.layer_type
        if kind not in places:
            places[kind] = Place(prefixes[kind], torch.arange(slot, slot + count, device=device))
    inputs = Inputs(embeds, places)
    keys, values = buffers_of(cache)
    backend = acceleration.backend_of("block_attention")
    parts = _parts_for(acceleration, embeds, keys, backend)

    def make(pool) -> CapturedPass:
        in_place = graph.InPlace(keys, values, side_by_side(layers, acceleration.backend, embeds.dtype))
        return CapturedPass(text, in_place, inputs, backend, parts, recording, pool)

    key = capture_key(STORING, device, parts, embeds[..., 0], pytree.tree_leaves(inputs), keys, values)
    with ExitStack() as stack:
        captured = leased(stack, call, acceleration, recording, key, (text,), make)
        if captured is None:
            return None
        hidden = captured.run(inputs)
    for layer in cache.layers:
        layer.took(count)
    return hidden


def _parts_for(acceleration, embeds: Tensor, keys: list[Tensor], backend: str) -> Parts:
    """What is compiled of a pass over `embeds` [B, C, E]. How long the cache is does not count, as in steps."""
    buffers = tuple((buffer.shape[:2], buffer.shape[3]) for buffer in keys)
    key = STORING, embeds.shape, embeds.dtype, embeds.device, buffers, backend
    if key not in acceleration.compiled:
        acceleration.compiled[key] = Parts(STORING, acceleration, embeds.shape[:2])
    return acceleration.compiled[key]


def store(
    text,
    inputs: Inputs,
    in_place: graph.InPlace,
    backend: str,
    run: Callable = graph.as_it_is,
) -> Tensor:
    """Write keys and values of a canvas into the buffers; returns the last hidden states [B, C, E].

    Args:
        text: `DiffusionGemmaEncoderTextModel`.
        run: called with each part and its arguments.
    """
    hidden, pairs = inputs.embeds, graph.with_following(text)
    normed = run(graph.begin, pairs[0][0].input_layernorm, hidden, in_place.how[0])
    for index, (module, following) in enumerate(pairs):
        held, how = (in_place.keys[index], in_place.values[index]), in_place.how[index]
        kind = module.self_attn.layer_type
        place = inputs.places[kind]
        # A window as wide as the cache hides nothing, so it is a window at every length.
        window = text.config.sliding_window if kind == "sliding_attention" else None
        arguments = (following, hidden, normed, held, how, place.prefix, backend)
        hidden, normed, *fresh = run(graph.layer, module, *arguments, {"causal": True, "window": window})
        # Not in the part: a compiler that fails to see that nobody reads the buffer meanwhile would copy all of it.
        for buffer, states in zip(held, fresh):
            buffer.index_copy_(2, place.slots, states)
    return normed.rows


class CapturedPass:
    """`store` over tensors of its own: `run`, and at last `close`, also after an exception.

    A graph reads and writes the addresses it was recorded with, so inputs are copied in and hidden states out. Running
    it before it is recorded writes the same into the same slots.
    """

    def __init__(
        self,
        text,
        in_place: graph.InPlace,
        inputs: Inputs,
        backend: str,
        parts: Parts,
        recording: type,
        pool,
    ) -> None:
        device, begun = inputs.embeds.device, time.perf_counter()
        # Tensors of inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            held = pytree.tree_map(
                lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device), inputs
            )
            result = torch.empty_like(held.embeds)
        self.own, self.result, self.replays = pytree.tree_leaves(held), result, 0
        self._copy_in(inputs)

        # No `self` in it: a function that a recording keeps does not keep this object, nor its memory.
        def store_canvas() -> None:
            result.copy_(store(text, held, in_place, backend, functools.partial(parts.run, device)))

        self.recording = recording(store_canvas, device, pool)
        self.seconds = time.perf_counter() - begun
        self.bytes = self.recording.bytes + sum(tensor.nbytes for tensor in (*self.own, result))

    def _copy_in(self, inputs: Inputs) -> None:
        for mine, given in zip(self.own, pytree.tree_leaves(inputs), strict=True):
            mine.copy_(given, non_blocking=True)

    def run(self, inputs: Inputs) -> Tensor:
        self.recording.begin()
        self._copy_in(inputs)
        self.recording.replay()
        self.replays += 1
        return self.result.clone()

    def close(self) -> None:
        """The run is over: others that share its memory may begin theirs."""
        self.recording.end()
