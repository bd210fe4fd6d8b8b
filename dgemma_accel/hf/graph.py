"""A denoising step as two functions of tensors, which `torch.compile(fullgraph=True)` traces once per shape.

They are traced whole, or in parts where the step is recorded and nobody calls the parts again.

`embed`, `layer`, `choose` and `condition` are the parts. Layers of one kind do the same with other weights, so what is
compiled for one serves all of them, and the compiler has two layers to work on instead of thirty. A layer ends with the
norm that the next one begins with, so nothing that the compiler could fuse is cut in two.
`decide` ends with the canvas and the flags that say which rows are finished; `condition` makes the soft embeddings that
the next step begins with. So the host learns whether there is a next step while the device is at work on this one.
Everything that changes between steps, canvases, prompts or calls is a tensor: range of the prefix, temperature, seed,
offset, thresholds. The cache comes as whole buffers, so a longer prefix is another number and not another shape.
Products that do not need each other run side by side (`products`).
Norms, RoPE, GeGLU and residuals are the compiler's to fuse; the ops of this package are opaque to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops.block_attention import block_attention
from ..ops.commit import commit
from ..ops.quantize_rows import quantize_rows
from ..ops.row_stats import RowStats
from ..ops.soft_embedding import soft_embedding
from ..samplers import CanvasState, EntropyBound, Renoise, StableAndConfident
from .attention import project
from .head import logits_and_stats
from .layer import norm, through
from .products import SideBySide
from .statistics import as_given


class Prefix(NamedTuple):
    """What the decoder reads of one layer kind. start, end: [B] int32 slots of the buffers. cos, sin: [1, C, D]."""

    start: Tensor
    end: Tensor
    cos: Tensor
    sin: Tensor


class InPlace(NamedTuple):
    """What a step finds in each layer. keys, values: the cache's buffers [B, Hkv, capacity, D]. how: its products."""

    keys: list[Tensor]
    values: list[Tensor]
    how: list[SideBySide]


class Normed(NamedTuple):
    """What a layer begins with. rows: [B, C, E] behind its first norm. rounded: the same in FP8, with the scales of its
    rows [B, C, 1], where query, key and value are made of that; the compiler makes both at once."""

    rows: Tensor
    rounded: tuple[Tensor, Tensor] | None


class Settings(NamedTuple):
    """What holds for a whole call and is part of the graph. depth: canvases of the history; None: rows never finish."""

    softcap: float | None
    vocab: int
    depth: int | None
    exact: bool
    backends: tuple[str, str, str, str]  # block_attention, head_stats, commit, soft_embedding


class Numbers(NamedTuple):
    """0-d tensors: seed, offset int64, the others fp32."""

    seed: Tensor
    offset: Tensor
    temperature: Tensor
    entropy_bound: Tensor
    confidence: Tensor


class State(NamedTuple):
    """What one step hands to the next.

    canvas, draft: [B, C] int64. history: [S, B, C] int64. finished: [B] bool. soft: [B, C, E] soft embeddings times
    embed_scale, zeros before the first step. confidence, entropy: [B, C] fp32 of the draft. steps: [B] int64.
    """

    canvas: Tensor
    draft: Tensor
    history: Tensor
    finished: Tensor
    soft: Tensor
    confidence: Tensor
    entropy: Tensor
    steps: Tensor


class Decision(NamedTuple):
    """What `decide` leaves: the fields of `State` after the step, but for `soft`, the logits [B, C, V] and their
    statistics [B, C]."""

    canvas: Tensor
    draft: Tensor
    history: Tensor
    finished: Tensor
    confidence: Tensor
    entropy: Tensor
    steps: Tensor
    logits: Tensor
    stats: RowStats

    def state(self, soft: Tensor) -> State:
        return State(soft=soft, **{name: getattr(self, name) for name in State._fields if name != "soft"})


def as_it_is(part: Callable, *arguments):
    """A part of a step, run uncompiled."""
    return part(*arguments)


def decide(
    model,
    state: State,
    in_place: InPlace,
    prefixes: dict[str, Prefix],
    numbers: Numbers,
    pinned: Tensor | None,
    settings: Settings,
    run: Callable = as_it_is,
) -> Decision:
    """The first half of a denoising step: decoder, head and `commit`.

    Args:
        model: `DiffusionGemmaForBlockDiffusion`.
        prefixes: by layer kind.
        pinned: [B, C] bool, or None.
        run: called with each part and its arguments.
    """
    hidden = decode(
        model.model.decoder, state.canvas, state.soft, in_place, prefixes, settings.backends[0], run
    )
    return run(choose, model, hidden, state, numbers, pinned, settings)


