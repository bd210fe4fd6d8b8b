"""`experts`: rows through the experts that their router chose."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import pick, requirements
from ..reference.experts import ACTIVATIONS, scale_shape
from . import checks
from .registration import operator

# The dtype of weights that come with scales.
FP8 = torch.float8_e4m3fn


@operator("experts")
def _experts(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    check: bool,
    backend: str,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    checks.values_in("index", index, 0, down.shape[0], force=check)
    run = pick("experts", backend, requirements(hidden, dtype=hidden.dtype, activation=activation))
    return run(hidden, index, weights, gate_up, down, activation, gate_up_scale, down_scale)


@_experts.register_fake
def _(hidden, index, weights, gate_up, down, activation, check, backend, gate_up_scale=None, down_scale=None):
    return hidden.new_empty(hidden.shape)


def experts(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    activation: str = "gelu_tanh",
    check: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The mixture of experts of each row: sum over its choices (e, w) of w * down_e (act(gate_e x) * (up_e x)).

    Nothing waits for the device and no shape depends on the routing, so a CUDA graph can hold it. Two runs give the
    same bits. Not differentiable.

    Args:
        hidden: [R, E] bf16, fp16 or fp32.
        index: [R, K] int64, the experts a row chose, each in [0, X]. X stands for no expert and adds nothing, nor
            does what is out of range on a GPU, where it is not looked at; an expert chosen twice counts twice.
        weights: [R, K] bf16, fp16 or fp32, applied in fp32.
        gate_up: [X, 2 * I, E] in the dtype of `hidden` or float8_e4m3fn, the I rows of the gate before those of the up
            projection.
        down: [X, E, I] in the dtype of `hidden` or float8_e4m3fn, whatever `gate_up` is.
        gate_up_scale: where `gate_up` is float8_e4m3fn, and only then: [X, ceil(2 * I / 128), ceil(E / 128)] fp32. A
            weight is its FP8 number times the scale of its block of 128 x 128. Rows are not quantised. Blocks count
            rows from the gate's first, so gate and up share one where I is no multiple of 128.
        down_scale: the same for `down`: [X, ceil(E / 128), ceil(I / 128)] fp32.
        activation: of the gate: "gelu_tanh" (gelu_pytorch_tanh) or "silu".
        check: look at the values of `index` on the device too. Waits for the device.
        backend: "auto", "reference" or "triton".

    Returns:
        [R, E] in the dtype of `hidden`. "reference" computes in fp32 throughout; "triton" accumulates in fp32 and
        rounds act(gate) * up to the dtype of `hidden` between the products; scales multiply its fp32 products.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value.
        backends.BackendError: the backend named cannot run this call.

    Source: DiffusionGemmaTextExperts.forward in transformers' modeling_diffusion_gemma.py. It rounds gate, up, the
        activation, their product, each expert's result and every partial sum to the dtype of the weights. The format
        of FP8 weights is that of FP8Experts in transformers' integrations/finegrained_fp8.py, which also rounds the
        rows to FP8 before both products.
    """
    for name, tensor in (("hidden", hidden), ("gate_up", gate_up), ("down", down), ("weights", weights)):
        checks.is_tensor(name, tensor)
    for name, tensor in (("hidden", hidden), ("weights", weights)):
        checks.has_dtype(name, tensor, checks.FLOAT_DTYPES)
    checks.is_tensor("index", index)
    checks.has_dtype("index", index, (torch.int64,))
    if hidden.ndim != 2 or hidden.shape[1] < 1:
        raise ValueError(f"hidden: shape must be [R, E] with E >= 1, got {tuple(hidden.shape)}")
    if down.ndim != 3 or down.shape[0] < 1 or down.shape[2] < 1 or down.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"down: shape must be [X, {hidden.shape[1]}, I] like hidden, got {tuple(down.shape)}"
        )
    count, embedding, width = down.shape
    checks.has_shape("gate_up", gate_up, (count, 2 * width, embedding), "[X, 2 * I, E] like down")
    if index.ndim != 2 or index.shape[0] != hidden.shape[0]:
        raise ValueError(f"index: shape must be [{hidden.shape[0]}, K] like hidden, got {tuple(index.shape)}")
    checks.has_shape("weights", weights, tuple(index.shape), "[R, K] like index")
    for name, tensor, scale in (("gate_up", gate_up, gate_up_scale), ("down", down, down_scale)):
        checks.has_dtype(name, tensor, (hidden.dtype, FP8))
        _check_scale(f"{name}_scale", scale, name, tensor)
    for name, tensor in (("index", index), ("weights", weights), ("gate_up", gate_up), ("down", down)):
        checks.on_device(name, tensor, hidden.device, "hidden")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: must be one of {ACTIVATIONS}, got {activation!r}")
    return _experts(
        hidden, index, weights, gate_up, down, activation, check, backend, gate_up_scale, down_scale
    )


def _check_scale(name: str, scale: Tensor | None, of: str, weight: Tensor) -> None:
    shape = scale_shape(weight.shape)
    if weight.dtype != FP8:
        if scale is not None:
            dtype = str(weight.dtype).removeprefix("torch.")
            raise ValueError(f"{name}: only float8_e4m3fn weights have scales, {of} is {dtype}")
        return
    if scale is None:
        raise ValueError(f"{name}: float8_e4m3fn weights need their scales, {shape} float32, got None")
    checks.is_tensor(name, scale)
    checks.has_dtype(name, scale, (torch.float32,))
    checks.has_shape(name, scale, shape, f"one for each 128 x 128 block of {of}")
    checks.on_device(name, scale, weight.device, of)
