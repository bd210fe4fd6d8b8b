"""`MaskedDiffusionSampler.generate`: prompts, ends, flags, callbacks, seeds and what it refuses."""

import math
from types import SimpleNamespace

import pytest
import torch
from samplers_models import (
    MASK,
    VOCAB,
    FastLLaDA,
    LLaDA,
    prompts,
)

from dgemma_accel.samplers import (
    DInferThreshold,
    DualCache,
    EntropyBoundRenoise,
    Factor,
    FullSequence,
    HierarchyWithRemask,
    LowConfidence,
    MaskedDiffusionSampler,
    PrefixCache,
    Random,
    Threshold,
)


def test_guidance_changes_the_text_and_keeps_ruled_out_tokens_out():
    class Banning(LLaDA):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits[..., 4] = -math.inf
            return output

    plain, guided = (
        MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, guidance_scale=w).generate(
            Banning(1), prompts(4, 6, 1), 16
        )
        for w in (0.0, 3.0)
    )
    assert not torch.equal(plain.sequences, guided.sequences)
    assert not (guided.new_tokens == 4).any()


STRATEGIES = (
    LowConfidence(),
    Threshold(0.6),
    Factor(1.0),
    HierarchyWithRemask(0.8, 0.4, 0.3),
    DInferThreshold(0.6),
)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: type(s).__name__)
def test_a_batch_of_different_lengths_is_each_row_alone(strategy):
    rows = [[], [1], [2, 3, 4, 5, 6, 7], [8, 9, 1]]
    sampler = MaskedDiffusionSampler(strategy, mask_id=MASK, block_length=4, eos_id=2)
    together = sampler.generate(LLaDA(5), rows, 10)
    assert together.sequences.shape == (4, 16)
    for number, row in enumerate(rows):
        alone = sampler.generate(LLaDA(5), [row], 10)
        assert torch.equal(together.new_tokens[number], alone.new_tokens[0])
        assert int(together.nfe[number]) == int(alone.nfe[0])
        assert together.sequences[number, 6 - len(row) : 6].tolist() == row
        assert (together.sequences[number, : 6 - len(row)] == 2).all()


