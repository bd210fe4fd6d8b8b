"""The error budget of `experts`; see `budget`."""

from __future__ import annotations

import torch
from torch import Tensor

from .autocast import without_autocast
from .budget import _within
from .experts import activate, experts
from .quantization import dequantize, quantize_rows


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight.T; in fp32, which matrix units do not have, one term after the other as the kernels add them.

    A CPU's library adds short sums to each other, and the error of 600 terms is a third.
    """
    if rows.dtype != torch.float32:
        return rows @ weight.T
    total = torch.zeros(rows.shape[0], weight.shape[0], device=rows.device)
    for column, factor in zip(rows.unbind(1), weight.unbind(1)):
        total.addr_(column, factor)
    return total


@without_autocast
def check_experts(
    result: Tensor,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str = "gelu_tanh",
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    gate_up_global_scale: Tensor | None = None,
    down_global_scale: Tensor | None = None,
) -> list[str]:
    """Violations of the budget by the result of `experts`.

    Truth is the reference in fp64. Plain PyTorch is the reference model's form: every intermediate result in the
    dtype of the rows (fp32 products summed in the kernels' order, see `_product`), choices weighted in fp32 and
    rounded as they are added. Quantised weights times their scales are the truth as they are; plain PyTorch rounds
    the product to the dtype of the rows.
    """
    if result.shape != hidden.shape or result.dtype != hidden.dtype:
        return [
            f"experts: {tuple(result.shape)} {result.dtype} instead of {tuple(hidden.shape)} {hidden.dtype}"
        ]
    # The reference widens the weights of one expert at a time.
    scales = (gate_up_scale, down_scale, gate_up_global_scale, down_global_scale)
    truth = experts(hidden.double(), index, weights, gate_up, down, activation, *scales)
    plain = torch.zeros_like(hidden)

    def widened(weight: Tensor, scale: Tensor | None, total: Tensor | None, expert: int) -> Tensor:
        if scale is None:
            return weight[expert]
        total = None if total is None else total[expert]
        return dequantize(weight[expert], scale[expert], torch.float32, total).to(hidden.dtype)

    for expert in index.unique().tolist():
        if not 0 <= expert < down.shape[0]:
            continue
        row, choice = torch.where(index == expert)
        both = _product(hidden[row], widened(gate_up, gate_up_scale, gate_up_global_scale, expert))
        gate, up = both.chunk(2, dim=-1)
        mixed = _product(
            activate(gate, activation) * up, widened(down, down_scale, down_global_scale, expert)
        )
        plain.index_add_(0, row, (mixed * weights[row, choice, None].float()).to(plain.dtype))
    ulp = torch.finfo(hidden.dtype).eps * truth.abs() + torch.finfo(torch.float32).eps
    return _within("experts", result, truth, plain, ulp)


@without_autocast
def check_dense(
    result: Tensor, rows: Tensor, gate: Tensor, up: Tensor, down: Tensor, *, rounds_rows: bool
) -> list[str]:
    """Violations of the budget by an MLP with FP8 weights, whose gate is gelu_tanh.

    Plain PyTorch rounds gate, up and their product to the dtype of the rows, before that is rounded to FP8. A number of
    it that lies near the middle of two of FP8 may become either: they are 32 of 448 apart at most.

    Args:
        rows: [R, E]. gate, up: [F, E], down: [E, F], what the FP8 weights stand for, in fp32.
        rounds_rows: whether rows are rounded to FP8 before each product.
    """

    def rounded(numbers: Tensor) -> Tensor:
        if not rounds_rows:
            return numbers
        codes, scale = quantize_rows(numbers)
        return codes.to(numbers.dtype) * scale.to(numbers.dtype)

    def mlp(compute: torch.dtype, kept: torch.dtype) -> tuple[Tensor, Tensor]:
        given = rounded(rows.to(compute))
        sides = [(given @ weight.to(compute).T).to(kept) for weight in (gate, up)]
        gated = (activate(sides[0].to(compute), "gelu_tanh") * sides[1].to(compute)).to(kept)
        return gated, rounded(gated.to(compute)) @ down.to(compute).T

    gated, truth = mlp(torch.float64, torch.float64)
    plain = mlp(torch.float32, rows.dtype)[1].to(rows.dtype)
    ulp = torch.finfo(rows.dtype).eps * truth.abs() + torch.finfo(torch.float32).eps
    if rounds_rows:
        ulp = ulp + gated.abs().amax(-1, keepdim=True) / 14 * down.abs().amax().double()
    return _within("dense", result, truth, plain, ulp)
