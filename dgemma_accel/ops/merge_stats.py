"""`merge_stats`: row statistics of a vocabulary that is split over ranks, for a few floats per row."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..reference.row_stats import row_uniform
from . import checks
from .row_stats import RowStats, row_stats
from .shards import merge_tables, shard_table


def merge_stats(
    logits: Tensor,
    stats: RowStats,
    *,
    vocab_start: int,
    vocab_size: int,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    stats_temperature: float | Tensor | None = None,
    uniform: Tensor | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> RowStats:
    """The `RowStats` of the whole vocabulary from those of every rank's shard; the same on every rank.

    Each rank calls it with its own shard and the same other arguments. Ranks exchange seven numbers per row, and
    two more for the sample, which the rank that holds it draws in a second read of its own shard. With the
    same seed (or uniforms) the result is that of `row_stats` on the whole table on one device, up to rounding.

    Args:
        logits: [..., Vs], this rank's columns, as `head_stats` returns them.
        stats: `RowStats` of `logits` with the same softcap, temperature and stats_temperature.
        vocab_start: the first column's token number. Shards must cover [0, vocab_size) once.
        vocab_size: V of the whole vocabulary.
        softcap, temperature, stats_temperature, uniform, seed, offset, backend: as in `row_stats`. A seed is
            required when `uniform` is None, since every rank has to draw the same.
        group: process group; None is the default group.

    Returns:
        `RowStats` of shape [...].

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: as `row_stats`; shards overlap or leave gaps, or no seed was given; raised on every rank.
        RuntimeError: torch.distributed is not initialised, or this rank is not in `group`.
    """
    checks.has_dtype("logits", checks.is_tensor("logits", logits), checks.FLOAT_DTYPES)
    if not isinstance(stats, RowStats):
        raise TypeError(f"stats: RowStats expected, got {type(stats).__name__}")
    for name, value in (("vocab_start", vocab_start), ("vocab_size", vocab_size)):
        if checks.plain_number(value, integer=True) is None:
            raise TypeError(f"{name}: an int expected, got {type(value).__name__}")
    checks.is_string("backend", backend)
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("merge_stats: torch.distributed is not initialised; call init_process_group first")
    if dist.get_rank(group) < 0:
        raise RuntimeError(
            f"group: this rank has to be in it, got rank {dist.get_rank()} of the default group"
        )
    if uniform is None and seed is None:
        raise ValueError("seed: required when uniform is None, every rank has to draw the same")
    # Before ranks exchange anything: what the shards draw with is made from it.
    checks.uniform_or_seed(uniform, seed, offset, tuple(logits.shape[:-1]), logits.device)
    checks.values_in("uniform", uniform, 0.0, 1.0, high_open=True)
    starts = _check_shards(vocab_start, logits.shape[-1], vocab_size, logits.device, group)
    return merge_known_shards(
        logits,
        stats,
        starts,
        softcap=softcap,
        temperature=temperature,
        stats_temperature=stats_temperature,
        uniform=uniform,
        seed=seed,
        offset=offset,
        group=group,
        backend=backend,
    )


def merge_known_shards(
    logits: Tensor,
    stats: RowStats,
    starts: list[int],
    *,
    softcap: float | None,
    temperature: float | Tensor,
    stats_temperature: float | Tensor | None = None,
    uniform: Tensor | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> RowStats:
    """`merge_stats` where every rank's first column (`starts`, by rank in the group) is known to fit, without asking
    the other ranks and so without waiting for the device."""
    shape, device = tuple(logits.shape[:-1]), logits.device
    rank_in_group = dist.get_rank(group)
    vocab_start = starts[rank_in_group]
    t = (
        checks.number_or_rows("temperature", temperature, shape, device)
        .to(device)
        .expand(stats.entropy.numel())
    )
    own = shard_table(logits, stats, vocab_start, softcap, t.reshape(shape), stats_temperature, backend)
    shards = [torch.empty_like(own) for _ in starts]
    dist.all_gather(shards, own, group=group)
    order = sorted(range(len(starts)), key=starts.__getitem__)
    merged = merge_tables(torch.stack([shards[i] for i in order]))

    rank = order.index(rank_in_group)
    uniform = row_uniform(uniform, *_draws(uniform, seed, offset, device), t.numel(), device)
    owner, local = merged.split(uniform)
    drawn = row_stats(
        logits,
        temperature=temperature,
        stats_temperature=stats_temperature,
        softcap=softcap,
        uniform=local.reshape(shape),
        backend=backend,
    )
    draw = merged.contribution(drawn, owner == rank, rank, vocab_start)
    dist.all_reduce(draw, group=group)
    return merged.finish(draw, t == 0, shape)


def _draws(uniform: Tensor | None, seed, offset, device) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if uniform is not None else checks.seed_and_offset(seed, offset, device)


def _check_shards(start: int, size: int, vocab_size: int, device, group) -> list[int]:
    """The first column of every rank's shard; ValueError unless the shards cover [0, vocab_size) once."""
    own = torch.tensor([start, size, vocab_size], device=device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    table = [tuple(row.tolist()) for row in every]
    expected = 0
    for first, count, _ in sorted(table):
        if first != expected:
            what = "overlap" if first < expected else "leave a gap"
            raise ValueError(
                f"vocab_start: shards {what} at column {min(first, expected)}; (start, size): {table}"
            )
        expected = first + count
    if expected != vocab_size or any(row[2] != vocab_size for row in table):
        raise ValueError(f"vocab_size: shards cover [0, {expected}), got {[row[2] for row in table]}")
    return [row[0] for row in table]
