"""Which methods of a model are transformers' own: what stands in for one must not silence somebody else's."""

from __future__ import annotations

from collections.abc import Callable

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


def _only_moves(hook) -> bool:
    """Whether a hook of the library `accelerate` brings tensors to the device of weights that stay where they are."""
    parts = getattr(hook, "hooks", (hook,))
    return all(
        type(part).__module__ == "accelerate.hooks"
        and type(part).__name__ == "AlignDevicesHook"
        and not part.offload
        for part in parts
    )