def choose(
    model, hidden: Tensor, state: State, numbers: Numbers, pinned: Tensor | None, settings: Settings
) -> Decision:
    """Head and `commit` of the last hidden states [B, C, E]."""
    logits, stats = logits_and_stats(
        model.lm_head,
        hidden,
        temperature=numbers.temperature,
        softcap=settings.softcap,
        seed=numbers.seed,
        offset=numbers.offset,
        backend=settings.backends[1],
    )
    given = as_given(stats, state.canvas, pinned)
    stop = None if settings.depth is None else StableAndConfident(settings.depth, numbers.confidence)
    result = commit(
        state.canvas,
        given,
        EntropyBound(numbers.entropy_bound),
        Renoise(settings.vocab),
        candidates=None if pinned is None else ~pinned,
        seed=numbers.seed,
        offset=numbers.offset,
        state=CanvasState(state.draft, state.history, state.finished),
        stop=stop,
        backend=settings.backends[2],
    )
    frozen = state.finished[:, None]
    return Decision(
        result.tokens,
        result.state.draft,
        result.state.history,
        result.state.finished,
        torch.where(frozen, state.confidence, given.top1_prob),
        torch.where(frozen, state.entropy, given.entropy),
        state.steps + ~state.finished,
        logits,
        stats,
    )


def condition(
    model,
    decision: Decision,
    frozen: Tensor,
    soft: Tensor,
    temperature: Tensor,
    pinned: Tensor | None,
    settings: Settings,
) -> Tensor:
    """The second half: soft embeddings [B, C, E] of the step's logits, times embed_scale.

    Args:
        frozen: [B] bool, rows that were finished before the step. soft: theirs, which they keep.
    """
    embed_tokens = model.model.decoder.embed_tokens
    fresh = soft_embedding(
        decision.logits,
        decision.stats,
        embed_tokens.weight,
        softcap=settings.softcap,
        temperature=temperature,
        exact=settings.exact,
        backend=settings.backends[3],
    )
    fresh = fresh * embed_tokens.embed_scale.to(fresh.dtype)
    if pinned is not None:
        fresh = torch.where(pinned[..., None], embed_tokens(decision.canvas), fresh)
    return torch.where(frozen[:, None, None], soft, fresh)


def decode(
    decoder, canvas: Tensor, soft: Tensor, in_place: InPlace, prefixes, backend: str, run: Callable = as_it_is
) -> Tensor:
    """The last hidden states [B, C, E] of `DiffusionGemmaDecoderModel`, from soft embeddings instead of logits."""
    hidden, normed = run(embed, decoder, canvas, soft, in_place.how[0])
    for index, (module, following) in enumerate(with_following(decoder)):
        held, how = (in_place.keys[index], in_place.values[index]), in_place.how[index]
        prefix = prefixes[module.self_attn.layer_type]
        hidden, normed, *_ = run(layer, module, following, hidden, normed, held, how, prefix, backend, {})
    return normed.rows


def layers_of(text_model) -> list[nn.Module]:
    """Those of a decoder's or a text encoder's layers that its forward runs."""
    config = getattr(text_model, "text_config", text_model.config)
    # A slice of a ModuleList would be another one.
    return list(text_model.layers)[: config.num_hidden_layers]


def with_following(text_model) -> list[tuple[nn.Module, nn.Module]]:
    """The layers of a decoder or a text encoder, each with the norm that its result goes through next."""
    layers = layers_of(text_model)
    return list(zip(layers, [*(one.input_layernorm for one in layers[1:]), text_model.norm]))


def embed(decoder, canvas: Tensor, soft: Tensor, how: SideBySide) -> tuple[Tensor, Normed]:
    """(what goes into the first layer [B, C, E], the same behind that layer's first norm); how: its products."""
    conditioning = decoder.self_conditioning
    # The method of the class: the instance's takes its soft embeddings elsewhere.
    hidden = type(conditioning).forward(conditioning, decoder.embed_tokens(canvas), soft)
    return hidden, begin(decoder.layers[0].input_layernorm, hidden, how)


def begin(module: nn.Module, hidden: Tensor, how: SideBySide) -> Normed:
    """hidden [B, C, E] behind the first norm of a layer.

    Args:
        how: the layer's products, or those of the layer before it: where the two differ, a result is not used or is
            made once more.
    """
    rows = norm(module, hidden)
    return Normed(rows, quantize_rows(rows) if how.rounded else None)


def layer(
    module: nn.Module,
    following: nn.Module,
    hidden: Tensor,
    normed: Normed,
    held: tuple[Tensor, Tensor],
    how: SideBySide,
    prefix: Prefix,
    backend: str,
    mask: dict,
) -> tuple[Tensor, Normed, Tensor, Tensor]:
    """(hidden [B, C, E] behind one layer, the same behind the norm `following`, the rows' keys and values
    [B, Hkv, C, D]).

    Args:
        normed: hidden behind the layer's first norm.
        held: the layer's buffers of keys and values, which are not written.
        mask: `causal` and `window` of `block_attention`.
    """
    attention = module.self_attn
    rounded = normed.rounded if how.rounded else None
    angles = (prefix.cos, prefix.sin)
    query, key, value = project(attention, normed.rows, angles, how.projections, rounded)
    attended = block_attention(
        query,
        key,
        value,
        *held,
        prefix_start=prefix.start,
        prefix_end=prefix.end,
        scale=float(attention.scaling),
        backend=backend,
        **mask,
    )
    hidden = through(module, hidden, attention.o_proj(attended.transpose(1, 2).flatten(2)), how)
    return hidden, begin(following, hidden, how), key, value
