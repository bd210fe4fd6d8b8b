"""The compiled step: one graph per shape, and the tokens of the step that is not compiled."""

import logging
import re

import pytest
import torch
from hf_models import (
    CANVAS,
    WINDOW,
    Drafts,
    as_argument,
    generate,
    generation,
    prompt,
    tiny_model,
    trace_without_inductor,
    transformers,
)
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

import dgemma_accel
from dgemma_accel.hf import bank, compiled, graph, patches
from dgemma_accel.hf.products import side_by_side

PreallocatedCache = pytest.importorskip("dgemma_accel.hf.preallocated").PreallocatedCache


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def traced(monkeypatch):
    trace_without_inductor(monkeypatch)
    counters.clear()


def assert_same(model, ids, mask=None, **options):
    expected_drafts, drafts = Drafts(), Drafts()
    expected = generate(model, ids, mask, streamer=expected_drafts, **options)
    with dgemma_accel.accelerated(model, graph=True):
        result = generate(model, ids, mask, streamer=drafts, cache_implementation="static", **options)
        assert patches.acceleration_of(model).compiled, "the compiled step did not run"
    assert torch.equal(result.sequences, expected.sequences)
    assert torch.equal(result.tokens_per_forward, expected.tokens_per_forward)
    assert len(drafts.values) == len(expected_drafts.values)
    assert all(torch.equal(a, b) for a, b in zip(drafts.values, expected_drafts.values))


@pytest.mark.usefixtures("uncompiled")
class TestTheSameTokens:
    @pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 5])
    def test_prompt_lengths(self, model, length):
        assert_same(model, prompt(2, length)[0], max_new_tokens=3 * CANVAS)

    def test_left_padding_and_end_of_text(self, model):
        ids, mask = prompt(3, 20, left_padding=(0, 5, 9))
        assert_same(model, ids, mask, max_new_tokens=4 * CANVAS, eos_token_id=[11, 12, 13, 14])

    @pytest.mark.parametrize("stability", [0, 2])
    def test_stability(self, model, stability):
        ids, _ = prompt(3, 9, seed=4)
        assert_same(
            model, ids, stability_threshold=stability, confidence_threshold=0.5, max_denoising_steps=12
        )

    def test_starting_canvas_and_self_conditioning_logits(self, model):
        ids, _ = prompt(2, 13)
        canvas, _ = prompt(2, CANVAS, seed=8)
        assert_same(
            model, ids, decoder_input_ids=canvas, self_conditioning_logits=torch.randn(2, CANVAS, 83) * 4
        )

    def test_options(self, model):
        """Against the accelerated model without a graph, which has the same options."""
        ids, _ = prompt(3, 9)
        canvas, _ = prompt(3, CANVAS, seed=21)
        options = {
            "decoder_input_ids": canvas, "pinned": [0, 3, 7], "seed": 4, "max_steps": 5, "return_confidence": True,
            "return_steps": True, "max_new_tokens": 2 * CANVAS, "cache_implementation": "static",
        }  # fmt: skip
        with dgemma_accel.accelerated(model):
            expected = model.generate(ids, **options)
        with dgemma_accel.accelerated(model, graph=True):
            result = model.generate(ids, **options)
        assert torch.equal(result.sequences, expected.sequences) and torch.equal(result.steps, expected.steps)
        assert torch.allclose(result.confidence, expected.confidence, atol=1e-4)
        assert torch.allclose(result.entropy, expected.entropy, atol=1e-3)

    def test_an_exception_in_a_step(self, model, monkeypatch):
        ids, _ = prompt(2, 9)
        expected = generate(model, ids).sequences
        right = graph.decode
        count = []

        def broken(*arguments):
            count.append(1)
            if len(count) == 3:
                raise RuntimeError("in a step")
            return right(*arguments)

        monkeypatch.setattr(graph, "decode", broken)
        with dgemma_accel.accelerated(model, graph=True):
            with pytest.raises(RuntimeError, match="in a step"):
                generate(model, ids, cache_implementation="static")
            assert torch.equal(generate(model, ids, cache_implementation="static").sequences, expected)
        assert patches.ATTRIBUTE not in vars(model)

    def test_a_step_that_cannot_be_compiled(self, model, monkeypatch, caplog):
        """Whether the compiler says so at once or on the first call: the uncompiled step serves, said once."""
        ids, _ = prompt(2, 9)
        expected = generate(model, ids).sequences

        def refuses(function, **options):
            raise RuntimeError("no compiler here")

        def fails_later(function, **options):
            return lambda *arguments: refuses(function)

        for broken in (refuses, fails_later):
            monkeypatch.setattr(torch, "compile", broken)
            caplog.clear()
            with (
                caplog.at_level(logging.WARNING, "dgemma_accel"),
                dgemma_accel.accelerated(model, graph=True),
            ):
                for _ in range(2):
                    assert torch.equal(generate(model, ids).sequences, expected)
                (step,) = patches.acceleration_of(model).compiled.values()
            lines = [r.getMessage() for r in caplog.records if "no compiler here" in r.getMessage()]
            assert len(lines) == 1 and "uncompiled" in lines[0] and "no compiler here" in step.failure

    @pytest.mark.parametrize("why", ["out of memory", "inside a recording"])
    def test_a_failure_that_is_not_the_compiler_s(self, model, monkeypatch, why):
        """It goes on to the caller, and the compiled step serves again."""
        ids, _ = prompt(2, 9)
        error = torch.OutOfMemoryError if why == "out of memory" else RuntimeError
        fails = [True]

        def broken_once(function, **options):
            def step(*arguments):
                if fails:
                    raise error("in a step")
                return function(*arguments)

            return step

        monkeypatch.setattr(torch, "compile", broken_once)
        with dgemma_accel.accelerated(model, graph=True):
            with monkeypatch.context() as patch:
                patch.setattr(compiled, "is_recorded", lambda device: why == "inside a recording")
                with pytest.raises(error, match="in a step"):
                    generate(model, ids)
            fails.clear()
            generate(model, ids)
            (step,) = patches.acceleration_of(model).compiled.values()
            assert step.failure is None

    def test_a_model_of_another_dtype_is_captured_again(self):
        model = dgemma_accel.accelerate(tiny_model(), graph=True)
        ids, _ = prompt(2, 20)
        generate(model, ids, cache_implementation="static")
        model.bfloat16()
        result = generate(model, ids, cache_implementation="static")
        assert len(patches.acceleration_of(model).compiled) == 2
        dgemma_accel.accelerate(model)
        assert torch.equal(generate(model, ids).sequences, result.sequences)


