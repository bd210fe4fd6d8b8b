"""A default device of torch that is not where the package makes its numbers: "meta", whose tensors hold nothing, stands
for a GPU."""

import pytest
import torch
from hf_models import CANVAS, prompt, tiny_model

import dgemma_accel
from dgemma_accel.hf import lookout


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def tokens(model, ids, mask, **options):
    torch.manual_seed(5)
    # Caches of transformers' own that grow do not work with another default device.
    return model.generate(ids, attention_mask=mask, cache_implementation="static", **options)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("options", ["none", "seed", "pinned"])
def test_generate(model, monkeypatch, graph, options):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    given = prompt(2, 9, left_padding=(0, 3))
    canvas, _ = prompt(2, CANVAS, seed=8)
    options = {
        "none": {},
        "seed": {"seed": 4},
        "pinned": {"decoder_input_ids": canvas, "pinned": [0, 3, 7], "return_confidence": True},
    }[options]
    with dgemma_accel.accelerated(model, graph=graph):
        expected = tokens(model, *given, **options).sequences
        with torch.device("meta"):
            result = tokens(model, *given, **options).sequences
    assert result.device.type == "cpu" and torch.equal(result, expected)


def test_without_a_schedule(model):
    from dgemma_accel.hf.denoising import temperature_of_step

    with torch.device("meta"):
        assert temperature_of_step([], 3).item() == 1.0


def test_a_seed_that_is_drawn_for_an_op():
    logits = torch.randn(4, 50)
    torch.manual_seed(3)
    expected = dgemma_accel.row_stats(logits)
    torch.manual_seed(3)
    with torch.device("meta"):
        stats = dgemma_accel.row_stats(logits)
    assert torch.equal(stats.sample, expected.sample)


def test_flags_come_to_the_host(monkeypatch):
    """Pinned memory is the host's, wherever tensors are made by default."""
    right, made = torch.empty, []

    def empty(*shape, pin_memory, **options):
        made.append(pin_memory)
        return right(*shape, **options)

    class Event:
        def record(self, stream):
            pass

        def synchronize(self):
            pass

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    with torch.device("meta"):
        (copy,) = lookout.PinnedCopy([torch.tensor([True, False], device="cpu")]).wait()
    assert made == [True] and copy.tolist() == [True, False]
