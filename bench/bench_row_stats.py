"""Cases of `row_stats`: a canvas of logits over the whole vocabulary, early, half way and at the end."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import dgemma_accel
from dgemma_accel.reference import row_stats as reference
from dgemma_accel.reference.budget import check_row_stats

from . import planted
from .cases import (
    CANVAS,
    SOFTCAP,
    TEMPERATURE,
    VOCAB,
    Case,
    Sizes,
    Variant,
    check_in_chunks,
    implementations,
    table_dtypes,
)

OUTPUT_BYTES_PER_ROW = 2 * 8 + 5 * 4


class Inputs(NamedTuple):
    """logits [R, V] before the softcap; uniform [R]; the rest are numbers."""

    logits: Tensor
    uniform: Tensor
    temperature: float
    softcap: float


def make_inputs(
    rows: int, vocab: int, fraction: float, dtype: torch.dtype, device: torch.device, seed: int
) -> Inputs:
    logits = planted.logits(rows, vocab, fraction, dtype, device, seed)
    uniform = torch.rand(rows, generator=planted.generator(device, seed + 1), device=device)
    return Inputs(logits, uniform, TEMPERATURE, SOFTCAP)


def variant(backend: str) -> Variant:
    def prepare(inputs: Inputs):
        return lambda: dgemma_accel.row_stats(
            inputs.logits,
            temperature=inputs.temperature,
            softcap=inputs.softcap,
            uniform=inputs.uniform,
            backend=backend,
        )

    return Variant(backend, prepare, capturable=backend != "reference")


def check(stats, inputs: Inputs) -> list[str]:
    def rows(span: slice) -> list[str]:
        return check_row_stats(
            type(stats)(*(field[span] for field in stats)),
            inputs.logits[span],
            temperature=inputs.temperature,
            softcap=inputs.softcap,
            uniform=inputs.uniform[span],
        )

    return check_in_chunks(rows, inputs.logits.shape[0])


def expected(inputs: Inputs) -> dict[str, Tensor]:
    """What peers are compared with; they draw their own noise, so samples are left out."""
    temperature, offset = torch.tensor(inputs.temperature), torch.tensor(0)
    parts = []
    for start in range(0, inputs.logits.shape[0], 64):
        span = slice(start, start + 64)
        out = reference(
            inputs.logits[None, span], temperature, None, inputs.uniform[span], None, offset, inputs.softcap
        )
        parts.append((out[0][0], out[2][0], out[3][0]))
    argmax, entropy, logsumexp = (torch.cat(part) for part in zip(*parts))
    return {"argmax": argmax, "entropy": entropy, "logsumexp": logsumexp}


def cases(device: torch.device, sizes: Sizes) -> tuple[list[Case], list[str]]:
    rows = sizes.rows or (64 if sizes.quick else CANVAS)
    vocab = sizes.vocab or VOCAB
    present, lines = implementations("row_stats", device)
    mixes = {"half settled": planted.MIXES["half settled"]} if sizes.quick else planted.MIXES
    found = []
    for dtype in table_dtypes(device):
        table = rows * vocab * dtype.itemsize
        for label, fraction in mixes.items():
            found.append(
                Case(
                    op="row_stats",
                    label=label,
                    shape=f"[{rows}, {vocab}]",
                    dtype=dtype,
                    bytes=table + rows * OUTPUT_BYTES_PER_ROW,
                    flops=0,
                    # The chain of peers holds about seven fp32 tables at once.
                    memory=table + 7 * rows * vocab * 4,
                    make=lambda device, seed, dtype=dtype, fraction=fraction: make_inputs(
                        rows, vocab, fraction, dtype, device, seed
                    ),
                    backends=tuple(variant(name) for name in present),
                    check=check,
                    expected=expected,
                )
            )
    return found, lines