@pytest.mark.usefixtures("uncompiled")
class TestWhereItDoesNotRun:
    def lines(self, caplog):
        return [r.getMessage() for r in caplog.records if "without compilation" in r.getMessage()]

    def test_a_dynamic_cache_of_the_caller(self, model, caplog):
        ids, _ = prompt(2, 9)

        def cache():
            return transformers.DynamicCache(config=model.config.get_text_config())

        with caplog.at_level(logging.WARNING, "dgemma_accel"), dgemma_accel.accelerated(model, graph=True):
            for _ in range(2):
                given = cache()
                result = generate(model, ids, cache=given)
                assert result.past_key_values is given
            assert not patches.acceleration_of(model).compiled
        assert len(self.lines(caplog)) == 1 and "DynamicCache" in self.lines(caplog)[0]
        assert torch.equal(result.sequences, generate(model, ids).sequences)

    def test_hooks_are_called(self, model, caplog):
        ids, _ = prompt(2, 9)
        seen = []
        handle = model.model.decoder.layers[1].register_forward_hook(lambda *_: seen.append(1))
        with caplog.at_level(logging.WARNING, "dgemma_accel"), dgemma_accel.accelerated(model, graph=True):
            generate(model, ids, cache_implementation="static")
        handle.remove()
        assert seen and "hooks" in self.lines(caplog)[0]

    def test_off_by_default_on_a_cpu(self, model):
        ids, _ = prompt(2, 9)
        with dgemma_accel.accelerated(model):
            generate(model, ids, cache_implementation="static")
            state = patches.acceleration_of(model)
            assert not state.compiled and state.graph is None
            assert state.graph_on(torch.device("cuda")) and not state.graph_on(torch.device("cpu"))
            assert type(generate(model, ids).past_key_values) is transformers.DynamicCache
        with dgemma_accel.accelerated(model, graph=False):
            assert not patches.acceleration_of(model).graph_on(torch.device("cuda"))

    def test_bad_option(self, model):
        with pytest.raises(TypeError, match="graph: a bool or None expected, got str"):
            dgemma_accel.accelerate(model, graph="yes")


def test_inductor_makes_no_cuda_graphs_of_its_own(model, monkeypatch):
    """Also where the process has them on: they would be captured within the capture."""
    from torch._inductor import compile_fx, config

    seen = []

    def looks(*arguments, **options):
        with config.patch(options["config_patches"]):
            seen.append(config.triton.cudagraphs)
        raise RuntimeError("seen enough")

    monkeypatch.setattr(compile_fx, "compile_fx", looks)
    torch._dynamo.reset()
    with config.patch({"triton.cudagraphs": True}), dgemma_accel.accelerated(model, graph=True):
        generate(model, prompt(1, 5)[0], max_denoising_steps=1, max_new_tokens=CANVAS)
    assert seen == [False, False]


