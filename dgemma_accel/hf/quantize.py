"""`quantize_experts`: FP8 weights for the experts of a DiffusionGemma, made from the model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..ops.checks import FLOAT_DTYPES
from ..ops.experts import FP8, experts
from ..reference.quantization import quantize, scale_shape
from .check import check_model
from .experts import ACTIVATIONS, PLAIN
from .patches import acceleration_of

WEIGHTS = ("gate_up_proj", "down_proj")


class QuantizedExperts(nn.Module):
    """`DiffusionGemmaTextExperts` with FP8 weights: `forward` is the op `experts`, accelerated or not.

    Attributes:
        gate_up_proj: [X, 2 * I, E] float8_e4m3fn. gate_up_proj_scale_inv: [X, ceil(2 * I / 128), ceil(E / 128)] fp32.
        down_proj: [X, E, I] float8_e4m3fn. down_proj_scale_inv: [X, ceil(E / 128), ceil(I / 128)] fp32.
        act_fn: the activation's module, the original's.

    A change of the model's dtype (`model.half()`) leaves weights and scales as they are.
    """

    def __init__(self, original: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.num_experts, self.hidden_dim = original.num_experts, original.hidden_dim
        self.intermediate_dim, self.act_fn = original.intermediate_dim, original.act_fn
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
        self.train(original.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[R, E] of hidden_states [R, E], top_k_index [R, K] int64 and top_k_weights [R, K]."""
        return experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            self.gate_up_proj,
            self.down_proj,
            gate_up_scale=self.gate_up_proj_scale_inv,
            down_scale=self.down_proj_scale_inv,
            activation=ACTIVATIONS[type(self.act_fn).__name__],
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)


def quantize_experts(model):
    """Replace the weights of all experts by FP8 ones: half the memory, and half the traffic that bounds a step.

    Each block of 128 x 128 weights gets the scale that brings its largest to 448, the end of float8_e4m3fn; weights are
    rounded to nearest even. Rows stay in the model's dtype, as do attention, dense MLP, router and embedding. The old
    weights of a layer are released before the next one is looked at, so quantizing on the CPU and moving the model
    afterwards needs a GPU with room for the small one only. There is no way back but loading the model again, and
    `save_pretrained` refuses: transformers would not read such a checkpoint.

    Args:
        model: a transformers `DiffusionGemmaForBlockDiffusion` with weights in bf16, fp16 or fp32, not accelerated
            yet. Experts that this function quantized before stay as they are.

    Returns:
        The model.

    Raises:
        TypeError: a model of another class; experts that are not transformers' plain ones (quantised otherwise, or
            sharded).
        ValueError: the model is accelerated; weights that are not loaded (meta, offloaded) or not finite. The model
            is as it was, but for weights that are not finite: layers before them are quantized then.
        ImportError: as `accelerate`.

    Source: the format is that of FP8Experts in transformers' integrations/finegrained_fp8.py, whose quantisation
        leaves out matrices with a side that 128 does not divide; the last block of a side is narrower here.
    """
    check_model(model)
    if acceleration_of(model) is not None:
        raise ValueError(
            "model: it is accelerated; call quantize_experts(model) before accelerate(model), or after restore(model)"
        )
    # Layers of the encoder and the decoder share their weights.
    sharing: dict[tuple[int, ...], list[nn.Module]] = {}
    for layer in (*model.model.encoder.language_model.layers, *model.model.decoder.layers):
        if not isinstance(layer.experts, QuantizedExperts):
            _check_experts(layer.experts)
            key = tuple(id(getattr(layer.experts, name)) for name in WEIGHTS)
            sharing.setdefault(key, []).append(layer)
    for layers in sharing.values():
        _replace(layers)
    model.__dict__["save_pretrained"] = _refuse_to_save
    return model


def _check_experts(module: nn.Module) -> None:
    if type(module).__name__ != PLAIN or type(module.act_fn).__name__ not in ACTIVATIONS:
        kind = type(module).__name__
        raise TypeError(f"model: its experts are a {kind} with {type(module.act_fn).__name__}, not {PLAIN}")
    for name in WEIGHTS:
        weight = getattr(module, name)
        if type(weight) is not nn.Parameter or weight.dtype not in FLOAT_DTYPES:
            raise TypeError(f"model: {name} of its experts is a {type(weight).__name__} of {weight.dtype}")
        if weight.is_meta or hasattr(module, "_hf_hook"):
            raise ValueError(f"model: {name} of its experts is not loaded (meta or offloaded)")


def _replace(layers: Iterable[nn.Module]) -> None:
    originals = [layer.experts for layer in layers]
    parameters = {}
    for name in WEIGHTS:
        weight, scale = _quantized(getattr(originals[0], name).detach(), name)
        parameters[name] = nn.Parameter(weight, requires_grad=False)
        parameters[f"{name}_scale_inv"] = nn.Parameter(scale, requires_grad=False)
    for layer, original in zip(layers, originals):
        layer.experts = QuantizedExperts(original, parameters)


def _quantized(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """`reference.experts.quantize` of one expert after the other, since it computes in fp32."""
    result = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    scale = torch.empty(scale_shape(weight.shape), dtype=torch.float32, device=weight.device)
    for number, matrix in enumerate(weight):
        codes, scales = quantize(matrix)
        result[number], scale[number] = codes, scales
    if not scale.isfinite().all():
        raise ValueError(f"model: {name} of its experts is not finite")
    return result, scale


def _refuse_to_save(*args, **kwargs):
    raise NotImplementedError(
        "save_pretrained: transformers does not read experts of quantize_experts(model); save the model before, and "
        "quantize it again after loading"
    )
