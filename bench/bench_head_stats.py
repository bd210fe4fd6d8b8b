"""Cases of `head_stats`: the lm_head product of a canvas and the statistics of its rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import dgemma_accel
from dgemma_accel.reference.budget import check_row_stats

from . import planted
from .bench_row_stats import OUTPUT_BYTES_PER_ROW
from .cases import (
    CANVAS,
    HIDDEN,
    SOFTCAP,
    TEMPERATURE,
    VOCAB,
    Case,
    Sizes,
    Variant,
    check_in_chunks,
    implementations,
    weight_dtype,
)


class Inputs(NamedTuple):
    """hidden [R, E]; weight [V, E]; uniform [R]; the rest are numbers."""

    hidden: Tensor
    weight: Tensor
    uniform: Tensor
    temperature: float
    softcap: float


def make_inputs(
    rows: int, vocab: int, fraction: float, dtype: torch.dtype, device: torch.device, seed: int
) -> Inputs:
    weight = planted.head(vocab, HIDDEN, dtype, device, seed)
    hidden = planted.hidden_states(weight, rows, fraction, seed + 1)
    uniform = torch.rand(rows, generator=planted.generator(device, seed + 2), device=device)
    return Inputs(hidden, weight, uniform, TEMPERATURE, SOFTCAP)


def variant(backend: str) -> Variant:
    def prepare(inputs: Inputs):
        return lambda: dgemma_accel.head_stats(
            inputs.hidden,
            inputs.weight,
            softcap=inputs.softcap,
            temperature=inputs.temperature,
            uniform=inputs.uniform,
            backend=backend,
        )

    return Variant(backend, prepare, capturable=backend != "reference")


def check(result, inputs: Inputs) -> list[str]:
    """The logits are those of the product within its dtype's rounding; the statistics are those of these logits."""
    logits, stats = result
    rows, dtype = inputs.hidden.shape[0], inputs.weight.dtype
    problems = []
    if tuple(logits.shape) != (rows, inputs.weight.shape[0]) or logits.dtype != dtype:
        return [
            f"logits: {tuple(logits.shape)} {logits.dtype} instead of {(rows, inputs.weight.shape[0])} {dtype}"
        ]
    plain = torch.nn.functional.linear(inputs.hidden, inputs.weight)
    for start in range(0, rows, 64):
        span = slice(start, start + 64)
        truth = inputs.hidden[span].float() @ inputs.weight.float().T
        error = (logits[span].float() - truth).abs()
        allowed = 2 * (plain[span].float() - truth).abs().max() + torch.finfo(dtype).eps * truth.abs()
        bad = ~(error <= allowed)
        if bool(bad.any()):
            problems.append(
                f"rows {start}..: {int(bad.sum())} logits off by more than allowed, worst {float(error.max()):.3e}"
            )

    def stat_rows(span: slice) -> list[str]:
        return check_row_stats(
            type(stats)(*(field[span] for field in stats)),
            logits[span],
            temperature=inputs.temperature,
            softcap=inputs.softcap,
            uniform=inputs.uniform[span],
        )

    return problems + check_in_chunks(stat_rows, rows)


def expected(inputs: Inputs) -> dict[str, Tensor]:
    logits, stats = variant("reference").prepare(inputs)()
    capped = inputs.softcap * torch.tanh(logits.float() / inputs.softcap)
    return {
        "logits": logits,
        "argmax": stats.argmax,
        "entropy": stats.entropy,
        # Of the capped logits without temperature, which is what a cross-entropy kernel computes.
        "plain_logsumexp": torch.logsumexp(capped, -1),
    }


def cases(device: torch.device, sizes: Sizes) -> tuple[list[Case], list[str]]:
    rows = sizes.rows or (64 if sizes.quick else CANVAS)
    vocab = sizes.vocab or (VOCAB // 16 if sizes.quick and device.type == "cpu" else VOCAB)
    dtype = weight_dtype(device, sizes.quick)
    present, lines = implementations("head_stats", device)
    mixes = {"half settled": planted.MIXES["half settled"]} if sizes.quick else planted.MIXES
    weight_bytes, table = vocab * HIDDEN * dtype.itemsize, rows * vocab * dtype.itemsize
    return [
        Case(
            op="head_stats",
            label=label,
            shape=f"[{rows}, {HIDDEN}] x [{HIDDEN}, {vocab}]",
            dtype=dtype,
            bytes=weight_bytes + table + rows * HIDDEN * dtype.itemsize + rows * OUTPUT_BYTES_PER_ROW,
            flops=2 * rows * vocab * HIDDEN,
            memory=weight_bytes + vocab * HIDDEN * 4 + 8 * rows * vocab * 4,
            make=lambda device, seed, fraction=fraction: make_inputs(
                rows, vocab, fraction, dtype, device, seed
            ),
            backends=tuple(variant(name) for name in present),
            check=check,
            expected=expected,
        )
        for label, fraction in mixes.items()
    ], lines
