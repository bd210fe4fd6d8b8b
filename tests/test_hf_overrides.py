"""Code of the caller's own in a model: replaced forwards, subclasses, hooks, layers put in later. What the original
`generate` runs of it, the accelerated one runs as well."""

import functools
import logging

import pytest
import torch
from hf_models import CANVAS, generate, generation, prompt, tiny_model, trace_without_inductor, transformers

import dgemma_accel
from dgemma_accel.hf import denoising, hooks, patches
from dgemma_accel.hf.overrides import is_overridden, is_own

modeling = pytest.importorskip("transformers.models.diffusion_gemma.modeling_diffusion_gemma")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def steps(monkeypatch):
    """One entry for each step of the accelerated sampler that is neither compiled nor captured."""
    taken, step = [], denoising.Denoiser.step
    monkeypatch.setattr(denoising.Denoiser, "step", lambda *a: (taken.append(1), step(*a))[1])
    return taken


class Whole(transformers.DiffusionGemmaForBlockDiffusion):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.flip(1)
        return output


class Step(transformers.DiffusionGemmaForBlockDiffusion):
    def _denoising_step(self, *args, **kwargs):
        canvas, draft, *rest = super()._denoising_step(*args, **kwargs)
        return canvas, draft.flip(1), *rest


class Nothing(transformers.DiffusionGemmaForBlockDiffusion):
    def something_else(self):
        return 1


def flipped(forward):
    """`forward` with its positions in reverse, whatever it returns; looks like it to who reads its names."""

    @functools.wraps(forward)
    def reverse(*args, **kwargs):
        output = forward(*args, **kwargs)
        if isinstance(output, torch.Tensor):
            return output.flip(-2)
        if isinstance(output, tuple):
            return output[0].flip(1), *output[1:]
        name = "logits" if "logits" in output else "last_hidden_state"
        output[name] = output[name].flip(1)
        return output

    return reverse


def subclassed(kind):
    def change(module):
        class Own(kind):
            forward = flipped(kind.forward)

        module.__class__ = Own

    return change


def in_front(module):
    module.forward = flipped(module.forward)


def hooked(module):
    def reverse(module, args, output):
        return flipped(lambda: output)()

    module.register_forward_hook(reverse)


def parts(model):
    decoder = model.model.decoder
    layer = decoder.layers[1]
    return {
        "model": model, "inner": model.model, "decoder": decoder, "layer": layer, "attention": layer.self_attn,
        "norm": decoder.norm, "mlp": layer.mlp, "conditioning": decoder.self_conditioning, "head": model.lm_head,
        "encoder": model.model.encoder.language_model.layers[0].self_attn,
    }  # fmt: skip


def assert_like_the_original(model, lines, caplog, *, graph, mask=False):
    ids, padding = prompt(2, 20, left_padding=(0, 5) if mask else ())
    options = {"max_new_tokens": 2 * CANVAS}
    if mask:
        options["attention_mask"] = padding
    expected = generate(model, ids, **options)
    plain = generate(tiny_model(), ids, **options)
    assert not torch.equal(expected.sequences, plain.sequences), "the change changes nothing"
    with caplog.at_level(logging.WARNING, "dgemma_accel"), dgemma_accel.accelerated(model, graph=graph):
        for _ in range(2):
            assert torch.equal(generate(model, ids, **options).sequences, expected.sequences)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said))
    for line in lines:
        assert any(line in one for one in said), said


SAMPLER = "sampler: the reference path serves this call ({} not transformers' own)".format
ATTENTION = "attention: the reference path serves this call (an attention module has a forward that is not"
STEPWISE = "graph: step by step without compilation goes this call ({}".format
FORWARD_LINES = {
    "model": SAMPLER("forward of the model is"),
    "inner": SAMPLER("model.forward of the model is"),
    "decoder": SAMPLER("model.decoder.forward of the model is"),
    "attention": ATTENTION,
    "encoder": ATTENTION,
}


