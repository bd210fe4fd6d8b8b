"""Row statistics of positions whose token is given."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.row_stats import RowStats


def as_given(stats: RowStats, canvas: Tensor, pinned: Tensor | None) -> RowStats:
    """Statistics in which a pinned position is certain of its token."""
    if pinned is None:
        return stats
    return stats._replace(
        argmax=torch.where(pinned, canvas, stats.argmax),
        sample=torch.where(pinned, canvas, stats.sample),
        entropy=torch.where(pinned, 0.0, stats.entropy),
        top1_prob=torch.where(pinned, 1.0, stats.top1_prob),
        top2_prob=torch.where(pinned, 0.0, stats.top2_prob),
        sample_prob=torch.where(pinned, 1.0, stats.sample_prob),
    )
