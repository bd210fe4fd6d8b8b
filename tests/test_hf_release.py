"""Memory that an accelerated model holds besides its weights: gone when it is restored, without a search for cycles."""

import gc
import weakref

import pytest
import torch
from hf_models import CANVAS, generate, prompt, tiny_model
from recordings import Again, record_on_a_cpu

import dgemma_accel
from dgemma_accel.hf import patches


@pytest.fixture
def without_gc(monkeypatch):
    record_on_a_cpu(monkeypatch)
    # transformers imports its models at first sight, and an exception it keeps from that knows who asked.
    tiny_model()
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def used(model):
    """(result of a call, weak references to what the acceleration holds after it)."""
    result = generate(model, prompt(2, 9)[0], max_new_tokens=2 * CANVAS)
    Again.made.clear()
    Again.stored.clear()
    state = patches.acceleration_of(model)
    captured, stored = (one for _, one in sorted((key[0], one) for key, one in state.captures.found.items()))
    (entry,) = state.bank.entries.values()
    held = [state, *state.compiled.values(), captured, captured.inputs.state.soft, *captured.halves]
    held += [stored, stored.result, stored.recording]
    return result, [weakref.ref(x) for x in held], [weakref.ref(key) for key, _ in entry.buffers]


def alive(references):
    return [type(reference()).__name__ for reference in references if reference() is not None]


@pytest.mark.usefixtures("without_gc")
class TestWithoutTheGarbageCollector:
    def test_restore(self):
        model = dgemma_accel.accelerate(tiny_model(), graph=True)
        result, held, buffers = used(model)
        sequences = result.sequences
        del result
        dgemma_accel.restore(model)
        assert alive(held) == alive(buffers) == []
        gone = weakref.ref(model)
        del model
        assert gone() is None and sequences.shape[0] == 2

    def test_restore_while_something_holds_the_record(self):
        """As a call does that is running: memory goes all the same, and what it keeps does not keep the model."""
        model = dgemma_accel.accelerate(tiny_model(), graph=True)
        held, buffers = used(model)[1:]
        state = patches.acceleration_of(model)
        (step,) = (parts for parts in state.compiled.values() if parts.what == "step")
        dgemma_accel.restore(model)
        assert alive(held) == ["Acceleration", "Step"] and alive(buffers) == []
        assert state.captures.pool is None and not state.captures.failures
        gone = weakref.ref(model)
        del model, state
        assert gone() is None and alive(held) == ["Step"] and step.calls > 0

    def test_accelerate_again(self):
        model = dgemma_accel.accelerate(tiny_model(), graph=True)
        held, buffers = used(model)[1:]
        dgemma_accel.accelerate(model, graph=True)
        assert alive(held) == alive(buffers) == []

    def test_a_cache_that_a_caller_holds_stays(self):
        model = dgemma_accel.accelerate(tiny_model(), graph=True)
        result, held, buffers = used(model)
        dgemma_accel.restore(model)
        assert alive(held) == [] and len(alive(buffers)) == len(buffers)
        assert result.past_key_values.get_seq_length() > 0

    def test_restored_in_the_middle_of_a_call(self):
        """By its streamer: the call goes on with what it has, and nothing is left of it."""
        model = dgemma_accel.accelerate(tiny_model(), graph=True)
        ids, _ = prompt(2, 9)
        expected = model.generate(ids, seed=3, max_new_tokens=CANVAS).sequences
        kept = weakref.ref(patches.acceleration_of(model))

        class Restores:
            def put(self, value):
                pass

            def put_draft(self, value):
                dgemma_accel.restore(model)

            def end(self):
                pass

        result = model.generate(ids, seed=3, max_new_tokens=CANVAS, streamer=Restores()).sequences
        Again.made.clear()
        assert torch.equal(result, expected) and kept() is None


def test_a_model_that_is_let_go_accelerated(monkeypatch):
    """Its methods know it, so here it takes the garbage collector."""
    model = dgemma_accel.accelerate(tiny_model(), graph=False)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