@pytest.mark.usefixtures("uncompiled")
class TestForwards:
    @pytest.mark.parametrize("graph", [False, True])
    @pytest.mark.parametrize("part", list(FORWARD_LINES) + ["layer", "norm", "mlp", "conditioning", "head"])
    def test_in_front_of_the_class_s(self, part, graph, caplog):
        model = tiny_model()
        in_front(parts(model)[part])
        lines = [FORWARD_LINES[part]] if part in FORWARD_LINES else []
        if graph and part not in ("model", "inner", "decoder", "encoder"):
            lines.append(STEPWISE(f"a {type(parts(model)[part]).__name__} has a forward of its own"))
        assert_like_the_original(model, lines, caplog, graph=graph)

    @pytest.mark.parametrize("graph", [False, True])
    @pytest.mark.parametrize("part", list(FORWARD_LINES) + ["layer", "conditioning"])
    def test_of_a_subclass(self, part, graph, caplog):
        model = tiny_model()
        module = parts(model)[part]
        subclassed(type(module))(module)
        lines = [FORWARD_LINES[part]] if part in FORWARD_LINES else []
        if graph and part in ("layer", "attention"):
            lines.append(STEPWISE("the forward of a layer or of its attention is not transformers' own"))
        assert_like_the_original(model, lines, caplog, graph=graph)

    @pytest.mark.parametrize("part", ["attention", "encoder"])
    def test_attention_of_another_class_with_padding(self, part, caplog):
        """It is given masks of the original."""
        model = tiny_model()
        module = parts(model)[part]
        subclassed(type(module))(module)
        assert_like_the_original(model, [ATTENTION], caplog, graph=False, mask=True)

    @pytest.mark.parametrize(
        "kind, line", [(Whole, "forward of the model is"), (Step, "_denoising_step of the")]
    )
    def test_of_the_whole_model(self, kind, line, caplog, steps):
        model = tiny_model()
        model.__class__ = kind
        assert_like_the_original(model, [line], caplog, graph=False)
        assert not steps

    def test_options_are_refused(self):
        model = tiny_model()
        in_front(model)
        with dgemma_accel.accelerated(model), pytest.raises(ValueError, match="seed: only .* but forward of"):
            model.generate(prompt(2, 9)[0], seed=1)

    def test_a_subclass_that_overrides_none_of_them(self, steps, caplog):
        model = tiny_model()
        model.__class__ = Nothing
        with caplog.at_level(logging.WARNING, "dgemma_accel"), dgemma_accel.accelerated(model):
            generate(model, prompt(2, 9)[0])
        assert steps and not caplog.records

    @pytest.mark.parametrize("where", ["decoder", "encoder"])
    def test_masks_of_a_subclass(self, where, caplog):
        model = tiny_model()
        owner = getattr(model.model, where)
        names = {"decoder": "create_diffusion_decoder_attention_mask", "encoder": "create_masks_for_generate"}
        name = names[where]
        right = getattr(owner, name)

        def hides_one_more(self, **kwargs):
            argument = "decoder_attention_mask" if where == "decoder" else "attention_mask"
            mask = kwargs[argument].clone()
            mask[:, 12] = 0
            return right(**{**kwargs, argument: mask})

        owner.__class__ = type("Own", (type(owner),), {name: hides_one_more})
        assert_like_the_original(model, [f"{name} is not transformers' own"], caplog, graph=False, mask=True)

    def test_a_compiled_forward_is_the_same_forward(self, monkeypatch):
        monkeypatch.undo()
        model = tiny_model()
        model.forward = torch.compile(model.forward, backend="eager")
        model.model.decoder.layers[0].forward = torch.compile(model.model.decoder.layers[0].forward)
        assert not is_overridden(model) and not is_overridden(model.model.decoder.layers[0])

    def test_hooks_that_place_a_model_on_devices(self, steps):
        """They stand in front of every forward, and change nothing of it."""
        big = pytest.importorskip("accelerate")
        model = tiny_model()
        ids, mask = prompt(2, 20, left_padding=(0, 5))
        expected = generate(model, ids, mask).sequences
        big.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
        assert "forward" in vars(model) and "forward" in vars(model.model.decoder.layers[0].self_attn)
        with dgemma_accel.accelerated(model):
            assert not is_overridden(model) and not is_overridden(model.model.decoder)
            attentions = [layer.self_attn for layer in model.model.decoder.layers]
            assert not any(patches.patch_of(attention).overridden for attention in attentions)
            assert torch.equal(generate(model, ids, mask).sequences, expected)
        assert steps

    def test_names_that_were_copied(self):
        right = modeling.DiffusionGemmaModel.forward
        assert is_own(right) and is_own(generation.DiffusionGemmaGenerationMixin.generate)
        assert flipped(right).__module__ == right.__module__ and not is_own(flipped(right))
        assert not is_own(functools.partial(right)) and not is_own(print)


