"""Fast-dLLM v2's block diffusion: blocks that are decided in sub-blocks, with a cache for either."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..numbers import LONGEST, check_field, check_flag
from .base import Interface, past_of
from .blocks import StoringSession


class _HierarchicalSession(StoringSession):
    # Keys and values of the block that is being decided, at the last evaluation that fed all of it.
    within: Any = None

    def select(self, rows: Tensor) -> bool:
        # Only rows between two sub-blocks are dropped, and the next one begins with a mask: all is fed then anyway.
        self.within = None
        return super().select(rows)

    def prefill(self, tokens: Tensor, length: int) -> Tensor | None:
        super().prefill(tokens, length)
        size = self.interface.model_block_length
        whole = length // size * size
        if not whole:
            return None
        following = self._store(tokens[:, :whole])
        return following if whole == length else None

    def _store(self, fed: Tensor) -> Tensor:
        """The logits [B, V] behind what is fed, which is in the cache from now on."""
        # Those of a whole prompt would be gigabytes.
        last = {"logits_to_keep": 1} if "logits_to_keep" in self.parameters else {}
        output = self._call(fed, update_past_key_values=True, **last)
        self.past = past_of(output)
        return self.checked(output, fed[:, -1:] if last else fed)[:, -1]

    def _call(self, fed: Tensor, update_past_key_values: bool = False, **kwargs) -> Any:
        return self.call(
            fed,
            use_cache=True,
            update_past_key_values=update_past_key_values,
            block_size=self.interface.model_block_length,
            **{self.cache_name: self.past},
            **kwargs,
        )

    def logits(self, tokens: Tensor, start: int, end: int) -> Tensor:
        size = self.interface.model_block_length
        first = start // size * size
        block = tokens[:, first : first + size]
        if not self.interface.use_block_cache:
            logits = self.checked(self._call(block), block)
            return self.block_of(logits, start - first, end - first)
        # The logits of a sub-block's first token stand before it, so it alone is fed only once that token is there.
        if self.within is None or bool((tokens[:, start] == self.interface.mask_id).any()):
            output = self._call(block, use_block_cache=True)
            self.within = output.block_past_key_values
            return self.block_of(self.checked(output, block), start - first, end - first)
        fed = tokens[:, start:end]
        output = self._call(
            fed,
            use_block_cache=True,
            block_past_key_values=self.within,
            replace_position=start - first,
        )
        return self.block_of(self.checked(output, fed), 0, end - start)

    def end_block(self, tokens: Tensor, start: int, end: int) -> Tensor | None:
        size = self.interface.model_block_length
        if end % size:
            return None
        self.within = None
        return self._store(tokens[:, end - size : end])


@dataclass(frozen=True)
class HierarchicalCache(Interface):
    """Fast-dLLM v2: the model's blocks are decided in sub-blocks, and stored when they are done.

    The sampler's `block_length` is that of a sub-block (`small_block_size` of the published code). At every evaluation
    the block is fed, and sees itself and what is stored: model(block, past_key_values=..., use_cache=True,
    update_past_key_values=False, block_size=model_block_length). A block that is done, and before them the prompt's
    whole blocks, are fed with update_past_key_values=True. Logits are shifted right by one position, and those behind
    what has been stored give the next block's first token: their argmax, whatever the strategy and the temperature.

    model_block_length: of the model's blocks (`block_size`), a multiple of the sampler's `block_length`.
    use_block_cache: once a sub-block's first token is there, feed the sub-block alone, with keys and values of the
        rest of its block from the last evaluation that fed all of it (use_block_cache=True, block_past_key_values=...,
        replace_position=...).

    Source: Efficient-Large-Model/Fast_dLLM_v2_7B, modeling.py, generate.
    """

    shift_logits: bool = True
    model_block_length: int = 32
    use_block_cache: bool = False
    block_length: int = 0  # set by the sampler, as is mask_id
    mask_id: int = -1
    session = _HierarchicalSession
    aligned = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag(self, "use_block_cache")
        if not self.shift_logits:
            raise ValueError("shift_logits: HierarchicalCache has no form without a shift")
        check_field(self, "model_block_length", 1, LONGEST, integer=True)
        if self.block_length and self.model_block_length % self.block_length:
            raise ValueError(
                f"block_length: sub-blocks must divide the model's blocks of {self.model_block_length} positions, "
                f"got {self.block_length}"
            )

    def fitted(self, block_length: int | None, mask_id: int) -> Interface:
        return replace(super().fitted(block_length, mask_id), mask_id=mask_id)

    def fed_length(self, length: int) -> int:
        return math.ceil(length / self.model_block_length) * self.model_block_length