@pytest.mark.usefixtures("traced")
def test_one_graph_for_steps_canvases_prompts_and_calls(model):
    options = {"cache_implementation": "static", "max_new_tokens": 2 * CANVAS}
    with dgemma_accel.accelerated(model, graph=True):
        first, _ = prompt(2, 40)
        generate(model, first, **options)
        for length, temperature, bound in ((3, 0.9, 0.2), (WINDOW, 0.7, 0.5), (31, 0.8, 0.4)):
            ids, mask = prompt(2, length, seed=length, left_padding=(0, 1))
            setup = {"t_max": temperature, "confidence_threshold": bound}
            result = generate(model, ids, mask, base=length, **options, **setup)
            model_copy_of_result = result.sequences.clone()
            with_dynamic = generate(model, ids, mask, base=length, max_new_tokens=2 * CANVAS, **setup)
            assert torch.equal(model_copy_of_result, with_dynamic.sequences)
        state = patches.acceleration_of(model)
        assert len(state.compiled) == 1
        # The halves of a step.
        assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
        # A longer cache is not compiled again, a new batch size is, once.
        long, _ = prompt(2, 300)
        length = 2 * bank.SMALLEST
        cache = PreallocatedCache(model.config, length)
        result = generate(model, long, max_new_tokens=2 * CANVAS, cache=cache)
        assert torch.equal(result.sequences, generate(model, long, max_new_tokens=2 * CANVAS).sequences)
        assert len(state.compiled) == 1 and counters["stats"]["unique_graphs"] == 2
        generate(model, prompt(1, 5)[0], max_denoising_steps=2, **options)
        assert len(state.compiled) == 2 and counters["stats"]["unique_graphs"] == 4


def test_decode_is_the_model_s_forward(model):
    """Hidden states of the function of tensors against the original decoder."""
    ids, _ = prompt(2, 20)
    canvas, _ = prompt(2, CANVAS, seed=3)
    cache = PreallocatedCache(model.config, 64)
    decoder = model.model.decoder
    logits = torch.randn(2, CANVAS, 83) * 3
    with torch.no_grad():
        model.model.encoder(input_ids=ids, **as_argument(cache))
        expected = decoder(decoder_input_ids=canvas, **as_argument(cache), self_conditioning_logits=logits)
        soft = logits.softmax(-1) @ decoder.embed_tokens.weight * decoder.embed_tokens.embed_scale
        masks = dict.fromkeys(("full_attention", "sliding_attention"))
        prefixes = compiled.prefixes_of(decoder, cache, masks, torch.arange(20, 20 + CANVAS)[None], soft)
        buffers = [
            [getattr(layer, name) for layer in cache.layers] for name in ("key_buffer", "value_buffer")
        ]
        in_place = graph.InPlace(*buffers, side_by_side(decoder.layers, "auto", torch.float32))
        result = graph.decode(decoder, canvas, soft, in_place, prefixes, "auto")
    assert torch.allclose(result, expected.last_hidden_state, rtol=1e-3, atol=1e-3)


class NonViewOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def launches_of_compiled(code: str) -> int:
    """Calls of fused kernels, matrix products and other operators in the function that inductor wrote."""
    body = code[code.rindex("def call(") :]
    fused = re.findall(r"^\s*(?:\w+\.)?cpp_fused\w*\(", body, re.MULTILINE)
    products = re.findall(r"^\s*extern_kernels\.\w+\(", body, re.MULTILINE)
    operators = re.findall(r"^\s*\w+ = torch\.ops\.[\w.]+\(", body, re.MULTILINE)
    assert fused and any("dgemma." in call for call in operators)
    return len(fused) + len(products) + len(operators)


@pytest.mark.slow
def test_launches_fall_to_a_fifth(model, monkeypatch):
    """Compiled by inductor for the CPU; an op of this package counts as one launch, as it is on a GPU."""
    counts, right = [], torch.compile
    step = generation.DiffusionGemmaGenerationMixin._denoising_step

    def counted(**kwargs):
        with NonViewOps() as mode:
            result = step(model, **kwargs)
        counts.append(mode.count)
        return result

    ids, _ = prompt(1, 9)
    model.__dict__["_denoising_step"] = counted
    try:
        expected = generate(model, ids, max_new_tokens=CANVAS).sequences
    finally:
        del model.__dict__["_denoising_step"]

    codes = {}

    def compile_and_keep(function, **options):
        compiled_function = right(function, **options)

        def call(*arguments):
            if function.__name__ in codes:
                return compiled_function(*arguments)
            result, (*_, codes[function.__name__]) = run_and_get_code(compiled_function, *arguments)
            return result

        return call

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", compile_and_keep)
    with dgemma_accel.accelerated(model, graph=True):
        result = generate(model, ids, max_new_tokens=CANVAS, cache_implementation="static").sequences
    assert torch.equal(result, expected)
    assert sorted(codes) == ["condition", "decide"] and "dgemma.head_stats" in codes["decide"]
    assert 5 * sum(map(launches_of_compiled, codes.values())) <= min(counts)
