"""What an accelerated generate can be asked for besides the original's options."""

import pytest
import torch
from hf_models import CANVAS, PAD, VOCAB, Drafts, as_argument, generate, prompt, tiny_model, transformers

import dgemma_accel
from dgemma_accel.hf import denoising

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return dgemma_accel.accelerate(tiny_model())


@pytest.fixture
def ids():
    return prompt(3, 9)[0]


class Recorded(Drafts):
    """What `generate` puts, without the drafts."""

    def put(self, value):
        self.values.append(value)

    def put_draft(self, value):
        pass


class TestSeed:
    def test_repeats_whatever_the_generators_hold(self, model, ids):
        runs = []
        for state, seed in ((1, 5), (2, 5), (2, 6)):
            torch.manual_seed(state)
            runs.append(model.generate(ids, seed=seed).sequences)
        assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[1], runs[2])

    def test_canvases_and_steps_draw_different_noise(self, model, ids, monkeypatch):
        offsets = []
        right = denoising.logits_and_stats
        monkeypatch.setattr(
            denoising, "logits_and_stats", lambda *a, **k: (offsets.append(k["offset"]), right(*a, **k))[1]
        )
        recorder = Drafts()
        model.generate(ids, seed=5, streamer=recorder, max_new_tokens=3 * CANVAS)
        assert len(set(offsets)) == len(offsets) == len(recorder.values)
        assert sum(offset % 2**32 == 0 for offset in offsets) == 3

    def test_starting_canvas_comes_from_the_seed(self, model, ids, monkeypatch):
        starts = []
        step = denoising.Denoiser.step

        def watched(self, canvas, *rest):
            starts.append(canvas)
            return step(self, canvas, *rest)

        monkeypatch.setattr(denoising.Denoiser, "step", watched)
        model.generate(ids, seed=5, max_steps=1, max_new_tokens=2 * CANVAS)
        model.generate(ids, seed=5, max_steps=1, max_new_tokens=2 * CANVAS)
        assert torch.equal(starts[0], starts[2]) and torch.equal(starts[1], starts[3])
        assert (starts[0] != starts[1]).float().mean() > 0.9
        assert 0 <= starts[0].min() and starts[0].max() < VOCAB and starts[0].unique().numel() > 20

    @pytest.mark.parametrize("seed", [-1, 2**63])
    def test_out_of_range(self, model, ids, seed):
        with pytest.raises(ValueError, match="seed: must be in"):
            model.generate(ids, seed=seed)

    def test_wrong_type(self, model, ids):
        with pytest.raises(TypeError, match="seed: an int"):
            model.generate(ids, seed="1")


