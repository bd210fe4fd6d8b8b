"""`experts`: rows through the experts that their router chose."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import pick, requirements
from ..reference.experts import ACTIVATIONS
from ..reference.quantization import FP8, NVFP4, SCALE_GROUP, scale_shape, scales_by_row
from . import checks
from .registration import operator


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
    gate_up_global_scale: Tensor | None = None,
    down_global_scale: Tensor | None = None,
) -> Tensor:
    checks.values_in("index", index, 0, down.shape[0], force=check)
    count, embedding, width = gate_up.shape[0], hidden.shape[1], gate_up.shape[1] // 2
    needs = {"activation": activation, "experts": count, "embedding": embedding, "width": width}
    run = pick("experts", backend, requirements(hidden, dtype=hidden.dtype, **needs))
    scales = (gate_up_scale, down_scale, gate_up_global_scale, down_global_scale)
    return run(hidden, index, weights, gate_up, down, activation, *scales)


@_experts.register_fake
def _(hidden, index, weights, gate_up, down, activation, check, backend, *scales):
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
    gate_up_global_scale: Tensor | None = None,
    down_global_scale: Tensor | None = None,
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
            projection. Or NVFP4: uint8 [X, 2 * I, E / 2], E a multiple of 16, two e2m1 numbers in a byte with that of
            the even column in the low four bits.
        down: [X, E, I] in the dtype of `hidden` or float8_e4m3fn, or uint8 [X, E, I / 2] with I a multiple of 16,
            whatever `gate_up` is.
        gate_up_scale: where `gate_up` is quantised, and only then. Rows are not quantised.
            float8_e4m3fn: [X, ceil(2 * I / 128), ceil(E / 128)] fp32. A weight is its FP8 number times the scale of its
            block of 128 x 128. Blocks count rows from the gate's first, so gate and up share one where I is no multiple
            of 128. Or [X, 2 * I, 1] fp32: a weight is its number times the scale of its row.
            NVFP4: [X, 2 * I, E / 16] float8_e4m3fn. A weight is its e2m1 number times the scale of its 16 columns times
            the global scale of its expert.
        down_scale: the same for `down`: [X, ceil(E / 128), ceil(I / 128)] or [X, E, 1] fp32, or [X, E, I / 16]
            float8_e4m3fn.
        gate_up_global_scale: where `gate_up` is NVFP4, and only then: [X] fp32, or [X, 2], of the gate and of up.
        down_global_scale: the same for `down`, [X].
        activation: of the gate: "gelu_tanh" (gelu_pytorch_tanh) or "silu".
        check: look at the values of `index` on the device too. Waits for the device.
        backend: "auto", "reference", "triton" or "cuda", which takes bf16 and fp16 rows, at most 1024 experts, and
            multiples of 32 as E and I.

    Returns:
        [R, E] in the dtype of `hidden`. "reference" computes in fp32 throughout; the kernels accumulate in fp32 and
        round act(gate) * up to the dtype of `hidden` between the products. Scales multiply their fp32 products, but
        those of 16 columns multiply their weights, which is exact: six bits hold such a product.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value.
        backends.BackendError: the backend named cannot run this call.

    Source: DiffusionGemmaTextExperts.forward in transformers' modeling_diffusion_gemma.py. It rounds gate, up, the
        activation, their product, each expert's result and every partial sum to the dtype of the weights. The format
        of FP8 weights is that of FP8Experts in transformers' integrations/finegrained_fp8.py, which also rounds the
        rows to FP8 before both products. Scales by row are compressed-tensors' strategy "channel", whose FP8
        checkpoints mean rows of the input to be rounded too. NVFP4 is what checkpoints name weight, weight_scale and
        weight_scale_2; it leaves the scales of a layer's input out.
    """
    for name, tensor in (("hidden", hidden), ("gate_up", gate_up), ("down", down), ("weights", weights)):
        checks.is_tensor(name, tensor)
    for name, tensor in (("hidden", hidden), ("weights", weights)):
        checks.has_dtype(name, tensor, checks.FLOAT_DTYPES)
    checks.is_tensor("index", index)
    checks.has_dtype("index", index, (torch.int64,))
    if hidden.ndim != 2 or hidden.shape[1] < 1:
        raise ValueError(f"hidden: shape must be [R, E] with E >= 1, got {tuple(hidden.shape)}")
    for name, tensor in (("gate_up", gate_up), ("down", down)):
        checks.has_dtype(name, tensor, (hidden.dtype, FP8, NVFP4))
    if down.ndim != 3 or down.shape[0] < 1 or down.shape[2] < 1 or down.shape[1] != hidden.shape[1]:
        last = "I / 2" if down.dtype == NVFP4 else "I"
        raise ValueError(
            f"down: shape must be [X, {hidden.shape[1]}, {last}] like hidden, got {tuple(down.shape)}"
        )
    count, embedding, width = down.shape
    if down.dtype == NVFP4:
        width *= 2
        _check_groups("down", "I", width)
    if gate_up.dtype == NVFP4:
        _check_groups("gate_up", "E", embedding)
        checks.has_shape(
            "gate_up", gate_up, (count, 2 * width, embedding // 2), "[X, 2 * I, E / 2] like down"
        )
    else:
        checks.has_shape("gate_up", gate_up, (count, 2 * width, embedding), "[X, 2 * I, E] like down")
    if index.ndim != 2 or index.shape[0] != hidden.shape[0]:
        raise ValueError(f"index: shape must be [{hidden.shape[0]}, K] like hidden, got {tuple(index.shape)}")
    checks.has_shape("weights", weights, tuple(index.shape), "[R, K] like index")
    for name, tensor, scale, total in (
        ("gate_up", gate_up, gate_up_scale, gate_up_global_scale),
        ("down", down, down_scale, down_global_scale),
    ):
        _check_scale(f"{name}_scale", scale, name, tensor)
        _check_global_scale(f"{name}_global_scale", total, name, tensor)
    for name, tensor in (("index", index), ("weights", weights), ("gate_up", gate_up), ("down", down)):
        checks.on_device(name, tensor, hidden.device, "hidden")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: must be one of {ACTIVATIONS}, got {activation!r}")
    checks.is_bool("check", check)
    checks.is_string("backend", backend)
    scales = (gate_up_scale, down_scale, gate_up_global_scale, down_global_scale)
    return _experts(hidden, index, weights, gate_up, down, activation, check, backend, *scales)


def _check_groups(name: str, letter: str, columns: int) -> None:
    if columns % SCALE_GROUP:
        raise ValueError(
            f"{name}: NVFP4 weights need {letter} to be a multiple of {SCALE_GROUP}, got {columns}"
        )


def _check_scale(name: str, scale: Tensor | None, of: str, weight: Tensor) -> None:
    if weight.dtype == FP8:
        kind, shape, dtype = "float8_e4m3fn", scale_shape(weight.shape), torch.float32
        each = f"one for each 128 x 128 block of {of}, or {(*weight.shape[:-1], 1)}, one for each row"
    elif weight.dtype == NVFP4:
        columns = 2 * weight.shape[-1] // SCALE_GROUP
        kind, shape, dtype = "NVFP4 (uint8)", (*weight.shape[:-1], columns), FP8
        each = f"one for each 16 columns of {of}"
    elif scale is None:
        return
    else:
        plain = str(weight.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: only float8_e4m3fn and NVFP4 weights have scales, {of} is {plain}")
    if scale is None:
        short = str(dtype).removeprefix("torch.")
        raise ValueError(f"{name}: {kind} weights need their scales, {shape} {short}, got None")
    checks.is_tensor(name, scale)
    checks.has_dtype(name, scale, (dtype,))
    if weight.dtype != FP8 or not scales_by_row(weight, scale):
        checks.has_shape(name, scale, shape, each)
    checks.on_device(name, scale, weight.device, of)


def _check_global_scale(name: str, scale: Tensor | None, of: str, weight: Tensor) -> None:
    if weight.dtype != NVFP4:
        if scale is not None:
            plain = str(weight.dtype).removeprefix("torch.")
            raise ValueError(f"{name}: only NVFP4 weights have one, {of} is {plain}")
        return
    shape = (weight.shape[0],)
    if scale is None:
        raise ValueError(f"{name}: NVFP4 (uint8) weights need theirs, {shape} float32, got None")
    checks.is_tensor(name, scale)
    checks.has_dtype(name, scale, (torch.float32,))
    if of != "gate_up" or tuple(scale.shape) != (*shape, 2):
        checks.has_shape(name, scale, shape, f"one for each expert of {of}")
    checks.on_device(name, scale, weight.device, of)
