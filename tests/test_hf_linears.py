"""`quantize_linears`: FP8 weights for attention projections and dense MLPs of a model, in memory and in checkpoints."""

import contextlib
import copy
import json
import weakref

import pytest
import torch
from hf_models import CANVAS, generate, prompt, tiny_model, trace_without_inductor, transformers
from test_hf_published import CONFIGS, format_of, write

import dgemma_accel
from dgemma_accel.cli.generate import load
from dgemma_accel.hf import products as hf_products
from dgemma_accel.hf.linear import QuantizedLinear, places_of
from dgemma_accel.hf.quantize import layers_of
from dgemma_accel.ops import feed_forward, linears
from dgemma_accel.reference.quantization import FP8, dequantize, quantize_rows

WIDTH = 96
pytestmark = pytest.mark.usefixtures("one_thread")


def wide_model(dtype=torch.float32):
    return tiny_model(dtype, expert_width=WIDTH)


class Rounded(torch.nn.Linear):
    """A projection with a weight and rows that were rounded to FP8 and back."""

    def forward(self, x):
        return super().forward(dequantize(*quantize_rows(x), x.dtype))


def rounded(model):
    """`model` with projections that do in its dtype what FP8 ones should do."""
    for holder, name in places_of(model):
        before = getattr(holder, name)
        after = Rounded(before.in_features, before.out_features, bias=False, dtype=before.weight.dtype)
        after.weight = torch.nn.Parameter(
            dequantize(*quantize_rows(before.weight.detach()), before.weight.dtype)
        )
        setattr(holder, name, after)
    return model


@pytest.fixture
def quantized():
    return dgemma_accel.quantize_linears(wide_model())


@pytest.fixture(scope="module")
def expected():
    """The tokens of projections that are rounded one by one."""
    return generate(rounded(wide_model()), prompt(2, 9)[0]).sequences


def test_tokens_are_those_of_rounded_weights_and_rows(quantized, expected):
    ids = prompt(2, 9)[0]
    assert not torch.equal(generate(wide_model(), ids).sequences, expected)
    assert torch.equal(generate(quantized, ids).sequences, expected)
    with dgemma_accel.accelerated(quantized, graph=False):
        assert torch.equal(generate(quantized, ids).sequences, expected)
    assert torch.equal(generate(quantized, ids).sequences, expected)


@pytest.mark.parametrize("mlp", ["its modules", "feed_forward"])
def test_the_step_is_traced_whole_and_products_are_side_by_side(
    quantized, expected, monkeypatch, caplog, mlp
):
    seen, right, pick = set(), linears._side_by_side, feed_forward.pick

    def products(rows, weights, *others):
        seen.add(("linears", rows.dtype, len(weights)))
        return right(rows, weights, *others)

    def picked(*arguments):
        def run(call):
            seen.add((call.dense_gate.dtype, call.dense_gate_scale.shape, call.dense_down_scale.shape))
            return reference(call)

        reference = pick(*arguments)
        return run

    # What the ops' bodies call, which is not traced.
    monkeypatch.setattr(linears, "_side_by_side", products)
    monkeypatch.setattr(feed_forward, "pick", picked)
    if mlp == "feed_forward":
        monkeypatch.setattr(hf_products, "served_by", lambda *arguments: "reference")
    trace_without_inductor(monkeypatch)
    dgemma_accel.accelerate(quantized, graph=True)
    ids, options = prompt(2, 9)[0], {"max_new_tokens": CANVAS}
    with caplog.at_level("WARNING", logger="dgemma_accel"):
        assert torch.equal(generate(quantized, ids, **options).sequences, expected[:, : 9 + CANVAS])
    assert not [record for record in caplog.records if record.name == "dgemma_accel"]
    # One, a layer's output; query, key and value; query and one for both others.
    wanted = {("linears", FP8, count) for count in (1, 2, 3)}
    if mlp == "feed_forward":
        wanted.add((FP8, (48, 1), (64, 1)))
    assert seen == wanted


def test_rows_are_rounded_once_where_nothing_is_traced(quantized, expected, monkeypatch):
    """Query, key and value share them, and so do gate and up; but not where a module is hooked, which is called."""
    seen, right, ids = [], linears._side_by_side, prompt(2, 9)[0]

    def products(rows, weights, *others):
        seen.append(len(weights))
        return right(rows, weights, *others)

    monkeypatch.setattr(linears, "_side_by_side", products)
    with dgemma_accel.accelerated(quantized, graph=False):
        assert torch.equal(generate(quantized, ids).sequences, expected)
        # By layer: what they make, and what attention and the gate make; two sliding layers to a global one.
        assert {count: seen.count(count) / len(seen) for count in set(seen)} == {3: 1 / 6, 2: 1 / 3, 1: 1 / 2}
        seen.clear()
        handle = quantized.model.decoder.layers[0].mlp.register_forward_hook(lambda *arguments: None)
        assert torch.equal(generate(quantized, ids).sequences, expected)
        handle.remove()
    assert seen.count(1) > len(seen) / 2


