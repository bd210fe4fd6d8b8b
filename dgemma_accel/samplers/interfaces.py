"""How models are called: what a sampler has to know about a model's `forward`, and the caches it can keep.

An interface opens a session for one batch; the session turns (tokens, block) into the block's logits. The models
themselves stay as they are published:

- `FullSequence`: the whole sequence at every evaluation. LLaDA, BERT-like models of transformers, and Dream
  (`DREAM`: logits shifted right by one position, 4-d attention mask and position ids for padded batches).
- `PrefixCache`, `DualCache`: Fast-dLLM's caches, for its LLaDA and (with `shift_logits=True`) its Dream; the prefix
  cache also for models of transformers that return a cache.
- `BlockCache`: SDAR's block diffusion, for models that accept a cache and `store_kv`.
- `BlockCausal`: LLaDA2's, which reads the blocks so far at every evaluation.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: a tensor, a tuple that begins with one, a mapping, or `.logits`."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, dict):
        logits = output.get("logits")
    if logits is None and isinstance(output, (tuple, list)) and output:
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"model: must return logits as a tensor, a tuple that begins with them, or an object with .logits, "
            f"got {type(output).__name__}"
        )
    return logits


def past_of(output: Any) -> Any:
    """The cache in what a model returned, under either name that transformers has given it."""
    # In this order: outputs of transformers 5.24 and later warn when they are asked for the earlier name.
    for name in ("cache", "past_key_values"):
        past = getattr(output, name, None)
        if past is None and isinstance(output, dict):
            past = output.get(name)
        if past is not None:
            return past
    raise TypeError(
        f"model: must return past_key_values or cache for this interface, got {type(output).__name__} without it; "
        "FullSequence() needs no cache"
    )


def _parameters_of(model: Callable) -> dict[str, inspect.Parameter]:
    """The parameters that a model's `forward`, or a plain callable, declares; none where it has no signature."""
    # A module that torch.compile wraps declares (*args, **kwargs).
    model = getattr(model, "_orig_mod", model)
    try:
        return dict(inspect.signature(getattr(model, "forward", model)).parameters)
    except (TypeError, ValueError):  # a callable without a signature
        return {}


class Session:
    """One batch with one model.

    calls: how often the model was called. rows_fed: rows in all these calls together.
    """

    # Rows may be left out of any evaluation, and come back; else only from one block to the next, for good.
    free_rows = False

    def __init__(self, interface: Interface, model: Callable, valid: Tensor):
        self.interface = interface
        self.model = model
        self.valid = self._valid_of_all = valid
        self.calls = self.rows_fed = 0
        self.parameters = _parameters_of(model)
        # Asked of the model, not of transformers: published code keeps the earlier name under every release.
        renamed = "cache" in self.parameters and "past_key_values" not in self.parameters
        self.cache_name = "cache" if renamed else "past_key_values"

    def takes(self, name: str) -> bool:
        """Whether the model can be given an argument of this name, as far as it says."""
        rest = any(p.kind is p.VAR_KEYWORD for p in self.parameters.values())
        return not self.parameters or rest or name in self.parameters

    def select(self, rows: Tensor) -> bool:
        """From now on the tokens fed are those of the batch's `rows` [R] int64, rising; False where that cannot be."""
        self.valid = self._valid_of_all[rows]
        return True

    def call(self, tokens: Tensor, **kwargs) -> Any:
        self.calls += 1
        self.rows_fed += tokens.shape[0]
        return self.model(tokens, **kwargs)

    def checked(self, output: Any, tokens: Tensor) -> Tensor:
        """The logits of a call, whose batch and length have to be those of the tokens."""
        logits = logits_of(output)
        if logits.ndim != 3 or tuple(logits.shape[:2]) != tuple(tokens.shape):
            raise ValueError(
                f"model: logits must be [{tokens.shape[0]}, {tokens.shape[1]}, V] like its tokens, "
                f"got {tuple(logits.shape)}"
            )
        return logits

    def block_of(self, logits: Tensor, start: int, end: int) -> Tensor:
        """Logits of positions start..end - 1, counted in the tokens that were fed."""
        if not self.interface.shift_logits:
            return logits[:, start:end]
        if start > 0:
            return logits[:, start - 1 : end - 1]
        return torch.cat([logits[:, :1], logits[:, : end - 1]], 1)

    def prefill(self, tokens: Tensor, length: int) -> None:
        """Called once, before the first block, which starts at `length`."""

    def begin_block(self, start: int, end: int) -> None:
        """Called before the first evaluation of a block."""

    def logits(self, tokens: Tensor, start: int, end: int) -> Tensor:
        """Logits [B, end - start, V] of a block of tokens [B, N]."""
        raise NotImplementedError

    def end_block(self, tokens: Tensor, start: int, end: int) -> None:
        """Called when a block is done and another follows."""