class TestReport:
    def test_confidence_and_entropy_are_those_of_the_last_step(self, model, ids):
        output = model.generate(
            ids, seed=3, return_confidence=True, max_denoising_steps=1, max_new_tokens=CANVAS
        )
        assert output.confidence.shape == output.entropy.shape == (3, CANVAS)
        start = model.generate(ids, seed=3, max_denoising_steps=1, max_new_tokens=CANVAS)
        assert torch.equal(output.sequences, start.sequences) and not hasattr(start, "confidence")
        # By hand: one decoder pass over the seed's starting canvas at the temperature of the last step.
        from dgemma_accel.hf.call import Call

        canvas = Call(seed=torch.tensor(3)).starting_canvas(3, CANVAS, VOCAB, ids.device)
        with torch.no_grad():
            logits = model(input_ids=ids, decoder_input_ids=canvas).logits
        tempered = torch.distributions.Categorical(logits=logits / 0.8)
        assert torch.allclose(output.confidence, tempered.probs.amax(-1), rtol=1e-3, atol=1e-5)
        assert torch.allclose(output.entropy, tempered.entropy(), rtol=1e-3, atol=1e-4)

    def test_logprobs_are_those_of_the_last_step(self, model, ids):
        tokens = [5, 71, 5, 0]
        output = model.generate(
            ids, seed=3, return_logprobs=tokens, max_denoising_steps=1, max_new_tokens=CANVAS
        )
        assert output.logprobs.shape == (3, CANVAS, 4) and output.confidence is None
        from dgemma_accel.hf.call import Call

        canvas = Call(seed=torch.tensor(3)).starting_canvas(3, CANVAS, VOCAB, ids.device)
        with torch.no_grad():
            logits = model(input_ids=ids, decoder_input_ids=canvas).logits
        expected = logits.log_softmax(-1)[..., tokens]
        assert torch.allclose(output.logprobs, expected, rtol=1e-4, atol=1e-4)

    def test_logprobs_of_all_tokens_say_the_whole_result(self, model):
        """Of every row's last pass: with one temperature they are the confidence and the entropy."""
        ids, mask = prompt(3, 20, left_padding=(0, 5, 9))
        options = {
            "t_min": 0.99999,
            "t_max": 1.0,
            "max_new_tokens": 2 * CANVAS,
            "eos_token_id": list(range(10, 13)),
        }
        plain = generate(model, ids, mask, **options)
        output = generate(model, ids, mask, return_logprobs=range(VOCAB), return_confidence=True, **options)
        assert torch.equal(output.sequences, plain.sequences)
        padded = output.confidence.isnan()
        assert torch.equal(output.logprobs.isnan().all(-1), padded) and padded.any()
        kept = output.logprobs[~padded]
        torch.testing.assert_close(kept.exp().sum(-1), torch.ones(len(kept)))
        torch.testing.assert_close(kept.amax(-1).exp(), output.confidence[~padded], rtol=1e-4, atol=1e-5)
        entropy = torch.special.entr(kept.exp()).sum(-1)
        torch.testing.assert_close(entropy, output.entropy[~padded], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        "tokens, error, text",
        [
            ([VOCAB], ValueError, rf"tokens must be in \[0, {VOCAB}\), got {VOCAB}"),
            ([-1], ValueError, ".*got -1"),
            ([], TypeError, "dtype must be one of"),
            ([[1, 2]], ValueError, r"a flat sequence of token ids expected, got shape \(1, 2\)"),
            (3, ValueError, r".*got shape \(\)"),
            ([0.5], TypeError, "dtype must be one of"),
            ("yes", TypeError, "token ids expected, got str"),
        ],
    )
    def test_tokens_that_are_none(self, model, ids, tokens, error, text):
        with pytest.raises(error, match=f"return_logprobs: {text}"):
            model.generate(ids, return_logprobs=tokens)

    def test_finished_rows_keep_theirs(self, model):
        """A row's report is what it gets alone, however long the others of its batch go on."""
        ids, _ = prompt(3, 9, seed=4)
        options = {"return_confidence": True, "return_steps": True, "max_new_tokens": CANVAS}
        canvas, _ = prompt(3, CANVAS, seed=12)
        batch = generate(model, ids, decoder_input_ids=canvas, **options)
        assert batch.steps.unique().numel() > 1
        row = int(batch.steps[:, 0].argmin())
        # Row numbers are part of the draws, so the rows above it stay.
        alone = generate(model, ids[: row + 1], decoder_input_ids=canvas[: row + 1], **options)
        assert torch.equal(batch.steps[row], alone.steps[row])
        assert torch.allclose(batch.confidence[row], alone.confidence[row], atol=1e-4)

    def test_steps_add_up(self, model, ids):
        recorder = Drafts()
        output = generate(model, ids, return_steps=True, streamer=recorder, max_new_tokens=3 * CANVAS)
        assert output.steps.shape == (3, 3) and output.confidence is None
        assert int(output.steps.amax(0).sum()) == len(recorder.values)
        assert torch.allclose(3 * CANVAS / output.steps.sum(-1), output.tokens_per_forward)

    def test_padding_has_no_confidence(self, model):
        ids, mask = prompt(3, 20, left_padding=(0, 5, 9))
        output = generate(
            model,
            ids,
            mask,
            max_new_tokens=4 * CANVAS,
            eos_token_id=list(range(10, 16)),
            return_confidence=True,
        )
        new = output.sequences[:, 20:]
        assert output.confidence.shape == new.shape
        padded = output.confidence.isnan()
        assert padded.any() and not padded.all() and (new[padded] == PAD).all()
        assert torch.equal(padded, output.entropy.isnan())
        kept = output.confidence[~padded]
        assert (kept > 0).all() and (kept <= 1).all()

    def test_without_a_canvas(self, model, ids):
        """The prompt fills the length."""
        length = {"max_length": 5, "max_new_tokens": 256}
        output = model.generate(ids, return_confidence=True, return_steps=True, **length)
        assert torch.equal(output.sequences, ids)
        for name in ("confidence", "entropy", "steps"):
            assert getattr(output, name).shape == (3, 0), name
        assert output.steps.dtype == torch.int64 and output.confidence.dtype == torch.float32

    def test_needs_a_dict(self, model, ids):
        with pytest.raises(ValueError, match="return_dict_in_generate"):
            model.generate(ids, return_steps=True, return_dict_in_generate=False, max_steps=1)


