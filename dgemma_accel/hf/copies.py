"""Copies of an accelerated model. `copy.deepcopy` and `pickle` make an accelerated one of their own; `copy.copy`, whose
copy shares all modules but has attributes of its own, makes one whose `generate` is the original's."""

from __future__ import annotations

import copy

from torch import nn

from .patches import ATTRIBUTE, Acceleration, Patch, patch_of


def reduce_ex(patch: Patch, protocol: int) -> tuple:
    """`__reduce_ex__`, which all three ask an instance for, and which cannot tell which of them is asking."""
    make, arguments, state, *rest = patch.original()(protocol)
    return make, arguments, _Attributes(state, _as_before(state, patch.acceleration, patch.owner)), *rest


def shares_layers_with(model: nn.Module) -> nn.Module | None:
    """Another model that is accelerated and has the same layers, or None."""
    patch = patch_of(model.model.decoder.self_conditioning)
    other = None if patch is None else patch.acceleration.model
    return None if other is model or getattr(other, "model", None) is not model.model else other


class _Attributes:
    """A model's `__dict__` on the way into a copy. Nobody but `copy.copy` reads it as it is."""

    def __init__(self, whole: dict, before: dict) -> None:
        self.whole, self.before = whole, before

    def keys(self):
        return self.before.keys()

    def __getitem__(self, name: str):
        return self.before[name]

    def __deepcopy__(self, memo: dict) -> dict:
        return copy.deepcopy(self.whole, memo)

    def __reduce__(self) -> tuple:
        return dict, (self.whole,)


def _as_before(state: dict, acceleration: Acceleration, model: nn.Module) -> dict:
    """`state` without what `accelerate(model)` put into the model's own `__dict__`."""
    before = {name: value for name, value in state.items() if name != ATTRIBUTE}
    for patch in acceleration.patches:
        if patch.owner is model and before.get(patch.name) is patch.replacement:
            del before[patch.name]
            if patch.had:
                before[patch.name] = patch.previous
    return before
