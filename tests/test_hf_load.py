"""`from_pretrained` and `save_pretrained` of models with quantized experts."""

import gc
import json
import shutil
import weakref

import pytest
import torch
from hf_models import generate, prompt, tiny_model, transformers
from safetensors import safe_open

import dgemma_accel
from dgemma_accel.cli.generate import load
from dgemma_accel.hf import quantizer
from dgemma_accel.hf.quantize import FORMATS, QuantizedExperts, layers_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH = 96


@pytest.fixture(scope="module", params=FORMATS)
def format(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a model that is not quantized, in bf16."""
    folder = tmp_path_factory.mktemp("plain")
    tiny_model(torch.bfloat16, expert_width=WIDTH).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(checkpoint, format):
    """The same model, quantized in memory."""
    model = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(checkpoint)
    return dgemma_accel.quantize_experts(model, format=format)


@pytest.fixture(scope="module")
def saved(quantized, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    quantized.save_pretrained(folder)
    return folder


def assert_same(model, expected):
    theirs = expected.state_dict()
    assert model.state_dict().keys() == theirs.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.cpu().float(), theirs[name].float()), name
    encoder, decoder = model.model.encoder.language_model.layers, model.model.decoder.layers
    for mine, other in zip(encoder, decoder, strict=True):
        for name, parameter in mine.experts.named_parameters():
            assert parameter is getattr(other.experts, name), name
    assert not model.training


def test_quantized_while_reading(checkpoint, quantized, format):
    model = dgemma_accel.from_pretrained(checkpoint, experts=format)
    assert all(layer.experts.format == format for layer in layers_of(model))
    assert_same(model, quantized)


def test_saved_and_read(saved, quantized, format):
    assert_same(dgemma_accel.from_pretrained(saved), quantized)
    assert_same(dgemma_accel.from_pretrained(saved, experts=format, dtype=torch.bfloat16), quantized)


def test_a_config_given_as_a_path(saved, quantized, format):
    assert_same(dgemma_accel.from_pretrained(saved, config=str(saved)), quantized)
    other = {"fp8": "nvfp4", "nvfp4": "fp8"}[format]
    with pytest.raises(ValueError, match=f"experts: the checkpoint's are {format!r}, got {other!r}"):
        dgemma_accel.from_pretrained(saved, experts=other, config=saved)
    with pytest.raises(ValueError, match="tp_plan: quantized weights cannot be sharded"):
        dgemma_accel.from_pretrained(saved, config=saved, tp_plan="auto")


def test_a_config_that_does_not_say_that_the_checkpoint_is_quantized(
    checkpoint, saved, quantized, format, tmp_path
):
    config = transformers.DiffusionGemmaConfig.from_pretrained(checkpoint)
    for given in (config, checkpoint):
        for experts in (None, format):
            with pytest.raises(ValueError, match=f"config: needs the quantization_config .* are {format!r}"):
                dgemma_accel.from_pretrained(saved, experts=experts, config=given)
    assert_same(dgemma_accel.from_pretrained(checkpoint, experts=format, config=config), quantized)
    # Weights alone, to which the given config belongs.
    shutil.copy(checkpoint / "model.safetensors", tmp_path)
    assert_same(dgemma_accel.from_pretrained(tmp_path, experts=format, config=config), quantized)


def test_saved_again(checkpoint, quantized, format, tmp_path):
    """A model that was quantized while it was read, and one that was read quantized."""
    model = dgemma_accel.from_pretrained(checkpoint, experts=format)
    for number in range(2):
        model.save_pretrained(tmp_path / str(number))
        model = dgemma_accel.from_pretrained(tmp_path / str(number))
        assert_same(model, quantized)


def test_saved_while_accelerated(quantized, tmp_path):
    with dgemma_accel.accelerated(quantized):
        quantized.save_pretrained(tmp_path)
    assert_same(dgemma_accel.from_pretrained(tmp_path), quantized)


def test_tokens_of_a_model_that_was_saved(saved, quantized):
    ids = prompt(2, 9)[0]
    expected = generate(quantized, ids).sequences
    model = dgemma_accel.from_pretrained(saved)
    assert torch.equal(generate(model, ids).sequences, expected)
    with dgemma_accel.accelerated(model, graph=False):
        accelerated = generate(model, ids).sequences
    with dgemma_accel.accelerated(quantized, graph=False):
        assert torch.equal(generate(quantized, ids).sequences, accelerated)


def test_the_file_holds_each_weight_once(saved, quantized, format):
    (file,) = saved.glob("*.safetensors")
    with safe_open(file, "pt") as content:
        held = sum(content.get_tensor(name).nbytes for name in content.keys())
    assert held == sum(parameter.nbytes for parameter in quantized.parameters()) + sum(
        buffer.nbytes for name, buffer in quantized.named_buffers() if name in quantized.state_dict()
    )
    entry = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert entry == {"format": format, "quant_method": "dgemma_accel"}


def test_on_a_device(checkpoint, saved, quantized, format):
    pytest.importorskip("accelerate")
    for model in (
        dgemma_accel.from_pretrained(checkpoint, experts=format, device_map=DEVICE),
        dgemma_accel.from_pretrained(saved, device_map=DEVICE),
    ):
        assert {parameter.device.type for parameter in model.parameters()} == {DEVICE}
        assert_same(model, quantized)


def test_one_weight_at_a_time(checkpoint, format, monkeypatch):
    right, seen = quantizer.quantized, []

    def watched(weight, *args):
        gc.collect()
        assert not [reference for reference in seen if reference() is not None]
        seen.append(weakref.ref(weight))
        return right(weight, *args)

    monkeypatch.setattr(quantizer, "quantized", watched)
    model = dgemma_accel.from_pretrained(checkpoint, experts=format)
    assert len(seen) == 2 * len(model.model.decoder.layers)


@pytest.mark.parametrize("saved_so", [False, True])
def test_the_memory_that_transformers_expects(quantized, format, saved_so):
    """Before the weights are read, what is there in their place counts as what it becomes."""
    with torch.device("meta"):
        model = tiny_model(torch.bfloat16, expert_width=WIDTH)
    quantizing = quantizer.WeightsQuantizer(quantizer.QuantizedWeightsConfig(format), pre_quantized=saved_so)
    quantizing._process_model_before_weight_loading(model)
    expected = sum(
        parameter.numel() * quantizing.param_element_size(model, name, parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name.startswith("model.decoder.layers.")
    )
    assert expected == sum(parameter.nbytes for parameter in quantized.model.decoder.layers.parameters())


def test_weights_as_they_are(checkpoint):
    model = dgemma_accel.from_pretrained(checkpoint)
    assert not [module for module in model.modules() if isinstance(module, QuantizedExperts)]
    assert_same(model, transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(checkpoint))


def test_the_command_reads_them(checkpoint, quantized, format, monkeypatch):
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda path: "tokenizer")
    model, tokenizer = load(checkpoint, experts=format)
    assert_same(model, quantized)
    assert tokenizer == "tokenizer" and model.device.type == DEVICE


class TestBadInput:
    def test_another_format(self, checkpoint):
        with pytest.raises(ValueError, match=r"experts: must be one of \('fp8', 'nvfp4'\), got 'int4'"):
            dgemma_accel.from_pretrained(checkpoint, experts="int4")

    def test_another_format_than_saved(self, saved, format):
        other = "fp8" if format == "nvfp4" else "nvfp4"
        with pytest.raises(ValueError, match=f"experts: the checkpoint's are '{format}', got '{other}'"):
            dgemma_accel.from_pretrained(saved, experts=other)

    def test_a_checkpoint_quantized_otherwise(self, checkpoint):
        config = transformers.DiffusionGemmaConfig.from_pretrained(checkpoint)
        config.quantization_config = {"quant_method": "fp8"}
        with pytest.raises(ValueError, match="experts: the checkpoint is quantized already, as 'fp8'"):
            dgemma_accel.from_pretrained(checkpoint, experts="fp8", config=config)

    def test_another_quantization_as_well(self, checkpoint):
        config = transformers.FineGrainedFP8Config()
        with pytest.raises(ValueError, match="experts: .* one quantization.* quantization_config"):
            dgemma_accel.from_pretrained(checkpoint, experts="nvfp4", quantization_config=config)

    def test_sharded_experts(self, checkpoint, saved):
        for folder, experts in ((checkpoint, "fp8"), (saved, None)):
            with pytest.raises(ValueError, match="tp_plan: quantized weights cannot be sharded"):
                dgemma_accel.from_pretrained(folder, experts=experts, tp_plan="auto")

    def test_columns_that_are_no_whole_groups(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="down_proj of its experts has 24 columns, and 16 share a scale"):
            dgemma_accel.from_pretrained(tmp_path, experts="nvfp4")

    def test_weights_that_are_not_finite(self, format, tmp_path, caplog):
        model = tiny_model(expert_width=WIDTH)
        with torch.no_grad():
            layers_of(model)[1].experts.down_proj[3, 40, 90] = float("nan")
        model.save_pretrained(tmp_path)
        # transformers gathers what went wrong in a report.
        with pytest.raises(RuntimeError), caplog.at_level("WARNING", logger="transformers"):
            dgemma_accel.from_pretrained(tmp_path, experts=format)
        assert "down_proj of its experts is not finite" in caplog.text

    def test_a_checkpoint_of_another_model(self, tmp_path):
        transformers.BertConfig(hidden_size=8, num_attention_heads=1).save_pretrained(tmp_path)
        with pytest.raises(
            ValueError, match="checkpoint: a DiffusionGemma's expected, got model_type 'bert'"
        ):
            dgemma_accel.from_pretrained(tmp_path)

    def test_no_checkpoint(self, tmp_path):
        with pytest.raises(OSError, match="no file named"):
            dgemma_accel.from_pretrained(tmp_path, experts="fp8")
