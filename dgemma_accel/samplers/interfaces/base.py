"""What an interface and its session are, and how a model's answer is read."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..numbers import check_flag


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


_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _parameters_of(model: Callable) -> dict[str, inspect.Parameter]:
    """The parameters that a model's `forward`, or a plain callable, declares; none where it has no signature.

    Where it hands all arguments on, those of the model inside come with them.
    """
    # A module that torch.compile wraps declares (*args, **kwargs).
    model = getattr(model, "_orig_mod", model)
    try:
        declared = dict(inspect.signature(getattr(model, "forward", model)).parameters)
    except (TypeError, ValueError):  # a callable without a signature
        declared = {}
    inside = _inside(model, declared)
    return declared if inside is None else _parameters_of(inside) | declared


def _inside(model: Callable, declared: dict[str, inspect.Parameter]) -> torch.nn.Module | None:
    """The model that another one, with these parameters, wraps; None where none can be told."""
    if not isinstance(model, torch.nn.Module):
        return None
    # PEFT names the parameters of a task, and hands all others on.
    base = getattr(model, "get_base_model", None)
    if callable(base):
        inside = base()
        return None if inside is model else inside
    children = list(model.children())
    hands_on = declared and all(parameter.kind in _ANY for parameter in declared.values())
    return children[0] if hands_on and len(children) == 1 else None


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
        kinds = [parameter.kind for parameter in self.parameters.values()]
        self.takes_any = not kinds or inspect.Parameter.VAR_KEYWORD in kinds
        # Asked of the model, not of transformers: published code keeps the earlier name under every release.
        renamed = "cache" in self.parameters and "past_key_values" not in self.parameters
        self.cache_name = "cache" if renamed else "past_key_values"

    def takes(self, name: str) -> bool:
        """Whether the model can be given an argument of this name, as far as it says."""
        return self.takes_any or name in self.parameters

    def select(self, rows: Tensor) -> bool:
        """From now on the tokens fed are those of the batch's `rows` [R] int64, rising; False where that cannot be."""
        self.valid = self._valid_of_all[rows]
        return True

    def call(self, tokens: Tensor, **kwargs) -> Any:
        for name in kwargs:
            if not self.takes(name):
                interface = type(self.interface).__name__
                raise TypeError(f"model: its forward takes no {name}, which {interface}() calls it with")
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

    def prefill(self, tokens: Tensor, length: int) -> Tensor | None:
        """Called once, before the first block, which starts at `length`.

        Returns the logits [B, V] of the first block's first token, where the prompt alone decides it; else None.
        """

    def begin_block(self, start: int, end: int) -> None:
        """Called before the first evaluation of a block."""

    def logits(self, tokens: Tensor, start: int, end: int) -> Tensor:
        """Logits [B, end - start, V] of a block of tokens [B, N]."""
        raise NotImplementedError

    def end_block(self, tokens: Tensor, start: int, end: int) -> Tensor | None:
        """Called when a block is done and another follows.

        Returns the logits [B, V] of the next block's first token, where what is before it alone decides it; else None.
        """


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
    # Where `prefill` and `end_block` give the logits of a block's first token, it is drawn as others are, at the
    # sampler's temperature (no filter applies); else it is the most probable one.
    draws_first_token = False

    def __post_init__(self) -> None:
        check_flag(self, "shift_logits")

    def fitted(self, block_length: int | None, mask_id: int) -> Interface:
        """The interface as a sampler with these numbers uses it."""
        if not self.aligned:
            return self
        if block_length is None:
            name = type(self).__name__
            raise ValueError(f"block_length: {name}() needs the length of the model's blocks, got None")
        return replace(self, block_length=block_length)

    def fed_length(self, length: int) -> int:
        """How many tokens there are, masks behind the text included, for a text of `length`."""
        return math.ceil(length / self.block_length) * self.block_length if self.aligned else length

    def open(self, model: Callable, valid: Tensor) -> Session:
        """A session for a batch; valid [B, N] bool is False on padding."""
        return self.session(self, model, valid)