class TestPinned:
    @pytest.fixture
    def canvas(self):
        return prompt(3, CANVAS, seed=21)[0]

    @pytest.mark.parametrize("form", ["positions", "mask", "rows"])
    def test_pinned_tokens_never_change(self, model, ids, canvas, form):
        positions = [0, 3, 4, CANVAS - 1]
        mask = torch.zeros(CANVAS, dtype=torch.bool)
        mask[positions] = True
        pinned = {"positions": positions, "mask": mask, "rows": mask.expand(3, -1).clone()}[form]
        if form == "rows":
            pinned[1] = False
            pinned[1, 6] = True
        rows = pinned if form == "rows" else mask.expand(3, -1)
        recorder, step, canvases = Drafts(), denoising.Denoiser.step, []

        def watched(self, *state):
            result = step(self, *state)
            canvases.append(result[0])
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(denoising.Denoiser, "step", watched)
            output = model.generate(
                ids,
                decoder_input_ids=canvas,
                pinned=pinned,
                seed=1,
                streamer=recorder,
                return_confidence=True,
                return_steps=True,
            )
        in_first_canvas = int(output.steps[:, 0].max())
        assert in_first_canvas > 2
        for draft, after in list(zip(recorder.values, canvases))[:in_first_canvas]:
            assert torch.equal(draft[rows], canvas[rows]) and torch.equal(after[rows], canvas[rows])
        first = output.sequences[:, 9 : 9 + CANVAS]
        assert torch.equal(first[rows], canvas[rows]) and not torch.equal(first[~rows], canvas[~rows])
        assert (output.confidence[:, :CANVAS][rows] == 1).all() and (
            output.entropy[:, :CANVAS][rows] == 0
        ).all()
        # The second canvas has no pins.
        second = output.sequences[:, 9 + CANVAS :]
        assert not torch.equal(second[rows], canvas[rows])

    @pytest.mark.parametrize("graph", [False, True])
    def test_behind_an_end_token_as_well(self, ids, canvas, graph, monkeypatch):
        """Every token the model may write ends the text, so all behind the first is padding but for what is pinned."""
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
        canvas, pins = canvas.clone(), [2, 5, CANVAS - 1]
        canvas[:, pins] = 3
        recorder = Recorded()
        with dgemma_accel.accelerated(tiny_model(), graph=graph) as model:
            output = model.generate(
                ids, decoder_input_ids=canvas, pinned=pins, seed=1, eos_token_id=[t for t in range(VOCAB) if t != 3],
                return_confidence=True, streamer=recorder,
            )  # fmt: skip
        new = output.sequences[:, 9:]
        assert (new[:, pins] == 3).all() and torch.equal(recorder.values[-1], new)
        others = [p for p in range(1, CANVAS) if p not in pins]
        assert new.shape[1] == CANVAS and (new[:, others] == PAD).all()
        assert (output.confidence[:, pins] == 1).all() and (output.entropy[:, pins] == 0).all()
        assert output.confidence[:, others].isnan().all()

    def test_a_row_that_goes_on_reads_what_is_returned(self, ids, canvas):
        """The next canvas's prefix of a row that has ended holds the tokens of the result, pinned ones included."""
        model = dgemma_accel.accelerate(tiny_model())
        seen = []
        handle = model.model.encoder.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
        )
        canvas = canvas.clone()
        canvas[:, 0], canvas[0, 0] = 4, 3
        output = model.generate(
            ids, decoder_input_ids=canvas, pinned=[0, 6], seed=1, eos_token_id=[3], max_steps=1
        )
        handle.remove()
        first = output.sequences[:, 9 : 9 + CANVAS]
        assert first[0, 6] == canvas[0, 6] and (first[0, 1:6] == PAD).all() and (first[1] != PAD).all()
        assert torch.equal(seen[1], first)
        assert (output.sequences[0, 9 + CANVAS :] == PAD).all()

    def test_the_rest_is_written_around_them(self, model, ids, canvas):
        other = canvas.clone()
        other[:, 5] = (canvas[:, 5] + 1 - 8) % (VOCAB - 8) + 8
        runs = [
            model.generate(ids, decoder_input_ids=c, pinned=[5], seed=1, max_new_tokens=CANVAS).sequences
            for c in (canvas, other)
        ]
        free = torch.ones(CANVAS, dtype=torch.bool)
        free[5] = False
        assert not torch.equal(runs[0][:, 9:][:, free], runs[1][:, 9:][:, free])

    def test_everything_pinned(self, model, ids, canvas):
        output = model.generate(
            ids, decoder_input_ids=canvas, pinned=range(CANVAS), max_new_tokens=CANVAS, return_steps=True
        )
        assert torch.equal(output.sequences[:, 9:], canvas)
        # Certain at once, stable at the second look.
        assert (output.steps == 2).all()

    def test_nothing_pinned(self, model, ids, canvas):
        runs = [
            model.generate(ids, decoder_input_ids=canvas, seed=1, **options).sequences
            for options in ({}, {"pinned": []})
        ]
        assert torch.equal(*runs)

    @pytest.mark.parametrize(
        "pinned, message",
        [
            ([CANVAS], rf"pinned: positions must be in \[0, {CANVAS}\), got {CANVAS}"),
            ([-1], "pinned: positions must be in"),
            (
                torch.ones(CANVAS + 1, dtype=torch.bool),
                rf"pinned: shape must be \({CANVAS},\) or \(3, {CANVAS}\)",
            ),
            (torch.ones(2, CANVAS, dtype=torch.bool), "pinned: shape must be"),
            (torch.zeros(1, 2, dtype=torch.int64), "pinned: positions must be a flat sequence"),
        ],
    )
    def test_outside_the_canvas(self, model, ids, canvas, pinned, message):
        with pytest.raises(ValueError, match=message):
            model.generate(ids, decoder_input_ids=canvas, pinned=pinned)

    def test_without_a_canvas(self, model, ids):
        with pytest.raises(ValueError, match="pinned: needs decoder_input_ids"):
            model.generate(ids, pinned=[0])

    def test_wrong_dtype(self, model, ids, canvas):
        with pytest.raises(TypeError, match="pinned: dtype must be one of"):
            model.generate(ids, decoder_input_ids=canvas, pinned=[0.5])

    @pytest.mark.parametrize("pinned", [3, "first", {0, 1}, [[1, 2], [3]]], ids=str)
    def test_neither_a_mask_nor_positions(self, model, ids, canvas, pinned):
        kind = type(pinned).__name__
        with pytest.raises(
            TypeError, match=f"pinned: a bool tensor or a sequence of positions expected, got {kind}"
        ):
            model.generate(ids, decoder_input_ids=canvas, pinned=pinned)

    def test_canvas_that_is_no_tensor(self, model, ids, canvas):
        with pytest.raises(TypeError, match="decoder_input_ids: a torch.Tensor expected, got list"):
            model.generate(ids, decoder_input_ids=canvas.tolist(), pinned=[0])


