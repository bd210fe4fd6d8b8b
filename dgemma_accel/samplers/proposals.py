"""Proposals: what is sampled for each position, and which distribution its confidence comes from.

Without a filter this is one `row_stats`: the sample is drawn from the tempered distribution and the statistics are
those of the untempered one, in the same pass. Top-k and top-p find a cutoff for each row first (`top_k_top_p`), and
what lies below it is left out of the draw. The vocabulary is never sorted, and nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.row_stats import RowStats, row_stats
from ..ops.top_k_top_p import top_k_top_p
from ..reference.row_stats import apply_softcap

# Elements of a chunk of rows, so that its fp32 copies take some tens of megabytes.
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Proposal:
    """How proposals are drawn and where their statistics come from.

    The sample comes from softmax(x / T), x = softcap(l), restricted by top-k and top-p of that distribution.

    temperature: T >= 0; 0 proposes the argmax. A number, a 0-d tensor or [B].
    top_k, top_p: as in `top_k_top_p`: ties are kept or dropped together.
    top_k_first: SDAR filters by top-k and takes top-p of what is left; Dream takes both of the whole row.
    confidence: "untempered": statistics of softmax(x), whatever the temperature and the filters.
        "proposal": statistics of the distribution that is sampled.
    softcap: as in `row_stats`.
    statistics: False where the strategy reads the proposals alone; as in `row_stats`.
    """

    temperature: float | Tensor = 0.0
    top_k: int | None = None
    top_p: float | None = None
    top_k_first: bool = False
    confidence: str = "untempered"
    softcap: float | None = None
    backend: str = "auto"
    statistics: bool = True

    @property
    def greedy(self) -> bool:
        return not isinstance(self.temperature, Tensor) and self.temperature == 0

    @property
    def filtered(self) -> bool:
        return bool(self.top_k) or (self.top_p is not None and self.top_p < 1)

    @property
    def filters(self) -> bool:
        """Whether a filter changes anything: a greedy proposal needs none for untempered statistics."""
        return self.filtered and not (self.greedy and self.confidence == "untempered")

    def _temperature(self, logits: Tensor):
        """A number, or one value per row of logits [B, C, V]."""
        if not isinstance(self.temperature, Tensor) or self.temperature.ndim == 0:
            return self.temperature
        if len(self.temperature) != logits.shape[0]:
            raise ValueError(
                f"temperature: one value per row is {logits.shape[0]} values, got {len(self.temperature)}"
            )
        return self.temperature.to(logits.device)[:, None].expand(logits.shape[:-1])

    def _cutoff(self, logits: Tensor, temperature) -> Tensor:
        return top_k_top_p(
            logits,
            top_k=self.top_k,
            top_p=self.top_p,
            top_k_first=self.top_k_first,
            temperature=temperature,
            softcap=self.softcap,
            backend=self.backend,
        )

    def stats(self, logits: Tensor, seed: Tensor, offset: int | Tensor) -> RowStats:
        """Proposals and statistics of logits [B, C, V], fields [B, C]."""
        temperature = self._temperature(logits)
        untempered = self.confidence == "untempered"
        shared = {"softcap": self.softcap, "seed": seed, "offset": offset, "backend": self.backend}
        if not self.filters:
            return row_stats(
                logits,
                temperature=temperature,
                stats_temperature=1.0 if untempered else None,
                statistics=self.statistics,
                **shared,
            )
        drawn = row_stats(
            logits,
            temperature=temperature,
            statistics=self.statistics and not untempered,
            cutoff=self._cutoff(logits, temperature),
            **shared,
        )
        if not (untempered and self.statistics):
            return drawn
        stats = row_stats(logits, temperature=0.0, **shared)
        x = apply_softcap(logits.gather(-1, drawn.sample[..., None])[..., 0], self.softcap)
        # A temperature too low for fp32 leaves a row without a distribution to draw from, though it has statistics.
        invalid = drawn.entropy.isinf()
        probability = torch.where(invalid, 0.0, torch.exp(x - stats.logsumexp))
        entropy = torch.where(invalid, math.inf, stats.entropy)
        return stats._replace(sample=drawn.sample, sample_prob=probability, entropy=entropy)

    def filtered_chunks(self, logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(rows, x): a few of the flattened rows of logits [B, C, V] at a time, fp32, softcapped, tempered (not where
        T = 0), -inf where a filter drops; x: [r, V]."""
        vocab = logits.shape[-1]
        rows = logits.shape[:-1].numel()
        temperature = self._temperature(logits)
        cutoff = self._cutoff(logits, temperature).reshape(-1, 1) if self.filtered else None
        if isinstance(temperature, Tensor):
            temperature = (
                temperature.to(logits.device, torch.float32).expand(logits.shape[:-1]).reshape(-1, 1)
            )
            temperature = torch.where(temperature == 0, 1.0, temperature)
        blocks, length = logits.reshape(-1, *logits.shape[-2:]), logits.shape[-2]
        step = max(1, CHUNK_ELEMENTS // vocab)
        for first in range(0, rows, step):
            part = torch.arange(first, min(rows, first + step), device=logits.device)
            # Gathered by index: a copy of a few rows, never of the whole sequence that a block is a slice of.
            raw = blocks[part // length, part % length]
            here = slice(first, first + step)
            x = apply_softcap(raw, self.softcap)
            x = x / (temperature[here] if isinstance(temperature, Tensor) else temperature or 1.0)
            yield here, x if cutoff is None else x.masked_fill(raw < cutoff[here], float("-inf"))
