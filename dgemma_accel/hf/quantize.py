"""`quantize_experts`: FP8 or NVFP4 weights for the experts of a DiffusionGemma, made from the model's own."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from ..ops.checks import FLOAT_DTYPES
from ..ops.experts import experts
from ..reference.quantization import SCALE_GROUP, quantize, quantize_nvfp4
from .check import check_model
from .copies import shares_layers_with
from .experts import ACTIVATIONS, PLAIN, scales_of
from .patches import acceleration_of
from .quantized import Quantized, parameter

WEIGHTS = ("gate_up_proj", "down_proj")
# Format to (the function that rounds [N, K], what its results after the weights are called behind a weight's name).
FORMATS = {
    "fp8": (quantize, ("_scale_inv",)),
    "nvfp4": (quantize_nvfp4, ("_scale", "_global_scale")),
}


class QuantizedExperts(Quantized):
    """`DiffusionGemmaTextExperts` with quantized weights: `forward` is the op `experts`, accelerated or not.

    Attributes:
        format: "fp8" or "nvfp4".
        gate_up_proj, down_proj: the weights, as the op `experts` takes them.
        gate_up_proj_scale_inv, down_proj_scale_inv: the scales of FP8, named as in transformers' `FP8Experts`; by row
            where such a checkpoint was read.
        gate_up_proj_scale, gate_up_proj_global_scale, down_proj_scale, down_proj_global_scale: those of NVFP4.
        act_fn: the activation's module, the original's.
    """

    def __init__(self, original: nn.Module, format: str, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.format = format
        self.num_experts, self.hidden_dim = original.num_experts, original.hidden_dim
        self.intermediate_dim, self.act_fn = original.intermediate_dim, original.act_fn
        for name, held in parameters.items():
            self.register_parameter(name, held)
        self.train(original.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[R, E] of hidden_states [R, E], top_k_index [R, K] int64 and top_k_weights [R, K]."""
        return experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            self.gate_up_proj,
            self.down_proj,
            **scales_of(self),
            activation=ACTIVATIONS[type(self.act_fn).__name__],
        )


def quantize_experts(model, *, format: str = "fp8"):
    """Replace the weights of all experts by quantized ones: half or 0.28 of the memory, and of the traffic of a step.

    "fp8": each block of 128 x 128 weights gets the scale that brings its largest to 448, the end of float8_e4m3fn.
    "nvfp4": each 16 consecutive weights of a row get a float8_e4m3fn scale that brings their largest to 6, the end of
    e2m1, times a global scale of each expert's matrix. Weights are rounded to nearest even. Rows stay in the model's
    dtype, as do attention, dense MLP, router and embedding. The old weights of a layer are released before the next one
    is looked at, so quantizing on the CPU and moving the model afterwards needs a GPU with room for the small one only.
    There is no way back but loading the model again. What `save_pretrained` writes then is read by
    `dgemma_accel.from_pretrained`, which can also quantize a model while reading it. A model of which transformers
    quantized other parts cannot be saved any more.

    Args:
        model: a transformers `DiffusionGemmaForBlockDiffusion` with weights in bf16, fp16 or fp32, not accelerated
            yet. Experts that this function quantized to the same format before stay as they are.
        format: "fp8" (8 bits and 1 / 512 by weight) or "nvfp4" (4.5 bits by weight).

    Returns:
        The model.

    Raises:
        TypeError: a model of another class; experts that are not transformers' plain ones (quantised otherwise, or
            sharded).
        ValueError: a format that is not known; the model is accelerated; experts that were quantized to another
            format; with "nvfp4" a width that is no multiple of 16; weights that are not loaded (meta, offloaded) or not
            finite. The model is as it was, but for weights that are not finite: layers before them are quantized then.
        ImportError: as `accelerate`.

    Source: the FP8 format is that of FP8Experts in transformers' integrations/finegrained_fp8.py, whose quantisation
        leaves out matrices with a side that 128 does not divide; the last block of a side is narrower here. The other
        is that of NVFP4 checkpoints, whose rows are quantised as well.
    """
    check_model(model)
    check_format(format)
    check_not_accelerated(model, "quantize_experts")
    # Layers of the encoder and the decoder share their weights.
    sharing: dict[tuple[int, ...], list[nn.Module]] = {}
    for layer in layers_of(model):
        if isinstance(layer.experts, QuantizedExperts):
            if layer.experts.format != format:
                raise ValueError(f"format: its experts were quantized to {layer.experts.format!r} before")
            continue
        check_experts(layer.experts, format)
        _check_loaded(layer.experts)
        key = tuple(id(getattr(layer.experts, name)) for name in WEIGHTS)
        sharing.setdefault(key, []).append(layer)
    for layers in sharing.values():
        _replace(layers, format)
    # Imports transformers.
    from .quantizer import can_be_saved

    can_be_saved(model)
    return model


