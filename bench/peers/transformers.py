"""transformers' own experts functions, called as its DiffusionGemma layers call them."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from dgemma_accel.backends import compute_capability

from .. import memory
from ..bench_experts import need_plain_weights
from ..cases import Case, Variant
from . import missing

NAME = "transformers"


def unavailable(device: torch.device) -> str | None:
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: F401
    except Exception as error:
        return missing("transformers", error)
    return None


def _layer(inputs) -> SimpleNamespace:
    """What the experts functions read from the module they are given."""

    def gate(joint: torch.Tensor) -> torch.Tensor:
        first, second = joint.chunk(2, dim=-1)
        return torch.nn.functional.gelu(first, approximate="tanh") * second

    return SimpleNamespace(
        num_experts=inputs.gate_up.shape[0],
        gate_up_proj=inputs.gate_up,
        down_proj=inputs.down,
        has_gate=True,
        has_bias=False,
        is_transposed=False,
        is_concatenated=True,
        has_post_expert_norm=False,
        _is_expert_parallel=False,
        _apply_gate=gate,
    )


def _eager(inputs):
    """DiffusionGemmaTextExperts without an experts function: a loop over the experts that were chosen."""
    from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaTextExperts

    layer = _layer(inputs)
    layer.act_fn = lambda gate: torch.nn.functional.gelu(gate, approximate="tanh")
    forward = DiffusionGemmaTextExperts.forward.__wrapped__
    return lambda: forward(layer, inputs.hidden, inputs.index, inputs.weights)


def variants(case: Case, inputs) -> list[Variant]:
    if case.op != "experts":
        return []
    need_plain_weights(inputs)
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    # Which experts were chosen is asked of the device: no graph can hold it.
    found = [Variant("eager", _eager, lambda result: {"result": result}, capturable=False)]
    for name in ("grouped_mm", "batched_mm"):
        if name not in ALL_EXPERTS_FUNCTIONS:
            continue
        if name == "batched_mm":
            # It gathers the weights of every choice of every row.
            needed = inputs.index.numel() * (inputs.gate_up[0].numel() + inputs.down[0].numel())
            needed *= inputs.gate_up.element_size()
            free = memory.available(inputs.hidden.device)
            if needed > free:
                continue
        function = ALL_EXPERTS_FUNCTIONS[name]

        def prepare(inputs, function=function):
            layer = _layer(inputs)
            # fp32, as the model's router gives them.
            return lambda: function(layer, inputs.hidden, inputs.index, inputs.weights)

        # PyTorch's grouped product is a kernel on compute capability 9 and 10 alone; elsewhere it loops on the host.
        capability = compute_capability(inputs.hidden.device) or (0, 0)
        capturable = name != "grouped_mm" or capability[0] in (9, 10)
        found.append(Variant(name, prepare, lambda result: {"result": result}, capturable=capturable))
    return found
