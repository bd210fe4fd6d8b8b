"""`quantize_linears`: FP8 weights for the attention projections and the dense MLPs of a DiffusionGemma."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..ops.checks import FLOAT_DTYPES
from ..ops.linears import linears
from ..reference.quantization import FP8, quantize_rows
from .check import check_model
from .quantize import check_format, check_not_accelerated, layers_of
from .quantized import Quantized, parameter

FORMATS = ("fp8",)
NOT_FINITE = "model: the weight of {} is not finite"
# The products of a layer besides its router's and its experts', by the module that holds them.
LINEARS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


class QuantizedLinear(Quantized):
    """`nn.Linear` without a bias, with FP8 weights: `forward` is the op `linears`, accelerated or not.

    Attributes:
        weight: [out_features, in_features] float8_e4m3fn.
        weight_scale: [out_features, 1] fp32, named as in compressed-tensors' checkpoints.
    """

    def __init__(self, original: nn.Linear, weight: nn.Parameter, weight_scale: nn.Parameter) -> None:
        super().__init__()
        self.in_features, self.out_features = original.in_features, original.out_features
        self.weight, self.weight_scale = weight, weight_scale
        self.train(original.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def forward(self, input: Tensor) -> Tensor:
        """[..., out_features] of input [..., in_features], in its dtype."""
        rows = input.reshape(-1, self.in_features)
        (result,) = linears(rows, [self.weight], [self.weight_scale])
        return result.view(*input.shape[:-1], self.out_features)


def quantize_linears(model, *, format: str = "fp8"):
    """Replace the weights of attention projections and dense MLPs by FP8 ones: half of their memory and traffic.

    Each output's weights get the scale that brings the largest to 448, the end of float8_e4m3fn. Rows are rounded to
    FP8 too when they are multiplied, each with a scale of its own: GPUs that multiply FP8 (8.9 and later) do it twice
    as fast as bf16. On others rows stay as they are, weights are widened in every product, and only memory is saved.
    Experts are `quantize_experts`' business; router, self-conditioning, embedding and head stay in the model's dtype.
    There is no way back but loading the model again. What `save_pretrained` writes then is read by
    `dgemma_accel.from_pretrained`, which can also quantize a model while reading it.

    Args:
        model: a transformers `DiffusionGemmaForBlockDiffusion` with weights in bf16, fp16 or fp32, not accelerated yet.
            What this function quantized before stays as it is.
        format: "fp8".

    Returns:
        The model.

    Raises:
        TypeError: a model of another class; projections that are not plain `nn.Linear`s without a bias (quantised
            otherwise, sharded, with adapters).
        ValueError: a format that is not known; the model is accelerated; weights that are not loaded (meta, offloaded)
            or not finite. The model is as it was.
        ImportError: as `accelerate`.

    Source: the format of FP8-dynamic checkpoints of compressed-tensors, "float-quantized" with strategies "channel" for
        weights and "token" for rows.
    """
    check_model(model)
    check_format(format, formats=FORMATS)
    check_not_accelerated(model, "quantize_linears")
    # Layers of the encoder and the decoder share their weights.
    sharing: dict[int, list[tuple[nn.Module, str]]] = {}
    for holder, name in places_of(model):
        module = getattr(holder, name)
        if isinstance(module, QuantizedLinear):
            continue
        check_linear(module, name)
        key = id(module.weight)
        if module.weight.is_meta or hasattr(module, "_hf_hook"):
            raise ValueError(f"model: the weight of {name} is not loaded (meta or offloaded)")
        if key not in sharing and not module.weight.isfinite().all():
            raise ValueError(NOT_FINITE.format(name))
        sharing.setdefault(key, []).append((holder, name))
    while sharing:
        # The last reference to each weight goes with its modules.
        _replace(sharing.pop(next(iter(sharing))))
    # Imports transformers.
    from .quantizer import can_be_saved

    can_be_saved(model)
    return model


def places_of(model) -> Iterator[tuple[nn.Module, str]]:
    """(the module that holds it, its name there) of each product of each layer, whatever it is now."""
    for layer in layers_of(model):
        for path, names in LINEARS.items():
            holder = getattr(layer, path)
            for name in names:
                # Keys and values of a global layer have one projection.
                if getattr(holder, name) is not None:
                    yield holder, name


def check_linear(module: nn.Module, name: str) -> None:
    """Raise unless this is a product with a weight and nothing else, in a dtype that can be rounded."""
    if type(module) is not nn.Linear or module.bias is not None:
        raise TypeError(f"model: {name} is a {type(module).__name__}, not a Linear without a bias")
    if type(module.weight) is not nn.Parameter or module.weight.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"model: the weight of {name} is a {type(module.weight).__name__} of {module.weight.dtype}"
        )


def quantized(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(numbers [N, K], scales [N, 1]) of a weight.

    Raises:
        ValueError: a weight that is not finite, or of a dtype that cannot be rounded.
    """
    if weight.dtype not in FLOAT_DTYPES:
        raise ValueError(f"model: the weight of {name} is of {weight.dtype}, and has no scale")
    numbers, scale = quantize_rows(weight)
    if not weight.is_meta and not scale.isfinite().all():
        raise ValueError(NOT_FINITE.format(name))
    return numbers, scale


def unread(original: nn.Linear, dtype: torch.dtype = FP8) -> QuantizedLinear:
    """The module for an `original` on the meta device; dtype: of the weight as it will be read."""
    weight = original.weight
    scale = weight.new_empty((len(weight), 1), dtype=torch.float32)
    return QuantizedLinear(original, parameter(weight.detach().to(dtype)), parameter(scale))


def _replace(places: list[tuple[nn.Module, str]]) -> None:
    originals = [getattr(holder, name) for holder, name in places]
    weight, scale = map(parameter, quantized(originals[0].weight.detach(), places[0][1]))
    for (holder, name), original in zip(places, originals):
        setattr(holder, name, QuantizedLinear(original, weight, scale))
