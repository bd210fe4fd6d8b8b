"""`from_pretrained` of NVFP4 and FP8 checkpoints as ModelOpt and llm-compressor write them."""

import json

import pytest
import torch
from hf_models import generate, prompt, tiny_model, transformers
from safetensors.torch import load_file, save_file

import dgemma_accel
from dgemma_accel.hf.quantize import QuantizedExperts, layers_of
from dgemma_accel.reference.quantization import dequantize, quantize_nvfp4

WIDTH = 96
ENCODER, DECODER = "model.encoder.language_model.layers.", "model.decoder.layers."
MODELOPT = {
    "quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt", "version": "0.46.0"},
    "config_groups": {"group_0": {
        "input_activations": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
        "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"],
    }},
    "ignore": ["lm_head", "model.decoder.layers.*.self_attn*"],
}  # fmt: skip
COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "quantization_status": "compressed",
    "config_groups": {"group_0": {
        "format": "nvfp4-pack-quantized", "weights": {"num_bits": 4, "type": "float", "group_size": 16},
        "targets": ["Linear"],
    }},
    "ignore": ["lm_head"],
}  # fmt: skip
FP8_WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
COMPRESSED_FP8 = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
    "config_groups": {"group_0": {
        "format": "float-quantized", "weights": FP8_WEIGHTS, "targets": ["Linear"],
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    }},
    "ignore": ["lm_head"],
}  # fmt: skip
# An older one, without its method.
MODELOPT_FP8 = {
    "quant_algo": "FP8", "producer": {"name": "modelopt", "version": "0.40.0"}, "ignore": ["lm_head"],
    "config_groups": {"group_0": {
        "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
        "weights": {"dynamic": False, "num_bits": 8, "type": "float"}, "targets": ["Linear"],
    }},
}  # fmt: skip
CONFIGS = {
    "modelopt": MODELOPT, "compressed-tensors": COMPRESSED,
    "compressed-tensors fp8": COMPRESSED_FP8, "modelopt fp8": MODELOPT_FP8,
}  # fmt: skip


def format_of(method):
    return "fp8" if method.endswith("fp8") else "nvfp4"