@dataclass(frozen=True)
class Interface:
    """Base of the interfaces.

    shift_logits: the logits that predict position i stand at i - 1 (Dream). A row's first token reads its own.
    """

    shift_logits: bool = False

    session = Session
    # Rows of a batch must have prompts of one length; other batches are split by length.
    same_length = True
    # Blocks begin at multiples of the block length, so that the first one may hold the end of the prompt, and the
    # sampler says in the field `block_length` how long they are.
    aligned = False

    def open(self, model: Callable, valid: Tensor) -> Session:
        """A session for a batch; valid [B, N] bool is False on padding."""
        return self.session(self, model, valid)


class _FullSession(Session):
    free_rows = True

    def logits(self, tokens: Tensor, start: int, end: int) -> Tensor:
        kwargs = self.interface.padding_arguments(self.valid)
        for name in kwargs:
            if not self.takes(name):
                shifted = ", shift_logits=True" if self.interface.shift_logits else ""
                raise TypeError(
                    f"model: its forward takes no {name}, which a padded batch needs; "
                    f"interface=FullSequence(attention_mask=None{shifted}) runs prompts of different lengths in groups"
                )
        logits = self.checked(self.call(tokens, **kwargs), tokens)
        block = self.block_of(logits, start, end)
        if not kwargs or not self.interface.shift_logits or start == 0:
            return block
        # A row whose first token this is, an empty prompt in a padded batch, has nothing but padding before it.
        begins = ~self.valid[:, start - 1]
        if not bool(begins.any()):
            return block
        first = torch.where(begins[:, None], logits[:, start], block[:, 0])
        return torch.cat([first[:, None], block[:, 1:]], 1)


@dataclass(frozen=True)
class FullSequence(Interface):
    """model(tokens [B, N]) at every evaluation; where a batch is padded (on the left), with its mask.

    attention_mask: "2d" passes attention_mask [B, N] int64; "4d" [B, 1, N, N] bool; None passes none, and
        batches of different lengths are split instead, as a model needs it that ignores its mask (Fast-dLLM's
        LLaDA, and early revisions of LLaDA's own modeling_llada.py).
    position_ids: pass position_ids [B, N] that count from each row's first token.
    """

    attention_mask: str | None = "2d"
    position_ids: bool = False
    session = _FullSession

    def __post_init__(self) -> None:
        if self.attention_mask not in ("2d", "4d", None):
            raise ValueError(f"attention_mask: must be '2d', '4d' or None, got {self.attention_mask!r}")

    @property
    def same_length(self) -> bool:
        return self.attention_mask is None

    def padding_arguments(self, valid: Tensor) -> dict[str, Tensor]:
        if bool(valid.all()):
            return {}
        arguments = {}
        if self.attention_mask == "2d":
            arguments["attention_mask"] = valid.long()
        elif self.attention_mask == "4d":
            arguments["attention_mask"] = valid[:, None, :, None] & valid[:, None, None, :]
        if self.position_ids:
            arguments["position_ids"] = (valid.long().cumsum(-1) - 1).clamp_min(0)
        return arguments


def _cropped(past: Any, length: int) -> Any:
    """The first `length` slots of a cache: one with `crop`, or layers of (key, value).

    Keys and values are [B, H, L, D] in Fast-dLLM's LLaDA and [B, L, H * D] in its Dream.
    """
    if not hasattr(past, "crop"):
        return [tuple(tensor[..., :length, :] for tensor in layer) for layer in past]
    surplus = past.get_seq_length() - length
    if surplus > 0:
        # The number to remove: transformers 5.24 takes no length any more, and earlier releases take both.
        past.crop(-surplus)
    return past


class _PrefixSession(Session):
    def begin_block(self, start: int, end: int) -> None:
        self.past = None

    def logits(self, tokens: Tensor, start: int, end: int) -> Tensor:
        # With shifted logits the position before the block predicts its first one, so it is fed again.
        first = max(0, start - 1) if self.interface.shift_logits else start
        if self.past is None or first == 0:
            output = self.call(tokens, use_cache=True)
            logits = self.checked(output, tokens)
            self.past = past_of(output)
            return self.block_of(logits, start, end)
        self.past = _cropped(self.past, first)
        fed = tokens[:, first:]
        logits = self.checked(self.call(fed, use_cache=True, **{self.cache_name: self.past}), fed)
        return self.block_of(logits, start - first, end - first)


@dataclass(frozen=True)
class PrefixCache(Interface):
    """Fast-dLLM's prefix cache: keys and values of all that stands before a block are those of its first evaluation.

    The first evaluation of a block is model(tokens, use_cache=True), whose past_key_values are cut at the
    block's start; the others are model(tokens from the block on, past_key_values=..., use_cache=True), with logits for
    what is fed. The cache is called `cache` where the model's forward calls it so (transformers since 5.24).

    shift_logits: also feeds the position before the block, whose logits predict the block's first one.

    Source: NVlabs/Fast-dLLM, llada/generate.py and dream/model/generation_utils_block.py.
    """

    session = _PrefixSession


class _DualSession(_PrefixSession):
    def logits(self, tokens: Tensor, start: int, end: int) -> Tensor:
        if self.past is None:
            return super().logits(tokens, start, end)
        first = max(0, start - 1) if self.interface.shift_logits else start
        replaced = torch.zeros_like(tokens, dtype=torch.bool)
        replaced[:, first:end] = True
        fed = tokens[:, first:end]
        # Fast-dLLM's Dream takes replace_position into account only with this flag, which its LLaDA does not have.
        flag = {"dual_cache": True} if "dual_cache" in self.parameters else {}
        output = self.call(
            fed, use_cache=True, replace_position=replaced, **flag, **{self.cache_name: self.past}
        )
        return self.block_of(self.checked(output, fed), start - first, end - first)


