"""Self-conditioning: what a denoising step hands to the next one instead of logits in fp32."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.row_stats import RowStats
from ..ops.soft_embedding import soft_embedding
from .call import Call
from .patches import Patch
from .split_head import SplitLogits


@dataclass(eq=False)
class StepCarry:
    """What one step leaves to the next; it travels through `generate` in the place of the self-conditioning logits.

    seed: of the draws. first_offset: of the canvas's draws. step: number of steps done, added to it.
    soft: [B, C, E] soft embeddings times embed_scale that the last decoder pass used, None for zeros.
    logits: [B, C, V] in the model's dtype, raw, of the last decoder pass, or this rank's part of them;
        None before the first one.
    stats, temperature: of those logits. frozen: [B] bool, rows that were finished before that pass: their
        self-conditioning stays what it was. pinned: [B, C] bool, positions whose token is given, or None.
    """

    seed: Tensor
    first_offset: int = 0
    step: int = 0
    soft: Tensor | None = None
    logits: Tensor | SplitLogits | None = None
    stats: RowStats | None = None
    temperature: Tensor | None = None
    frozen: Tensor | None = None
    pinned: Tensor | None = None

    @staticmethod
    def start(call: Call, canvas: Tensor, given_logits: Tensor | None, embed_tokens) -> StepCarry:
        """Before the first step of `canvas` [B, C]; `given_logits` [B, C, V] come from the user."""
        first_offset = call.begin_canvas(canvas.shape[0], canvas.device)
        carry = StepCarry(call.seed, first_offset, pinned=call.pinned if call.canvases_begun == 1 else None)
        if given_logits is not None:
            weight = embed_tokens.weight
            probabilities = given_logits.softmax(dim=-1, dtype=torch.float32).to(weight.dtype)
            carry.soft = torch.matmul(probabilities, weight) * embed_tokens.embed_scale.to(weight.dtype)
        return carry

    @property
    def offset(self) -> int:
        return self.first_offset + self.step

    def soft_embeddings(
        self, canvas: Tensor, embed_tokens, softcap: float | None, exact: bool, backend: str
    ) -> Tensor | None:
        """[B, C, E] for the next decoder pass over `canvas` [B, C]; the logits are let go."""
        if self.logits is None:
            return self.soft
        weight = embed_tokens.weight
        settings = {"softcap": softcap, "temperature": self.temperature, "exact": exact, "backend": backend}
        if isinstance(self.logits, SplitLogits):
            soft = self.logits.soft_embedding(self.stats, weight, **settings)
        else:
            soft = soft_embedding(self.logits.to(weight.device, weight.dtype), self.stats, weight, **settings)
        soft = soft * embed_tokens.embed_scale.to(weight.dtype)
        if self.pinned is not None:
            # A token that is given is no guess: its distribution is all on it.
            soft = torch.where(self.pinned.to(soft.device)[..., None], embed_tokens(canvas), soft)
        # Without a soft embedding there was no earlier step, and so no finished row.
        if self.frozen is not None and self.soft is not None:
            soft = torch.where(self.frozen.to(soft.device)[:, None, None], self.soft, soft)
        self.soft, self.logits, self.stats = soft, None, None
        return soft


_soft_embeddings: ContextVar[Tensor | None] = ContextVar("dgemma_accel_soft_embeddings", default=None)


@contextmanager
def given_soft_embeddings(soft: Tensor | None):
    """Within it the decoder's self-conditioning takes `soft` instead of what its logits give."""
    token = _soft_embeddings.set(soft)
    try:
        yield
    finally:
        _soft_embeddings.reset(token)


def self_conditioning_forward(patch: Patch, inputs_embeds: Tensor, self_conditioning_signal: Tensor):
    """`DiffusionGemmaSelfConditioning.forward` with the soft embeddings of the denoising step, if there are any."""
    # Compiled forwards come from the original loop, which conditions by logits.
    given = None if torch.compiler.is_compiling() else _soft_embeddings.get()
    if given is not None:
        self_conditioning_signal = given.to(inputs_embeds.device)
    return patch.original()(inputs_embeds, self_conditioning_signal)
