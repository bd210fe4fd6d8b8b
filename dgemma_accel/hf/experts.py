"""A layer's mixture of experts through the op `experts`, where a kernel of it is what the backend comes to.

The model's own experts stay where there is no kernel: on a CPU, and with backend="reference", since they are plain
PyTorch themselves.

FP8 experts (transformers' `FP8Experts`, which its FineGrainedFP8 quantisation puts there) are served with their weights
as they are. The original rounds rows to FP8 before both products; the op does not, and is nearer the truth. Those of
`quantize_experts` are the op's own form, so where there is no kernel its reference serves them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..backends import auto_order, compute_capability, load, requested
from ..ops.checks import FLOAT_DTYPES
from ..ops.experts import experts
from ..reference.quantization import FP8, NVFP4, SCALE_BLOCK, scale_shape, scales_by_row
from .overrides import other_experts
from .patches import Patch

# The activation of a module by the name of its class in transformers or PyTorch.
ACTIVATIONS = {"GELUTanh": "gelu_tanh", "SiLUActivation": "silu", "SiLU": "silu"}
KERNELS = ("triton", "cuda")
# Ways of calling a layer's experts besides the backends of the op.
MODULE, METHOD = "module", "method"
# Classes of experts: transformers' own, what its FineGrainedFP8 quantisation makes of them, and `quantize_experts`.
PLAIN, FINE_GRAINED, OURS = "DiffusionGemmaTextExperts", "FP8Experts", "QuantizedExperts"
# Attributes of an `FP8Experts` and the values with which it computes what the op does.
FP8_ATTRIBUTES = {
    "block_size": (SCALE_BLOCK, SCALE_BLOCK), "activation_scheme": "dynamic", "has_gate": True, "has_bias": False,
    "swiglu_alpha": None, "swiglu_limit": None, "limit": None, "gate_softcap": None, "up_softcap": None,
}  # fmt: skip


def experts_forward(
    patch: Patch, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """`forward` of a layer's experts without waiting for the host or looping over experts.

    Args:
        hidden_states: [R, E].
        top_k_index: [R, K] int64; the number of experts stands for none.
        top_k_weights: [R, K].

    Returns:
        [R, E]. What the op does not serve is served by the original and said once per model.
    """
    backend, reason = _backend_for(patch, patch.acceleration.backend, hidden_states)
    if reason is not None and not torch.compiler.is_compiling():
        patch.acceleration.say("experts", reason)
    if backend is None:
        return _original(patch, hidden_states, top_k_index, top_k_weights)
    return _through_op(patch.owner, backend, hidden_states, top_k_index, top_k_weights)


def call_experts(module: nn.Module, how: str, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """What `module(rows, index, weights)` returns; arguments and result as of `experts_forward`.

    Args:
        how: MODULE for calling it; in a step that is traced what that comes to, so that the code which the compiler
            makes of one layer, and which would go with the patch of its experts alone, serves all: METHOD for the
            forward of its class, else a backend of the op.
    """
    if how == MODULE:
        return module(rows, index, weights)
    if how == METHOD:
        return type(module).forward(module, rows, index, weights)
    return _through_op(module, how, rows, index, weights)


def how_called(module: nn.Module, backend: str, dtype: torch.dtype) -> str:
    """`how` of `call_experts` for rows of `dtype`; backend: that of `accelerate`."""
    patch = _own_patch(module)
    if patch is None or patch.had:
        return MODULE
    device = getattr(getattr(module, "down_proj", None), "device", None)
    return _backend_for(patch, backend, torch.empty(0, dtype=dtype, device=device))[0] or METHOD


def _backend_for(patch: Patch, backend: str, rows: Tensor) -> tuple[str | None, str | None]:
    """(backend of the op that serves a layer's experts, or None for the original; why not, where that is worth a
    word)."""
    sizes = sizes_of(patch.owner)
    kernel = kernel_for(backend, rows.device, rows.dtype, sizes)
    if kernel is None and type(patch.owner).__name__ == OURS:
        kernel = "reference"
    if kernel is None:
        return None, why_no_kernel(backend, rows.device, rows.dtype, sizes)
    reason = _reason_for_original(patch, patch.owner, rows)
    return (kernel if reason is None else None), reason


def _through_op(module: nn.Module, backend: str, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return experts(
        rows,
        index,
        weights,
        module.gate_up_proj,
        module.down_proj,
        **scales_of(module),
        activation=ACTIVATIONS[type(module.act_fn).__name__],
        backend=backend,
    )


def why_looping(module: nn.Module, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the experts of a layer, called with rows of `dtype` on a CUDA `device`, ask the device which of them have
    rows, or None where they do not."""
    if _own_patch(module) is None:
        # Replaced once more, by something that only its author knows.
        return None
    if served_by(module, backend, torch.empty(0, dtype=dtype, device=device)) is not None:
        return None
    if type(module).__name__ == OURS:
        return "experts is the reference, which waits for the device"
    chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if chosen in (None, "eager"):
        return "the model's own experts are a loop that waits for the device"
    if chosen == "grouped_mm" and dtype != torch.bfloat16:
        return f"the model's own experts wait for the device in {dtype}"
    return None


