"""Registration of an op with torch, and the shortest way from a public function to its kernel.

`torch.library.custom_op` passes through four Python functions on the way to a kernel. For a small canvas that takes
longer than the kernel, so ops are defined on a `torch.library.Library`; schema, fake, autograd and the behaviour under
torch.compile are those of a custom_op. But an op says its dtypes itself, so its body runs without the caller's
autocast, as it does when it is compiled; a custom_op's runs with it, and returns other dtypes than its fake says.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import get_type_hints

import torch
from torch.autograd import forward_ad

_library = torch.library.Library("dgemma", "FRAGMENT")

_without_autograd = torch._C._AutoDispatchBelowAutograd
_any_requires_grad = torch._C._any_requires_grad
_any_autocast = torch._C._is_any_autocast_enabled
_without_autocast = torch._C._DisableAutocast
_tracer = torch._C._dynamo.eval_frame.get_eval_frame_callback


class Operator:
    """`torch.ops.dgemma.<name>`. Calling it takes the op's arguments, by position.

    kernel: the op's body; it mutates nothing and returns new tensors.
    fields: name -> type of the op's arguments, where they are not those of the kernel's own signature.
    overload: what torch knows the op by.
    """

    def __init__(self, name: str, kernel: Callable, fields: Mapping[str, object] | None = None) -> None:
        qualified = f"dgemma::{name}"
        schema = torch.library.infer_schema(_with_signature(kernel, fields), mutates_args=())
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, _as_it_stands(kernel), "CompositeExplicitAutograd")
        self.name = name
        self.overload = getattr(torch.ops.dgemma, name).default

        def backward(ctx, *gradients):
            raise RuntimeError(_not_differentiable(name))

        torch.library.register_autograd(qualified, backward, lib=_library)

    def register_fake(self, fake: Callable) -> Callable:
        """Decorator: shapes, dtypes and strides of the results."""
        torch.library.register_fake(f"dgemma::{self.name}", fake, lib=_library)
        return fake

    def __call__(self, *arguments):
        if torch.compiler.is_compiling():
            return self.overload(*arguments)
        if forward_ad._current_level >= 0:
            _refuse_tangents(self.name, arguments)
        try:
            if torch.is_grad_enabled() and _any_requires_grad(*arguments):
                return self.overload(*arguments)
            # Nothing to record, so the Python function that would find that out is left out.
            with _without_autograd():
                return self.overload(*arguments)
        except RuntimeError as error:
            # What PyTorch tells the author of an op where one of torch.func's transforms asks for its derivative.
            if "setup_context" not in str(error):
                raise
            raise RuntimeError(_not_differentiable(self.name)) from error


def operator(name: str, fields: Mapping[str, object] | None = None) -> Callable[[Callable], Operator]:
    """Decorator: registers a function as the body of `torch.ops.dgemma.<name>`; `fields` as in `Operator`."""
    return lambda kernel: Operator(name, kernel, fields)


def _not_differentiable(name: str) -> str:
    return f"dgemma::{name} is not differentiable; call it under torch.no_grad()"


def _refuse_tangents(name: str, arguments: tuple) -> None:
    """Forward mode asks no backward, so without this an op's derivative would be 0."""
    for value in arguments:
        if isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(f"dgemma::{name} is not differentiable, not in forward mode either")


def _with_signature(kernel: Callable, fields: Mapping[str, object] | None) -> Callable:
    """Something that `infer_schema` can read: the kernel, or what looks like it with other arguments."""
    if fields is None:
        return kernel

    def looks_alike(*arguments): ...

    looks_alike.__signature__ = inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
            for name, kind in fields.items()
        ],
        return_annotation=get_type_hints(kernel)["return"],
    )
    return looks_alike


def _as_it_stands(kernel: Callable) -> Callable:
    """`kernel`, which no autocast changes, and into which torch.compile does not look when eager code calls it."""
    disabled = None

    @functools.wraps(kernel)
    def run(*arguments):
        nonlocal disabled
        if _any_autocast():
            # For every device at once; inside it no autocast is left, so this happens once.
            with _without_autocast():
                return run(*arguments)
        if _tracer() is None:
            # Nothing is traced, as nearly always. What keeps a tracer away costs more than a small kernel.
            return kernel(*arguments)
        if disabled is None:
            disabled = torch.compiler.disable(kernel)
        return disabled(*arguments)

    return run
