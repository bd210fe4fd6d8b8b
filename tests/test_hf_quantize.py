"""`quantize_experts`: FP8 and NVFP4 weights for the experts of a model, with and without the kernels."""

import copy
import weakref

import pytest
import torch
from hf_models import CANVAS, generate, prompt, tiny_model, trace_without_inductor, transformers

import dgemma_accel
from dgemma_accel.hf import experts as hf_experts
from dgemma_accel.hf.quantize import FORMATS, WEIGHTS, QuantizedExperts, layers_of
from dgemma_accel.reference.quantization import FP8, NVFP4, dequantize, quantize, quantize_nvfp4

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Experts of more than one block, which the up projection shares with the gate, and a last block that is not whole.
WIDTH = 96


def wide_model(dtype=torch.float32):
    return tiny_model(dtype, expert_width=WIDTH).to(DEVICE)


def there_and_back(weight, format):
    """A weight rounded to a format, in fp32."""
    if format == "fp8":
        return dequantize(*quantize(weight), torch.float32)
    codes, scale, total = quantize_nvfp4(weight)
    return dequantize(codes, scale, torch.float32, total)


def rounded(model, format):
    """The model with weights of experts that were rounded to a format and back."""
    for experts in {layer.experts.gate_up_proj: layer.experts for layer in layers_of(model)}.values():
        with torch.no_grad():
            for name in WEIGHTS:
                weight = getattr(experts, name)
                weight.copy_(there_and_back(weight, format))
    return model


@pytest.fixture(scope="module", params=FORMATS)
def format(request):
    return request.param


@pytest.fixture
def quantized(format):
    return dgemma_accel.quantize_experts(wide_model(), format=format)


@pytest.fixture(scope="module")
def expected(format):
    """The tokens of the reference with rounded weights."""
    return generate(rounded(wide_model(), format), prompt(2, 9)[0].to(DEVICE)).sequences


def test_tokens_are_those_of_the_rounded_weights(quantized, expected):
    ids = prompt(2, 9)[0].to(DEVICE)
    assert torch.equal(generate(quantized, ids).sequences, expected)
    with dgemma_accel.accelerated(quantized, graph=False):
        assert torch.equal(generate(quantized, ids).sequences, expected)
    assert torch.equal(generate(quantized, ids).sequences, expected)


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_the_backend_named_serves_them(quantized, format, monkeypatch, caplog, name):
    if name == "triton":
        module = pytest.importorskip("dgemma_accel.triton_kernels.experts")
        if module.unavailable() is not None:
            pytest.skip(str(module.unavailable()))
    seen, right = set(), hf_experts.experts

    def recorded(*args, **kwargs):
        seen.add(kwargs["backend"])
        return right(*args, **kwargs)

    # One row and two steps: the interpreter is slow.
    ids, options = prompt(1, 9)[0].to(DEVICE), {"max_new_tokens": CANVAS, "max_denoising_steps": 2}
    expected = generate(rounded(wide_model(), format), ids, **options).sequences
    monkeypatch.setattr(hf_experts, "experts", recorded)
    dgemma_accel.accelerate(quantized, backend=name, graph=False)
    with caplog.at_level("WARNING", logger="dgemma_accel"):
        result = generate(quantized, ids, **options).sequences
    assert torch.equal(result, expected) and seen == {name}
    assert not [record for record in caplog.records if record.getMessage().startswith("experts:")]


def test_the_step_is_traced_whole(quantized, expected, monkeypatch, caplog):
    trace_without_inductor(monkeypatch)
    dgemma_accel.accelerate(quantized, graph=True)
    with caplog.at_level("WARNING", logger="dgemma_accel"):
        assert torch.equal(generate(quantized, prompt(2, 9)[0].to(DEVICE)).sequences, expected)
    assert not caplog.records


def test_rounding_matters(expected):
    """The seed is one at which either format changes the tokens, so that the tests above see the scales."""
    assert not torch.equal(generate(wide_model(), prompt(2, 9)[0].to(DEVICE)).sequences, expected)


def test_weights_are_shared_and_the_old_ones_released(format):
    model = wide_model(torch.bfloat16)
    before = {name: weakref.ref(getattr(layers_of(model)[0].experts, name)) for name in WEIGHTS}
    sizes = {name: reference().nbytes for name, reference in before.items()}
    assert dgemma_accel.quantize_experts(model, format=format) is model
    dtype, share = {"fp8": (FP8, 2), "nvfp4": (NVFP4, 4)}[format]
    assert all(reference() is None for reference in before.values())
    encoder, decoder = model.model.encoder.language_model.layers, model.model.decoder.layers
    for mine, theirs in zip(encoder, decoder, strict=True):
        assert mine.experts is not theirs.experts
        for name in WEIGHTS:
            weight = getattr(mine.experts, name)
            assert weight.dtype == dtype and share * weight.nbytes == sizes[name] and not weight.requires_grad
            for shared in (name, *(name + ending for ending in FORMATS[format][1])):
                assert getattr(mine.experts, shared) is getattr(theirs.experts, shared)
    assert encoder[0].experts.gate_up_proj is not encoder[1].experts.gate_up_proj


def test_fp8_is_the_default():
    model = dgemma_accel.quantize_experts(wide_model())
    assert all(layer.experts.format == "fp8" for layer in layers_of(model))


def test_a_released_size_in_each_format():
    """Bits by weight, scales included, at DiffusionGemma's hidden sizes."""
    weights = torch.randn(1408, 2816), torch.randn(2816, 704)
    for function, bits in ((quantize, 8 + 32 / 128**2), (quantize_nvfp4, 4 + 8 / 16)):
        found = 8 * sum(part.nbytes for weight in weights for part in function(weight))
        assert found / sum(weight.numel() for weight in weights) == pytest.approx(bits, rel=1e-3)


