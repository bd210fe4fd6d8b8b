"""Generation with an accelerated model: the same noise gives the same tokens."""

import copy
import logging

import pytest
import torch
from hf_models import (
    CANVAS,
    IMAGE_TOKEN,
    PAD,
    VOCAB,
    WINDOW,
    generate,
    generation,
    prompt,
    same_noise,
    tiny_model,
    transformers,
)

import dgemma_accel
from dgemma_accel.hf import attention, denoising, masks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


class Recorder:
    def __init__(self):
        self.put_values, self.drafts, self.ended = [], [], 0

    def put(self, value):
        self.put_values.append(value)

    def put_draft(self, value):
        self.drafts.append(value)

    def end(self):
        self.ended += 1


class LogitsRecorder(Recorder):
    _takes_logits = True

    def put_draft(self, logits):
        self.drafts.append(logits)


def both(model, ids, mask=None, *, fast_options=None, **options):
    """(original output, accelerated output, their streamers)."""
    recorders = Recorder(), Recorder()
    expected = generate(model, ids, mask, streamer=recorders[0], **options)
    with dgemma_accel.accelerated(model, **(fast_options or {})):
        result = generate(model, ids, mask, streamer=recorders[1], **options)
    return expected, result, recorders


def assert_same(expected, result, recorders):
    assert torch.equal(result.sequences, expected.sequences)
    assert torch.equal(result.tokens_per_forward, expected.tokens_per_forward)
    first, second = recorders
    assert len(first.drafts) == len(second.drafts) and second.ended == 1
    assert all(torch.equal(a, b) for a, b in zip(first.drafts, second.drafts))
    assert all(torch.equal(a, b) for a, b in zip(first.put_values, second.put_values))


# Around the sliding window, and where its cache has let go of most of the prompt.
LENGTHS = [1, WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 5]


@pytest.mark.parametrize("length", LENGTHS)
def test_prompt_lengths(model, length):
    ids, _ = prompt(2, length)
    assert_same(*both(model, ids, max_new_tokens=3 * CANVAS))


