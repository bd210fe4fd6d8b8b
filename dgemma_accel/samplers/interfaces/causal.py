"""Nemotron-Labs-Diffusion: a block sees itself whole, and what is before it as an autoregressive model left it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from torch import Tensor

from ..numbers import check_flag
from .base import Interface, past_of
from .blocks import StoringSession, refuse_shift


def check_two_modes(model: Callable, by: str) -> None:
    """Raise TypeError for a model without the parts of a Nemotron-Labs-Diffusion that are called here."""
    layers = getattr(getattr(model, "encoder", None), "layers", None)
    if layers is None or not callable(getattr(model, "diffusion_head", None)):
        raise TypeError(
            f"model: {by} needs its encoder.layers and its diffusion_head, as Nemotron-Labs-Diffusion has them, "
            f"got {type(model).__name__}"
        )


@contextmanager
def switched(owners: Iterable, name: str, value: bool) -> Iterator[None]:
    """Inside, those of `owners` that have an attribute `name` hold `value` there; afterwards what they held before."""
    before = [(owner, getattr(owner, name)) for owner in owners if hasattr(owner, name)]
    for owner, _ in before:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, held in before:
            setattr(owner, name, held)


def attending(model: Callable, *, causal: bool) -> AbstractContextManager[None]:
    """Inside, the model's attention is causal, or sees a block whole."""
    return switched((layer.self_attn for layer in model.encoder.layers), "diffusion_lm", not causal)


class _CausalSession(StoringSession):
    def __init__(self, interface: Interface, model: Callable, valid: Tensor):
        super().__init__(interface, model, valid)
        check_two_modes(model, f"{type(interface).__name__}()")

    def prefill(self, tokens: Tensor, length: int) -> Tensor | None:
        super().prefill(tokens, length)
        return self._store(tokens[:, :length]) if length else None

    def _store(self, fed: Tensor) -> Tensor | None:
        """The logits [B, V] behind what is fed, which is in the cache from now on."""
        causal = self.interface.causal_context
        self.calls += 1
        self.rows_fed += len(fed)
        with attending(self.model, causal=causal):
            # The whole model would make logits of all positions: gigabytes for a long prompt.
            output = self.model.encoder(
                input_ids=fed, use_cache=True, use_causal_mask=causal, **{self.cache_name: self.past}
            )
        self.past = past_of(output)
        if not causal:
            return None
        return self.checked(self.model.diffusion_head(output.last_hidden_state[:, -1:]), fed[:, -1:])[:, 0]

    def logits(self, tokens: Tensor, start: int, end: int) -> Tensor:
        block = tokens[:, start:end]
        with attending(self.model, causal=False):
            output = self.call(block, use_cache=False, **{self.cache_name: self.past})
        return self.checked(output, block)

    def end_block(self, tokens: Tensor, start: int, end: int) -> Tensor | None:
        return self._store(tokens[:, start:end])


@dataclass(frozen=True)
class CausalContext(Interface):
    """Nemotron-Labs-Diffusion's block diffusion: one model, whose attention is switched between two modes.

    model(block, past_key_values=cache, use_cache=False) at every evaluation, its attention seeing the block whole. The
    prompt, and a block when it is done, go through model.encoder(..., use_cache=True, use_causal_mask=True) under
    causal attention (`self_attn.diffusion_lm` of each layer is off meanwhile); the logits behind them give the next
    block's first token, drawn at the sampler's temperature. The flags are afterwards what they were.

    causal_context: False keeps the attention as it is for prompt and finished blocks too; the first token of a block
        is then a mask like the others.

    Source: nvidia/Nemotron-Labs-Diffusion-8B, modeling_nemotron_labs_diffusion.py, generate.
    """

    causal_context: bool = True
    session = _CausalSession
    draws_first_token = True

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_shift(self)
        check_flag(self, "causal_context")
