"""Layers run eagerly: norms in one operator each, the original's numbers, and another's modules called as they are."""

import pytest
import torch
from hf_models import CANVAS, as_argument, generate, prompt, tiny_model
from torch import nn

import dgemma_accel
from dgemma_accel.hf import layer as hf_layer

PreallocatedCache = pytest.importorskip("dgemma_accel.hf.preallocated").PreallocatedCache

pytestmark = pytest.mark.usefixtures("one_thread")
# Of a layer, its attention's included, without the router's own.
NORMS = 10


@pytest.fixture
def fused(monkeypatch):
    """The shapes that PyTorch's own operator normed."""
    seen, right = [], nn.functional.rms_norm

    def recorded(x, *arguments):
        seen.append(tuple(x.shape))
        return right(x, *arguments)

    monkeypatch.setattr(nn.functional, "rms_norm", recorded)
    return seen


def encode(model):
    """Hidden states and keys of a pass over a canvas behind a prompt."""
    cache = PreallocatedCache(model.config, 64)
    with torch.no_grad():
        model.model.encoder(input_ids=prompt(2, 8)[0], **as_argument(cache))
        output = model.model.encoder(input_ids=prompt(2, CANVAS, seed=3)[0], **as_argument(cache))
    return output.last_hidden_state, [layer.keys.clone() for layer in cache.layers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_norm_is_the_module_s(dtype, fused):
    """On a CPU bit for bit; a GPU's kernel takes its own square root."""
    model = tiny_model(dtype)
    for module in model.model.decoder.modules():
        if type(module).__name__ == "DiffusionGemmaRMSNorm":
            width = module.weight.shape[0] if module.with_scale else 32
            x = (torch.randn(3, 5, width) * 20).to(dtype)
            if module.with_scale:
                module.weight.data.uniform_(-3, 3)
            with torch.no_grad():
                result, expected = hf_layer.norm(module, x), module(x)
            assert result.dtype == dtype and torch.equal(result, expected)
    assert len(fused) > 3 * NORMS


def test_the_encoder_s_pass(fused):
    model = tiny_model()
    expected, keys = encode(model)
    with dgemma_accel.accelerated(model):
        result, stored = encode(model)
    layers = len(model.model.encoder.language_model.layers)
    # Called by itself the encoder makes masks that its own attention serves.
    assert len(fused) == 2 * (NORMS - 3) * layers
    assert torch.allclose(result, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(stored, keys))


def test_eager_steps(fused):
    model, ids = tiny_model(), prompt(2, 9)[0]
    expected = generate(model, ids)
    assert not fused
    with dgemma_accel.accelerated(model, graph=False):
        result = generate(model, ids)
        assert torch.equal(result.sequences, expected.sequences)
        fused.clear()
        model.generate(ids, max_new_tokens=2 * CANVAS, max_steps=1)
    # Two passes of the encoder and two of the decoder.
    assert len(fused) == 4 * NORMS * len(model.model.decoder.layers)


@pytest.mark.parametrize("kind", ["class", "forward", "hook", "dtype", "autocast", "autograd"])
def test_a_norm_that_is_another_s(kind, fused):
    model, seen = tiny_model(), []
    module = model.model.encoder.language_model.layers[1].post_attention_layernorm
    right = type(module).forward

    def noted(self, x):
        seen.append(1)
        return right(self, x)

    if kind == "class":
        module.__class__ = type("DiffusionGemmaRMSNorm", (type(module),), {"forward": noted})
    elif kind == "forward":
        module.forward = lambda x: noted(module, x)
    elif kind == "hook":
        module.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(2, 64)
    if kind == "dtype":
        module.weight.data = module.weight.data.double()
    with torch.set_grad_enabled(kind == "autograd"), torch.autocast("cpu", enabled=kind == "autocast"):
        expected = module(x)
        seen.clear()
        assert torch.equal(hf_layer.norm(module, x), expected)
    assert not fused and (kind in ("dtype", "autocast", "autograd") or len(seen) == 1)


def test_a_layer_that_is_another_s():
    """Its forward runs, and the layer before it does not notice."""
    model, seen = tiny_model(), []
    expected, _ = encode(model)
    layer = model.model.encoder.language_model.layers[1]
    right = type(layer).forward

    def noted(self, *arguments, **options):
        seen.append(options.keys())
        return right(self, *arguments, **options)

    layer.__class__ = type("Own", (type(layer),), {"forward": noted})
    with dgemma_accel.accelerated(model):
        result, _ = encode(model)
    assert len(seen) == 2 and torch.allclose(result, expected, rtol=1e-4, atol=1e-4)


def test_hidden_states_are_collected_as_ever():
    model, ids = tiny_model(), prompt(1, 6)[0]

    def collect():
        with torch.no_grad():
            return model.model.encoder.language_model(input_ids=ids, output_hidden_states=True).hidden_states

    expected = collect()
    with dgemma_accel.accelerated(model):
        result = collect()
    assert len(result) == len(expected) > 3
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(result, expected))


