"""What a call asks of the model's modules before each canvas: once, unless code of the caller's runs in between.

A recording that keeps the number of experts to a token stands in for the CUDA graph, which knows no other.
"""

import contextlib

import pytest
import torch
from hf_models import CANVAS, generate, prompt, tiny_model, transformers
from recordings import Again, record_on_a_cpu

import dgemma_accel
from dgemma_accel import cuda_graph
from dgemma_accel.hf import compiled, eager, lookout, registry

OPTIONS = {"max_new_tokens": 4 * CANVAS, "max_denoising_steps": 3}
STEP, PASS = "DiffusionGemmaDecoderModel", "DiffusionGemmaEncoderTextModel"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def asked(model, monkeypatch):
    """What was asked, and when the host began to wait for a step."""
    seen, right, wait = [], registry.fingerprint, lookout.Lookout.is_over
    config = model.config.text_config

    class Frozen(Again):
        def __init__(self, function, device, pool):
            self.experts = config.top_k_experts
            super().__init__(function, device, pool)

        def replay(self):
            now, config.top_k_experts = config.top_k_experts, self.experts
            super().replay()
            config.top_k_experts = now

    def noted(model, *roots):
        seen.append(type(roots[-1]).__name__)
        return right(model, *roots)

    def waits(self):
        seen.append("wait")
        return wait(self)

    record_on_a_cpu(monkeypatch)
    monkeypatch.setitem(cuda_graph.RECORDINGS, "cpu", Frozen)
    for module in (compiled, eager):
        monkeypatch.setattr(module, "fingerprint", noted)
    monkeypatch.setattr(lookout.Lookout, "is_over", waits)
    return seen


class Tokenizer:
    def decode(self, tokens, **options):
        return "word"


def streamer():
    return transformers.TextDiffusionStreamer(Tokenizer())


@pytest.mark.parametrize("streams", [False, True])
def test_once_and_while_the_device_is_at_work(model, asked, streams, capsys):
    """With a streamer of transformers' own, too. A recording runs the modules, so it is asked again behind it."""
    with dgemma_accel.accelerated(model, graph=True):
        generate(model, prompt(1, 9)[0], **OPTIONS)
        assert [one for one in asked if one != "wait"] == [STEP, STEP, PASS, PASS]
        asked.clear()
        output = generate(model, prompt(1, 9)[0], streamer=streamer() if streams else None, **OPTIONS)
    assert ("word" in capsys.readouterr().out) == streams
    assert output.sequences.shape[1] > 9 + 2 * CANVAS and Again.stored[0].replays > 1
    assert [one for one in asked if one != "wait"] == [STEP, PASS]
    assert asked.index(PASS) < asked.index("wait")


class Changes:
    """Code of the caller's: at its `at`-th call a token gets one expert from then on."""

    def __init__(self, model, at):
        self.config, self.calls, self.at = model.config.text_config, 0, at

    def __call__(self, *_, **__):
        self.calls += 1
        if self.calls == self.at:
            self.config.top_k_experts = 1

    def before(self, method):
        def changed(*arguments, **options):
            self()
            return method(*arguments, **options)

        return changed

    def before_method_of(self, owner, name, monkeypatch):
        monkeypatch.setattr(owner, name, self.before(getattr(owner, name)), raising=False)


# By name: (the call with which it changes, where it is put). The first that encoders and streamers see is the prompt.
# Each puts `changes` somewhere, until `monkeypatch` and `stack` are done, or returns options.
def a_hook(path):
    def put(model, changes, monkeypatch, stack):
        handle = model.get_submodule(path).register_forward_pre_hook(lambda *_: changes())
        stack.callback(handle.remove)

    return put


def a_method(path, name):
    def put(model, changes, monkeypatch, stack):
        changes.before_method_of(model.get_submodule(path), name, monkeypatch)

    return put


def a_streamer(model, changes, monkeypatch, stack):
    class Streamer:
        __slots__ = ()

        def put(self, value):
            changes()

        def end(self):
            pass

    return {"streamer": Streamer()}


def a_method_of_a_streamer(model, changes, monkeypatch, stack):
    given = streamer()
    given.put = changes.before(given.put)
    return {"streamer": given}


def a_criterion(model, changes, monkeypatch, stack):
    def criterion(input_ids, scores, **options):
        changes()
        return torch.zeros(len(input_ids), dtype=torch.bool)

    return {"stopping_criteria": transformers.StoppingCriteriaList([criterion])}


def a_processor(model, changes, monkeypatch, stack):
    class Processor(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            changes()
            return scores

    return {"logits_processor": transformers.LogitsProcessorList([Processor()])}


def a_subclass(model, changes, monkeypatch, stack):
    kind, name = type(model), "_prepare_encoder_inputs"
    methods = {name: changes.before(getattr(kind, name))}
    monkeypatch.setattr(model, "__class__", type(kind.__name__, (kind,), methods))


def a_method_of_the_class(model, changes, monkeypatch, stack):
    kind, name = type(model), "_finalize_canvas"
    monkeypatch.setattr(kind, name, staticmethod(changes.before(getattr(kind, name))))


TEXT = "model.encoder.language_model"
WAYS = {
    "streamer": (3, a_streamer),
    "method of a streamer": (3, a_method_of_a_streamer),
    "criterion": (2, a_criterion),
    "processor": (5, a_processor),
    "hook on the encoder": (3, a_hook("model.encoder")),
    "hook on its text model": (3, a_hook(TEXT)),
    "hook on its layer": (3, a_hook(f"{TEXT}.layers.0")),
    "hook on its embedding": (3, a_hook(f"{TEXT}.embed_tokens")),
    "hook on a layer of the decoder": (5, a_hook("model.decoder.layers.0")),
    "forward of the encoder": (3, a_method("model.encoder", "forward")),
    "masks of the decoder": (3, a_method("model.decoder", "create_diffusion_decoder_attention_mask")),
    "subclass": (3, a_subclass),
    "class": (2, a_method_of_the_class),
}


@pytest.mark.parametrize("way", WAYS)
def test_code_of_the_caller_s_may_change_the_model(model, asked, way, capsys):
    ids, (at, put) = prompt(1, 9)[0], WAYS[way]
    original = generate(model, ids, **OPTIONS).sequences

    def run():
        changes = Changes(model, at)
        with pytest.MonkeyPatch.context() as monkeypatch, contextlib.ExitStack() as stack:
            stack.callback(setattr, model.config.text_config, "top_k_experts", 2)
            options = put(model, changes, monkeypatch, stack) or {}
            result = generate(model, ids, **OPTIONS, **options).sequences
        assert changes.calls > at
        return result

    expected = run()
    assert not torch.equal(expected, original)
    with dgemma_accel.accelerated(model, graph=True):
        assert torch.equal(run(), expected)