@pytest.mark.parametrize("length", [WINDOW - 3, WINDOW, 2 * WINDOW + 3])
def test_left_padding(model, length):
    ids, mask = prompt(4, length, left_padding=(0, 1, length // 2, length - 1))
    expected, *rest = both(model, ids, mask)
    assert_same(expected, *rest)
    # A row of the batch gives what it gives alone, so padding was really left out.
    alone = generate(model, ids, torch.ones_like(mask))
    assert not torch.equal(alone.sequences, expected.sequences)


def test_early_stop_end_of_text_and_padding_after_it(model):
    ids, mask = prompt(3, 20, left_padding=(0, 5, 9))
    expected, result, recorders = both(
        model, ids, mask, max_new_tokens=4 * CANVAS, eos_token_id=[11, 12, 13, 14]
    )
    assert_same(expected, result, recorders)
    new = expected.sequences[:, 20:]
    assert len(recorders[0].drafts) < 4 * 8, "no canvas stopped early"
    assert (new[0] == PAD).any() and not (new[1] == PAD).all()
    steps = {round(float((row != PAD).sum() / rate)) for row, rate in zip(new, expected.tokens_per_forward)}
    assert len(steps) > 1, "all rows took the same number of steps, so freezing was not exercised"


@pytest.mark.parametrize("stability", [0, 2])
def test_stability(model, stability):
    ids, _ = prompt(3, 9, seed=4)
    assert_same(
        *both(model, ids, stability_threshold=stability, confidence_threshold=0.5, max_denoising_steps=12)
    )


def test_single_row_and_one_step(model):
    ids, _ = prompt(1, 5)
    assert_same(*both(model, ids))
    assert_same(*both(model, ids, max_denoising_steps=1))


@pytest.mark.parametrize("asked", ["reference", "cpp"])
def test_backends_give_the_same_tokens(model, asked):
    ids, mask = prompt(2, 18, left_padding=(0, 3))
    assert_same(*both(model, ids, mask, fast_options={"backend": asked}))


@pytest.mark.parametrize("exact", [False, True])
def test_conditioning_with_and_without_the_roundings(model, monkeypatch, exact):
    """In fp32 there is no rounding to repeat, so the tokens are the same either way."""
    from dgemma_accel.hf import conditioning

    asked = []
    right = conditioning.soft_embedding
    monkeypatch.setattr(
        conditioning, "soft_embedding", lambda *a, **k: (asked.append(k["exact"]), right(*a, **k))[1]
    )
    ids, mask = prompt(2, 20, left_padding=(0, 6))
    assert_same(*both(model, ids, mask, fast_options={"exact": exact}))
    assert asked and set(asked) == {exact}
    with pytest.raises(TypeError, match="exact: a bool expected, got int"):
        dgemma_accel.accelerate(model, exact=1)


def test_eager_attention():
    """The original cannot pad a batch under eager attention; accelerated, it gives what sdpa gives."""
    eager, sdpa = (tiny_model(attn_implementation=name, seed=3) for name in ("eager", "sdpa"))
    ids, mask = prompt(2, 20, left_padding=(0, 6))
    assert_same(*both(eager, ids))
    assert eager.config._attn_implementation == "eager"
    with dgemma_accel.accelerated(eager):
        result = generate(eager, ids, mask)
    assert torch.equal(result.sequences, generate(sdpa, ids, mask).sequences)


class TestBfloat16:
    """Attention rounds once instead of three times in bf16, so the two halves are held to their own standards."""

    def test_sampler_gives_the_same_tokens(self, monkeypatch):
        """With the attention of the original, every draft of every step is the same."""
        model = tiny_model(torch.bfloat16)
        ids, mask = prompt(3, 20, left_padding=(0, 5, 9))
        recorders = Recorder(), Recorder()
        expected = generate(model, ids, mask, streamer=recorders[0], max_new_tokens=3 * CANVAS)
        monkeypatch.setattr(
            "dgemma_accel.hf.attention._needs_original", lambda *_: "only the sampler is tested"
        )
        with dgemma_accel.accelerated(model, exact=True):
            result = generate(model, ids, mask, streamer=recorders[1], max_new_tokens=3 * CANVAS)
        assert_same(expected, result, recorders)

    @pytest.mark.parametrize("index", [0, 2], ids=["sliding", "global"])
    def test_attention_is_as_near_the_truth(self, index, monkeypatch):
        model = tiny_model(torch.bfloat16)
        ids, _ = prompt(3, 20)
        with torch.no_grad():
            cache = model.model.encoder(input_ids=ids).past_key_values
        module = model.model.decoder.layers[index].self_attn
        hidden = torch.randn(3, CANVAS, 64)
        positions = torch.arange(20, 20 + CANVAS)[None]
        rotary = model.model.decoder.rotary_emb(hidden, positions, module.layer_type)

        @torch.no_grad()
        def attend(dtype):
            module.to(dtype)
            held = copy.deepcopy(cache)
            held.layers[index].keys = held.layers[index].keys.to(dtype)
            held.layers[index].values = held.layers[index].values.to(dtype)
            embeddings = tuple(x.to(dtype) for x in rotary)
            return module(hidden.bfloat16().to(dtype), embeddings, None, held)[0].float()

        truth, plain = attend(torch.float32), attend(torch.bfloat16)
        calls, right = [], attention.block_attention
        monkeypatch.setattr(
            attention, "block_attention", lambda *a, **options: (calls.append(1), right(*a, **options))[1]
        )
        with dgemma_accel.accelerated(model):
            fast = attend(torch.bfloat16)
        assert calls == [1], "the accelerated attention did not run"
        assert (fast - truth).abs().mean() <= 1.1 * (plain - truth).abs().mean()
        # A prefix that is one token short is no rounding error.
        cache.layers[index].keys = cache.layers[index].keys[:, :, 1:]
        cache.layers[index].values = cache.layers[index].values[:, :, 1:]
        with dgemma_accel.accelerated(model):
            short = attend(torch.bfloat16)
        assert (short - truth).abs().mean() > 2 * (plain - truth).abs().mean()


class TestWhatMustKeepWorking:
    def test_stopping_criteria(self, model):
        class Once(transformers.StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return torch.ones(input_ids.shape[0], dtype=torch.bool)

        ids, _ = prompt(2, 6)
        criteria = [transformers.StoppingCriteriaList([Once()]) for _ in range(2)]
        expected = generate(model, ids, max_new_tokens=4 * CANVAS, stopping_criteria=criteria[0])
        with dgemma_accel.accelerated(model):
            result = generate(model, ids, max_new_tokens=4 * CANVAS, stopping_criteria=criteria[1])
        assert result.sequences.shape[1] == 6 + CANVAS
        assert torch.equal(result.sequences, expected.sequences)

    def test_a_second_turn_with_the_first_turns_cache(self, model):
        ids, _ = prompt(2, 11)
        more, _ = prompt(2, 7, seed=5)

        def talk():
            first = generate(model, ids, max_new_tokens=2 * CANVAS)
            # The last canvas is not in the cache yet.
            turn = torch.cat([first.sequences[:, -CANVAS:], more], -1)
            second = generate(model, turn, cache=first.past_key_values, base=2)
            return first.sequences, second.sequences

        expected = talk()
        with dgemma_accel.accelerated(model):
            result = talk()
        assert all(torch.equal(a, b) for a, b in zip(expected, result))

    @pytest.mark.parametrize("name", ["cache", "past_key_values"])
    def test_the_cache_under_either_name(self, model, name):
        ids, _ = prompt(2, 11)
        with dgemma_accel.accelerated(model):
            cache = generate(model, ids).past_key_values
            held = cache.get_seq_length()
            turn, _ = prompt(2, CANVAS + 7, seed=5)
            expected = generate(model, turn, cache=copy.deepcopy(cache), base=2)
            with same_noise(2):
                result = model.generate(turn, **{name: cache})
        assert result.past_key_values is cache and cache.get_seq_length() > held
        assert torch.equal(result.sequences, expected.sequences)

    def test_starting_canvas_and_self_conditioning_logits(self, model):
        ids, _ = prompt(2, 13)
        canvas, _ = prompt(2, CANVAS, seed=8)
        given = torch.randn(2, CANVAS, VOCAB) * 4
        options = {"decoder_input_ids": canvas, "self_conditioning_logits": given}
        plain = generate(model, ids)
        expected, result, recorders = both(model, ids, **options)
        assert_same(expected, result, recorders)
        assert not torch.equal(plain.sequences, expected.sequences)

    def test_self_conditioning_mask(self, model):
        ids, _ = prompt(2, 13)
        options = {"self_conditioning_mask": torch.tensor([True, False])}
        expected, *rest = both(model, ids, **options)
        assert_same(expected, *rest)
        assert not torch.equal(generate(model, ids).sequences, expected.sequences)

    @pytest.mark.parametrize("padding", [(), (0, 4)], ids=["alone", "padded"])
    def test_image_prompt(self, model, padding):
        torch.manual_seed(2)
        ids, mask = prompt(2, 24, left_padding=padding)
        # 6 x 6 patches pooled 2 x 2 are 9 soft tokens an image.
        ids[:, 10:19] = IMAGE_TOKEN
        side = torch.arange(6)
        options = {
            "pixel_values": torch.rand(2, 36, 3 * 4 * 4),
            "image_position_ids": torch.cartesian_prod(side, side).flip(-1).expand(2, -1, -1).contiguous(),
            "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
        }
        expected, *rest = both(model, ids, mask, **options)
        assert_same(expected, *rest)
        options["pixel_values"] = torch.rand(2, 36, 3 * 4 * 4)
        assert not torch.equal(generate(model, ids, mask, **options).sequences, expected.sequences)

    def test_plain_tensor_result(self, model):
        ids, _ = prompt(2, 6)
        expected = generate(model, ids, return_dict_in_generate=False)
        with dgemma_accel.accelerated(model):
            result = generate(model, ids, return_dict_in_generate=False)
        assert isinstance(result, torch.Tensor) and torch.equal(result, expected)

    def test_manual_seed(self, model):
        ids, _ = prompt(2, 6)
        with dgemma_accel.accelerated(model):
            runs = []
            for seed in (3, 3, 4):
                torch.manual_seed(seed)
                runs.append(model.generate(ids).sequences)
        assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


class TestReferencePath:
    """What the fast path does not serve gives the original's result and one line in the log."""

    @staticmethod
    def lines(caplog):
        return [r.getMessage() for r in caplog.records if "the reference path serves" in r.getMessage()]

    def test_user_logits_processor(self, model, caplog):
        class Forbid(transformers.LogitsProcessor):
            def __call__(self, input_ids, scores):
                scores = scores.clone()
                scores[..., 40:] = -1e4
                return scores

        ids, _ = prompt(2, 6)
        expected = generate(model, ids, logits_processor=transformers.LogitsProcessorList([Forbid()]))
        with caplog.at_level(logging.WARNING, "dgemma_accel"), dgemma_accel.accelerated(model):
            for _ in range(2):
                result = generate(model, ids, logits_processor=transformers.LogitsProcessorList([Forbid()]))
                assert torch.equal(result.sequences, expected.sequences)
        assert (result.sequences[:, 6:] < 40).all()
        assert len(self.lines(caplog)) == 1 and "Forbid" in self.lines(caplog)[0]

    def test_streamer_that_takes_logits(self, model, caplog):
        ids, _ = prompt(2, 6)
        recorders = LogitsRecorder(), LogitsRecorder()
        expected = generate(model, ids, streamer=recorders[0])
        with caplog.at_level(logging.WARNING, "dgemma_accel"), dgemma_accel.accelerated(model):
            result = generate(model, ids, streamer=recorders[1])
        assert torch.equal(result.sequences, expected.sequences)
        assert len(recorders[1].drafts) == len(recorders[0].drafts)
        for a, b in zip(recorders[1].drafts, recorders[0].drafts):
            assert torch.allclose(a, b, atol=1e-3)
        assert len(self.lines(caplog)) == 1 and "takes logits" in self.lines(caplog)[0]

    def test_mask_with_a_hole(self, model, caplog):
        ids, mask = prompt(2, 12)
        mask[1, 5] = 0
        expected = generate(model, ids, mask)
        with caplog.at_level(logging.WARNING, "dgemma_accel"), dgemma_accel.accelerated(model):
            result = generate(model, ids, mask)
        assert torch.equal(result.sequences, expected.sequences)
        assert any("holes" in line for line in self.lines(caplog))
        assert len(self.lines(caplog)) == len(set(self.lines(caplog)))

    def test_training_step(self, model, caplog):
        """Gradients are those of the original, and the decoder's attention is the original's."""
        ids, _ = prompt(1, 6)
        canvas, _ = prompt(1, CANVAS, seed=1)

        def gradient():
            model.zero_grad()
            model(input_ids=ids, decoder_input_ids=canvas).logits.logsumexp(-1).sum().backward()
            return model.model.decoder.layers[0].self_attn.k_proj.weight.grad.clone()

        expected = gradient()
        with caplog.at_level(logging.WARNING, "dgemma_accel"), dgemma_accel.accelerated(model):
            result = gradient()
        model.zero_grad()
        assert torch.equal(result, expected) and expected.abs().sum() > 0
        assert any("autograd" in line for line in self.lines(caplog))

    def test_attention_weights(self, caplog):
        model = tiny_model(attn_implementation="eager")
        ids, _ = prompt(1, 6)
        canvas, _ = prompt(1, CANVAS, seed=1)
        with torch.no_grad(), dgemma_accel.accelerated(model):
            output = model(input_ids=ids, decoder_input_ids=canvas, output_attentions=True)
        assert len(output.attentions) == 3 and output.attentions[0].shape == (1, 4, CANVAS, 6 + CANVAS)

    @pytest.mark.parametrize("graph", [False, True])
    @pytest.mark.parametrize("way", ["comes", "goes"])
    def test_a_logits_processor_between_two_canvases(self, model, monkeypatch, way, graph):
        """Each canvas is served as it can be; drafts and passes are those of the whole call, rows that end included."""
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)

        class Forbid(transformers.LogitsProcessor):
            def __call__(self, input_ids, scores):
                return scores.index_fill(-1, torch.arange(5, 9), -1e4)

        def talk():
            processors = transformers.LogitsProcessorList([] if way == "comes" else [Forbid()])

            class Changes(Recorder):
                def put(self, value):
                    super().put(value)
                    # The prompt and the first canvas.
                    if len(self.put_values) == 2:
                        processors.insert(0, Forbid()) if way == "comes" else processors.pop(0)

            recorder = Changes()
            output = generate(
                model, prompt(3, 9)[0], streamer=recorder, logits_processor=processors,
                max_new_tokens=4 * CANVAS, eos_token_id=list(range(30, 36)),
            )  # fmt: skip
            return output, recorder

        expected, theirs = talk()
        with dgemma_accel.accelerated(model, graph=graph):
            result, ours = talk()
        assert_same(expected, result, (theirs, ours))
        canvases = expected.sequences[:, 9:].unflatten(1, (-1, CANVAS))
        padded = (canvases == PAD).all(-1)
        assert padded.any() and not padded[:, :2].all(), "no row ends while others go on"

    @pytest.mark.parametrize("turn", ["first", "second"])
    def test_a_mask_that_is_too_short(self, model, turn):
        """What it does not mention is hidden from the encoder, though the mask is all ones."""
        ids, _ = prompt(2, 10)

        def talk():
            if turn == "first":
                return generate(model, ids, torch.ones(2, 8, dtype=torch.int64)).sequences
            first = generate(model, ids)
            new = torch.cat([first.sequences[:, -CANVAS:], prompt(2, 7, seed=5)[0]], -1)
            # As a tokenizer makes it, of the new tokens only.
            return generate(model, new, torch.ones_like(new), cache=first.past_key_values, base=2).sequences

        expected = talk()
        with dgemma_accel.accelerated(model):
            assert torch.equal(talk(), expected)

    def test_a_mask_of_the_users_own(self, model, caplog):
        ids, _ = prompt(1, 6)
        canvas, _ = prompt(1, CANVAS, seed=1)
        mask = torch.ones(1, 1, CANVAS, 6 + CANVAS, dtype=torch.bool)
        mask[..., 2:4] = False
        options = {
            "input_ids": ids,
            "decoder_input_ids": canvas,
            "decoder_attention_mask": {"full_attention": mask, "sliding_attention": mask},
        }
        with torch.no_grad():
            expected = model(**options).logits
            with dgemma_accel.accelerated(model):
                result = model(**options).logits
        assert torch.equal(result, expected)


class TestTheTestsCanFail:
    def test_wrong_temperature(self, model, monkeypatch):
        ids, _ = prompt(2, 6)
        right = denoising.temperature_of_step
        monkeypatch.setattr(
            denoising, "temperature_of_step", lambda processor, step: right(processor, step) * 1.1
        )
        expected, result, _ = both(model, ids)
        assert not torch.equal(result.sequences, expected.sequences)

    def test_dropped_prefix_slot(self, model, monkeypatch):
        ids, mask = prompt(2, WINDOW + 4, left_padding=(0, 2))
        right = masks.contiguous_range

        def off_by_one(visible):
            start, end = right(visible)
            return start + 1, end

        monkeypatch.setattr(masks, "contiguous_range", off_by_one)
        expected, result, _ = both(model, ids, mask)
        assert not torch.equal(result.sequences, expected.sequences)

    def test_other_noise(self, model):
        ids, _ = prompt(2, 6)
        assert not torch.equal(generate(model, ids, base=1).sequences, generate(model, ids, base=2).sequences)


def test_no_fp32_table_is_kept_or_copied(monkeypatch):
    """With bf16 logits no fp32 tensor of rows x vocabulary leaves the step, and the prefix is never concatenated."""
    model = tiny_model(torch.bfloat16)
    ids, _ = prompt(2, 30)
    carried = []
    step = denoising.Denoiser.step

    def watched(self, *state):
        result = step(self, *state)
        carried.append(result[2])
        return result

    monkeypatch.setattr(denoising.Denoiser, "step", watched)
    with dgemma_accel.accelerated(model):
        generate(model, ids)
    assert len(carried) > 2
    for carry in carried:
        tables = [
            value
            for value in vars(carry).values()
            if isinstance(value, torch.Tensor) and VOCAB in value.shape
        ]
        assert all(table.dtype == torch.bfloat16 for table in tables)
    assert sum(carry.logits is not None for carry in carried) <= 2, (
        "the logits of earlier steps are still held"
    )


def test_a_user_sampler_keeps_its_say(model):
    """A sampler of another class is used as it is."""

    class Reverse(generation.EntropyBoundSampler):
        def accept_canvas(self, current_canvas, denoiser_canvas, logits, cur_step):
            return super().accept_canvas(current_canvas, denoiser_canvas.flip(-1), logits, cur_step)

    def prepare(generation_config):
        return Reverse(
            config=generation_config.sampler_config, canvas_length=CANVAS, vocab_size=VOCAB,
            max_denoising_steps=generation_config.max_denoising_steps,
        )  # fmt: skip

    ids, _ = prompt(2, 6)
    plain = generate(model, ids)
    model.__dict__["_prepare_sampler"] = prepare
    try:
        expected, result, recorders = both(model, ids)
    finally:
        del model.__dict__["_prepare_sampler"]
    assert_same(expected, result, recorders)
    assert not torch.equal(plain.sequences, expected.sequences)
