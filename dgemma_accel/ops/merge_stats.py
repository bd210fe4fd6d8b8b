"""`merge_stats`: row statistics of a vocabulary that is split over ranks, for a few floats per row."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..reference.row_stats import row_uniform
from . import checks
from .row_stats import RowStats, row_stats

ONE_BELOW = 1.0 - 2.0**-24


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

    Each rank calls it with its own shard and the same other arguments. Ranks exchange six numbers per row, and
    two more for the sample, which the rank that holds it draws in a second read of its own shard. With the
    same seed (or uniforms) the result is that of `row_stats` on the whole table on one device, up to rounding.

    Entropy merges by the chain rule: with w_i the mass of shard i, H = sum w_i H_i - sum w_i ln w_i.

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
        ValueError: shards overlap or leave gaps, or no seed was given; raised on every rank.
        RuntimeError: torch.distributed is not initialised.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("merge_stats: torch.distributed is not initialised; call init_process_group first")
    if uniform is None and seed is None:
        raise ValueError("seed: required when uniform is None, every rank has to draw the same")
    shape, device = tuple(logits.shape[:-1]), logits.device
    starts = _check_shards(vocab_start, logits.shape[-1], vocab_size, device, group)
    t = (
        checks.number_or_rows("temperature", temperature, shape, device)
        .to(device)
        .expand(stats.entropy.numel())
    )
    common = {"softcap": softcap, "backend": backend}

    sampling_lse = stats.logsumexp
    if stats_temperature is not None:
        flat = torch.where(t == 0, 1.0, t).reshape(shape)
        sampling_lse = row_stats(logits, temperature=flat, seed=0, **common).logsumexp
    # A shard may be all -inf in a row that others make valid; row_stats alone reports that as no distribution.
    empty = (
        logits.amax(-1) == float("-inf")
        if softcap is None
        else torch.zeros_like(stats.logsumexp, dtype=torch.bool)
    )
    own = torch.stack(
        [
            torch.where(empty, float("-inf"), stats.logsumexp.double()),
            torch.where(empty, 0.0, stats.entropy.double()),
            stats.top1_prob.double(),
            stats.top2_prob.double(),
            (stats.argmax + vocab_start).double(),
            torch.where(empty, float("-inf"), sampling_lse.double()),
        ]
    ).reshape(6, -1)
    shards = [torch.empty_like(own) for _ in starts]
    dist.all_gather(shards, own.contiguous(), group=group)
    order = sorted(range(len(starts)), key=starts.__getitem__)
    lse, entropy, top1, top2, argmax, lse_t = torch.stack([shards[i] for i in order], 1)

    total = torch.logsumexp(lse, 0)
    valid = total.isfinite()
    mass = torch.where(valid, torch.exp(lse - total), 0.0)
    best = torch.cat([mass * top1, mass * top2]).sort(0, descending=True).values
    # The first shard that holds the maximum holds its lowest index.
    holder = torch.argmax(mass * top1, 0, keepdim=True)
    merged_argmax = argmax.gather(0, holder)[0].long()
    merged_entropy = (mass * entropy).sum(0) + torch.special.entr(mass).sum(0)

    rank = order.index(dist.get_rank(group))
    owner, local = _split_uniform(lse_t, _uniform(uniform, seed, offset, valid.numel(), device))
    drawn = row_stats(logits, temperature=_reshape(temperature, shape), stats_temperature=stats_temperature,
                      uniform=local.float().reshape(shape), **common)  # fmt: skip
    mine = owner == rank
    draw = torch.stack(
        [drawn.sample.reshape(-1).double() + vocab_start, mass[rank] * drawn.sample_prob.reshape(-1)]
    )
    draw = torch.where(mine, draw, 0.0)
    dist.all_reduce(draw, group=group)

    greedy = t == 0
    sample = torch.where(greedy, merged_argmax, draw[0].long())
    sample_prob = torch.where(greedy, best[0], draw[1])

    def finish(values: Tensor, otherwise: float, dtype=torch.float32) -> Tensor:
        return torch.where(valid, values, otherwise).to(dtype).reshape(shape)

    return RowStats(
        finish(merged_argmax, 0, torch.int64),
        finish(sample, 0, torch.int64),
        finish(merged_entropy, float("inf")),
        finish(total, float("nan")),
        finish(best[0], 0.0),
        finish(best[1], 0.0),
        finish(sample_prob, 0.0),
    )


def _reshape(value, shape):
    return value.reshape(shape) if isinstance(value, Tensor) and value.ndim else value


def _uniform(uniform: Tensor | None, seed, offset, rows: int, device) -> Tensor:
    if uniform is None:
        seed, offset = checks.seed_and_offset(seed, offset, device)
    return row_uniform(uniform, seed, offset, rows, device).double()


def _split_uniform(lse_t: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The shard that holds each row's sample, and the uniform within that shard's own distribution."""
    weight = torch.exp(lse_t - torch.logsumexp(lse_t, 0)).nan_to_num(0.0)
    upper = weight.cumsum(0)
    last = (weight > 0).long().cumsum(0).argmax(0)
    owner = torch.minimum((upper <= uniform).sum(0), last)
    mass = weight.gather(0, owner[None])[0]
    below = upper.gather(0, owner[None])[0] - mass
    return owner, torch.where(mass > 0, (uniform - below) / mass, 0.0).clamp(0.0, ONE_BELOW)


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