def fp8_parts_of(matrix, method, name):
    """The same in FP8: a bf16 scale for each row, or one fp32 scale."""
    largest = matrix.detach().abs()
    if method == "compressed-tensors fp8":
        scale = (largest.amax(-1, keepdim=True) / 448).bfloat16()
    else:
        scale = largest.amax() / 448
    numbers = (matrix.detach() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    parts = {"weight": numbers, "weight_scale": scale}
    if method == "modelopt fp8":
        parts["input_scale"] = torch.tensor(0.5)
    return {f"{name}.{key}": tensor for key, tensor in parts.items()}, numbers.double() * scale.double()


def parts_of(matrix, method, name):
    """(tensors of a matrix under the names of a method, what they stand for in fp64)."""
    if format_of(method) == "fp8":
        return fp8_parts_of(matrix, method, name)
    numbers, scale, total = quantize_nvfp4(matrix)
    value = dequantize(numbers, scale, torch.float64, total)
    if method == "modelopt":
        parts = {"weight": numbers, "weight_scale": scale, "weight_scale_2": total}
        return {
            f"{name}.{key}": tensor for key, tensor in (parts | {"input_scale": torch.tensor(0.5)}).items()
        }, value
    parts = {"weight_packed": numbers, "weight_scale": scale, "weight_global_scale": (1 / total)[None]}
    parts["input_global_scale"] = torch.tensor([2.0])
    return {f"{name}.{key}": tensor for key, tensor in parts.items()}, value


def write(folder, method, *, side=DECODER, dense=False, change=None):
    """A checkpoint of a tiny model; returns the model with the weights that its numbers stand for, in fp32.

    dense: quantize the attention's q_proj too. change: a function of the tensors before they are written.
    """
    plain = tiny_model(torch.float32, expert_width=WIDTH)
    plain.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    written = {}
    for name, tensor in tensors.items():
        # The two sides share their weights, but not their buffers.
        own = name.replace(ENCODER, side).replace(DECODER, side)
        if name.endswith("experts.gate_up_proj"):
            for number, matrix in enumerate(tensor):
                for half, projection in zip(matrix.chunk(2), ("gate_proj", "up_proj")):
                    # Halves of another size have global scales of their own.
                    made, _ = parts_of(half, method, own.replace("gate_up_proj", f"{number}.{projection}"))
                    written |= made
        elif name.endswith("experts.down_proj"):
            for number, matrix in enumerate(tensor):
                written |= parts_of(matrix, method, own.replace("down_proj", f"{number}.down_proj"))[0]
        elif dense and name.endswith("q_proj.weight"):
            written |= parts_of(tensor, method, own.removesuffix(".weight"))[0]
        else:
            written[name] = tensor
    if change is not None:
        change(written)
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = CONFIGS[method]
    (folder / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        # The encoder shares them.
        for layer in plain.model.decoder.layers:
            for projection in ("gate_up_proj", "down_proj"):
                weight = getattr(layer.experts, projection)
                for matrix in weight:
                    halves = matrix.chunk(2) if projection == "gate_up_proj" else (matrix,)
                    matrix.copy_(torch.cat([parts_of(half.clone(), method, "")[1] for half in halves]))
            if dense:
                layer.self_attn.q_proj.weight.copy_(parts_of(layer.self_attn.q_proj.weight, method, "")[1])
    return plain


@pytest.fixture(scope="module", params=CONFIGS)
def method(request):
    return request.param


@pytest.mark.parametrize(
    "side, dense", [(DECODER, False), (ENCODER, True)], ids=["decoder", "encoder and q_proj"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_numbers_are_those_of_the_checkpoint(tmp_path, method, dtype, side, dense):
    plain = write(tmp_path, method, side=side, dense=dense)
    model, info = dgemma_accel.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not model.training
    for layer, theirs in zip(layers_of(model), layers_of(plain), strict=True):
        experts = layer.experts
        assert isinstance(experts, QuantizedExperts) and experts.format == format_of(method)
        for name in ("gate_up_proj", "down_proj"):
            if experts.format == "fp8":
                scale, total = getattr(experts, f"{name}_scale_inv"), None
                assert scale.shape == (4, 2 * WIDTH if name == "gate_up_proj" else experts.hidden_dim, 1)
            else:
                scale, total = (getattr(experts, name + ending) for ending in ("_scale", "_global_scale"))
                assert total.shape == ((4, 2) if name == "gate_up_proj" else (4,))
            value = dequantize(getattr(experts, name), scale, torch.float64, total)
            # compressed-tensors keeps one over the global scale.
            torch.testing.assert_close(value, getattr(theirs.experts, name).double(), rtol=3e-7, atol=0)
        # Through fp32, as the widened matrix is made.
        mine, other = layer.self_attn.q_proj.weight, theirs.self_attn.q_proj.weight.to(dtype)
        rtol = 0 if not dense else 1e-6 if dtype == torch.float32 else 8e-3
        torch.testing.assert_close(mine, other, rtol=rtol, atol=0)
    for mine, other in zip(model.model.encoder.language_model.layers, model.model.decoder.layers):
        for name, parameter in mine.experts.named_parameters():
            assert parameter is getattr(other.experts, name), name
    for mine, theirs in (
        (model.lm_head, plain.lm_head),
        (model.model.decoder.norm, plain.model.decoder.norm),
    ):
        assert torch.equal(mine.weight, theirs.weight.to(dtype))


def test_it_writes_what_the_widened_model_writes(tmp_path, method):
    plain = write(tmp_path, method)
    ids, mask = prompt(2, 20, left_padding=(0, 3))
    expected = generate(plain, ids, mask).sequences
    model = dgemma_accel.accelerate(dgemma_accel.from_pretrained(tmp_path, dtype=torch.float32))
    assert torch.equal(generate(model, ids, mask).sequences, expected)


def test_it_is_saved_as_a_model_with_such_experts(tmp_path, method):
    write(tmp_path, method)
    model = dgemma_accel.from_pretrained(tmp_path, experts=format_of(method))
    # They are quantized already: this leaves everything as it is.
    dgemma_accel.quantize_experts(model, format=format_of(method))
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]
    assert (
        saved["quant_method"] == "dgemma_accel"
        and saved["format"] == format_of(method)
        and not saved.get("read_from")
    )
    again = dgemma_accel.from_pretrained(tmp_path / "again")
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name].float(), tensor.float()), name


@pytest.mark.parametrize("lacking", ["weight_scale", "the global scale", "an expert"])
def test_a_checkpoint_that_lacks_something(tmp_path, method, lacking):
    if lacking == "the global scale" and format_of(method) == "fp8":
        lacking = "weight"

    def change(tensors):
        ending = {"weight": ".weight", "weight_scale": ".weight_scale", "an expert": ""}.get(lacking)
        if ending is None:
            ending = ".weight_scale_2" if method == "modelopt" else ".weight_global_scale"
        start = f"{DECODER}1.experts.{'1.' if lacking == 'an expert' else ''}"
        for name in [name for name in tensors if name.startswith(start) and name.endswith(ending)]:
            del tensors[name]

    write(tmp_path, method, change=change)
    with pytest.raises(RuntimeError, match="lacks|mismatch"):
        dgemma_accel.from_pretrained(tmp_path)


def set_quantization(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"quant_algo": "NVFP4_AWQ"}, "formats NVFP4, W4A16_NVFP4, FP8, FP8_.* are read, .* got 'NVFP4_AWQ'"),
        ({"quant_algo": "FP8_PB_WO"}, "got 'FP8_PB_WO'"),
        ({"group_size": 32}, r"got 'NVFP4' with \[16, 32\]"),
        ({"quant_algo": "FP8"}, r"got 'FP8' with \[16\]"),
    ],
)  # fmt: skip
def test_other_formats_of_modelopt(tmp_path, changes, text):
    write(tmp_path, "modelopt")
    set_quantization(tmp_path, **changes)
    with pytest.raises(ValueError, match=text):
        dgemma_accel.from_pretrained(tmp_path)


