"""The loop of `MaskedDiffusionSampler.generate`: prompts, blocks, guidance, ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops import checks
from .interfaces import Session
from .numbers import check_number


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
        steps given. Their masks are still in `sequences`.
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


def _rows_of(prompt_ids, attention_mask: Tensor | None, device) -> list[Tensor]:
    """The prompts one by one, without padding."""
    if isinstance(prompt_ids, Tensor):
        checks.has_dtype("prompt_ids", prompt_ids, (torch.int64,))
        if prompt_ids.ndim != 2:
            raise ValueError(f"prompt_ids: shape must be [B, L], got {tuple(prompt_ids.shape)}")
        if attention_mask is None:
            return list(prompt_ids)
        checks.is_tensor("attention_mask", attention_mask)
        checks.has_shape("attention_mask", attention_mask, tuple(prompt_ids.shape), "as prompt_ids")
        return [row[keep.bool()] for row, keep in zip(prompt_ids, attention_mask)]
    if attention_mask is not None:
        raise ValueError("attention_mask: only with prompt_ids as one tensor [B, L]")
    rows = [torch.as_tensor(row, dtype=torch.int64, device=device) for row in prompt_ids]
    for number, row in enumerate(rows):
        if row.ndim != 1:
            raise ValueError(
                f"prompt_ids[{number}]: a sequence of token ids expected, got shape {tuple(row.shape)}"
            )
    return rows


def _device_of(model: Callable, prompt_ids) -> torch.device:
    if isinstance(prompt_ids, Tensor):
        return prompt_ids.device
    if isinstance(model, torch.nn.Module):
        for parameter in model.parameters():
            return parameter.device
    return torch.device("cpu")


@torch.no_grad()
def generate(
    sampler, model, prompt_ids, max_new_tokens, attention_mask, seed, streamer, callback
) -> GenerateResult:
    """`MaskedDiffusionSampler.generate`, whose docstring says it all."""
    if not callable(model):
        raise TypeError(f"model: a callable that returns logits expected, got {type(model).__name__}")
    check_number("max_new_tokens", max_new_tokens, 1, integer=True)
    device = _device_of(model, prompt_ids)
    rows = _rows_of(prompt_ids, attention_mask, device)
    if not rows:
        raise ValueError("prompt_ids: at least one prompt expected, got none")
    if streamer is not None and len(rows) > 1:
        raise ValueError(f"streamer: one prompt at a time, got {len(rows)}")
    if sampler.block_length is None:
        # One block; what the strategy says about its length can be said only now.
        sampler = replace(sampler, block_length=max_new_tokens)
    seed = checks.seed_and_offset(seed, 0, device)[0]

    groups = [list(range(len(rows)))]
    if sampler.interface.same_length:
        lengths = sorted({len(row) for row in rows})
        groups = [[i for i, row in enumerate(rows) if len(row) == length] for length in lengths]
    longest = max(len(row) for row in rows)
    sequences = torch.full((len(rows), longest + max_new_tokens), sampler.padding, device=device)
    nfe = torch.zeros(len(rows), dtype=torch.int64, device=device)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
    stuck = torch.zeros_like(ended)
    calls, rows_fed, offset = 0, 0, 0
    temperature = sampler.temperature
    by_row = isinstance(temperature, Tensor) and temperature.ndim == 1
    if by_row and len(temperature) != len(rows):
        raise ValueError(f"temperature: one value per prompt is {len(rows)} values, got {len(temperature)}")
    for group in groups:
        if by_row:
            sampler = replace(sampler, temperature=temperature[group])
        run = _Run(sampler, model, [rows[i] for i in group], max_new_tokens, seed, offset, streamer, callback)
        run.finish()
        sequences[group, longest - run.prompt_length :] = run.tokens[:, : run.prompt_length + max_new_tokens]
        nfe[group], ended[group], stuck[group] = run.nfe, run.ended, run.stuck
        calls, rows_fed, offset = calls + run.session.calls, rows_fed + run.session.rows_fed, run.offset
    return GenerateResult(sequences, longest, nfe, calls, ended, stuck, rows_fed)


class _Run:
    """One batch from its prompts to its end."""

    def __init__(self, sampler, model, rows, max_new_tokens, seed, offset, streamer, callback):
        self.sampler, self.seed, self.offset = sampler, seed, offset
        self.streamer, self.callback = streamer, callback
        self.prompt_length = max(len(row) for row in rows)
        self.end = self.prompt_length + max_new_tokens
        device, size = rows[0].device, sampler.block_length
        total = math.ceil(self.end / size) * size if sampler.interface.aligned else self.end

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
        self.guided = sampler.guidance_scale > 0
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
        logits = self._guide(self.session.logits(self._fed(), start, end))
        if self.fed is None:
            return logits
        # Rows keep their numbers, and with them their draws; nothing is decided for those that were not fed.
        whole = logits.new_zeros(self.tokens.shape[0], *logits.shape[1:])
        return whole.index_copy_(0, self.fed, logits)

    def _guide(self, logits: Tensor) -> Tensor:
        if not self.guided:
            return logits
        conditional, unconditional = logits.float().chunk(2)
        guided = unconditional + (self.sampler.guidance_scale + 1) * (conditional - unconditional)
        # A token that the unconditional half rules out has no difference to scale; one that the other half rules out
        # stays so. NaN and +inf in either half leave NaN or +inf.
        return torch.where(unconditional == -math.inf, conditional, guided)

    def finish(self) -> None:
        """Run all blocks."""
        size = self.sampler.block_length
        first = self.prompt_length // size * size if self.sampler.interface.aligned else self.prompt_length
        if self.streamer is not None:
            self.streamer.put(self.tokens[:, : self.prompt_length].cpu())
        self.session.prefill(self._fed(), first)
        for number, start in enumerate(range(first, self.tokens.shape[1], size)):
            end = min(start + size, self.tokens.shape[1])
            self._block(number, start, end)
            going = ~(self.ended | self.stuck)
            if not bool(going.any()):
                break
            self._feed(going)
            if end < self.tokens.shape[1]:
                self.session.end_block(self._fed(), start, end)
        if self.streamer is not None:
            self.streamer.end()

    def _block(self, number: int, start: int, end: int) -> None:
        sampler, tokens = self.sampler, self.tokens[:, start:end]
        open = self.new[start:end] & ~(self.ended | self.stuck)[:, None]
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
        if sampler.eos_ids:
            self.ended |= (self._is_end() & self.new)[:, : min(end, self.end)].any(-1)
            self._pad_after_end()
        if self.streamer is not None:
            new = slice(max(start, self.prompt_length), min(end, self.end))
            self.streamer.put(self.tokens[:, new].cpu())

    def _report(self, number: int, state, start: int, end: int) -> None:
        if self.callback is not None:
            self.callback(self.tokens.clone(), number, state.step - 1)
        if hasattr(self.streamer, "put_draft"):
            new = slice(max(start, self.prompt_length), min(end, self.end))
            self.streamer.put_draft(self.tokens[:, new].cpu())

    def _is_end(self) -> Tensor:
        ends = torch.tensor(self.sampler.eos_ids, device=self.tokens.device)
        return torch.isin(self.tokens, ends)

    def _pad_after_end(self) -> None:
        found = (self._is_end() & self.new).long()
        after = found.cumsum(-1) - found > 0
        self.tokens = torch.where(after, self.sampler.padding, self.tokens)
