"""Cases of `experts`: a canvas through the 128 experts of a layer, with even and with skewed routing, and a prompt.

Each of them with the released weights, and a canvas and a prompt with FP8 and NVFP4 weights and their scales.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

import dgemma_accel
from dgemma_accel.reference import experts as reference
from dgemma_accel.reference.budget_experts import check_experts
from dgemma_accel.reference.quantization import E2M1, FP8, NVFP4, SCALE_GROUP, scale_shape

from . import planted
from .cases import (
    CANVAS,
    HIDDEN,
    Case,
    Sizes,
    Skipped,
    Variant,
    check_in_chunks,
    implementations,
    weight_dtype,
)

EXPERTS, TOP_K, WIDTH = 128, 8, 704
PROMPT = 4096
# Exponent of the skewed routing: expert n is wanted with weight 1 / n, as word frequencies are spread.
SKEW = 1.0


class Inputs(NamedTuple):
    """hidden [R, E]; index [R, K] int64; weights [R, K] fp32; gate_up [X, 2I, E]; down [X, E, I].

    The scales of quantised weights, or None.
    """

    hidden: Tensor
    index: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_scale: Tensor | None = None
    down_scale: Tensor | None = None
    gate_up_global_scale: Tensor | None = None
    down_global_scale: Tensor | None = None

    @property
    def scales(self) -> dict[str, Tensor | None]:
        return {name: value for name, value in self._asdict().items() if name.endswith("_scale")}


def need_plain_weights(inputs: Inputs) -> None:
    """Peers get the weights as the model was released with."""
    if inputs.gate_up_scale is not None:
        raise Skipped("no form of it that takes FP8 or NVFP4 weights with scales by blocks is called here")


def route(
    rows: int, experts: int, skewed: bool, noise: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """TOP_K different experts a row, and weights that sum to 1."""
    wanted = torch.arange(1, experts + 1, device=device, dtype=torch.float32).pow(-SKEW if skewed else 0.0)
    index = torch.multinomial(wanted.expand(rows, experts), TOP_K, generator=noise)
    weights = torch.rand(rows, TOP_K, generator=noise, device=device) + 0.1
    return index, weights / weights.sum(-1, keepdim=True)


def touched(rows: int, skewed: bool, draws: int = 8) -> float:
    """The share of the experts that a routing chooses, the mean of some that are drawn like the bench's."""
    device = torch.device("cpu")
    noise = planted.generator(device, 0)
    chosen = [len(route(rows, EXPERTS, skewed, noise, device)[0].unique()) for _ in range(draws)]
    return sum(chosen) / (draws * EXPERTS)


