"""Cases of `experts`: one canvas through the 128 experts of a layer, with even and with skewed routing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import dgemma_accel
from dgemma_accel.reference import experts as reference

from . import planted
from .cases import CANVAS, HIDDEN, Case, Sizes, Variant, implementations, weight_dtype

EXPERTS, TOP_K, WIDTH = 128, 8, 704
# Exponent of the skewed routing: expert n is wanted with weight 1 / n, as word frequencies are spread.
SKEW = 1.0


class Inputs(NamedTuple):
    """hidden [R, E]; index [R, K] int64; weights [R, K] fp32; gate_up [X, 2I, E]; down [X, E, I]."""

    hidden: Tensor
    index: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor


def route(rows: int, experts: int, skewed: bool, noise: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
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
    public = getattr(dgemma_accel, "experts", None)

    def prepare(inputs: Inputs):
        if public is None:
            return lambda: reference(*inputs)
        return lambda: public(*inputs, backend=backend)

    return Variant(backend, prepare, capturable=public is not None and backend != "reference")


def _plain(inputs: Inputs) -> Tensor:
    """The mixture in the weights' own dtype, expert by expert, as the reference model's eager path computes it."""
    output = torch.zeros_like(inputs.hidden)
    for expert in inputs.index.unique().tolist():
        row, slot = torch.where(inputs.index == expert)
        gate, up = (inputs.hidden[row] @ inputs.gate_up[expert].T).chunk(2, dim=-1)
        result = (torch.nn.functional.gelu(gate, approximate="tanh") * up) @ inputs.down[expert].T
        output.index_add_(0, row, (result * inputs.weights[row, slot, None]).to(output.dtype))
    return output


def check(result: Tensor, inputs: Inputs) -> list[str]:
    """At most twice the error of the eager path in the weights' dtype, against the fp32 reference."""
    truth = reference(inputs.hidden.float(), *inputs[1:])
    if result.shape != truth.shape:
        return [f"result: shape {tuple(result.shape)} instead of {tuple(truth.shape)}"]
    plain = (_plain(inputs).float() - truth).abs().max()
    error = (result.float() - truth).abs()
    allowed = 2 * plain + torch.finfo(inputs.hidden.dtype).eps * (truth.abs() + 1)
    bad = ~(error <= allowed)
    if not bool(bad.any()):
        return []
    count, worst = int(bad.sum()), float(error.max())
    return [f"result: {count} of {bad.numel()} values off by more than allowed, worst {worst:.3e}"]


def expected(inputs: Inputs) -> dict[str, Tensor]:
    return {"result": reference(*inputs)}


def cases(device: torch.device, sizes: Sizes) -> tuple[list[Case], list[str]]:
    rows = sizes.rows or (64 if sizes.quick else CANVAS)
    # A quick run on a CPU keeps the routing and narrows the experts.
    width = WIDTH // 11 if sizes.quick and device.type == "cpu" else WIDTH
    dtype = weight_dtype(device, sizes.quick)
    present, lines = implementations("experts", device)
    weight_bytes = EXPERTS * 3 * width * HIDDEN * dtype.itemsize
    return [
        Case(
            op="experts",
            label=label,
            shape=f"[{rows}, {HIDDEN}] top {TOP_K} of {EXPERTS} x {width}",
            dtype=dtype,
            # Counted as if every expert were chosen at least once, which 256 rows of 8 nearly always do.
            bytes=weight_bytes + 2 * rows * HIDDEN * dtype.itemsize,
            flops=2 * rows * TOP_K * 3 * width * HIDDEN,
            memory=2 * weight_bytes + rows * TOP_K * HIDDEN * 16,
            make=lambda device, seed, skewed=skewed: make_inputs(rows, EXPERTS, width, skewed, dtype, device, seed),
            backends=tuple(variant(name) for name in present),
            check=check,
            expected=expected,
        )
        for label, skewed in (("uniform routing", False), ("skewed routing", True))
    ], lines
