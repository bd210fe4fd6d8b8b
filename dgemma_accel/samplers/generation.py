"""The loop of `MaskedDiffusionSampler.generate`: prompts, blocks, guidance, ends."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..ops import checks
from ..ops.row_stats import row_stats
from ..reference.row_stats import apply_softcap
from .interfaces import Session
from .numbers import LONGEST, check_number
from .prompts import check_tokens, device_of, prompt_rows
from .strategies.base import EveryStep


@dataclass(frozen=True)
class GenerateResult:
    """What `MaskedDiffusionSampler.generate` wrote.

    sequences: [B, L + max_new_tokens] int64: prompts, padded on the left to the longest, then the new tokens.
    prompt_length: L, so that sequences[:, prompt_length:] is new.
    nfe: [B] int64, function evaluations of each row: steps in which it still had something to decide.
        Guidance takes two for each.
    calls: calls of the model, those that only fill a cache included.
    rows_fed: rows in these calls together, those of guidance included. A row that has ended is not fed any more.
    ended: [B] bool, rows that wrote an end token.
    stuck: [B] bool, rows that stopped with masks left because no further progress was possible in the
        steps given, or with logits that have no distribution. Their masks are still in `sequences`.
    """

    sequences: Tensor
    prompt_length: int
    nfe: Tensor
    calls: int
    ended: Tensor
    stuck: Tensor
    rows_fed: int

    @property
    def new_tokens(self) -> Tensor:
        """[B, max_new_tokens]"""
        return self.sequences[:, self.prompt_length :]


def check_listeners(streamer, callback, rows: int) -> None:
    """Raise TypeError or ValueError for what cannot be told of the text of so many prompts."""
    if streamer is not None:
        for name in ("put", "end"):
            if not callable(getattr(streamer, name, None)):
                raise TypeError(
                    f"streamer: an object with put() and end() expected, got {type(streamer).__name__}"
                )
        if rows > 1:
            raise ValueError(f"streamer: one prompt at a time, got {rows}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback: a callable or None expected, got {type(callback).__name__}")


def own_copy(tokens: Tensor) -> Tensor:
    """Tokens on the host for a streamer, which may keep them and write into them."""
    return tokens.to("cpu", copy=True)


def _numbers_per_row(owner, names) -> dict[str, Tensor]:
    """The fields among `names` of a dataclass that hold one value per row."""
    values = {name: getattr(owner, name) for name in names}
    return {name: v for name, v in values.items() if isinstance(v, Tensor) and v.ndim == 1}


def _for_rows(temperature, group: list[int], rows: int):
    """A function of the step that returns one temperature per prompt, as one that returns those of a group."""

    def of_group(step: int, steps: int):
        value = temperature(step, steps)
        if not isinstance(value, Tensor) or value.ndim != 1:
            return value
        if len(value) != rows:
            raise ValueError(f"temperature: one value per prompt is {rows} values, got {len(value)}")
        return value[group]

    return of_group


def _for_all_rows(callback, sequences: Tensor, group: list[int], start: int):
    """A callback that takes all rows as one that takes those of a group, whose first column is `start`."""

    def of_group(tokens: Tensor, block: int, step: int) -> None:
        whole = sequences.clone()
        whole[group, start:] = tokens[:, : whole.shape[1] - start]
        callback(whole, block, step)

    return of_group


def _by_groups(sampler, groups: list[list[int]], rows: int):
    """The sampler for each group of rows: its temperature and its rule's numbers are those of the group's rows."""
    rule = sampler.decider.fixed if isinstance(sampler.decider, EveryStep) else None
    own = _numbers_per_row(sampler, ("temperature",))
    ruled = {} if rule is None else _numbers_per_row(rule, (field.name for field in fields(rule)))
    for name, values in (own | ruled).items():
        if len(values) != rows:
            raise ValueError(f"{name}: one value per prompt is {rows} values, got {len(values)}")
    parts = callable(sampler.temperature) and len(groups) > 1
    if not own and not ruled and not parts:
        return [sampler] * len(groups)
    samplers = []
    for group in groups:
        changed = {name: values[group] for name, values in own.items()}
        if parts:
            changed["temperature"] = _for_rows(sampler.temperature, group, rows)
        if ruled:
            changed["strategy"] = replace(rule, **{name: values[group] for name, values in ruled.items()})
        samplers.append(replace(sampler, **changed))
    return samplers


@torch.no_grad()
def generate(
    sampler, model, prompt_ids, max_new_tokens, attention_mask, seed, streamer, callback
) -> GenerateResult:
    """`MaskedDiffusionSampler.generate`, whose docstring says it all."""
    if not callable(model):
        raise TypeError(f"model: a callable that returns logits expected, got {type(model).__name__}")
    max_new_tokens = check_number("max_new_tokens", max_new_tokens, 1, LONGEST, integer=True)
    device = device_of(model, prompt_ids)
    rows = prompt_rows(prompt_ids, attention_mask, device)
    check_listeners(streamer, callback, len(rows))
    check_tokens(sampler, model, rows)
    if sampler.block_length is None:
        # One block; what the strategy says about its length can be said only now. It may be shorter than a block of
        # the strategy, and ends with the text.
        sampler = replace(sampler, block_length=max(max_new_tokens, sampler.decider.shortest_block))
    seed = checks.seed_and_offset(seed, 0, device)[0]

    groups = [list(range(len(rows)))]
    if sampler.interface.same_length:
        lengths = sorted({len(row) for row in rows})
        groups = [[i for i, row in enumerate(rows) if len(row) == length] for length in lengths]
    longest = max(len(row) for row in rows)
    sequences = torch.full((len(rows), longest + max_new_tokens), sampler.padding, device=device)
    if callback is not None:
        # What a callback sees of groups whose turn has not come.
        sequences[:, longest:] = sampler.mask_id
        for number, row in enumerate(rows):
            sequences[number, longest - len(row) : longest] = row
    nfe = torch.zeros(len(rows), dtype=torch.int64, device=device)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
    stuck = torch.zeros_like(ended)
    calls, rows_fed, offset = 0, 0, 0
    for own, group in zip(_by_groups(sampler, groups, len(rows)), groups):
        members = [rows[i] for i in group]
        start = longest - max(len(row) for row in members)
        listener = None if callback is None else _for_all_rows(callback, sequences, group, start)
        run = _Run(own, model, members, max_new_tokens, seed, offset, streamer, listener)
        run.finish()
        sequences[group, start:] = run.tokens[:, : run.prompt_length + max_new_tokens]
        nfe[group], ended[group], stuck[group] = run.nfe, run.ended, run.stuck
        calls, rows_fed, offset = calls + run.session.calls, rows_fed + run.session.rows_fed, run.offset
    return GenerateResult(sequences, longest, nfe, calls, ended, stuck, rows_fed)


class _Run:
    """One batch from its prompts to its end."""

    def __init__(self, sampler, model, rows, max_new_tokens, seed, offset, streamer, callback):
        self.guided = sampler.guidance_scale > 0
        # The halves of guidance are capped before they are put together, and not once more.
        self.softcap = sampler.softcap if self.guided else None
        if self.softcap is not None:
            sampler = replace(sampler, softcap=None)
        self.sampler, self.seed, self.offset = sampler, seed, offset
        self.streamer, self.callback = streamer, callback
        self.prompt_length = max(len(row) for row in rows)
        self.end = self.prompt_length + max_new_tokens
        device, total = rows[0].device, sampler.interface.fed_length(self.end)

        self.tokens = torch.full((len(rows), total), sampler.mask_id, device=device)
        self.valid = torch.ones_like(self.tokens, dtype=torch.bool)
        for number, row in enumerate(rows):
            padding = self.prompt_length - len(row)
            self.tokens[number, :padding] = sampler.padding
            self.tokens[number, padding : self.prompt_length] = row
            self.valid[number, :padding] = False
        self.new = torch.arange(total, device=device) >= self.prompt_length
        self.nfe = torch.zeros(len(rows), dtype=torch.int64, device=device)
        self.ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
        self.stuck = torch.zeros_like(self.ended)
        self.session: Session = sampler.interface.open(model, self._both(self.valid, self.valid))
        # Rows that are fed; None: all. Rows without a decision to make are not, as far as the interface can do that.
        self.fed: Tensor | None = None

    def _both(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        return torch.cat([conditional, unconditional]) if self.guided else conditional

    def _fed(self) -> Tensor:
        """What the model reads: the tokens, and below them the same without the prompt if guidance is on."""
        tokens, valid = self.tokens, self.valid
        if self.fed is not None:
            tokens, valid = tokens[self.fed], valid[self.fed]
        if not self.guided:
            return tokens
        hidden = valid & ~self.new
        return self._both(tokens, torch.where(hidden, self.sampler.mask_id, tokens))

    def _feed(self, wanted: Tensor) -> None:
        """Let the model see the rows `wanted` [B] bool, at least one, and no others."""
        batch = len(wanted)
        rows = wanted.nonzero()[:, 0]
        if len(rows) == (batch if self.fed is None else len(self.fed)) and (
            self.fed is None or torch.equal(rows, self.fed)
        ):
            return
        if self.session.select(self._both(rows, rows + batch)):
            self.fed = None if len(rows) == batch else rows

    def _logits(self, start: int, end: int) -> Tensor:
        return self._of_all_rows(self._guide(self.session.logits(self._fed(), start, end)))

    def _of_all_rows(self, logits: Tensor) -> Tensor:
        if self.fed is None:
            return logits
        # Rows keep their numbers, and with them their draws; nothing is decided for those that were not fed.
        whole = logits.new_zeros(self.tokens.shape[0], *logits.shape[1:])
        return whole.index_copy_(0, self.fed, logits)

    def _guide(self, logits: Tensor) -> Tensor:
        if not self.guided:
            return logits
        conditional, unconditional = apply_softcap(logits.float(), self.softcap).chunk(2)
        guided = unconditional + (self.sampler.guidance_scale + 1) * (conditional - unconditional)
        # A token that the unconditional half rules out has no difference to scale; one that the other half rules out
        # stays so. NaN and +inf in either half leave NaN or +inf.
        return torch.where(unconditional == -math.inf, conditional, guided)

    def finish(self) -> None:
        """Run all blocks."""
        size = self.sampler.block_length
        first = self.prompt_length // size * size if self.sampler.interface.aligned else self.prompt_length
        if self.streamer is not None:
            self.streamer.put(own_copy(self.tokens[:, : self.prompt_length]))
        self._begin_with(self.session.prefill(self._fed(), first), first)
        for number, start in enumerate(range(first, self.end, size)):
            end = min(start + size, self.tokens.shape[1])
            self._block(number, start, end)
            going = ~(self.ended | self.stuck)
            if not bool(going.any()):
                break
            self._feed(going)
            if end < self.end:
                self._begin_with(self.session.end_block(self._fed(), start, end), end)
        if self.streamer is not None:
            self.streamer.end()

    def _begin_with(self, logits: Tensor | None, position: int) -> None:
        """Write the token at a block's first position, where the model says what it is before the block begins."""
        if logits is None or position < self.prompt_length:
            return
        sampler, mask_id = self.sampler, self.sampler.mask_id
        logits = self._of_all_rows(self._guide(logits))
        temperature = sampler.first_temperature(min(sampler.block_length, self.end - position))
        if isinstance(temperature, Tensor) and temperature.ndim:
            temperature = temperature.to(logits.device)
        stats = row_stats(
            logits,
            temperature=temperature,
            softcap=sampler.softcap,
            seed=self.seed,
            offset=self.offset,
            statistics=False,
            backend=sampler.backend,
        )
        if sampler.interface.draws_first_token:
            self.offset += 1
        # Without a distribution nothing is decided.
        token = torch.where(stats.entropy.isinf(), mask_id, stats.sample)
        column = self.tokens[:, position]
        # Rows that are not fed have ended, or are stuck.
        decided = ~(self.ended | self.stuck) & (column == mask_id)
        self.tokens[:, position] = torch.where(decided, token, column)
        self._notice_ends(position + 1)

    def _notice_ends(self, end: int) -> None:
        if self.sampler.eos_ids:
            self.ended |= (self._is_end() & self.new)[:, : min(end, self.end)].any(-1)
            self._pad_after_end()

    def _block(self, number: int, start: int, end: int) -> None:
        sampler, tokens = self.sampler, self.tokens[:, start:end]
        open = self.new[start:end] & ~(self.ended | self.stuck)[:, None] & (tokens == sampler.mask_id)
        if sampler.decider.starts_from_noise:
            tokens = torch.where(open, sampler.decider.noise(tokens, self.seed, self.offset), tokens)
            self.tokens[:, start:end] = tokens
            self.offset += 1
        state = sampler.start(tokens, open=open, seed=self.seed, offset=self.offset)
        self.session.begin_block(start, end)
        while bool(state.active.any()):
            if self.session.free_rows:
                self._feed(state.active)
            tokens = sampler.step(self._logits(start, end), tokens, state)
            self.tokens[:, start:end] = tokens
            self._report(number, state, start, end)
        self.tokens[:, start:end] = sampler.decider.final_tokens(tokens, state)
        self.offset = state.offset
        self.nfe += state.nfe * (2 if self.guided else 1)
        self.stuck |= state.stuck
        self._notice_ends(end)
        if self.streamer is not None:
            new = slice(max(start, self.prompt_length), min(end, self.end))
            self.streamer.put(own_copy(self.tokens[:, new]))

    def _report(self, number: int, state, start: int, end: int) -> None:
        if self.callback is not None:
            self.callback(self.tokens, number, state.step - 1)
        if hasattr(self.streamer, "put_draft"):
            new = slice(max(start, self.prompt_length), min(end, self.end))
            self.streamer.put_draft(own_copy(self.tokens[:, new]))

    def _is_end(self) -> Tensor:
        ends = torch.tensor(self.sampler.eos_ids, device=self.tokens.device)
        return torch.isin(self.tokens, ends)

    def _pad_after_end(self) -> None:
        found = (self._is_end() & self.new).long()
        after = found.cumsum(-1) - found > 0
        self.tokens = torch.where(after, self.sampler.padding, self.tokens)