def make_inputs(
    rows: int,
    experts: int,
    width: int,
    skewed: bool,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    form: str | None = None,
) -> Inputs:
    """form: of the weights, "FP8" (scales by block), "FP8 by row" or "NVFP4"; None for `dtype`."""
    noise = planted.generator(device, seed)

    def normal(*shape: int, deviation: float) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, deviation, generator=noise)

    def matrix(*sides: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Weights that keep the size of their rows, their scales and their global scales."""
        deviation = sides[-1] ** -0.5
        if form is None:
            return normal(experts, *sides, deviation=deviation), None, None
        if form == "NVFP4":
            rows, columns = sides
            weight = torch.empty(experts, rows, columns // 2, dtype=NVFP4, device=device)
            weight.random_(256, generator=noise)
            scale = torch.rand(experts, rows, columns // SCALE_GROUP, generator=noise, device=device) + 0.5
            # Every code is as frequent.
            size = (sum(value**2 for value in E2M1) / len(E2M1)) ** 0.5
            return weight, scale.to(FP8), torch.full((experts,), deviation / size, device=device)
        # An expert at a time: there is no normal distribution in FP8, and a copy in bf16 is twice the matrix.
        weight = torch.empty(experts, *sides, dtype=FP8, device=device)
        # The few beyond the largest number would be NaN with some releases of PyTorch and that number with others.
        largest = torch.finfo(weight.dtype).max
        for expert in weight:
            expert.copy_(normal(*sides, deviation=100.0).clamp(-largest, largest))
        shape = (*weight.shape[:-1], 1) if form == "FP8 by row" else scale_shape(weight.shape)
        scale = torch.rand(shape, generator=noise, device=device) + 0.5
        return weight, scale * (deviation / 100), None

    index, weights = route(rows, experts, skewed, noise, device)
    hidden = normal(rows, HIDDEN, deviation=1.0)
    (gate_up, *gate_up_scales), (down, *down_scales) = matrix(2 * width, HIDDEN), matrix(HIDDEN, width)
    scales = (scale for pair in zip(gate_up_scales, down_scales) for scale in pair)
    return Inputs(hidden, index, weights, gate_up, down, *scales)


def variant(backend: str) -> Variant:
    # The specification asks the host which experts were chosen.
    return Variant(
        backend,
        lambda inputs: lambda: dgemma_accel.experts(*inputs[:5], **inputs.scales, backend=backend),
        capturable=backend != "reference",
    )


def check(result: Tensor, inputs: Inputs) -> list[str]:
    """The op's error budget, some rows at a time: truth is fp64, and each chunk has the plain error of its own."""
    if result.shape != inputs.hidden.shape:
        return [f"experts: shape {tuple(result.shape)} instead of {tuple(inputs.hidden.shape)}"]

    def rows(part: slice) -> list[str]:
        own = (tensor[part] for tensor in (inputs.hidden, inputs.index, inputs.weights))
        return check_experts(result[part], *own, inputs.gate_up, inputs.down, **inputs.scales)

    return check_in_chunks(rows, len(result), chunk=256)


def expected(inputs: Inputs) -> dict[str, Tensor]:
    return {"result": reference(*inputs[:5], **inputs.scales)}


def cases(device: torch.device, sizes: Sizes) -> tuple[list[Case], list[str]]:
    rows = sizes.rows or (64 if sizes.quick else CANVAS)
    # A quick run on a CPU keeps the routing and narrows the experts.
    width = WIDTH // 11 if sizes.quick and device.type == "cpu" else WIDTH
    dtype = weight_dtype(device, sizes.quick)
    present, lines = implementations("experts", device)
    numbers = EXPERTS * 3 * width * HIDDEN
    scale_bytes = 4 * sum(
        math.prod(scale_shape((EXPERTS, *sides))) for sides in ((2 * width, HIDDEN), (HIDDEN, width))
    )
    weight_bytes = {
        None: numbers * dtype.itemsize,
        "FP8": numbers + scale_bytes,
        "FP8 by row": numbers + 4 * EXPERTS * (2 * width + HIDDEN),
        "NVFP4": numbers // 2 + numbers // SCALE_GROUP + 2 * 4 * EXPERTS,
    }
    kinds = [(rows, "uniform routing", False, None), (rows, "skewed routing", True, None)]
    # A CPU has no kernel for quantised weights, and what it takes to widen them says nothing.
    if device.type == "cuda":
        kinds += [(rows, f"uniform routing, {form} weights", False, form) for form in weight_bytes if form]
        if not sizes.quick and sizes.rows is None:
            kinds.append((PROMPT, "prompt", False, None))
            kinds += [(PROMPT, f"prompt, {form} weights", False, form) for form in ("FP8", "NVFP4")]
    return [
        Case(
            op="experts",
            label=label,
            shape=f"[{rows}, {HIDDEN}] top {TOP_K} of {EXPERTS} x {width}",
            dtype=dtype,
            # Only what is chosen has to be read: of 128 experts nearly all by 256 rows of 8, fewer by fewer rows.
            bytes=round(weight_bytes[form] * touched(rows, skewed)) + 2 * rows * HIDDEN * dtype.itemsize,
            flops=2 * rows * TOP_K * 3 * width * HIDDEN,
            memory=2 * weight_bytes[form] + rows * TOP_K * (HIDDEN * 16 + 3 * width * 8),
            make=lambda device, seed, rows=rows, skewed=skewed, form=form: make_inputs(
                rows, EXPERTS, width, skewed, dtype, device, seed, form
            ),
            backends=tuple(variant(name) for name in present),
            check=check,
            expected=expected,
        )
        for rows, label, skewed, form in kinds
    ], lines
