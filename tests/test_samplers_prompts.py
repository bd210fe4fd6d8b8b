"""What `generate` takes and refuses before it calls a model: prompts, token ids, listeners, numbers per row."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from samplers_models import MASK, VOCAB, FastLLaDA, LLaDA, prompts

from dgemma_accel.samplers import (
    DREAM,
    EntropyBoundRenoise,
    Factor,
    FullSequence,
    LowConfidence,
    MaskedDiffusionSampler,
    Threshold,
    TopK,
)
from dgemma_accel.samplers.prompts import device_of


def sampler_of(strategy=None, **options):
    return MaskedDiffusionSampler(
        strategy or LowConfidence(), **{"mask_id": MASK, "block_length": 4, **options}
    )


def never(tokens, **kwargs):
    raise AssertionError("the model was called")


class Encoding(dict):
    """As a tokenizer's BatchEncoding."""


@pytest.mark.parametrize(
    ("prompt_ids", "error", "message"),
    [
        ("text", TypeError, "prompt_ids: .* got str; a tokenizer"),
        (["text", "more"], TypeError, r"prompt_ids\[0\]: .* got str; a tokenizer"),
        (None, TypeError, "prompt_ids: .* got NoneType"),
        (3, TypeError, "prompt_ids: .* got int"),
        ([1, 2, 3], TypeError, r"prompt_ids\[0\]: a sequence of token ids expected, got int"),
        ([[1], None], TypeError, r"prompt_ids\[1\]: a sequence .* got NoneType"),
        (Encoding(input_ids=[[1]]), TypeError, "prompt_ids: .* got Encoding; its ids are .input_ids"),
        ([Encoding(input_ids=[1])], TypeError, r"prompt_ids\[0\]: .*; its ids are .input_ids"),
        ([[1, 2.5]], TypeError, r"prompt_ids\[0\]: a token id .* got float"),
        ([[1, True]], TypeError, r"prompt_ids\[0\]: a token id .* got bool"),
        ([np.array([1.0, 2.0])], TypeError, r"prompt_ids\[0\]: dtype .* got float64"),
        ([torch.tensor([1.0])], TypeError, r"prompt_ids\[0\]: dtype .* got float32"),
        ([torch.tensor([True])], TypeError, r"prompt_ids\[0\]: dtype .* got bool"),
        (torch.tensor([[1.0]]), TypeError, "prompt_ids: dtype"),
        (np.array([[1.0]]), TypeError, r"prompt_ids\[0\]: dtype"),
        ([torch.ones(1, 1).long()], ValueError, r"prompt_ids\[0\]: .* got shape \(1, 1\)"),
        ([[1], [2, -1]], ValueError, r"prompt_ids\[1\]: a token id in"),
        (torch.tensor([[1, -100]]), ValueError, "prompt_ids: token ids must not be negative, got -100"),
        ([np.array([-7])], ValueError, "prompt_ids: token ids must not be negative, got -7"),
        ([], ValueError, "prompt_ids: at least one"),
    ],
    ids=repr,
)
def test_prompts_that_are_none(prompt_ids, error, message):
    with pytest.raises(error, match=message):
        sampler_of().generate(never, prompt_ids, 4)


def test_prompts_of_all_forms():
    model, expected = LLaDA(1), sampler_of().generate(LLaDA(1), torch.tensor([[1, 2, 3]]), 4).sequences
    for form in (
        [[1, 2, 3]],
        ((1, 2, 3),),
        [range(1, 4)],
        [np.array([1, 2, 3], dtype=np.int32)],
        np.array([[1, 2, 3]]),
        [torch.tensor([1, 2, 3], dtype=torch.int32)],
        (row for row in [[1, 2, 3]]),
    ):
        assert torch.equal(sampler_of().generate(model, form, 4).sequences, expected)
    for empty in ([], np.array([]), torch.tensor([])):
        assert sampler_of().generate(model, [empty], 4).prompt_length == 0
    # Padding may hold anything.
    ids, mask = torch.tensor([[1, 2, 3, -100]]), torch.tensor([[1, 1, 1, 0]])
    assert torch.equal(sampler_of().generate(model, ids, 4, attention_mask=mask).sequences, expected)


def test_where_a_generation_takes_place():
    def ids(device):
        return torch.zeros(2, dtype=torch.int64, device=device)

    module = torch.nn.Linear(1, 1, device="meta")
    for model, prompt_ids, device in (
        (never, ids("meta")[None], "meta"),
        (never, [ids("meta")], "meta"),
        (never, ([1, 2], ids("meta")), "meta"),
        (never, [[1, 2]], "cpu"),
        (never, [], "cpu"),
        (never, (row for row in [[1, 2]]), "cpu"),
        (module, [[1, 2]], "meta"),
        # Tensors that go where a module is may have been made anywhere.
        (module, [ids("cpu")], "meta"),
        (torch.nn.Identity(), [ids("meta")], "meta"),
    ):
        assert device_of(model, prompt_ids) == torch.device(device)


