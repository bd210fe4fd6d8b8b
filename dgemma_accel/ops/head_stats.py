"""`head_stats`: the lm_head product and the statistics of its rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends import choose, pick, requirements
from . import checks
from .registration import operator
from .row_stats import RowStats, fields_of_shape, raise_for_rows_without_a_distribution


@operator("head_stats")
def _head_stats(
    hidden: Tensor,
    weight: Tensor,
    temperature: Tensor,
    stats_temperature: Tensor | None,
    uniform: Tensor | None,
    seed: Tensor | None,
    offset: Tensor,
    softcap: float | None,
    keep_logits: bool,
    check: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    checks.values_in("temperature", temperature, 0.0, math.inf, high_open=True, force=check)
    checks.values_in(
        "stats_temperature", stats_temperature, 0.0, math.inf, low_open=True, high_open=True, force=check
    )
    checks.values_in("uniform", uniform, 0.0, 1.0, high_open=True, force=check)
    needs = requirements(hidden, dtype=weight.dtype, vocab=weight.shape[0])
    if not keep_logits:
        module = choose("head_stats", backend, needs).implementation.module
        alone = getattr(module, "head_stats_without_logits", None)
        if alone is not None:
            fields = alone(hidden, weight, temperature, stats_temperature, uniform, seed, offset, softcap)
            return hidden.new_empty(0), *fields
        from ..native.head_stats_sliced import head_stats_sliced

        sliced = head_stats_sliced(
            hidden, weight, temperature, stats_temperature, uniform, seed, offset, softcap, backend
        )
        return hidden.new_empty(0), *sliced
    run = pick("head_stats", backend, needs)
    return tuple(run(hidden, weight, temperature, stats_temperature, uniform, seed, offset, softcap))


@_head_stats.register_fake
def _(
    hidden,
    weight,
    temperature,
    stats_temperature,
    uniform,
    seed,
    offset,
    softcap,
    keep_logits,
    check,
    backend,
):
    shape = hidden.shape[:-1]
    logits = hidden.new_empty(*shape, weight.shape[0]) if keep_logits else hidden.new_empty(0)
    integers = [logits.new_empty(shape, dtype=torch.int64) for _ in range(2)]
    floats = [logits.new_empty(shape, dtype=torch.float32) for _ in range(5)]
    return (logits, *integers, *floats)


def check_weight(weight: Tensor, other: Tensor, name: str) -> None:
    """Raise unless `weight` is a [V, E] table on the device and of the dtype of `other` (called `name`)."""
    checks.is_tensor("weight", weight)
    if weight.ndim != 2 or weight.shape[0] < 1:
        raise ValueError(f"weight: shape must be [V, E] with V >= 1, got {tuple(weight.shape)}")
    checks.has_dtype("weight", weight, (other.dtype,))
    checks.on_device("weight", weight, other.device, name)


def head_stats(
    hidden: Tensor,
    weight: Tensor,
    *,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    stats_temperature: float | Tensor | None = None,
    uniform: Tensor | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    keep_logits: bool = True,
    check: bool = False,
    backend: str = "auto",
) -> tuple[Tensor | None, RowStats]:
    """logits = hidden @ weight^T in the model's dtype, and `row_stats` of them.

    The logits are rounded to the dtype of `weight` before softcap and temperature, as the model's lm_head does.

    Args:
        hidden: [..., E] bf16, fp16 or fp32, the last hidden states.
        weight: [V, E] of the same dtype and device, the lm_head (tied to the embedding).
        keep_logits: False returns None for the logits and never holds more than a slice of them; what holds a
            sample (a tile in the Triton backend, a slice of the vocabulary in the others) is computed twice.
            For callers without self-conditioning.
        The others as in `row_stats`.

    Returns:
        (logits [..., V] in the dtype of `weight`, without softcap or temperature, or None;
        `RowStats` of shape [...]).

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value.
        backends.BackendError: the backend named cannot run this call.

    Source: the end of DiffusionGemmaForBlockDiffusion.forward in transformers' modeling_diffusion_gemma.py.
    """
    checks.is_tensor("hidden", hidden)
    checks.has_dtype("hidden", hidden, checks.FLOAT_DTYPES)
    if hidden.ndim < 1 or hidden.shape[-1] < 1:
        raise ValueError(f"hidden: shape must be [..., E] with E >= 1, got {tuple(hidden.shape)}")
    check_weight(weight, hidden, "hidden")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: shape must be [V, {hidden.shape[-1]}] like hidden, got {tuple(weight.shape)}"
        )
    shape, device = tuple(hidden.shape[:-1]), hidden.device
    keep = checks.may_keep_numbers(hidden)
    temperature = checks.number_or_rows("temperature", temperature, shape, device, keep=keep)
    if stats_temperature is not None:
        stats_temperature = checks.number_or_rows(
            "stats_temperature", stats_temperature, shape, device, low_open=True, keep=keep
        )
    softcap = checks.softcap_value(softcap)
    checks.is_bool("keep_logits", keep_logits)
    checks.is_bool("check", check)
    checks.is_string("backend", backend)
    uniform, seed, offset = checks.uniform_or_seed(uniform, seed, offset, shape, device, keep=keep)
    rows = hidden.reshape(1, -1, hidden.shape[-1]) if hidden.ndim != 3 else hidden
    logits, *fields = _head_stats(
        rows,
        weight,
        temperature,
        stats_temperature,
        uniform,
        seed,
        offset,
        softcap,
        keep_logits,
        check,
        backend,
    )
    stats = RowStats(*fields_of_shape(fields, shape))
    if check:
        raise_for_rows_without_a_distribution(stats)
    return (logits.reshape(*shape, weight.shape[0]) if keep_logits else None), stats
