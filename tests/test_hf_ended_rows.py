"""Rows of a batch that have ended: nobody waits for what becomes padding."""

import pytest
import torch
from hf_models import CANVAS, PAD, Drafts, generate, prompt, tiny_model
from recordings import Again, record_on_a_cpu

import dgemma_accel
from dgemma_accel.hf import call

pytestmark = pytest.mark.usefixtures("one_thread")

CANVASES = 4


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def batch(model):
    """(prompts, end token) such that the first row ends with its first canvas and the others do not."""
    ids, _ = prompt(3, 9)
    text = generate(model, ids, max_new_tokens=CANVASES * CANVAS, eos_token_id=None).sequences[:, 9:]
    others = set(text[1:].flatten().tolist())
    ends = [token for token in text[0, :CANVAS].tolist() if token not in others and token != PAD]
    return ids, ends[0]


@pytest.fixture(params=["launched", "recorded"])
def graph(request, monkeypatch):
    record_on_a_cpu(monkeypatch)
    return request.param == "recorded"


def options_of(batch, **others):
    return {"max_new_tokens": CANVASES * CANVAS, "eos_token_id": batch[1], **others}


def steps_without_it(model, batch, monkeypatch, **options):
    """[B, canvases]: what the rows take where all are waited for."""
    with monkeypatch.context() as patch:
        patch.setattr(
            call.Call, "ended", property(lambda self: None, lambda self, value: None), raising=False
        )
        return generate(model, batch[0], return_steps=True, **options).steps


def test_the_same_text_in_fewer_steps(model, batch, graph, monkeypatch):
    options = options_of(batch)
    expected = generate(model, batch[0], **options)
    with dgemma_accel.accelerated(model, graph=graph):
        before = steps_without_it(model, batch, monkeypatch, **options)
        taken = [recording.replays for recording in Again.made]
        result = generate(model, batch[0], return_steps=True, return_confidence=True, **options)
    assert torch.equal(result.sequences, expected.sequences)
    assert torch.equal(result.tokens_per_forward, expected.tokens_per_forward)
    assert (result.sequences[0, 9 + CANVAS :] == PAD).all() and not (result.sequences[1:, 9:] == PAD).all(
        0
    ).any()
    assert result.steps.shape == (3, CANVASES)
    assert result.steps[0, 0] > 0 and (result.steps[0, 1:] == 0).all()
    assert torch.equal(result.steps[1:], before[1:]) and (before[0] > 0).all()
    # Nothing is said of padding, not even where the canvas happened to begin with it.
    for values in (result.confidence, result.entropy):
        assert values[0, CANVAS:].isnan().all() and not values[1:].isnan().any()
    if graph:
        (recording,) = Again.made
        assert recording.replays - taken[0] == int(result.steps.max(0).values.sum())


@pytest.mark.parametrize("others", [{"streamer": True}, {"pad_token_id": None}], ids=["drafts", "no padding"])
def test_where_others_look_at_such_rows(model, batch, graph, monkeypatch, others):
    def options():
        streamer = {"streamer": Drafts()} if "streamer" in others else others
        return options_of(batch, **streamer)

    theirs, ours = options(), options()
    expected = generate(model, batch[0], **theirs)
    with dgemma_accel.accelerated(model, graph=graph):
        before = steps_without_it(model, batch, monkeypatch, **options())
        result = generate(model, batch[0], return_steps=True, **ours)
    assert torch.equal(result.sequences, expected.sequences) and torch.equal(result.steps, before)
    if "streamer" in others:
        drafts = [each["streamer"].values for each in (ours, theirs)]
        assert len(drafts[0]) == len(drafts[1]) and all(map(torch.equal, *drafts))


def test_a_call_that_the_original_serves(model, batch):
    """Its first step has nothing that a finished row could keep."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class Same(LogitsProcessor):
        def __call__(self, input_ids, scores, cur_step=None):
            return scores

    expected = generate(model, batch[0], **options_of(batch, logits_processor=LogitsProcessorList([Same()])))
    with dgemma_accel.accelerated(model):
        result = generate(
            model, batch[0], **options_of(batch, logits_processor=LogitsProcessorList([Same()]))
        )
    assert torch.equal(result.sequences, expected.sequences)
