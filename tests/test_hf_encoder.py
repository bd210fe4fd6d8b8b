"""The encoder's passes through block_attention: prefill, and a finished canvas going into the cache."""

import pytest
import torch
from hf_models import CANVAS, IMAGE_TOKEN, WINDOW, as_argument, encode_in_turns, generate, prompt, tiny_model

import dgemma_accel
from dgemma_accel.hf import attention

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def calls(monkeypatch):
    """(layer is global, prefix length, block length) of every causal call."""
    seen = []
    right = attention.block_attention

    def watched(query, key, value, prefix_key, prefix_value, **options):
        if options["causal"]:
            held = 0 if prefix_key is None else prefix_key.shape[2]
            seen.append((query.shape[-1] == 32, held, query.shape[2]))
        return right(query, key, value, prefix_key, prefix_value, **options)

    monkeypatch.setattr(attention, "block_attention", watched)
    return seen


@pytest.mark.parametrize(
    "turns",
    [(1, CANVAS), (4, CANVAS), (5, CANVAS, CANVAS), (WINDOW, CANVAS), (3 * WINDOW, CANVAS, 3), (WINDOW - 1, 1, 1)],
)  # fmt: skip
def test_cache_and_hidden_states(model, calls, turns):
    ids, _ = prompt(2, sum(turns))
    cache, states = encode_in_turns(model, ids, turns)
    assert not calls
    with dgemma_accel.accelerated(model):
        fast_cache, fast_states = encode_in_turns(model, ids, turns)
    # Two sliding layers, which hold the last WINDOW - 1 tokens, and a global one.
    before = 0
    expected = []
    for length in turns:
        expected += [(False, min(before, WINDOW - 1), length)] * 2 + [(True, before, length)]
        before += length
    assert calls == expected
    for a, b in zip(fast_states, states):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    for a, b in zip(fast_cache.layers, cache.layers):
        assert a.keys.shape == b.keys.shape
        assert torch.allclose(a.keys, b.keys, rtol=1e-4, atol=1e-4)
        assert torch.allclose(a.values, b.values, rtol=1e-4, atol=1e-4)


def test_a_padded_batch(model, calls):
    """Its prompt and its canvases."""
    ids, mask = prompt(3, 6, left_padding=(0, 2, 5))
    expected = generate(model, ids, mask, max_new_tokens=3 * CANVAS)
    with dgemma_accel.accelerated(model):
        result = generate(model, ids, mask, max_new_tokens=3 * CANVAS)
    assert torch.equal(result.sequences, expected.sequences)
    held = WINDOW - 1
    assert calls == [
        *[(False, 0, 6)] * 2, (True, 0, 6),
        *[(False, 6, CANVAS)] * 2, (True, 6, CANVAS),
        *[(False, held, CANVAS)] * 2, (True, 6 + CANVAS, CANVAS),
    ]  # fmt: skip


@pytest.mark.parametrize("padding", [(0, 3, WINDOW + 2), (0, 1, 0), (WINDOW, WINDOW + 9, 2)])
@pytest.mark.parametrize("turns", [(WINDOW + 10, CANVAS, CANVAS, 5), (WINDOW + 10, 3 * WINDOW, 1, 1)])
def test_padded_batches_past_the_window(model, calls, padding, turns):
    """Rows whose window begins inside their padding, at its end and behind it, against the original's masks."""
    ids, mask = prompt(3, sum(turns), left_padding=padding)
    cache, states = encode_in_turns(model, ids, turns, mask)
    with dgemma_accel.accelerated(model):
        fast_cache, fast_states = encode_in_turns(model, ids, turns, mask)
    assert len(calls) == 3 * len(turns)
    real = mask.bool().split(turns, 1)
    for a, b, shown in zip(fast_states, states, real):
        assert torch.allclose(a[shown], b[shown], rtol=1e-4, atol=1e-4)
    for a, b in zip(fast_cache.layers, cache.layers):
        shown = mask.bool()[:, -a.keys.shape[2] :]
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            assert torch.allclose(x.transpose(1, 2)[shown], y.transpose(1, 2)[shown], rtol=1e-4, atol=1e-4)


