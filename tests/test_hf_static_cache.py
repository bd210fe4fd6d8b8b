"""Generation with a preallocated cache against the original with its dynamic cache."""

import copy

import pytest
import torch
from hf_models import CANVAS, VOCAB, WINDOW, as_argument, generate, prompt, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import dgemma_accel
from dgemma_accel.hf import denoising, patches
from dgemma_accel.hf.bank import CacheBank

preallocated = pytest.importorskip("dgemma_accel.hf.preallocated")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def static(model, ids, mask=None, **options):
    with dgemma_accel.accelerated(model):
        output = generate(model, ids, mask, cache_implementation="static", **options)
    assert type(output.past_key_values) is preallocated.PreallocatedCache
    return output


def assert_same(result, expected):
    assert torch.equal(result.sequences, expected.sequences)
    assert torch.equal(result.tokens_per_forward, expected.tokens_per_forward)


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 4 * WINDOW + 3])
def test_prompt_lengths(model, length):
    ids, _ = prompt(2, length)
    assert_same(static(model, ids), generate(model, ids))


@pytest.mark.parametrize("length", [WINDOW - 2, WINDOW + 1, 3 * WINDOW])
def test_left_padding(model, length):
    ids, mask = prompt(4, length, left_padding=(0, 1, length // 2, length - 1))
    assert_same(static(model, ids, mask), generate(model, ids, mask))


def test_many_canvases(model):
    """The window comes to the end of its buffer several times."""
    ids, mask = prompt(2, 7, left_padding=(0, 4))
    options = {"max_new_tokens": 9 * CANVAS, "max_denoising_steps": 3}
    result = static(model, ids, mask, **options)
    assert_same(result, generate(model, ids, mask, **options))
    assert result.sequences.shape[1] > 3 * result.past_key_values.layers[0].capacity


def test_new_tokens_that_no_canvas_divides(model):
    ids, _ = prompt(2, 5)
    options = {"max_new_tokens": CANVAS + 1}
    assert_same(static(model, ids, **options), generate(model, ids, **options))


def test_what_the_original_makes_of_a_static_cache_is_different(model):
    """The reason why the dynamic cache is the standard here; drop this test when transformers repairs it."""
    ids, _ = prompt(2, WINDOW + 1)
    broken = generate(model, ids, cache_implementation="static", disable_compile=True)
    assert not torch.equal(broken.sequences, generate(model, ids).sequences)


def test_buffers_stay_from_call_to_call(model):
    long, _ = prompt(2, 40)
    short, _ = prompt(2, 6, seed=3)
    with dgemma_accel.accelerated(model):
        first = generate(model, long, cache_implementation="static")
        pointers = [layer.key_buffer.data_ptr() for layer in first.past_key_values.layers]
        second = generate(model, short, cache_implementation="static")
        assert [layer.key_buffer.data_ptr() for layer in second.past_key_values.layers] == pointers
        # Another batch size, and a longer text, get buffers of their own.
        three, _ = prompt(3, 6)
        assert generate(model, three, cache_implementation="static").sequences.shape[0] == 3
        longer, _ = prompt(2, 80)
        third = generate(model, longer, cache_implementation="static")
        assert third.past_key_values is not first.past_key_values
    assert_same(second, generate(model, short))
    assert_same(third, generate(model, longer))


def test_buffers_of_the_batch_size_that_was_not_used_for_the_longest_time_go(model):
    bank = CacheBank()
    running = bank.lease(model.config, 9, 100)
    for batch in (1, 2, 3, 1, 4):
        bank.give_back(bank.lease(model.config, batch, 100))
    # Those that a call reads stay.
    assert list(bank.entries) == [9, 3, 1, 4]
    bank.give_back(running)
    bank.give_back(bank.lease(model.config, 5, 100))
    assert list(bank.entries) == [3, 1, 4, 5]


def test_a_model_of_another_dtype_gets_other_buffers():
    model = dgemma_accel.accelerate(tiny_model())
    ids, _ = prompt(2, 20)
    generate(model, ids, cache_implementation="static")
    model.bfloat16()
    output = generate(model, ids, cache_implementation="static")
    assert output.past_key_values.layers[0].key_buffer.dtype == torch.bfloat16
    dynamic = generate(model, ids)
    assert torch.equal(output.sequences, dynamic.sequences)


def test_a_second_turn(model):
    ids, _ = prompt(2, 11)
    more, _ = prompt(2, 7, seed=5)

    def talk(cache=None):
        first = generate(model, ids, max_new_tokens=2 * CANVAS, cache=cache)
        turn = torch.cat([first.sequences[:, -CANVAS:], more], -1)
        second = generate(model, turn, cache=first.past_key_values, base=2)
        return first.sequences, second.sequences

    expected = talk()
    with dgemma_accel.accelerated(model):
        result = talk(preallocated.PreallocatedCache(model.config, 100))
    assert all(torch.equal(a, b) for a, b in zip(expected, result))


def test_without_acceleration_it_is_a_cache_like_any_other(model):
    ids, mask = prompt(2, 20, left_padding=(0, 6))
    result = generate(model, ids, mask, cache=preallocated.PreallocatedCache(model.config, 60))
    assert_same(result, generate(model, ids, mask))


def test_a_static_cache_of_transformers(model, caplog):
    """Made by the caller, it is served as the original serves it, and not compiled."""
    from transformers import StaticCache

    ids, _ = prompt(2, 6)
    length = 6 + 2 * CANVAS

    def cache():
        return StaticCache(config=model.config.get_text_config(), max_cache_len=length)

    expected = generate(model, ids, cache=cache(), disable_compile=True)
    before = dict(vars(model))
    with dgemma_accel.accelerated(model):
        for _ in range(2):
            result = generate(model, ids, cache=cache())
    assert_same(result, expected)
    assert vars(model).keys() == before.keys(), "something compiled was left on the model"
    lines = [r.getMessage() for r in caplog.records if "static cache" in r.getMessage()]
    assert len(lines) == 1 and "PreallocatedCache" in lines[0]


def test_layers_of_another_kind_are_left_to_the_original(model, caplog):
    """As with quantised layers, `keys` of a class that is not known need not be the whole prefix."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class Unknown(DynamicLayer):
        """Might keep anything in `keys`."""

    def cache():
        made = DynamicCache(config=model.config)
        made.layers[2] = Unknown()
        return made

    ids, _ = prompt(2, 20)
    expected = generate(model, ids, cache=cache())
    with dgemma_accel.accelerated(model):
        result = generate(model, ids, cache=cache())
    assert_same(result, expected)
    assert any("cannot be read in place" in record.getMessage() for record in caplog.records)


def test_too_small(model):
    ids, _ = prompt(2, 11)
    cache = preallocated.PreallocatedCache(model.config, 15)
    with pytest.raises(ValueError, match="room for 15 tokens, holds 11 and got 12 more"):
        model.generate(ids, **as_argument(cache), max_new_tokens=2 * CANVAS)


@pytest.mark.parametrize("length, error", [(0, ValueError), (2.5, TypeError), (True, TypeError)])
def test_bad_length(model, length, error):
    with pytest.raises(error, match="max_length"):
        preallocated.PreallocatedCache(model.config, length)


class TestLayers:
    """Against transformers' dynamic layers, update by update."""

    @pytest.mark.parametrize(
        "chunks", [(5, 12, 12, 12, 12, 12), (1, 1, 40, 3), (15, 16, 17), (31,), (30, 1, 12)]
    )
    def test_sliding(self, chunks):
        from transformers.cache_utils import DynamicSlidingWindowLayer

        ours, theirs = (
            preallocated.PreallocatedSlidingLayer(WINDOW, CANVAS),
            DynamicSlidingWindowLayer(WINDOW),
        )
        for chunk in chunks:
            keys, values = torch.randn(2, 2, 2, chunk, 8)
            for a, b in zip(ours.update(keys, values), theirs.update(keys, values)):
                assert torch.equal(a, b)
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
            assert ours.get_mask_sizes(CANVAS) == theirs.get_mask_sizes(CANVAS)
            assert ours.get_seq_length() == theirs.get_seq_length()

    @pytest.mark.parametrize("kind", ["full", "sliding"])
    def test_rows_picked_and_cropped(self, kind):
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        if kind == "full":
            ours, theirs = preallocated.PreallocatedLayer(64), DynamicLayer()
        else:
            ours = preallocated.PreallocatedSlidingLayer(WINDOW, CANVAS)
            theirs = DynamicSlidingWindowLayer(WINDOW)

        def update(batch, length):
            keys, values = torch.randn(2, batch, 2, length, 8)
            for a, b in zip(ours.update(keys, values), theirs.update(keys, values)):
                assert torch.equal(a, b)

        update(3, 10)
        for layer in (ours, theirs):
            layer.crop(-2)
        update(3, 3)
        for layer in (ours, theirs):
            layer.batch_select_indices(torch.tensor([2, 0]))
        update(2, 12)
        twin = copy.deepcopy(ours)
        assert twin.keys.untyped_storage().data_ptr() == twin.key_buffer.untyped_storage().data_ptr()
        assert torch.equal(twin.keys, theirs.keys)
        ours.reset()
        assert ours.get_seq_length() == 0


class LargestOutput(TorchDispatchMode):
    """The number of elements of the largest fresh tensor."""

    def __init__(self):
        super().__init__()
        self.elements, self.storages = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
        return result


def largest_of_a_step(model, length):
    ids, _ = prompt(1, length)
    found = []
    step = denoising.Denoiser.step

    def watched(*arguments):
        with LargestOutput() as mode:
            result = step(*arguments)
        found.append(mode.elements)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoising.Denoiser, "step", watched)
        model.generate(ids, cache_implementation="static", max_denoising_steps=3, seed=0)
    return max(found)


def test_no_allocation_of_a_step_grows_with_the_context():
    model = dgemma_accel.accelerate(tiny_model())
    sizes = {largest_of_a_step(model, length) for length in (8, 100, 250)}
    assert len(sizes) == 1 and sizes.pop() >= CANVAS * VOCAB
    # The same watch sees the original's concatenation.
    assert patches.acceleration_of(model) is not None
    dgemma_accel.restore(model)

    def original(length):
        ids, _ = prompt(1, length)
        with torch.no_grad():
            cache = model.model.encoder(input_ids=ids).past_key_values
            with LargestOutput() as mode:
                model(decoder_input_ids=ids[:, :1].expand(-1, CANVAS), **as_argument(cache))
        return mode.elements

    assert original(250) > original(8)