def test_products_are_not_one_op_where_they_are_not_alike(quantized):
    """One with another dtype, a hook or another's forward is called."""
    first, second, third = quantized.model.decoder.layers
    first.self_attn.k_proj = torch.nn.Linear(64, 32, bias=False)
    second.self_attn.q_proj.register_forward_hook(lambda *arguments: None)
    assert [how.projections for how in hf_products.side_by_side((first, second, third), "auto", torch.float32)] == [
        False, False, True,
    ]  # fmt: skip


def test_weights_are_shared_and_the_old_ones_released():
    model = wide_model(torch.bfloat16)
    before = {
        id(p): (weakref.ref(p), p.nbytes) for p in (getattr(*place).weight for place in places_of(model))
    }
    assert dgemma_accel.quantize_linears(model) is model
    assert all(reference() is None for reference, _ in before.values())
    modules = [getattr(*place) for place in places_of(model)]
    # Two sides, three layers, of which the global one has no projection for values.
    assert len(modules) == 2 * (3 * 7 - 1) and all(type(module) is QuantizedLinear for module in modules)
    weights = {module.weight for module in modules}
    assert 2 * sum(weight.nbytes for weight in weights) == sum(size for _, size in before.values())
    for mine, theirs in zip(modules[:20], modules[20:], strict=True):
        assert (
            mine is not theirs and mine.weight is theirs.weight and mine.weight_scale is theirs.weight_scale
        )
        assert mine.weight.dtype == FP8 and mine.weight_scale.shape == (len(mine.weight), 1)
    others = [
        model.lm_head,
        model.model.decoder.layers[0].router.proj,
        model.model.decoder.self_conditioning.up_proj,
    ]
    assert {module.weight.dtype for module in others} == {torch.bfloat16}
    assert "in_features=64, out_features=48" in repr(model.model.decoder.layers[0].mlp)


def test_a_model_of_another_dtype_keeps_its_numbers(quantized):
    before = {
        name: tensor.clone() for name, tensor in quantized.state_dict().items() if "_proj.weight" in name
    }
    quantized.bfloat16()
    after = quantized.state_dict()
    for name, tensor in before.items():
        fixed = name.endswith("weight_scale") or tensor.dtype == FP8
        assert (after[name].dtype == tensor.dtype) == fixed, name
        assert not fixed or torch.equal(after[name].float(), tensor.float())
    rows = torch.randn(2, 3, 64).bfloat16()
    found = quantized.model.decoder.layers[0].mlp.up_proj(rows)
    assert found.dtype == torch.bfloat16 and found.shape == (2, 3, 48)


def test_quantizing_twice_changes_nothing_and_experts_go_along(quantized):
    before = [getattr(*place) for place in places_of(quantized)]
    dgemma_accel.quantize_experts(dgemma_accel.quantize_linears(quantized), format="nvfp4")
    assert all(getattr(*place) is held for place, held in zip(places_of(quantized), before, strict=True))
    assert quantized.config.quantization_config.to_dict() == {
        "format": "nvfp4", "linears": "fp8", "quant_method": "dgemma_accel",
    }  # fmt: skip
    ids = prompt(1, 9)[0]
    copied = copy.deepcopy(quantized)
    with dgemma_accel.accelerated(quantized, graph=False):
        mine = generate(quantized, ids, max_new_tokens=CANVAS).sequences
    assert torch.equal(mine, generate(copied, ids, max_new_tokens=CANVAS).sequences)


