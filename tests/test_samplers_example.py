"""The trained model of examples/tiny-masked answers right, and in fewer evaluations than tokens."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
FOLDER = EXAMPLES / "tiny-masked"
# The other example has modules of the same names.
MODULES = ("data", "evaluate", "tasks", "tokenizer")


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("transformers")
    if not FOLDER.exists():
        pytest.skip("the examples are not here")
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    paths = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    try:
        evaluate = importlib.import_module("evaluate")
        yield evaluate, *evaluate.load(FOLDER / "checkpoint")
    finally:
        sys.path[:] = paths
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


@pytest.mark.skipif(not FOLDER.exists(), reason="the examples are not here")
def test_checkpoint_is_small():
    assert sum(file.stat().st_size for file in (FOLDER / "checkpoint").iterdir()) < 10e6


@pytest.mark.parametrize(
    ("name", "least", "most_evaluations"),
    [
        ("LowConfidence(), 12 steps", 0.9, 12),
        ("LowConfidence(), 4 steps", 0.85, 4),
        ("Threshold(0.9)", 0.9, 5),
        ("EntropyBound(0.1)", 0.9, 6),
        ("CreditThreshold(0.9)", 0.9, 5),
        ("HierarchyWithRemask(0.9, 0.4, 0.4)", 0.85, 5),
        ("JointThresholdEdit(0.7, 0.9)", 0.85, 6),
    ],
)
def test_held_out_prompts(example, name, least, most_evaluations):
    evaluate, model, tokenizer = example
    strategy, steps = evaluate.STRATEGIES[name]
    score = evaluate.score(
        model, tokenizer, evaluate.pairs_of(60, seed=3), evaluate.sampler_of(strategy, steps)
    )
    assert score.right >= least * score.total
    assert score.evaluations <= most_evaluations
    assert score.stuck == 0


def test_an_untrained_model_fails(example):
    evaluate, model, tokenizer = example
    torch.manual_seed(0)
    blank = type(model)(model.config).eval()
    strategy, steps = evaluate.STRATEGIES["Threshold(0.9)"]
    score = evaluate.score(
        blank, tokenizer, evaluate.pairs_of(20, seed=3), evaluate.sampler_of(strategy, steps)
    )
    assert score.right <= 1