class TestStartingCanvas:
    @pytest.mark.parametrize("shape", [(3, CANVAS - 1), (2, CANVAS), (CANVAS,)])
    def test_of_another_shape(self, model, ids, shape):
        with pytest.raises(ValueError, match=rf"decoder_input_ids: shape must be \(3, {CANVAS}\)"):
            model.generate(ids, decoder_input_ids=torch.zeros(shape, dtype=torch.int64))

    def test_of_other_tokens(self, model, ids):
        with pytest.raises(
            ValueError, match=rf"decoder_input_ids: tokens must be in \[0, {VOCAB}\), got {VOCAB}"
        ):
            model.generate(ids, decoder_input_ids=torch.full((3, CANVAS), VOCAB))


class TestMaxSteps:
    @pytest.mark.parametrize("cap", [1, 3])
    def test_caps_every_canvas_and_keeps_the_schedule(self, model, ids, cap):
        full, capped = Drafts(), Drafts()
        generate(model, ids, streamer=full, max_new_tokens=2 * CANVAS)
        output = generate(
            model, ids, streamer=capped, max_new_tokens=2 * CANVAS, max_steps=cap, return_steps=True
        )
        assert output.steps.tolist() == [[cap, cap]] * 3
        assert all(torch.equal(a, b) for a, b in zip(full.values[:cap], capped.values[:cap]))

    def test_bad_values(self, model, ids):
        with pytest.raises(ValueError, match="max_steps: must be at least 1, got 0"):
            model.generate(ids, max_steps=0)
        with pytest.raises(TypeError, match="max_steps: an int expected, got float"):
            model.generate(ids, max_steps=2.0)


