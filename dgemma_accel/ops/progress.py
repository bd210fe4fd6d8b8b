"""`progress`: which rows of a block go on after a decision; what `MaskedDiffusionSampler.step` ends with.

It is as small as the dozen operators that say the same, and one launch instead of theirs.
"""

from __future__ import annotations

from typing import get_type_hints

import torch
from torch import Tensor

from ..backends import pick, requirements
from ..reference.progress import ProgressCall
from .registration import operator


@operator("progress", {**get_type_hints(ProgressCall), "backend": str})
def _progress(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    call = ProgressCall(*arguments[:-1])
    return pick("progress", arguments[-1], requirements(call.tokens))(call)


@_progress.register_fake
def _(*arguments):
    call = ProgressCall(*arguments[:-1])
    rows = call.tokens.shape[:1]
    active, stuck = (call.tokens.new_empty(rows, dtype=torch.bool) for _ in range(2))
    return active, stuck, call.tokens.new_empty(rows)


def progress(call: ProgressCall, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """(active, stuck, nfe), each [B], after a decision; the arithmetic is `reference.progress`.

    The tensors of the call are those of a sampler, so they are not checked again.

    Raises:
        backends.BackendError: the backend named cannot run this call.
    """
    return _progress(*call, backend)
