"""Cases of `experts`: a canvas through the 128 experts of a layer, with even and with skewed routing, and a prompt."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import dgemma_accel
from dgemma_accel.reference import experts as reference
from dgemma_accel.reference.budget_experts import check_experts

from . import planted
from .cases import CANVAS, HIDDEN, Case, Sizes, Variant, check_in_chunks, implementations, weight_dtype

EXPERTS, TOP_K, WIDTH = 128, 8, 704
PROMPT = 4096
# Exponent of the skewed routing: expert n is wanted with weight 1 / n, as word frequencies are spread.
SKEW = 1.0


class Inputs(NamedTuple):
    """hidden [R, E]; index [R, K] int64; weights [R, K] fp32; gate_up [X, 2I, E]; down [X, E, I]."""

    hidden: Tensor
    index: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor


def route(
    rows: int, experts: int, skewed: bool, noise: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """TOP_K different experts a row, and weights that sum to 1."""
    wanted = torch.arange(1, experts + 1, device=device, dtype=torch.float32).pow(-SKEW if skewed else 0.0)
    index = torch.multinomial(wanted.expand(rows, experts), TOP_K, generator=noise)
    weights = torch.rand(rows, TOP_K, generator=noise, device=device) + 0.1
    return index, weights / weights.sum(-1, keepdim=True)


def make_inputs(
    rows: int, experts: int, width: int, skewed: bool, dtype: torch.dtype, device: torch.device, seed: int
) -> Inputs:
    noise = planted.generator(device, seed)

    def normal(*shape: int, deviation: float) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, deviation, generator=noise)

    index, weights = route(rows, experts, skewed, noise, device)
    return Inputs(
        hidden=normal(rows, HIDDEN, deviation=1.0),
        index=index,
        weights=weights,
        gate_up=normal(experts, 2 * width, HIDDEN, deviation=HIDDEN**-0.5),
        down=normal(experts, HIDDEN, width, deviation=width**-0.5),
    )


def variant(backend: str) -> Variant:
    # The specification asks the host which experts were chosen.
    return Variant(
        backend,
        lambda inputs: lambda: dgemma_accel.experts(*inputs, backend=backend),
        capturable=backend != "reference",
    )


def check(result: Tensor, inputs: Inputs) -> list[str]:
    """The op's error budget, some rows at a time: truth is fp64, and each chunk has the plain error of its own."""
    if result.shape != inputs.hidden.shape:
        return [f"experts: shape {tuple(result.shape)} instead of {tuple(inputs.hidden.shape)}"]

    def rows(part: slice) -> list[str]:
        own = (tensor[part] for tensor in (inputs.hidden, inputs.index, inputs.weights))
        return check_experts(result[part], *own, inputs.gate_up, inputs.down)

    return check_in_chunks(rows, len(result), chunk=256)


def expected(inputs: Inputs) -> dict[str, Tensor]:
    return {"result": reference(*inputs)}


def cases(device: torch.device, sizes: Sizes) -> tuple[list[Case], list[str]]:
    rows = sizes.rows or (64 if sizes.quick else CANVAS)
    # A quick run on a CPU keeps the routing and narrows the experts.
    width = WIDTH // 11 if sizes.quick and device.type == "cpu" else WIDTH
    dtype = weight_dtype(device, sizes.quick)
    present, lines = implementations("experts", device)
    weight_bytes = EXPERTS * 3 * width * HIDDEN * dtype.itemsize
    kinds = [(rows, "uniform routing", False), (rows, "skewed routing", True)]
    if device.type == "cuda" and not sizes.quick and sizes.rows is None:
        kinds.append((PROMPT, "prompt", False))
    return [
        Case(
            op="experts",
            label=label,
            shape=f"[{rows}, {HIDDEN}] top {TOP_K} of {EXPERTS} x {width}",
            dtype=dtype,
            # Counted as if every expert were chosen at least once, which 256 rows of 8 nearly always do.
            bytes=weight_bytes + 2 * rows * HIDDEN * dtype.itemsize,
            flops=2 * rows * TOP_K * 3 * width * HIDDEN,
            memory=2 * weight_bytes + rows * TOP_K * (HIDDEN * 16 + 3 * width * 8),
            make=lambda device, seed, rows=rows, skewed=skewed: make_inputs(
                rows, EXPERTS, width, skewed, dtype, device, seed
            ),
            backends=tuple(variant(name) for name in present),
            check=check,
            expected=expected,
        )
        for rows, label, skewed in kinds
    ], lines
