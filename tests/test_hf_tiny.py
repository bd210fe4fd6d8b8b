"""The trained tiny model: what the accelerated model answers is what the original answers."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from hf_models import generate, transformers

import dgemma_accel

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "tiny-dgemma"
CHECKPOINT = FOLDER / "checkpoint"
BATCH, PROMPTS = 50, 500

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not (CHECKPOINT / "model.safetensors").exists(),
        reason="examples/tiny-dgemma/checkpoint is not there; train.py makes it",
    ),
]


@pytest.fixture(scope="module")
def model():
    return transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(CHECKPOINT).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def pairs():
    sys.path.insert(0, str(FOLDER))
    try:
        from tasks import make_prompts
    finally:
        sys.path.remove(str(FOLDER))
    # The rows of a batch wait for each other, so tasks of one length go together.
    return sorted(make_prompts(PROMPTS, seed=0), key=lambda pair: len(pair[1]))


def batches(tokenizer, pairs):
    for start in range(0, len(pairs), BATCH):
        inputs = tokenizer(
            [prompt for prompt, _ in pairs[start : start + BATCH]], padding=True, return_tensors="pt"
        )
        yield start, inputs.input_ids, inputs.attention_mask


def answers(tokenizer, sequences, prompt_length):
    rows = []
    for row in sequences[:, prompt_length:].tolist():
        end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
        rows.append(tokenizer.decode(row[:end]))
    return rows


def exact_match(texts, pairs):
    return sum(text == answer for text, (_, answer) in zip(texts, pairs, strict=True))


@pytest.mark.slow
def test_five_hundred_prompts(model, tokenizer, pairs):
    """The same noise: the same tokens in every row, step counts included, and so the same exact match."""
    expected, result, different = [], [], 0
    for start, ids, mask in batches(tokenizer, pairs):
        plain = generate(model, ids, mask, base=start + 1)
        with dgemma_accel.accelerated(model):
            fast = generate(model, ids, mask, base=start + 1)
        different += int((plain.sequences != fast.sequences).any(-1).sum())
        assert torch.equal(plain.tokens_per_forward, fast.tokens_per_forward)
        expected += answers(tokenizer, plain.sequences, ids.shape[1])
        result += answers(tokenizer, fast.sequences, ids.shape[1])
    assert different == 0
    assert exact_match(result, pairs) == exact_match(expected, pairs) >= 0.8 * PROMPTS


def test_its_own_noise_answers_as_well(model, tokenizer, pairs):
    """Drawn as a user draws it, exact match is what it is with the original's noise, within a few prompts of 50."""
    pairs = pairs[:: PROMPTS // BATCH]
    scores = []
    for context in (False, True):
        texts = []
        torch.manual_seed(0)
        for _, ids, mask in batches(tokenizer, pairs):
            if context:
                with dgemma_accel.accelerated(model):
                    output = model.generate(ids, attention_mask=mask)
            else:
                output = model.generate(ids, attention_mask=mask)
            texts += answers(tokenizer, output.sequences, ids.shape[1])
        scores.append(exact_match(texts, pairs))
    assert scores[0] >= 0.8 * BATCH and abs(scores[0] - scores[1]) <= 0.12 * BATCH


@pytest.mark.slow
@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
def test_quantized_weights_answer_as_well(model, tokenizer, pairs, format):
    """The same noise: rounding experts, and the other products of layers, changes no more than a few answers of 500."""
    small = dgemma_accel.quantize_experts(copy.deepcopy(model), format=format)
    if format == "fp8":
        dgemma_accel.quantize_linears(small)
    dgemma_accel.accelerate(small)
    scores = []
    for one in (model, small):
        texts = []
        for start, ids, mask in batches(tokenizer, pairs):
            sequences = generate(one, ids, mask, base=start + 1).sequences
            texts += answers(tokenizer, sequences, ids.shape[1])
        scores.append(exact_match(texts, pairs))
    assert scores[0] >= 0.8 * PROMPTS and abs(scores[1] - scores[0]) <= 0.01 * PROMPTS


def test_damage_shows(model, tokenizer, pairs, monkeypatch):
    """Attention that drops the newest half of the prompt does not answer."""
    from dgemma_accel.hf import attention

    right = attention.block_attention

    def damaged(query, key, value, prefix_key, prefix_value, **options):
        if prefix_key is None:  # the prompt's own pass
            return right(query, key, value, prefix_key, prefix_value, **options)
        half = prefix_key.shape[2] // 2
        options.update(prefix_start=None, prefix_end=None)
        return right(query, key, value, prefix_key[:, :, :half], prefix_value[:, :, :half], **options)

    monkeypatch.setattr(attention, "block_attention", damaged)
    _, ids, mask = next(batches(tokenizer, pairs))
    with dgemma_accel.accelerated(model):
        output = model.generate(ids, attention_mask=mask, max_denoising_steps=8)
    assert exact_match(answers(tokenizer, output.sequences, ids.shape[1]), pairs[:BATCH]) < BATCH / 4
