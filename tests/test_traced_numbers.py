"""Numbers among an op's arguments where `torch.compile` traces the call: no kernel of the host makes them."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import dgemma_accel
from dgemma_accel.samplers import EntropyBound, EntropyThreshold, Renoise, Threshold, TopK


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def statistics(shape, device):
    integers = [torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2)]
    return dgemma_accel.RowStats(*integers, *(torch.ones(shape, device=device) for _ in range(5)))


def decide(tokens, stats, bound, seed, offset):
    return dgemma_accel.commit(
        tokens, stats, EntropyBound(bound), Renoise(83), seed=seed, offset=offset
    ).tokens


def arguments(device="cpu"):
    whole = torch.tensor(1, device="cpu").to(device)
    tokens = torch.zeros((2, 5), dtype=torch.int64, device=device)
    return tokens, statistics((2, 5), device), torch.tensor(0.5, device="cpu").to(device), whole, whole


def test_the_commit_of_a_step_has_no_code_but_the_op():
    """On a GPU what makes a number of the host would be C++, for which that machine need not have a compiler."""
    given = arguments()
    result, codes = run_and_get_code(torch.compile(decide, fullgraph=True), *given)
    assert torch.equal(result, decide(*given))
    assert "torch.ops.dgemma.commit" in codes[-1] and "cpp_fused" not in codes[-1]


@pytest.mark.parametrize(
    "rule",
    [TopK(3), Threshold(0.25), EntropyBound(0.5), EntropyThreshold(0.5)],
    ids=lambda rule: type(rule).__name__,
)
def test_numbers_are_made_where_the_tensors_are(rule):
    """ "meta" stands for a GPU."""
    tokens, stats, _, seed, offset = arguments("meta")
    made = []

    def backend(module, inputs):
        for node in module.graph.nodes:
            value = node.meta.get("example_value")
            if node.op != "placeholder" and isinstance(value, torch.Tensor) and not value.is_meta:
                made.append(node.format_node())
        return module.forward

    def call(tokens):
        return dgemma_accel.commit(tokens, stats, rule, Renoise(83), seed=seed, offset=offset).tokens

    assert torch.compile(call, fullgraph=True, backend=backend)(tokens).is_meta
    assert made == [] and counters["stats"]["unique_graphs"] == 1


def test_a_step_number_does_not_recompile():
    """Beyond the two traces that a plain number costs: its first value, and any."""
    logits = torch.randn(3, 50)

    def call(logits, offset):
        return dgemma_accel.row_stats(logits, seed=4, offset=offset, temperature=0.5).sample

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for offset in range(2, 9):
        assert torch.equal(compiled(logits, offset), call(logits, offset))
    assert counters["stats"]["unique_graphs"] == 2
