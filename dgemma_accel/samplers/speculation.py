"""`SelfSpeculation`: a model that drafts a block in its diffusion mode and verifies it in its autoregressive one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import backends
from ..ops import checks
from ..ops.commit import commit
from ..ops.row_stats import RowStats, row_stats
from .generation import GenerateResult, check_listeners, own_copy
from .interfaces import past_of
from .interfaces.causal import attending, check_two_modes, switched
from .numbers import LONGEST, SpecialTokens, check_field, check_number
from .prompts import check_tokens, device_of, prompt_rows
from .rules import Sequential, Threshold
from .writes import Keep

# The switch of PEFT's adapter layers.
ADAPTERS_OFF = "_disable_adapters"
# Draws of one prompt: the next one's begin behind them.
DRAWS = 2**32


@dataclass(frozen=True)
class SelfSpeculation(SpecialTokens):
    """Linear self-speculation of Nemotron-Labs-Diffusion, whose `linear_spec_generate` this is.

        writer = SelfSpeculation(eos_id=model.config.eos_token_id)
        result = writer.generate(model, prompt_ids, max_new_tokens=256)

    A turn drafts a block behind what is written, its attention seeing the block whole, and reads the draft under causal
    attention. What that says of each position, given the tokens before, is the text: the positions up to the first at
    which it differs from the draft, and that one. So the text is that of autoregressive decoding, greedy or drawn, and
    a turn of two evaluations writes 1 to `block_length` tokens of it. Prompts are written one after the other, since
    each takes as many turns as it needs.

    Adapters of PEFT in the model are on while it drafts and off otherwise, as published: the adapter of
    Nemotron-Labs-Diffusion is made for its drafts.

    Args:
        mask_id: the mask token.
        block_length: of a draft, its first token being written already.
        threshold: 0 drafts a block in one evaluation. More, up to 1, takes the positions at or above that confidence,
            at least one, and evaluates the rest once more.
        temperature: T >= 0, of the draft and of the text; 0 takes the most probable tokens.
        eos_id: one token or several that end a row; what follows the first becomes `pad_id`. Not the mask.
        pad_id: fills rows on the left, and after their end; the first eos_id by default, else 0. Not the mask.
        backend: "auto", "reference", "cpp", "triton" or "cuda".

    Source: nvidia/Nemotron-Labs-Diffusion-8B, modeling_nemotron_labs_diffusion.py, linear_spec_generate.
    """

    mask_id: int = 100
    block_length: int = 32
    threshold: float = 0.0
    temperature: float = 0.0
    eos_id: int | tuple[int, ...] | None = None
    pad_id: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        self.check_special_tokens()
        check_field(self, "block_length", 1, LONGEST, integer=True)
        check_field(self, "threshold", 0.0, 1.0)
        check_field(self, "temperature", 0.0)
        backends.requested(self.backend)

    @torch.no_grad()
    def generate(
        self,
        model: Callable,
        prompt_ids,
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        seed: int | Tensor | None = None,
        streamer=None,
    ) -> GenerateResult:
        """Text after each prompt.

        Args:
            model: with the `encoder` and the `diffusion_head` of a Nemotron-Labs-Diffusion.
            prompt_ids: [B, L] int64, or a list of B sequences of token ids, none of them empty.
            max_new_tokens: >= 1.
            attention_mask: [B, L], 0 on padding of `prompt_ids`.
            seed: as in `row_stats`; None draws one from torch's default generator.
            streamer: gets `put(prompt)`, `put_draft(block)` for each draft if it has that method, `put(tokens)` for
                what a turn wrote, and `end()`.

        Returns:
            `GenerateResult`. nfe counts a row's evaluations, its prompt's included. A row is stuck where the logits
            have no distribution, or say the mask; what is not written then are masks.

        Raises:
            TypeError, ValueError: an argument of a wrong type, dtype, shape or value; a model without these parts.
        """
        check_two_modes(model, "SelfSpeculation()")
        max_new_tokens = check_number("max_new_tokens", max_new_tokens, 1, LONGEST, integer=True)
        device = device_of(model, prompt_ids)
        rows = prompt_rows(prompt_ids, attention_mask, device)
        check_listeners(streamer, None, len(rows))
        check_tokens(self, model, rows)
        for number, row in enumerate(rows):
            if not len(row):
                raise ValueError(f"prompt_ids[{number}]: at least one token expected, got none")
        seed = checks.seed_and_offset(seed, 0, device)[0]

        longest = max(len(row) for row in rows)
        sequences = torch.full((len(rows), longest + max_new_tokens), self.padding, device=device)
        nfe, ended, stuck = [], [], []
        for number, row in enumerate(rows):
            run = _Run(self, model, row, max_new_tokens, seed, number * DRAWS, streamer)
            text = run.finish()
            sequences[number, longest - len(row) : longest] = row
            sequences[number, longest:] = self.mask_id if run.stuck else self.padding
            sequences[number, longest : longest + len(text)] = torch.tensor(text, device=device)
            nfe.append(run.nfe)
            ended.append(run.ended)
            stuck.append(run.stuck)
        flags = (torch.tensor(values, dtype=torch.bool, device=device) for values in (ended, stuck))
        return GenerateResult(
            sequences, longest, torch.tensor(nfe, device=device), sum(nfe), *flags, rows_fed=sum(nfe)
        )


class _Run:
    """One prompt [L] and what is written behind it."""

    def __init__(self, writer, model, prompt, max_new_tokens, seed, offset, streamer):
        self.writer, self.model, self.prompt, self.streamer = writer, model, prompt[None], streamer
        self.max_new_tokens, self.seed, self.first_draw = max_new_tokens, seed, offset
        # Looked for once: asking every module takes longer than a small evaluation.
        modules = model.modules() if isinstance(model, torch.nn.Module) else ()
        self.adapted = [module for module in modules if hasattr(module, ADAPTERS_OFF)]
        self.past, self.nfe = None, 0
        self.ended = self.stuck = False

    def finish(self) -> list[int]:
        """The tokens written, up to an end token."""
        if self.streamer is not None:
            self.streamer.put(own_copy(self.prompt))
        text = self._cut([self._said(self.prompt, last=True).item()], [])
        while not (self.ended or self.stuck) and len(text) < self.max_new_tokens:
            block = self._draft(text[-1])
            said = self._said(block)
            # What the causal mode says at a position is compared with the draft at the next; one wait for both.
            agreed = (said[:, :-1] == block[:, 1:]).long().cumprod(-1).sum(-1, keepdim=True)
            *tokens, agreed = torch.cat([said, agreed], -1)[0].tolist()
            # The last of them is in no cache yet: it begins the next draft. What follows goes, by its number: a length
            # to keep is what transformers' caches no longer take.
            surplus = len(tokens) - agreed - 1
            if surplus:
                self.past.crop(-surplus)
            text = self._cut(tokens[: agreed + 1], text)
        if self.streamer is not None:
            self.streamer.end()
        return text

    def _cut(self, tokens: list[int], text: list[int]) -> list[int]:
        """The text with what is new of it, up to its end."""
        tokens = tokens[: self.max_new_tokens - len(text)]
        for number, token in enumerate(tokens):
            if token == self.writer.mask_id:
                self.stuck, tokens = True, tokens[:number]
                break
            if token in self.writer.eos_ids:
                self.ended, tokens = True, tokens[: number + 1]
                break
        if self.streamer is not None and tokens:
            self.streamer.put(torch.tensor([tokens]))
        return text + tokens

    def _draft(self, first: int) -> Tensor:
        """[1, C]: the first token, and what the diffusion mode makes of the masks behind it."""
        writer = self.writer
        block = torch.full((1, writer.block_length), writer.mask_id, device=self.prompt.device)
        block[:, 0] = first
        masks = writer.block_length - 1
        rule = Threshold(writer.threshold) if writer.threshold else Sequential(writer.block_length)
        # A proposal of the mask leaves one, and the causal mode then says what stands there.
        for _ in range(masks if writer.threshold else min(masks, 1)):
            stats = self._evaluate(block, causal=False)
            masked = (block == writer.mask_id) & ~stats.entropy.isinf()
            block = commit(
                block, stats, rule, Keep(), candidates=masked, seed=0, backend=writer.backend
            ).tokens
            if hasattr(self.streamer, "put_draft"):
                self.streamer.put_draft(own_copy(block))
            if writer.threshold and not bool((block == writer.mask_id).any()):
                break
        return block

    def _said(self, tokens: Tensor, last: bool = False) -> Tensor:
        """What the causal mode says behind each of tokens [1, C], or behind the last; they are in the cache then."""
        stats = self._evaluate(tokens, causal=True, last=last)
        return torch.where(stats.entropy.isinf(), self.writer.mask_id, stats.sample)

    def _evaluate(self, tokens: Tensor, causal: bool, last: bool = False) -> RowStats:
        options = {"use_causal_mask": True} if causal else {}
        with attending(self.model, causal=causal), switched(self.adapted, ADAPTERS_OFF, causal):
            output = self.model.encoder(
                input_ids=tokens, past_key_values=self.past, use_cache=causal, **options
            )
            hidden = output.last_hidden_state
            logits = self.model.diffusion_head(hidden[:, -1:] if last else hidden)
        if causal:
            self.past = past_of(output)
        self.nfe += 1
        return row_stats(
            logits,
            temperature=self.writer.temperature,
            seed=self.seed,
            offset=self.first_draw + self.nfe,
            # Only a threshold looks at more than what is drawn.
            statistics=not causal and self.writer.threshold > 0,
            backend=self.writer.backend,
        )