def served_by(module: nn.Module, backend: str, like: Tensor, op: str = "experts") -> str | None:
    """The kernel that a layer's experts go through with rows of the dtype and device of `like`, or None; op: as of
    `kernel_for`."""
    patch = _own_patch(module)
    kernel = None if patch is None else kernel_for(backend, like.device, like.dtype, sizes_of(module), op)
    if kernel is None or _reason_for_original(patch, module, like.new_empty(0)) is not None:
        return None
    return kernel


def _own_patch(module: nn.Module) -> Patch | None:
    """The patch by which calling `module` comes to `experts_forward`."""
    forward = module.__dict__.get("forward")
    return forward.args[0] if getattr(forward, "func", None) is experts_forward else None


def scales_of(module: nn.Module) -> dict[str, Tensor]:
    """The scales of a module's weights, by the op's names for them.

    Of an `FP8Experts` a weight with a side that 128 does not divide may have stayed in the model's dtype.
    """
    scales = {}
    for name in ("gate_up", "down"):
        dtype = getattr(module, f"{name}_proj").dtype
        if dtype == FP8:
            scales[f"{name}_scale"] = getattr(module, f"{name}_proj_scale_inv")
        elif dtype == NVFP4:
            scales[f"{name}_scale"] = getattr(module, f"{name}_proj_scale")
            scales[f"{name}_global_scale"] = getattr(module, f"{name}_proj_global_scale")
    return scales


def _original(patch: Patch, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """`patch.original()`, in a form that can be traced."""
    if patch.had:
        return patch.previous(hidden_states, top_k_index, top_k_weights)
    return type(patch.owner).forward(patch.owner, hidden_states, top_k_index, top_k_weights)


def sizes_of(module: nn.Module) -> tuple[int, int, int] | None:
    """(X, I, E) of a layer's experts, None of what has no such weights."""
    weight = getattr(module, "down_proj", None)
    if not isinstance(weight, Tensor) or weight.ndim != 3:
        return None
    count, embedding, width = weight.shape
    return count, 2 * width if weight.dtype == NVFP4 else width, embedding


def _needs(device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int] | None) -> dict[str, object]:
    needs: dict[str, object] = {"device": device.type, "dtype": dtype}
    capability = compute_capability(device)
    if capability is not None:
        needs["compute_capability"] = capability
    return needs | dict(zip(("experts", "width", "embedding"), sizes or ()))


def kernel_for(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int] | None,
    op: str = "experts",
) -> str | None:
    """The kernel that serves a call under the `backend` of `accelerate`, or None for the model's own experts.

    A backend that has no such kernel ("cpp"), or none for these sizes or this dtype, takes what `auto` would.
    op: "experts", or "feed_forward", of which they are a part.
    """
    needs, name = _needs(device, dtype, sizes), requested(backend)
    if name == "reference":
        return None
    order = auto_order(op, needs)[0]
    asked_for = (name,) if name in KERNELS else ()
    for name in (*asked_for, *order):
        implementation, _ = load(op, name)
        if implementation is not None and not implementation.missing(needs):
            return name if name in KERNELS else None
    return None


