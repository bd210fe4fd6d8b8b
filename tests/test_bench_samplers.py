"""The bench of the samplers: the count of passes over the table, and that every kind has its published code."""

import pytest
import torch

from bench import bench_samplers
from bench.__main__ import main
from bench.peers import published_samplers
from bench.peers.traffic import passes


def test_passes_of_known_computations():
    x = torch.randn(8, 4096)
    assert passes(lambda: x.argmax(-1), x) == pytest.approx(1, abs=0.01)
    assert passes(lambda: torch.softmax(x, -1), x) == pytest.approx(2, abs=0.01)
    assert passes(lambda: torch.softmax(x.double(), -1), x) == pytest.approx(3 + 4, abs=0.01)
    assert passes(lambda: x[:4].view(-1), x) == 0
    assert passes(lambda: x.gather(-1, x.argmax(-1, keepdim=True)), x) == pytest.approx(1, abs=0.01)
    assert passes(lambda: torch.rand_like(x), x) == 1
    assert passes(lambda: x.clone().zero_(), x) == 3


# What counting operators by hand gives: argmax 1, softmax 2, a cast to fp64 3, an operator on fp64 twice as much.
BY_HAND = {
    "LLaDA random": 1, "LLaDA low_confidence": 3, "Fast-dLLM low_confidence": 8, "Fast-dLLM threshold": 8,
    "Fast-dLLM factor": 8, "dInfer threshold": 3, "dInfer hierarchy": 3, "SGLang LowConfidence": 3,
    "SDAR low_confidence_dynamic": 3,
}  # fmt: skip


@pytest.mark.parametrize("kind", bench_samplers.KINDS)
def test_every_kind_says_how_often_published_code_passes_over_the_table(kind):
    inputs = bench_samplers.make_inputs(kind, 32, 8192, torch.float32, torch.device("cpu"), 0)
    found = published_samplers.table_passes(inputs)
    assert found == pytest.approx(BY_HAND[kind], abs=0.1) if kind in BY_HAND else found > 2.5
    case = bench_samplers.cases(torch.device("cpu"), bench_samplers.Sizes(quick=True))[0][0]
    (variant,) = published_samplers.variants(case, inputs)
    assert f"{found:.1f} passes" in variant.name


@pytest.mark.parametrize("rows", ["1", "2"])
def test_a_strategy_that_rightly_commits_nothing_is_not_wrong(rows):
    arguments = ["--rows", rows, "--vocab", "64", "--device", "cpu", "--quick", "--peer", "none"]
    assert main(["samplers", *arguments]) == 0


def test_a_vocabulary_of_the_mask_alone_is_refused(capsys):
    assert main(["samplers", "--vocab", "1", "--device", "cpu"]) == 2
    assert "--vocab: must be at least 2 here" in capsys.readouterr().err