def test_padded_tensor_prompts():
    ids = torch.tensor([[1, 2, 0, 0], [3, 4, 5, 6]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    sampler = MaskedDiffusionSampler(LowConfidence(), mask_id=MASK)
    padded = sampler.generate(LLaDA(1), ids, 8, attention_mask=mask)
    listed = sampler.generate(LLaDA(1), [[1, 2], [3, 4, 5, 6]], 8)
    assert torch.equal(padded.sequences, listed.sequences)


class Fixed(torch.nn.Module):
    """Says `text` whatever it reads, or line n of it to a prompt that begins with n; `kind` is the answer's form."""

    def __init__(self, text, kind="tensor"):
        super().__init__()
        self.text, self.kind, self.calls = torch.tensor(text), kind, 0

    def forward(self, tokens):
        self.calls += 1
        logits = torch.zeros(*tokens.shape, VOCAB)
        text = self.text if self.text.ndim == 1 else self.text[tokens[:, 0]]
        logits.scatter_(-1, text[..., -tokens.shape[1] :].expand_as(tokens)[..., None], 30.0)
        forms = {
            "tensor": logits,
            "tuple": (logits, None),
            "dict": {"logits": logits},
            "object": SimpleNamespace(logits=logits),
        }
        return forms[self.kind]


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict", "object"])
def test_any_form_of_logits(kind):
    model = Fixed([1, 2, 3, 4, 5, 6], kind)
    result = MaskedDiffusionSampler(Threshold(0.9), mask_id=MASK).generate(model, torch.tensor([[1, 2]]), 4)
    assert result.sequences.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert result.nfe.tolist() == [1]
    result = MaskedDiffusionSampler(Threshold(0.9), mask_id=MASK).generate(lambda x: model(x), [[1, 2]], 4)
    assert result.sequences.tolist() == [[1, 2, 3, 4, 5, 6]]


def test_end_tokens():
    model = Fixed([[1, 5, 6, 7, 21, 8, 9, 9, 9, 9], [1, 5, 6, 7, 8, 9, 10, 11, 12, 20]])
    numbers = {"mask_id": MASK, "block_length": 3, "pad_id": 0}
    ends = MaskedDiffusionSampler(Threshold(0.5), **numbers, eos_id=(20, 21))
    result = ends.generate(model, [[0], [1]], 9)
    assert result.new_tokens.tolist() == [[5, 6, 7, 21, 0, 0, 0, 0, 0], [5, 6, 7, 8, 9, 10, 11, 12, 20]]
    assert result.nfe.tolist() == [2, 3]
    assert result.ended.tolist() == [True, True]
    endless = MaskedDiffusionSampler(Threshold(0.5), **numbers).generate(model, [[0], [1]], 9)
    assert endless.new_tokens[0].tolist() == [5, 6, 7, 21, 8, 9, 9, 9, 9]
    assert not endless.ended.any()


def test_generation_stops_when_all_rows_ended():
    model, recorder = Fixed([1, 5, 6, 21, 8, 9, 9, 9, 9, 9]), Recorder()
    sampler = MaskedDiffusionSampler(Threshold(0.5), mask_id=MASK, block_length=4, eos_id=21, pad_id=0)
    result = sampler.generate(model, [[1]], 9, streamer=recorder)
    assert ("put", [[5, 6, 21, 0]]) in recorder.events
    assert model.calls == result.calls == 1
    assert result.new_tokens.tolist() == [[5, 6, 21] + [0] * 6]


def test_the_last_block_may_be_short():
    for cached in (FullSequence(), PrefixCache(), DualCache()):
        sampler = MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, block_length=4, interface=cached)
        result = sampler.generate(FastLLaDA(2), prompts(2, 3, 2), 6)
        assert result.sequences.shape == (2, 9)
        assert not (result.sequences == MASK).any()


def test_steps_limit_flags_what_is_left():
    sampler = MaskedDiffusionSampler(Threshold(1.0), mask_id=MASK, block_length=8, steps=3)
    result = sampler.generate(LLaDA(0), prompts(2, 3, 0), 16)
    assert result.stuck.all()
    assert result.nfe.tolist() == [3, 3]
    assert (result.new_tokens == MASK).sum(-1).tolist() == [13, 13]


def test_a_stuck_row_does_not_stop_the_others():
    def model(tokens, attention_mask=None):
        logits = torch.zeros(*tokens.shape, VOCAB)
        # By the prompt's first place: 0, the padding, in the row that proposes the mask alone.
        logits[tokens[:, 0] == 0, :, MASK] = 9.0
        logits[tokens[:, 0] == 1, :, 5] = 9.0
        return logits

    sampler = MaskedDiffusionSampler(DInferThreshold(0.5), mask_id=MASK, block_length=4)
    result = sampler.generate(model, [[1], [1, 2]], 8)
    assert result.stuck.tolist() == [True, False]
    assert result.new_tokens.tolist() == [[MASK] * 8, [5] * 8]
    assert result.nfe.tolist() == [1, 2]


class Recorder:
    def __init__(self):
        self.events = []

    def put(self, value):
        self.events.append(("put", value.tolist()))

    def put_draft(self, value, **kwargs):
        self.events.append(("draft", value.tolist()))

    def end(self):
        self.events.append(("end", None))


def test_streaming_of_drafts():
    recorder, steps = Recorder(), []
    sampler = MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, block_length=4, steps=2)
    result = sampler.generate(
        LLaDA(0),
        [[1, 2]],
        8,
        streamer=recorder,
        callback=lambda x, block, step: steps.append((x.shape, block, step)),
    )
    assert [kind for kind, _ in recorder.events] == ["put", *["draft", "draft", "put"] * 2, "end"]
    assert recorder.events[0] == ("put", [[1, 2]])
    assert sum(token == MASK for token in recorder.events[1][1][0]) == 2
    written = [value for kind, value in recorder.events if kind == "put"][1:]
    assert torch.tensor(written).reshape(1, 8).equal(result.new_tokens)
    assert steps == [((1, 10), 0, 0), ((1, 10), 0, 1), ((1, 10), 1, 0), ((1, 10), 1, 1)]
    with pytest.raises(ValueError, match="streamer: one prompt"):
        sampler.generate(LLaDA(0), [[1], [2]], 8, streamer=recorder)


class Keeper(Recorder):
    """Keeps what it is given, or writes into it."""

    def __init__(self, writes):
        super().__init__()
        self.writes, self.kept = writes, []

    def put(self, value):
        super().put(value)
        self.kept.append(value.zero_() if self.writes else value)

    def put_draft(self, value, **kwargs):
        super().put_draft(value)
        self.kept.append(value.zero_() if self.writes else value)


def test_what_a_streamer_is_given_is_its_own():
    sampler = MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, block_length=4, eos_id=3)
    expected = sampler.generate(LLaDA(0), [[1, 2]], 8)
    for writes in (False, True):
        keeper = Keeper(writes)
        result = sampler.generate(LLaDA(0), [[1, 2]], 8, streamer=keeper)
        assert torch.equal(result.sequences, expected.sequences)
        told = [value for _, value in keeper.events[:-1]]
        assert writes or [value.tolist() for value in keeper.kept] == told


