"""Arithmetic of a vocabulary in shards: finished statistics of each shard become those of the whole.

A shard may be the columns of one rank (`merge_stats`) or a slice that one device computes at a time (`head_stats`
without logits).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .row_stats import RowStats, row_stats

ONE_BELOW = 1.0 - 2.0**-24
COLUMNS = ("logsumexp", "entropy", "top1_prob", "top2_prob", "max", "argmax", "sampling_logsumexp")


def shard_table(
    logits: Tensor,
    stats: RowStats,
    vocab_start: int,
    softcap: float | None,
    temperature: Tensor,
    stats_temperature: float | Tensor | None,
    backend: str,
) -> Tensor:
    """The numbers per row (`COLUMNS`) that a shard contributes, [7, R] fp64; argmax counts from token 0.

    `max` is the logit at the argmax, before softcap: it orders shards exactly, as probabilities would not.

    Args:
        logits, stats: [..., Vs] and their `RowStats`.
        temperature: [...] fp32. stats_temperature: as given to `row_stats`.
    """
    sampling = stats.logsumexp
    if stats_temperature is not None:
        # The mass at the sampling temperature is not among the statistics when these are at another one.
        flat = torch.where(temperature == 0, 1.0, temperature)
        sampling = row_stats(logits, temperature=flat, softcap=softcap, seed=0, backend=backend).logsumexp
    # A shard may be all -inf in a row that others make valid; row_stats alone reports that as no distribution.
    if softcap is None:
        empty = logits.amax(-1) == float("-inf")
    else:
        empty = torch.zeros_like(stats.logsumexp, dtype=torch.bool)
    columns = [
        torch.where(empty, float("-inf"), stats.logsumexp.double()),
        torch.where(empty, 0.0, stats.entropy.double()),
        stats.top1_prob.double(),
        stats.top2_prob.double(),
        logits.gather(-1, stats.argmax[..., None])[..., 0].double(),
        (stats.argmax + vocab_start).double(),
        torch.where(empty, float("-inf"), sampling.double()),
    ]
    return torch.stack(columns).reshape(len(columns), -1)


@dataclass(frozen=True)
class MergedShards:
    """Statistics of the whole vocabulary, all [R] but `mass` and `sampling_mass` [W, R], the shards' parts of it."""

    valid: Tensor
    argmax: Tensor
    entropy: Tensor
    logsumexp: Tensor
    top1_prob: Tensor
    top2_prob: Tensor
    mass: Tensor
    sampling_mass: Tensor

    def split(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """([R] the shard that holds each row's sample, [R] fp32 the uniform within that shard's distribution)."""
        upper = self.sampling_mass.cumsum(0)
        last = (self.sampling_mass > 0).long().cumsum(0).argmax(0)
        owner = torch.minimum((upper <= uniform.double()).sum(0), last)
        mass = self.sampling_mass.gather(0, owner[None])[0]
        below = upper.gather(0, owner[None])[0] - mass
        local = torch.where(mass > 0, (uniform.double() - below) / mass, 0.0)
        return owner, local.clamp(0.0, ONE_BELOW).float()

    def contribution(self, drawn: RowStats, mine: Tensor, shard: int, vocab_start: int) -> Tensor:
        """[2, R] fp64: token and probability of the samples that this shard holds, zeros elsewhere."""
        prob = self.mass[shard] * drawn.sample_prob.reshape(-1)
        return torch.where(mine, torch.stack([drawn.sample.reshape(-1).double() + vocab_start, prob]), 0.0)

    def finish(self, draw: Tensor, greedy: Tensor, shape: tuple[int, ...]) -> RowStats:
        """The `RowStats` of shape [...], given the sum of all shards' contributions."""

        def field(values: Tensor, otherwise: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.where(self.valid, values, otherwise).to(dtype).reshape(shape)

        return RowStats(
            field(self.argmax, 0, torch.int64),
            field(torch.where(greedy, self.argmax, draw[0].long()), 0, torch.int64),
            field(self.entropy, float("inf")),
            field(self.logsumexp, float("nan")),
            field(self.top1_prob, 0.0),
            field(self.top2_prob, 0.0),
            field(torch.where(greedy, self.top1_prob, draw[1]), 0.0),
        )


def merge_tables(tables: Tensor) -> MergedShards:
    """Merge `shard_table`s [W, 7, R], in the order of their columns.

    Entropy merges by the chain rule: with w_i the mass of shard i, H = sum w_i H_i - sum w_i ln w_i.
    """
    logsumexp, entropy, top1, top2, largest, argmax, sampling = tables.unbind(1)
    total = torch.logsumexp(logsumexp, 0)
    valid = total.isfinite()
    # Not exp(logsumexp - total): at the lowest temperatures the last place of a total exceeds the shards' differences.
    mass = torch.where(valid, torch.softmax(logsumexp, 0), 0.0)
    entropy = torch.where(valid, entropy, 0.0)
    best = torch.cat([mass * top1, mass * top2]).sort(0, descending=True).values
    # The first shard that holds the maximum holds its lowest index.
    holder = torch.argmax(largest, 0, keepdim=True)
    return MergedShards(
        valid=valid,
        argmax=argmax.gather(0, holder)[0].long(),
        entropy=(mass * entropy).sum(0) + torch.special.entr(mass).sum(0),
        logsumexp=total,
        top1_prob=best[0],
        top2_prob=best[1],
        mass=mass,
        sampling_mass=torch.softmax(sampling, 0).nan_to_num(0.0),
    )
