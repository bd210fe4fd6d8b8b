"""What comes into `generate`: prompts in their forms, and whether their tokens and the sampler's are the model's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import checks
from .numbers import token_id

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def prompt_rows(prompt_ids: Any, attention_mask: Tensor | None, device: torch.device) -> list[Tensor]:
    """The prompts one by one, without padding, each [L] int64.

    Args:
        prompt_ids: [B, L] int64, or an iterable of B sequences of token ids: lists, NumPy arrays, tensors.
        attention_mask: [B, L] or None, 0 on padding; only with a tensor.
        device: where prompts go that are no tensor [B, L].

    Raises:
        TypeError, ValueError: prompt_ids or attention_mask is of a wrong type, dtype or shape, or there is no prompt.
    """
    if isinstance(prompt_ids, Tensor):
        checks.has_dtype("prompt_ids", prompt_ids, (torch.int64,))
        if prompt_ids.ndim != 2:
            raise ValueError(f"prompt_ids: shape must be [B, L], got {tuple(prompt_ids.shape)}")
        if attention_mask is None:
            rows = list(prompt_ids)
        else:
            checks.is_tensor("attention_mask", attention_mask)
            checks.has_shape("attention_mask", attention_mask, tuple(prompt_ids.shape), "as prompt_ids")
            checks.on_device("attention_mask", attention_mask, prompt_ids.device, "prompt_ids")
            rows = [row[keep.bool()] for row, keep in zip(prompt_ids, attention_mask)]
    else:
        if isinstance(prompt_ids, (str, bytes, Mapping)) or not isinstance(prompt_ids, Iterable):
            raise TypeError(
                f"prompt_ids: token ids [B, L] or a list of sequences of them expected, "
                f"got {type(prompt_ids).__name__}{_instead_of(prompt_ids)}"
            )
        if attention_mask is not None:
            raise ValueError("attention_mask: only with prompt_ids as one tensor [B, L]")
        rows = [_row(f"prompt_ids[{number}]", row, device) for number, row in enumerate(prompt_ids)]
    if not rows:
        raise ValueError("prompt_ids: at least one prompt expected, got none")
    return rows


def _instead_of(prompts: Any) -> str:
    if isinstance(prompts, (str, bytes)):
        return "; a tokenizer makes ids of a text"
    if isinstance(prompts, Mapping):
        return "; its ids are .input_ids, or ['input_ids'], and its attention_mask is an argument of its own"
    return ""


def _row(name: str, row: Any, device: torch.device) -> Tensor:
    if isinstance(row, (str, bytes, Mapping)) or not (isinstance(row, Iterable) or hasattr(row, "dtype")):
        raise TypeError(
            f"{name}: a sequence of token ids expected, got {type(row).__name__}{_instead_of(row)}"
        )
    if hasattr(row, "dtype"):  # a tensor or an array
        ids = row if isinstance(row, Tensor) else torch.as_tensor(row, device="cpu")
        if ids.ndim != 1:
            raise ValueError(f"{name}: a sequence of token ids expected, got shape {tuple(ids.shape)}")
        if ids.numel():
            checks.has_dtype(name, ids, _INTEGERS)
    else:
        ids = torch.tensor([token_id(name, one) for one in row], dtype=torch.int64, device="cpu")
    return ids.to(device, torch.int64)


def device_of(model: Callable, prompt_ids: Any) -> torch.device:
    """Where a generation takes place: with prompts [B, L], else with the model's parameters, else with the first of a
    list of prompts that is a tensor."""
    if isinstance(prompt_ids, Tensor):
        return prompt_ids.device
    if isinstance(model, torch.nn.Module):
        for parameter in model.parameters():
            return parameter.device
    if isinstance(prompt_ids, Sequence):
        for row in prompt_ids:
            if isinstance(row, Tensor):
                return row.device
    return torch.device("cpu")


def vocabulary_of(model: Callable) -> int | None:
    """How many tokens a model has embeddings for, where it says so as models of transformers do."""
    model = getattr(model, "_orig_mod", model)
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embeddings = None
    for owner, name in ((embeddings, "num_embeddings"), (getattr(model, "config", None), "vocab_size")):
        size = getattr(owner, name, None)
        if isinstance(size, int):
            return size
    return None


def check_tokens(sampler, model: Callable, rows: list[Tensor]) -> None:
    """Raise ValueError for token ids that the model has no embedding for, before it looks for one.

    Waits for the device once, for the least and the largest token of all prompts.
    """
    vocabulary = vocabulary_of(model)
    if vocabulary is not None:
        pads = () if sampler.pad_id is None else (sampler.pad_id,)
        for name, ids in (("mask_id", (sampler.mask_id,)), ("eos_id", sampler.eos_ids), ("pad_id", pads)):
            for one in ids:
                if one >= vocabulary:
                    raise ValueError(f"{name}: {one} is outside the model's vocabulary, [0, {vocabulary})")
        drawn = getattr(getattr(sampler, "decider", None), "vocab_size", 0)
        if drawn > vocabulary:
            raise ValueError(
                f"vocab_size: {type(sampler.decider).__name__} draws from {drawn} tokens, "
                f"the model has {vocabulary}"
            )
    tokens = torch.cat(rows)
    if not tokens.numel():
        return
    least, most = torch.stack(torch.aminmax(tokens)).tolist()
    if least < 0:
        raise ValueError(f"prompt_ids: token ids must not be negative, got {least}")
    if vocabulary is not None and most >= vocabulary:
        raise ValueError(f"prompt_ids: {most} is outside the model's vocabulary, [0, {vocabulary})")
