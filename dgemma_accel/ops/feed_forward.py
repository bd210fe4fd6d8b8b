"""`feed_forward`: the dense MLP and the mixture of experts of one layer, side by side on the device.

Neither needs the other. A router's chain of small kernels, and products that leave most of a GPU idle, run beside each
other instead of one after the other.
"""

from __future__ import annotations

from typing import get_type_hints

from torch import Tensor

from ..backends import pick, requirements
from ..reference.feed_forward import FeedForwardCall
from .registration import operator


@operator("feed_forward", {**get_type_hints(FeedForwardCall), "backend": str})
def _feed_forward(*arguments) -> tuple[Tensor, Tensor]:
    call = FeedForwardCall(*arguments[:-1])
    count, two_widths = call.gate_up.shape[:2]
    sizes = {"experts": count, "embedding": call.hidden.shape[1], "width": two_widths // 2}
    needs = requirements(call.hidden, dtype=call.hidden.dtype, activation=call.activation, **sizes)
    return pick("feed_forward", arguments[-1], needs)(call)


@_feed_forward.register_fake
def _(dense, routed, hidden, *others):
    return dense.new_empty(dense.shape), hidden.new_empty(hidden.shape)


def feed_forward(call: FeedForwardCall, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """(MLP [R, E], mixture [R, E]); the arithmetic is `reference.feed_forward`.

    The tensors of the call are those of a layer of a model, so they are not checked again.

    Raises:
        ValueError: more choices than experts, or none.
        backends.BackendError: the backend named cannot run this call.
    """
    if not 1 <= call.top_k <= call.router.shape[0]:
        raise ValueError(f"top_k: must be between 1 and the {call.router.shape[0]} experts, got {call.top_k}")
    return _feed_forward(*call, backend)