def test_other_formats_of_compressed_tensors_are_left_to_transformers(tmp_path):
    from dgemma_accel.hf.published import form_of

    assert form_of(COMPRESSED) == "compressed-tensors" and form_of(COMPRESSED_FP8) == "fp8"
    assert form_of(COMPRESSED | {"format": "float-quantized", "config_groups": {}}) is None
    for change in ({"strategy": "block", "block_structure": [128, 128]}, {"num_bits": 4}, {"type": "int"}):
        groups = {"group_0": {"format": "float-quantized", "weights": FP8_WEIGHTS | change}}
        assert form_of(COMPRESSED_FP8 | {"config_groups": groups}) is None
    both = COMPRESSED["config_groups"] | {"group_1": COMPRESSED_FP8["config_groups"]["group_0"]}
    assert form_of(COMPRESSED | {"format": "mixed-precision", "config_groups": both}) is None
    assert form_of({"quant_method": "fp8"}) is None


@pytest.mark.parametrize("wrong", ["rows", "infinite"])
def test_scales_of_fp8_that_do_not_fit(tmp_path, wrong):
    def change(tensors):
        name = f"{DECODER}1.experts.2.up_proj.weight_scale"
        scale = tensors[name]
        tensors[name] = scale[1:].clone() if wrong == "rows" else torch.full_like(scale, torch.inf)

    write(tmp_path, "compressed-tensors fp8", change=change)
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        dgemma_accel.from_pretrained(tmp_path)


def test_options_that_do_not_go_together(tmp_path, method):
    write(tmp_path, method)
    own = format_of(method)
    other = {"nvfp4": "fp8", "fp8": "nvfp4"}[own]
    with pytest.raises(ValueError, match=f"experts: the checkpoint's are '{own}', got '{other}'"):
        dgemma_accel.from_pretrained(tmp_path, experts=other)
    with pytest.raises(ValueError, match="tp_plan: quantized weights cannot be sharded"):
        dgemma_accel.from_pretrained(tmp_path, tp_plan="auto")
    config = transformers.DiffusionGemmaConfig.from_pretrained(tmp_path)
    del config.quantization_config
    with pytest.raises(
        ValueError, match=f"config: needs the quantization_config of the checkpoint, .* '{own}'"
    ):
        dgemma_accel.from_pretrained(tmp_path, config=config)