def test_seeds():
    sampler = MaskedDiffusionSampler(Random(), mask_id=MASK, temperature=1.5, block_length=8)
    model, prompt = LLaDA(0), prompts(2, 3, 0)
    first, same, other = (sampler.generate(model, prompt, 16, seed=s).sequences for s in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    torch.manual_seed(4)
    one = sampler.generate(model, prompt, 16).sequences
    torch.manual_seed(4)
    assert torch.equal(one, sampler.generate(model, prompt, 16).sequences)


def test_temperature_of_the_step_and_of_the_row():
    model, prompt = LLaDA(0, sharpness=1.0), prompts(3, 3, 0)
    seen = []

    def temperature(step, steps):
        seen.append((step, steps))
        return 0.0

    greedy = MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, block_length=4, steps=2)
    by_step = MaskedDiffusionSampler(
        LowConfidence(), mask_id=MASK, block_length=4, steps=2, temperature=temperature
    )
    expected = greedy.generate(model, prompt, 4).sequences
    assert torch.equal(by_step.generate(model, prompt, 4).sequences, expected)
    assert seen == [(0, 2), (1, 2)]
    by_row = MaskedDiffusionSampler(
        LowConfidence(), mask_id=MASK, block_length=4, steps=2, temperature=torch.tensor([0.0, 3.0, 0.0])
    )
    result = by_row.generate(model, prompt, 4, seed=0).sequences
    assert torch.equal(result[::2], expected[::2]) and not torch.equal(result[1], expected[1])
    with pytest.raises(ValueError, match="temperature: one value per prompt"):
        by_row.generate(model, prompts(2, 3, 0), 4)


def test_uniform_noise_generation():
    text = [1, 5, 6, 7, 2, 8, 9, 9, 4]
    model = Fixed(text)
    sampler = MaskedDiffusionSampler(EntropyBoundRenoise(VOCAB), mask_id=0, block_length=4, steps=20)
    result = sampler.generate(model, [[1]], 8, seed=1)
    assert result.sequences.tolist() == [text]
    # Certain from the first step on, and stable one step later.
    assert result.nfe.tolist() == [4]


def test_transformers_masked_language_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    model = transformers.BertForMaskedLM(config).eval()
    sampler = MaskedDiffusionSampler(
        LowConfidence(), mask_id=MASK, block_length=4, interface=FullSequence(position_ids=True)
    )
    rows = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    together = sampler.generate(model, rows, 8)
    for number, row in enumerate(rows):
        assert torch.equal(together.new_tokens[number], sampler.generate(model, [row], 8).new_tokens[0])


def test_transformers_streamer():
    transformers = pytest.importorskip("transformers")
    written = []

    class Tokenizer:
        def decode(self, tokens, **kwargs):
            return " ".join(map(str, torch.as_tensor(tokens).tolist()))

    class Quiet(transformers.TextDiffusionStreamer):
        def on_finalized_text(self, text, stream_end=False):
            written.append(text)

    sampler = MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, block_length=4)
    result = sampler.generate(LLaDA(0), [[1, 2]], 4, streamer=Quiet(Tokenizer()))
    assert "".join(written).split() == [str(token) for token in result.sequences[0].tolist()]


def too_short(tokens):
    return torch.zeros(tokens.shape[0], tokens.shape[1] - 1, VOCAB)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((too_short, [[1]], 4), {}, r"model: logits must be \[1, 5, V\] like its tokens, got \(1, 4, 23\)"),
        ((lambda x: torch.zeros(*x.shape), [[1]], 4), {}, "model: logits must be"),
        ((lambda x: "text", [[1]], 4), {}, "model: must return logits"),
        ((lambda x: torch.zeros(*x.shape, MASK), [[1]], 4), {}, "mask_id: 22 is outside the vocabulary"),
        (("model", [[1]], 4), {}, "model: a callable"),
        ((LLaDA(), [[1]], 0), {}, "max_new_tokens"),
        ((LLaDA(), [], 4), {}, "prompt_ids: at least one"),
        ((LLaDA(), torch.zeros(2, 3), 4), {}, "prompt_ids: dtype"),
        ((LLaDA(), torch.zeros(3, dtype=torch.int64), 4), {}, r"prompt_ids: shape must be \[B, L\]"),
        ((LLaDA(), [[[1]]], 4), {}, r"prompt_ids\[0\]"),
        ((Fixed([1, 2, 3, 4, 5]), [[1]], 4), {"interface": PrefixCache()}, "use_cache"),
        (
            (lambda x, **_: torch.zeros(*x.shape, VOCAB), [[1]], 4),
            {"interface": DualCache()},
            "past_key_values",
        ),
    ],
)
def test_bad_calls(arguments, options, message):
    sampler = MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, **options)
    with pytest.raises((TypeError, ValueError), match=message):
        sampler.generate(*arguments)
