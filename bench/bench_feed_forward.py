"""Cases of `feed_forward`: a canvas through a layer's dense MLP, router and experts, side by side and in turn."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dgemma_accel.branches import in_turn
from dgemma_accel.ops.feed_forward import feed_forward
from dgemma_accel.reference.budget_experts import check_experts
from dgemma_accel.reference.feed_forward import FeedForwardCall, choose

from . import bench_experts, planted
from .bench_experts import EXPERTS, TOP_K, WIDTH
from .cases import CANVAS, HIDDEN, Case, Sizes, Variant, check_in_chunks, implementations, weight_dtype

DENSE_WIDTH = 2112
FORMS = {"bf16 experts": None, "FP8 experts": "FP8", "NVFP4 experts": "NVFP4"}


class Inputs(NamedTuple):
    """dense, routed [R, E]; gate, up [F, E]; dense_down [E, F]; router [X, E]; expert_scale [X]; the experts'."""

    dense: Tensor
    routed: Tensor
    gate: Tensor
    up: Tensor
    dense_down: Tensor
    router: Tensor
    expert_scale: Tensor
    experts: bench_experts.Inputs

    def call(self, backend: str) -> tuple[Tensor, Tensor]:
        own = (self.gate, self.up, self.dense_down, self.router, self.expert_scale)
        matrices = (self.experts.gate_up, self.experts.down)
        rows = (self.dense, self.routed, self.experts.hidden)
        call = FeedForwardCall(*rows, *own, *matrices, TOP_K, "gelu_tanh", **self.experts.scales)
        return feed_forward(call, backend)


def make_inputs(
    rows: int, experts: int, width: int, dense_width: int, dtype: torch.dtype, device: torch.device, seed: int,
    form: str | None = None,
) -> Inputs:  # fmt: skip
    noise = planted.generator(device, seed)

    def normal(*shape: int, deviation: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, deviation, generator=noise)

    small = HIDDEN**-0.5
    return Inputs(
        normal(rows, HIDDEN),
        normal(rows, HIDDEN),
        normal(dense_width, HIDDEN, deviation=small),
        normal(dense_width, HIDDEN, deviation=small),
        normal(HIDDEN, dense_width, deviation=dense_width**-0.5),
        normal(experts, HIDDEN, deviation=small),
        torch.ones(experts, dtype=dtype, device=device),
        bench_experts.make_inputs(rows, experts, width, False, dtype, device, seed + 1, form),
    )


def _in_turn(inputs: Inputs) -> tuple[Tensor, Tensor]:
    with in_turn():
        return inputs.call("triton")


def variants(present: list[str]) -> tuple[Variant, ...]:
    found = [
        # The specification asks the host which experts were chosen.
        Variant(
            name,
            lambda inputs, name=name: lambda: inputs.call(name),
            capturable=name != "reference",
        )
        for name in present
    ]
    if "triton" in present:
        found.append(Variant("triton in turn", lambda inputs: lambda: _in_turn(inputs)))
    return tuple(found)


def check(results: tuple[Tensor, Tensor], inputs: Inputs) -> list[str]:
    """The budgets of `experts`, for which the dense MLP is an expert that all rows have.

    The choice is that of the very product that the op begins with: near a tie another one may choose otherwise.
    """
    (mlp, mixture), given = results, inputs.experts
    index, weights = choose(inputs.routed @ inputs.router.T, inputs.expert_scale, TOP_K)
    both, matrices = torch.cat([inputs.gate, inputs.up])[None], (given.gate_up, given.down)

    def rows(part: slice) -> list[str]:
        dense, hidden = inputs.dense[part], given.hidden[part]
        all_rows = index.new_zeros(len(dense), 1), weights.new_ones(len(dense), 1)
        return [
            *check_experts(mlp[part], dense, *all_rows, both, inputs.dense_down[None]),
            *check_experts(mixture[part], hidden, index[part], weights[part], *matrices, **given.scales),
        ]

    return check_in_chunks(rows, len(inputs.dense), chunk=256)


def cases(device: torch.device, sizes: Sizes) -> tuple[list[Case], list[str]]:
    if device.type == "cpu":
        return [], ["feed_forward: a CPU has no streams for an MLP and experts to run side by side on"]
    rows, dtype = sizes.rows or CANVAS, weight_dtype(device)
    present, lines = implementations("feed_forward", device)
    plain = {case.label: case for case in bench_experts.cases(device, Sizes(rows=rows))[0]}
    dense = 3 * DENSE_WIDTH * HIDDEN
    found = []
    for label, form in FORMS.items():
        mixture = plain["uniform routing" + (f", {form} weights" if form else "")]
        found.append(
            Case(
                op="feed_forward",
                label=label,
                shape=f"[{rows}, {HIDDEN}] MLP {DENSE_WIDTH}, top {TOP_K} of {EXPERTS} x {WIDTH}",
                dtype=dtype,
                bytes=mixture.bytes + (dense + EXPERTS * HIDDEN + 3 * rows * HIDDEN) * dtype.itemsize,
                flops=mixture.flops + 2 * rows * (dense + EXPERTS * HIDDEN),
                memory=mixture.memory + 3 * dense * 8 + 64 * rows * HIDDEN,
                make=lambda device, seed, form=form: make_inputs(
                    rows, EXPERTS, WIDTH, DENSE_WIDTH, dtype, device, seed, form
                ),
                backends=variants([name for name in present if name != "reference"] or present),
                check=check,
            )
        )
    return found, lines
