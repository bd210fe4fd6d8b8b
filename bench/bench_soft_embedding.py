"""Cases of `soft_embedding`: the expected embedding of every row, which self-conditioning feeds back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import dgemma_accel
from dgemma_accel.reference import soft_embedding as reference

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


class Inputs(NamedTuple):
    """logits [R, V] and their statistics; weight [V, E]; the rest are numbers."""

    logits: Tensor
    stats: dgemma_accel.RowStats
    weight: Tensor
    temperature: float
    softcap: float


def make_inputs(rows: int, vocab: int, fraction: float, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    weight = planted.head(vocab, HIDDEN, dtype, device, seed)
    logits = planted.logits(rows, vocab, fraction, dtype, device, seed + 1)
    uniform = torch.rand(rows, generator=planted.generator(device, seed + 2), device=device)
    stats = dgemma_accel.row_stats(logits, temperature=TEMPERATURE, softcap=SOFTCAP, uniform=uniform)
    return Inputs(logits, stats, weight, TEMPERATURE, SOFTCAP)


def _reference(inputs: Inputs, exact: bool = False) -> Tensor:
    temperature = torch.tensor(inputs.temperature)
    return reference(inputs.logits[None], inputs.weight, temperature, inputs.softcap, exact)[0]


def variant(backend: str) -> Variant:
    public = getattr(dgemma_accel, "soft_embedding", None)

    def prepare(inputs: Inputs):
        if public is None:
            return lambda: _reference(inputs)
        return lambda: public(
            inputs.logits, inputs.stats, inputs.weight, softcap=inputs.softcap, temperature=inputs.temperature,
            backend=backend,
        )

    return Variant(backend, prepare, capturable=backend != "reference")


def check(result: Tensor, inputs: Inputs) -> list[str]:
    """At most twice the error of the reference model's own roundings, against fp64."""
    truth = torch.empty(result.shape, dtype=torch.float64, device=result.device)
    temperature = torch.tensor(inputs.temperature, dtype=torch.float64)
    if tuple(truth.shape) != (inputs.logits.shape[0], inputs.weight.shape[1]):
        return [f"result: shape {tuple(result.shape)}"]
    x = inputs.softcap * torch.tanh(inputs.logits.double() / inputs.softcap) / temperature.to(result.device)
    probabilities = torch.softmax(x, -1)
    del x
    # By slices of the embedding: a copy of all of it in fp64 is 6 GB.
    for start in range(0, truth.shape[1], 256):
        span = slice(start, start + 256)
        truth[:, span] = probabilities @ inputs.weight[:, span].double()
    plain = (_reference(inputs, exact=True).double() - truth).abs().max()
    error = (result.double() - truth).abs()
    allowed = 2 * plain + torch.finfo(inputs.weight.dtype).eps * truth.abs()
    bad = ~(error <= allowed)
    if not bool(bad.any()):
        return []
    return [f"result: {int(bad.sum())} of {bad.numel()} values off by more than allowed, worst {float(error.max()):.3e}"]


def expected(inputs: Inputs) -> dict[str, Tensor]:
    return {"result": _reference(inputs)}


def cases(device: torch.device, sizes: Sizes) -> tuple[list[Case], list[str]]:
    rows = sizes.rows or (64 if sizes.quick else CANVAS)
    vocab = sizes.vocab or (VOCAB // 16 if sizes.quick and device.type == "cpu" else VOCAB)
    dtype = weight_dtype(device, sizes.quick)
    present, lines = implementations("soft_embedding", device)
    mixes = {"half settled": planted.MIXES["half settled"]} if sizes.quick else planted.MIXES
    weight_bytes, table = vocab * HIDDEN * dtype.itemsize, rows * vocab * dtype.itemsize
    return [
        Case(
            op="soft_embedding",
            label=label,
            shape=f"[{rows}, {vocab}] x [{vocab}, {HIDDEN}]",
            dtype=dtype,
            bytes=weight_bytes + table + rows * HIDDEN * dtype.itemsize,
            flops=2 * rows * vocab * HIDDEN,
            memory=weight_bytes + vocab * HIDDEN * 4 + 5 * rows * vocab * 8,
            make=lambda device, seed, fraction=fraction: make_inputs(rows, vocab, fraction, dtype, device, seed),
            backends=tuple(variant(name) for name in present),
            check=check,
            expected=expected,
        )
        for label, fraction in mixes.items()
    ], lines
