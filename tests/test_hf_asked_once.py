"""What a call asks of the model's modules before each canvas: once, unless code of the caller's runs in between."""

import copy

import pytest
import torch
from hf_models import CANVAS, generate, prompt, tiny_model, transformers
from recordings import Again, record_on_a_cpu

import dgemma_accel
from dgemma_accel.hf import compiled, eager, lookout, registry

OPTIONS = {"max_new_tokens": 4 * CANVAS, "max_denoising_steps": 3}

pytestmark = pytest.mark.usefixtures("one_thread")


class Changes:
    """Behind the second canvas there is one expert to a token. A streamer, a stopping criterion and a hook."""

    def __init__(self, model):
        self.config, self.calls = model.config.text_config, 0

    def change(self, call):
        self.calls += 1
        if self.calls == call:
            self.config.top_k_experts = 1

    def put(self, value):
        # The first is the prompt.
        self.change(call=3)

    def end(self):
        pass

    def __call__(self, input_ids, scores, **kwargs):
        self.change(call=2)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def hook(self, *_):
        # Of the encoder, which takes the prompt first.
        self.change(call=3)


def changed_within(model, way):
    """Tokens of a call in which the model changes."""
    changes, options, handle = Changes(model), {}, None
    if way == "streamer":
        options["streamer"] = changes
    elif way == "criterion":
        options["stopping_criteria"] = transformers.StoppingCriteriaList([changes])
    else:
        handle = model.model.encoder.register_forward_pre_hook(changes.hook)
    try:
        return generate(model, prompt(1, 9)[0], **OPTIONS, **options).sequences
    finally:
        model.config.text_config.top_k_experts = 2
        if handle is not None:
            handle.remove()


@pytest.fixture
def asked(monkeypatch):
    """What was asked, and when the host began to wait for a step."""
    seen, right, wait = [], registry.fingerprint, lookout.Lookout.is_over

    def noted(model, *roots):
        seen.append(type(roots[-1]).__name__)
        return right(model, *roots)

    def waits(self):
        seen.append("wait")
        return wait(self)

    record_on_a_cpu(monkeypatch)
    for module in (compiled, eager):
        monkeypatch.setattr(module, "fingerprint", noted)
    monkeypatch.setattr(lookout.Lookout, "is_over", waits)
    return seen


STEP, PASS = "DiffusionGemmaDecoderModel", "DiffusionGemmaEncoderTextModel"


class Tokenizer:
    def decode(self, tokens, **options):
        return "word"


@pytest.mark.parametrize("streams", [False, True])
def test_once_and_while_the_device_is_at_work(asked, streams, capsys):
    """With a streamer of transformers' own, too."""
    streamer = transformers.TextDiffusionStreamer(Tokenizer()) if streams else None
    with dgemma_accel.accelerated(tiny_model(), graph=True) as model:
        output = generate(model, prompt(1, 9)[0], streamer=streamer, **OPTIONS)
    assert ("word" in capsys.readouterr().out) == streams
    assert output.sequences.shape[1] > 9 + 2 * CANVAS and Again.stored[0].replays > 1
    assert [one for one in asked if one != "wait"] == [STEP, PASS]
    assert asked.index(PASS) < asked.index("wait")


@pytest.mark.parametrize("way", ["streamer", "criterion", "hook"])
def test_code_of_the_caller_s_may_change_the_model(asked, way):
    model = copy.deepcopy(tiny_model())
    expected = changed_within(model, way)
    assert not torch.equal(expected, generate(model, prompt(1, 9)[0], **OPTIONS).sequences)
    with dgemma_accel.accelerated(model, graph=True):
        assert torch.equal(changed_within(model, way), expected)
    passes = sum(recording.replays for recording in Again.stored)
    assert asked.count(PASS) == passes > 1 and asked.count(STEP) == passes + 1
    # One for each number of experts.
    assert len(Again.stored) == 2
