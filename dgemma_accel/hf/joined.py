"""Weights of linear layers that multiply the same rows, one behind another in memory: one matrix product for all.

A canvas has few rows, so a product with one weight of a layer does not fill a GPU: as long as its tiles are few, three
products take three times as long as one over all of their columns. So the weights of a layer's query, key and value
projections, and those of the gate and the up projection of its dense MLP, are moved next to each other. They stay the
parameters that they were, with their values, and take no memory twice; who writes one in place writes what the product
reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .experts import ACTIVATIONS, served_by
from .overrides import is_overridden


class Joined(NamedTuple):
    """The weights of a decoder layer that lie together; None where its modules have to be called one by one.

    projections: [sum of N, E] of query, key and, where the layer has one, value. gate_up: [2 * F, E] of the dense MLP,
    where the op `feed_forward` can stand for the MLP, the router and the experts. experts_backend: that op's.
    """

    projections: Tensor | None
    gate_up: Tensor | None
    experts_backend: str | None


APART = Joined(None, None, None)


def joined_weights(decoder: nn.Module, backend: str) -> list[Joined]:
    """By layer of a decoder. Weights that do not lie together (yet, or no longer: the model was moved) are brought so.

    backend: that of `accelerate`.
    """
    found = []
    for layer in decoder.layers[: decoder.text_config.num_hidden_layers]:
        experts_backend = _feed_forward_backend(layer, backend)
        gate_up = None if experts_backend is None else join([layer.mlp.gate_proj, layer.mlp.up_proj])
        found.append(Joined(join(projections(layer.self_attn)), gate_up, experts_backend))
    return found


def _feed_forward_backend(layer: nn.Module, backend: str) -> str | None:
    mlp, router, experts = layer.mlp, layer.router, layer.experts
    if (
        is_overridden(mlp)
        or is_overridden(router)
        or not (is_product(mlp.down_proj) and is_product(router.proj))
    ):
        return None
    if mlp.down_proj.weight.dtype != router.proj.weight.dtype or ACTIVATIONS.get(
        type(mlp.act_fn).__name__
    ) != ACTIVATIONS.get(type(experts.act_fn).__name__):
        return None
    return served_by(experts, backend, mlp.down_proj.weight)


def projections(attention: nn.Module) -> list[nn.Module]:
    """Query, key and, unless keys and values have one projection, value."""
    found = (attention.q_proj, attention.k_proj, attention.v_proj)
    return [module for module in found if module is not None]


def join(modules: Sequence[nn.Module]) -> Tensor | None:
    """The weights [N, E] of linear layers as one [sum of N, E] that shares their memory, or None where that cannot be.

    It cannot where calling one of `modules` is more than a product with its weight, where the weights are not of one
    dtype, device and width, and where they were made in inference mode, after which a parameter takes no other memory.
    """
    weights = [module.weight for module in modules if is_product(module)]
    if len(set(map(id, weights))) < len(modules) or any(weight.is_inference() for weight in weights):
        return None
    if len({(weight.dtype, weight.device, weight.shape[1]) for weight in weights}) > 1:
        return None
    whole = _as_they_lie(weights)
    return whole if whole is not None or weights[0].is_meta else _moved_together(weights)


def is_product(module: nn.Module) -> bool:
    """Whether calling `module` is a product with its weight and nothing else: not quantised, sharded or hooked."""
    if type(module) is not nn.Linear or module.bias is not None or "forward" in module.__dict__:
        return False
    if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
        return False
    return type(module.weight) in (nn.Parameter, Tensor)


def _as_they_lie(weights: list[Tensor]) -> Tensor | None:
    """One tensor over `weights`, if each begins in memory where the one before it ends."""
    first = weights[0]
    memory, place = first.untyped_storage().data_ptr(), first.storage_offset()
    for weight in weights:
        begins = weight.untyped_storage().data_ptr() == memory and weight.storage_offset() == place
        if not (begins and weight.is_contiguous()):
            return None
        place += weight.numel()
    rows = sum(weight.shape[0] for weight in weights)
    return first.detach().as_strided((rows, first.shape[1]), first.stride())


def _moved_together(weights: list[Tensor]) -> Tensor | None:
    with torch.inference_mode(False), torch.no_grad():
        try:
            whole = torch.cat([weight.detach() for weight in weights])
            for weight, part in zip(weights, whole.split([weight.shape[0] for weight in weights])):
                weight.data = part
        except torch.OutOfMemoryError:
            # Room for the weights of one layer: without it the products stay apart.
            return None
    return whole
