"""A decoder or encoder layer around its attention: what a compiled step traces, and what runs eagerly elsewhere.

Eagerly a layer is hundreds of small operators, and the pass that stores a finished canvas takes as long as the host
needs to launch them. More than half are the arithmetic of eleven norms, each of which PyTorch has as one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.checks import FLOAT_DTYPES
from ..ops.feed_forward import feed_forward
from ..ops.linears import linears
from ..reference.feed_forward import DENSE_SCALES, FeedForwardCall
from .experts import ACTIVATIONS, call_experts, scales_of
from .hooks import has_hooks
from .linear import LINEARS
from .naming import takes_cache
from .overrides import is_overridden, is_own
from .patches import Patch
from .products import ONE_BY_ONE, SideBySide, share_rows, weight_scales


@takes_cache
def layer_forward(
    patch: Patch,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask=None,
    position_ids: Tensor | None = None,
    cache=None,
    **kwargs,
) -> Tensor:
    """`forward` of an encoder or decoder layer, with norms in one operator each.

    Args:
        hidden_states: [B, C, E].
        The others go to the layer's attention.

    Returns:
        [B, C, E].
    """
    arguments = {
        "position_embeddings": position_embeddings,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        **patch.acceleration.as_argument(cache),
        **kwargs,
    }
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or _stays(patch):
        return patch.original()(hidden_states, **arguments)
    attention = patch.owner.self_attn
    attended, _ = attention(hidden_states=norm(patch.owner.input_layernorm, hidden_states), **arguments)
    return through(patch.owner, hidden_states, attended)


def _stays(patch: Patch) -> bool:
    """Whether the forward of a layer is another's, or more than transformers' own: a hook that brings its arguments to
    the layer's device, or the compiler."""
    return patch.overridden or patch.had or not is_own(type(patch.owner).forward)


def through(layer: nn.Module, hidden: Tensor, attended: Tensor, how: SideBySide = ONE_BY_ONE) -> Tensor:
    """hidden [B, C, E] through a layer: attention, then what a dense MLP and experts make of the same rows.

    Args:
        attended: [B, C, E], the result of the layer's attention, projections included, of its normed rows.
        how: what of it is one op where its modules allow that; eagerly nothing is.

    Source: `forward` of DiffusionGemmaDecoderTextLayer and DiffusionGemmaEncoderTextLayer in transformers'
    modeling_diffusion_gemma.py.
    """
    hidden = hidden + norm(layer.post_attention_layernorm, attended)
    dense, mixed = _feed_forward(layer, hidden, how)
    dense, mixed = (
        norm(layer.post_feedforward_layernorm_1, dense),
        norm(layer.post_feedforward_layernorm_2, mixed),
    )
    # In place, as there: the number may be of a wider type than the rows.
    return (hidden + norm(layer.post_feedforward_layernorm, dense + mixed)).mul_(layer.layer_scalar)


def norm(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)` for a norm of the model, by PyTorch's own operator where that computes the same.

    Traced, the module itself: the compiler fuses what it consists of. With autograd too, so that gradients are as ever.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not _is_plain(module, x.dtype):
        return module(x)
    return nn.functional.rms_norm(x, x.shape[-1:], module.weight if module.with_scale else None, module.eps)


def _is_plain(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether calling a norm with rows of `dtype` is the arithmetic of transformers' and nothing else."""
    kind = type(module)
    if kind.__name__ != "DiffusionGemmaRMSNorm" or not (is_own(kind.forward) and is_own(kind._norm)):
        return False
    if "forward" in module.__dict__ or has_hooks(module) or nn.modules.module._has_any_global_hook():
        return False
    # The module computes in fp32 whatever the rows are, the operator not below their own precision.
    if dtype not in FLOAT_DTYPES or torch._C._is_any_autocast_enabled():
        return False
    return not module.with_scale or module.weight.dtype == dtype


def _dense(mlp: nn.Module, rows: Tensor) -> Tensor:
    """`mlp(rows)`; FP8 products of the same rows round them once."""
    sides = [getattr(mlp, name, None) for name in LINEARS["mlp"][:2]]
    if not share_rows(sides) or is_overridden(mlp) or has_hooks(mlp):
        return mlp(rows)
    made = linears(rows.flatten(0, -2), [side.weight for side in sides], weight_scales(sides))
    gate, up = (x.unflatten(0, rows.shape[:-1]) for x in made)
    return mlp.down_proj(mlp.act_fn(gate) * up)


def _feed_forward(layer: nn.Module, hidden: Tensor, how: SideBySide) -> tuple[Tensor, Tensor]:
    """What the dense MLP and the experts make of hidden [B, C, E], before the norms behind them."""
    dense, rows = norm(layer.pre_feedforward_layernorm, hidden), hidden.reshape(-1, hidden.shape[-1])
    routed, mlp = norm(layer.pre_feedforward_layernorm_2, rows), layer.mlp
    router, experts = layer.router, layer.experts
    if how.experts_backend is None:
        # Traced no call: transformers may have left a hook there that collects nothing and cannot be traced (hooks.py).
        choose = router.forward if torch.compiler.is_compiling() else router
        _, weights, index = choose(rows)
        return _dense(mlp, dense), call_experts(experts, how.experts, routed, index, weights).reshape(
            hidden.shape
        )
    products = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    call = FeedForwardCall(
        dense.reshape(rows.shape),
        router.norm(rows) * router.scale * router.scalar_root_size,
        routed,
        *(product.weight for product in products),
        router.proj.weight,
        router.per_expert_scale,
        experts.gate_up_proj,
        experts.down_proj,
        top_k=router.config.top_k_experts,
        activation=ACTIVATIONS[type(experts.act_fn).__name__],
        **scales_of(experts),
        **dict(zip(DENSE_SCALES, weight_scales(products) or ())),
    )
    made = feed_forward(call, how.experts_backend)
    return made[0].reshape(hidden.shape), made[1].reshape(hidden.shape)
