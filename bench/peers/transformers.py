"""transformers' own experts functions, called as its DiffusionGemma layers call them."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from .. import memory
from ..cases import Case, Skipped, Variant
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
        num_experts=inputs.gate_up.shape[0], gate_up_proj=inputs.gate_up, down_proj=inputs.down, has_gate=True,
        has_bias=False, is_transposed=False, is_concatenated=True, has_post_expert_norm=False,
        _is_expert_parallel=False, _apply_gate=gate,
    )


def variants(case: Case, inputs) -> list[Variant]:
    if case.op != "experts":
        return []
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    found = []
    for name in ("grouped_mm", "batched_mm"):
        if name not in ALL_EXPERTS_FUNCTIONS:
            continue
        if name == "batched_mm":
            # It gathers the weights of every choice of every row.
            needed = inputs.index.numel() * (inputs.gate_up[0].numel() + inputs.down[0].numel())
            needed *= inputs.gate_up.element_size()
            free = memory.available(inputs.hidden.device)
            if needed > free:
                if not found:
                    raise Skipped(f"batched_mm gathers {needed / 1e9:.1f} GB of weights, {free / 1e9:.1f} GB are free")
                continue
        function = ALL_EXPERTS_FUNCTIONS[name]

        def prepare(inputs, function=function):
            layer = _layer(inputs)
            weights = inputs.weights.to(inputs.hidden.dtype)
            return lambda: function(layer, inputs.hidden, inputs.index, weights)

        # Where PyTorch has no grouped product for the device, transformers loops on the host.
        found.append(Variant(name, prepare, lambda result: {"result": result}, capturable=False))
    return found