def assert_same(model, expected):
    theirs = expected.state_dict()
    assert model.state_dict().keys() == theirs.keys()
    for name, tensor in model.state_dict().items():
        assert not (tensor.dtype == FP8 and model.get_parameter(name).requires_grad), name
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor.float(), theirs[name].float()), name
    places = [getattr(*place) for place in places_of(model)]
    for mine, other in zip(places[: len(places) // 2], places[len(places) // 2 :], strict=True):
        assert all(mine._parameters[name] is held for name, held in other.named_parameters())
    assert not model.training


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    wide_model(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[None, "fp8", "nvfp4"], ids=str)
def experts(request):
    return request.param


@pytest.fixture(scope="module")
def both(checkpoint, experts):
    """Quantized in memory."""
    model = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(checkpoint)
    if experts is not None:
        dgemma_accel.quantize_experts(model, format=experts)
    return dgemma_accel.quantize_linears(model)


def test_quantized_while_reading(checkpoint, experts, both):
    assert_same(dgemma_accel.from_pretrained(checkpoint, experts=experts, linears="fp8"), both)


def test_saved_and_read(both, experts, tmp_path):
    both.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["linears"] == "fp8" and saved["format"] == experts
    assert_same(dgemma_accel.from_pretrained(tmp_path), both)
    assert_same(dgemma_accel.from_pretrained(tmp_path, experts=experts, linears="fp8"), both)


@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
def test_one_was_saved_alone_and_the_other_is_asked_for(checkpoint, format, tmp_path):
    both = {"experts": format, "linears": "fp8"}
    expected = dgemma_accel.from_pretrained(checkpoint, **both)
    for name, value in both.items():
        dgemma_accel.from_pretrained(checkpoint, **{name: value}).save_pretrained(tmp_path / name)
        for options in (both, {k: v for k, v in both.items() if k != name}):
            assert_same(dgemma_accel.from_pretrained(tmp_path / name, **options), expected)


def test_the_command_reads_them(checkpoint, both, experts, monkeypatch):
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda path: "tokenizer")
    assert_same(load(checkpoint, experts=experts, linears="fp8")[0].cpu(), both)


@pytest.mark.parametrize("method", CONFIGS)
def test_published_numbers_stay_where_they_are_fp8(method, tmp_path):
    """Others are rounded."""
    plain = write(tmp_path, method, dense=True)
    model = dgemma_accel.from_pretrained(tmp_path, linears="fp8", dtype=torch.float32)
    for mine, theirs in zip(layers_of(model), layers_of(plain), strict=True):
        query = mine.self_attn.q_proj
        value, exact = (
            dequantize(query.weight, query.weight_scale, torch.float32),
            theirs.self_attn.q_proj.weight,
        )
        if format_of(method) == "nvfp4":
            exact = dequantize(*quantize_rows(exact), torch.float32)
        torch.testing.assert_close(value, exact, rtol=3e-7, atol=0)
        other = mine.mlp.up_proj
        numbers, scale = quantize_rows(theirs.mlp.up_proj.weight)
        assert torch.equal(other.weight.float(), numbers.float()) and torch.equal(other.weight_scale, scale)
    model.save_pretrained(tmp_path / "again")
    assert_same(dgemma_accel.from_pretrained(tmp_path / "again", dtype=torch.float32), model)


class TestBadInput:
    def test_another_model_format_or_time(self):
        with pytest.raises(TypeError, match="DiffusionGemmaForBlockDiffusion expected, got torch"):
            dgemma_accel.quantize_linears(torch.nn.Linear(2, 2))
        model = wide_model()
        with pytest.raises(ValueError, match=r"format: must be one of \('fp8',\), got 'nvfp4'"):
            dgemma_accel.quantize_linears(model, format="nvfp4")
        with (
            dgemma_accel.accelerated(model),
            pytest.raises(ValueError, match=r"call quantize_linears\(model\) before accelerate"),
        ):
            dgemma_accel.quantize_linears(model)

    @pytest.mark.parametrize("change, error, text", [
        (lambda mlp: setattr(mlp, "up_proj", torch.nn.Identity()), TypeError, "up_proj is a Identity, not a Linear"),
        (lambda mlp: setattr(mlp, "up_proj", torch.nn.Linear(64, 48)), TypeError, "not a Linear without a bias"),
        (lambda mlp: mlp.up_proj.to(FP8), TypeError, "the weight of up_proj is a Parameter of torch.float8_e4m3fn"),
        (lambda mlp: mlp.up_proj.to("meta"), ValueError, "the weight of up_proj is not loaded"),
        (lambda mlp: mlp.up_proj.weight.data[3].fill_(torch.inf), ValueError, "the weight of up_proj is not finite"),
    ])  # fmt: skip
    def test_what_cannot_be_rounded(self, change, error, text):
        model = wide_model()
        change(layers_of(model)[-1].mlp)
        with pytest.raises(error, match=text):
            dgemma_accel.quantize_linears(model)
        assert not any(type(getattr(*place)) is QuantizedLinear for place in places_of(model))

    def test_options_of_from_pretrained(self, tmp_path):
        wide_model().save_pretrained(tmp_path)
        for options, text in (
            ({"linears": "int8"}, r"linears: must be one of \('fp8',\), got 'int8'"),
            ({"linears": "fp8", "quantization_config": {}}, "linears: a model takes one quantization"),
            ({"linears": "fp8", "tp_plan": "auto"}, "tp_plan: quantized weights cannot be sharded"),
        ):
            with pytest.raises(ValueError, match=text):
                dgemma_accel.from_pretrained(tmp_path, **options)
        config = transformers.DiffusionGemmaConfig.from_pretrained(tmp_path)
        config.quantization_config = {"quant_method": "fp8"}
        with pytest.raises(ValueError, match="linears: the checkpoint is quantized already, as 'fp8'"):
            dgemma_accel.from_pretrained(tmp_path, linears="fp8", config=config)
        dgemma_accel.from_pretrained(tmp_path, linears="fp8").save_pretrained(tmp_path / "saved")
        model = dgemma_accel.from_pretrained(tmp_path, experts="fp8")
        model.save_pretrained(tmp_path / "experts")
        dgemma_accel.quantize_linears(model).save_pretrained(tmp_path / "both")
        for folder, config in (("saved", "."), ("both", "experts")):
            with pytest.raises(
                ValueError, match="config: needs the quantization_config .* whose linears are 'fp8'"
            ):
                dgemma_accel.from_pretrained(tmp_path / folder, config=tmp_path / config)

    @pytest.mark.parametrize("what", ["weight", "weight_scale"])
    def test_a_checkpoint_that_lacks_something(self, tmp_path, what):
        from safetensors.torch import load_file, save_file

        dgemma_accel.quantize_linears(wide_model()).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors[f"model.decoder.layers.1.self_attn.o_proj.{what}"]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(RuntimeError, match=rf"lacks quantized weights .*o_proj.{what}"):
            dgemma_accel.from_pretrained(tmp_path)


def test_scales_of_a_published_checkpoint_that_are_not_finite(tmp_path):
    def change(tensors):
        name = "model.decoder.layers.1.self_attn.q_proj.weight_scale"
        tensors[name] = torch.full_like(tensors[name], torch.inf)

    write(tmp_path, "compressed-tensors fp8", dense=True, change=change)
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        dgemma_accel.from_pretrained(tmp_path, linears="fp8")


@pytest.mark.parametrize("linears", [None, "fp8"])
@pytest.mark.parametrize("method", ["compressed-tensors fp8", "modelopt"])
def test_a_published_matrix_without_its_scale(method, linears, tmp_path):
    """Numbers alone are another model's weights."""
    if method.endswith("fp8") and transformers.__version__.startswith("5.17."):
        pytest.skip(
            "transformers 5.17 hands FP8 numbers on in the model's dtype, so nobody sees what they were"
        )

    def change(tensors):
        del tensors["model.decoder.layers.1.self_attn.q_proj.weight_scale"]

    write(tmp_path, method, dense=True, change=change)
    with pytest.raises((RuntimeError, KeyError)):
        dgemma_accel.from_pretrained(tmp_path, linears=linears)


def test_a_plain_checkpoint_that_lacks_a_weight(tmp_path):
    from safetensors.torch import load_file, save_file

    wide_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.decoder.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"lacks quantized weights .*up_proj.weight"):
        dgemma_accel.from_pretrained(tmp_path, linears="fp8")


