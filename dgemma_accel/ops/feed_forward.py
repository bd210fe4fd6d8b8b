"""`feed_forward`: the dense MLP and the mixture of experts of one layer, side by side on the device.

Neither needs the other. A router's chain of small kernels, and products that leave most of a GPU idle, run beside each
other instead of one after the other.
"""

from __future__ import annotations

from torch import Tensor

from ..backends import pick, requirements
from .registration import operator


@operator("feed_forward")
def _feed_forward(
    dense: Tensor,
    routed: Tensor,
    hidden: Tensor,
    dense_gate: Tensor,
    dense_up: Tensor,
    dense_down: Tensor,
    router: Tensor,
    expert_scale: Tensor,
    gate_up: Tensor,
    down: Tensor,
    top_k: int,
    activation: str,
    backend: str,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    gate_up_global_scale: Tensor | None = None,
    down_global_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    run = pick("feed_forward", backend, requirements(hidden, dtype=hidden.dtype, activation=activation))
    weights = (dense_gate, dense_up, dense_down, router, expert_scale, gate_up, down)
    scales = (gate_up_scale, down_scale, gate_up_global_scale, down_global_scale)
    return run(dense, routed, hidden, *weights, top_k, activation, *scales)


@_feed_forward.register_fake
def _(dense, routed, hidden, *others):
    return dense.new_empty(dense.shape), hidden.new_empty(hidden.shape)


def feed_forward(
    dense: Tensor,
    routed: Tensor,
    hidden: Tensor,
    dense_gate: Tensor,
    dense_up: Tensor,
    dense_down: Tensor,
    router: Tensor,
    expert_scale: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    top_k: int,
    activation: str = "gelu_tanh",
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    gate_up_global_scale: Tensor | None = None,
    down_global_scale: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(MLP [R, E], mixture [R, E]); arguments and arithmetic are those of `reference.feed_forward`.

    The tensors are those of a layer of a model, so they are not checked again.

    Raises:
        ValueError: more choices than experts, or none.
        backends.BackendError: the backend named cannot run this call.
    """
    if not 1 <= top_k <= router.shape[0]:
        raise ValueError(f"top_k: must be between 1 and the {router.shape[0]} experts, got {top_k}")
    scales = (gate_up_scale, down_scale, gate_up_global_scale, down_global_scale)
    weights = (dense_gate, dense_up, dense_down, router, expert_scale, gate_up, down)
    return _feed_forward(dense, routed, hidden, *weights, top_k, activation, backend, *scales)
