"""`MaskedDiffusionSampler`: one strategy, the numbers around it, and text from any model that returns logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .. import backends
from ..ops import checks
from ..ops.progress import progress
from ..reference.progress import ProgressCall
from .generation import GenerateResult, generate
from .interfaces import (
    DREAM,
    BlockCache,
    BlockCausal,
    CausalContext,
    FullSequence,
    HierarchicalCache,
    Interface,
)
from .numbers import LONGEST, PER_ROW, SpecialTokens, check_field, check_flag, check_number
from .proposals import Proposal
from .recorded import kind_of, recorded_step
from .rules import Rule, Threshold
from .strategies.base import CONFIDENCES, SCHEDULES, BlockState, Step, Strategy, as_strategy
from .strategies.dream import Entropy
from .strategies.llada import LowConfidence, LowConfidenceDynamic

# As a tensor, a comparison with it costs half as much.
_INFINITY = checks.constant(math.inf, torch.float32)


@dataclass(frozen=True)
class MaskedDiffusionSampler(SpecialTokens):
    """Turns the logits of a masked diffusion model into tokens, a block at a time.

    Every step reads the block's logits once (`row_stats`), decides once (`commit`), and sees which rows are done.

        sampler = MaskedDiffusionSampler.for_llada(Threshold(0.9), block_length=32, eos_id=126081)
        result = sampler.generate(model, prompt_ids, max_new_tokens=256)

    A position whose logits have no distribution (NaN, +inf, or all -inf) is never decided: it stays a mask, and a row
    that has nothing else left ends with the flag `stuck`.

    Args:
        strategy: a `samplers.Strategy` (LowConfidence(), CreditThreshold(), ...) or a `samplers.Rule`, which is
            then applied at every step (Threshold(0.9), Factor(1.0), EntropyBound(0.1), ...); Random(), Margin()
            and Sequential() without k take it from the schedule.
        mask_id: the mask token.
        block_length: positions decided together; blocks go from left to right. None: all new tokens are
            one block (Dream).
        steps: evaluations per block, >= 1. Strategies that follow a schedule spread the block over them; None
            means one position per step. For the others it is an upper limit, and None means one for each mask; a
            block that is not done by then ends with its masks and the flag `stuck`. (Only a rule that may pass all
            positions over, or a proposal of the mask itself, needs more steps than there are masks.)
        temperature: >= 0; a number, a 0-d tensor, a tensor [B], or a function of (step, steps) that returns one of
            these. 0 proposes the argmax.
        top_k, top_p, top_k_first: filters of the proposals, as in `proposals.Proposal`.
        confidence: "untempered" or "proposal", as in `proposals.Proposal`; None takes what the strategy's
            publication does.
        schedule: "masked" spreads the masks of the block over the steps, "block" the block's whole length (SDAR).
        guidance_scale: w >= 0. More than 0 takes l = l_u + (w + 1)(l_c - l_u), with l_u the logits where the
            prompt is masked; both halves go through the model as one batch of twice the size.
        eos_id: one token or several that end a row; what follows the first becomes `pad_id`. Not the mask.
        pad_id: fills rows on the left, and after their end; the first eos_id by default, else 0. Not the mask.
        interface: how the model is called, and its cache: `interfaces.FullSequence()`, `DREAM`, `PrefixCache()`,
            `DualCache()`, `BlockCache()`, `BlockCausal()`, `HierarchicalCache()`, `CausalContext()`.
        softcap: in [1e-30, 1e30] for logits that are still to be capped, or None.
        backend: "auto", "reference", "cpp", "triton" or "cuda", for both ops.
        graph: on a GPU, steps of a kind are recorded in a CUDA graph after the first few, and replayed, where the
            strategy is `recordable`, the temperature a number and the logits take at most 96 MiB. Tokens are the same
            (probabilities to the last bit only where rows of logits are whole vectors of 16 bytes). Recording waits
            for the GPU, gives back what PyTorch's allocator keeps, and holds a copy of the logits. False launches
            every step.
    """

    strategy: Strategy | Rule
    mask_id: int
    block_length: int | None = 32
    steps: int | None = None
    temperature: float | Tensor | Callable[[int, int], float | Tensor] = 0.0
    top_k: int | None = None
    top_p: float | None = None
    top_k_first: bool = False
    confidence: str | None = None
    schedule: str = "masked"
    guidance_scale: float = 0.0
    eos_id: int | tuple[int, ...] | None = None
    pad_id: int | None = None
    interface: Interface = field(default_factory=FullSequence)
    softcap: float | None = None
    backend: str = "auto"
    graph: bool = True

    def __post_init__(self) -> None:
        decider = self.decider
        self.check_special_tokens()
        if self.block_length is not None:
            check_field(self, "block_length", 1, LONGEST, integer=True)
        if self.steps is not None:
            check_field(self, "steps", 1, LONGEST, integer=True)
        if not callable(self.temperature):
            check_field(self, "temperature", 0.0, tensor=PER_ROW)
        if self.top_k is not None:
            check_field(self, "top_k", 0, integer=True)
        if self.top_p is not None:
            check_field(self, "top_p", 0.0, 1.0)
        check_flag(self, "top_k_first")
        check_flag(self, "graph")
        check_field(self, "guidance_scale", 0.0)
        checks.softcap_value(self.softcap)
        backends.requested(self.backend)
        if self.confidence not in (*CONFIDENCES, None):
            raise ValueError(f"confidence: must be one of {CONFIDENCES} or None, got {self.confidence!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: must be one of {SCHEDULES}, got {self.schedule!r}")
        if not isinstance(self.interface, Interface):
            raise TypeError(
                "interface: a samplers.interfaces.Interface such as FullSequence() expected, "
                f"got {type(self.interface).__name__}"
            )
        decider.check(self.block_length, self.steps, self.temperature)
        decider.check_proposal(self.proposal_at(1.0 if callable(self.temperature) else self.temperature))
        object.__setattr__(self, "interface", self.interface.fitted(self.block_length, self.mask_id))

    @classmethod
    def for_llada(cls, strategy: Strategy | Rule | None = None, **options) -> MaskedDiffusionSampler:
        """LLaDA's numbers: mask 126336, low confidence unless another strategy is given.

        `steps` counts the evaluations of one block; the published `steps` those of all blocks together. So published
        numbers go in as steps=steps // (gen_length // block_length).

        Prompts of different lengths run as one group per length, since some revisions of the published model ignore
        their attention mask; `interface=FullSequence()` pads them, for a model that does not.
        """
        numbers = {"mask_id": 126336, "interface": FullSequence(attention_mask=None)}
        return cls(strategy or LowConfidence(), **{**numbers, **options})

    @classmethod
    def for_dream(cls, strategy: Strategy | Rule | None = None, **options) -> MaskedDiffusionSampler:
        """Dream's numbers: mask 151666, shifted logits, one block, entropy unless another strategy is given."""
        numbers = {"mask_id": 151666, "block_length": None, "interface": DREAM, "confidence": "proposal"}
        return cls(strategy or Entropy(), **{**numbers, **options})

    @classmethod
    def for_sdar(cls, strategy: Strategy | Rule | None = None, **options) -> MaskedDiffusionSampler:
        """SDAR's numbers: mask 151669, cached blocks of 4, `LowConfidenceDynamic` unless another is given.

        As in the published code, tokens are sampled at temperature 1; `temperature=0.0` takes the most probable ones.
        """
        numbers = {
            "mask_id": 151669,
            "block_length": 4,
            "temperature": 1.0,
            "schedule": "block",
            "confidence": "proposal",
            "top_k_first": True,
            "interface": BlockCache(),
        }
        return cls(strategy or LowConfidenceDynamic(), **{**numbers, **options})

    @classmethod
    def for_llada2(cls, strategy: Strategy | Rule | None = None, **options) -> MaskedDiffusionSampler:
        """LLaDA2's numbers: mask 156895, blocks of 32, `LowConfidenceDynamic(0.95)` unless another is given.

        Its end token is 156892; it goes in as `eos_id`, as with every family.
        """
        numbers = {
            "mask_id": 156895,
            "block_length": 32,
            "schedule": "block",
            "confidence": "proposal",
            "interface": BlockCausal(),
        }
        return cls(strategy or LowConfidenceDynamic(0.95), **{**numbers, **options})

    @classmethod
    def for_fast_dllm_v2(cls, strategy: Strategy | Rule | None = None, **options) -> MaskedDiffusionSampler:
        """Fast-dLLM v2's numbers: mask 151665, blocks of 32 in sub-blocks of 8, `Threshold(0.9, strict=True)`.

        Its end token is 151645. Where it samples at a temperature, its top_p is 0.95; both go in as options. Published
        `small_block_size` is `block_length`; `block_size` and `use_block_cache` are the interface's:
        interface=HierarchicalCache(model_block_length=32, use_block_cache=True).
        """
        numbers = {
            "mask_id": 151665,
            "block_length": 8,
            "confidence": "proposal",
            "interface": HierarchicalCache(),
        }
        return cls(strategy or Threshold(0.9, strict=True), **{**numbers, **options})

    @classmethod
    def for_nemotron_labs(cls, strategy: Strategy | Rule | None = None, **options) -> MaskedDiffusionSampler:
        """Nemotron-Labs-Diffusion's numbers: mask 100, blocks of 32, `Threshold(0.9)` unless another is given.

        `model.config.eos_token_id` goes in as `eos_id`. `LowConfidence()` is what its `generate` does without a
        threshold. `SelfSpeculation` is its other way to write: drafts of blocks that the model itself verifies.
        """
        numbers = {"mask_id": 100, "block_length": 32, "interface": CausalContext()}
        return cls(strategy or Threshold(0.9), **{**numbers, **options})

    @cached_property
    def decider(self) -> Strategy:
        """The strategy, or the one that a rule stands for."""
        return as_strategy(self.strategy)

    @cached_property
    def kind(self) -> tuple | None:
        """What a recorded step depends on besides shapes, None where steps are not recorded."""
        # A derived sampler may do anything.
        return kind_of(self) if type(self) is MaskedDiffusionSampler else None

    def start(
        self,
        tokens: Tensor,
        *,
        open: Tensor | None = None,
        seed: int | Tensor | None = None,
        offset: int = 0,
    ) -> BlockState:
        """The state before the first step of a block.

        Args:
            tokens: [B, C] int64.
            open: [B, C] bool, positions that the sampler may write; those that hold the mask by default.
            seed: as in `row_stats`. offset: the number of the first draw.
        """
        checks.is_tensor("tokens", tokens)
        checks.has_dtype("tokens", tokens, (torch.int64,))
        if tokens.ndim != 2:
            raise ValueError(f"tokens: shape must be [B, C], got {tuple(tokens.shape)}")
        masked = tokens == self.mask_id
        if open is None:
            open = masked
        else:
            checks.has_dtype("open", checks.is_tensor("open", open), (torch.bool,))
            checks.has_shape("open", open, tuple(tokens.shape), "as tokens")
            checks.on_device("open", open, tokens.device, "tokens")
            # The caller's may be written later.
            open = open.clone()
        masked_at_start = (masked & open).sum(-1)
        noise = self.decider.starts_from_noise
        most = self._steps(tokens.shape[1])
        if not self.decider.scheduled:
            masked = int(masked_at_start.max()) if tokens.numel() else 0
            most = self.decider.most_steps(masked, tokens.shape[1], self.steps)
        state = BlockState(
            open=open,
            masked_at_start=masked_at_start,
            active=open.any(-1) if noise else masked_at_start > 0,
            stuck=torch.zeros_like(masked_at_start, dtype=torch.bool),
            nfe=torch.zeros_like(masked_at_start),
            committed=torch.zeros_like(open),
            seed=checks.seed_and_offset(seed, offset, tokens.device)[0],
            most_steps=most,
            offset=offset,
        )
        self.decider.start(state, tokens)
        return state

    def _steps(self, length: int) -> int:
        return length if self.steps is None else self.steps

    def _proposal(self, number: int, length: int) -> Proposal:
        temperature = self.temperature
        if callable(temperature):
            temperature = check_number(
                "temperature", temperature(number, self._steps(length)), 0.0, tensor=PER_ROW
            )
        return self.proposal_at(temperature)

    def first_temperature(self, length: int) -> float | Tensor:
        """At which the first token of a block of `length` is drawn, where the model gives it beforehand."""
        return self._proposal(0, length).temperature if self.interface.draws_first_token else 0.0

    def proposal_at(self, temperature: float | Tensor) -> Proposal:
        return Proposal(
            temperature,
            self.top_k,
            self.top_p,
            self.top_k_first,
            self.confidence or self.decider.confidence,
            self.softcap,
            self.backend,
            self.decider.reads_statistics,
        )

    def step(self, logits: Tensor, tokens: Tensor, state: BlockState | None = None) -> Tensor:
        """One step of one block.

        Args:
            logits: [B, C, V] bf16, fp16 or fp32, aligned with the tokens (already shifted for Dream).
            tokens: [B, C] int64.
            state: from `start`, and then carried from step to step; it is updated in place. None takes a
                first step.

        Returns:
            The new tokens [B, C]. `state.active` says which rows go on, `state.committed` what was committed.

        Raises:
            TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value.
        """
        checks.is_tensor("logits", logits)
        checks.has_dtype("logits", logits, checks.FLOAT_DTYPES)
        checks.is_tensor("tokens", tokens)
        if state is None:
            state = self.start(tokens)
        elif not isinstance(state, BlockState):
            raise TypeError(f"state: what start() returned expected, got {type(state).__name__}")
        if logits.ndim != 3 or tuple(logits.shape[:2]) != tuple(tokens.shape):
            raise ValueError(
                f"logits: shape must be [{tokens.shape[0]}, {tokens.shape[1]}, V] like tokens, "
                f"got {tuple(logits.shape)}"
            )
        if logits.shape[-1] <= self.mask_id:
            raise ValueError(
                f"mask_id: {self.mask_id} is outside the vocabulary of the logits, [0, {logits.shape[-1]})"
            )
        checks.on_device("logits", logits, tokens.device, "tokens")
        checks.has_shape("state.open", state.open, tuple(tokens.shape), "as tokens")
        checks.on_device("state.open", state.open, tokens.device, "tokens")

        recorded = recorded_step(self, logits, tokens, state)
        if recorded is not None:
            return recorded.take(logits, tokens, state)
        return self.take_step(logits, tokens, state, last=state.step + 1 >= state.most_steps)

    def take_step(self, logits: Tensor, tokens: Tensor, state: BlockState, *, last: bool) -> Tensor:
        """`step` launch by launch, of arguments that were checked.

        last: the block ends with it in any case.
        """
        decider = self.decider
        owned = state.open & state.active[:, None]
        masked = (tokens == self.mask_id) & owned
        proposal = self._proposal(state.step, tokens.shape[1])
        state.tokens = tokens
        stats = decider.propose(logits, state, masked, proposal)
        # Where there is no distribution, and only there, `row_stats` says +inf, also when it leaves statistics out.
        valid = stats.entropy != _INFINITY
        # Where it can be asked without waiting for a device, the usual step is spared what follows from it.
        whole = valid.is_cpu and bool(valid.all())
        step = Step(
            tokens=tokens,
            valid=valid,
            masked=masked if whole else masked & valid,
            owned=owned,
            stats=stats,
            state=state,
            steps=self._steps(tokens.shape[1]),
            schedule=self.schedule,
            mask_id=self.mask_id,
            vocab_size=logits.shape[-1],
            backend=self.backend,
        )
        result = decider.decide(step)

        state.step += 1
        state.offset += 1
        state.committed = result.committed
        state.active, state.stuck, state.nfe = progress(
            ProgressCall(
                tokens=tokens,
                new_tokens=result.tokens,
                open=state.open,
                entropy=stats.entropy,
                active=state.active,
                stuck=state.stuck,
                nfe=state.nfe,
                finished=decider.finished(step, result),
                mask_id=self.mask_id,
                noise=decider.starts_from_noise,
                # The same tokens would bring the same proposals again.
                ends_unchanged=proposal.greedy and decider.repeats and not decider.scheduled,
                last=last,
            ),
            self.backend,
        )
        return result.tokens

    def generate(
        self,
        model: Callable,
        prompt_ids,
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        seed: int | Tensor | None = None,
        streamer=None,
        callback: Callable[[Tensor, int, int], None] | None = None,
    ) -> GenerateResult:
        """Text after each prompt.

        Args:
            model: called as the interface says; returns logits as a tensor, a tuple or an object with `.logits`.
            prompt_ids: [B, L] int64, or a list of B sequences of token ids, of any lengths (0 included).
            max_new_tokens: >= 1; the last block is cut where it would go beyond.
            attention_mask: [B, L], 0 on padding of `prompt_ids`.
            seed: as in `row_stats`; None draws one from torch's default generator.
            streamer: gets `put(prompt)`, `put_draft(block)` after every step if it has that method,
                `put(block)` when a block is done, and `end()`, as transformers' TextDiffusionStreamer.
            callback: called with (tokens [B, N], number of the block, number of the step) after every step; tokens as
                `GenerateResult.sequences`, masks where nothing is decided. Rows that run in groups, one for each length
                of a prompt, are decided group after group, and blocks are counted anew in each.

        Returns:
            `GenerateResult`.

        Raises:
            TypeError, ValueError: an argument of a wrong type, dtype, shape or value; a token id outside the vocabulary
                of a model that says how large it is.
        """
        return generate(self, model, prompt_ids, max_new_tokens, attention_mask, seed, streamer, callback)
