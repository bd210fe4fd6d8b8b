"""Proposals: what is sampled for each position, and which distribution its confidence comes from.

Without a filter this is one `row_stats`: the sample is drawn from the tempered distribution and the statistics are
those of the untempered one, in the same pass. Top-k and top-p need a threshold per row. One pass over the
vocabulary finds the maxima of its tiles; the few tiles of largest maximum hold all tokens that most filters
keep, so that the threshold, the draw and the statistics follow from them alone. A row that keeps more than that is
filtered whole, a few rows at a time. The vocabulary is never sorted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops import checks
from ..ops.row_stats import RowStats, row_stats
from ..reference.row_stats import apply_softcap, row_uniform

TILE = 32
# Tiles of a row that are looked into before the row is filtered whole.
TOP_TILES = 64
# Bins of the value for top-p of flat rows, from the row's maximum down to this far below it.
BINS = 4096
LOWEST = -32.0
# Elements of a chunk of rows, so that its fp32 copies take some tens of megabytes.
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class TopTiles:
    """The tiles of largest maximum of each row.

    A tile is every n-th token of the row, so that its maximum is taken over whole vectors. The tokens behind the
    last whole tile are always among the candidates.

    tokens: [..., N] int64, rising along the row. values: [..., N]. bound: [...], the least maximum of the tiles: no
    other token of the row exceeds it.
    """

    tokens: Tensor
    values: Tensor
    bound: Tensor

    @staticmethod
    def of(x: Tensor, width: int, count: int) -> TopTiles:
        """The `count` tiles of `width` tokens; x [..., V]."""
        rows, vocab = x.shape[:-1], x.shape[-1]
        whole = vocab - vocab % width
        # No copy, whatever the strides.
        tiles = x[..., :whole].unflatten(-1, (width, -1))
        top, index = tiles.amax(-2).topk(min(count, tiles.shape[-1]), dim=-1)
        index = index.sort(-1).values.unsqueeze(-2).expand(*rows, width, -1)
        first = torch.arange(0, whole, tiles.shape[-1], device=x.device)[:, None]
        rest = torch.arange(whole, vocab, device=x.device).expand(*rows, -1)
        return TopTiles(
            torch.cat([(index + first).flatten(-2), rest], -1),
            torch.cat([tiles.gather(-1, index).flatten(-2), x[..., whole:]], -1),
            top[..., -1],
        )


def kth_largest(x: Tensor, k: int) -> Tensor:
    """The k-th largest value of each row, counting ties one by one.

    At least k values reach the k-th largest tile maximum, and no tile below it holds a larger value; so
    the k tiles of largest maximum hold the answer.

    Args:
        x: [R, V].
        k: in [1, V].

    Returns:
        [R].
    """
    vocab = x.shape[1]
    if k == 1:
        return x.amax(-1)
    width = min(TILE, vocab // (2 * k))
    if width < 2:
        return x.kthvalue(vocab - k + 1, dim=-1).values
    return TopTiles.of(x, width, k).values.topk(k, dim=-1).values[:, -1]


def top_p_threshold(x: Tensor, mass: Tensor) -> Tensor:
    """The least value of each row that top-p keeps.

    A token is kept when the tokens of strictly larger logit hold at most `mass`; so tied tokens are kept
    or dropped together, and the largest is always kept. Published code sorts and cuts inside a tie, at whatever
    place the sort gave.

    Args:
        x: [R, V] fp32, rows shifted so that their maximum is 0; -inf allowed.
        mass: [R] fp64, p times the sum of exp(x) over the tokens in the race.

    Returns:
        [R] fp32.
    """
    return _bisect(x, mass) if x.shape[1] <= 2 * BINS else _by_bins(x, mass)


def _by_bins(x: Tensor, mass: Tensor) -> Tensor:
    """`top_p_threshold` where much of the vocabulary is kept: masses of bins of the value, then inside one bin.

    The bin that holds the threshold is the lowest that is not empty and has at most `mass` above it, since its
    largest token is kept.
    """
    rows = x.shape[0]
    low = torch.where(x.isfinite(), x, 0.0).amin(-1, keepdim=True).clamp_min(LOWEST)
    scale = (BINS - 1) / (-low).clamp_min(1e-30)
    # Rises with x, rounding included, so that bins are in the order of their tokens. NaN goes anywhere.
    bin_of = ((x - low) * scale).nan_to_num(0.0).clamp(0, BINS - 1).long()
    weights = x.exp().double()
    sums = weights.new_zeros(rows, BINS).scatter_add_(1, bin_of, weights)
    counts = torch.zeros_like(bin_of[:, :1]).expand(-1, BINS).clone()
    counts.scatter_add_(1, bin_of, torch.ones_like(bin_of))
    above = sums.sum(-1, keepdim=True) - sums.cumsum(-1)
    # The difference of two sums may be off at the ends, where it is known.
    above[:, -1] = 0.0
    possible = (counts > 0) & (above <= mass[:, None])
    target = torch.where(possible, torch.arange(BINS, device=x.device), BINS).amin(-1, keepdim=True)

    inside = bin_of == target
    size = int(inside.sum(-1).max())
    values = x.new_full((rows, max(size, 1)), float("-inf"))
    row, column = inside.nonzero(as_tuple=True)
    place = inside.cumsum(-1)[row, column] - 1
    values[row, place] = x[row, column]
    left = mass - above.gather(1, target.clamp_max(BINS - 1))[:, 0]
    return _bisect(values, left)


def _by_order(x: Tensor, mass: Tensor) -> Tensor:
    """`top_p_threshold` of a few candidates [..., N] by putting them in order; mass, and the result: [..., 1]."""
    values = x.sort(-1, descending=True).values
    cumulated = values.exp().cumsum(-1, dtype=torch.float64)
    before = torch.cat([torch.zeros_like(cumulated[..., :1]), cumulated[..., :-1]], -1)
    first = torch.ones_like(values, dtype=torch.bool)
    first[..., 1:] = values[..., 1:] < values[..., :-1]
    # Every member of a tie takes the sum before its first member; the sums rise along the row.
    exclusive = torch.where(first, before, 0.0).cummax(-1).values
    return torch.where(exclusive <= mass, values, float("inf")).amin(-1, keepdim=True)


def _ordered(x: Tensor) -> Tensor:
    """fp32 as int64 in the same order (-0.0 as 0.0)."""
    bits = (x + 0.0).contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _from_ordered(key: Tensor) -> Tensor:
    sign = torch.where(key < 0, -(2**31), 0)
    return (key.abs() + sign).to(torch.int32).view(torch.float32)


def _bisect(x: Tensor, mass: Tensor) -> Tensor:
    """`top_p_threshold` by bisection on the bits of the value: at most 32 masses above a threshold."""
    weights = x.exp()
    # What cannot be kept alone is kept nevertheless: it is the largest.
    mass = mass.clamp_min(0.0)
    high = _ordered(x.amax(-1))  # kept: nothing is above the maximum
    low = _ordered(torch.full_like(mass, float("-inf"), dtype=torch.float32)) - 1
    while bool((undecided := high - low > 1).any()):
        middle = (low + high) // 2
        above = torch.where(x > _from_ordered(middle)[:, None], weights, 0.0).sum(-1, dtype=torch.float64)
        kept = above <= mass
        # Rows that are done stay as they are: below -inf there is no number to compare with.
        high = torch.where(undecided & kept, middle, high)
        low = torch.where(undecided & ~kept, middle, low)
    # The least number that keeps; the least token at or above it is the threshold.
    return torch.where(x >= _from_ordered(high)[:, None], x, float("inf")).amin(-1)


def _uniform(seed: Tensor, offset: int | Tensor, rows: int, device) -> Tensor:
    number = offset if isinstance(offset, Tensor) else torch.tensor(offset, device="cpu")
    return row_uniform(None, seed, number, rows, device)


@dataclass(frozen=True)
class Proposal:
    """How proposals are drawn and where their statistics come from.

    The sample comes from softmax(x / T), x = softcap(l), restricted by top-k and top-p of that distribution.

    temperature: T >= 0; 0 proposes the argmax. A number, a 0-d tensor or [B].
    top_k: keep tokens that reach the k-th largest logit; ties at the k-th all stay. None or 0 keeps all.
    top_p: keep tokens before which (strictly larger) there is at most this mass; see `top_p_threshold`. None or
        1.0 keeps all.
    top_k_first: SDAR filters by top-k and takes top-p of what is left; Dream by top-p, then top-k.
    confidence: "untempered": statistics of softmax(x), whatever the temperature and the filters.
        "proposal": statistics of the distribution that is sampled.
    softcap: as in `row_stats`.
    statistics: False where the strategy reads the proposals alone; as in `row_stats`.
    unsettled: a 0-d bool tensor on the logits' device that is told whether some row has to be filtered whole, which is
        not done then: so nothing waits for the device. Who gives it asks it, and takes nothing else of such a call.
    active: [B] bool, rows of the batch that are decided on, or None for all. The others are not filtered whole: what is
        said of them holds for their candidates alone, and nobody takes it.
    """

    temperature: float | Tensor = 0.0
    top_k: int | None = None
    top_p: float | None = None
    top_k_first: bool = False
    confidence: str = "untempered"
    softcap: float | None = None
    backend: str = "auto"
    statistics: bool = True
    unsettled: Tensor | None = field(default=None, compare=False, repr=False)
    active: Tensor | None = field(default=None, compare=False, repr=False)

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

    @property
    def tiles(self) -> int:
        """How many tiles of a row are looked into, before it is filtered whole."""
        return max(TOP_TILES, 2 * (self.top_k or 0))

    def has_tiles(self, vocab: int) -> bool:
        """Whether rows are so long that their tiles are looked into."""
        return vocab > 2 * TILE * self.tiles

    def _temperature(self, logits: Tensor):
        """A number, or one value per row of logits [B, C, V]."""
        if not isinstance(self.temperature, Tensor) or self.temperature.ndim == 0:
            return self.temperature
        if len(self.temperature) != logits.shape[0]:
            raise ValueError(
                f"temperature: one value per row is {logits.shape[0]} values, got {len(self.temperature)}"
            )
        return self.temperature.to(logits.device)[:, None].expand(logits.shape[:-1])

    def stats(self, logits: Tensor, seed: Tensor, offset: int | Tensor) -> RowStats:
        """Proposals and statistics of logits [B, C, V], fields [B, C]."""
        temperature = self._temperature(logits)
        untempered = self.confidence == "untempered"
        if not self.filters or not logits.shape[:-1].numel():
            return row_stats(
                logits,
                temperature=temperature,
                stats_temperature=1.0 if untempered else None,
                softcap=self.softcap,
                seed=seed,
                offset=offset,
                statistics=self.statistics,
                backend=self.backend,
            )
        # As `row_stats` checks it, which will see rows that are tempered already.
        rows = checks.number_or_rows("temperature", temperature, tuple(logits.shape[:-1]), logits.device)
        checks.values_in("temperature", rows, 0.0, math.inf, high_open=True)
        drawn = self._filtered_stats(logits, seed, offset)
        if not untempered:
            return drawn
        stats = row_stats(
            logits, temperature=0.0, softcap=self.softcap, seed=seed, offset=offset, backend=self.backend
        )
        x = apply_softcap(logits.gather(-1, drawn.sample[..., None])[..., 0], self.softcap)
        # A temperature too low for fp32 leaves a row without a distribution to draw from, though it has statistics.
        invalid = drawn.entropy.isinf()
        probability = torch.where(invalid, 0.0, torch.exp(x - stats.logsumexp))
        entropy = torch.where(invalid, math.inf, stats.entropy)
        return stats._replace(sample=drawn.sample, sample_prob=probability, entropy=entropy)

    def _tempered(self, x: Tensor, temperature) -> Tensor:
        """x fp32 as the filters see it; not divided where T = 0. temperature: a number, or one by row, [..., 1]."""
        x = apply_softcap(x, self.softcap)
        if isinstance(temperature, Tensor):
            return x / torch.where(temperature == 0, 1.0, temperature)
        return x / temperature if temperature > 0 else x

    def _by_row(self, logits: Tensor):
        """The temperature as `_tempered` takes it: a number, or [B, C, 1] on the logits' device."""
        temperature = self._temperature(logits)
        if isinstance(temperature, Tensor):
            temperature = temperature.to(logits.device, torch.float32)
            return temperature.expand(logits.shape[:-1])[..., None]
        return temperature

    def filtered_chunks(self, logits: Tensor, rows: Tensor | None = None):
        """(rows, x): a few rows of logits at a time, fp32, softcapped, tempered, -inf where a filter drops.

        rows [r]: numbers of the flattened rows, all of them or those asked for. x: [r, V]; not tempered where T = 0.
        """
        vocab = logits.shape[-1]
        blocks = logits.reshape(-1, *logits.shape[-2:])
        length = blocks.shape[1]
        temperature = self._by_row(logits)
        if isinstance(temperature, Tensor):
            temperature = temperature.reshape(-1, 1)
        if rows is None:
            rows = torch.arange(blocks.shape[0] * length, device=logits.device)
        for part in rows.split(max(1, CHUNK_ELEMENTS // vocab)):
            # Gathered by index: a copy of a few rows, never of the whole sequence that a block is a slice of.
            own = temperature[part] if isinstance(temperature, Tensor) else temperature
            yield part, self._filter_(self._tempered(blocks[part // length, part % length], own))

    def _filter_(self, x: Tensor) -> Tensor:
        """-inf in x [r, V] wherever a filter drops a token; in place."""
        threshold = None
        if self.top_k:
            threshold = kth_largest(x, min(self.top_k, x.shape[-1]))[:, None]
        if self.top_p is not None and self.top_p < 1:
            top = x.amax(-1, keepdim=True)
            shifted = x - torch.where(top.isfinite(), top, 0.0)
            weights = shifted.exp()
            if self.top_k and self.top_k_first:
                weights.masked_fill_(x < threshold, 0.0)
            mass = self.top_p * weights.sum(-1, dtype=torch.float64)
            least = top_p_threshold(shifted, mass)[:, None]
            # Compared in the shifted row: adding the maximum back could round across a neighbour.
            x.masked_fill_(shifted < least, float("-inf"))
        if threshold is not None:
            x.masked_fill_(x < threshold, float("-inf"))
        return x

    def _filtered_stats(self, logits: Tensor, seed: Tensor, offset: int | Tensor) -> RowStats:
        shape, vocab = logits.shape[:-1], logits.shape[-1]
        temperature = self._by_row(logits)
        # What is drawn from is tempered already: what is left to say is which rows are greedy.
        if isinstance(temperature, Tensor):
            of_rows = 1.0 - (temperature[..., 0] == 0).float()
        else:
            of_rows = 1.0 - (temperature == 0)
        if self.has_tiles(vocab):
            found, settled = self._settled_stats(logits, temperature, of_rows, seed, offset)
            if self.active is not None:
                settled = settled | ~self.active[:, None]
            if self.unsettled is not None:
                self.unsettled.logical_or_(~settled.all())
                return found
            if bool(settled.all()):
                return found
            rows = (~settled).reshape(-1).nonzero()[:, 0]
        elif shape.numel() * vocab <= CHUNK_ELEMENTS:
            ((_, x),) = self.filtered_chunks(logits)
            x = x.reshape(logits.shape)
            return row_stats(x, temperature=of_rows, seed=seed, offset=offset, backend=self.backend)
        else:
            integers = (torch.empty(shape, dtype=torch.int64, device=logits.device) for _ in range(2))
            floats = (torch.empty(shape, dtype=torch.float32, device=logits.device) for _ in range(5))
            found, rows = RowStats(*integers, *floats), torch.arange(shape.numel(), device=logits.device)

        uniform = _uniform(seed, offset, shape.numel(), logits.device)
        flat = RowStats(*(field.reshape(-1) for field in found))
        for part, x in self.filtered_chunks(logits, rows):
            t = of_rows.reshape(-1)[part] if isinstance(of_rows, Tensor) else of_rows
            more = row_stats(x, temperature=t, uniform=uniform[part], backend=self.backend)
            for whole, values in zip(flat, more):
                whole[part] = values
        return RowStats(*(one.reshape(shape) for one in flat))

    def _settled_stats(
        self, logits: Tensor, temperature, of_rows, seed: Tensor, offset: int | Tensor
    ) -> tuple[RowStats, Tensor]:
        """The statistics of all rows from their candidates, and for which rows [B, C] they are those of the filters."""
        shape, vocab = logits.shape[:-1], logits.shape[-1]
        logits = logits.reshape(-1, *logits.shape[-2:])
        batch, length = logits.shape[:2]
        if isinstance(temperature, Tensor):
            temperature, of_rows = temperature.reshape(batch, length, 1), of_rows.reshape(batch, length)
        # As many candidates at a time as filtered_chunks has logits.
        rows = max(1, CHUNK_ELEMENTS // (self.tiles * TILE + vocab % TILE))
        blocks, columns = max(1, rows // length), min(rows, length)
        whole = blocks >= batch and columns == length
        # Drawn by the op itself, which numbers the rows that it is given.
        uniform = None if whole else _uniform(seed, offset, batch * length, logits.device).view(batch, length)
        parts = []
        for block in range(0, batch, blocks):
            for column in range(0, length, columns):
                at = slice(block, block + blocks), slice(column, column + columns)
                t, own = (v[at] if isinstance(v, Tensor) else v for v in (temperature, of_rows))
                cut, tokens, settled = self._settle(logits[at], t, seed)
                draws = {"seed": seed, "offset": offset} if whole else {"uniform": uniform[at]}
                found = row_stats(cut, temperature=own, backend=self.backend, **draws)
                argmax, sample = (tokens.gather(-1, index[..., None])[..., 0] for index in found[:2])
                parts.append((*found._replace(argmax=argmax, sample=sample), settled))
        # The parts follow each other as their rows do.
        parts = [part[0] if whole else torch.cat([one.flatten() for one in part]) for part in zip(*parts)]
        *found, settled = (part.view(shape) for part in parts)
        return RowStats(*found), settled

    def _settle(self, logits: Tensor, temperature, seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The candidates of each row, -inf where a filter drops them, their tokens, both [B, C, N], and for which rows
        they hold all that is kept [B, C]."""
        top = TopTiles.of(logits, TILE, self.tiles)
        x = self._tempered(top.values, temperature)
        bound = self._tempered(top.bound[..., None], temperature)
        highest = x.amax(-1, keepdim=True)
        # A row that is not finite is left to the whole filter.
        settled = highest.isfinite()
        threshold = torch.full_like(highest, float("-inf"))
        if self.top_k:
            threshold = x.topk(self.top_k, dim=-1).values[..., -1:]
        if self.top_p is not None and self.top_p < 1:
            shifted = x - torch.where(highest.isfinite(), highest, 0.0)
            if self.top_k and self.top_k_first:
                total = torch.where(x >= threshold, shifted.exp(), 0.0).sum(
                    -1, keepdim=True, dtype=torch.float64
                )
                # Tokens that tie with the k-th and are no candidates are part of the mass too.
                settled &= threshold > bound
            else:
                total = self._total_mass(logits, temperature, highest, seed)
            least = _by_order(shifted, self.top_p * total)
            threshold = torch.maximum(
                threshold, torch.where(shifted >= least, x, float("inf")).amin(-1, keepdim=True)
            )
        settled &= threshold > bound
        return x.masked_fill(x < threshold, float("-inf")), top.tokens, settled[..., 0]

    def _total_mass(self, logits: Tensor, temperature, highest: Tensor, seed: Tensor) -> Tensor:
        """Sum of exp(x - highest) over the vocabulary, [B, C, 1] fp64."""
        if isinstance(temperature, Tensor):
            temperature = torch.where(temperature == 0, 1.0, temperature)[..., 0]
        else:
            # The least that is no zero in fp32: rows so tempered are filtered whole.
            temperature = max(temperature, 1.5e-45) if temperature else 1.0
        stats = row_stats(
            logits,
            temperature=0.0,
            stats_temperature=temperature,
            softcap=self.softcap,
            # Nothing is drawn, and without one torch's generator would be asked.
            seed=seed,
            backend=self.backend,
        )
        return torch.exp((stats.logsumexp[..., None] - highest).double())
