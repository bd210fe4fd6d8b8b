"""What was replaced on a model, so that it can be put back exactly.

A replacement is a `functools.partial` in the `__dict__` of one module, in front of the method of its class: no class
and no other model sees it. Partials, unlike closures, follow their module through `copy.deepcopy` and `pickle`.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from ..backends import MODULES
from .bank import CacheBank
from .overrides import in_front, is_overridden
from .registry import Captures

logger = logging.getLogger("dgemma_accel")

# Where the record of the replacements lives in the model's `__dict__`.
ATTRIBUTE = "_dgemma_accel"


@dataclass(eq=False)
class Patch:
    """One replaced method; the first argument of the function that replaces it.

    had, previous: what stood in the owner's `__dict__`. replaced: that was another method than the class's, not only
    a hook's or the compiler's way to it. overridden: the method was not transformers' own. static: its class has it as
    a staticmethod.
    """

    acceleration: Acceleration
    owner: nn.Module
    name: str
    had: bool
    previous: Callable | None
    replaced: bool = False
    overridden: bool = False
    static: bool = False
    replacement: Callable | None = None

    def original(self) -> Callable:
        """The method as it was, bound to its owner."""
        if self.had:
            return self.previous
        # Looked up anew each time: a stored bound method does not survive pickling.
        found = getattr(type(self.owner), self.name)
        if self.static:
            return found
        # A partial and no method object: the compiler can trace it.
        return functools.partial(found, self.owner)

    def undo(self) -> None:
        attributes = self.owner.__dict__
        if attributes.get(self.name) is not self.replacement:
            logger.warning(
                "%s.%s was replaced again after accelerate(); restore() leaves it alone",
                type(self.owner).__name__,
                self.name,
            )
        elif self.had:
            attributes[self.name] = self.previous
        else:
            del attributes[self.name]
        # It holds this patch, and so the model, until somebody looks for cycles.
        self.replacement = None


@dataclass(eq=False)
class Acceleration:
    """The replacements on one model, the options of `accelerate`, what has been said about fallbacks, the buffers that
    calls share, compiled steps by shape and captured ones.

    cache_argument: what the model's own methods call the cache.
    """

    backend: str = "auto"
    exact: bool = False
    graph: bool | None = None
    cache_argument: str = "cache"
    patches: list[Patch] = field(default_factory=list)
    said: set[str] = field(default_factory=set)
    bank: CacheBank = field(default_factory=CacheBank)
    compiled: dict = field(default_factory=dict)
    captures: Captures = field(default_factory=Captures)

    def __getstate__(self) -> dict:
        """A copy of the model makes its own cache, compiles and captures for itself."""
        return {**vars(self), "compiled": {}}

    def replace(self, owner: nn.Module, name: str, function: Callable) -> None:
        """Let `owner.name(...)` call `function(patch, ...)`."""
        held, replaced = owner.__dict__, in_front(owner, name) is not None
        # Asked here: where a call is traced, torch 2.11 cannot.
        static = isinstance(inspect.getattr_static(type(owner), name), staticmethod)
        overridden = is_overridden(owner, name)
        patch = Patch(self, owner, name, name in held, held.get(name), replaced, overridden, static)
        patch.replacement = functools.partial(function, patch)
        owner.__dict__[name] = patch.replacement
        self.patches.append(patch)

    @property
    def model(self) -> nn.Module | None:
        """The model that was accelerated: the owner of the last method replaced."""
        return self.patches[-1].owner if self.patches else None

    def undo(self) -> None:
        """Put every method back and let go of what calls have left: memory of the device above all."""
        for patch in reversed(self.patches):
            patch.undo()
        self.patches.clear()
        self.compiled.clear()
        self.captures.clear()
        self.bank.clear()

    def as_argument(self, cache) -> dict:
        """`cache` as a keyword argument of the model's own methods."""
        return {self.cache_argument: cache}

    def backend_of(self, op: str) -> str:
        """The backend for an op: the one asked for, or `auto` where the op has no such implementation at all."""
        return self.backend if self.backend in MODULES[op] else "auto"

    def graph_on(self, device: torch.device) -> bool:
        """Whether steps on `device` are compiled and captured: where it was not said, on a GPU."""
        return device.type == "cuda" if self.graph is None else self.graph

    def say(self, what: str, reason: str, instead: str = "the reference path serves") -> None:
        """Log once per model that something slower serves `what`, and why."""
        line = f"{what}: {instead} this call ({reason})"
        if line not in self.said:
            self.said.add(line)
            logger.warning(line)


def acceleration_of(model: nn.Module) -> Acceleration | None:
    """The record of `accelerate(model)`. One that came along with a copy of the `__dict__` is another model's."""
    found = model.__dict__.get(ATTRIBUTE)
    return None if found is None or found.model is not model else found


def patch_of(module: nn.Module | None, name: str = "forward") -> Patch | None:
    """The patch that `module.name` calls, also through hooks of the library `accelerate`; None where it calls none of
    this very module."""
    held = {} if module is None else module.__dict__
    for function in (held.get(name), held.get("_old_forward") if name == "forward" else None):
        patch = function.args[0] if isinstance(function, functools.partial) and function.args else None
        if isinstance(patch, Patch) and patch.owner is module:
            return patch
    return None
