"""`experts`: rows through the experts that their router chose."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import pick, requirements
from ..reference.experts import ACTIVATIONS
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
) -> Tensor:
    checks.values_in("index", index, 0, down.shape[0], force=check)
    run = pick("experts", backend, requirements(hidden, dtype=hidden.dtype, activation=activation))
    return run(hidden, index, weights, gate_up, down, activation)


@_experts.register_fake
def _(hidden, index, weights, gate_up, down, activation, check, backend):
    return hidden.new_empty(hidden.shape)


def experts(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
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
        gate_up: [X, 2 * I, E] in the dtype of `hidden`, the I rows of the gate before those of the up projection.
        down: [X, E, I] in the dtype of `hidden`.
        activation: of the gate: "gelu_tanh" (gelu_pytorch_tanh) or "silu".
        check: look at the values of `index` on the device too. Waits for the device.
        backend: "auto", "reference" or "triton".

    Returns:
        [R, E] in the dtype of `hidden`. "reference" computes in fp32 throughout; "triton" accumulates in fp32 and
        rounds act(gate) * up to the dtype of `hidden` between the products.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value.
        backends.BackendError: the backend named cannot run this call.

    Source: DiffusionGemmaTextExperts.forward in transformers' modeling_diffusion_gemma.py. It rounds gate, up, the
        activation, their product, each expert's result and every partial sum to the dtype of the weights.
    """
    for name, tensor in (("hidden", hidden), ("gate_up", gate_up), ("down", down), ("weights", weights)):
        checks.is_tensor(name, tensor)
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
    for name, tensor in (("gate_up", gate_up), ("down", down)):
        checks.has_dtype(name, tensor, (hidden.dtype,))
    for name, tensor in (("index", index), ("weights", weights), ("gate_up", gate_up), ("down", down)):
        checks.on_device(name, tensor, hidden.device, "hidden")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: must be one of {ACTIVATIONS}, got {activation!r}")
    return _experts(hidden, index, weights, gate_up, down, activation, check, backend)
