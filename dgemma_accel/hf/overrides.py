"""Which methods of a model are transformers' own: what stands in for one must not silence somebody else's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

# Where a method and its decorators may come from; this package's `QuantizedExperts` stand in a model as well.
OWN = ("transformers", "torch", "dgemma_accel")


def is_overridden(module: nn.Module, name: str = "forward") -> bool:
    """Whether `module.name` is another's code: of a subclass, or in the module's own `__dict__`."""
    return in_front(module, name) is not None or not is_own(getattr(type(module), name))


def in_front(module: nn.Module, name: str = "forward") -> Callable | None:
    """What the module's own `__dict__` has in front of the method of its class, or None.

    Hooks of the library `accelerate` that only move tensors between devices, and `torch.compile`, change nothing of
    what a method computes, so what is below them counts.
    """
    found = module.__dict__.get(name)
    if name == "forward" and _only_moves(module.__dict__.get("_hf_hook")):
        found = module.__dict__.get("_old_forward")
    found = getattr(found, "_torchdynamo_orig_callable", found)
    bound = getattr(found, "__self__", None) is module
    return None if bound and found.__func__ is getattr(type(module), name, None) else found


def is_own(method: Callable) -> bool:
    """Whether a function and every function that it wraps are written in the packages `OWN`.

    `functools.wraps` copies a function's `__module__` and not its globals, so these say where it was written.
    """
    while method is not None:
        written_in = getattr(method, "__globals__", {}).get("__name__", "")
        if written_in.split(".")[0] not in OWN:
            return False
        method = getattr(method, "__wrapped__", None)
    return True


def is_compiled(module: nn.Module) -> bool:
    """Whether calling `module` runs what `torch.compile` made of it, in whichever way that was asked for."""
    return (
        is_compiled_module(module)
        or module._compiled_call_impl is not None
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
    )


def is_compiled_module(module: nn.Module) -> bool:
    """Whether `torch.compile(module)` stands in a module's place."""
    return "_orig_mod" in module._modules


def other_attention(config) -> str | None:
    """Whether the configuration names an attention function of the caller's own, registered with transformers.

    Where it is traced nothing is looked up: what a function's module is called cannot be.
    """
    if torch.compiler.is_compiling():
        return None
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return _other_function("attention", config._attn_implementation, ALL_ATTENTION_FUNCTIONS)


def other_experts(config) -> str | None:
    """Likewise for the experts."""
    if torch.compiler.is_compiling():
        return None
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return _other_function("experts", getattr(config, "_experts_implementation", None), ALL_EXPERTS_FUNCTIONS)


def _other_function(what: str, name: str | None, functions: Mapping) -> str | None:
    # A name with a slash is that of a kernel from the Hub, which computes what transformers' own functions do.
    function = functions.get(name) if name is not None and "/" not in name else None
    return (
        None
        if function is None or is_own(function)
        else f"{what} goes through {name!r}, a function of the caller's"
    )


def _only_moves(hook) -> bool:
    """Whether a hook of the library `accelerate` brings tensors to the device of weights that stay where they are."""
    parts = getattr(hook, "hooks", (hook,))
    return all(
        type(part).__module__ == "accelerate.hooks"
        and type(part).__name__ == "AlignDevicesHook"
        and not part.offload
        for part in parts
    )