@pytest.mark.usefixtures("uncompiled")
class TestHooks:
    @pytest.mark.parametrize("part", ["inner", "decoder", "layer", "attention", "norm"])
    def test_of_the_caller_s(self, part, caplog):
        model = tiny_model()
        hooked(parts(model)[part])
        assert_like_the_original(
            model, [STEPWISE("model.model or a module of the decoder has hooks")], caplog, graph=True
        )

    def test_those_that_transformers_leaves_behind(self, caplog):
        model = dgemma_accel.accelerate(tiny_model(), graph=True)
        ids, _ = prompt(2, 9)
        canvas, _ = prompt(2, CANVAS, seed=3)
        with torch.no_grad():
            for kind in ("hidden_states", "attentions", "router_logits"):
                output = model(input_ids=ids, decoder_input_ids=canvas, **{f"output_{kind}": True})
        assert output is not None
        layer = model.model.decoder.layers[0]
        modules = (layer, layer.self_attn, layer.router)
        assert all(module._forward_hooks and not hooks.has_hooks(module) for module in modules)
        with caplog.at_level(logging.WARNING, "dgemma_accel"):
            generate(model, ids)
        assert patches.acceleration_of(model).compiled and "hooks" not in caplog.text

    def test_they_count_while_something_is_collected(self, monkeypatch):
        model = tiny_model()
        with torch.no_grad():
            model(input_ids=prompt(1, 5)[0], output_hidden_states=True)
        layer = model.model.decoder.layers[0]
        collector = transformers.utils.output_capturing._active_collector
        token = collector.set({"hidden_states": []})
        assert hooks.has_hooks(layer) and not hooks.has_hooks(model)
        collector.reset(token)
        layer.register_forward_hook(lambda *_: None)
        assert hooks.has_hooks(layer)


def test_left_behind_hooks_are_no_part_of_the_graph(monkeypatch):
    trace_without_inductor(monkeypatch)
    model = dgemma_accel.accelerate(tiny_model(), graph=True)
    ids, _ = prompt(2, 9)
    with torch.no_grad():
        model(input_ids=ids, output_hidden_states=True)
    generate(model, ids, max_new_tokens=CANVAS)
    (step,) = patches.acceleration_of(model).compiled.values()
    assert step.calls and step.failure is None


class TestALayerPutInLater:
    @pytest.mark.parametrize("where", ["encoder", "decoder"])
    def test_masks_are_the_original_s(self, where, caplog):
        def layers(model):
            return (model.model.encoder.language_model if where == "encoder" else model.model.decoder).layers

        model, other = tiny_model(), tiny_model(seed=5)
        ids, mask = prompt(2, 20, left_padding=(0, 5))
        dgemma_accel.accelerate(model)
        layers(model)[1] = layers(other)[1]
        with caplog.at_level(logging.WARNING, "dgemma_accel"):
            result = generate(model, ids, mask).sequences
        assert "a layer was replaced after accelerate(model)" in caplog.text
        caplog.clear()
        dgemma_accel.accelerate(model)
        with caplog.at_level(logging.WARNING, "dgemma_accel"):
            assert torch.equal(generate(model, ids, mask).sequences, result) and not caplog.records
        dgemma_accel.restore(model)
        assert torch.equal(generate(model, ids, mask).sequences, result)

    @pytest.mark.parametrize("part", ["self_conditioning", "decoder"])
    def test_self_conditioning_is_not_lost(self, part, caplog):
        model, other = tiny_model(), tiny_model(seed=5)
        ids, _ = prompt(2, 9)
        dgemma_accel.accelerate(model)
        if part == "decoder":
            model.model.decoder = other.model.decoder
        else:
            model.model.decoder.self_conditioning = other.model.decoder.self_conditioning
        with caplog.at_level(logging.WARNING, "dgemma_accel"):
            result = generate(model, ids).sequences
        assert "self-conditioning block was replaced" in caplog.text
        dgemma_accel.restore(model)
        assert torch.equal(generate(model, ids).sequences, result)


@pytest.mark.skipif(
    torch.__version__ < torch.torch_version.TorchVersion("2.13"),
    reason="the compiler of torch 2.11 traces no import inside a function",
)
def test_a_forward_can_be_traced_whole():
    model = tiny_model()
    ids, _ = prompt(2, 9)
    canvas, _ = prompt(2, CANVAS, seed=3)
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=canvas).logits
        with dgemma_accel.accelerated(model):
            torch._dynamo.reset()
            whole = torch.compile(model.forward, backend="eager", fullgraph=True)
            logits = whole(input_ids=ids, decoder_input_ids=canvas).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["model", "decoder"])
@pytest.mark.parametrize("way", ["forward", "call"])
def test_a_compiled_part_is_conditioned_as_ever(caplog, part, way):
    """A trace sees no soft embeddings but those of logits, so the original makes them."""
    model, options = tiny_model(), {"max_new_tokens": CANVAS, "max_denoising_steps": 3}
    expected = generate(model, prompt(1, 5)[0], **options).sequences
    module = model.model if part == "model" else model.model.decoder
    if way == "forward":
        module.forward = torch.compile(module.forward, backend="eager")
    else:
        module.compile(backend="eager")
    with dgemma_accel.accelerated(model, graph=False), caplog.at_level(logging.WARNING):
        assert torch.equal(generate(model, prompt(1, 5)[0], **options).sequences, expected)
    assert "forward is compiled" in caplog.text
    with pytest.raises(TypeError, match="what torch.compile made"):
        model.model.decoder = torch.compile(model.model.decoder)
        dgemma_accel.accelerate(model)