def why_no_kernel(
    backend: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int] | None
) -> str | None:
    """What a GPU's machine lacks for the kernels that would serve its experts, and what others do not have; None where
    nobody would expect them."""
    if device.type != "cuda" or requested(backend) == "reference":
        return None
    needs, reasons, absent = _needs(device, dtype, sizes), [], False
    for name in KERNELS:
        implementation, missing = load("experts", name)
        absent |= implementation is None
        lines = [missing] if implementation is None else implementation.missing(needs)
        reasons += [f"{name}: {line}" for line in lines]
    return f"no kernel: {'; '.join(reasons)}" if absent else None


# Constants of the graph: looking for implementations imports modules, which cannot be traced. This is all that
# torch.compiler.assume_constant_result does, which imports the compiler first, Triton and sympy with it: as long again
# as importing torch, for everybody who imports this package.
kernel_for._dynamo_marked_constant = True
why_no_kernel._dynamo_marked_constant = True


def _reason_for_original(patch: Patch, module: nn.Module, hidden: Tensor) -> str | None:
    if patch.replaced or hasattr(module, "_hf_hook"):
        return "the experts' forward was replaced before, as device maps with offloading do"
    kind = type(module).__name__
    if kind not in (PLAIN, FINE_GRAINED, OURS) or "_apply_gate" in module.__dict__:
        return f"the experts are a {kind} with arithmetic of its own"
    if patch.overridden:
        return "the experts' forward is not transformers' own"
    reason = other_experts(module.config) if hasattr(module, "config") else None
    if reason is not None:
        return reason
    if getattr(module, "_is_expert_parallel", False):
        return "the experts are sharded over devices"
    if type(module.act_fn).__name__ not in ACTIVATIONS:
        return f"the activation is {type(module.act_fn).__name__}"
    if kind == FINE_GRAINED:
        for name, wanted in FP8_ATTRIBUTES.items():
            value = getattr(module, name, wanted)
            if (tuple(value) if isinstance(value, list) else value) != wanted:
                return f"the FP8 experts have {name} {value}"
    for name in ("gate_up_proj", "down_proj"):
        reason = _other_weight(module, name, hidden)
        if reason is not None:
            return reason
    return "autograd is on" if hidden.requires_grad and torch.is_grad_enabled() else None


def _other_weight(module: nn.Module, name: str, hidden: Tensor) -> str | None:
    weight = getattr(module, name)
    quantised = {PLAIN: (), FINE_GRAINED: (FP8,), OURS: (FP8, NVFP4)}[type(module).__name__]
    allowed = (*FLOAT_DTYPES, *quantised)
    if type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in allowed:
        return f"{name} is a {type(weight).__name__} of {weight.dtype}"
    if weight.dtype not in (hidden.dtype, *quantised):
        return f"dtypes {hidden.dtype} and {weight.dtype} of rows and weights"
    if weight.device != hidden.device:
        return f"{name} is on {weight.device} and the rows are on {hidden.device}"
    if weight.requires_grad and torch.is_grad_enabled():
        return "autograd is on"
    return _other_scale(module, name, weight) if weight.dtype == FP8 else None


def _other_scale(module: nn.Module, name: str, weight: Tensor) -> str | None:
    scale, name = getattr(module, f"{name}_scale_inv"), f"{name}_scale_inv"
    if type(scale) not in (nn.Parameter, Tensor) or scale.dtype != torch.float32:
        return f"{name} is a {type(scale).__name__} of {scale.dtype}"
    if scale.device != weight.device:
        return f"{name} is on {scale.device} and its weights are on {weight.device}"
    # Where 2 * I is at most 128 the original keeps a row of scales more than there are blocks.
    blocks = scale_shape(weight.shape)[1:]
    if tuple(scale.shape[1:]) != blocks and not scales_by_row(weight, scale):
        return f"{name} has {tuple(scale.shape[1:])} scales by expert for {blocks} blocks"
    return None
