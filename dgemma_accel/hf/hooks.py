"""Forward hooks of modules, and those among them that transformers leaves behind.

A forward with `output_hidden_states`, `output_attentions` or `output_router_logits` registers hooks on layers,
attentions and routers, once and for ever; they do nothing while no forward collects. All of them are functions that
`transformers.utils.output_capturing` defines, whatever a release calls them, and its `_active_collector` holds what is
being collected.
"""

from __future__ import annotations

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs more than its forward: a hook of torch's that does something."""
    if not module._forward_pre_hooks and not module._forward_hooks:
        # As nearly always, and hundreds of modules are asked before each canvas.
        return False
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(not _captures(hook) for hook in hooks) or bool(hooks and collected())


def collected() -> dict:
    """What a forward of transformers is collecting from the modules' outputs, by kind; empty outside of one."""
    from transformers.utils import output_capturing

    collector = getattr(output_capturing, "_active_collector", None)
    found = None if collector is None else collector.get()
    return {} if found is None else found


def _captures(hook) -> bool:
    """Whether a hook was written in transformers' module for capturing outputs."""
    from transformers.utils import output_capturing

    return getattr(hook, "__globals__", None) is vars(output_capturing)