def with_embeddings(size):
    embedding = torch.nn.Embedding(size, 1)
    model = torch.nn.Module()
    model.get_input_embeddings = lambda: embedding
    model.config = SimpleNamespace(vocab_size=10_000)
    model.forward = never
    return model


def with_config(size):
    model = torch.nn.Module()
    model.get_input_embeddings = _not_implemented
    model.config, model.forward = SimpleNamespace(vocab_size=size), never
    return model


def _not_implemented():
    raise NotImplementedError


@pytest.mark.parametrize("model_of", [with_embeddings, with_config])
@pytest.mark.parametrize(
    ("sampler", "prompt_ids", "message"),
    [
        (sampler_of(mask_id=30), [[1]], r"mask_id: 30 is outside the model's vocabulary, \[0, 30\)"),
        (sampler_of(eos_id=(1, 31)), [[1]], "eos_id: 31 is outside"),
        (sampler_of(pad_id=32), [[1]], "pad_id: 32 is outside"),
        (sampler_of(EntropyBoundRenoise(33)), [[1]], "vocab_size: EntropyBoundRenoise draws from 33"),
        (sampler_of(), [[1, 34], [2]], "prompt_ids: 34 is outside"),
        (sampler_of(), torch.tensor([[35]]), "prompt_ids: 35 is outside"),
        (sampler_of(), [[29], [30]], "prompt_ids: 30 is outside"),
    ],
)
def test_tokens_that_the_model_does_not_have(model_of, sampler, prompt_ids, message):
    with pytest.raises(ValueError, match=message):
        sampler.generate(model_of(30), prompt_ids, 4)
    # The largest that there is comes as far as the model.
    with pytest.raises(AssertionError, match="the model was called"):
        sampler.generate(model_of(36), prompt_ids, 4)


def test_listeners_are_looked_at_first():
    with pytest.raises(TypeError, match=r"streamer: an object with put\(\) and end\(\) expected, got str"):
        sampler_of().generate(never, [[1]], 4, streamer="stdout")
    with pytest.raises(TypeError, match=r"streamer: an object with put\(\) and end\(\)"):
        sampler_of().generate(never, [[1]], 4, streamer=SimpleNamespace(put=print))
    with pytest.raises(TypeError, match="callback: a callable or None expected, got int"):
        sampler_of().generate(never, [[1]], 4, callback=3)


@pytest.mark.parametrize("interface", [FullSequence(), DREAM, FullSequence(position_ids=True)], ids=repr)
def test_padding_that_a_model_cannot_be_told(interface):
    def model(tokens):
        return torch.zeros(*tokens.shape, VOCAB)

    shifted = ", shift_logits=True" if interface is DREAM else ""
    with pytest.raises(TypeError, match="forward takes no (attention_mask|position_ids)") as caught:
        sampler_of(interface=interface).generate(model, [[1], [1, 2]], 4)
    assert f"FullSequence(attention_mask=None{shifted})" in str(caught.value)
    sampler_of(interface=interface).generate(model, [[1, 3], [1, 2]], 4)
    sampler_of(interface=FullSequence(attention_mask=None)).generate(model, [[1], [1, 2]], 4)
    seen = []
    sampler_of(interface=interface).generate(
        lambda x, **given: (seen.append(given), model(x))[1], [[1], [1, 2]], 4
    )
    assert "attention_mask" in seen[0]


ROWS = [[1, 2, 3], [4], [5, 6, 7], [8], [9, 10]]


@pytest.mark.parametrize(
    "make",
    [
        lambda v: Threshold(v(0.1, 0.95, 0.4, 0.99, 0.2)),
        lambda v: Threshold(0.9, min_count=v(1, 2, 4, 3, 1)),
        lambda v: Factor(v(0.1, 3.0, 0.4, 1.0, 0.2)),
        lambda v: TopK(v(1, 2, 4, 3, 1)),
        lambda v: TopK(v(1, 2, 4, 3, 1), gumbel_temperature=v(0.1, 0.2, 0.3, 0.4, 0.5)),
    ],
)
@pytest.mark.parametrize(
    ("interface", "model"),
    [(FullSequence(), LLaDA), (FullSequence(attention_mask=None), FastLLaDA)],
    ids=("together", "by length"),
)
def test_numbers_per_row_follow_their_rows(make, interface, model):
    sampler = sampler_of(make(lambda *values: torch.tensor(values)), interface=interface)
    together = sampler.generate(model(5), ROWS, 8, seed=3)
    assert len(set(together.nfe.tolist())) > 1
    if getattr(sampler.strategy, "gumbel_temperature", None) is not None:
        return  # draws depend on a row's place in its group
    for number, row in enumerate(ROWS):
        alone = sampler_of(make(lambda *values, i=number: values[i]), interface=interface)
        result = alone.generate(model(5), [row], 8)
        assert torch.equal(result.new_tokens[0], together.new_tokens[number])
        assert int(result.nfe) == int(together.nfe[number])


