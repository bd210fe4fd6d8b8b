"""The models of the step bench: the full DiffusionGemma with random weights made on the device, and the tiny one."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import torch
from torch import nn

from . import memory
from .cases import BenchError
from .floors import EXPERT_BYTES, Precision, components, layer_counts, load_figures

TINY = Path(__file__).resolve().parent.parent / "examples" / "tiny-dgemma" / "checkpoint"

# The smallest vision tower that the architecture accepts; a step never runs it.
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 64,
    "max_position_embeddings": 512,
}


def layer_types(layers: int) -> list[str]:
    _, wide = layer_counts(layers)
    kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers)]
    kinds[-1] = "full_attention"
    assert kinds.count("full_attention") == wide
    return kinds


def full_config(layers: int | None = None, overrides: dict | None = None):
    """DiffusionGemmaConfig of the 26B-A4B model, with fewer layers or other text figures where asked."""
    from transformers import DiffusionGemmaConfig, DiffusionGemmaTextConfig, Gemma4VisionConfig

    figures = load_figures()
    text = dict(figures["text_config"]) | {
        "num_hidden_layers": layers or figures["text_config"]["num_hidden_layers"]
    }
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    text |= special | (overrides or {})
    canvas = text.pop("canvas_length", figures["canvas_length"])
    text["layer_types"] = layer_types(text["num_hidden_layers"])
    # Image tokens must exist in a vocabulary that an override made smaller.
    top = text["vocab_size"]
    return DiffusionGemmaConfig(
        text_config=DiffusionGemmaTextConfig(**text),
        vision_config=Gemma4VisionConfig(**VISION),
        canvas_length=canvas,
        boi_token_id=top - 1,
        eoi_token_id=top - 2,
        image_token_id=top - 3,
    )


def text_figures(config) -> tuple[dict, int]:
    """(text_config in the keys that `floors` reads, number of global layers) of a DiffusionGemmaConfig."""
    text = config.text_config
    names = (
        "hidden_size",
        "vocab_size",
        "num_attention_heads",
        "num_hidden_layers",
        "sliding_window",
        "num_experts",
        "moe_intermediate_size",
        "top_k_experts",
        "intermediate_size",
    )
    wide = text.per_layer_config[text.num_hidden_layers - 1]
    sliding = wide
    if "sliding_attention" in text.layer_types:
        sliding = text.per_layer_config[text.layer_types.index("sliding_attention")]
    figures = {name: getattr(text, name) for name in names}
    figures |= {"head_dim": sliding.head_dim, "num_key_value_heads": sliding.num_key_value_heads}
    figures |= {"global_head_dim": wide.head_dim, "num_global_key_value_heads": wide.num_key_value_heads}
    return figures, text.layer_types.count("full_attention")


def parameter_bytes(config, dtype: torch.dtype) -> int:
    """Bytes of the text model's matrices."""
    figures, wide = text_figures(config)
    # One row that chooses every expert reads each layer's weights once.
    sizes = components(
        figures | {"top_k_experts": figures["num_experts"]},
        1,
        0,
        precision=Precision(1, 1),
        global_layers=wide,
    )
    layers = sum(sizes[name][0][0] for name in ("attention", "experts", "dense MLP"))
    return (int(layers) + figures["vocab_size"] * figures["hidden_size"]) * dtype.itemsize


def build(config, device: torch.device, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """The model with random weights, made on the device without a copy anywhere else.

    Encoder and decoder share their weights, so each tensor is made once. The values are those that transformers would
    start training from.
    """
    from transformers import DiffusionGemmaForBlockDiffusion

    free, needed = memory.available(device), parameter_bytes(config, dtype)
    if needed > free:
        raise BenchError(
            f"the model does not fit: its weights need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "--layers N makes it smaller"
        )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = DiffusionGemmaForBlockDiffusion(config)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    made: dict[int, nn.Parameter] = {}
    torch.manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(
                    torch.empty(parameter.shape, dtype=dtype, device=device), requires_grad=False
                )
            setattr(module, name, made[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            # Every buffer that is no constant 1 is set by the model's own initialisation below.
            kept = torch.float32 if "inv_freq" in name else buffer.dtype
            module._buffers[name] = torch.ones(buffer.shape, dtype=kept, device=device)
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()
    return model.eval()


def tiny(device: torch.device) -> tuple[nn.Module, str]:
    """(the trained model of examples/tiny-dgemma, where it is from); random weights of its size where it is missing."""
    from transformers import DiffusionGemmaForBlockDiffusion

    if (TINY / "config.json").exists():
        model = DiffusionGemmaForBlockDiffusion.from_pretrained(TINY, dtype=torch.float32)
        return model.to(device).eval(), str(TINY.relative_to(TINY.parents[2]))
    overrides = {
        "vocab_size": 128,
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "global_head_dim": 64,
        "num_global_key_value_heads": 1,
        "sliding_window": 16,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
        "max_position_embeddings": 4096,
        "canvas_length": 32,
    }
    model = build(full_config(4, overrides), device, torch.float32)
    return model, "random weights: examples/tiny-dgemma/checkpoint is missing"


def twin(model: nn.Module) -> nn.Module:
    """Another model over the same weights: what one is given (patches, compiled functions) the other does not have."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def room_for_experts(model: nn.Module, form: str) -> None:
    """Raise unless the experts' weights fit once more, in a format of `quantize_experts`.

    Raises:
        BenchError: they do not.
    """
    weights = {p for name, p in model.named_parameters() if ".experts." in name}
    numbers = sum(weight.numel() for weight in weights)
    free, needed = memory.available(model.device), numbers * EXPERT_BYTES[form]
    if needed > free:
        raise BenchError(
            f"{form.upper()} experts do not fit beside the model: {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        )


def random_cache(model: nn.Module, batch: int, context: int, *, kind: str, room: int):
    """A cache that holds `context` tokens of random keys and values, as after a prompt of that length.

    A prompt of 128k would take longer than all steps that are to be measured, and its values do not matter.

    Args:
        kind: "dynamic"; "static", transformers' `StaticCache` with space for `room` more tokens; "ours", a
            `PreallocatedCache` with as much.
    """
    from transformers import DynamicCache, StaticCache

    text = model.config.text_config
    device, dtype = model.device, model.dtype
    if kind == "ours":
        from dgemma_accel.hf.preallocated import PreallocatedCache

        cache = PreallocatedCache(model.config, context + room)
    else:
        static = kind == "static"
        cache = (
            StaticCache(config=text, max_cache_len=context + room) if static else DynamicCache(config=text)
        )
    noise = torch.Generator(device=device).manual_seed(1)
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        for layer in range(text.num_hidden_layers):
            layer_config = text.per_layer_config[layer]
            shape = (batch, layer_config.num_key_value_heads, context, layer_config.head_dim)
            key = torch.empty(shape, dtype=dtype, device=device).normal_(generator=noise)
            value = torch.empty(shape, dtype=dtype, device=device).normal_(generator=noise)
            cache.update(key, value, layer)
            if kind == "dynamic" and text.layer_types[layer] == "sliding_attention":
                # transformers keeps a view of the last window, and with it the memory of the whole context.
                kept = cache.layers[layer]
                kept.keys, kept.values = kept.keys.clone(), kept.values.clone()
    finally:
        logger.setLevel(level)
    return cache
