"""A layer's mixture of experts through the op `experts`, where a kernel of it is what the backend comes to.

The model's own experts stay where there is no kernel: on a CPU, and with backend="reference", since they are plain
PyTorch themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..backends import MODULES, BackendError, auto_order, choose, compute_capability, load, requested
from ..ops.checks import FLOAT_DTYPES
from ..ops.experts import experts
from .patches import Patch

# The activation of a module by the name of its class in transformers or PyTorch.
ACTIVATIONS = {"GELUTanh": "gelu_tanh", "SiLUActivation": "silu", "SiLU": "silu"}
KERNELS = ("triton",)


def experts_forward(
    patch: Patch, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """`DiffusionGemmaTextExperts.forward` without waiting for the host and without a loop over experts.

    Args:
        hidden_states: [R, E].
        top_k_index: [R, K] int64; the number of experts stands for none.
        top_k_weights: [R, K].

    Returns:
        [R, E]. What the op does not serve is served by the original and said once per model.
    """
    module = patch.owner
    weight = module.gate_up_proj
    backend = kernel_for(patch.acceleration.backend, hidden_states.device, hidden_states.dtype)
    if backend is None:
        return _original(patch, hidden_states, top_k_index, top_k_weights)
    reason = _reason_for_original(patch, module, hidden_states)
    if reason is not None:
        if not torch.compiler.is_compiling():
            patch.acceleration.say("experts", reason)
        return _original(patch, hidden_states, top_k_index, top_k_weights)
    activation = ACTIVATIONS[type(module.act_fn).__name__]
    return experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        weight,
        module.down_proj,
        activation=activation,
        backend=backend,
    )


def _original(patch: Patch, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """`patch.original()`, in a form that can be traced."""
    if patch.had:
        return patch.previous(hidden_states, top_k_index, top_k_weights)
    return type(patch.owner).forward(patch.owner, hidden_states, top_k_index, top_k_weights)


# A constant of the graph: looking for implementations imports modules, which cannot be traced.
@torch.compiler.assume_constant_result
def kernel_for(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The kernel that serves a call under the `backend` of `accelerate`, or None for the model's own experts.

    A backend that has no such kernel ("cpp", "cuda") takes what `auto` would.
    """
    needs: dict[str, object] = {"device": device.type, "dtype": dtype}
    capability = compute_capability(device)
    if capability is not None:
        needs["compute_capability"] = capability
    name = requested(backend)
    if name in MODULES["experts"]:
        try:
            return choose("experts", name, needs).implementation.backend if name in KERNELS else None
        except BackendError:
            # The dtype of a model may be one that the kernel does not have; a missing kernel accelerate() refused.
            return None
    for name in auto_order("experts", needs)[0]:
        implementation, _ = load("experts", name) if name in MODULES["experts"] else (None, "")
        if implementation is not None and not implementation.missing(needs):
            return name if name in KERNELS else None
    return None


def _reason_for_original(patch: Patch, module: nn.Module, hidden: Tensor) -> str | None:
    if patch.had or hasattr(module, "_hf_hook"):
        return "the experts' forward was replaced before, as device maps with offloading do"
    if type(module).__name__ != "DiffusionGemmaTextExperts" or "_apply_gate" in module.__dict__:
        return f"the experts are a {type(module).__name__} with arithmetic of its own"
    if getattr(module, "_is_expert_parallel", False):
        return "the experts are sharded over devices"
    if type(module.act_fn).__name__ not in ACTIVATIONS:
        return f"the activation is {type(module.act_fn).__name__}"
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(module, name)
        if type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in FLOAT_DTYPES:
            return f"{name} is a {type(weight).__name__} of {weight.dtype}"
        if weight.dtype != hidden.dtype:
            return f"dtypes {hidden.dtype} and {weight.dtype} of rows and weights"
        if weight.device != hidden.device:
            return f"{name} is on {weight.device} and the rows are on {hidden.device}"
        if weight.requires_grad and torch.is_grad_enabled():
            return "autograd is on"
    return "autograd is on" if hidden.requires_grad and torch.is_grad_enabled() else None