def test_numbers_per_row_that_are_not_one_per_prompt():
    for interface in (FullSequence(), FullSequence(attention_mask=None)):
        sampler = sampler_of(Threshold(torch.tensor([0.5, 0.6])), interface=interface)
        with pytest.raises(ValueError, match="tau: one value per prompt is 3 values, got 2"):
            sampler.generate(never, [[1], [2], [3, 4]], 4)
        sampler = sampler_of(temperature=torch.tensor([0.5, 0.6]), interface=interface)
        with pytest.raises(ValueError, match="temperature: one value per prompt is 3 values, got 2"):
            sampler.generate(never, [[1], [2], [3, 4]], 4)


def test_guidance_is_of_capped_logits():
    class Loud(LLaDA):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 20
            return output

    cap, w, model = 4.0, 2.0, Loud(2)
    texts = {}
    for guided in (True, False):

        def capped(tokens, guided=guided):
            # Guidance by hand over capped halves, or over plain ones whose guided logits are capped.
            hidden = tokens.clone()
            hidden[:, :5] = MASK
            halves = [model(x).logits for x in (tokens, hidden)]
            if guided:
                halves = [cap * torch.tanh(x / cap) for x in halves]
            out = halves[1] + (w + 1) * (halves[0] - halves[1])
            return out if guided else cap * torch.tanh(out / cap)

        texts[guided] = sampler_of().generate(capped, prompts(4, 5, 2), 8).sequences
    ours = sampler_of(softcap=cap, guidance_scale=w).generate(model, prompts(4, 5, 2), 8).sequences
    assert not torch.equal(texts[True], texts[False])
    assert torch.equal(ours, texts[True])


def test_infinite_logits_of_guidance():
    """A token that a half rules out is never written; one that only the unconditional half rules out may be."""

    def model(tokens):
        logits = torch.zeros(*tokens.shape, VOCAB)
        logits[0, :, 3], logits[1, :, 3] = 5.0, -math.inf
        logits[0, :, 4], logits[1, :, 4] = -math.inf, 9.0
        return logits

    result = sampler_of(guidance_scale=1.0).generate(model, [[1]], 4)
    assert result.new_tokens.tolist() == [[3] * 4]


def test_temperatures_of_a_step_follow_their_rows():
    prompts, values = [[1, 2], [3], [4, 5], [6]], torch.tensor([0.0, 0.8, 0.0, 1.5])
    interface = FullSequence(attention_mask=None)
    texts = [
        sampler_of(temperature=temperature, interface=interface).generate(LLaDA(0), prompts, 8, seed=1)
        for temperature in (values, lambda step, steps: values)
    ]
    assert torch.equal(texts[0].sequences, texts[1].sequences)
    # Two rows in each group: as many values as one of them has rows are no answer.
    sampler = sampler_of(temperature=lambda *_: values[:2], interface=interface)
    with pytest.raises(ValueError, match="^temperature: one value per prompt is 4 values, got 2"):
        sampler.generate(LLaDA(0), prompts, 8)


def test_callbacks_see_all_rows():
    """Also where prompts run in groups: those of one token first."""
    seen = []
    sampler = sampler_of(steps=2, interface=FullSequence(attention_mask=None), pad_id=3)
    result = sampler.generate(
        LLaDA(0), [[1, 2], [5], [6, 7]], 4, callback=lambda x, block, step: seen.append((x, block, step))
    )
    assert [(block, step) for _, block, step in seen] == [(0, 0), (0, 1)] * 2
    assert all(x.shape == result.sequences.shape for x, *_ in seen)
    assert all(x[:, :2].tolist() == [[1, 2], [3, 5], [6, 7]] for x, *_ in seen)
    masks = [(x[:, 2:] == MASK).sum(-1).tolist() for x, *_ in seen]
    assert masks == [[4, 2, 4], [4, 0, 4], [2, 0, 2], [0, 0, 0]]
    assert torch.equal(seen[-1][0], result.sequences)
