"""head_stats that keeps no logits: one slice of the vocabulary at a time, each merged into the statistics of the whole.

The slices that hold a sample are computed a second time to draw it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.row_stats import RowStats, row_stats
from ..ops.shards import merge_tables, shard_table
from ..reference.row_stats import row_uniform

# 16,384 columns of 256 bf16 rows are 8 MB.
SLICE = 16_384


def head_stats_sliced(
    hidden: Tensor,
    weight: Tensor,
    temperature: Tensor,
    stats_temperature: Tensor | None,
    uniform: Tensor | None,
    seed: Tensor | None,
    offset: Tensor,
    softcap: float | None,
    backend: str,
) -> RowStats:
    """`reference.head_stats` without the logits; arguments as there, plus the `row_stats` backend."""
    shape = hidden.shape[:-1]
    rows = shape.numel()
    t = temperature.to(hidden.device).expand(rows)
    by_row = {"temperature": temperature.reshape(shape) if temperature.ndim else temperature}
    by_row["stats_temperature"] = stats_temperature
    if stats_temperature is not None and stats_temperature.ndim:
        by_row["stats_temperature"] = stats_temperature.reshape(shape)
    common = {"softcap": softcap, "backend": backend}
    starts = range(0, weight.shape[0], SLICE)

    def logits_from(start: int) -> Tensor:
        return torch.nn.functional.linear(hidden, weight[start : start + SLICE])

    def table(start: int) -> Tensor:
        logits = logits_from(start)
        stats = row_stats(logits, seed=0, **by_row, **common)
        return shard_table(logits, stats, start, softcap, t.reshape(shape), stats_temperature, backend)

    merged = merge_tables(torch.stack([table(start) for start in starts]))
    owner, local = merged.split(row_uniform(uniform, seed, offset, rows, hidden.device))
    # On a GPU asking which slices hold samples would wait for the device, so all are computed again there.
    held = set(owner.tolist()) if hidden.device.type == "cpu" else range(len(starts))
    draw = torch.zeros(2, rows, dtype=torch.float64, device=hidden.device)
    for index, start in enumerate(starts):
        if index in held and not bool(hidden.device.type == "cpu" and (t == 0).all()):
            drawn = row_stats(logits_from(start), uniform=local.reshape(shape), **by_row, **common)
            draw += merged.contribution(drawn, owner == index, index, start)
    return merged.finish(draw, t == 0, shape)
