"""DiffusionGemma's sampler as a strategy: uniform noise instead of masks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...ops.commit import CommitResult
from ...reference.philox import WORD_RENOISE_HIGH, WORD_RENOISE_LOW, below, random_words
from ..canvas import CanvasState, StableAndConfident
from ..numbers import check_field
from ..rules import EntropyBound
from ..writes import Renoise
from .base import BlockState, Step, Strategy


@dataclass(frozen=True)
class EntropyBoundRenoise(Strategy):
    """Accept in order of rising entropy while the entropy before sums to at most `bound`; renoise the rest.

    The block starts as uniform noise, every position is decided anew at every step, and what becomes text is
    the argmax of the last step. A row ends when that argmax has been the same for `stability` more
    steps and the mean entropy is below `stop_confidence` nats. A position whose logits have no distribution at the
    last step becomes the mask token, and the row is `stuck`.

    Args:
        vocab_size: tokens are drawn from [0, vocab_size).
        bound: >= 0 nats (0.1 published).
        stability: >= 0. stop_confidence: > 0 nats.

    Source: EntropyBoundSampler and StableAndConfidentStoppingCriteria of transformers'
    generation_diffusion_gemma.py. (`accelerate` runs the model itself, with self-conditioning.)
    """

    vocab_size: int
    bound: float = 0.1
    stability: int = 1
    stop_confidence: float = 0.005
    scheduled = True
    recordable = True
    confidence = "proposal"
    starts_from_noise = True

    def __post_init__(self) -> None:
        check_field(self, "vocab_size", 1, 2**31 - 1, integer=True)
        check_field(self, "bound", 0.0)
        StableAndConfident(self.stability, self.stop_confidence)

    def _stop(self) -> StableAndConfident:
        return StableAndConfident(self.stability, self.stop_confidence)

    def noise(self, tokens: Tensor, seed: Tensor, offset: int) -> Tensor:
        """Uniform tokens in the shape of tokens [B, C]: what the block starts from."""
        rows = torch.arange(tokens.numel(), device=tokens.device).view(tokens.shape)
        words = random_words(seed, torch.as_tensor(offset, device="cpu"), rows)
        return below(words[WORD_RENOISE_HIGH], words[WORD_RENOISE_LOW], self.vocab_size)

    def start(self, state: BlockState, tokens: Tensor) -> None:
        canvas = CanvasState.start(tokens, self._stop())
        state.memory |= {"draft": canvas.draft, "history": canvas.history, "finished": ~state.active}

    def decide(self, step: Step) -> CommitResult:
        draft = torch.where(step.valid, step.stats.argmax, step.mask_id)
        step = replace(step, stats=step.stats._replace(argmax=draft))
        memory = step.state.memory
        result = step.commit(
            EntropyBound(self.bound),
            write=Renoise(self.vocab_size),
            candidates=step.open,
            state=CanvasState(memory["draft"], memory["history"], memory["finished"]),
            stop=self._stop(),
        )
        memory |= vars(result.state)
        return result

    def finished(self, step: Step, result: CommitResult) -> Tensor:
        return result.state.finished

    def final_tokens(self, tokens: Tensor, state: BlockState) -> Tensor:
        return torch.where(state.open, state.memory["draft"], tokens)
