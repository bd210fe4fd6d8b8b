"""Cases of `soft_embedding`: the expected embedding of every row, which self-conditioning feeds back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import dgemma_accel
from dgemma_accel.reference.budget import check_soft_embedding
from dgemma_accel.reference.soft_embedding import tempered

from . import planted
from .cases import (
    CANVAS,
    HIDDEN,
    SOFTCAP,
    TEMPERATURE,
    VOCAB,
    Case,
    Sizes,
    Variant,
    implementations,
    weight_dtype,
)

# Columns of the embedding that are checked at once.
SLICE = 1024
# Fraction of settled rows by label, and what a caller who gives up exactness for speed would allow a tile to hold.
FRACTIONS = {"fresh noise": 0.0, "quarter settled": 0.25, "half settled": 0.5, "three quarters settled": 0.75,
             "settled": 1.0}  # fmt: skip
TOLERANCES = (0.0, 1e-5, 1e-3)


class Inputs(NamedTuple):
    """logits [R, V] and their statistics; weight [V, E]; the rest are numbers."""

    logits: Tensor
    stats: dgemma_accel.RowStats
    weight: Tensor
    temperature: float
    softcap: float
    tolerance: float


def make_inputs(
    rows: int,
    vocab: int,
    fraction: float,
    tolerance: float,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> Inputs:
    weight = planted.head(vocab, HIDDEN, dtype, device, seed)
    logits = planted.logits(rows, vocab, fraction, dtype, device, seed + 1)
    uniform = torch.rand(rows, generator=planted.generator(device, seed + 2), device=device)
    stats = dgemma_accel.row_stats(logits, temperature=TEMPERATURE, softcap=SOFTCAP, uniform=uniform)
    return Inputs(logits, stats, weight, TEMPERATURE, SOFTCAP, tolerance)


def variant(backend: str) -> Variant:
    def prepare(inputs: Inputs):
        return lambda: dgemma_accel.soft_embedding(
            inputs.logits,
            inputs.stats,
            inputs.weight,
            softcap=inputs.softcap,
            temperature=inputs.temperature,
            tolerance=inputs.tolerance,
            backend=backend,
        )

    return Variant(backend, prepare, capturable=backend != "reference")


def check(result: Tensor, inputs: Inputs) -> list[str]:
    if result.shape != (inputs.logits.shape[0], inputs.weight.shape[1]):
        return [f"result: shape {tuple(result.shape)}"]
    problems = []
    # By slices of the embedding: a copy of all of it in fp64 is 6 GB.
    for start in range(0, result.shape[1], SLICE):
        span = slice(start, start + SLICE)
        problems += check_soft_embedding(
            result[:, span],
            inputs.logits,
            inputs.weight[:, span],
            inputs.temperature,
            inputs.softcap,
            inputs.tolerance,
        )
    return problems


def relative_error(result: Tensor, inputs: Inputs) -> float:
    """The largest error of an element against fp32, by the largest element."""
    worst = largest = 0.0
    x = tempered(inputs.logits[None], torch.tensor(inputs.temperature), inputs.softcap)[0]
    probabilities = torch.softmax(x, -1, out=x)
    for start in range(0, result.shape[1], SLICE):
        truth = probabilities @ inputs.weight[:, start : start + SLICE].float()
        worst = max(worst, float((result[:, start : start + SLICE] - truth).abs().max()))
        largest = max(largest, float(truth.abs().max()))
    return worst / max(largest, 1e-30)


def expected(inputs: Inputs) -> dict[str, Tensor]:
    return {"result": variant("reference").prepare(inputs)()}


def cases(device: torch.device, sizes: Sizes) -> tuple[list[Case], list[str]]:
    rows = sizes.rows or (64 if sizes.quick else CANVAS)
    vocab = sizes.vocab or (VOCAB // 16 if sizes.quick and device.type == "cpu" else VOCAB)
    dtype = weight_dtype(device, sizes.quick)
    present, lines = implementations("soft_embedding", device)
    kinds = [(label, tolerance) for tolerance in TOLERANCES for label in FRACTIONS]
    kinds = [("half settled", 0.0)] if sizes.quick else kinds
    weight_bytes, table = vocab * HIDDEN * dtype.itemsize, rows * vocab * dtype.itemsize
    return [
        Case(
            op="soft_embedding",
            label=label + (f", tolerance {tolerance:g}" if tolerance else ""),
            shape=f"[{rows}, {vocab}] x [{vocab}, {HIDDEN}]",
            dtype=dtype,
            # Of the whole product; an implementation that leaves out empty tiles may go below this floor.
            bytes=weight_bytes + table + rows * HIDDEN * dtype.itemsize,
            flops=2 * rows * vocab * HIDDEN,
            memory=weight_bytes + vocab * HIDDEN * 4 + vocab * SLICE * 8 + 5 * rows * vocab * 8,
            make=lambda device, seed, fraction=FRACTIONS[label], tolerance=tolerance: make_inputs(
                rows, vocab, fraction, tolerance, dtype, device, seed
            ),
            backends=tuple(variant(name) for name in present),
            check=check,
            expected=expected,
            detail=lambda result, inputs, fraction=FRACTIONS[label]: {
                "settled": fraction,
                "tolerance": inputs.tolerance,
                "relative_error": relative_error(result, inputs),
            },
        )
        for label, tolerance in kinds
    ], lines