def test_hooks_of_all_modules_see_each(quantized):
    seen, counts, ids = [], [], prompt(1, 9)[0]
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *others: seen.append(type(module) is QuantizedLinear)
    )
    try:
        for context in (contextlib.nullcontext(), dgemma_accel.accelerated(quantized, graph=False)):
            seen.clear()
            with context:
                generate(quantized, ids, max_new_tokens=CANVAS, max_denoising_steps=1)
            counts.append(sum(seen))
    finally:
        handle.remove()
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 0, 64), (2, 3, 64)])
def test_a_product_of_any_shape(quantized, shape):
    module = quantized.model.decoder.layers[0].mlp.up_proj
    assert module(torch.randn(shape)).shape == (*shape[:-1], 48)


@pytest.mark.gpu
@pytest.mark.capture
@pytest.mark.parametrize("dtype, alike", [(torch.float32, 0.9), (torch.bfloat16, 0.5)], ids=str)
def test_captured_on_a_gpu(dtype, alike):
    """Nearly the tokens of steps that are launched: fused kernels round elsewhere, and so a row may round otherwise."""
    model = dgemma_accel.quantize_linears(wide_model(dtype).cuda())
    ids, options = prompt(2, 9)[0].cuda(), {"max_new_tokens": CANVAS, "max_denoising_steps": 2, "seed": 3}
    with dgemma_accel.accelerated(model, graph=False):
        expected = model.generate(ids, **options).sequences
    with dgemma_accel.accelerated(model):
        found = [model.generate(ids, **options).sequences for _ in range(2)]
        reports = dgemma_accel.captures(model)
    assert reports and all(report.captured and report.problem is None for report in reports)
    assert torch.equal(*found)
    assert (found[0] == expected)[:, 9:].float().mean() >= alike
