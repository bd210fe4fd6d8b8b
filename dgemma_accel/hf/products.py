"""Which products of a layer run side by side where it is compiled or captured: modules that are nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..scaled_product import multiplies_fp8
from .experts import MODULE, how_called, served_by
from .linear import LINEARS, QuantizedLinear
from .overrides import is_overridden


class SideBySide(NamedTuple):
    """What of a layer does, and what its experts are where they do not.

    projections: query, key and value, by the op `linears`. experts_backend: that of the op `feed_forward` where it can
    stand for the layer's dense MLP, router and experts, else None. experts: see `call_experts`. rounded: whether query,
    key and value are made of FP8 rows.
    """

    projections: bool
    experts_backend: str | None
    experts: str
    rounded: bool = False


ONE_BY_ONE = SideBySide(False, None, MODULE)


def side_by_side(layers: Iterable[nn.Module], backend: str, dtype: torch.dtype) -> list[SideBySide]:
    """By layer of a decoder or encoder; backend: that of `accelerate`; dtype: of the hidden states."""
    return [
        SideBySide(
            _are_products(projections(layer.self_attn)),
            _feed_forward_backend(layer, backend),
            how_called(layer.experts, backend, dtype),
            _are_rounded(projections(layer.self_attn)),
        )
        for layer in layers
    ]


def projections(attention: nn.Module) -> list[nn.Module]:
    """Query, key and, unless keys and values have one projection, value."""
    found = (attention.q_proj, attention.k_proj, attention.v_proj)
    return [module for module in found if module is not None]


def is_product(module: nn.Module | None) -> bool:
    """Whether calling `module` is a product with its weight and nothing else: not quantised, sharded or hooked."""
    return type(module) is nn.Linear and module.bias is None and _is_as_it_was(module)


def share_rows(modules: list[nn.Module]) -> bool:
    """Whether products of the same rows, called one by one, would each round them to FP8, and are better one op.

    Where they are traced the compiler sees by itself that they do the same.
    """
    if torch.compiler.is_compiling() or nn.modules.module._has_any_global_hook():
        return False
    return all(map(_is_scaled, modules))


def _is_scaled(module: nn.Module | None) -> bool:
    return type(module) is QuantizedLinear and _is_as_it_was(module)


def _are_products(modules: list[nn.Module | None]) -> bool:
    """Whether all are products by themselves, all with plain weights or all with FP8 weights of this package's."""
    return all(map(_is_scaled, modules)) or all(map(is_product, modules))


def _are_rounded(modules: list[nn.Module]) -> bool:
    if not _are_products(modules) or weight_scales(modules) is None:
        return False
    return multiplies_fp8(modules[0].weight.device)


def weight_scales(modules: list[nn.Module]) -> list[Tensor] | None:
    """The scales of products that `_are_products` found, None where they have none."""
    return [module.weight_scale for module in modules] if type(modules[0]) is QuantizedLinear else None


def _is_as_it_was(module: nn.Module) -> bool:
    if "forward" in module.__dict__:
        return False
    if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
        return False
    return type(module.weight) in (nn.Parameter, Tensor)


def _feed_forward_backend(layer: nn.Module, backend: str) -> str | None:
    mlp, router, experts = layer.mlp, layer.router, layer.experts
    # In this order: only of transformers' own modules are the parts known.
    if is_overridden(mlp) or is_overridden(router):
        return None
    products = [getattr(mlp, name, None) for name in LINEARS["mlp"]]
    chooser = getattr(router, "proj", None)
    if not _are_products(products) or not is_product(chooser):
        return None
    plain = products if weight_scales(products) is None else []
    if any(product.weight.dtype != chooser.weight.dtype for product in plain):
        return None
    served = served_by(experts, backend, chooser.weight, "feed_forward")
    if served is None or type(mlp.act_fn) is not type(experts.act_fn):
        return None
    count = len(experts.down_proj)
    fits = len(router.proj.weight) == len(router.per_expert_scale) == count >= router.config.top_k_experts
    return served if fits else None
