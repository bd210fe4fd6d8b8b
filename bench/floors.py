"""The least time of a denoising step, by component, from the model's shapes and two ceilings.

Each component costs the larger of its traffic over the bandwidth and its operations over the matrix rate; the
components follow one another, so their floors are added. Nothing is assumed to stay in a cache between components,
and norms, rotations and residuals are left out: they could ride along with a product.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FIGURES = Path(__file__).with_name("model_figures.json")


def load_figures() -> dict:
    """DiffusionGemma 26B-A4B in transformers' keys: canvas_length, text_config, generation."""
    return json.loads(FIGURES.read_text())


def layer_counts(layers: int) -> tuple[int, int]:
    """(sliding, global) layers: every sixth is global, and the last always."""
    whole = layers // 6
    global_layers = whole if layers % 6 == 0 else whole + 1
    return layers - global_layers, global_layers


@dataclass(frozen=True)
class Precision:
    """Bytes of an element, and the matrix rate relative to the ceiling.

    Layer weights (experts, attention projections, dense MLP) may be narrower than the embedding, the activations and
    the cache, which keep `element`. Where `expert` is given it is the experts', their scales included, and their
    products are at the rate of `element`.
    """

    element: int = 2
    weight: float = 2
    weight_rate: float = 1.0
    expert: float | None = None


BF16 = Precision()
FP8_WEIGHTS = Precision(weight=1, weight_rate=2.0)
# Bytes of an expert's weight by the format of `quantize_experts`. FP8's scales are a 4096th of its bytes.
EXPERT_BYTES = {"fp8": 1, "nvfp4": 0.5 + 1 / 16}
# Bytes and rate of the layers' other weights by the format of `quantize_linears`.
LINEARS = {"fp8": {"weight": 1, "weight_rate": 2.0}}


def precision_of(element: int, experts: str | None, linears: str | None) -> Precision:
    """Of a model whose weights are `element` bytes wide, but for those of these formats."""
    expert = EXPERT_BYTES.get(experts)
    if linears is None:
        return Precision(element, element, expert=expert)
    return Precision(element, **LINEARS[linears], expert=element if expert is None else expert)


def components(
    text: dict,
    canvas: int,
    context: int,
    batch: int = 1,
    precision: Precision = BF16,
    global_layers: int | None = None,
) -> dict[str, list[tuple[float, float]]]:
    """component -> [(bytes, operations)], operations already scaled to the ceiling's rate.

    Args:
        text: `text_config` in transformers' keys.
        canvas: rows of a canvas. context: tokens before it. batch: canvases.
        global_layers: how many layers are global, if not every sixth.
    """
    hidden, vocab, heads = text["hidden_size"], text["vocab_size"], text["num_attention_heads"]
    layers, rows = text["num_hidden_layers"], batch * canvas
    sliding_layers, wide_layers = layer_counts(layers)
    if global_layers is not None:
        sliding_layers, wide_layers = layers - global_layers, global_layers
    head_dim, kv_heads = text["head_dim"], text["num_key_value_heads"]
    wide_dim, wide_kv = text["global_head_dim"], text["num_global_key_value_heads"]
    element = precision.element

    def product(weights: float, used_rows: float = rows) -> tuple[float, float]:
        return weights * precision.weight, 2 * weights * used_rows / precision.weight_rate

    projections = sliding_layers * hidden * head_dim * (2 * heads + 2 * kv_heads)
    # A global layer has no v_proj: keys and values come from one projection.
    projections += wide_layers * hidden * wide_dim * (2 * heads + wide_kv)
    window = min(context, text["sliding_window"] - 1)

    def attention(count: int, keys: int, dim: int, kv: int) -> tuple[float, float]:
        traffic = 2 * batch * keys * kv * dim * element
        return count * traffic, count * 4.0 * rows * heads * keys * dim

    expert = 3 * hidden * text["moe_intermediate_size"]
    chosen = text["top_k_experts"]
    # The experts that `rows` independent choices of `chosen` touch on average; all of them at 256 rows of 8.
    touched = text["num_experts"] * (1 - (1 - chosen / text["num_experts"]) ** rows)
    width, rate = precision.weight, precision.weight_rate
    if precision.expert is not None:
        width, rate = precision.expert, 1.0
    expert_bytes = layers * expert * touched * width
    expert_operations = 2.0 * layers * expert * rows * chosen / rate
    head = vocab * hidden
    table = rows * vocab * element
    return {
        "attention": [
            product(projections),
            attention(sliding_layers, window + canvas, head_dim, kv_heads),
            attention(wide_layers, context + canvas, wide_dim, wide_kv),
        ],
        "experts": [(expert_bytes, expert_operations)],
        "dense MLP": [product(layers * 3 * hidden * text["intermediate_size"])],
        "head": [(head * element + table, 2.0 * head * rows)],
        "self-conditioning": [
            (head * element + table, 2.0 * head * rows),
            product(3 * hidden * text["intermediate_size"]),
        ],
    }


def step_ms(parts: dict[str, list[tuple[float, float]]], bandwidth: float, flops: float) -> dict[str, float]:
    """Milliseconds of each component, and their sum as "total".

    Args:
        parts: of `components`.
        bandwidth: bytes/s. flops: operations/s.
    """
    times = {
        name: 1e3 * sum(max(moved / bandwidth, operations / flops) for moved, operations in pieces)
        for name, pieces in parts.items()
    }
    return times | {"total": sum(times.values())}
