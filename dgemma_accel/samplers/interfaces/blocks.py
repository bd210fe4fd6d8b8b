"""Block diffusion: a block sees itself and those before, which do not change any more (SDAR, LLaDA2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Interface, Session


def refuse_shift(interface: Interface) -> None:
    if interface.shift_logits:
        raise ValueError(f"shift_logits: {type(interface).__name__} has no shifted form")


class StoringSession(Session):
    """A session whose cache holds the blocks that are done, for the rows of the last selection."""

    past: Any = None

    def prefill(self, tokens: Tensor, length: int) -> Tensor | None:
        self._rows = torch.arange(tokens.shape[0], device=tokens.device)

    def select(self, rows: Tensor) -> bool:
        # transformers' caches can drop some of their rows.
        if self.past is not None:
            if not hasattr(self.past, "batch_select_indices"):
                return False
            self.past.batch_select_indices(torch.searchsorted(self._rows, rows))
        self._rows = rows
        return super().select(rows)


class _BlockSession(StoringSession):
    def prefill(self, tokens: Tensor, length: int) -> None:
        super().prefill(tokens, length)
        self.past = self.interface.new_cache()
        if not length:
            return
        size = self.interface.block_length
        block = torch.arange(length, device=tokens.device) // size
        visible = (block[:, None] >= block[None]).to(torch.get_default_dtype())
        self._run(tokens, 0, length, visible[None], store=True)

    def _run(self, tokens: Tensor, start: int, end: int, mask: Tensor, store: bool) -> Any:
        positions = torch.arange(start, end, device=tokens.device)[None]
        return self.call(
            tokens[:, start:end],
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            store_kv=store,
            **{self.cache_name: self.past},
        )

    def _sees_all(self, tokens: Tensor, start: int, end: int) -> Tensor:
        return torch.ones(1, end - start, end, device=tokens.device)

    def logits(self, tokens: Tensor, start: int, end: int) -> Tensor:
        output = self._run(tokens, start, end, self._sees_all(tokens, start, end), store=False)
        return self.checked(output, tokens[:, start:end])

    def end_block(self, tokens: Tensor, start: int, end: int) -> None:
        self._run(tokens, start, end, self._sees_all(tokens, start, end), store=True)


def _dynamic_cache():
    from transformers import DynamicCache

    return DynamicCache()


@dataclass(frozen=True)
class BlockCache(Interface):
    """SDAR's block diffusion: blocks see themselves and those before, whose keys and values are stored when done.

    model(block, attention_mask=[1, C, end] of ones, position_ids=[1, C], past_key_values=cache, use_cache=True,
    store_kv=...): True for the prompt's whole blocks, which go first under a block-causal mask, and once
    for each finished block; False while a block is denoised. Blocks begin at multiples of the block length.

    new_cache: makes the cache; transformers' DynamicCache by default.

    Source: JetAstra/SDAR, generate.py.
    """

    new_cache: Callable[[], Any] = _dynamic_cache
    block_length: int = 0  # set by the sampler
    session = _BlockSession
    aligned = True

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_shift(self)


class _BlockCausalSession(Session):
    free_rows = True

    def logits(self, tokens: Tensor, start: int, end: int) -> Tensor:
        fed, device = tokens[:, :end], tokens.device
        block = torch.arange(end, device=device) // self.interface.block_length
        mask = torch.zeros(end, end, dtype=self._dtype(), device=device)
        mask = mask.masked_fill(block[:, None] < block[None], -math.inf)
        positions = torch.arange(end, device=device)[None]
        output = self.call(
            fed, attention_mask=mask.expand(len(fed), 1, -1, -1), position_ids=positions, use_cache=False
        )
        return self.checked(output, fed)[:, start:end]

    def _dtype(self) -> torch.dtype:
        """The model's, as its attention adds the mask to its scores."""
        parameters = self.model.parameters() if isinstance(self.model, torch.nn.Module) else ()
        return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)


@dataclass(frozen=True)
class BlockCausal(Interface):
    """LLaDA2's block diffusion: blocks see themselves and those before, and all are read at every evaluation.

    model(tokens up to the block's end, attention_mask=[B, 1, end, end], position_ids=[1, end], use_cache=False). The
    mask is added to the scores: 0 where a position sees another, else -inf. Blocks begin at multiples of the block
    length.

    Source: inclusionAI/LLaDA2.0-mini, modeling_llada2_moe.py, generate.
    """

    block_length: int = 0  # set by the sampler
    session = _BlockCausalSession
    aligned = True

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_shift(self)
