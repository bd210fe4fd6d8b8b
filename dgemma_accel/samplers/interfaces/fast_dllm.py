"""Fast-dLLM's caches: of the prefix, or of all but the block, filled anew by each block's first evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Interface, Session, past_of


def _cropped(past: Any, length: int) -> Any:
    """The first `length` slots of a cache: one with `crop`, or layers of (key, value).

    Keys and values are [B, H, L, D] in Fast-dLLM's LLaDA and [B, L, H * D] in its Dream.
    """
    if not hasattr(past, "crop"):
        return [tuple(tensor[..., :length, :] for tensor in layer) for layer in past]
    surplus = past.get_seq_length() - length
    if surplus > 0:
        # The number to remove: transformers 5.24 takes no length any more, and earlier releases take both.
        past.crop(-surplus)
    return past


class _PrefixSession(Session):
    def begin_block(self, start: int, end: int) -> None:
        self.past = None

    def logits(self, tokens: Tensor, start: int, end: int) -> Tensor:
        # With shifted logits the position before the block predicts its first one, so it is fed again.
        first = max(0, start - 1) if self.interface.shift_logits else start
        if self.past is None or first == 0:
            output = self.call(tokens, use_cache=True)
            logits = self.checked(output, tokens)
            self.past = past_of(output)
            return self.block_of(logits, start, end)
        self.past = _cropped(self.past, first)
        fed = tokens[:, first:]
        logits = self.checked(self.call(fed, use_cache=True, **{self.cache_name: self.past}), fed)
        return self.block_of(logits, start - first, end - first)


@dataclass(frozen=True)
class PrefixCache(Interface):
    """Fast-dLLM's prefix cache: keys and values of all that stands before a block are those of its first evaluation.

    The first evaluation of a block is model(tokens, use_cache=True), whose past_key_values are cut at the
    block's start; the others are model(tokens from the block on, past_key_values=..., use_cache=True), with logits for
    what is fed. The cache is called `cache` where the model's forward calls it so (transformers since 5.24).

    shift_logits: also feeds the position before the block, whose logits predict the block's first one.

    Source: NVlabs/Fast-dLLM, llada/generate.py and dream/model/generation_utils_block.py.
    """

    session = _PrefixSession


class _DualSession(_PrefixSession):
    def __init__(self, interface: Interface, model: Callable, valid: Tensor):
        super().__init__(interface, model, valid)
        known = not self.takes_any or {"dual_cache", "replace_position"} & set(self.parameters)
        if interface.shift_logits and not known:
            # Without it Fast-dLLM's Dream would ignore replace_position, and write some other text.
            raise TypeError(
                "model: its forward does not say whether it takes dual_cache, with which DualCache(shift_logits=True) "
                f"calls Fast-dLLM's Dream; one that names its parameters expected, got {type(model).__name__}"
            )

    def logits(self, tokens: Tensor, start: int, end: int) -> Tensor:
        if self.past is None:
            return super().logits(tokens, start, end)
        first = max(0, start - 1) if self.interface.shift_logits else start
        replaced = torch.zeros_like(tokens, dtype=torch.bool)
        replaced[:, first:end] = True
        fed = tokens[:, first:end]
        # Fast-dLLM's Dream takes replace_position into account only with this flag, which its LLaDA does not have.
        flag = {"dual_cache": True} if "dual_cache" in self.parameters else {}
        output = self.call(
            fed, use_cache=True, replace_position=replaced, **flag, **{self.cache_name: self.past}
        )
        return self.block_of(self.checked(output, fed), start - first, end - first)


@dataclass(frozen=True)
class DualCache(Interface):
    """Fast-dLLM's dual cache: what stands before and after a block is cached, only the block is evaluated.

    As `PrefixCache`, and after a block's first evaluation model(block, past_key_values=..., use_cache=True,
    replace_position=[B, N] bool), which writes the block's keys and values into their place of the cache; with
    dual_cache=True where the model's forward has that parameter (Dream).
    """

    session = _DualSession