@pytest.mark.parametrize("graph", [False, True])
def test_an_attention_function_of_the_callers_own(caplog, uncompiled, graph):
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def flipped(*args, **kwargs):
        output, weights = plain(*args, **kwargs)
        return output.flip(-1), weights

    AttentionInterface.register("flipped", flipped)
    AttentionMaskInterface.register("flipped", sdpa_mask)
    model, ids = tiny_model(attn_implementation="flipped"), prompt(2, 7)[0]
    expected = generate(model, ids).sequences
    assert not torch.equal(expected, generate(tiny_model(), ids).sequences)
    with dgemma_accel.accelerated(model, graph=graph), caplog.at_level(logging.WARNING):
        assert torch.equal(generate(model, ids).sequences, expected)
    assert "attention goes through 'flipped', a function of the caller's" in caplog.text


def test_a_samplers_own_choice_is_kept(monkeypatch):
    calls, accept = [], generation.EntropyBoundSampler.accept_canvas

    def counted(self, *args, **kwargs):
        calls.append(1)
        return accept(self, *args, **kwargs)

    monkeypatch.setattr(generation.EntropyBoundSampler, "accept_canvas", counted)
    model = dgemma_accel.accelerate(tiny_model(), graph=False)
    generate(model, prompt(1, 5)[0])
    assert calls


class Flatter(transformers.LogitsProcessorList):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * 0.1


def a_method_of_the_sampler(name, function):
    def put(model, monkeypatch):
        prepare = model._prepare_sampler

        def prepared(config):
            sampler = prepare(config)
            setattr(sampler, name, functools.partial(function, sampler))
            return sampler

        monkeypatch.setitem(vars(model), "_prepare_sampler", prepared)

    return put


def a_call_of_the_class(kind, function):
    return lambda model, monkeypatch: monkeypatch.setattr(kind, "__call__", function)


# By what the log says of it. Each puts code of the caller's into what the sampler is made of, or returns options.
PARTS_OF_THE_SAMPLER = {
    "the sampler's renoise_canvas is not transformers' own": a_method_of_the_sampler(
        "renoise_canvas", lambda self, accepted, step: torch.where(self.accepted_token_mask, accepted, 5)
    ),
    "the sampler's initialize_canvas is not transformers' own": a_method_of_the_sampler(
        "initialize_canvas", lambda self, batch_size, device: torch.full((batch_size, CANVAS), 5)
    ),
    "the __call__ of the list of logits processors is not transformers' own": lambda *_: {
        "logits_processor": Flatter()
    },
    "the __call__ of the temperature schedule is not transformers' own": a_call_of_the_class(
        generation.LinearTemperatureScheduleLogitsProcessor, lambda self, ids, scores, cur_step: scores / 0.2
    ),
    "the __call__ of the diffusion stopping criterion is not transformers' own": a_call_of_the_class(
        generation.StableAndConfidentStoppingCriteria,
        lambda self, draft, logits: torch.ones(len(draft), dtype=torch.bool),
    ),
}


@pytest.mark.parametrize("line", PARTS_OF_THE_SAMPLER)
def test_a_part_of_the_sampler(line, steps, monkeypatch, caplog):
    model, ids = tiny_model(), prompt(3, 9)[0]
    plain = generate(model, ids).sequences

    def run():
        with monkeypatch.context() as patch:
            return generate(model, ids, **(PARTS_OF_THE_SAMPLER[line](model, patch) or {})).sequences

    expected = run()
    assert not torch.equal(expected, plain)
    with dgemma_accel.accelerated(model, graph=False), caplog.at_level(logging.WARNING, "dgemma_accel"):
        assert torch.equal(run(), expected) and not steps
        assert f"sampler: the reference path serves this call ({line})" in caplog.text
        # And the next call is as if nothing had happened.
        assert torch.equal(generate(model, ids).sequences, plain) and steps


@pytest.mark.parametrize("compiled", ["layer", "self_attn", "experts", "mlp"])
def test_compiled_parts_of_a_layer_stay_in_the_graph(uncompiled, steps, compiled):
    model, ids = tiny_model(), prompt(1, 5)[0]
    expected = generate(model, ids).sequences
    layer = model.model.decoder.layers[1]
    module = layer if compiled == "layer" else getattr(layer, compiled)

    def wrapped(*args, _forward=module.forward, **kwargs):
        return _forward(*args, **kwargs)

    # As torch.compile marks what it returns.
    wrapped._torchdynamo_orig_callable = module.forward
    module.forward = wrapped
    with dgemma_accel.accelerated(model, graph=True):
        assert torch.equal(generate(model, ids).sequences, expected)
    assert not steps