@dataclass(frozen=True)
class DualCache(Interface):
    """Fast-dLLM's dual cache: what stands before and after a block is cached, only the block is evaluated.

    As `PrefixCache`, and after a block's first evaluation model(block, past_key_values=..., use_cache=True,
    replace_position=[B, N] bool), which writes the block's keys and values into their place of the cache; with
    dual_cache=True where the model's forward has that parameter (Dream).
    """

    session = _DualSession


class _BlockSession(Session):
    def select(self, rows: Tensor) -> bool:
        # The cache has the rows of the last selection; transformers' caches can drop some of them.
        if not hasattr(self.past, "batch_select_indices"):
            return False
        self.past.batch_select_indices(torch.searchsorted(self._rows, rows))
        self._rows = rows
        return super().select(rows)

    def prefill(self, tokens: Tensor, length: int) -> None:
        self.past = self.interface.new_cache()
        self._rows = torch.arange(tokens.shape[0], device=tokens.device)
        if not length:
            return
        size = self.interface.block_length
        block = torch.arange(length, device=tokens.device) // size
        visible = (block[:, None] >= block[None]).to(torch.get_default_dtype())
        self._run(tokens, 0, length, visible[None], store=True)

    def _run(self, tokens: Tensor, start: int, end: int, mask: Tensor, store: bool) -> Any:
        positions = torch.arange(start, end, device=tokens.device)[None]
        return self.call(
            tokens[:, start:end],
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            store_kv=store,
            **{self.cache_name: self.past},
        )

    def _sees_all(self, tokens: Tensor, start: int, end: int) -> Tensor:
        return torch.ones(1, end - start, end, device=tokens.device)

    def logits(self, tokens: Tensor, start: int, end: int) -> Tensor:
        output = self._run(tokens, start, end, self._sees_all(tokens, start, end), store=False)
        return self.checked(output, tokens[:, start:end])

    def end_block(self, tokens: Tensor, start: int, end: int) -> None:
        self._run(tokens, start, end, self._sees_all(tokens, start, end), store=True)


def _dynamic_cache():
    from transformers import DynamicCache

    return DynamicCache()


@dataclass(frozen=True)
class BlockCache(Interface):
    """SDAR's block diffusion: blocks see themselves and those before, whose keys and values are stored when done.

    model(block, attention_mask=[1, C, end] of ones, position_ids=[1, C], past_key_values=cache, use_cache=True,
    store_kv=...): True for the prompt's whole blocks, which go first under a block-causal mask, and once
    for each finished block; False while a block is denoised. Blocks begin at multiples of the block length.

    new_cache: makes the cache; transformers' DynamicCache by default.

    Source: JetAstra/SDAR, generate.py.
    """

    new_cache: Callable[[], Any] = _dynamic_cache
    block_length: int = 0  # set by the sampler
    session = _BlockSession
    aligned = True

    def __post_init__(self) -> None:
        if self.shift_logits:
            raise ValueError("shift_logits: BlockCache has no shifted form")


class _BlockCausalSession(Session):
    free_rows = True

    def logits(self, tokens: Tensor, start: int, end: int) -> Tensor:
        fed, device = tokens[:, :end], tokens.device
        block = torch.arange(end, device=device) // self.interface.block_length
        mask = torch.zeros(end, end, dtype=self._dtype(), device=device)
        mask = mask.masked_fill(block[:, None] < block[None], -math.inf)
        positions = torch.arange(end, device=device)[None]
        output = self.call(
            fed, attention_mask=mask.expand(len(fed), 1, -1, -1), position_ids=positions, use_cache=False
        )
        return self.checked(output, fed)[:, start:end]

    def _dtype(self) -> torch.dtype:
        """The model's, as its attention adds the mask to its scores."""
        parameters = self.model.parameters() if isinstance(self.model, torch.nn.Module) else ()
        return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)


@dataclass(frozen=True)
class BlockCausal(Interface):
    """LLaDA2's block diffusion: blocks see themselves and those before, and all are read at every evaluation.

    model(tokens up to the block's end, attention_mask=[B, 1, end, end], position_ids=[1, end], use_cache=False). The
    mask is added to the scores: 0 where a position sees another, else -inf. Blocks begin at multiples of the block
    length.

    Source: inclusionAI/LLaDA2.0-mini, modeling_llada2_moe.py, generate.
    """

    block_length: int = 0  # set by the sampler
    session = _BlockCausalSession
    aligned = True

    def __post_init__(self) -> None:
        if self.shift_logits:
            raise ValueError("shift_logits: BlockCausal has no shifted form")


# As Dream's generation_utils.py calls it; padding has the position 1 there and 0 here, and nothing attends to it.
DREAM = FullSequence(shift_logits=True, attention_mask="4d", position_ids=True)