class Own(transformers.LogitsProcessor):
    def __call__(self, input_ids, scores, **kwargs):
        return scores


@pytest.mark.parametrize("why", ["processor", "step"])
@pytest.mark.parametrize(
    "option",
    [{"seed": 1}, {"max_steps": 2}, {"return_steps": True}, {"return_confidence": True}, {"return_logprobs": [1]},
     {"pinned": [0, 3], "decoder_input_ids": prompt(3, CANVAS)[0]}],
    ids=lambda option: next(iter(option)),
)  # fmt: skip
def test_an_option_is_never_ignored(model, ids, option, why, monkeypatch):
    """By logits processors of the caller's, nor by a denoising step put in after `accelerate`."""
    processors, recorder = transformers.LogitsProcessorList([Own()] if why == "processor" else []), Recorded()
    reason = {"processor": "there are logits processors: Own", "step": "_denoising_step of .* own"}[why]
    name = next(iter(option))
    with monkeypatch.context() as patch:
        if why == "step":
            step = type(model)._denoising_step
            patch.setitem(vars(model), "_denoising_step", lambda **kwargs: step(model, **kwargs))
        with pytest.raises(ValueError, match=rf"{name}: only the accelerated sampler has it, but {reason}$"):
            model.generate(ids, logits_processor=processors, streamer=recorder, **option)
    assert not recorder.values
    # And the next call is as if nothing had happened.
    assert len(processors) == (why == "processor")
    model.generate(ids, max_steps=1)


class Called(transformers.LogitsProcessorList):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize(
    "option",
    [
        {"seed": 1, "logits_processor": transformers.LogitsProcessorList([Own()])},
        {"seed": 1, "logits_processor": Called()},
        {"return_steps": True, "return_dict_in_generate": False},
        {"return_confidence": True, "generation_config": {"return_dict_in_generate": False}},
        {"max_steps": 1, "streamer": "logits"},
    ],
)
def test_what_is_refused_is_refused_before_the_prompt_is_read(model, ids, option):
    recorder = Recorded()
    option = {"streamer": recorder, **option}
    if option["streamer"] == "logits":
        option["streamer"], recorder._takes_logits = recorder, True
    if "generation_config" in option:
        option["generation_config"] = type(model.generation_config)(**option["generation_config"])
    with torch.no_grad():
        cache = model.model.encoder(input_ids=ids).past_key_values
    before = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(ValueError, match="only the accelerated sampler|need return_dict_in_generate"):
        model.generate(ids, **as_argument(cache), **option)
    assert cache.get_seq_length() == ids.shape[1] and not recorder.values
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before))
