"""The pass that stores a finished canvas, as one replay. A recording that runs its function again stands in for the
CUDA graph: like a graph it knows nothing but the tensors it was made with."""

import copy
import logging

import pytest
import torch
from hf_models import CANVAS, IMAGE_TOKEN, WINDOW, as_argument, encode_in_turns, generate, prompt, tiny_model
from recordings import Again, Crossings, record_on_a_cpu

import dgemma_accel
from dgemma_accel.hf import call, graph, patches, products, storing

PreallocatedCache = pytest.importorskip("dgemma_accel.hf.preallocated").PreallocatedCache

pytestmark = pytest.mark.usefixtures("one_thread")

ROOM = 20 * CANVAS


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def stored(monkeypatch):
    """Passes are recorded on a CPU too; steps are neither compiled nor recorded apart from them. The recordings."""
    record_on_a_cpu(monkeypatch)
    return Again.stored


def in_a_call(model, *arguments, **options):
    """`encode_in_turns` as it happens inside an accelerated `generate`."""
    with call.calling(call.Call()):
        return encode_in_turns(model, *arguments, **options)


def assert_same_cache(cache, expected, shown):
    """Keys and values of the tokens that are no padding."""
    for mine, other in zip(cache.layers, expected.layers, strict=True):
        assert mine.keys.shape == other.keys.shape and mine.get_seq_length() == other.get_seq_length()
        seen = shown[:, shown.shape[1] - other.keys.shape[2] :]
        for a, b in ((mine.keys, other.keys), (mine.values, other.values)):
            assert torch.allclose(a.transpose(1, 2)[seen], b.transpose(1, 2)[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "length, padding", [(1, ()), (5, (0, 3)), (WINDOW, ()), (3 * WINDOW, (WINDOW + 9, 2))]
)
def test_hidden_states_and_cache(model, stored, length, padding):
    """One recording serves canvas after canvas, while the window slides through its buffers and back to the front."""
    turns = (length, *[CANVAS] * 6)
    ids, mask = prompt(2, sum(turns), left_padding=padding)
    # Before 5.24 transformers puts padding in place of an image's token.
    ids[:, length + 3] = IMAGE_TOKEN
    expected, states = encode_in_turns(model, ids, turns, mask)
    with dgemma_accel.accelerated(model, graph=True):
        cache = PreallocatedCache(model.config, ROOM)
        _, fast = in_a_call(model, ids, turns, mask, cache)
    (recording,) = stored
    assert recording.replays == 6 and recording.runs == 0
    for a, b in zip(fast[1:], states[1:], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    assert_same_cache(cache, expected, mask.bool())


def test_prompts_share_a_recording(model, stored):
    """Of every length, with padding and without, and what an earlier pass returned stays what it was."""
    results = []
    with dgemma_accel.accelerated(model, graph=True):
        cache = PreallocatedCache(model.config, ROOM)
        for n, length in enumerate((3, 40, WINDOW - 1, 1)):
            turns = (length, CANVAS, CANVAS)
            ids, mask = prompt(2, sum(turns), seed=n, left_padding=(min(n, length - 1), 0))
            cache.reset()
            results.append((in_a_call(model, ids, turns, mask, cache)[1], ids, turns, mask))
        assert len(stored) == 1 and stored[0].replays == 8
    for fast, *arguments in results:
        for a, b in zip(fast[1:], encode_in_turns(model, *arguments)[1][1:], strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [None, "window", "start", "end", "slots", "embeds", "cos"])
def test_the_watch_sees_what_is_wrong(model, stored, monkeypatch, wrong):
    """A window that is left out, a range, slots or embeddings of an earlier pass."""
    turns = (2 * WINDOW, *[CANVAS] * 3)
    ids, mask = prompt(2, sum(turns), left_padding=(0, WINDOW + 5))
    _, states = encode_in_turns(model, ids, turns, mask)
    shown = mask.bool().split(turns, 1)
    if wrong == "window":
        right = graph.block_attention
        monkeypatch.setattr(
            graph, "block_attention", lambda *a, **options: right(*a, **options | {"window": None})
        )
    else:
        right = storing.CapturedPass._copy_in

        def keeps_one(self, inputs):
            before = [tensor.clone() for tensor in self.own]
            right(self, inputs)
            names = ["embeds"] + ["start", "end", "cos", "sin", "slots"] * 2
            for name, mine, earlier in zip(names, self.own, before, strict=True):
                if name == wrong and self.replays:
                    mine.copy_(earlier)

        monkeypatch.setattr(storing.CapturedPass, "_copy_in", keeps_one)
    with dgemma_accel.accelerated(model, graph=True):
        cache = PreallocatedCache(model.config, ROOM)
        in_a_call(model, ids.flip(0), turns, mask.flip(0), cache)
        cache.reset()
        _, fast = in_a_call(model, ids, turns, mask, cache)
    assert len(stored) == 1
    same = [torch.allclose(a[s], b[s], rtol=1e-3, atol=1e-3) for a, b, s in zip(fast, states, shown)]
    assert same[0] and all(same) == (wrong is None)


def test_a_pass_waits_for_nothing_and_copies_nothing_from_the_host():
    model, batch = tiny_model(torch.bfloat16).to("meta"), 2

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    text, buffers, places = model.model.encoder.language_model, [], {}
    for layer in text.layers:
        attention = layer.self_attn
        heads = attention.k_proj.out_features // attention.head_dim
        buffers.append(empty(batch, heads, 40, attention.head_dim))
        bounds = [empty(batch, dtype=torch.int32) for _ in range(2)]
        rotary = [empty(1, CANVAS, attention.head_dim) for _ in range(2)]
        places[attention.layer_type] = storing.Place(
            graph.Prefix(*bounds, *rotary), empty(CANVAS, dtype=torch.int64)
        )
    inputs = storing.Inputs(empty(batch, CANVAS, text.config.hidden_size), places)
    in_place = graph.InPlace(buffers, buffers, products.side_by_side(text.layers, "auto", torch.bfloat16))
    # A meta tensor has no values, so an operator that reads one raises.
    with torch.no_grad(), Crossings() as crossings:
        hidden = storing.store(text, inputs, in_place, "auto")
    assert crossings.seen == [] and crossings.operations > 100 and hidden.is_meta


class TestGenerate:
    def test_a_cache_that_is_full(self, model, stored):
        """One that grows goes on in larger buffers, with a recording of their own; another says that it is full."""
        ids, _ = prompt(2, 9)
        expected = generate(model, ids, max_new_tokens=4 * CANVAS)
        with dgemma_accel.accelerated(model, graph=True):
            cache = PreallocatedCache(model.config, 9 + CANVAS, growing=True)
            result = generate(model, ids, cache=cache, max_new_tokens=4 * CANVAS)
            assert torch.equal(result.sequences, expected.sequences)
            assert [recording.replays for recording in stored] == [1, 1]
            with pytest.raises(ValueError, match="there is room for"):
                small = PreallocatedCache(model.config, 9 + CANVAS)
                generate(model, ids, cache=small, max_new_tokens=4 * CANVAS)

    def test_an_exception_inside_a_replay(self, model, stored, monkeypatch):
        ids, _ = prompt(2, 9)
        expected = generate(model, ids, max_new_tokens=3 * CANVAS)
        right, count = Again.replay, []

        def broken(self):
            right(self)
            if self in Again.stored:
                count.append(1)
                if len(count) == 2:
                    raise RuntimeError("in a pass")

        monkeypatch.setattr(Again, "replay", broken)
        with dgemma_accel.accelerated(model, graph=True):
            with pytest.raises(RuntimeError, match="in a pass"):
                generate(model, ids, max_new_tokens=3 * CANVAS)
            assert stored[0].runs == 0
            result = generate(model, ids, max_new_tokens=3 * CANVAS)
            assert len(stored) == 1
        assert torch.equal(result.sequences, expected.sequences)

    def test_weights_of_the_encoder_that_changed(self, model, stored):
        """Its layers have numbers of their own beside the decoder's weights."""
        model = copy.deepcopy(model)
        ids, _ = prompt(2, 20)
        dgemma_accel.accelerate(model, graph=True)
        generate(model, ids)
        layer = model.model.encoder.language_model.layers[0]
        layer.layer_scalar = torch.full_like(layer.layer_scalar, 0.5)
        changed = generate(model, ids)
        kinds = [key[0] for key in patches.acceleration_of(model).captures.found]
        assert len(stored) == 2 and len(Again.made) == 1 and sorted(kinds) == ["step", "storing"]
        assert torch.equal(changed.sequences, generate(dgemma_accel.restore(model), ids).sequences)

    def test_a_configuration_that_changed(self, model, stored):
        model = copy.deepcopy(model)
        ids, _ = prompt(2, 20)
        dgemma_accel.accelerate(model, graph=True)
        generate(model, ids)
        model.config.text_config.top_k_experts = 1
        changed = generate(model, ids)
        assert len(stored) == len(Again.made) == 2
        assert torch.equal(changed.sequences, generate(dgemma_accel.restore(model), ids).sequences)

    def test_report(self, model, stored):
        with dgemma_accel.accelerated(model, graph=True):
            generate(model, prompt(2, 5)[0])
            (report,) = (one for one in dgemma_accel.captures(model) if one.what == "storing")
        assert (report.batch, report.canvas, report.compiled, report.captured) == (2, CANVAS, True, True)
        assert report.replays == stored[0].replays == 1 and report.memory_bytes > Again.bytes
        assert report.capture_seconds > report.compile_seconds > 0 and report.problem is None


class TestWhatTheOriginalServes:
    @pytest.fixture
    def reason(self, model, stored, caplog):
        """Runs a call of two canvases; what was said of the pass."""

        def run(model=model, **options):
            caplog.clear()
            with caplog.at_level(logging.WARNING, "dgemma_accel"):
                result = generate(model, prompt(2, 9)[0], **options)
            lines = [r.getMessage() for r in caplog.records if "the pass over" in r.getMessage()]
            return result, [line[line.index("(") + 1 : -1] for line in lines]

        return run

    def test_a_cache_that_is_not_in_place(self, model, stored, reason):
        from transformers import DynamicCache

        def run():
            return reason(cache=DynamicCache(config=model.config))

        expected, _ = run()
        with dgemma_accel.accelerated(model, graph=True):
            result, said = run()
            assert said == [
                "the cache is a DynamicCache; cache_implementation='static' gives one that does not grow"
            ]
            assert run()[1] == [], "once a model"
        assert torch.equal(result.sequences, expected.sequences) and not stored

    def test_hooks_in_the_encoder_are_called(self, model, stored, reason):
        seen = []
        expected, _ = reason()
        layer = model.model.encoder.language_model.layers[1]
        handle = layer.mlp.register_forward_hook(lambda *_: seen.append(1))
        try:
            with dgemma_accel.accelerated(model, graph=True):
                result, said = reason()
        finally:
            handle.remove()
        assert said == ["a module of the encoder has hooks"] and len(seen) == 2
        assert torch.equal(result.sequences, expected.sequences) and not stored

    def test_hooks_around_the_encoder_change_nothing(self, model, stored, reason):
        outputs = []
        handle = model.model.encoder.register_forward_hook(lambda *got: outputs.append(got[-1]))
        try:
            expected, _ = reason()
            with dgemma_accel.accelerated(model, graph=True):
                result, said = reason()
        finally:
            handle.remove()
        assert said == [] and len(stored) == 1 and len(outputs) == 4
        assert torch.equal(result.sequences, expected.sequences)
        for name in ("last_hidden_state", *as_argument(None)):
            assert getattr(outputs[3], name) is not None
        last = [output.last_hidden_state for output in outputs]
        assert torch.allclose(last[3], last[1], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("where", ["encoder", "language_model", "mlp"])
    def test_a_forward_of_the_caller_s(self, model, stored, reason, where):
        model = copy.deepcopy(model)
        encoder = model.model.encoder
        layer = encoder.language_model.layers[0]
        module = {"encoder": encoder, "language_model": encoder.language_model, "mlp": layer.mlp}[where]
        right, seen = module.forward, []

        def counting(*arguments, **options):
            seen.append(1)
            return right(*arguments, **options)

        module.forward = counting
        expected, _ = reason(model)
        seen.clear()
        dgemma_accel.accelerate(model, graph=True)
        result, said = reason(model)
        # That of the encoder comes to the layers as ever.
        assert len(seen) == 2 and len(said) == (where != "encoder") and len(stored) == (where == "encoder")
        assert torch.equal(result.sequences, expected.sequences)

    def test_hooks_of_all_modules(self, model, stored, reason):
        def hook(module, arguments, output):
            return output * 0.5 if type(module).__name__ == "DiffusionGemmaEncoderTextLayer" else None

        handle = torch.nn.modules.module.register_module_forward_hook(hook)
        try:
            expected, _ = reason()
            with dgemma_accel.accelerated(model, graph=True):
                result, said = reason()
        finally:
            handle.remove()
        assert said == ["hooks of all modules are registered"] and not stored and not Again.made
        assert torch.equal(result.sequences, expected.sequences)

    def test_dropout(self, model, stored, reason):
        model = copy.deepcopy(model).train()
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.1
        dgemma_accel.accelerate(model, graph=True)
        assert reason(model)[1] == ["attention dropout is on"]
        assert not stored and not Again.made

    def test_outside_of_generate(self, model, stored):
        ids, _ = prompt(2, 5 + CANVAS)
        with dgemma_accel.accelerated(model, graph=True):
            encode_in_turns(model, ids, (5, CANVAS), cache=PreallocatedCache(model.config, ROOM))
        assert not stored

    def test_off(self, model, stored):
        with dgemma_accel.accelerated(model, graph=False):
            generate(model, prompt(2, 9)[0], cache_implementation="static")
        assert not stored