def test_quantizing_twice_changes_nothing(quantized, format):
    before = [layer.experts for layer in layers_of(quantized)]
    dgemma_accel.quantize_experts(quantized, format=format)
    other = "fp8" if format == "nvfp4" else "nvfp4"
    with pytest.raises(ValueError, match=f"format: its experts were quantized to '{format}' before"):
        dgemma_accel.quantize_experts(quantized, format=other)
    assert all(layer.experts is held for layer, held in zip(layers_of(quantized), before))


def test_a_model_of_another_dtype_keeps_its_quantized_weights(quantized):
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items() if ".experts." in name}
    for move in (quantized.bfloat16, quantized.half, quantized.float):
        move()
        after = quantized.state_dict()
        for name, tensor in before.items():
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name].float(), tensor.float())
        assert quantized.lm_head.weight.dtype == after["lm_head.weight"].dtype != FP8
    quantized.to("meta")
    assert all(tensor.is_meta for tensor in quantized.parameters())


def test_copies_and_state_dicts(quantized, expected, format):
    ids = prompt(2, 9)[0].to(DEVICE)
    assert torch.equal(generate(copy.deepcopy(quantized), ids).sequences, expected)
    quantized.tie_weights()
    other = wide_model()
    for parameter in other.parameters():
        torch.nn.init.ones_(parameter)
    dgemma_accel.quantize_experts(other, format=format).load_state_dict(quantized.state_dict())
    assert torch.equal(generate(other, ids).sequences, expected)


class TestBadInput:
    def untouched(self, model):
        kind = transformers.models.diffusion_gemma.modeling_diffusion_gemma.DiffusionGemmaTextExperts
        return all(isinstance(layer.experts, kind) for layer in layers_of(model)[:-1])

    def test_another_model(self):
        with pytest.raises(TypeError, match="DiffusionGemmaForBlockDiffusion expected, got torch"):
            dgemma_accel.quantize_experts(torch.nn.Linear(2, 2))

    def test_an_accelerated_model(self):
        model = dgemma_accel.accelerate(wide_model())
        with pytest.raises(ValueError, match=r"before accelerate\(model\), or after restore"):
            dgemma_accel.quantize_experts(model)
        dgemma_accel.quantize_experts(dgemma_accel.restore(model))
        assert isinstance(layers_of(model)[0].experts, QuantizedExperts)

    def test_weights_that_are_not_loaded(self):
        model = wide_model().to("meta")
        with pytest.raises(ValueError, match="gate_up_proj of its experts is not loaded"):
            dgemma_accel.quantize_experts(model)
        model = wide_model()
        layers_of(model)[-1].experts._hf_hook = object()
        with pytest.raises(ValueError, match="not loaded"):
            dgemma_accel.quantize_experts(model)
        assert self.untouched(model) and not hasattr(model.config, "quantization_config")

    def test_other_experts(self):
        model = wide_model()
        layers_of(model)[-1].experts.act_fn = torch.nn.ReLU()
        with pytest.raises(TypeError, match="its experts are a DiffusionGemmaTextExperts with ReLU"):
            dgemma_accel.quantize_experts(model)
        last = layers_of(model)[-1]
        last.experts = torch.nn.Identity()
        last.experts.act_fn = torch.nn.SiLU()
        with pytest.raises(TypeError, match="its experts are a Identity"):
            dgemma_accel.quantize_experts(model)
        assert self.untouched(model)

    def test_other_weights(self):
        model = wide_model()
        experts = layers_of(model)[-1].experts
        experts.down_proj = torch.nn.Parameter(experts.down_proj.to(FP8), requires_grad=False)
        with pytest.raises(TypeError, match="down_proj of its experts is a Parameter of torch.float8_e4m3fn"):
            dgemma_accel.quantize_experts(model)
        assert self.untouched(model)

    def test_another_format(self):
        model = wide_model()
        with pytest.raises(ValueError, match=r"format: must be one of \('fp8', 'nvfp4'\), got 'int4'"):
            dgemma_accel.quantize_experts(model, format="int4")
        assert self.untouched(model)

    def test_columns_that_are_no_whole_groups(self):
        model = tiny_model()
        with pytest.raises(ValueError, match="down_proj of its experts has 24 columns, and 16 share a scale"):
            dgemma_accel.quantize_experts(model, format="nvfp4")
        assert self.untouched(model)

    def test_weights_that_are_not_finite(self, format):
        model = wide_model()
        with torch.no_grad():
            layers_of(model)[0].experts.down_proj[3, 40, 90] = float("inf")
        with pytest.raises(ValueError, match="down_proj of its experts is not finite"):
            dgemma_accel.quantize_experts(model, format=format)


def test_a_model_with_another_quantization_is_not_saved(format, tmp_path):
    """A checkpoint names one method: read by this one, the other's weights would be taken without their scales."""
    model = wide_model()
    theirs = model.config.quantization_config = transformers.FineGrainedFP8Config()
    dgemma_accel.quantize_experts(model, format=format)
    assert model.config.quantization_config is theirs
    with pytest.raises(ValueError, match="is not serializable"):
        model.save_pretrained(tmp_path)


def test_a_padded_batch_and_several_canvases(quantized, format):
    """Prompt and commit passes go through them too."""
    ids, mask = (tensor.to(DEVICE) for tensor in prompt(2, 20, left_padding=(0, 6)))
    plain = rounded(wide_model(), format)
    settings = {"attention_mask": mask, "max_new_tokens": 2 * CANVAS}
    expected = generate(plain, ids, **settings).sequences
    with dgemma_accel.accelerated(quantized, graph=False):
        assert torch.equal(generate(quantized, ids, **settings).sequences, expected)
