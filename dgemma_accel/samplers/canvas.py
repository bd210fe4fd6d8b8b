"""What `commit` carries from step to step of a canvas, and when a row of it is finished."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import checks
from .numbers import SCALAR, Number, check_field


@dataclass(frozen=True)
class StableAndConfident:
    """A row is finished when its argmax canvas equals the previous `stability` ones and its mean entropy is
    below `confidence` nats (StableAndConfidentStoppingCriteria of transformers' diffusion_gemma).

    Args:
        stability: number of previous canvases, >= 0; 0 asks for confidence alone.
        confidence: >= 1e-30, a number or a 0-d tensor.
    """

    stability: int = 1
    confidence: Number = 0.005

    def __post_init__(self) -> None:
        check_field(self, "stability", 0, integer=True)
        check_field(self, "confidence", 1e-30, tensor=SCALAR)


@dataclass(frozen=True)
class CanvasState:
    """What `commit` carries from step to step of one canvas.

    draft: [B, C] int64, the latest argmax canvas (frozen in finished rows): what becomes text.
    history: [S, B, C] int64, the S latest argmax canvases, oldest first; -1 before the first step.
    finished: [B] bool; such a row's tokens and draft no longer change.
    """

    draft: Tensor
    history: Tensor
    finished: Tensor

    @staticmethod
    def start(canvas: Tensor, stop: StableAndConfident | None = None) -> CanvasState:
        """The state before the first step of `canvas` [B, C]."""
        checks.has_dtype("canvas", checks.is_tensor("canvas", canvas), (torch.int64,))
        if canvas.ndim != 2:
            raise ValueError(f"canvas: shape must be [B, C], got {tuple(canvas.shape)}")
        if stop is not None and not isinstance(stop, StableAndConfident):
            raise TypeError(f"stop: StableAndConfident or None expected, got {type(stop).__name__}")
        depth = 0 if stop is None else stop.stability
        return CanvasState(
            draft=canvas,
            history=canvas.new_full((depth, *canvas.shape), -1),
            finished=torch.zeros(canvas.shape[0], dtype=torch.bool, device=canvas.device),
        )