def test_a_model_on_several_devices():
    """A hook of a layer brings what it is given to the layer's device."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny_model(torch.bfloat16)
    language_model = model.model.encoder.language_model
    for index, layer in enumerate(language_model.layers):
        device = "meta" if index else "cpu"
        layer.to(device)
        hook = hooks.AlignDevicesHook(execution_device=device, io_same_device=False, place_submodules=True)
        hooks.add_hook_to_module(layer, hook)
        hooks.attach_execution_device_hook(layer, device)
    language_model.norm.to("meta")
    for _ in range(2):
        with torch.no_grad():
            assert language_model(input_ids=prompt(1, 6)[0]).last_hidden_state.is_meta
        dgemma_accel.accelerate(model)


def test_a_compiled_forward_of_a_layer_runs(monkeypatch):
    model, seen = tiny_model(), []
    layer = model.model.encoder.language_model.layers[1]

    def backend(module, inputs):
        seen.append(1)
        return module.forward

    layer.forward = torch.compile(layer.forward, backend=backend)
    with dgemma_accel.accelerated(model):
        encode(model)
    assert seen


def test_a_class_that_is_patched_later():
    model, seen = tiny_model(), []
    kind = type(model.model.encoder.language_model.layers[1])
    with dgemma_accel.accelerated(model), pytest.MonkeyPatch.context() as patch:
        right = kind.forward

        def noted(self, *arguments, **options):
            seen.append(1)
            return right(self, *arguments, **options)

        patch.setattr(kind, "forward", noted)
        encode(model)
    assert len(seen) == 2 * len(model.model.encoder.language_model.layers)


@pytest.mark.parametrize("name", ["forward", "_norm"])
def test_norms_whose_class_is_patched(name, fused):
    """As libraries of kernels do it for every model at once."""
    model, seen = tiny_model(), []
    kind = type(model.model.decoder.norm)
    right = getattr(kind, name)

    def noted(self, x):
        seen.append(1)
        return right(self, x) * 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, name, noted)
        expected, _ = encode(model)
        count = len(seen)
        with dgemma_accel.accelerated(model):
            result, _ = encode(model)
    assert len(seen) == 2 * count and not fused
    assert torch.allclose(result, expected, rtol=1e-4, atol=1e-4)


def test_norms_under_hooks_of_all_modules(fused):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    try:
        with dgemma_accel.accelerated(tiny_model()) as model:
            encode(model)
    finally:
        handle.remove()
    assert seen.count("DiffusionGemmaRMSNorm") > 2 * NORMS and not fused


@pytest.mark.parametrize("graph", [False, True])
def test_a_scale_of_a_wider_type_than_the_rows(graph, monkeypatch):
    """The original multiplies in place."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    model, ids = tiny_model(torch.bfloat16), prompt(1, 9)[0]
    for layer in (*model.model.encoder.language_model.layers, *model.model.decoder.layers):
        layer.layer_scalar = layer.layer_scalar.float() * 0.75
    generate(model, ids)
    with dgemma_accel.accelerated(model, graph=graph):
        generate(model, ids)
