"""The ways to take a step that the step bench compares, and the calls that take N steps each way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dgemma_accel.hf.naming import cache_argument

from . import step_model

# Length of the canvases' history in every run: long enough never to be complete.
HISTORY = 64


@dataclass(frozen=True)
class Way:
    """One way to take a step. cache: of `step_model.random_cache`. compiles: torch.compile is at work, for minutes.

    eager: whether module hooks see inside it. decodes: one token a step instead of a canvas. experts, linears: the
    formats of `quantize_experts` and `quantize_linears` that weights have; the model's own stay in memory beside them.
    """

    name: str
    cache: str
    ours: bool = False
    graph: bool = False
    compiles: bool = False
    decodes: bool = False
    experts: str | None = None
    linears: str | None = None

    @property
    def eager(self) -> bool:
        return not self.compiles


REFERENCE = Way("transformers, dynamic cache", "dynamic")
COMPILED_REFERENCE = Way("transformers, static cache, compiled", "static", compiles=True)
OURS = Way("ours, dynamic cache", "dynamic", ours=True)
OURS_STATIC = Way("ours, static cache", "ours", ours=True)
GRAPH = Way("ours, graph", "ours", ours=True, graph=True, compiles=True)
GRAPH_FP8, GRAPH_NVFP4 = (
    Way(f"ours, graph, {form.upper()} experts", "ours", ours=True, graph=True, compiles=True, experts=form)
    for form in ("fp8", "nvfp4")
)
GRAPH_FP8_LINEARS = Way(
    "ours, graph, NVFP4 experts, FP8 linears", "ours", ours=True, graph=True, compiles=True, experts="nvfp4",
    linears="fp8",
)  # fmt: skip
WAYS = (REFERENCE, COMPILED_REFERENCE, OURS, OURS_STATIC, GRAPH, GRAPH_FP8, GRAPH_NVFP4, GRAPH_FP8_LINEARS)
AUTOREGRESSIVE = (
    Way("autoregressive, dynamic cache", "dynamic", decodes=True),
    Way("autoregressive, static cache, compiled", "static", compiles=True, decodes=True),
)


def model_of(model, way: Way, backend: str):
    """The way's own model over the weights that all share, accelerated where the way is ours.

    Raises:
        BenchError: the experts' quantized weights do not fit beside the others.
    """
    own = step_model.twin(model)
    if way.ours:
        import dgemma_accel

        if way.experts:
            step_model.room_for_experts(model, way.experts)
            dgemma_accel.quantize_experts(own, format=way.experts)
        if way.linears:
            dgemma_accel.quantize_linears(own, format=way.linears)
        dgemma_accel.accelerate(own, backend=backend, graph=way.graph)
    return own


def denoiser(model, cache, batch: int) -> Callable[..., object]:
    """A call that runs `generate` for canvases of exactly n steps, one if not told otherwise, behind what the cache
    holds."""
    canvas = model.config.canvas_length
    device = model.device
    prompt = torch.full((batch, 1), 5, device=device)

    def run(steps: int, canvases: int = 1):
        # A history as long as the run is never complete, so no row stops early. It is part of a compiled step's shape,
        # so runs of all lengths have the same.
        return model.generate(
            prompt,
            max_new_tokens=canvases * canvas,
            max_denoising_steps=steps,
            stability_threshold=max(steps, HISTORY),
            # Random weights may write an end token, behind which no canvas would follow.
            eos_token_id=None,
            **{cache_argument(): cache},
        )

    return run


def decoder(model, cache, batch: int, context: int, compiled: bool) -> Callable[[int], object]:
    """A call that decodes n tokens one by one with the encoder's causal pass, greedily."""
    encoder = model.model.encoder
    forward = encoder
    if compiled:
        forward = _with_still_lengths(torch.compile(encoder, mode="reduce-overhead", fullgraph=True), cache)
    device, softcap = model.device, model.config.text_config.final_logit_softcapping
    position = context

    @torch.no_grad()
    def run(tokens: int):
        nonlocal position
        token = torch.full((batch, 1), 5, device=device)
        for _ in range(tokens):
            positions = torch.full((batch, 1), position, device=device, dtype=torch.int32)
            masks = encoder.create_masks_for_generate(
                config=model.config,
                inputs_embeds=torch.empty(batch, 1, 0, dtype=model.dtype, device=device),
                attention_mask=torch.ones(batch, position + 1, dtype=torch.bool, device=device),
                position_ids=positions,
                **{cache_argument(): cache},
            )
            hidden = forward(
                input_ids=token, attention_mask=masks, position_ids=positions, **{cache_argument(): cache}
            ).last_hidden_state
            logits = softcap * torch.tanh(model.lm_head(hidden[:, -1]).float() / softcap)
            token = logits.argmax(-1, keepdim=True)
            position += 1
        return token

    return run


def _with_still_lengths(forward: Callable, cache) -> Callable:
    """A compiled pass of one token that sees of the length of each sliding layer only whether its window is full.

    transformers keeps that length as a Python number, which becomes an input of the graph; with another number at each
    token a CUDA graph is recorded for each and none is ever replayed.
    """
    sliding = [layer for layer in cache.layers if hasattr(layer, "cumulative_length_int")]

    def call(**arguments):
        lengths = [layer.cumulative_length_int for layer in sliding]
        for layer, length in zip(sliding, lengths):
            layer.cumulative_length_int = layer.max_cache_len if length >= layer.max_cache_len else 0
        try:
            return forward(**arguments)
        finally:
            for layer, length in zip(sliding, lengths):
                layer.cumulative_length_int = length + 1

    return call