def test_padding_that_is_not_turned_away_shows(model, monkeypatch):
    ids, mask = prompt(3, 6, left_padding=(0, 2, 5))
    _, states = encode_in_turns(model, ids, (6,), mask)
    monkeypatch.setattr(attention, "_turned", lambda x, by: x)
    with dgemma_accel.accelerated(model):
        _, fast = encode_in_turns(model, ids, (6,), mask)
    assert torch.allclose(fast[0][0], states[0][0], rtol=1e-4, atol=1e-4), "a row without padding"
    for row, padding in ((1, 2), (2, 5)):
        assert not torch.allclose(fast[0][row, padding:], states[0][row, padding:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("hidden", [slice(4, 6), slice(2, 4), slice(0, 6)], ids=["right", "hole", "all"])
def test_other_masks_of_a_prompt(model, calls, hidden):
    """Padding on the right and holes are the original's; a row of padding alone does no harm to the others."""
    ids, mask = prompt(2, 6)
    mask[1, hidden] = 0
    _, states = encode_in_turns(model, ids, (6,), mask)
    with dgemma_accel.accelerated(model):
        _, fast = encode_in_turns(model, ids, (6,), mask)
    assert len(calls) == (3 if hidden == slice(0, 6) else 0)
    shown = mask.bool()
    assert torch.allclose(fast[0][shown], states[0][shown], rtol=1e-4, atol=1e-4)
    assert fast[0].isfinite().all()


def test_slots_hidden_at_the_end_of_the_cache(model, calls):
    """They count for the distance that the window measures, so the original serves."""
    turns = (2 * WINDOW, 5)
    ids, mask = prompt(2, sum(turns))
    mask[1, 2 * WINDOW - 3 : 2 * WINDOW] = 0
    _, states = encode_in_turns(model, ids, turns, mask)
    with dgemma_accel.accelerated(model):
        _, fast = encode_in_turns(model, ids, turns, mask)
    assert not calls
    assert torch.allclose(fast[1], states[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "wrong", [{"causal": False, "window": None}, {"window": None}, {"window": WINDOW - 1}]
)
@pytest.mark.parametrize("turns", [(30,), (2 * WINDOW, CANVAS)])
def test_the_causal_mask_and_the_window_matter(model, monkeypatch, wrong, turns):
    ids, _ = prompt(2, sum(turns))
    right = attention.block_attention
    _, expected = encode_in_turns(model, ids, turns)
    monkeypatch.setattr(
        attention,
        "block_attention",
        lambda *arguments, **options: right(*arguments, **(options | change(options))),
    )

    def change(options):
        return wrong if options["window"] else {name: wrong[name] for name in wrong if name == "causal"}

    with dgemma_accel.accelerated(model):
        _, result = encode_in_turns(model, ids, turns)
    assert not torch.allclose(result[-1], expected[-1], rtol=1e-3, atol=1e-3)


def test_images_are_left_to_the_original(model, calls):
    torch.manual_seed(2)
    ids, mask = prompt(1, 24)
    ids[:, 10:19] = IMAGE_TOKEN
    side = torch.arange(6)
    options = {
        "pixel_values": torch.rand(1, 36, 3 * 4 * 4),
        "image_position_ids": torch.cartesian_prod(side, side).flip(-1)[None].contiguous(),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
        "max_new_tokens": 2 * CANVAS,
    }
    expected = generate(model, ids, mask, **options)
    with dgemma_accel.accelerated(model):
        result = generate(model, ids, mask, **options)
    assert torch.equal(result.sequences, expected.sequences)
    assert calls == [(False, WINDOW - 1, CANVAS)] * 2 + [(True, 24, CANVAS)], (
        "only the canvas is plainly causal"
    )


def test_a_fully_bidirectional_encoder(calls):
    """Such a model's encoder is not causal at all."""
    model = tiny_model()
    model.config.text_config.use_bidirectional_attention = "all"
    for layer in model.model.encoder.language_model.layers:
        layer.self_attn.is_causal = False
    with dgemma_accel.accelerated(model):
        masks = model.model.encoder.create_masks_for_generate(
            config=model.config, inputs_embeds=torch.empty(1, 6, 0), attention_mask=torch.ones(1, 6).bool(),
            position_ids=torch.arange(6)[None], **as_argument(None),
        )  # fmt: skip
    assert not any(isinstance(mask, attention.CausalRange) for mask in masks.values()) and not calls
