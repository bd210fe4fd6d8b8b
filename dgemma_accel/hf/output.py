"""What an accelerated `generate` returns when it was asked for more; imports transformers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.models.diffusion_gemma.generation_diffusion_gemma import DiffusionGemmaGenerationOutput


@dataclass
class GenerationOutput(DiffusionGemmaGenerationOutput):
    """The original's output with confidence and entropy [B, new tokens] fp32, steps [B, canvases] int64 and logprobs
    [B, new tokens, K] fp32."""

    confidence: Tensor | None = None
    entropy: Tensor | None = None
    steps: Tensor | None = None
    logprobs: Tensor | None = None
