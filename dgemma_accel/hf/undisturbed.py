"""Whether code of the caller's runs within a call of `generate`, between its canvases or around their layers.

Where none does, what was found out about the model's modules before one canvas holds for the next. What is inside of
encoder and decoder layers is for `eager` to look at; what it finds ends it (`Call.disturb`).
"""

from __future__ import annotations

from torch import nn

from .hooks import has_hooks
from .overrides import OWN, is_own
from .patches import Patch


def is_undisturbed(patch: Patch, streamer, stopping_criteria, logits_processor) -> bool:
    """Whether no such code is known.

    Args:
        patch: of the model's `generate`.
        The others are its arguments.
    """
    if stopping_criteria or logits_processor or nn.modules.module._has_any_global_hook():
        return False
    patches = patch.acceleration.patches
    if any(one.owner.__dict__.get(one.name) is not one.replacement for one in patches):
        # By something else, after `accelerate`.
        return False
    model = patch.owner
    encoder, decoder = model.model.encoder, model.model.decoder
    around = (model, model.model, encoder, encoder.language_model, decoder)
    # How a model is copied is no part of a call.
    replaced = {(one.owner, one.name): one for one in patches if one.owner in around}
    if any(one.overridden for (_, name), one in replaced.items() if name != "__reduce_ex__"):
        return False
    if any(has_hooks(module) or "_hf_hook" in module.__dict__ for module in around):
        return False
    instances = around if streamer is None else (*around, streamer)
    classes = {kind for instance in instances for kind in type(instance).__mro__}
    if not all(map(_is_transformers_own, classes)):
        return False
    return not any(_has_method(instance, replaced) for instance in instances)


def _has_method(instance, replaced: dict) -> bool:
    """Whether an attribute of the instance stands before a method of its class, but for the replacements."""
    return any(
        callable(value) and hasattr(type(instance), name) and (instance, name) not in replaced
        for name, value in vars(instance).items()
    )


def _is_transformers_own(kind: type) -> bool:
    """Whether a class is transformers', or Python's and PyTorch's own, and each method of generation and of a model."""
    package, _, rest = kind.__module__.partition(".")
    if package != "transformers":
        return package in (*OWN, "builtins", "abc", "typing")
    if rest.split(".")[0] not in ("generation", "models"):
        return True
    methods = (getattr(value, "__func__", value) for value in vars(kind).values())
    return all(is_own(method) for method in methods if callable(method) and not isinstance(method, type))