def layers_of(model) -> tuple[nn.Module, ...]:
    """Those of the encoder before those of the decoder, which share their weights."""
    return (*model.model.encoder.language_model.layers, *model.model.decoder.layers)


def check_not_accelerated(model, function: str) -> None:
    """Raise where `function`, which replaces modules, comes too late."""
    if acceleration_of(model) is not None or shares_layers_with(model) is not None:
        raise ValueError(
            f"model: it is accelerated; call {function}(model) before accelerate(model), or after restore(model)"
        )


def check_format(format: str, name: str = "format", formats: Iterable[str] = FORMATS) -> None:
    if format not in formats:
        raise ValueError(f"{name}: must be one of {tuple(formats)}, got {format!r}")


def check_experts(module: nn.Module, format: str) -> None:
    """Raise unless these are transformers' plain experts, in a dtype and with widths that `format` can stand for."""
    if type(module).__name__ != PLAIN or type(module.act_fn).__name__ not in ACTIVATIONS:
        kind = type(module).__name__
        raise TypeError(f"model: its experts are a {kind} with {type(module.act_fn).__name__}, not {PLAIN}")
    for name in WEIGHTS:
        weight = getattr(module, name)
        if type(weight) is not nn.Parameter or weight.dtype not in FLOAT_DTYPES:
            raise TypeError(f"model: {name} of its experts is a {type(weight).__name__} of {weight.dtype}")
        if format == "nvfp4" and weight.shape[-1] % SCALE_GROUP:
            raise ValueError(
                f"model: {name} of its experts has {weight.shape[-1]} columns, and {SCALE_GROUP} share a scale of NVFP4"
            )


def _check_loaded(module: nn.Module) -> None:
    for name in WEIGHTS:
        if getattr(module, name).is_meta or hasattr(module, "_hf_hook"):
            raise ValueError(f"model: {name} of its experts is not loaded (meta or offloaded)")


def _replace(layers: Iterable[nn.Module], format: str) -> None:
    originals = [layer.experts for layer in layers]
    parameters = parameters_of(originals[0], format)
    for layer, original in zip(layers, originals):
        layer.experts = QuantizedExperts(original, format, parameters)


def parameters_of(original: nn.Module, format: str) -> dict[str, nn.Parameter]:
    """The parameters of the `QuantizedExperts` that stands for plain experts, loaded or on the meta device."""
    tensors = {}
    for name in WEIGHTS:
        tensors |= quantized(getattr(original, name).detach(), name, format)
    return {name: parameter(tensor) for name, tensor in tensors.items()}


def quantized(weight: Tensor, name: str, format: str) -> dict[str, Tensor]:
    """The tensors that stand for a weight [X, N, K], by the names of their parameters.

    An expert is rounded after the other, since fp32 is computed in.

    Raises:
        ValueError: a weight that is not finite.
    """
    function, endings = FORMATS[format]
    results: list[Tensor] = []
    for number, matrix in enumerate(weight):
        parts = function(matrix)
        results = results or [part.new_empty((len(weight), *part.shape)) for part in parts]
        for result, part in zip(results, parts):
            result[number] = part
    if not weight.is_meta and not results[-1].isfinite().all():
        raise ValueError(f"model: {name} of its experts is not finite")
    return dict(zip((name, *(name + ending for ending in endings)), results))
